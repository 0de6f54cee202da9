"""The nouns that every room shares: question, response, verdict and its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """The gate for text from outside: unknown keys, bools for numbers and text for numbers are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=200)]
Message = dict[str, str]  # {"role": ..., "content": ...}


class Turn(Strict):
    """One message of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Outcome(StrEnum):
    """How a verdict ended. Only ``ok`` carries a score."""

    OK = "ok"
    NOT_APPLICABLE = "not_applicable"
    ABSTAINED = "abstained"
    UNPARSABLE = "unparsable"
    REFUSED = "refused"
    OUT_OF_RANGE = "out_of_range"
    TIMEOUT = "timeout"
    TRANSPORT = "transport"
    BUDGET = "budget"
    CHECKER = "checker"
    SANDBOX = "sandbox"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt with what is known about its answer. All responses to one question form a group."""

    question_id: str
    category: str
    text: str | tuple[Message, ...]
    reference: str | None = None
    tests: str | None = None
    entry_point: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The question as one text; the turns of a chat are labelled with their roles."""
        if isinstance(self.text, str):
            return self.text
        return "\n\n".join(f"{message['role']}: {message['content']}" for message in self.text)

    def get(self, name: str) -> Any:
        """A field of the row, or else of its metadata; None where neither has it."""
        if name in ROW_FIELDS:
            value = getattr(self, ROW_FIELDS[name])
            if value is not None:
                return value
        return self.metadata.get(name)


ROW_FIELDS = {
    "question_id": "question_id",
    "category": "category",
    "question": "prompt",
    "reference": "reference",
    "tests": "tests",
    "entry_point": "entry_point",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One answer to a question. Its text is data: nothing in it is ever obeyed."""

    response_id: str
    question_id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One judgement of one response on one rubric item.

    A judge or checker that fails yields an ``outcome`` other than "ok" and no score, never a score of zero: a failed
    measurement says nothing about the response. ``score`` is on [0, 1] before polarity; ``raw`` is the judge's own
    label. ``stated`` is the confidence as the judge gave it, ``confidence`` what its calibration makes of it (the same
    where it has none). ``calls`` are the keys of the judge calls behind it.
    """

    item: str
    outcome: Outcome
    score: float | None = None
    raw: str | None = None
    confidence: float | None = None
    stated: float | None = None
    reasoning: str | None = None
    critique: str | None = None
    detail: str | None = None
    judge: str | None = None
    calls: tuple[str, ...] = ()
    attempts: int = 1
    latency: float = 0.0
    input_tokens: int | None = None
    output_tokens: int | None = None

    def __post_init__(self) -> None:
        assert (self.outcome is Outcome.OK) == (self.score is not None), (
            "a score is given with outcome ok, and only then"
        )
