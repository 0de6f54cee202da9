"""Advantages to a loss: ratios, clips, importance weights and aggregation, as pure functions of tensors.

Shapes: B sequences, T response tokens, V vocabulary. ``mask`` is True where a token counts; what lies under it may be
NaN or infinite and touches neither loss nor gradient. The arithmetic is in float32 or wider. Numbers in brackets are
equations of the GRAPE paper (R. Patel, 2025).

Totals: ``num_sequences`` and ``num_tokens`` count all micro-batches and ranks of one optimizer step (rows wholly under
the mask are sequences too), so that the losses of the parts, and their metrics, add up to those of the whole. Left
out, they are counted here. Where gradients are averaged over ranks, multiply the loss by the number of ranks.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor

from grape.config import ROLLOUT_CAP
from grape.kl import LOG_LIMIT, k2, k3

Ratio = Literal["token", "sequence", "sequence-mean", "tapered", "none"]
Aggregate = Literal["seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean", "token-mean"]
Kl = Literal["none", "k2", "k3", "full"]
Metrics = dict[str, Tensor]

PER_TOKEN = ("token", "none")
PER_SEQUENCE = ("sequence", "sequence-mean", "tapered")


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor | None,
    advantage: Tensor,
    mask_BT: Tensor,
    *,
    ratio: Ratio = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregate: Aggregate = "seq-mean-token-sum",
    norm_length: float | None = None,
    num_sequences: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
    ref_logprobs_BT: Tensor | None = None,
    kl: Kl = "none",
    kl_coef: float = 0.0,
    full_kl_BT: Tensor | None = None,
    entropy_BT: Tensor | None = None,
    entropy_coef: float = 0.0,
    rollout_logprobs_BT: Tensor | None = None,
    rollout_cap: float | None = None,
) -> tuple[Tensor, Metrics]:
    """The loss of one step, a scalar to minimise, and what to log of it (detached scalars).

    L = -agg(w min[rho A, clip(rho, 1 - low, 1 + high) A]) + kl_coef agg(KL) - entropy_coef agg(H)       (14), (17)

    ``advantage`` is B, or BT where the ratio is per token. ``old_logprobs_BT`` None means one update per batch: rho is
    exactly 1 and the gradient -A grad log pi. Of `ratio`:

    token          rho_t = pi(a_t) / old(a_t)                             (14): PPO, GRPO, GRAPE
    sequence       rho = prod_t rho_t over the response, one term each    (17), which the paper warns of
    sequence-mean  rho = (prod_t rho_t)^(1/length), one term each         GSPO
    tapered        -A sg[1 if A >= 0 else min(rho, 1)] log pi(y)          TOPR, no clip
    none           -A log pi                                              REINFORCE, no clip

    A term per sequence is averaged over sequences; `aggregate` then rules KL and entropy alone. ``dual_clip`` c > 1
    bounds rho by c where A < 0. w is `rollout_weight`, its cap 2 unless given. ``full_kl_BT`` carries gradients.

    Metrics, means over tokens (over sequences with a ratio per sequence) that add up as the loss does: policy_loss,
    clip_low, clip_high, clip_dual, ratio_mean, rollout_weight, rollout_truncated; always over tokens: approx_kl (k2 to
    old), ref_kl (k3 where `kl` is none), entropy. ratio_max is the greatest here. Raises ValueError.
    """
    _refuse(ratio, clip_low, clip_high, dual_clip, rollout_logprobs_BT, rollout_cap)
    if ratio == "sequence":
        warnings.warn(
            "ratio='sequence' (eq. 17) clips whole sequences: the relaxed constraint can make the model collapse; "
            "the paper advises to start with 'token' (eq. 14)",
            stacklevel=2,
        )
    same_shape(mask_BT, logprobs_BT, old_logprobs_BT, ref_logprobs_BT, full_kl_BT, entropy_BT, rollout_logprobs_BT)
    mask = mask_BT.bool()
    new = masked(logprobs_BT, mask)
    old = (new if old_logprobs_BT is None else masked(old_logprobs_BT, mask)).detach()
    gain = _advantage(advantage, mask, ratio).to(new)
    rho = importance_ratio(new, old, mask, ratio=ratio)
    objective, low, high, dual = _objective(rho, gain, new, ratio, clip_low, clip_high, dual_clip)

    per_token = ratio in PER_TOKEN
    counted = mask if per_token else torch.ones_like(gain, dtype=torch.bool)
    total = _total(num_tokens, mask.sum()) if per_token else _total(num_sequences, len(mask))
    extra: Metrics = {}
    if rollout_logprobs_BT is not None:
        cap = ROLLOUT_CAP if rollout_cap is None else rollout_cap
        weight, cut = rollout_weight(old, rollout_logprobs_BT, mask, cap=cap, ratio=ratio)
        objective = weight * objective
        extra = {"rollout_weight": _sum(weight, counted) / total, "rollout_truncated": _sum(cut, counted) / total}

    totals = {"num_sequences": num_sequences, "num_tokens": num_tokens}

    def over(value_BT: Tensor, how: Aggregate) -> Tensor:
        return aggregated(value_BT, mask, aggregate=how, norm_length=norm_length, **totals)

    loss = -over(objective, aggregate) if per_token else -objective.sum() / total
    metrics = {
        "policy_loss": loss,
        "clip_low": _sum(low, counted) / total,
        "clip_high": _sum(high, counted) / total,
        "clip_dual": _sum(dual, counted) / total,
        "ratio_mean": _sum(rho, counted) / total,
        "ratio_max": torch.where(counted, rho, 0.0).max() if rho.numel() else rho.new_zeros(()),
        "approx_kl": over(k2(new, old), "token-mean"),
        **extra,
    }
    kl_BT = _kl(kl, kl_coef, new, ref_logprobs_BT, full_kl_BT, mask)
    if entropy_coef and entropy_BT is None:
        raise ValueError("entropy_coef needs entropy_BT")
    for name, value_BT, coef in (("ref_kl", kl_BT, kl_coef), ("entropy", entropy_BT, -entropy_coef)):
        if value_BT is not None:
            metrics[name] = over(value_BT, "token-mean")
        if value_BT is not None and coef:
            loss = loss + coef * over(value_BT, aggregate)
    return loss, {name: value.detach() for name, value in metrics.items()}


def importance_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor, *, ratio: Ratio) -> Tensor:
    """rho = exp(log pi - log old), BT or, with a ratio per sequence, B. A row or token under the mask has 1.

    The product over the response's tokens in `sequence` and `tapered`, its length-th root in `sequence-mean`.
    """
    change = masked(logprobs_BT, mask_BT) - masked(old_logprobs_BT, mask_BT)
    if ratio in PER_SEQUENCE:
        change = change.sum(dim=1)
    if ratio == "sequence-mean":
        change = change / mask_BT.sum(dim=1).clamp(min=1)
    return change.clamp(-LOG_LIMIT, LOG_LIMIT).exp()


def rollout_weight(
    old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, *, cap: float, ratio: Ratio = "token"
) -> tuple[Tensor, Tensor]:
    """Truncated importance weights min(old / rollout, cap), constants, and where the cap was met: BT or B as `ratio`.

    They correct for a sampler whose probabilities are not the trainer's (Yao et al. 2025).
    """
    weight = importance_ratio(old_logprobs_BT, rollout_logprobs_BT, mask_BT, ratio=ratio).detach()
    return weight.clamp(max=cap), weight > cap


def aggregated(
    value_BT: Tensor,
    mask_BT: Tensor,
    *,
    aggregate: Aggregate = "seq-mean-token-sum",
    norm_length: float | None = None,
    num_sequences: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
) -> Tensor:
    """Values of tokens to a scalar, which adds up over micro-batches where the totals are given.

    seq-mean-token-sum       sum_i sum_t / sequences               (14): GRAPE, Dr. GRPO's objective
    seq-mean-token-sum-norm  sum_i sum_t / (sequences norm_length) Dr. GRPO's code
    seq-mean-token-mean      sum_i (mean_t) / sequences            GRPO, PPO
    token-mean               sum_i sum_t / tokens                  DAPO
    """
    sums_B = torch.where(mask_BT, value_BT, 0.0).sum(dim=1)
    if aggregate == "token-mean":
        return sums_B.sum() / _total(num_tokens, mask_BT.sum())
    if aggregate == "seq-mean-token-mean":
        sums_B = sums_B / mask_BT.sum(dim=1).clamp(min=1)
    elif aggregate == "seq-mean-token-sum-norm":
        if norm_length is None or not norm_length > 0:
            raise ValueError(f"aggregate='seq-mean-token-sum-norm' needs a norm_length above 0, not {norm_length}")
        sums_B = sums_B / norm_length
    elif aggregate != "seq-mean-token-sum":
        known = "seq-mean-token-sum, seq-mean-token-sum-norm, seq-mean-token-mean or token-mean"
        raise ValueError(f"aggregate must be {known}, not {aggregate!r}")
    return sums_B.sum() / _total(num_sequences, len(mask_BT))


def trpo_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantage: Tensor,
    mask_BT: Tensor,
    old_kl_BT: Tensor,
    *,
    kl_coef: float,
    **options: Any,
) -> tuple[Tensor, Metrics]:
    """TRPO as a penalty: `policy_loss` without clip, ``old_kl_BT`` = `full_kl` of (old, new) carries gradients.

    L = -agg(rho A) + kl_coef agg(KL(old || pi))                                       (9)

    ``options`` are those of aggregation, entropy and rollout. The metric old_kl stands for ref_kl.
    """
    options |= {
        "clip_low": torch.inf,
        "clip_high": torch.inf,
        "kl": "full",
        "kl_coef": kl_coef,
        "full_kl_BT": old_kl_BT,
    }
    loss, metrics = policy_loss(logprobs_BT, old_logprobs_BT, advantage, mask_BT, **options)
    return loss, {"old_kl" if name == "ref_kl" else name: value for name, value in metrics.items()}


def _objective(
    rho: Tensor, gain: Tensor, new_BT: Tensor, ratio: Ratio, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is to be maximised, B or BT, and where it was clipped: low, high, dual. A clipped term has no gradient."""
    never = torch.zeros_like(gain, dtype=torch.bool)
    if ratio == "none":
        return gain * new_BT, never, never, never
    if ratio == "tapered":
        taper = torch.where(gain < 0, rho.detach().clamp(max=1.0), 1.0)
        return taper * gain * new_BT.sum(dim=1), never, never, never
    low = (gain < 0) & (rho < 1 - clip_low)
    high = (gain > 0) & (rho > 1 + clip_high)
    dual = never if dual_clip is None else (gain < 0) & (rho > dual_clip)
    bound = torch.where(low, 1 - clip_low, rho)
    bound = torch.where(high, 1 + clip_high, bound)
    bound = bound if dual_clip is None else torch.where(dual, dual_clip, bound)
    return bound * gain, low, high, dual


