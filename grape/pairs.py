"""`grape pairs`: of each group the best response against the worst, by a reward or an item, or as a judge prefers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grape.crew import Progress, all_done
from grape.errors import ConfigError
from grape.extremes import BY, Pair, best_and_worst, read_groups
from grape.item import Item
from grape.judge.pair import compare
from grape.log import Log
from grape.output import ASKED, NUMBER, TEXT, TRUTH, check_target, write_rows
from grape.panel import Panel
from grape.plan import Plan
from grape.records import Record
from grape.rubric import Rubric, parse_rubric
from grape.scoring import load_judges, make_critics
from grape.stored import Reader, open_log, questions_of, reading, run_of
from grape.types import Message, Question, Response

NEVER = ("controls", "heldout")  # kinds of runs whose responses nobody learns from
COLUMNS = {
    "question_id": TEXT, "category": TEXT, "question": ASKED, "chosen": TEXT, "rejected": TEXT, "chosen_id": TEXT,
    "rejected_id": TEXT, "margin": NUMBER,
}  # fmt: skip
STORED = (
    "step", "question_id", "chosen_id", "rejected_id", "source", "item", "judge", "margin", "probability", "consistent",
    "calls",
)  # fmt: skip
JUDGED = {"probability": NUMBER, "consistent": TRUTH}


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `grape pairs` found: a row per pair, and of how many ``groups`` why there is none.

    ``ties`` have one score throughout, ``narrow`` ones a spread below the margin, ``unscorable`` ones fewer than two
    responses with a score. Of the comparisons ``failed`` gave no label, ``undecided`` one of exactly 0.5, and
    ``inconsistent`` ones preferred another response in the other order (and make a pair all the same, where one order
    was surer). ``stored`` counts the pairs that the log did not have yet.
    """

    run: str
    rows: Sequence[Record]
    groups: int
    ties: int
    narrow: int
    unscorable: int
    failed: int = 0
    undecided: int = 0
    inconsistent: int = 0
    stored: int = 0


