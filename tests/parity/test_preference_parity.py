"""Our losses of preference learning against those of TRL 1.16.0, formula by formula.

TRL computes its losses in methods of its trainers. They are called here as they are, on an object that has what they
ask a trainer for; the model's outputs are given tensors, so that a loss and its gradient compare token by token.
TRL has no loss of rankings, ORM or PRM: those stand on their golden vectors alone.

Not the same, by definition, and tested as such at the end:

- DPOTrainer has no cDPO: its label_smoothing is for `robust`, another loss. cDPO compares with CPO's, fed log-ratios,
  and with `aot` of a single pair.
- IPO's rewards are beta times sums in TRL's log and per token in ours, as its loss has them. The losses are the same.
- ORPO's first term is, in TRL, the mean over all tokens of the batch, the prompt's too; in ours the mean over pairs of
  the mean over the response. At p = 1, and within float32's rounding of it, TRL's gradient is NaN.
- CPOTrainer adds a term of SFT to SimPO unless cpo_alpha is 0.
- A tie is wrong in TRL's accuracy and half right in ours; logps of SimPO and ORPO are per token in TRL's log.
"""

from __future__ import annotations

import os
from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grape.preference import bradley_terry_loss, kto_kl, kto_loss, preference_loss, sft_loss

pytestmark = pytest.mark.parity

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # trl.experimental warns
LOSS = GRAD = 1e-6
BETAS = [0.05, 0.3, 2.0]
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, parallelism_config=None
)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors of a few numbers: threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer(**settings: Any) -> SimpleNamespace:
    """What TRL's losses ask a trainer for."""
    common = {"accelerator": ACCELERATOR, "aux_loss_enabled": False, "_tp_size": 1, "_total_train_tokens": 0}
    return SimpleNamespace(
        **common, model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)}, **settings
    )


def batch(rows: int = 6, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of responses of 1 to 9 tokens after a prompt of 3, those of a reference, and the mask, BT.

    Masked positions are 0, as a model of TRL gives them.
    """
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (rows, 1), generator=random)
    place = torch.arange(11)[None, :]
    mask = (place >= 2) & (place < 2 + lengths)
    new = -2 * torch.rand(rows, 11, generator=random)
    ref = new + 0.5 * torch.randn(rows, 11, generator=random)
    return new * mask, ref * mask, mask


def outputs(logprobs: Tensor, mask: Tensor) -> SimpleNamespace:
    """A model's answer: beside the log-probabilities, what TRL only logs."""
    return SimpleNamespace(
        log_probs=logprobs,
        entropy=torch.zeros_like(logprobs),
        mean_logits=torch.zeros_like(logprobs),
        is_top1=torch.zeros_like(mask, dtype=torch.bool),
        label_mask=mask,
    )


def inputs(mask: Tensor) -> dict[str, Tensor]:
    """Tokens of which the log-probabilities above are those of the second onwards."""
    whole = torch.nn.functional.pad(mask.long(), (1, 0))
    return {"input_ids": torch.ones_like(whole), "attention_mask": torch.ones_like(whole), "completion_mask": whole}


def dpo_by_trl(kind: str, beta: float, smoothing: float = 0.0, pairs: Any = None) -> tuple[Tensor, dict, Tensor]:
    """DPOTrainer's loss, its log, and the gradient at each token; the first half of the rows is chosen."""
    from trl import DPOTrainer

    new, ref, mask = pairs or batch()
    new = new.clone().requires_grad_()
    given = inputs(mask)
    given["ref_chosen_logps"], given["ref_rejected_logps"] = ref.sum(1).chunk(2)
    self = trainer(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
    )
    loss = DPOTrainer._compute_loss(self, lambda **_: outputs(new, mask), given, False)
    loss.backward()
    assert new.grad is not None
    return loss.detach(), {name: value[-1] for name, value in self._metrics["train"].items()}, new.grad


def by_us(kind: str, beta: float, pairs: Any = None, **options: Any) -> tuple[Tensor, dict[str, float], Tensor]:
    """Ours of the same rows, as a mean over pairs."""
    new, ref, mask = pairs or batch()
    new = new.clone().requires_grad_()
    given: dict[str, Any] = dict(options)
    if kind in ("dpo", "cdpo", "ipo"):
        given["ref_chosen_P"], given["ref_rejected_P"] = ref.sum(1).chunk(2)
    if kind in ("ipo", "simpo", "orpo"):
        given["chosen_tokens_P"], given["rejected_tokens_P"] = mask.sum(1).chunk(2)
    loss, metrics = preference_loss(kind, *(new * mask).sum(1).chunk(2), beta=beta, **given)
    loss.mean().backward()
    assert new.grad is not None
    return loss.mean().detach(), {name: float(value) for name, value in metrics.items()}, new.grad


def same(mine: tuple, other: tuple) -> None:
    torch.testing.assert_close(mine[0], other[0], rtol=LOSS, atol=LOSS)
    torch.testing.assert_close(mine[2], other[2] * (mine[2] != 0), rtol=GRAD, atol=GRAD)
    assert mine[2].abs().max() > 1e-4


NAMES = {
    "rewards/chosen": "rewards/chosen",
    "rewards/rejected": "rewards/rejected",
    "rewards/margin": "rewards/margins",
    "rewards/accuracy": "rewards/accuracies",
    "logps/chosen": "logps/chosen",
    "logps/rejected": "logps/rejected",
}


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_and_what_is_logged_of_it(beta):
    mine, other = by_us("dpo", beta), dpo_by_trl("sigmoid", beta)
    same(mine, other)
    for name, theirs in NAMES.items():
        assert mine[1][name] == pytest.approx(other[1][theirs], abs=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_ipo(beta):
    same(by_us("ipo", beta), dpo_by_trl("ipo", beta))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_cdpo_by_a_single_pair_of_aot(beta, smoothing):
    pairs = batch(rows=2)
    mine = by_us("cdpo", beta, pairs, smoothing=smoothing)
    same(mine, dpo_by_trl("aot", beta, smoothing, pairs))


def cpo_by_trl(kind: str, beta: float, chosen: Tensor, rejected: Tensor, **settings: float) -> tuple:
    """CPOTrainer's losses and rewards of each pair."""
    from trl.experimental.cpo import CPOTrainer

    given = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.0, **settings}
    return CPOTrainer.cpo_loss(trainer(loss_type=kind, beta=beta, **given), chosen, rejected)


def graded(loss: Any, *sides: Tensor) -> tuple[Tensor, ...]:
    """The losses of each pair and their gradients."""
    leaves = [side.detach().clone().requires_grad_() for side in sides]
    loss_P = loss(*leaves)
    loss_P.sum().backward()
    return (loss_P.detach(), *(leaf.grad for leaf in leaves))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_cdpo_by_cpo_of_log_ratios(beta, smoothing):
    new, ref, _ = batch(rows=40)
    chosen, rejected = (new - ref).sum(1).chunk(2)
    zero = torch.zeros(20)
    mine = graded(lambda a, b: preference_loss("cdpo", a, b, zero, zero, beta=beta, smoothing=smoothing)[0], chosen, rejected)  # fmt: skip
    other = graded(lambda a, b: cpo_by_trl("sigmoid", beta, a, b, label_smoothing=smoothing)[0], chosen, rejected)
    torch.testing.assert_close(mine, other, rtol=LOSS, atol=LOSS)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.6])
