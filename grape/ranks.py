"""The processes of a run: the first one leads, and the others sample and update as it says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from grape.errors import GrapeError, one_line
from grape.member import Member

T = TypeVar("T")
BUCKET = 2**24  # gradients that are summed in one go: 64 MB
LOST = re.compile(r"closed by peer|reset by peer|broken pipe|remote process exited", re.IGNORECASE)


class Ranks:
    """All processes sample and update. The leader alone draws questions, judges, logs and saves.

    What one process says or gathers, all of them hear or gather in the same order.
    """

    def __init__(self, accelerator: Any) -> None:
        self.number: int = accelerator.process_index
        self.count: int = accelerator.num_processes

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.number == 0

    def say(self, *words: Any) -> None:
        """The leader's word to the others."""
        if self.count > 1:
            broadcast_object_list([words])

    def hear(self) -> tuple[Any, ...]:
        """What the leader says."""
        words: list[Any] = [None]
        broadcast_object_list(words)
        heard: tuple[Any, ...] = words[0]
        return heard

    def gathered(self, mine: list[T]) -> list[T]:
        """The lists of all processes, one after the other."""
        return list(gather_object(mine)) if self.count > 1 else mine

    def share(self, members: Sequence[Member]) -> list[Member]:
        """The members that this process trains on: whole groups, in turn."""
        groups = list(dict.fromkeys(member.group for member in members))
        mine = set(groups[self.number :: self.count])
        return [member for member in members if member.group in mine]

    def sum_gradients(self, weights: Sequence[Tensor]) -> None:
        """Give every process the sums of all processes' gradients; a weight without one counts as 0 there.

        Those of weights that are shared out are sums already.
        """
        here = [weight for weight in weights if not isinstance(weight, DTensor)]
        for few in buckets(here) if self.count > 1 else ():
            grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in few]
            flat = torch.cat([grad.flatten() for grad in grads])
            torch.distributed.all_reduce(flat)
            for weight, part in zip(few, torch.split(flat, [weight.numel() for weight in few]), strict=True):
                weight.grad = part.view_as(weight)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A process that has ended while this one waits for its part is an error of one line."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not LOST.search(str(error)):
                raise
            raise GrapeError(f"another process of the run has ended: {one_line(error, 120)}") from error


def buckets(weights: Sequence[Tensor], size: int = BUCKET) -> list[list[Tensor]]:
    """The weights in turn, of one type and at most so many numbers together; a larger one alone."""
    found: list[list[Tensor]] = []
    for _, some in groupby(weights, key=lambda weight: weight.dtype):
        room = -1
        for weight in some:
            if weight.numel() > room:
                found.append([])
                room = size
            found[-1].append(weight)
            room -= weight.numel()
    return found
