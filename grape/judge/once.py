"""Calls of a judge, each made once: what the memory has, or was told before, is not asked again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from grape.errors import JudgeError
from grape.judge.call import Call, CallRecord
from grape.judge.client import Client
from grape.judge.memory import Memory
from grape.types import Outcome

T = TypeVar("T")
Read = Callable[[CallRecord], T]  # raises JudgeError where the record holds no usable reply


class Once:
    """A client whose answers are kept for as long as this lives; failures to answer are not.

    ``record`` gets a row of `judge_calls` (but for its run) for every call that was made, before its reply is used.
    """

    def __init__(self, client: Client, record: Callable[[dict[str, Any]], None], memory: Memory | None) -> None:
        self._client = client
        self._record = record
        self._memory = memory
        self._known: dict[str, CallRecord] = {}
        self._under_way: dict[str, asyncio.Future[CallRecord | None]] = {}

    async def answer(self, call: Call, read: Read[T]) -> tuple[CallRecord, T | JudgeError | None]:
        """The record of a call, and what it holds, if it was read already.

        Equal calls wait for the one that is under way, and share what it got.
        """
        while call.key not in self._known:
            if (pending := self._under_way.get(call.key)) is None:
                return await self._make(call, read)
            if (record := await asyncio.shield(pending)) is not None:
                return record, None
            # Whoever made it was cancelled: this one makes it.
        return self._known[call.key], None

    async def _make(self, call: Call, read: Read[T]) -> tuple[CallRecord, T | JudgeError | None]:
        mine = self._under_way[call.key] = asyncio.get_running_loop().create_future()
        shared = None
        try:
            stored = await self._memory.recall(call.key) if self._memory else None
            if stored is not None:
                shared = self._known[call.key] = stored
                return stored, None
            record = await self._client.ask(call)
            found: T | JudgeError
            try:
                found = read(record)
            except JudgeError as error:
                found, record = error, replace(record, outcome=error.outcome, detail=str(error))
            if record.outcome is not Outcome.BUDGET:  # else no call was made
                self._record(call.row(record))
            if record.answered:
                self._known[call.key] = record
            shared = record
            return record, found
        finally:
            del self._under_way[call.key]
            mine.set_result(shared)
