"""Micro-batches as a model computes them: tokens packed without padding, the prompt of a group once; or padded rows.

The states that predict a row's response are those before its tokens: its last token is never an input, and the state
behind the prompt predicts the first token of every response to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from grape.attention import Blocks, switched
from grape.logprobs import micro_batches, pad, response_states
from grape.member import Batch, Member, Text, make_batch
from grape.policy import causal_lm
from grape.rollout import evaluating
from grape.shards import whole

Row = tuple[Sequence[int], Sequence[int]]  # prompt and response
PAYS = (
    1.1  # a prompt is shared where that computes so many times fewer tokens: joining has a cost (benchmarks/train.py)
)


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

    ``others`` are models that take the same micro-batches. ``share`` False computes the prompt for each row.
    """

    def __init__(self, model: Any, pad_id: int, others: Sequence[Any] = (), *, share: bool = True) -> None:
        self._pad_id = pad_id
        self._share = share
        self._model = model
        self._reach = min(map(reach, (model, *others)))
        self.packs = packs(model)
        for other in others:
            with whole(other):
                self.packs &= packs(other)

    def batches(self, members: Sequence[Member], budget: int) -> list[Batch]:
        """The members in micro-batches of at most ``budget`` computed tokens; one longer than that is alone.

        Responses to one prompt are together as far as they go, in the order in which the prompts first come.
        """
        device = self._model.device
        lengths = [len(member) for member in members]
        if not self.packs or max(lengths, default=0) > self._reach:
            few = [[members[row] for row in cut] for cut in micro_batches(lengths, budget)]
            return [make_batch(some, padded(rows_of(some), self._pad_id, device), device) for some in few]
        return [
            make_batch(
                [member for run in runs for member in run], packed([rows_of(run) for run in runs], device), device
            )
            for runs in self._cut(members, budget)
        ]

    def _cut(self, members: Sequence[Member], budget: int) -> list[list[list[Member]]]:
        """Micro-batches of runs; the members of a run share their prompt."""
        by_prompt: dict[tuple[int, ...], list[Member]] = {}
        for member in members:
            by_prompt.setdefault(member.prompt_ids, []).append(member)
        batches: list[list[list[Member]]] = []
        room = 0
        for prompt, few in by_prompt.items():
            shared = self._share and pays(rows_of(few))
            begun = False  # the last run is one of this prompt
            for member in few:
                more = len(member) - 1 - (len(prompt) if begun and shared else 0)
                if not batches or more > room:
                    batches.append([])
                    room, more, begun = budget, len(member) - 1, False
                if not (begun and shared):
                    batches[-1].append([])
                begun = True
                room -= more
                batches[-1][-1].append(member)
        return batches

    @contextmanager
    def on(self, text: Text, *others: Any) -> Iterator[None]:
        """The model, and others, take a micro-batch that this has made, packed or padded, forward and backward."""
        with ExitStack() as stack:
            for model in (self._model, *others) if isinstance(text, Packed) else ():
                stack.enter_context(switched(model))
            yield


def rows_of(members: Sequence[Member]) -> list[Row]:
    """Their prompts and responses."""
    return [(member.prompt_ids, member.token_ids) for member in members]


def padded(rows: Sequence[Row], pad_id: int, device: Any) -> Padded:
    """Rows with padding on the right."""
    ids_BT, attended_BT, mask_BT = pad([prompt for prompt, _ in rows], [given for _, given in rows], pad_id, device)
    return Padded(ids_BT=ids_BT, attended_BT=attended_BT, mask_BT=mask_BT)


def pays(rows: Sequence[Row]) -> bool:
    """Whether rows of one prompt are computed faster when they share it."""
    prompt = len(rows[0][0])
    shared = prompt + sum(len(given) - 1 for _, given in rows)
    return shared + (len(rows) - 1) * prompt >= PAYS * shared


def packed(runs: Sequence[Sequence[Row]], device: Any = "cpu") -> Packed:
    """Rows behind one another. The rows of a run have one prompt and share it."""
    ids, positions, before = list[int](), list[int](), list[int]()
    own, shared = list[tuple[int, int]](), list[tuple[int, int, int, int]]()

    def put(tokens: Sequence[int], start: int) -> None:
        """Tokens at the positions from ``start``."""
        ids.extend(tokens)
        positions.extend(range(start, start + len(tokens)))

    for run in runs:
        prompt, first = run[0][0], len(ids)
        put(prompt, 0)
        last = len(ids) - 1
        spans = [first, len(ids)] if len(run) > 1 else [first]
        for _, given in run:
            start = len(ids)
            before.extend([last, *range(start, start + len(given) - 1)][: len(given)])
            put(given[:-1], len(prompt))
            spans.append(len(ids))
        own.extend((start, end) for start, end in pairwise(spans) if end > start)
        if len(run) > 1 and len(ids) > last + 1:
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
    runs: list[list[Row]] = [[((0, 1, 2), (3, 4, 5)), ((0, 1, 2), (5, 3))], [((2, 0), (1, 4, 3, 1)), ((2, 0), (4,))]]
    try:
        with evaluating(model):
            wanted_NH = padded([row for run in runs for row in run], 0, device).states(model)
            with switched(model):
                found_NH = packed(runs, device).states(model)
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return False
    exact = wanted_NH.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    tolerance = 1e-4 if exact else 2e-2
    return bool((found_NH - wanted_NH).abs().max() <= tolerance * wanted_NH.abs().max())
