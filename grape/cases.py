"""`grape check`: rubrics validated, and the unit tests that they carry run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from grape.checkers import load_checkers
from grape.errors import ConfigError
from grape.item import flatten
from grape.judge.config import Judge
from grape.panel import Panel
from grape.plan import Plan, plan_rows
from grape.records import Record
from grape.resources import names
from grape.rows import Rows
from grape.rubric import Case, Rubric, bounds, load_rubric
from grape.scoring import load_judges, make_critics
from grape.types import Outcome, Question, Response, Verdict

if TYPE_CHECKING:
    from grape.sandbox import Sandbox


async def check(
    rubrics: Sequence[str | Path] = (),
    *,
    judges: Mapping[str, str | Path | Judge] | None = None,
    checkers: Sequence[str | Path] = (),
    sandbox: Sandbox | None = None,
    live: bool = False,
) -> list[Record]:
    """Load rubrics (names, files or folders; all that are found where none is named) and run their cases.

    One record per rubric, with ``cases``: one record per expectation, ``passed`` True, False, or None where it was not
    run: a model's verdict is asked for only if ``live``, or if the judge replays stored replies.
    """
    for file in checkers:
        load_checkers(file)
    given = judges or {}
    loaded = [load_rubric(name, judges=given) for name in _expand(rubrics)]
    return [
        {
            "rubric": rubric.rubric,
            "source": rubric.source,
            "category": rubric.category,
            "items": len(flatten(rubric.items)),
            "cases": await _run_cases(rubric, given, sandbox, live),
        }
        for rubric in loaded
    ]


def _expand(rubrics: Sequence[str | Path]) -> list[str | Path]:
    if not rubrics:
        return list(names("rubrics"))
    found: list[str | Path] = []
    for rubric in rubrics:
        inside = sorted(Path(rubric).rglob("*.yaml")) if Path(rubric).is_dir() else [rubric]
        if not inside:
            raise ConfigError(f"{rubric}: no rubrics (*.yaml) in it")
        found += inside
    return found


async def _run_cases(
    rubric: Rubric, judges: Mapping[str, str | Path | Judge], sandbox: Sandbox | None, live: bool
) -> list[Record]:
    if not rubric.cases:
        return []
    plans = plan_rows(_rows(rubric), {rubric.category: rubric})
    asked = load_judges(_expected_of_judges(rubric, plans), judges) if live or judges else {}
    asked = {name: judge for name, judge in asked.items() if live or judge.client == "replay"}
    results = []
    async with Panel(make_critics(asked, None, "check"), sandbox) as panel:
        await panel.reach()
        for number, case in enumerate(rubric.cases):
            plan = plans[f"cases.{number}"]
            response = Response(response_id=f"cases.{number}", question_id=f"cases.{number}", text=case.response)
            for item in plan.leaves:
                if item.id not in case.expect:
                    continue
                verdict: Verdict | None = Verdict(item=item.id, outcome=Outcome.NOT_APPLICABLE)
                if plan.weight[item.id] > 0:
                    can = item.judge in asked if item.judge else item.check is not None or live
                    verdict = await panel.ask(plan.question, response, item) if can else None
                results.append(_result(number, item.id, case.expect[item.id], verdict))
    return results


def _expected_of_judges(rubric: Rubric, plans: Mapping[str, Plan]) -> list[Plan]:
    """The plans of the cases that expect something of a judge."""
    judged = {item.id for plan in plans.values() for item in plan.leaves if item.judge}
    return [plans[f"cases.{n}"] for n, case in enumerate(rubric.cases) if judged & set(case.expect)]


def _rows(rubric: Rubric) -> Rows:
    rows = Rows(source=rubric.source)
    for number, case in enumerate(rubric.cases):
        key = f"cases.{number}"
        rows.questions[key] = _question(key, rubric.category, case)
        rows.items[key] = list(case.items)
        rows.places[key] = f"{rubric.source}: {key}"
    return rows


def _question(key: str, category: str, case: Case) -> Question:
    return Question(
        question_id=key,
        category=category,
        text=case.question if isinstance(case.question, str) else tuple(turn.model_dump() for turn in case.question),
        reference=case.reference,
        tests=case.tests,
        entry_point=case.entry_point,
        metadata=case.metadata,
    )


def _result(number: int, item: str, expected: float | str, verdict: Verdict | None) -> Record:
    passed: bool | None = None
    if verdict is not None:
        want = bounds(expected)
        if isinstance(want, Outcome):
            passed = verdict.outcome is want
        else:
            passed = verdict.score is not None and want[0] - 1e-9 <= verdict.score <= want[1] + 1e-9
    return {
        "case": number,
        "item": item,
        "expected": expected,
        "passed": passed,
        "score": verdict.score if verdict else None,
        "outcome": str(verdict.outcome) if verdict else None,
        "reasoning": (verdict.reasoning or verdict.detail) if verdict else None,
    }


def failed_cases(records: Sequence[Record]) -> list[Record]:
    """The expectations that did not hold."""
    return [case for case in chain.from_iterable(record["cases"] for record in records) if case["passed"] is False]
