"""What judges have answered before: the cache of calls is the log itself."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from grape.errors import ConfigError
from grape.judge.call import UNANSWERED, Call, CallRecord
from grape.log import Log

COLUMNS = ["call", *(field.name for field in fields(CallRecord))]
GATHERED = 0.002  # seconds in which lookups are gathered into one query


class Memory:
    """The calls that a log holds, of any run, by key; for use on one event loop.

    Equal calls have equal keys whatever asks them, so new weights, formulas or items cost no call for what was judged
    before. Only keys are held here (8 bytes each); what is found is read from the log, many at a time. ``failures``:
    calls that failed are found too.
    """

    def __init__(self, log: Log, run: str, *, failures: bool = False) -> None:
        self._log = log
        self._run = run
        self._failures = failures
        self._begun: NDArray[np.uint64] | None = None
        self._wanted: dict[str, asyncio.Future[CallRecord | None]] = {}
        self._looks: set[asyncio.Task[None]] = set()

    async def recall(self, key: str) -> CallRecord | None:
        """What came of the call with this key, if it was answered; the last answer stands."""
        if self._begun is None:
            self._begun = self._begin()
        first = np.uint64(int(key[:16], 16))
        place = int(np.searchsorted(self._begun, first))
        if place == len(self._begun) or self._begun[place] != first:
            return None
        if key not in self._wanted:
            if not self._wanted:
                look = asyncio.create_task(self._look())
                self._looks.add(look)
                look.add_done_callback(self._looks.discard)
            self._wanted[key] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._wanted[key])

    def endpoints(self, model: str, *, tokens: bool = False) -> set[str | None]:
        """Where a model has answered before; with ``tokens``, with the probabilities of its tokens."""
        rows = self._log.query(
            f"select distinct endpoint from judge_calls where model = ? and outcome not in {_unanswered()}"
            f"{' and tokens is not null' * tokens}",
            [model],
        )
        return {endpoint for (endpoint,) in rows}

    def spent(self, judge: str) -> tuple[int, float]:
        """The tokens and the money that this run has spent on a judge."""
        ((tokens, cost),) = self._log.query(
            "select coalesce(sum(coalesce(input_tokens, 0) + coalesce(output_tokens, 0)), 0)::bigint, "
            "coalesce(sum(cost), 0) from judge_calls where run = ? and judge = ?",
            [self._run, judge],
        )
        return int(tokens), float(cost)

    def _begin(self) -> NDArray[np.uint64]:
        """The beginnings of all keys, in order."""
        rows = self._log.query("select distinct ('0x' || call[:16])::ubigint from judge_calls where length(call) = 64")
        return np.sort(np.fromiter((first for (first,) in rows), dtype=np.uint64, count=len(rows)))

    async def _look(self) -> None:
        await asyncio.sleep(GATHERED)
        wanted, self._wanted = self._wanted, {}
        try:
            found = await asyncio.get_running_loop().run_in_executor(None, self._read, list(wanted))
        except BaseException as error:
            for future in wanted.values():
                future.set_exception(error)
            raise
        for key, future in wanted.items():
            future.set_result(found.get(key))

    def _read(self, keys: Collection[str]) -> dict[str, CallRecord]:
        rows = self._log.query(
            f"select {', '.join(COLUMNS)} from judge_calls where call in (select unnest(?::varchar[])) order by rowid",
            [list(keys)],
        )
        found: dict[str, CallRecord] = {}
        for row in rows:
            record = CallRecord.from_row(dict(zip(COLUMNS, row, strict=True)))
            if record.answered or (self._failures and not (row[0] in found and found[row[0]].answered)):
                found[row[0]] = record
        return found


class StoredOnly:
    """Asks nobody: whatever is not in the log is an error."""

    shown = True

    def repairs(self, call: Call) -> bool:
        """Whether it was, the log knows."""
        return True

    async def ask(self, call: Call) -> CallRecord:
        """Nobody can be asked."""
        raise ConfigError(
            f"rescore: the log has no {call.purpose} reply of judge {call.judge!r} ({call.model}) on response "
            f"{call.response_id!r}, item {call.item!r}: score without --rescore to ask for what is missing"
        )

    async def reach(self, known: Collection[str | None]) -> None:
        """Nobody is to be reached."""

    async def close(self) -> None:
        """Nothing is open."""


def _unanswered() -> str:
    return "(" + ", ".join(f"'{outcome}'" for outcome in sorted(UNANSWERED)) + ")"
