"""Lessons as rows of tokens, and what a task makes of a few of them.

A loss is already divided by the totals of the whole batch, so that micro-batches and processes add up. Metrics are such
shares too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grape.errors import ConfigError
from grape.lessons import Lesson
from grape.loss import Metrics
from grape.member import Batch, Member


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A lesson as rows of tokens, and of KTO the response of another lesson to its question: ``other``.

    ``ref`` are the reference's log-probabilities of them all, where the loss has a reference.
    """

    lesson: Lesson
    members: tuple[Member, ...]
    other: Member | None = None
    ref: tuple[float, ...] = ()

    @property
    def rows(self) -> tuple[Member, ...]:
        """All rows, the other one last."""
        return self.members if self.other is None else (*self.members, self.other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What a batch counts: its examples, the response tokens of their members, the examples that are wanted, and the
    labelled steps."""

    examples: int
    tokens: int
    wanted: int
    steps: int = 0


class Task(Protocol):
    """What is learned from examples."""

    reference: bool
    """Whether it compares with the policy as it was before the first step."""

    def rows(self, lesson: Lesson) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """The prompt and the response tokens of each of a lesson's rows."""

    def begin(self, estimate: float) -> None:
        """A batch begins; what was estimated from its `other` rows (`grape.preference.kto_kl`)."""

    def loss(self, examples: Sequence[Example], batch: Batch, totals: Totals) -> tuple[Tensor, Metrics]:
        """The loss of these examples, whose members the batch has in any order, and its metrics."""


def make_examples(task: Task, lessons: Sequence[Lesson], *, mismatched: bool) -> list[Example]:
    """The lessons in the same order as rows of tokens; with ``mismatched``, each with a response to another question,
    the next one's."""
    rows = [task.rows(lesson) for lesson in lessons]
    if mismatched and len({own[0][0] for own in rows}) < 2:
        raise ConfigError(f"{lessons[0].place}: kto compares questions with one another, and there is but one")
    examples = []
    for at, (lesson, own) in enumerate(zip(lessons, rows, strict=True)):
        members = tuple(member(f"{at}/{k}", *row) for k, row in enumerate(own))
        other = None
        if mismatched:
            later = (rows[(at + more) % len(rows)][0] for more in range(1, len(rows)))
            other = member(f"{at}/other", own[0][0], next(text for asked, text in later if asked != own[0][0]))
        examples.append(Example(lesson=lesson, members=members, other=other))
    return examples


def member(name: str, prompt: tuple[int, ...], response: tuple[int, ...]) -> Member:
    """A row of an example as the packing takes it."""
    return Member(
        response_id=name, group=name, prompt_ids=prompt, token_ids=response, rollout_logprobs=None, advantage=0.0,
        reward=0.0, trained=True, off_policy=True,
    )  # fmt: skip


def in_order(values_B: Tensor, examples: Sequence[Example], batch: Batch) -> Tensor:
    """What the batch's members have, in the order of the examples."""
    place = {one.response_id: row for row, one in enumerate(batch.members)}
    index = [place[one.response_id] for example in examples for one in example.members]
    return values_B[torch.tensor(index, device=values_B.device)]
