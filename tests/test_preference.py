"""The losses of preference learning: golden vectors, what the formulas promise, and a mutation run."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import preference_golden
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_golden import close, t
from mutants import survivors
from preference_golden import LENGTHS, MAY, NEEDS, REFERENCE

from grape import preference
from grape.preference import bradley_terry_loss, kto_loss, preference_loss, ranking_loss

logps = st.lists(st.floats(-60, 0), min_size=5, max_size=5)
betas = st.sampled_from([0.05, 0.1, 0.5, 2.0])


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of a few numbers: threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("check", preference_golden.ALL, ids=lambda check: check.__name__)
def test_the_golden_vectors_hold(check):
    check(preference)


def needed(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random pairs, and what a kind needs beside them."""
    random = torch.Generator().manual_seed(seed)
    sums = {name: -20 * torch.rand(5, generator=random, dtype=torch.float64) - 0.1 for name in REFERENCE}
    lengths = {name: torch.randint(1, 30, (5,), generator=random) for name in LENGTHS}
    return {name: value for name, value in {**sums, **lengths}.items() if name in NEEDS[kind]}


@pytest.mark.parametrize("kind", NEEDS)
def test_the_gradients_are_those_of_finite_differences(kind):
    more = {"probability_P": t(0.1, 0.3, 0.5, 0.9, 1.0), "smoothing": 0.2, "gamma": 0.5}
    options = {MAY[kind]: more[MAY[kind]]} if kind in MAY else {}
    random = torch.Generator().manual_seed(7)
    win, lose = (-20 * torch.rand(5, generator=random, dtype=torch.float64) - 0.1 for _ in range(2))

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return preference_loss(kind, a, b, beta=0.3, **needed(kind), **options)[0]

    assert torch.autograd.gradcheck(loss, (win.requires_grad_(), lose.requires_grad_()))


def test_the_other_gradients_are_those_of_finite_differences():
    score = t(0.3, -2, 1.5, 4, 0.2).requires_grad_()
    good = torch.tensor([True, False, False, True, True])
    assert torch.autograd.gradcheck(ranking_loss, (score,))
    assert torch.autograd.gradcheck(lambda x: kto_loss(x, t(0, 1, -1, 2, 0.5), good, 0.4, beta=0.3)[0], (score,))
    assert torch.autograd.gradcheck(lambda x: preference.outcome_loss(x, good), (score,))
    steps = t([0.3, -2, 1.5], [4, 0.2, 0.1]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: preference.step_loss(x, torch.tensor([-1, 1])), (steps,))


@settings(max_examples=50)
@given(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_a_ranking_of_two_is_a_bradley_terry_pair(best, worst):
    close(ranking_loss(t(best, worst)), bradley_terry_loss(t(best), t(worst))[0])


@settings(max_examples=50)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6), st.floats(-100, 100))
def test_a_ranking_knows_scores_only_up_to_a_constant_and_likes_the_right_order_best(scores, shift):
    close(ranking_loss(t(*scores) + shift), ranking_loss(t(*scores)))
    best = ranking_loss(t(*sorted(scores, reverse=True)))
    assert float(best) <= float(ranking_loss(t(*scores))) + 1e-9
    assert float(best) >= 0


@settings(max_examples=50)
@given(logps, logps)
def test_a_label_that_is_sure_is_the_hard_one_and_half_a_label_is_symmetric(win, lose):
    sure, half = torch.ones(5), torch.full((5,), 0.5)
    hard = bradley_terry_loss(t(*win), t(*lose))
    close(bradley_terry_loss(t(*win), t(*lose), probability_P=sure), hard, 0)
    close(bradley_terry_loss(t(*win), t(*lose), probability_P=1 - sure), bradley_terry_loss(t(*lose), t(*win)))
    either = [bradley_terry_loss(a, b, probability_P=half) for a, b in ((t(*win), t(*lose)), (t(*lose), t(*win)))]
    close(*either)
    ref = needed("dpo")
    of_dpo = preference_loss("dpo", t(*win), t(*lose), beta=0.1, **ref)[0]
    close(preference_loss("dpo", t(*win), t(*lose), beta=0.1, probability_P=sure, **ref)[0], of_dpo, 0)


