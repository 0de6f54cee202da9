"""Micro-batches as a model computes them: tokens packed without padding, the prompt of a group once; or padded rows.

The states that predict a row's response are those before its tokens: its last token is never an input, and the state
behind the prompt predicts the first token of every response to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from grape.attention import Blocks, switched
from grape.logprobs import micro_batches, pad, response_states
from grape.member import Batch, Member, make_batch
from grape.policy import causal_lm
from grape.rollout import evaluating

Row = tuple[Sequence[int], Sequence[int]]  # prompt and response


@dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """Rows padded to the longest of them: for any model."""

    ids_BT: Tensor
    attended_BT: Tensor
    mask_BT: Tensor

    def __len__(self) -> int:
        return self.ids_BT.numel()

    def states(self, model: Any) -> Tensor:
        """The last hidden states N x H before the response tokens, row by row."""
        return response_states(model, self.ids_BT, self.attended_BT, self.mask_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Rows behind one another. ``before_N`` are the places whose states predict the response tokens."""

    ids_1T: Tensor
    positions_1T: Tensor
    before_N: Tensor
    blocks: Blocks

    def __len__(self) -> int:
        return self.ids_1T.numel()

    def states(self, model: Any) -> Tensor:
        """As those of `Padded`; the model must be `switched`."""
        out = causal_lm(model).base_model(
            input_ids=self.ids_1T, position_ids=self.positions_1T, use_cache=False, packed=self.blocks
        )
        states_NH: Tensor = out.last_hidden_state[0, self.before_N]
        return states_NH


class Packing:
    """How the micro-batches of one model are made: packed where its attention allows it, which is tried, else padded.

    ``share`` False computes the prompt for each row.
    """

    def __init__(self, model: Any, pad_id: int, *, share: bool = True) -> None:
        self._pad_id = pad_id
        self._share = share
        self._model = model
        self._reach = reach(model)
        self.packs = packs(model)

    def batches(self, members: Sequence[Member], budget: int) -> list[Batch]:
        """The members in micro-batches of at most ``budget`` computed tokens; one longer than that is alone.

        Responses to one prompt are together as far as they go, in the order in which the prompts first come.
        """
        device = self._model.device
        lengths = [len(member) for member in members]
        if not self.packs or max(lengths, default=0) > self._reach:
            cut = micro_batches(lengths, budget)
            some = [[members[row] for row in rows] for rows in cut]
            return [make_batch(few, padded(rows_of(few), self._pad_id, device), device) for few in some]
        some = self._cut(members, budget)
        return [make_batch(few, packed(rows_of(few), device, share=self._share), device) for few in some]

    def _cut(self, members: Sequence[Member], budget: int) -> list[list[Member]]:
        by_prompt: dict[tuple[int, ...], list[Member]] = {}
        for member in members:
            by_prompt.setdefault(member.prompt_ids, []).append(member)
        batches: list[list[Member]] = []
        room = 0
        for prompt, few in by_prompt.items():
            begun = False  # the prompt is in the last batch
            for member in few:
                more = len(member.token_ids) - 1 + (0 if begun and self._share else len(prompt))
                if not batches or more > room:
                    batches.append([])
                    room, more = budget, len(member) - 1
                begun = True
                room -= more
                batches[-1].append(member)
        return batches

    @contextmanager
    def on(self, *others: Any) -> Iterator[None]:
        """The model, and others of its kind, take the micro-batches that this makes."""
        with ExitStack() as stack:
            for model in (self._model, *others) if self.packs else ():
                stack.enter_context(switched(model))
            yield


def rows_of(members: Sequence[Member]) -> list[Row]:
    """Their prompts and responses."""
    return [(member.prompt_ids, member.token_ids) for member in members]


def padded(rows: Sequence[Row], pad_id: int, device: Any) -> Padded:
    """Rows with padding on the right."""
    ids_BT, attended_BT, mask_BT = pad([prompt for prompt, _ in rows], [given for _, given in rows], pad_id, device)
    return Padded(ids_BT=ids_BT, attended_BT=attended_BT, mask_BT=mask_BT)


def packed(rows: Sequence[Row], device: Any = "cpu", *, share: bool = True) -> Packed:
    """Rows behind one another; those with one prompt, next to one another, share it."""
    ids, positions, before = list[int](), list[int](), list[int]()
    own, shared = list[tuple[int, int]](), list[tuple[int, int, int, int]]()

    def put(tokens: Sequence[int], start: int) -> None:
        """Tokens at the positions from ``start``."""
        ids.extend(tokens)
        positions.extend(range(start, start + len(tokens)))

    for (prompt, _), run in groupby(enumerate(rows), key=lambda place: (place[1][0], None if share else place[0])):
        few = [given for _, (_, given) in run]
        joined, first = len(few) > 1, len(ids)
        put(prompt, 0)
        last = len(ids) - 1
        if joined:
            own.append((first, last + 1))
        for given in few:
            start = len(ids)
            before.extend([last, *range(start, start + len(given) - 1)][: len(given)])
            put(given[:-1], len(prompt))
            if joined and len(ids) > start:
                own.append((start, len(ids)))
        if not joined:
            own.append((first, len(ids)))
        elif len(ids) > last + 1:
            shared.append((last + 1, len(ids), first, last + 1))
    return Packed(
        ids_1T=torch.tensor([ids], device=device),
        positions_1T=torch.tensor([positions], device=device),
        before_N=torch.tensor(before, dtype=torch.long, device=device),
        blocks=Blocks(own=tuple(own), shared=tuple(shared), device=device),
    )


def reach(model: Any) -> float:
    """The longest row in which every token sees all before it: the shortest window of any layer."""
    config = causal_lm(model).config.get_text_config()
    widths = [getattr(module, "sliding_window", None) for module in model.modules()]
    widths += [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((width for width in widths if isinstance(width, int) and width > 0), default=float("inf"))


@torch.no_grad()
def packs(model: Any) -> bool:
    """Whether packed and padded rows give this model the same states, by two groups of two done both ways."""
    device = model.device
    rows: list[Row] = [((0, 1, 2), (3, 4, 5)), ((0, 1, 2), (5, 3)), ((2, 0), (1, 4, 3, 1)), ((2, 0), (4,))]
    try:
        with evaluating(model):
            wanted_NH = padded(rows, 0, device).states(model)
            with switched(model):
                found_NH = packed(rows, device).states(model)
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return False
    exact = wanted_NH.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    tolerance = 1e-4 if exact else 2e-2
    return bool((found_NH - wanted_NH).abs().max() <= tolerance * wanted_NH.abs().max())
