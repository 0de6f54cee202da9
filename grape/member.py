"""Responses as the optimizer takes them, and a few of them as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


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


class Text(Protocol):
    """The tokens of a few members as a model computes them (`grape.packing`)."""

    def __len__(self) -> int:
        """How many tokens are computed."""

    def states(self, model: Any) -> Tensor:
        """The last hidden states N x H before the response tokens, member by member."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A micro-batch: ``labels_N`` are the N response tokens, one member's behind another's, ``mask_BT`` their places.

    T is the length of the longest response. ``rollout_BT`` is NaN where the log-probabilities of the draw do not apply.
    """

    members: tuple[Member, ...]
    text: Text
    labels_N: Tensor
    mask_BT: Tensor
    advantage_B: Tensor
    reward_B: Tensor
    rollout_BT: Tensor


def make_batch(members: Sequence[Member], text: Text, device: Any) -> Batch:
    """Members with their text; what is per token is B x T of the responses alone."""
    lengths_B = torch.tensor([len(member.token_ids) for member in members])
    mask_BT = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    rollout_BT = torch.full(mask_BT.shape, torch.nan)
    for row, member in enumerate(members):
        if member.off_policy and member.rollout_logprobs is not None:
            rollout_BT[row, : len(member.token_ids)] = torch.tensor(member.rollout_logprobs)
    return Batch(
        members=tuple(members),
        text=text,
        labels_N=torch.tensor([token for member in members for token in member.token_ids], device=device),
        mask_BT=mask_BT.to(device),
        advantage_B=torch.tensor([member.advantage for member in members], device=device),
        reward_B=torch.tensor([member.reward for member in members], device=device),
        rollout_BT=rollout_BT.to(device),
    )


def blank(token: int) -> Member:
    """A response that counts for nothing."""
    return Member(
        response_id="", group="", prompt_ids=(token,), token_ids=(token,), rollout_logprobs=None, advantage=0.0,
        reward=0.0, trained=False, off_policy=False,
    )  # fmt: skip