@settings(max_examples=50)
@given(logps, logps, betas, st.floats(0, 0.49))
def test_cdpo_is_dpo_whose_labels_are_wrong_now_and_then(win, lose, beta, smoothing):
    pairs, ref = (t(*win), t(*lose)), needed("cdpo")
    plain, plain_metrics = preference_loss("dpo", *pairs, beta=beta, **ref)
    none, metrics = preference_loss("cdpo", *pairs, beta=beta, smoothing=0.0, **ref)
    close(none, plain, 0)
    assert metrics == plain_metrics
    soft = torch.full((5,), 1 - smoothing, dtype=torch.float64)
    labelled = preference_loss("dpo", *pairs, beta=beta, probability_P=soft, **ref)[0]
    close(preference_loss("cdpo", *pairs, beta=beta, smoothing=smoothing, **ref)[0], labelled)


@settings(max_examples=50)
@given(logps, logps, logps, betas, st.sampled_from(["dpo", "cdpo", "ipo"]))
def test_a_constant_added_to_policy_and_reference_changes_no_loss(win, lose, shift, beta, kind):
    """A prompt that is counted in both, say; of IPO only where both are as long."""
    given_ = needed(kind)
    if kind == "ipo":
        given_["rejected_tokens_P"] = given_["chosen_tokens_P"]
    moved = {**given_, "ref_chosen_P": given_["ref_chosen_P"] + t(*shift)}
    close(
        preference_loss(kind, t(*win) + t(*shift), t(*lose), beta=beta, **moved)[0],
        preference_loss(kind, t(*win), t(*lose), beta=beta, **given_)[0],
        1e-7,
    )
    both = {**moved, "ref_rejected_P": given_["ref_rejected_P"] + t(*shift)}
    close(
        preference_loss(kind, t(*win), t(*lose), beta=beta, **both)[0],
        preference_loss(kind, t(*win), t(*lose), beta=beta, **given_)[0],
        1e-7,
    )


@settings(max_examples=50)
@given(logps, logps, betas, st.sampled_from(list(NEEDS)), st.data())
def test_a_kind_ignores_nothing_it_is_given(win, lose, beta, kind, data):
    """What a kind takes changes its loss; what it does not take is refused."""
    pairs, has = (t(*win) - 1, t(*lose) - 1), needed(kind)
    loss = preference_loss(kind, *pairs, beta=beta, **has)[0]
    name = data.draw(st.sampled_from(["chosen", "rejected", *has]))
    if name in ("chosen", "rejected"):
        changed = (pairs[0] - 2 * (name == "chosen"), pairs[1] - 2 * (name == "rejected"))
        other = preference_loss(kind, *changed, beta=beta, **has)[0]
    else:
        other = preference_loss(kind, *pairs, beta=beta, **{**has, name: has[name] + 3})[0]
    assert (other != loss).any()
    for stranger in set(preference_golden.OPTIONAL) - set(has) - {MAY.get(kind)}:
        value = preference_golden.OPTIONAL[stranger]
        with pytest.raises(ValueError, match=f"kind='{kind}' takes no {stranger}"):
            preference_loss(kind, *pairs, beta=beta, **has, **{stranger: value})


@settings(max_examples=50)
@given(logps, logps, betas)
def test_the_gradient_of_dpo_weighs_a_pair_by_how_wrong_its_order_is(win, lose, beta):
    """-beta sigma(r_l - r_w): Rafailov et al. 2023, section 4; of equal size on both sides."""
    ref = needed("dpo")
    chosen, rejected = t(*win).requires_grad_(), t(*lose).requires_grad_()
    preference_loss("dpo", chosen, rejected, beta=beta, **ref)[0].sum().backward()
    reward = [beta * (x.detach() - ref[name]) for x, name in zip((chosen, rejected), REFERENCE, strict=True)]
    close(chosen.grad, -beta * (reward[1] - reward[0]).sigmoid())
    close(rejected.grad, -chosen.grad, 0)


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(0, 5), st.data())
def test_the_parts_of_a_batch_of_sft_add_up_however_they_are_cut(seed, rows, length, data):
    cuts = data.draw(st.lists(st.integers(0, rows), max_size=4))
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=random) < 0.6
    logprobs = -torch.rand(rows, length, generator=random, dtype=torch.float64)
    preference_golden.sft_parts(preference, torch.where(mask, logprobs, torch.nan), mask, cuts)


@settings(max_examples=50)
@given(logps, logps, betas)
def test_kto_pushes_the_good_up_and_the_bad_down_and_stops_far_out(logp, ref, beta):
    for good in (True, False):
        x = t(*logp).requires_grad_()
        loss, _ = kto_loss(x, t(*ref), torch.full((5,), good), 0.5, beta=beta)
        loss.sum().backward()
        assert ((x.grad <= 0) if good else (x.grad >= 0)).all()
        assert (loss >= 0).all() and (loss <= 1).all()
        assert x.grad.abs().max() <= beta / 4