def _kl(
    kl: str, kl_coef: float, new_BT: Tensor, ref_BT: Tensor | None, full_BT: Tensor | None, mask_BT: Tensor
) -> Tensor | None:
    """The KL of each token that the loss or, with `none`, only the metric takes; None where nothing is known of it."""
    if kl == "k1":
        raise ValueError("kl='k1' in the loss has a gradient of mean zero: use k2, k3 or full there, or reward_kl")
    if kl not in ("none", "k2", "k3", "full"):
        raise ValueError(f"kl must be none, k2, k3 or full, not {kl!r}")
    if kl == "none" and kl_coef:
        raise ValueError("kl_coef needs a kl other than none")
    if kl == "full" or (kl == "none" and full_BT is not None):
        if full_BT is None:
            raise ValueError("kl='full' needs full_kl_BT")
        return full_BT
    if ref_BT is None:
        if kl != "none":
            raise ValueError(f"kl={kl!r} needs ref_logprobs_BT")
        return None
    estimate = k2 if kl == "k2" else k3
    return estimate(new_BT, masked(ref_BT, mask_BT).detach())


def _advantage(advantage: Tensor, mask_BT: Tensor, ratio: Ratio) -> Tensor:
    """The advantage of each term, BT or B, a constant and 0 where nothing counts."""
    counts, shape = mask_BT, tuple(advantage.shape)
    if ratio in PER_SEQUENCE:
        counts = mask_BT.any(dim=1)
        if advantage.shape != counts.shape:
            raise ValueError(f"ratio={ratio!r} has one term per sequence and needs an advantage of B, not of {shape}")
    elif advantage.shape == mask_BT.shape[:1]:
        advantage = advantage[:, None]
    elif advantage.shape != mask_BT.shape:
        raise ValueError(f"the advantage must be B or BT, not of {shape} where BT is {tuple(mask_BT.shape)}")
    return torch.where(counts, advantage, 0.0).detach()


