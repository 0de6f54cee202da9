"""Judges that answer from a file of stored replies of a real one: JSON lines of response_id, item, reply and sample."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from pydantic import ValidationError, model_validator

from grape.errors import ConfigError, invalid
from grape.judge.call import Call, CallRecord, Purpose, now
from grape.judge.config import Judge
from grape.judge.prompt import well_formed
from grape.resources import read_text
from grape.types import Outcome, Strict


class StoredReply(Strict):
    """One line: a reply to the call with this key, or else to the question about this response and item."""

    response_id: str | None = None
    item: str | None = None
    call: str | None = None
    purpose: Purpose = "score"
    sample: int = 0
    reply: str | None
    finish_reason: str | None = None

    @model_validator(mode="after")
    def _named(self) -> StoredReply:
        if self.call is None and (self.response_id is None or self.item is None):
            raise ValueError("a reply needs response_id and item, or call")
        return self

    @property
    def named(self) -> str:
        """What the reply answers, in words."""
        return ", ".join([*self.subject[:3], *([f"sample {self.sample}"] if self.sample else [])])

    @property
    def subject(self) -> tuple[str, ...]:
        """What the reply answers."""
        return (self.call,) if self.call else (self.response_id or "", self.item or "", self.purpose, str(self.sample))


class ReplayClient:
    """Stored replies. A reply that is not in the file is outcome `transport`: nobody can be asked for it."""

    def __init__(self, judge: Judge) -> None:
        assert judge.replies is not None, "a replay judge has replies"
        self.path = Path(judge.source).parent / judge.replies
        self._replies = _read(self.path)
        # Only keys of calls depend on the prompt; without any, what the judge was shown then is not known.
        self.shown = any(len(subject) == 1 for subject in self._replies)

    def _find(self, call: Call) -> StoredReply | None:
        by_key = self._replies.get((call.key,))
        return by_key or self._replies.get((call.response_id, call.item, call.purpose, str(call.sample)))

    def repairs(self, call: Call) -> bool:
        """Whether the file has the answer to a repair question."""
        return self._find(call) is not None

    async def ask(self, call: Call) -> CallRecord:
        """The stored reply to a call."""
        stored = self._find(call)
        if stored is None:
            detail = f"{self.path} has no {call.purpose} reply for response {call.response_id!r}, item {call.item!r}"
            return CallRecord(outcome=Outcome.TRANSPORT, detail=detail, endpoint=str(self.path), created=now())
        return CallRecord(
            reply=well_formed(stored.reply or ""),
            finish_reason=stored.finish_reason,
            endpoint=str(self.path),
            created=now(),
        )

    async def reach(self, known: Collection[str | None]) -> None:
        """The file was read already."""

    async def close(self) -> None:
        """Nothing is open."""


def _read(path: Path) -> dict[tuple[str, ...], StoredReply]:
    replies: dict[tuple[str, ...], StoredReply] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            stored = StoredReply.model_validate(json.loads(line))
        except ValidationError as error:
            raise invalid(where, error, sorted(StoredReply.model_fields)) from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not JSON") from error
        if replies.setdefault(stored.subject, stored) != stored:
            raise ConfigError(f"{where}: another reply for {stored.named} stands above")
    return replies
