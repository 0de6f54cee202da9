"""When an endpoint may be asked: quotas of a minute, the pause after faults; and when a judge's budget is spent.

Plain states: times come from the caller, in seconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from grape.judge.call import Call, CallRecord
from grape.judge.config import Judge

MINUTE = 60.0
FAULTS = 5  # different calls that must fail one behind the other before an endpoint is left out
FIRST_REST, LONGEST_REST = 1.0, 60.0  # seconds for which it is


@dataclass(slots=True)
class Entry:
    """So much begun at a time. ``counts``: it is not a minute ago yet."""

    time: float
    amount: float
    counts: bool = True


class Window:
    """At most ``limit`` within any 60 seconds; what is more than that alone waits until nothing else counts."""

    def __init__(self, limit: int | None) -> None:
        self._limit = math.inf if limit is None else limit
        self._entries: deque[Entry] = deque()
        self._sum = 0.0

    def opens(self, now: float, amount: float) -> float:
        """From when so much more may begin."""
        while self._entries and self._entries[0].time + MINUTE <= now:
            gone = self._entries.popleft()
            gone.counts = False
            self._sum -= gone.amount
        left = self._sum
        if not self._entries or left + amount <= self._limit:
            return now
        for entry in self._entries:
            left -= entry.amount
            if left + amount <= self._limit:
                return entry.time + MINUTE
        return self._entries[-1].time + MINUTE

    def add(self, now: float, amount: float) -> Entry:
        """So much begins."""
        entry = Entry(now, amount)
        if self._limit != math.inf:
            self._entries.append(entry)
            self._sum += amount
        return entry

    def correct(self, entry: Entry, amount: float) -> None:
        """It was so much."""
        if entry.counts and self._limit != math.inf:
            self._sum += amount - entry.amount
            entry.amount = amount


class Breaker:
    """Leaves an endpoint out once some different calls in a row have failed there; then one call tries it.

    Where that fails, too, the pause doubles. One call that always fails proves nothing, so it counts once.
    """

    def __init__(self) -> None:
        self._failed: set[str] = set()
        self._rests = 0
        self._until = 0.0
        self._trial = False

    @property
    def closed(self) -> bool:
        """Whether the endpoint is in use."""
        return self._rests == 0

    def opens(self, now: float) -> float:
        """From when a call may be let through."""
        if self.closed:
            return now
        return math.inf if self._trial else max(now, self._until)

    def begin(self) -> bool:
        """A call begins; whether it is the one that tries the endpoint."""
        self._trial = not self.closed
        return self._trial

    def worked(self) -> None:
        """The server gave an answer, be it to refuse."""
        self._failed.clear()
        self._rests, self._trial = 0, False

    def fault(self, key: str, now: float, trial: bool) -> None:
        """The server gave none. What was begun before the pause decides nothing any more."""
        self._failed.add(key)
        if trial or (self.closed and len(self._failed) >= FAULTS):
            self._trial = False
            self._until = now + min(FIRST_REST * 2 ** min(self._rests, 16), LONGEST_REST)
            self._rests += 1

    def dropped(self, trial: bool) -> None:
        """A call was cancelled, and says nothing."""
        self._trial = self._trial and not trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a call may take, before it is made: its characters by 4, and all that it may write."""

    input: int
    output: int

    @staticmethod
    def of(call: Call) -> Estimate:
        """By its messages and its limit on the reply."""
        written = call.sampling.get("max_tokens") or call.sampling.get("max_completion_tokens") or 0
        return Estimate(input=_quarter(str(message["content"]) for message in call.messages), output=written)

    @property
    def tokens(self) -> int:
        """Read and written."""
        return self.input + self.output


class Meter:
    """What a run has spent on a judge, against its budget. ``refused``: a call was not made because of it."""

    def __init__(self, judge: Judge, spent: tuple[int, float] = (0, 0.0)) -> None:
        self._judge = judge
        self._tokens, self._cost = spent
        self._under_way: list[Estimate] = []
        self.refused = False

    def cost(self, read: int, written: int) -> float:
        """The price of so many tokens."""
        price = self._judge.price
        return (read * price.input + written * price.output) / 1e6 if price else 0.0

    @property
    def spent(self) -> str | None:
        """That the budget is spent, in words; None while it is not."""
        return self._over(self._tokens, self._cost)

    @property
    def full(self) -> bool:
        """Whether the calls under way may take all that is left: another one then waits until that is known."""
        read, written = sum(one.input for one in self._under_way), sum(one.output for one in self._under_way)
        over = self._over(self._tokens + read + written, self._cost + self.cost(read, written))
        return bool(self._under_way) and over is not None

    @property
    def advice(self) -> str:
        """The line that ends a run."""
        field = "tokens" if "tokens" in (self.spent or "") else "cost"
        return f"judge {self._judge.judge!r}: {self.spent}: raise budget.{field} and go on with --resume"

    def begin(self, estimate: Estimate) -> None:
        """A call begins."""
        if self._judge.budget:
            self._under_way.append(estimate)

    def end(self, estimate: Estimate, record: CallRecord | None) -> int:
        """A call ended, with an answer or without; the tokens that it took. Where a server counts none, they are
        estimated."""
        if self._judge.budget:
            self._under_way.remove(estimate)
        if record is None:
            return estimate.tokens
        read, written = record.input_tokens, record.output_tokens
        read = estimate.input if read is None else read
        written = _quarter([record.reply or ""]) if written is None else written
        self._tokens += read + written
        self._cost += self.cost(read, written)
        return read + written

    def _over(self, tokens: int, cost: float) -> str | None:
        budget = self._judge.budget
        if budget and budget.tokens is not None and tokens >= budget.tokens:
            return f"its budget of {budget.tokens} tokens is spent ({tokens})"
        if budget and budget.cost is not None and cost >= budget.cost:
            return f"its budget of {budget.cost:g} is spent ({cost:.6g})"
        return None


def _quarter(texts: Iterable[str]) -> int:
    return -(-sum(map(len, texts)) // 4)
