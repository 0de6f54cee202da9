"""Which of two responses is better: asked in both orders, the answers made one probability."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grape.item import Item
from grape.scale import Scale
from grape.types import Question, Response, Verdict

if TYPE_CHECKING:
    from grape.judge.critic import Critic
    from grape.judge.jury import Jury

SCALE = Scale(kind="choices", labels=("B", "A"), values=(0.0, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two responses compared by one item.

    ``probability`` is that of the first being better, the mean over both orders: a soft label. It is None where one of
    the two verdicts has no score, for one order alone says as much about the order as about the responses.
    ``consistent`` is False where the two orders preferred different responses, None where one preferred none.
    """

    item: str
    probability: float | None
    consistent: bool | None
    forward: Verdict
    backward: Verdict


def worded(criterion: str, *, undesirable: bool) -> str:
    """What two responses are compared by: of an undesirable criterion that less of it is better."""
    return f"The response with less of this fault is better: {criterion}" if undesirable else criterion


async def compare(
    judge: Critic | Jury, question: Question, first: Response, second: Response, item: Item
) -> Comparison:
    """A judge's comparison of two responses to a question by an item's criterion."""
    criterion = worded(item.criterion, undesirable=item.undesirable)
    asked = item.model_copy(update={"scale": SCALE, "critique": None, "criterion": criterion})
    forward, backward = await asyncio.gather(
        judge.verdict(question, first, asked, second), judge.verdict(question, second, asked, first)
    )
    there, back = preferred(forward), preferred(backward)
    probability = consistent = None
    if there is not None and back is not None:
        probability = (there + 1 - back) / 2
        consistent = None if 0.5 in (there, back) else (there > 0.5) != (back > 0.5)
    return Comparison(item=item.id, probability=probability, consistent=consistent, forward=forward, backward=backward)


def preferred(verdict: Verdict) -> float | None:
    """The probability that response A is better, by a verdict on the scale of A and B.

    The score says which, and its confidence how probable that is, but never less than a toss-up: a judge that is not
    to be relied on prefers neither. With the confidence of a token's probability, or of votes, this is P("A").
    """
    if verdict.score is None or verdict.confidence is None:
        return None
    sure = max(0.0, verdict.confidence - 0.5)
    return 0.5 + (sure if verdict.score > 0.5 else -sure if verdict.score < 0.5 else 0.0)


def clamped(probability: float, low: float, high: float) -> float:
    """A soft label no surer than this: a judge that reasons first is almost always certain (Bai et al. 2022, 4.1)."""
    return min(max(probability, low), high)
