"""The calls behind one verdict, what they took in all, and several verdicts made one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grape.item import Item
from grape.judge.call import CallRecord
from grape.judge.spread import Aggregate, combined
from grape.types import Outcome, Question, Response, Verdict


@dataclass(slots=True)
class Trail:
    """The calls behind one verdict."""

    question: Question
    response: Response
    item: Item
    sample: int = 0
    other: Response | None = None  # what the response is compared with
    counted: bool = True  # whether the verdict says what its calls took: one verdict does, of several by one call
    calls: dict[str, CallRecord] = field(default_factory=dict)
    critique: str | None = None

    def about(self, item: Item, *, first: bool) -> Trail:
        """The trail of another item of the same calls."""
        return replace(self, item=item, counted=first)

    def verdict(self, judge: str, outcome: Outcome, **values: Any) -> Verdict:
        """A verdict with what its calls took in all."""
        records = self.calls.values() if self.counted else ()
        counts = {
            name: [getattr(record, name) for record in records if getattr(record, name) is not None]
            for name in ("input_tokens", "output_tokens")
        }
        return Verdict(
            item=self.item.id,
            outcome=outcome,
            critique=self.critique,
            judge=judge,
            calls=tuple(self.calls),
            attempts=sum(record.attempts for record in records),
            latency=sum(record.latency for record in records),
            **{name: sum(numbers) if numbers else None for name, numbers in counts.items()},
            **values,
        )


def joined(first: Verdict, second: Verdict) -> Verdict:
    """The fallback's verdict, with what the first judge's failure took."""
    failed = f"{first.judge}: {first.outcome}: {first.detail}"
    detail = f"{failed}; {second.judge}: {second.detail}" if second.detail else failed
    return replace(second, detail=detail, **took([first, second]))


def voted(verdicts: Sequence[Verdict], aggregate: Aggregate, *, judge: str, sure: bool = True) -> Verdict:
    """One verdict of several on the same item: their `combined` score, and how far they agree as its confidence.

    Those that failed have no vote; where they are half of all or more, the first failure stands. The reasoning is that
    of the first vote nearest to the score. Without ``sure`` the confidence is 1.
    """
    valid = [verdict for verdict in verdicts if verdict.score is not None]
    failed = [verdict for verdict in verdicts if verdict.score is None]
    lost = f"{len(failed)} of {len(verdicts)} votes failed: {failed[0].outcome}: {failed[0].detail}" if failed else None
    if 2 * len(failed) >= len(verdicts):
        return replace(failed[0], judge=judge, detail=lost, **took(verdicts))
    scores = [verdict.score for verdict in valid if verdict.score is not None]
    score, confidence = combined(scores, [1.0] * len(scores), aggregate)
    nearest = min(range(len(scores)), key=lambda k: abs(scores[k] - score))
    return replace(
        valid[nearest],
        score=score,
        raw=", ".join(str(verdict.raw) for verdict in valid),
        confidence=confidence if sure else 1.0,
        stated=confidence if sure else 1.0,
        judge=judge,
        detail=lost,
        **took(verdicts),
    )


def took(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What several verdicts took in all. Calls that they share count once in ``calls``."""
    counts = {
        name: [getattr(verdict, name) for verdict in verdicts if getattr(verdict, name) is not None]
        for name in ("input_tokens", "output_tokens")
    }
    return {
        "calls": tuple(dict.fromkeys(call for verdict in verdicts for call in verdict.calls)),
        "attempts": sum(verdict.attempts for verdict in verdicts),
        "latency": sum(verdict.latency for verdict in verdicts),
        **{name: sum(numbers) if numbers else None for name, numbers in counts.items()},
    }
