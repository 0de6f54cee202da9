"""The calls behind one verdict, and what they took in all."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from grape.item import Item
from grape.judge.call import CallRecord
from grape.types import Outcome, Question, Response, Verdict


@dataclass(slots=True)
class Trail:
    """The calls behind one verdict."""

    question: Question
    response: Response
    item: Item
    calls: dict[str, CallRecord] = field(default_factory=dict)
    critique: str | None = None

    def verdict(self, judge: str, outcome: Outcome, **values: Any) -> Verdict:
        """A verdict with what its calls took in all."""
        records = self.calls.values()
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
    counts = [(first.input_tokens, second.input_tokens), (first.output_tokens, second.output_tokens)]
    tokens = [None if a is None and b is None else (a or 0) + (b or 0) for a, b in counts]
    return replace(
        second,
        detail=f"{failed}; {second.judge}: {second.detail}" if second.detail else failed,
        calls=first.calls + second.calls,
        attempts=first.attempts + second.attempts,
        latency=first.latency + second.latency,
        input_tokens=tokens[0],
        output_tokens=tokens[1],
    )
