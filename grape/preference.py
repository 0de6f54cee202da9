"""Preferences to a loss: SFT, reward models and direct alignment, as pure functions of tensors.

Shapes: P pairs, B sequences, T tokens, K ranked responses, N tokens or steps. The log-probability of a response (P, B)
is the sum over its tokens, natural. The arithmetic is in float32 or wider; references, labels and margins are
constants. A loss comes back per pair, sequence or token: who calls it weighs and averages. sigma is the logistic
function. Numbers in brackets are equations of the paper that is named.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from grape.loss import Metrics, aggregated, masked, same_shape

SftAggregate = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"]
Kind = Literal["dpo", "cdpo", "ipo", "simpo", "orpo"]

AGGREGATES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
REFERENCE = ("ref_chosen_P", "ref_rejected_P")
LENGTHS = ("chosen_tokens_P", "rejected_tokens_P")
NEEDS = {"dpo": REFERENCE, "cdpo": REFERENCE, "ipo": REFERENCE + LENGTHS, "simpo": LENGTHS, "orpo": LENGTHS}
MAY = {"dpo": "probability_P", "cdpo": "smoothing", "simpo": "gamma"}
CERTAIN = -1e-12  # log p is cut here before log(1 - p), so that p = 1 has log-odds of 27.6 and not infinite ones


def sft_loss(
    logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    aggregate: SftAggregate = "token-mean",
    num_sequences: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
) -> Tensor:
    """Supervised fine-tuning: the negative log-likelihood of the tokens that count, a scalar.

    token-mean           -sum_i sum_t log pi / tokens        each token counts alike
    seq-mean-token-sum   -sum_i sum_t log pi / sequences     (2) of the GRAPE paper
    seq-mean-token-mean  -sum_i (mean_t log pi) / sequences  each sequence counts alike

    The mask leaves out the prompt; what lies under it may be NaN. The totals are those of all micro-batches of one
    optimizer step, as in `loss.aggregated`: with them the losses of the parts add up. Raises ValueError.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate must be {', '.join(AGGREGATES)}, not {aggregate!r}")
    same_shape(mask_BT, logprobs_BT)
    mask = mask_BT.bool()
    logprobs = masked(logprobs_BT, mask)
    return -aggregated(logprobs, mask, aggregate=aggregate, num_sequences=num_sequences, num_tokens=num_tokens)


def bradley_terry_loss(
    chosen_P: Tensor, rejected_P: Tensor, *, margin_P: Tensor | None = None, probability_P: Tensor | None = None
) -> Tensor:
    """The loss of a reward model that saw which of two is better: Bradley and Terry 1952, GRAPE paper (5), (6).

    L = -p log sigma(h) - (1 - p) log sigma(-h),  h = r_w - r_l - m

    ``margin_P`` m: by how much the rating was better, Touvron et al. 2023 (Llama 2) (2). ``probability_P`` p in
    [0, 1]: a soft label, Bai et al. 2022 (Constitutional AI) and GRAPE paper, section 3; left out it is 1.
    """
    chosen, rejected = _rows(chosen_P, rejected_P, margin_P, probability_P)[:2]
    h_P = chosen - rejected if margin_P is None else chosen - rejected - _wide(margin_P).detach()
    return _cross_entropy(h_P, 1.0 if probability_P is None else _wide(probability_P).detach())


def ranking_loss(scores_K: Tensor) -> Tensor:
    """The negative log-likelihood of a ranking, a scalar: Plackett 1975, Luce 1959; K-wise in Zhu et al. 2023.

    L = -sum_k log(exp r_k / sum_{j >= k} exp r_j),  r in the order from best to worst

    With K = 2 it is `bradley_terry_loss`; a ranking of one has a loss of 0.
    """
    (scores,) = _rows(scores_K)
    ahead_KK = scores[None, :] - scores[:, None]  # differences first: their logs lose nothing where scores are large
    later_KK = torch.ones_like(ahead_KK, dtype=torch.bool).triu()
    return torch.where(later_KK, ahead_KK, -torch.inf).logsumexp(dim=1).sum()


def outcome_loss(logits_N: Tensor, correct_N: Tensor) -> Tensor:
    """The loss of an outcome reward model, at every token of a response: Cobbe et al. 2021, without the term of SFT.

    L = -r log sigma(z) - (1 - r) log sigma(-z),  r = 1 where the token's response was right in the end, else 0
    """
    logits, correct = _rows(logits_N, correct_N)
    return _cross_entropy(logits, correct.detach())


def step_loss(logits_N3: Tensor, label_N: Tensor) -> Tensor:
    """The loss of a process reward model, at the end of every step: Lightman et al. 2023.

    L = -log softmax(z)_y,  y of -1 (wrong), 0 (neutral), +1 (right): the columns of z, in this order

    Raises ValueError for any other label, which a device would notice too late.
    """
    if label_N.dim() != 1 or logits_N3.shape != (len(label_N), 3):
        shapes = f"{tuple(logits_N3.shape)} and {tuple(label_N.shape)}"
        raise ValueError(f"the logits must be N x 3 and the labels N, not {shapes}")
    known = (label_N == -1) | (label_N == 0) | (label_N == 1)
    if not bool(known.all()):
        raise ValueError(f"a step is labelled -1, 0 or 1, not {label_N[~known][0].item()}")
    return -_wide(logits_N3).log_softmax(dim=1).gather(1, label_N.long()[:, None] + 1).squeeze(1)