def _refuse(
    ratio: str, clip_low: float, clip_high: float, dual_clip: float | None, rollout: Tensor | None, cap: float | None
) -> None:
    """Raises ValueError for what cannot be meant."""
    if ratio not in PER_TOKEN + PER_SEQUENCE:
        raise ValueError(f"ratio must be token, sequence, sequence-mean, tapered or none, not {ratio!r}")
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(f"clip_low and clip_high must not be negative: {clip_low}, {clip_high}")
    if dual_clip is not None and (not dual_clip > 1 or ratio in ("tapered", "none")):
        raise ValueError(f"dual_clip must be above 1, and needs a ratio that is clipped: {dual_clip}, {ratio!r}")
    if cap is not None and (rollout is None or not cap > 0):
        raise ValueError(f"rollout_cap must be above 0, and needs rollout_logprobs_BT: {cap}")


def same_shape(mask_BT: Tensor, *tensors_BT: Tensor | None) -> None:
    """Raises ValueError where torch would broadcast one tensor against another without a word."""
    shapes = {tuple(tensor.shape) for tensor in (mask_BT, *tensors_BT) if tensor is not None}
    if len(shapes) > 1 or mask_BT.dim() != 2:
        raise ValueError(f"the mask and all that is per token must have one shape BT, not {sorted(shapes)}")


def masked(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """float32 or wider, and 0 under the mask, so that nothing from there reaches a result or a gradient."""
    return torch.where(mask_BT, value_BT.to(torch.promote_types(value_BT.dtype, torch.float32)), 0.0)


def _sum(value: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, value, 0.0).sum()


def _total(given: int | Tensor | None, here: int | Tensor) -> Tensor:
    """What to divide by: the total given, or what is here; never 0, since of nothing the sum is 0 too."""
    return torch.as_tensor(here if given is None else given).clamp(min=1)
