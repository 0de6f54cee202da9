"""How far the policy is from another, per token: estimates, the exact sum, and the penalty in the reward.

Shapes: B sequences, T response tokens, V vocabulary. Numbers in brackets are equations of the GRAPE paper
(R. Patel, 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_LIMIT = 20.0  # log-ratios are cut here before exp, so that it never overflows and no gradient is 0 x inf


def k1(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """KL(pi || ref) estimated by log pi - log ref: unbiased, of either sign. As a loss its gradient has mean zero."""
    return logprobs_BT - ref_logprobs_BT


def k2(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """KL(pi || ref) estimated by (log pi - log ref)^2 / 2: biased, but its gradient on policy is the KL's own."""
    return k1(logprobs_BT, ref_logprobs_BT).square() / 2


def k3(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """KL(pi || ref) estimated by exp(d) - 1 - d, d = log ref - log pi: unbiased and never negative.

    http://joschu.net/blog/kl-approx.html; d is cut at 20, above which it has no gradient.
    """
    d_BT = (-k1(logprobs_BT, ref_logprobs_BT)).clamp(max=LOG_LIMIT)
    return d_BT.expm1() - d_BT


def full_kl(logprobs_BTV: Tensor, other_logprobs_BTV: Tensor) -> Tensor:
    """The exact KL(p || q) of normalised log-probabilities over the vocabulary, BT. A token of p = 0 adds nothing.

    KL = sum_v p_v (log p_v - log q_v)                                                 (8)
    """
    possible = logprobs_BTV > -torch.inf
    excess = torch.where(possible, logprobs_BTV - other_logprobs_BTV, 0.0)
    return (logprobs_BTV.exp() * excess).sum(dim=-1)


def reward_kl(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, *, kl_coef: float) -> Tensor:
    """What the KL penalty adds to the reward of each token, BT: a constant, 0 under the mask.

    R' = R - kl_coef log(pi / ref),  pi the policy that sampled, ref the original model     (12)

    Add it to the per-token rewards of `gae`, to the advantage (BT) after the group's baseline, or, as RLOO does and
    as a ratio per sequence needs, its sum over a row to the row's reward before the baseline.
    """
    return torch.where(mask_BT.bool(), -kl_coef * k1(logprobs_BT, ref_logprobs_BT), 0.0).detach()


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float) -> float:
    """The next step's coefficient: doubled above 1.5 targets, halved below a target / 1.5, else as it was.

    ``kl`` is the mean KL(pi || ref) of the step, in the unit of ``target``. Schulman et al. 2017, section 4.
    """
    if not target > 0:
        raise ValueError(f"target must be above 0, not {target}")
    if kl > target * 1.5:
        return kl_coef * 2
    return kl_coef / 2 if kl < target / 1.5 else kl_coef