async def pairs(
    log: str | Path,
    *,
    out: str | Path | None = None,
    run: str | None = None,
    by: str = "weighted",
    margin: float = 0.0,
    judges: Mapping[str, str | Path] | None = None,
    criterion: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """One preference per group of a run (the last one with rewards): its best response against its worst.

    ``by`` is a column of the table `rewards` or an item, whose score counts after polarity. Groups whose spread is
    below ``margin`` give none. With a judge and a ``criterion`` (its text, or the id of an item of the run) each pair
    is compared by the first of the ``judges`` in both orders, and the chosen response is the one that it prefers; the
    other files are those of judges that it asks itself. All pairs go to the log's table `preferences`, once, and to
    ``out``, a .jsonl or .parquet file.
    """
    _check(log, out, margin, judges or {}, criterion)
    with open_log(log) as store:
        with reading(store, log) as now:
            run = _run(now, run, by)
            groups = read_groups(now, run, by)
            found, counts = best_and_worst(groups, margin)
            texts = questions_of(now, run, {pair.question_id for pair in found})
            if missing := [pair.question_id for pair in found if pair.question_id not in texts]:
                raise ConfigError(f"{log}: run {run} has no question {missing[0]!r}")
            known = _newest(now, run)
            rubric = _rubric(now, run, next(iter(judges)), criterion or "") if judges else None
        if judges and rubric:
            found, more = await _judged(store, run, found, texts, judges, rubric, progress)
            counts |= more
        rows = [_row(pair, texts[pair.question_id]["question"]) for pair in found]
        if out is not None:
            write_rows(out, rows, {**COLUMNS, **(JUDGED if judges else {})})
        counts["stored"] = _store(store, run, found, None if by in BY else by, known)
    return Report(run=run, rows=rows, groups=len(groups), **counts)


def _check(
    log: str | Path, out: str | Path | None, margin: float, judges: Mapping[str, str | Path], criterion: str | None
) -> None:
    """What is wrong with the arguments, before any work."""
    if not (math.isfinite(margin) and margin >= 0):
        raise ConfigError(f"--margin: {margin:g} is not 0 or more")
    if judges and not (criterion or "").strip():
        raise ConfigError("--judge: needs --criterion: what the responses are to be compared by")
    if criterion is not None and not judges:
        raise ConfigError("--criterion: needs --judge NAME=FILE, who compares by it")
    if out is not None:
        check_target(out, log, replace=True)


def _run(log: Reader, run: str | None, by: str) -> str:
    """The run, which has to be one that somebody may learn from."""
    found = run_of(log, run, "rewards" if by in BY else "verdicts", "rewards" if by in BY else "verdicts")
    if found.kind in NEVER:
        raise ConfigError(f"{log.path}: run {run} is one of {found.kind}: nobody learns from its responses")
    return found.name


def _rubric(log: Reader, run: str, judge: str, criterion: str) -> Rubric:
    """The one item that the judge compares by: of the run, by its id or its text, or else named after the text."""
    rows = log.query("select distinct item, criterion, polarity from verdicts where run = ? and criterion <> ''", [run])
    text = {item: own for item, own, _ in rows}.get(criterion, criterion)
    name, polarity = next(((item, way) for item, own, way in sorted(rows) if own == text), (None, "desirable"))
    name = name or f"criterion-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    data = {"rubric": "pairs", "items": [{"id": name, "criterion": text, "judge": judge, "polarity": polarity}]}
    return parse_rubric(data, "--criterion", judges=[judge])


async def _judged(
    log: Log,
    run: str,
    found: Sequence[Pair],
    texts: Mapping[str, Any],
    files: Mapping[str, str | Path],
    rubric: Rubric,
    progress: Progress | None,
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs as a judge sees them, in both orders, and how many it could not tell."""
    (item,) = rubric.items
    assert item.judge is not None, "an item for a judge"
    nobody = Question(question_id="", category="pairs", text="")
    plan = Plan(question=nobody, rubric=rubric, leaves=(item,), weight={item.id: 1.0}, fields_read=frozenset())
    async with AsyncExitStack() as stack:
        critics = make_critics(load_judges([plan], files), log, run)
        panel = await stack.enter_async_context(Panel(critics))
        panel.check([plan])
        await panel.reach()
        asked = [_asked(pair, texts[pair.question_id]["question"], item) for pair in found]
        judge = critics[item.judge]
        done = await all_done(
            asked, lambda one: compare(judge, *one), judge.width, stop=panel.refused, progress=progress
        )
        panel.see_budgets()
        comparisons = [one for one in done if one is not None]
    counts = {"failed": 0, "undecided": 0, "inconsistent": 0}
    kept = []
    for pair, comparison in zip(found, comparisons, strict=True):
        likely = comparison.probability
        counts["inconsistent"] += comparison.consistent is False
        if likely is None or likely == 0.5:
            counts["failed" if likely is None else "undecided"] += 1
        elif likely > 0.5:
            kept.append(replace(pair, comparison=comparison))
        else:
            turned = replace(comparison, probability=1 - likely)
            kept.append(replace(pair, chosen=pair.rejected, rejected=pair.chosen, comparison=turned))
    return kept, counts


def _asked(pair: Pair, text: Any, item: Item) -> tuple[Question, Response, Response, Item]:
    """What a judge is asked about a pair."""
    text = text if isinstance(text, str) else tuple(text)
    question = Question(question_id=pair.question_id, category=pair.category, text=text)
    first, second = (
        Response(response_id=one.response_id, question_id=pair.question_id, text=one.text)
        for one in (pair.chosen, pair.rejected)
    )
    return question, first, second, item


def _row(pair: Pair, question: str | list[Message]) -> Record:
    """One line of the file."""
    row: Record = {
        "question_id": pair.question_id, "category": pair.category, "question": question, "chosen": pair.chosen.text,
        "rejected": pair.rejected.text, "chosen_id": pair.chosen.response_id, "rejected_id": pair.rejected.response_id,
        "margin": pair.margin,
    }  # fmt: skip
    if pair.comparison is None:
        return row
    return {**row, "probability": pair.comparison.probability, "consistent": pair.comparison.consistent}


def _newest(log: Reader, run: str) -> dict[tuple[object, ...], tuple[object, ...]]:
    """The preferences that a run has already, the newest of those about the same."""
    rows = log.query(f"select {', '.join(STORED)} from preferences where run = ? order by rowid", [run])
    return {_of_what(dict(zip(STORED, values, strict=True))): values for values in rows}


def _store(
    log: Log,
    run: str,
    found: Sequence[Pair],
    by: str | None,
    newest: Mapping[tuple[object, ...], tuple[object, ...]],
) -> int:
    """Add the pairs to the table `preferences`, but for those that it has as its newest ones; how many were added."""
    now, new = datetime.now(UTC), []
    for pair in found:
        row = _preference(pair, by)
        if newest.get(_of_what(row)) != tuple(row[name] for name in STORED):
            new.append({**row, "run": run, "category": pair.category, "created": now})
    log.append(preferences=new)
    return len(new)


def _of_what(row: Mapping[str, Any]) -> tuple[object, ...]:
    """What a preference is about, whichever way it goes: of two that are equal in this the newer one stands."""
    two = frozenset((row["chosen_id"], row["rejected_id"]))
    return (row["step"], row["question_id"], two, row["source"], row["item"], row["judge"])


def _preference(pair: Pair, by: str | None) -> Record:
    """What the log says of a pair."""
    row: Record = {
        "step": pair.step, "question_id": pair.question_id, "chosen_id": pair.chosen.response_id,
        "rejected_id": pair.rejected.response_id, "source": "rubric", "item": by, "judge": None, "margin": pair.margin,
        "probability": None, "consistent": None, "calls": None,
    }  # fmt: skip
    if (compared := pair.comparison) is None:
        return row
    both = (compared.forward, compared.backward)
    calls = json.dumps(list(dict.fromkeys(call for verdict in both for call in verdict.calls)))
    judged = {"source": "judge", "item": compared.item, "judge": compared.forward.judge, "calls": calls}
    return {**row, **judged, "probability": compared.probability, "consistent": compared.consistent}
