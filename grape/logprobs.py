"""Log-probabilities of the tokens of responses, without ever making all logits; and rows cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grape.kl import full_kl
from grape.policy import hidden_states, logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    """Another model at the same N tokens, a constant: its states, and what makes logits of them.

    The exact KL is KL(policy || other), or KL(other || policy) with ``first``.
    """

    states_NH: Tensor
    logits: Callable[[Tensor], Tensor]
    first: bool = False


def response_logprobs(
    model: Any, ids_BT: Tensor, attended_BT: Tensor, mask_BT: Tensor, *, entropy: bool = False, chunk: int = 256
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (natural, temperature 1) of the tokens under ``mask_BT``, and the entropies before them.

    Both are B x T, aligned with ``ids_BT``: entry t is log p(ids[t] | ids[:t]), and 0 where ``mask_BT`` is False. The
    mask is of response tokens, EOS included; ``attended_BT`` is False on padding only.
    """
    mask_BT = mask_BT.bool()
    states_NH = response_states(model, ids_BT, attended_BT, mask_BT)
    logprobs_N, entropy_N, _ = token_logprobs(
        partial(logits, model), states_NH, ids_BT[mask_BT], entropy=entropy, chunk=chunk
    )
    return scattered(logprobs_N, mask_BT), scattered(entropy_N, mask_BT) if entropy else None


def response_states(model: Any, ids_BT: Tensor, attended_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The last hidden states N x H before the tokens under ``mask_BT``, in the order of ``ids_BT[mask_BT]``.

    The mask may not count padding, nor a row's first token: nothing comes before it.
    """
    mask_BT, attended_BT = mask_BT.bool(), attended_BT.bool()
    if bool((mask_BT & ~(attended_BT & (attended_BT.long().cumsum(1) > 1))).any()):
        raise ValueError("mask_BT counts padding or the first token of a row")
    states_BTH: Tensor = hidden_states(model, ids_BT, attended_BT, use_cache=False).last_hidden_state
    return states_BTH[:, :-1][mask_BT[:, 1:]]


def token_logprobs(
    head: Callable[[Tensor], Tensor],
    states_NH: Tensor,
    labels_N: Tensor,
    *,
    entropy: bool = False,
    other: Other | None = None,
    chunk: int = 256,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens' log-probabilities, the entropies and the exact KLs to ``other``: N each, or empty if not asked for.

    ``head`` makes logits of states. Only ``chunk`` tokens have logits at a time, in the backward pass too, where they
    are computed anew: the largest tensor is chunk x V, never N x V.
    """

    def piece(states_CH: Tensor, labels_C: Tensor, other_CH: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        logits_CV = head(states_CH)
        norm_C = logits_CV.logsumexp(-1)
        logprobs_C = logits_CV.gather(-1, labels_C[:, None]).squeeze(-1) - norm_C
        entropy_C = kl_C = logprobs_C.new_zeros(0)
        if entropy:
            finite_CV = logits_CV.clamp(min=torch.finfo(logits_CV.dtype).min)  # 0 x -inf is no number
            entropy_C = norm_C - ((logits_CV - norm_C[:, None]).exp() * finite_CV).sum(-1)
        if other is not None and other_CH is not None:
            with torch.no_grad():
                other_CV = other.logits(other_CH).log_softmax(-1)
            pair = (logits_CV - norm_C[:, None], other_CV)
            kl_C = full_kl(*reversed(pair)) if other.first else full_kl(*pair)
        return logprobs_C, entropy_C, kl_C

    pieces = []
    for start in range(0, max(1, len(labels_N)), chunk):  # one empty piece where nothing counts
        at = slice(start, start + chunk)
        other_CH = None if other is None else other.states_NH[at]
        pieces.append(checkpoint(piece, states_NH[at], labels_N[at], other_CH, use_reentrant=False))
    logprobs_N, entropy_N, kl_N = (torch.cat(values) for values in zip(*pieces, strict=True))
    return logprobs_N, entropy_N, kl_N


def scattered(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Values of the tokens under a mask at their places in B x T, 0 elsewhere."""
    return values_N.new_zeros(mask_BT.shape).masked_scatter(mask_BT, values_N)


def pad(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, device: Any = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """ids_BT, attended_BT and mask_BT of `response_logprobs`: prompt, response, then padding on the right."""
    width = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    ids_BT = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attended_BT, mask_BT = torch.zeros(2, *ids_BT.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids_BT[row, :end] = torch.tensor([*prompt, *response])
        attended_BT[row, :end] = True
        mask_BT[row, len(prompt) : end] = True
    return ids_BT.to(device), attended_BT.to(device), mask_BT.to(device)


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows cut into batches of at most ``budget`` tokens with their padding, the longest first.

    Every row is in one batch, a row longer than the budget alone. The same lengths give the same batches.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1, not {budget}")
    batches: list[list[int]] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if not batches or width * (len(batches[-1]) + 1) > budget:
            batches.append([])
            width = lengths[row]
        batches[-1].append(row)
    return batches
