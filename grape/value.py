"""The value head of PPO: per-token rewards to advantages and returns, and the loss that fits the values to them.

Shapes: B sequences, T response tokens. ``mask_BT`` is True where a token counts; what lies under it touches nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grape.loss import Aggregate, Metrics, aggregated, masked, same_shape


def gae(
    reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token, both BT, constants, 0 under the mask: Schulman et al. 2016, eq. 16.

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  return_t = A_t + V_t

    V_t is the value of the text before token t; t + 1 is the next token that counts, and after the last one both V
    and A are 0. ``reward_BT`` holds the response's reward at its last token, and `kl.reward_kl` where it is used.
    """
    same_shape(mask_BT, reward_BT, value_BT)
    mask_BT = mask_BT.bool()
    reward_BT = masked(reward_BT, mask_BT).detach()
    value_BT = masked(value_BT, mask_BT).detach().to(reward_BT)
    advantage_BT = torch.zeros_like(reward_BT)
    next_value_B = next_advantage_B = reward_BT.new_zeros(len(reward_BT))
    for t in reversed(range(mask_BT.shape[1])):
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantage_BT[:, t] = torch.where(mask_BT[:, t], advantage_B, 0.0)
        next_advantage_B = torch.where(mask_BT[:, t], advantage_B, next_advantage_B)
        next_value_B = torch.where(mask_BT[:, t], value_BT[:, t], next_value_B)
    return advantage_BT, advantage_BT + value_BT


def value_loss(
    value_BT: Tensor,
    return_BT: Tensor,
    mask_BT: Tensor,
    *,
    old_value_BT: Tensor | None = None,
    clip: float | None = None,
    aggregate: Aggregate = "seq-mean-token-sum",
    norm_length: float | None = None,
    num_sequences: int | Tensor | None = None,
    num_tokens: int | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The squared error of the values, clipped where ``clip`` is given, and its metrics.

    L = agg(max[(V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2] / 2)

    Where the second is the greater there is no gradient. ``aggregate`` and the totals are those of `loss.aggregated`.
    Metrics: value_loss; value_clip, the share of tokens that are clipped.
    """
    same_shape(mask_BT, value_BT, return_BT, old_value_BT)
    mask_BT = mask_BT.bool()
    value_BT = masked(value_BT, mask_BT)
    return_BT = masked(return_BT, mask_BT).detach()
    error_BT = (value_BT - return_BT).square()
    clipped_BT = torch.zeros_like(mask_BT)
    if clip is not None:
        if old_value_BT is None or not clip > 0:
            raise ValueError(f"clip must be above 0, and needs old_value_BT: {clip}")
        old_BT = masked(old_value_BT, mask_BT).detach()
        bounded_BT = old_BT + (value_BT.detach() - old_BT).clamp(-clip, clip)
        clipped_error_BT = (bounded_BT - return_BT).square()
        outside_BT = (value_BT.detach() - old_BT).abs() > clip
        clipped_BT = outside_BT & (clipped_error_BT > error_BT)
        error_BT = torch.where(clipped_BT, clipped_error_BT, error_BT)
    totals = {"num_sequences": num_sequences, "num_tokens": num_tokens}
    loss = aggregated(error_BT / 2, mask_BT, aggregate=aggregate, norm_length=norm_length, **totals)
    share = aggregated(clipped_BT.to(error_BT), mask_BT, aggregate="token-mean", num_tokens=num_tokens)
    return loss, {"value_loss": loss.detach(), "value_clip": share}
