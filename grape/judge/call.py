"""One call of a judge: what is asked, the key that makes equal calls one, and what came of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from grape.types import Message, Outcome

Purpose = Literal["score", "critique", "repair", "revision"]
PROSE: frozenset[Purpose] = frozenset({"critique", "revision"})  # what is answered in words alone
UNANSWERED = {Outcome.TIMEOUT, Outcome.TRANSPORT, Outcome.BUDGET}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One question to a judge. ``key`` names it wherever it is asked: `call_key`.

    ``schema`` is the JSON schema of the reply that is wanted, where the server can hold it to one; ``logprobs`` asks
    for the probabilities of its tokens.
    """

    key: str
    judge: str
    model: str
    purpose: Purpose
    messages: tuple[Message, ...]
    sampling: Mapping[str, Any]
    response_id: str
    item: str
    sample: int = 0
    schema: Mapping[str, Any] | None = None
    logprobs: bool = False

    def row(self, record: CallRecord) -> dict[str, Any]:
        """The row of `judge_calls`, but for its run."""
        return {
            "call": self.key,
            "judge": self.judge,
            "model": self.model,
            "purpose": self.purpose,
            "messages": list(self.messages),
            "sampling": dict(self.sampling),
            "sample": self.sample,
            **{field.name: getattr(record, field.name) for field in fields(record)},
            "outcome": str(record.outcome),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRecord:
    """What came of a call, after its retries: a reply, or the outcome that stands for its absence.

    ``latency`` is the sum of the attempts in seconds, without waiting in line or between them; ``cost`` is in the
    currency of the judge's price. ``tokens`` are those of the score in the reply, where their probabilities were asked
    for: where in the reply each begins (in characters), and the text and log-probability of the token that was
    written, then of those that might have been.
    """

    outcome: Outcome = Outcome.OK
    reply: str | None = None
    finish_reason: str | None = None
    detail: str | None = None
    endpoint: str | None = None
    attempts: int = 1
    latency: float = 0.0
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: float | None = None
    tokens: Sequence[tuple[int, Sequence[tuple[str, float]]]] | None = None
    created: datetime

    @property
    def answered(self) -> bool:
        """Whether the judge spoke, be it to refuse. What was answered is never asked again."""
        return self.outcome not in UNANSWERED

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> CallRecord:
        """The record in a row of `judge_calls`, whatever other columns it has."""
        values = {field.name: row[field.name] for field in fields(cls) if field.name in row}
        tokens = values.get("tokens")
        return cls(
            **{
                **values,
                "outcome": Outcome(row["outcome"]),
                "tokens": json.loads(tokens) if isinstance(tokens, str) else tokens,
            }
        )


def call_key(
    model: str,
    sampling: Mapping[str, Any],
    messages: Sequence[Message],
    *,
    form: str,
    subject: Sequence[str] = (),
    schema: Mapping[str, Any] | None = None,
    sample: int = 0,
) -> str:
    """SHA-256 over all that decides a reply: model, sampling, messages, form and schema of it, number of the sample.

    Where it is asked, with which key, and what the rubric makes of it do not count. ``subject`` stands for messages
    that are not known (stored replies).
    """
    parts = [model, sampling, list(messages), form, list(subject), schema, sample]
    try:
        text = orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # integers beyond 64 bits
        text = json.dumps(parts, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()


def now() -> datetime:
    """The time of a record: UTC."""
    return datetime.now(UTC)
