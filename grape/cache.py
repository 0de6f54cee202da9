"""What a model remembers of the rows that are being sampled: keys and values that stay where they were written.

transformers' own cache makes all keys and values anew for every token, which takes longer than the token itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

FIRST = 128  # tokens after the prompt that there is room for at first; then half as many again as there are


class Held(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers' own
    """One layer's keys and values, R x heads x T x D: the front of buffers with room for ``limit`` tokens at most."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer, rows_R: Tensor, limit: int) -> None:
        """The rows of a layer that are chosen, in that order; one may be chosen often."""
        super().__init__()  # type: ignore[no-untyped-call]
        assert layer.keys is not None and layer.values is not None, "it holds the prompts"
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self._limit = limit
        length = layer.keys.shape[2]
        self._buffers = [self._larger(states[rows_R], length + FIRST) for states in (layer.keys, layer.values)]
        self._show(len(rows_R), length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the newest tokens behind the others; all of them."""
        rows, _, start, _ = self.keys.shape
        end = start + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._buffers = [self._larger(states, end + end // 2) for states in (self.keys, self.values)]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, start:end] = states
        return self._show(rows, end)

    def move(self, to_M: Tensor, from_M: Tensor, rows: int) -> None:
        """Copy rows over others, and hold the first ``rows`` from now on."""
        for states in (self.keys, self.values):
            states[to_M] = states[from_M]
        self._show(rows, self.keys.shape[2])

    def _show(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self._buffers)
        return self.keys, self.values

    def _larger(self, states_RHTD: Tensor, length: int) -> Tensor:
        rows, heads, filled, size = states_RHTD.shape
        buffer = states_RHTD.new_empty(rows, heads, max(filled, min(length, self._limit)), size)
        buffer[:, :, :filled] = states_RHTD
        return buffer


def share_out(cache: Any, rows_R: Tensor, limit: int) -> None:
    """Give each of R rows the cache of one of the prompts, with room for ``limit`` tokens, prompt and response.

    Layers that see all tokens hold them in place; those of another kind (a window, a state) stay transformers' own.
    """
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = Held(layer, rows_R, limit)
        else:
            layer.batch_select_indices(rows_R)


def keep(cache: Any, rows: Sequence[int], device: Any) -> tuple[list[int], Tensor]:
    """Let go of all rows but these; the last of them take the places of those that go. The rows in their new order."""
    count, kept = len(rows), set(rows)
    holes = [row for row in range(count) if row not in kept]
    moves = list(zip(holes, sorted(row for row in rows if row >= count), strict=True))
    to_M, from_M = torch.tensor(moves, dtype=torch.long, device=device).reshape(-1, 2).T
    order_R = torch.arange(count, device=device)
    order_R[to_M] = from_M
    for layer in cache.layers:
        if isinstance(layer, Held):
            layer.move(to_M, from_M, count)
        else:
            layer.batch_select_indices(order_R)
    order = dict(moves)
    return [order.get(row, row) for row in range(count)], order_R
