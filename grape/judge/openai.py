"""Judges behind OpenAI-compatible servers: several endpoints, retries, and typed failures."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from time import monotonic, perf_counter

from grape.judge.answer import Fault
from grape.judge.call import Call, CallRecord, now
from grape.judge.config import Judge
from grape.judge.endpoint import Server
from grape.judge.limits import Meter
from grape.judge.line import Line
from grape.judge.probe import reach

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds before the second attempt, and before any


class OpenAIClient:
    """A judge's endpoints. What is under way, and how fast, each of them limits for itself; `close` it at the end.

    ``meter`` holds what the run has spent on the judge.
    """

    shown = True

    def __init__(
        self,
        judge: Judge,
        rng: random.Random | None = None,
        *,
        meter: Meter | None = None,
        clock: Callable[[], float] = monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.judge = judge
        self._rng = rng or random.Random()
        self._meter = meter or Meter(judge)
        self._sleep = sleep
        self._servers = [Server(judge, endpoint, clock) for endpoint in judge.endpoints]
        self._line = Line(self._servers, self._meter, clock, sleep)

    def repairs(self, call: Call) -> bool:
        """A live judge can always be asked again."""
        return True

    async def ask(self, call: Call) -> CallRecord:
        """The judge's reply, or after ``retries`` more attempts the typed outcome of the last one."""
        attempt, spent, url = 0, 0.0, None
        tried: set[Server] = set()
        while True:
            ticket = await self._line.enter(call, tried, spare=attempt < self.judge.retries)
            if isinstance(ticket, Fault):
                return self._failed(ticket, url, attempt, spent)
            result, start = None, perf_counter()
            try:
                result = await ticket.server.attempt(call)
            finally:
                self._line.leave(ticket, result)
            url, attempt, spent = ticket.server.url, attempt + 1, spent + perf_counter() - start
            if isinstance(result, CallRecord):
                return replace(result, endpoint=url, attempts=attempt, latency=spent, cost=self._cost(result))
            if attempt > self.judge.retries or not result.again:
                return self._failed(result, url, attempt, spent)
            tried.add(ticket.server)
            if len(tried) == len(self._servers):
                tried = {ticket.server}
            await self._sleep(self._pause(attempt))

    def _failed(self, fault: Fault, url: str | None, attempts: int, spent: float) -> CallRecord:
        return CallRecord(
            outcome=fault.outcome,
            detail=self._mask(fault.detail),
            endpoint=url,
            attempts=attempts,
            latency=spent,
            created=now(),
        )

    def _cost(self, record: CallRecord) -> float | None:
        if self.judge.price is None or record.input_tokens is None or record.output_tokens is None:
            return None
        return self._meter.cost(record.input_tokens, record.output_tokens)

    def _pause(self, attempt: int) -> float:
        """Seconds before the next attempt: full jitter on 2^n. What a server asks for holds it, wherever that goes."""
        longest = min(FIRST_PAUSE * 2 ** min(attempt - 1, 16), LONGEST_PAUSE, self.judge.timeout)
        return self._rng.uniform(0, longest)

    def _mask(self, detail: str) -> str:
        for key in {server.key for server in self._servers if server.key}:
            detail = detail.replace(key, "***")
        return detail

    async def reach(self, known: Collection[str | None] = ()) -> None:
        """`ConfigError` of one line where an address, its key or the model is wrong, or cannot give what is asked.

        ``known`` are addresses that have answered this judge before: no question is put to them to find out. A server
        that is slow or overloaded is nobody's error.
        """
        for server in self._servers:
            await reach(self.judge, server, trusted=server.url in known, mask=self._mask)

    async def close(self) -> None:
        """Close the connections. Closing twice is allowed."""
        self._line.close()
        for server in self._servers:
            await server.close()
