"""The best and the worst response of each group of a run, by a reward or by an item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from grape.errors import ConfigError, known
from grape.judge.pair import Comparison
from grape.stored import Reader

BY = ("weighted", "reward", "normalized")
NOISE = 1e-9  # scores that differ by less differ by rounding alone
Group = tuple[int | None, str, str]  # step, question, category


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A text that was answered, with its score: the mean of the scores of all responses that have this text."""

    response_id: str
    text: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two responses to a question. ``margin`` is what the chosen one's score is above the other's: below 0 where a
    judge overruled it. ``comparison`` is None where no judge was asked."""

    step: int | None
    question_id: str
    category: str
    chosen: Scored
    rejected: Scored
    comparison: Comparison | None = None

    @property
    def margin(self) -> float:
        """How much more score the chosen one has."""
        return self.chosen.score - self.rejected.score


def read_groups(log: Reader, run: str, by: str) -> list[tuple[Group, list[Scored | None]]]:
    """The groups of a run in their order: step, question and category, and each response; None where unscorable."""
    same = "on s.run = r.run and s.step is not distinct from r.step and s.response_id = r.response_id"
    if by in BY:
        score, table = f"if(s.unscorable is null, s.{by}, null)", "rewards s"
    else:
        score, table = "if(s.polarity = 'undesirable', 1 - s.score, s.score)", "verdicts s"
        items = {item for (item,) in log.query("select distinct item from verdicts where run = ?", [run])}
        if by not in items:
            raise ConfigError(f"--by: {by!r} is neither a reward nor an item of run {run}; {known({*BY, *items}, by)}")
    rows = log.query(
        f"select s.step, s.question_id, s.category, s.response_id, r.response, {score} from {table} "
        f"join responses r {same} where s.run = ? {'' if by in BY else 'and s.applicable and s.item = ?'} "
        "order by s.step, r.rowid",
        [run] if by in BY else [run, by],
    )
    groups: dict[Group, list[Scored | None]] = {}
    for step, question_id, category, response_id, text, score in rows:
        one = None if score is None else Scored(response_id=response_id, text=text or "", score=score)
        groups.setdefault((step, question_id, category), []).append(one)
    return list(groups.items())


def best_and_worst(
    groups: Sequence[tuple[Group, list[Scored | None]]], margin: float
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs, and how many groups have none for which reason."""
    found, counts = [], {"ties": 0, "narrow": 0, "unscorable": 0}
    for (step, question_id, category), members in groups:
        scored = [one for one in members if one is not None]
        texts = _by_text(scored)
        best, worst = max(texts, key=_score, default=None), min(texts, key=_score, default=None)
        if len(scored) < 2 or best is None or worst is None:
            counts["unscorable"] += 1
        elif best.score - worst.score <= NOISE:
            counts["ties"] += 1
        elif best.score - worst.score < margin - NOISE:
            counts["narrow"] += 1
        else:
            found.append(Pair(step=step, question_id=question_id, category=category, chosen=best, rejected=worst))
    return found, counts


def _score(one: Scored) -> float:
    return one.score


def _by_text(members: Sequence[Scored]) -> list[Scored]:
    """Responses of one text as one, with the mean of their scores: a text is not better than itself."""
    texts: dict[str, list[Scored]] = {}
    for one in members:
        texts.setdefault(one.text, []).append(one)
    return [replace(same[0], score=math.fsum(map(_score, same)) / len(same)) for same in texts.values()]