def test_ipo_has_its_least_loss_at_its_target_and_dpo_has_none():
    """The pull of IPO ends at 1/(2 beta) per token, whatever the labels; that of DPO never does."""
    one = torch.ones(1)
    zero = {"ref_chosen_P": t(0), "ref_rejected_P": t(0)}
    for gap, sign in ((4.0, -1), (5.0, 0), (6.0, 1)):
        x = t(gap).requires_grad_()
        preference_loss("ipo", x, t(0), beta=0.1, chosen_tokens_P=one, rejected_tokens_P=one, **zero)[0].backward()
        assert float(x.grad) == sign * 2
        x = t(gap).requires_grad_()
        preference_loss("dpo", x, t(0), beta=0.1, **zero)[0].backward()
        assert float(x.grad) < 0


# Two mutants compute the same: the tensors come back as many as they went, and kl is always among the metrics.
EQUIVALENT = [
    ["True", "constants = dict(zip(tensors, rest, strict=True))"],
    ["LtE", 'if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():'],
]


@pytest.mark.slow
def test_every_mutant_is_caught_by_a_golden_vector():
    alive, total = survivors(preference, preference_golden.ALL)
    assert total > 120
    assert [line.split(": ", 2)[1:] for line in alive] == EQUIVALENT


# Terms and guards that an operator's swap does not reach: what stands there, and what is left of it.
DROPPED = [
    (" - _wide(margin_P).detach()", ""),
    ("_wide(margin_P).detach()", "_wide(margin_P)"),
    ("_wide(probability_P).detach()", "_wide(probability_P)"),
    ("correct.detach()", "correct"),
    ("mask = mask_BT.bool()", "mask = torch.ones_like(mask_BT).bool()"),
    ("num_sequences=num_sequences, ", ""),
    (", num_tokens=num_tokens)", ")"),
    (".triu()", ".tril()"),
    ("-_wide(logits_N3)", "-logits_N3"),
    ("value.detach() for name, value in optional", "value for name, value in optional"),
    *[
        (
            f"value.detach() for name, value in metrics.items()}}\n\n\ndef {after}",
            f"value for name, value in metrics.items()}}\n\n\ndef {after}",
        )
        for after in ("kto_loss", "kto_kl")
    ],
    (" - gamma, constants", ", constants"),
    ("-better - beta * logsigmoid", "-beta * logsigmoid"),
    (" - 1 / (2 * beta))", ")"),
    (".square()", ".abs()"),
    ("better - worse - 1", "chosen - rejected - 1"),
    ('.get("probability_P", 1 - smoothing)', '.get("probability_P", 1)'),
    (" + (better == worse).to(loss) / 2", ""),
    ("_mean(-better)", "_mean(-chosen)"),
    ("tokens_P.clamp(min=1)", "tokens_P"),
    (".detach().to(logprobs).clamp(min=0)", ".to(logprobs).clamp(min=0)"),
    (".to(logprobs).clamp(min=0)", ".to(logprobs)"),
    ("ratio = logprobs - ref.detach()", "ratio = logprobs - ref"),
    ("(ratio - z)", "ratio"),
    ("desirable_weight * (-above).sigmoid()", "(-above).sigmoid()"),
    ("desirable_weight * (-above).sigmoid()", "desirable_weight * (1 - above.sigmoid())"),
    ("undesirable_weight * above", "above"),
    ("_mean(logprobs - ref).detach()", "_mean(logprobs - ref)"),
    (".detach().clamp(min=0)\n", ".detach()\n"),
    ("logp.clamp(max=CERTAIN)", "logp"),
    ("-logp.expm1()", "1 - logp.exp()"),
    ("CERTAIN = -1e-12", "CERTAIN = -1e-6"),
    (" - (-logp.expm1()).log()", ""),
    ("len(shapes) > 1 or ", ""),
    ("return [_wide(tensor) for tensor in there]", "return there"),
    ("value.to(torch.promote_types(value.dtype, torch.float32))", "value.float()"),
]


@pytest.mark.slow
def test_every_term_that_is_dropped_is_missed_by_a_golden_vector():
    source = Path(preference.__file__).read_text(encoding="utf-8")
    for before, after in DROPPED:
        assert before in source, before
        mutant = ModuleType("grape.preference")
        exec(compile(source.replace(before, after), "<mutant>", "exec"), mutant.__dict__)
        with pytest.raises((AssertionError, LookupError, RuntimeError, TypeError, ValueError)):
            for check in preference_golden.ALL:
                check(mutant)
            pytest.fail(f"{before!r} as {after!r} is not noticed")
