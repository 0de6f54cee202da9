"""Judges asked again: does their confidence fall where their scores vary? That is what Lemma 8.1 assumes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grape.agreement import Interval, interval, spearman
from grape.errors import ConfigError, known
from grape.gold import stored_verdicts
from grape.item import Item
from grape.judge.config import Judge, load_judge
from grape.judge.critic import Critic
from grape.judge.memory import Memory
from grape.log import Log
from grape.plan import plan_rows
from grape.rows import Rows, read_rows
from grape.rubric import load_rubrics
from grape.types import Verdict

MOST = 100  # responses that each judge is asked about again, on each item


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeated:
    """One judge on one item, asked again: the rank correlation of its confidence with the variance of its scores."""

    judge: str
    item: str
    num_responses: int
    num_samples: int
    num_failed: int
    mean_variance: float
    rank: Interval

    @property
    def says(self) -> str:
        """What follows for the assumption, in a sentence."""
        who = f"{self.judge} on {self.item}"
        if np.isnan(self.rank.low):
            return f"{who}: cannot be told, since its confidence or its scores do not vary enough."
        if self.rank.below_zero:
            return f"{who}: the assumption of Lemma 8.1 holds: its confidence falls where its scores vary."
        if self.rank.above_zero:
            return f"{who}: the assumption of Lemma 8.1 is contradicted: its confidence rises where its scores vary."
        return f"{who}: the assumption of Lemma 8.1 is not shown: the interval holds 0."


async def judge_again(
    log: Log,
    given: Mapping[str, Judge],
    times: int,
    *,
    run: str | None = None,
    rubrics: Any = None,
    seed: int = 0,
) -> list[Repeated]:
    """Ask the judges of a run (the last one with judges' verdicts) again, ``times`` each, on a sample of its responses.

    The samples come after those that the verdict itself was made of, so that its confidence has not seen them. Every
    call goes to the log. Raises `ConfigError` for a judge that cannot be asked for another sample.
    """
    run = run or _last_run(log)
    names = {row["judge"] for row in stored_verdicts(log, run, {})}
    if unknown := sorted(set(given) - names):
        raise ConfigError(
            f"{given[unknown[0]].source}: no verdict of judge {unknown[0]!r} in run {run}; {known(names)}"
        )
    judges = {name: given.get(name) or load_judge(name) for name in sorted(given or names)}
    for judge in judges.values():
        _samples_differ(judge)
    usable = stored_verdicts(log, run, judges)  # ConfigError where they are another version's
    verdicts = [row for row in usable if row["score"] is not None and row["stated"] is not None]
    chosen = {
        (judge, item): _chosen([row for row in verdicts if (row["judge"], row["item"]) == (judge, item)], seed)
        for judge, item in sorted({(row["judge"], row["item"]) for row in verdicts})
        if judge in judges
    }
    rows = _rows(log, run, {row["response_id"] for some in chosen.values() for row in some})
    items = _items(log, run, rows, rubrics, judges)
    results = []
    for name, judge in judges.items():
        memory = Memory(log, run)

        def record(row: dict[str, Any]) -> None:
            log.append(judge_calls=[{**row, "run": run}])

        async with Critic(judge, secret=log.secret, record=record, memory=memory) as critic:
            await critic.reach()
            for (asked, item), some in chosen.items():
                if asked == name:
                    answers = await _asked_again(critic, rows, items, some, times)
                    results.append(_measured(name, item, some, answers, seed))
    return results


def _last_run(log: Log) -> str:
    found = log.query(
        "select run from runs where run in (select run from verdicts where kind = 'judge' and outcome = 'ok') "
        "order by started desc limit 1"
    )
    if not found:
        raise ConfigError(f"{log.path}: no run in it has a judge's verdicts")
    return str(found[0][0])


def _samples_differ(judge: Judge) -> None:
    if judge.client == "jury":
        raise ConfigError(f"{judge.source}: repeat: a jury has no samples of its own; repeat its judges")
    if judge.client != "replay" and not judge.sampling.temperature:
        raise ConfigError(
            f"{judge.source}: sampling.temperature: {judge.sampling.temperature}: repeat needs one above 0, "
            "or every sample is the same"
        )


def _chosen(verdicts: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """At most `MOST` of the verdicts, drawn at random."""
    drawn = np.random.default_rng(seed).permutation(len(verdicts))[:MOST]
    return [verdicts[place] for place in sorted(drawn.tolist())]


def _rows(log: Log, run: str, response_ids: set[str]) -> Rows:
    """The responses of a run with their questions, read back as they were given."""
    found = log.query(
        "select r.response_id, r.question_id, q.category, q.question, q.reference, q.tests, q.entry_point, "
        "q.metadata, q.items, r.response from responses r join questions q using (run, question_id) "
        "where run = ? and response_id in (select unnest(?::varchar[])) order by r.rowid",
        [run, sorted(response_ids)],
    )
    names = ("response_id", "question_id", "category", "question", "reference", "tests", "entry_point", "metadata",
             "items", "response")  # fmt: skip
    rows = []
    for values in found:
        row = dict(zip(names, values, strict=True))
        row["question"] = _chat(row["question"])
        row["metadata"], row["items"] = json.loads(row["metadata"] or "{}"), json.loads(row["items"] or "[]")
        row["metadata"].pop("instruction_id_list", None)  # its items stand among the question's own
        rows.append(row)
    return read_rows(rows)


def _chat(question: str) -> Any:
    """A chat's messages from their JSON; any other text as it is."""
    try:
        data = json.loads(question)
    except ValueError:
        return question
    chat = (
        isinstance(data, list)
        and data
        and all(isinstance(one, dict) and set(one) == {"role", "content"} for one in data)
    )
    return data if chat else question


def _items(log: Log, run: str, rows: Rows, rubrics: Any, judges: Mapping[str, Judge]) -> dict[tuple[str, str], Item]:
    """The items by question and id, from rubrics that are as they were in the run."""
    by_category = load_rubrics(rubrics, judges=None)
    ((text,),) = log.query("select rubrics from runs where run = ?", [run])
    used = json.loads(text or "{}")
    for category in {question.category for question in rows.questions.values()}:
        rubric = by_category.get(category)
        if rubric is not None and rubric.hash != used.get(category, {}).get("hash"):
            raise ConfigError(
                f"{rubric.source}: is not the rubric of category {category!r} that run {run} used (--rubrics)"
            )
    plans = plan_rows(rows, by_category)
    return {(id_, leaf.id): leaf for id_, plan in plans.items() for leaf in plan.leaves}


async def _asked_again(
    critic: Critic, rows: Rows, items: Mapping[tuple[str, str], Item], some: Sequence[Mapping[str, Any]], times: int
) -> list[list[Verdict]]:
    responses = {response.response_id: response for response in rows.responses}
    first = critic.judge.votes if critic.judge.confidence == "votes" else 1

    async def again(row: Mapping[str, Any]) -> list[Verdict]:
        response = responses[row["response_id"]]
        question = rows.questions[response.question_id]
        item = items[response.question_id, row["item"]]
        asked = (critic.sample(question, response, item, sample) for sample in range(first, first + times))
        return list(await asyncio.gather(*asked))

    answers = list(await asyncio.gather(*(again(row) for row in some)))
    if not any(verdict.score is not None for verdicts in answers for verdict in verdicts):
        last = first + times - 1
        raise ConfigError(
            f"{critic.judge.source}: repeat: no sample {first} to {last} could be had: {answers[0][0].detail}"
        )
    return answers


def _measured(
    judge: str, item: str, some: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[Verdict]], seed: int
) -> Repeated:
    scores = [[verdict.score for verdict in verdicts if verdict.score is not None] for verdicts in answers]
    used = [place for place, given in enumerate(scores) if len(given) > 1]
    variance = np.array([np.var(scores[place], ddof=1) for place in used], dtype=np.float64)
    stated = np.array([some[place]["stated"] for place in used], dtype=np.float64)
    cluster = [str(some[place]["question_id"]) for place in used]
    return Repeated(
        judge=judge,
        item=item,
        num_responses=len(used),
        num_samples=sum(len(scores[place]) for place in used),
        num_failed=sum(verdict.score is None for verdicts in answers for verdict in verdicts),
        mean_variance=float(variance.mean()) if used else np.nan,
        rank=interval(lambda weight: spearman(stated, variance, weight), cluster, seed=seed),
    )
