"""Log-probabilities of the tokens of responses, and rows cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grape.head import token_logprobs
from grape.policy import hidden_states, logits


def response_logprobs(
    model: Any, ids_BT: Tensor, attended_BT: Tensor, mask_BT: Tensor, *, entropy: bool = False, chunk: int | None = None
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
