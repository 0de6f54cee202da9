"""Rows that are being sampled, and what the model remembers of them: keys and values that stay where they were written.

transformers' own cache makes all keys and values anew for every token, which takes longer than the token itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from grape.policy import Policy, hidden_states, step

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
        self._buffers = [self._larger(states, length + FIRST, rows_R) for states in (layer.keys, layer.values)]
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

    def move(self, moves: Mapping[int, int], rows: int) -> None:
        """Copy rows over others (place: row), and hold the first ``rows`` from now on."""
        for states in (self.keys, self.values):
            for place, row in moves.items():
                states[place] = states[row]
        self._show(rows, self.keys.shape[2])

    def _show(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:rows, :, :length] for buffer in self._buffers)
        return self.keys, self.values

    def _larger(self, states_RHTD: Tensor, length: int, rows_R: Tensor | None = None) -> Tensor:
        """A copy, or that of rows of it, in a buffer with more room."""
        rows, heads, filled, size = states_RHTD.shape
        room = max(filled, min(length, self._limit))
        buffer = states_RHTD.new_empty(rows if rows_R is None else len(rows_R), heads, room, size)
        if rows_R is None:
            buffer[:, :, :filled] = states_RHTD
        else:
            torch.index_select(states_RHTD, 0, rows_R, out=buffer[:, :, :filled])
        return buffer


class Rows:
    """R texts that go on from Q prompts, token by token: ``state_RH`` are the last hidden states of all.

    Each prompt is computed once, and each row begins with the cache of one of them. Layers that see all tokens hold
    them in place; those of another kind (a window, a state) stay transformers' own.
    """

    state_RH: Tensor

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], rows: Sequence[int], more: int) -> None:
        """Row by row the place of its prompt; ``more`` tokens may come."""
        self._model = policy.model
        ids_QP, attended_QP = pad_left(prompts, policy.pad_id, self._model.device)
        out = hidden_states(self._model, ids_QP, attended_QP, use_cache=True)
        rows_R = self._tensor(rows)
        self.state_RH = out.last_hidden_state[rows_R, -1]
        self._cache, self._width = out.past_key_values, ids_QP.shape[1]
        for number, layer in enumerate(self._parts):
            if type(layer) is DynamicLayer:
                self._cache.layers[number] = Held(layer, rows_R, self._width + more)
            else:
                layer.batch_select_indices(rows_R)
        attended_RP = attended_QP[rows_R]
        self._positions_R1 = attended_RP.sum(1, keepdim=True)
        self._mask: Tensor | None = None  # nothing is masked where the prompts are of one length
        if len(set(map(len, prompts))) > 1:
            mask_RT = torch.nn.functional.pad(attended_RP, (0, more), value=True)  # a step takes what is there of it
            self._mask = mask_RT[:, None, None] if policy.takes_masks else mask_RT.long()

    def step(self, ids_R: Tensor) -> None:
        """One more token for each row."""
        self._width += 1
        mask = None if self._mask is None else self._mask[..., : self._width]
        self.state_RH = step(self._model, ids_R, mask, self._positions_R1, self._cache)
        self._positions_R1 = self._positions_R1 + 1

    def keep(self, rows: Sequence[int]) -> tuple[list[int], Tensor]:
        """Let go of all rows but these, ascending; the last of them take the places of those that go. The new order."""
        count, kept = len(rows), set(rows)
        holes = [row for row in range(count) if row not in kept]
        moves = dict(zip(holes, (row for row in rows if row >= count), strict=True))
        order = [moves.get(row, row) for row in range(count)]
        order_R = self._tensor(order)
        for layer in self._parts:
            if isinstance(layer, Held):
                layer.move(moves, count)
            else:
                layer.batch_select_indices(order_R)
        self._positions_R1 = self._positions_R1[order_R]
        self._mask = None if self._mask is None else self._mask[order_R]
        return order, order_R

    @property
    def _parts(self) -> list[Any]:
        """The layers of the cache, or the cache as one where the model has a kind of its own, which may hold more."""
        return list(self._cache.layers) if type(self._cache) is DynamicCache else [self._cache]

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._model.device)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[Tensor, Tensor]:
    """The rows as one tensor that ends with each row's last token, and where they are tokens."""
    width = max(map(len, rows))
    ids_BT = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    attended_BT = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)
    return ids_BT, attended_BT
