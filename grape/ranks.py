"""The processes of a run: the first one leads, and the others sample and update as it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from grape.member import Member

T = TypeVar("T")


class Ranks:
    """Every process holds the whole policy. The leader alone draws questions, judges, logs and saves.

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
