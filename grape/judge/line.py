"""Which call goes to which endpoint, and when: first come, first served, within every limit."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

from grape.judge.answer import Fault
from grape.judge.call import Call, CallRecord
from grape.judge.endpoint import Server
from grape.judge.limits import Entry, Estimate, Meter
from grape.types import Outcome

LEAST_PATIENCE = 10.0  # seconds that a call waits where no endpoint is in use, or its own time limit if that is longer
SHORTEST = 0.001  # seconds to sleep at least, so that rounding cannot make the line turn on the spot


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """Leave to ask a server once; ``trial``: it was left out, and this call tries it."""

    server: Server
    call: Call
    estimate: Estimate
    tokens: Entry
    trial: bool


@dataclass(slots=True, kw_only=True)
class Waiter:
    """A call in line. ``spare``: it may be tried again, and so may try an endpoint that was left out."""

    call: Call
    estimate: Estimate
    tried: Collection[Server]
    spare: bool
    since: float
    ticket: asyncio.Future[Ticket | Fault] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Line:
    """Calls that wait for an endpoint of a judge. For use on one event loop.

    A call goes to the least busy endpoint that is in use and has not failed it, or to one that is due for a trial.
    Where all are left out it waits at most as long as one call may take, or `LEAST_PATIENCE`. Nothing begins beyond the
    budget: where the calls under way may take all of it, the next one waits until one has ended.
    """

    def __init__(
        self, servers: Sequence[Server], meter: Meter, clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:  # fmt: skip
        self._servers = servers
        self._meter = meter
        self._clock, self._sleep = clock, sleep
        self._patience = max(LEAST_PATIENCE, *(server.timeout for server in servers))
        self._waiting: deque[Waiter] = deque()
        self._down_since: float | None = None
        self._turn: dict[Server, int] = dict.fromkeys(servers, 0)
        self._begun = 0
        self._alarm: tuple[float, asyncio.Task[None]] | None = None

    async def enter(self, call: Call, tried: Collection[Server], *, spare: bool) -> Ticket | Fault:
        """Wait for a turn: a ticket, to be given back by `leave`, or why there is none."""
        waiter = Waiter(call=call, estimate=Estimate.of(call), tried=tried, spare=spare, since=self._clock())
        self._waiting.append(waiter)
        self._move()
        try:
            return await waiter.ticket
        except asyncio.CancelledError:
            if not waiter.ticket.cancelled() and isinstance(ticket := waiter.ticket.result(), Ticket):
                self.leave(ticket, None)
            raise

    def leave(self, ticket: Ticket, result: CallRecord | Fault | None) -> None:
        """A call has ended, with ``result``; None where it was cancelled."""
        server, now = ticket.server, self._clock()
        server.busy -= 1
        record = result if isinstance(result, CallRecord) else None
        server.tokens.correct(ticket.tokens, self._meter.end(ticket.estimate, record))
        if result is None:
            server.breaker.dropped(ticket.trial)
        elif isinstance(result, Fault) and result.dead:
            server.breaker.fault(ticket.call.key, now, ticket.trial)
        else:
            server.breaker.worked()
        if isinstance(result, Fault) and result.wait:
            server.held = max(server.held, now + min(result.wait, server.timeout))
        self._move()

    def close(self) -> None:
        """Nobody waits any more."""
        if self._alarm:
            self._alarm[1].cancel()
        self._alarm = None

    def _move(self) -> None:
        """Let every call go that may."""
        now = self._clock()
        if self._meter.spent:
            self._refuse(list(self._waiting), Outcome.BUDGET, self._meter.spent)
        up = any(server.breaker.closed for server in self._servers)
        self._down_since = None if up else now if self._down_since is None else self._down_since
        if self._down_since is not None and now >= self._down_since + self._patience:
            why = f"no endpoint answers: after faults all are left out, for {self._patience:g} s and more"
            tired = [waiter for waiter in self._waiting if waiter.since + self._patience <= now]
            self._refuse(tired, Outcome.TRANSPORT, why)
        kept, room = list[Waiter](), {server for server in self._servers if server.busy < server.room}
        while self._waiting and room and not self._meter.full:
            waiter = self._waiting.popleft()
            if waiter.ticket.done():  # cancelled
                continue
            allowed = self._allowed(waiter, now) & room
            tokens = waiter.estimate.tokens
            open_ = [server for server in self._servers if server in allowed and server.opens(now, tokens) <= now]
            if not open_:
                kept.append(waiter)
                room -= allowed  # who comes later does not overtake it there
                continue
            server = min(open_, key=lambda server: (server.busy / server.room, self._turn[server]))
            waiter.ticket.set_result(self._begin(server, waiter, now))
            if server.busy == server.room:
                room.discard(server)
        self._waiting.extendleft(reversed(kept))
        self._set_alarm(now)

    def _allowed(self, waiter: Waiter, now: float) -> set[Server]:
        """The endpoints that a call may go to."""
        up = {server for server in self._servers if server.breaker.closed}
        due = {
            server
            for server in self._servers
            if server not in up and server.busy < server.room and server.opens(now, waiter.estimate.tokens) <= now
        }
        if due and (waiter.spare or not up):
            return due
        return up.difference(waiter.tried) or up

    def _begin(self, server: Server, waiter: Waiter, now: float) -> Ticket:
        self._begun += 1
        self._turn[server] = self._begun
        server.busy += 1
        server.requests.add(now, 1)
        self._meter.begin(waiter.estimate)
        return Ticket(
            server=server, call=waiter.call, estimate=waiter.estimate, trial=server.breaker.begin(),
            tokens=server.tokens.add(now, waiter.estimate.tokens),
        )  # fmt: skip

    def _refuse(self, waiters: Sequence[Waiter], outcome: Outcome, why: str) -> None:
        """Send some away."""
        for waiter in waiters:
            if not waiter.ticket.done():
                waiter.ticket.set_result(Fault(outcome=outcome, detail=why, again=False))
                self._meter.refused |= outcome is Outcome.BUDGET
        self._waiting = deque(waiter for waiter in self._waiting if not waiter.ticket.done())

    def _set_alarm(self, now: float) -> None:
        """See that the line moves when a time has come; whatever else moves it is a call that ends or begins."""
        waiter = next((waiter for waiter in self._waiting if not waiter.ticket.done()), None)
        if waiter is None:
            return
        times = [s.opens(now, waiter.estimate.tokens) for s in self._servers if s.busy < s.room]
        if self._down_since is not None:
            times.append(max(self._down_since, waiter.since) + self._patience)
        soonest = min((time for time in times if now < time < math.inf), default=math.inf)
        if soonest < (self._alarm[0] if self._alarm else math.inf):
            self.close()
            self._alarm = (soonest, asyncio.create_task(self._wake(max(soonest - now, SHORTEST))))

    async def _wake(self, seconds: float) -> None:
        await self._sleep(seconds)
        self._alarm = None
        self._move()
