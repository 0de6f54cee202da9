"""The loss: golden vectors, the properties of micro-batches and masks, and a mutation run."""

from __future__ import annotations

import loss_golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import survivors

from grape import kl, loss, value

BOTH = [(loss, check) for check in loss_golden.LOSS]
BOTH += [(kl, check) for check in loss_golden.KL]
BOTH += [(value, check) for check in loss_golden.VALUE]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of a few numbers: threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("module", "check"), BOTH, ids=lambda part: part.__name__)
def test_the_golden_vectors_hold(module, check):
    check(module)


@settings(deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(2, 9),
    st.integers(1, 6),
    st.sampled_from(loss_golden.RATIOS),
    st.sampled_from(loss_golden.AGGREGATES),
    st.sampled_from(["full", "k2", "k3"]),
    st.data(),
)
def test_micro_batches_add_up_however_they_are_cut(seed, rows, length, ratio, aggregate, kind, data):
    cuts = data.draw(st.lists(st.integers(0, rows), max_size=4))
    options = {**loss_golden.ALL_ON, "kl": kind, "ratio": ratio, "aggregate": aggregate}
    loss_golden.split_check(loss, loss_golden.batch(seed, rows, length), cuts, **options)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(loss_golden.RATIOS), st.sampled_from(loss_golden.AGGREGATES))
def test_padding_to_the_right_or_left_changes_nothing(seed, ratio, aggregate):
    batch = loss_golden.batch(seed)
    options = {**loss_golden.ALL_ON, "ratio": ratio, "aggregate": aggregate}
    wanted, _, grads = loss_golden.graded(loss, batch, **options)
    for left, right in ((0, 3), (2, 0)):
        padded = {
            name: torch.nn.functional.pad(tensor, (left, right)) if tensor.dim() == 2 else tensor
            for name, tensor in batch.items()
        }
        got, _, wide = loss_golden.graded(loss, padded, **options)
        loss_golden.close(got, wanted)
        for grad, small in zip(wide, grads, strict=True):
            loss_golden.close(grad[:, left : left + small.shape[1]], small)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.5), st.floats(0, 0.5))
def test_the_clipped_objective_is_the_lesser_of_both(seed, low, high):
    """Eq. 14 as it is printed, by torch.minimum, against the form that names the clipped tokens."""
    batch = {name: loss_golden.batch(seed)[name] for name in ("logprobs_BT", "old_logprobs_BT", "advantage", "mask_BT")}
    new = batch["logprobs_BT"].clone().requires_grad_()
    rho, gain = (new - batch["old_logprobs_BT"]).exp(), batch["advantage"][:, None]
    printed = torch.minimum(rho * gain, rho.clamp(1 - low, 1 + high) * gain)
    wanted = -torch.where(batch["mask_BT"], printed, 0.0).sum() / len(gain)
    wanted.backward()
    got, _, grads = loss_golden.graded(loss, batch, clip_low=low, clip_high=high)
    loss_golden.close(got, wanted.detach())
    loss_golden.close(grads[0], new.grad)


def test_k2_in_the_loss_follows_the_exact_kl_and_k1_would_have_no_gradient():
    """Expectations over a vocabulary of five, exactly: why k1 is refused in the loss."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    ref = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(-1)

    def slope(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits)[0]

    new = logits.log_softmax(-1)
    drawn = new.exp().detach()
    exact = slope(kl.full_kl(new, ref))
    loss_golden.close(slope((drawn * kl.k2(logits.log_softmax(-1), ref)).sum()), exact)
    loss_golden.close(slope((drawn * kl.k1(logits.log_softmax(-1), ref)).sum()), torch.zeros(5))
    assert exact.abs().max() > 0.1


# Two mutants compute the same: an advantage of 0 is 0 by any weight, and a token of probability 0 is multiplied by it.
EQUIVALENT: dict[str, list[list[str]]] = {
    "loss": [["Lt", "taper = torch.where(gain < 0, rho.detach().clamp(max=1.0), 1.0)"]],
    "kl": [["0.0", "excess = torch.where(possible, logprobs_BTV - other_logprobs_BTV, 0.0)"]],
    "value": [],
}


@pytest.mark.parametrize(
    ("module", "checks", "least"),
    [
        pytest.param(loss, loss_golden.LOSS, 90, marks=pytest.mark.slow),
        (kl, loss_golden.KL, 15),
        (value, loss_golden.VALUE, 25),
    ],
    ids=["loss", "kl", "value"],
)
def test_every_mutant_is_caught_by_a_golden_vector(module, checks, least):
    alive, total = survivors(module, checks)
    assert total > least
    assert [line.split(": ", 2)[1:] for line in alive] == EQUIVALENT[module.__name__.removeprefix("grape.")]
