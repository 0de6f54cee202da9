"""Several judges asked alike: one verdict of theirs, whose confidence is how far they agree."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from grape.item import Item
from grape.judge.calibration import calibrated
from grape.judge.config import Judge
from grape.judge.critic import Critic
from grape.judge.trail import joined, voted
from grape.types import Question, Response, Verdict


class Jury:
    """A judge whose verdicts are those of others. For use as a `Critic`; the others are closed by whoever made them."""

    def __init__(self, judge: Judge, members: Sequence[Critic | Jury], fallback: Critic | Jury | None = None) -> None:
        self.judge = judge
        self.members = members
        self.fallback = fallback

    @property
    def width(self) -> int:
        """How many calls it keeps busy: as many as its slowest member can take."""
        return min(member.width for member in self.members)

    async def reach(self) -> None:
        """`ConfigError` of one line where one of them is not there."""
        await asyncio.gather(*(judge.reach() for judge in (*self.members, *([self.fallback] if self.fallback else []))))

    async def close(self) -> None:
        """Close the members, and the fallback. Closing twice is allowed."""
        await asyncio.gather(
            *(member.close() for member in (*self.members, *([self.fallback] if self.fallback else [])))
        )

    def check(self, item: Item) -> None:
        """`ConfigError` where the prompts of one of them cannot serve this item."""
        for member in self.members:
            member.check(item)

    async def verdicts(self, question: Question, response: Response, items: Sequence[Item]) -> list[Verdict]:
        """A verdict for each item."""
        return list(await asyncio.gather(*(self.verdict(question, response, item) for item in items)))

    async def verdict(
        self, question: Question, response: Response, item: Item, other: Response | None = None
    ) -> Verdict:
        """One verdict of them all; of the fallback, where half of them or more failed."""
        verdicts = await asyncio.gather(*(member.verdict(question, response, item, other) for member in self.members))
        sure = self.judge.confidence == "agreement"
        verdict = voted(verdicts, self.judge.aggregate, judge=self.judge.judge, sure=sure)
        if verdict.score is None and self.fallback is not None:
            return joined(verdict, await self.fallback.verdict(question, response, item, other))
        return calibrated(verdict, self.judge.calibration, question.category)