def preference_loss(
    kind: Kind,
    chosen_P: Tensor,
    rejected_P: Tensor,
    ref_chosen_P: Tensor | None = None,
    ref_rejected_P: Tensor | None = None,
    *,
    beta: float,
    chosen_tokens_P: Tensor | None = None,
    rejected_tokens_P: Tensor | None = None,
    smoothing: float = 0.0,
    probability_P: Tensor | None = None,
    gamma: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """The loss of each pair by ``kind``, and what to log of it (detached means over the pairs).

    With h = beta (log pi(y_w)/ref(y_w) - log pi(y_l)/ref(y_l)), |y| the tokens of a response, logp = log pi(y):

    dpo    -p log sigma(h) - (1 - p) log sigma(-h), p = 1 or ``probability_P``             Rafailov et al. 2023 (7)
    cdpo   the same with p = 1 - ``smoothing``, the share of labels that are wrong         Mitchell 2023 (3)
    ipo    (log pi(y_w)/ref(y_w) / |y_w| - log pi(y_l)/ref(y_l) / |y_l| - 1/(2 beta))^2    Azar et al. 2023 (17)
    simpo  -log sigma(beta logp_w/|y_w| - beta logp_l/|y_l| - ``gamma``)                   Meng et al. 2024 (6)
    orpo   -logp_w/|y_w| - beta log sigma(log odds_w - log odds_l)                         Hong et al. 2024 (6), (7)

    ipo averages over tokens, which the paper does not print and its authors advise; its beta is their tau. simpo's
    gamma is inside of sigma and not multiplied by beta: gamma over beta is what some call their margin. orpo's beta
    is their lambda; odds = p / (1 - p), p = exp(logp/|y|), its first term is that of SFT over the response alone.
    dpo and cdpo need the reference, simpo and orpo the lengths, ipo both.

    Metrics: rewards/chosen, rewards/rejected, rewards/margin, rewards/accuracy (a tie counts half), of the rewards
    that are compared: beta log pi/ref, per token in ipo; beta logp/|y| in simpo and orpo. logps/chosen, logps/rejected:
    sums, whatever the kind. With a reference displacement/chosen and displacement/rejected, log pi/ref in nats:
    below 0 the responses became less likely, the chosen ones perhaps too. orpo has nll, its first term.

    Raises ValueError for what a kind needs and lacks, or has and does not take.
    """
    optional = {
        "ref_chosen_P": ref_chosen_P,
        "ref_rejected_P": ref_rejected_P,
        "chosen_tokens_P": chosen_tokens_P,
        "rejected_tokens_P": rejected_tokens_P,
        "probability_P": probability_P,
    }
    tensors = {name: value.detach() for name, value in optional.items() if value is not None}
    options = [name for name, value in (("smoothing", smoothing), ("gamma", gamma)) if value]
    _refuse(kind, [*tensors, *options], beta=beta, smoothing=smoothing, gamma=gamma)
    chosen, rejected, *rest = _rows(chosen_P, rejected_P, *tensors.values())
    constants = dict(zip(tensors, rest, strict=True))

    better = _compared(chosen, constants.get("ref_chosen_P"), constants.get("chosen_tokens_P"))
    worse = _compared(rejected, constants.get("ref_rejected_P"), constants.get("rejected_tokens_P"))
    if kind == "ipo":
        loss = (better - worse - 1 / (2 * beta)).square()
    elif kind == "orpo":
        loss = -better - beta * logsigmoid(_log_odds(better) - _log_odds(worse))
    else:
        loss = _cross_entropy(beta * (better - worse) - gamma, constants.get("probability_P", 1 - smoothing))

    metrics: Metrics = {
        "rewards/chosen": beta * _mean(better),
        "rewards/rejected": beta * _mean(worse),
        "rewards/margin": beta * _mean(better - worse),
        "rewards/accuracy": _mean((better > worse).to(loss) + (better == worse).to(loss) / 2),
        "logps/chosen": _mean(chosen),
        "logps/rejected": _mean(rejected),
    }
    if "ref_chosen_P" in constants:
        metrics["displacement/chosen"] = _mean(chosen - constants["ref_chosen_P"])
        metrics["displacement/rejected"] = _mean(rejected - constants["ref_rejected_P"])
    if kind == "orpo":
        metrics["nll"] = _mean(-better)
    return loss, {name: value.detach() for name, value in metrics.items()}


def kto_loss(
    logprobs_B: Tensor,
    ref_B: Tensor,
    desirable_B: Tensor,
    kl: float | Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """The loss of each response that is known to be good or bad, no pairs: Ethayarajh et al. 2024 (8).

    desirable    lambda_D (1 - sigma(beta (log pi/ref - z)))
    undesirable  lambda_U (1 - sigma(beta (z - log pi/ref)))

    ``desirable_B`` is boolean. z is ``kl``, one number for the batch (`kto_kl`), cut at 0 and a constant. The weights
    are lambda_D and lambda_U.

    Metrics, means over the desirable (chosen) and the undesirable (rejected), left out where there are none:
    rewards/chosen and rewards/rejected, beta log pi/ref; rewards/margin, their difference; logps/..;
    displacement/.., log pi/ref in nats. Also kl, and desirable: the share of the batch, to average them by.
    """
    if not (beta > 0 and desirable_weight >= 0 and undesirable_weight >= 0):
        weights = f"{desirable_weight}, {undesirable_weight}"
        raise ValueError(f"beta must be above 0 and no weight negative: {beta}; {weights}")
    if desirable_B.dtype != torch.bool:
        raise ValueError(f"desirable_B must be boolean, not {desirable_B.dtype}")
    logprobs, ref = _rows(logprobs_B, ref_B, desirable_B)[:2]
    z = torch.as_tensor(kl).detach().to(logprobs).clamp(min=0)
    if z.dim():
        raise ValueError(f"kl is one number for the batch, not of {tuple(z.shape)}")
    ratio = logprobs - ref.detach()
    above = beta * (ratio - z)
    # 1 - sigma(x) as sigma(-x), which keeps its digits where sigma(x) is close to 1
    loss = torch.where(desirable_B, desirable_weight * (-above).sigmoid(), undesirable_weight * above.sigmoid())

    metrics: Metrics = {"kl": z, "desirable": _mean(desirable_B.to(ratio))}
    for side, counted in (("chosen", desirable_B), ("rejected", ~desirable_B)):
        if counted.any():
            metrics[f"logps/{side}"] = torch.where(counted, logprobs, 0.0).sum() / counted.sum()
            metrics[f"displacement/{side}"] = torch.where(counted, ratio, 0.0).sum() / counted.sum()
            metrics[f"rewards/{side}"] = beta * metrics[f"displacement/{side}"]
    if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
        metrics["rewards/margin"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return loss, {name: value.detach() for name, value in metrics.items()}


def kto_kl(logprobs_B: Tensor, ref_B: Tensor) -> Tensor:
    """The estimate z of KL(pi || ref) for `kto_loss`, a constant: Ethayarajh et al. 2024, section 4.

    z = max(0, mean_i log pi(y_j | x_i) / ref(y_j | x_i)),  y_j a response to another prompt, as j = i + 1

    Both are of the mismatched pairs, and of the whole batch: the cut at 0 is of the mean, not of the parts'.
    """
    logprobs, ref = _rows(logprobs_B, ref_B)
    return _mean(logprobs - ref).detach().clamp(min=0)


def _refuse(kind: str, given: Collection[str], *, beta: float, smoothing: float, gamma: float) -> None:
    """Raises ValueError for what cannot be meant; ``given`` names what is there of all that only some kinds take."""
    if kind not in NEEDS:
        raise ValueError(f"kind must be dpo, cdpo, ipo, simpo or orpo, not {kind!r}")
    if lacking := [name for name in NEEDS[kind] if name not in given]:
        raise ValueError(f"kind={kind!r} needs {' and '.join(lacking)}")
    if needless := [name for name in given if name not in NEEDS[kind] and name != MAY.get(kind)]:
        raise ValueError(f"kind={kind!r} takes no {' and no '.join(needless)}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, not {beta}")
    if not (smoothing >= 0 and smoothing < 0.5 and gamma >= 0):
        raise ValueError(f"smoothing must be in [0, 0.5) and gamma not negative: {smoothing}, {gamma}")


def _compared(logprobs_P: Tensor, ref_P: Tensor | None, tokens_P: Tensor | None) -> Tensor:
    """Of one side: log pi, less the reference's where there is one, and per token where lengths are given."""
    ratio = logprobs_P if ref_P is None else logprobs_P - ref_P
    return ratio if tokens_P is None else ratio / tokens_P.clamp(min=1)


def _cross_entropy(h: Tensor, p: Tensor | float) -> Tensor:
    """-p log sigma(h) - (1 - p) log sigma(-h): finite, and with a finite gradient, for every finite h."""
    return -(p * logsigmoid(h) + (1 - p) * logsigmoid(-h))


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p. The expm1 keeps the digits of 1 - p near p = 1; far from it, log p outweighs them."""
    logp = logp.clamp(max=CERTAIN)
    return logp - (-logp.expm1()).log()


def _mean(value: Tensor) -> Tensor:
    """The mean; of nothing it is 0."""
    return value.sum() / max(len(value), 1)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _rows(*tensors: Tensor | None) -> list[Tensor]:
    """Those that are there, in float32 or wider. Raises ValueError where torch would broadcast one against another."""
    there = [tensor for tensor in tensors if tensor is not None]
    shapes = {tuple(tensor.shape) for tensor in there}
    if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"all must be rows of one length, not {sorted(shapes)}")
    return [_wide(tensor) for tensor in there]