def test_simpo_with_gamma_inside_of_sigma_and_undivided(beta, gamma):
    new, _, mask = batch(rows=40)
    sums, lengths = new.sum(1).chunk(2), mask.sum(1).chunk(2)
    tokens = dict(zip(("chosen_tokens_P", "rejected_tokens_P"), lengths, strict=True))
    mine = graded(lambda a, b: preference_loss("simpo", a, b, beta=beta, gamma=gamma, **tokens)[0], *sums)
    other = graded(lambda a, b: cpo_by_trl("simpo", beta, a / lengths[0], b / lengths[1], simpo_gamma=gamma)[0], *sums)
    torch.testing.assert_close(mine, other, rtol=LOSS, atol=LOSS)
    metrics = preference_loss("simpo", *sums, beta=beta, gamma=gamma, **tokens)[1]
    _, chosen, rejected = cpo_by_trl("simpo", beta, sums[0] / lengths[0], sums[1] / lengths[1], simpo_gamma=gamma)
    assert float(metrics["rewards/chosen"]) == pytest.approx(float(chosen.mean()), abs=1e-6)
    assert float(metrics["rewards/rejected"]) == pytest.approx(float(rejected.mean()), abs=1e-6)


def odds_by_trl(beta: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    """ORPOTrainer's second term of each pair, of mean log-probabilities; it is subtracted from the first."""
    from trl.experimental.orpo import ORPOTrainer

    return -ORPOTrainer.odds_ratio_loss(trainer(beta=beta), chosen, rejected)[0]


@pytest.mark.parametrize("beta", BETAS)
def test_the_odds_of_orpo(beta):
    new, _, mask = batch(rows=40)
    sums, lengths = new.sum(1).chunk(2), mask.sum(1).chunk(2)
    tokens = dict(zip(("chosen_tokens_P", "rejected_tokens_P"), lengths, strict=True))
    mine = graded(lambda a, b: preference_loss("orpo", a, b, beta=beta, **tokens)[0], *sums)
    other = graded(lambda a, b: odds_by_trl(beta, a / lengths[0], b / lengths[1]) - a / lengths[0], *sums)
    torch.testing.assert_close(mine, other, rtol=LOSS, atol=LOSS)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("better", [True, False], ids=["kl above 0", "kl below 0"])
def test_kto_with_its_kl_its_weights_and_what_is_logged(beta, better):
    """The KL of mismatched pairs is above 0, or below and cut; the loss is a mean over all rows."""
    from trl import KTOTrainer

    new, ref, mask = batch()
    kl_new, kl_ref, _ = batch(seed=4)
    if better != bool((kl_new - kl_ref).sum() > 0):
        kl_new, kl_ref = kl_ref, kl_new
    good = torch.tensor([True, False, False, True, False, False])
    whole = inputs(mask)
    given = {**whole, **{f"KL_{name}": value.clone() for name, value in whole.items()}, "label": good}
    given |= {"ref_logps": ref.sum(1), "ref_KL_logps": kl_ref.sum(1)}
    leaf = new.clone().requires_grad_()

    def model(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return outputs(kl_new if input_ids is given["KL_input_ids"] else leaf, mask)

    self = trainer(
        loss_type="kto",
        beta=beta,
        calculate_KL=True,
        precompute_ref_logps=True,
        desirable_weight=1.25,
        undesirable_weight=0.75,
    )
    self._compute_kl_logps = partial(KTOTrainer._compute_kl_logps, self)
    loss = KTOTrainer._compute_loss(self, model, given, False)
    loss.backward()
    logged = {name: value[-1] for name, value in self._metrics["train"].items()}

    mine = new.clone().requires_grad_()
    kl = kto_kl(kl_new.sum(1), kl_ref.sum(1))
    assert bool(kl > 0.1) == better
    weights = {"desirable_weight": 1.25, "undesirable_weight": 0.75}
    loss_B, metrics = kto_loss((mine * mask).sum(1), ref.sum(1), good, kl, beta=beta, **weights)
    loss_B.mean().backward()
    same((loss_B.mean().detach(), None, mine.grad), (loss.detach(), None, leaf.grad))
    for name in ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert float(metrics[name]) == pytest.approx(logged[name], abs=1e-5)
    assert float(metrics["rewards/margin"]) == pytest.approx(logged["rewards/margins"], abs=1e-5)


@pytest.mark.parametrize("with_margin", [True, False])
def test_bradley_terry_with_and_without_a_margin(with_margin):
    from trl import RewardTrainer

    random = torch.Generator().manual_seed(5)
    scores = 3 * torch.randn(40, generator=random)
    margin = {"margin": torch.rand(20, generator=random)} if with_margin else {}
    theirs = scores.clone().requires_grad_()
    self = trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    given = {"attention_mask": torch.ones(40, 3), **margin}
    loss = RewardTrainer.compute_loss(self, lambda **_: SimpleNamespace(logits=theirs[:, None]), given)
    loss.backward()
    mine = scores.clone().requires_grad_()
    ours = bradley_terry_loss(*mine.chunk(2), margin_P=margin.get("margin")).mean()
    ours.backward()
    torch.testing.assert_close(ours.detach(), loss.detach(), rtol=LOSS, atol=LOSS)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=GRAD, atol=GRAD)


@pytest.mark.parametrize("total", [None, 77], ids=["alone", "part of a larger batch"])
def test_sft_is_the_mean_over_tokens(total):
    from trl import SFTTrainer

    new, _, mask = batch()
    theirs = new.clone().requires_grad_()
    self = trainer(
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
        compute_loss_func=None,
        label_smoother=None,
    )
    loss = SFTTrainer.compute_loss(self, lambda **_: outputs(theirs, mask), inputs(mask), num_items_in_batch=total)
    loss.backward()
    mine = new.clone().requires_grad_()
    ours = sft_loss(mine, mask, num_tokens=total)
    ours.backward()
    torch.testing.assert_close(ours.detach(), loss.detach(), rtol=LOSS, atol=LOSS)
    torch.testing.assert_close(mine.grad[mask], theirs.grad[mask], rtol=GRAD, atol=GRAD)


def test_robust_dpo_is_another_loss_than_cdpo():
    """TRL's only smoothed sigmoid over pairs: cDPO's labels turned round and blown up."""
    mine = by_us("cdpo", 0.3, smoothing=0.1)[0]
    robust = dpo_by_trl("robust", 0.3, 0.1)[0]
    straight = by_us("dpo", 0.3)[0]
    new, ref, mask = batch()
    swapped = by_us("dpo", 0.3, tuple(torch.cat(part.chunk(2)[::-1]) for part in (new, ref, mask)))[0]
    assert float(mine) == pytest.approx(float(0.9 * straight + 0.1 * swapped), abs=1e-6)
    assert float(robust) == pytest.approx(float((0.9 * straight - 0.1 * swapped) / 0.8), abs=1e-6)
    assert abs(float(mine) - float(robust)) > 100 * LOSS


def test_ipos_rewards_are_sums_in_trls_log_and_per_token_in_ours():
    new, ref, mask = batch()
    mine, other = by_us("ipo", 0.3)[1], dpo_by_trl("ipo", 0.3)[1]
    ratio, length = (new - ref).sum(1), mask.sum(1)
    chosen = slice(0, 3)
    assert other["rewards/chosen"] == pytest.approx(float(0.3 * ratio[chosen].mean()), abs=1e-6)
    assert mine["rewards/chosen"] == pytest.approx(float(0.3 * (ratio / length)[chosen].mean()), abs=1e-6)
    assert abs(mine["rewards/chosen"] - other["rewards/chosen"]) > 0.01


def test_a_tie_is_wrong_in_trls_accuracy_and_half_right_in_ours():
    new, _, mask = batch()
    assert dpo_by_trl("sigmoid", 0.3, pairs=(new, new, mask))[1]["rewards/accuracies"] == 0
    assert by_us("dpo", 0.3, (new, new, mask))[1]["rewards/accuracy"] == 0.5


def test_near_certainty_trls_orpo_has_no_gradient_and_ours_has():
    one = torch.ones(1)
    for near in (-1e-8, 0.0):
        chosen, rejected = torch.tensor([near]), torch.tensor([-1.0])
        ours = graded(
            lambda a, b: preference_loss("orpo", a, b, beta=0.3, chosen_tokens_P=one, rejected_tokens_P=one)[0],
            chosen,
            rejected,
        )
        assert all(value.isfinite().all() for value in ours)
        assert graded(lambda a, b: odds_by_trl(0.3, a, b), chosen, rejected)[1].isnan().all()


def test_orpos_first_term_counts_prompts_and_tokens_in_trl_and_pairs_in_ours():
    """TRL's: one mean over all tokens that the chosen texts have, from the second on. Ours: each response's own mean."""
    from trl.experimental.orpo import ORPOTrainer

    random = torch.Generator().manual_seed(6)
    logits = torch.randn(4, 6, 8, generator=random)
    ids = torch.randint(0, 8, (4, 6), generator=random)
    attended = torch.tensor([[1] * 6, [1] * 4 + [0] * 2] * 2)
    answer = torch.tensor([[0] * 2 + [1] * 4, [0] * 3 + [1] + [0] * 2] * 2).bool()  # of 4 tokens and of 1
    given = {}
    for side, rows in (("chosen", slice(0, 2)), ("rejected", slice(2, 4))):
        given[f"{side}_input_ids"], given[f"{side}_attention_mask"] = ids[rows], attended[rows]
        given[f"{side}_labels"] = torch.where(answer[rows], ids[rows], -100)
    self = trainer(is_encoder_decoder=False, padding_value=0, beta=0.3)
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(self, name, getattr(ORPOTrainer, name))
    for name in ("concatenated_forward", "odds_ratio_loss"):
        setattr(self, name, partial(getattr(ORPOTrainer, name), self))
    loss, logged = ORPOTrainer.get_batch_loss_metrics(self, lambda *_, **__: SimpleNamespace(logits=logits), given)

    token = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    counted, seen = answer[:, 1:], attended[:, 1:].bool()
    sums, lengths = (token * counted).sum(1).chunk(2), counted.sum(1).chunk(2)
    tokens = dict(zip(("chosen_tokens_P", "rejected_tokens_P"), lengths, strict=True))
    ours, metrics = preference_loss("orpo", *sums, beta=0.3, **tokens)
    of_prompts = -float(token[:2][seen[:2]].mean())
    assert logged["nll_loss"] == pytest.approx(of_prompts, abs=1e-6)
    assert float(metrics["nll"]) == pytest.approx(-float((sums[0] / lengths[0]).mean()), abs=1e-6)
    assert abs(of_prompts - float(metrics["nll"])) > 0.01
    assert float(loss) - of_prompts == pytest.approx(float(ours.mean()) - float(metrics["nll"]), abs=1e-6)
    assert logged["logps/chosen"] == pytest.approx(float((sums[0] / lengths[0]).mean()), abs=1e-6)  # per token
    assert float(metrics["logps/chosen"]) == pytest.approx(float(sums[0].mean()), abs=1e-6)  # of responses


def test_cpo_adds_sft_to_simpo_unless_told_not_to():
    from trl.experimental.cpo import CPOConfig

    assert CPOConfig.__dataclass_fields__["cpo_alpha"].default == 1.0
