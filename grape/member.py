"""Responses as the optimizer takes them, and a few of them padded to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grape.logprobs import pad


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One response as the optimizer takes it.

    ``prompt_ids`` are the context that it is trained in. ``rollout_logprobs`` are those of the context it was drawn in,
    None where it was given; ``off_policy``: that is another context, or it was given. ``advantage`` is 0 where there is
    none. ``reward`` is what a value head is fitted to. One that is not ``trained`` counts in the denominators alone.
    """

    response_id: str
    group: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...] | None
    advantage: float
    reward: float
    trained: bool
    off_policy: bool

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The rows of a micro-batch, padded. ``rollout_BT`` is NaN where the log-probabilities of the draw do not apply."""

    members: tuple[Member, ...]
    ids_BT: Tensor
    attended_BT: Tensor
    mask_BT: Tensor
    advantage_B: Tensor
    reward_B: Tensor
    rollout_BT: Tensor


def make_batch(members: Sequence[Member], pad_id: int, device: Any) -> Batch:
    """Rows padded to the longest of them."""
    ids_BT, attended_BT, mask_BT = pad(
        [member.prompt_ids for member in members], [member.token_ids for member in members], pad_id, device
    )
    rollout_BT = torch.full(ids_BT.shape, torch.nan)
    for row, member in enumerate(members):
        if member.off_policy and member.rollout_logprobs is not None:
            rollout_BT[row, len(member.prompt_ids) : len(member)] = torch.tensor(member.rollout_logprobs)
    return Batch(
        members=tuple(members),
        ids_BT=ids_BT,
        attended_BT=attended_BT,
        mask_BT=mask_BT,
        advantage_B=torch.tensor([member.advantage for member in members], device=device),
        reward_B=torch.tensor([member.reward for member in members], device=device),
        rollout_BT=rollout_BT.to(device),
    )
