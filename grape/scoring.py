"""`grape score`: responses x items -> verdicts -> rewards and advantages, in the log."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from grape.batch import settle
from grape.checkers import load_checkers
from grape.errors import ConfigError, known
from grape.judge.call import CallRecord
from grape.judge.config import Judge, load_judge
from grape.judge.critic import Critic
from grape.log import Log
from grape.panel import Panel, Progress
from grape.plan import Plan, plan_rows
from grape.records import Record, dump, question_rows, response_rows, reward_row, score_record, step_row, verdict_rows
from grape.resources import digest, read_text
from grape.reward import Baseline, Scale
from grape.rows import Rows, read_rows
from grape.rubric import Rubric, load_rubrics

if TYPE_CHECKING:
    from grape.sandbox import Sandbox

logger = logging.getLogger("grape")


async def score(
    responses: str | Path | Iterable[Mapping[str, Any]],
    *,
    rubrics: str | Path | None = None,
    judges: Mapping[str, str | Path | Judge] | None = None,
    log: str | Path | None = None,
    out: str | Path | None = None,
    checkers: Sequence[str | Path] = (),
    sandbox: Sandbox | None = None,
    use_judges: bool = True,
    resume: bool = False,
    baseline: Baseline = "group_mean",
    scale: Scale = "none",
    progress: Progress | None = None,
) -> list[Record]:
    """Judge responses against the rubrics of their categories; one record per response, in the order given.

    ``responses`` is a JSONL or Parquet file, or mappings (a `datasets.Dataset`, say). ``judges`` maps names used in
    rubrics to judge files. With ``log`` every verdict, judge call, reward and advantage is stored in that DuckDB file;
    ``resume`` takes up the last run of the same inputs in it, and asks nothing again that was answered. ``out`` gets
    the records as JSON lines. ``use_judges=False`` leaves judge items out as not applicable. Programs run in
    ``sandbox`` (default: confined on this machine).

    A record holds `response_id, question_id, category, reward` (None if unscorable), `advantage` and `items`.
    Raises `ConfigError`, before any work, for a wrong file, row or judge.
    """
    if resume and log is None:
        raise ConfigError("resume: a log is needed to resume from")
    if out is not None and not Path(out).parent.is_dir():
        raise ConfigError(f"{out}: No such file or directory")
    for file in checkers:
        load_checkers(file)
    rows = read_rows(responses)
    by_category = load_rubrics(rubrics, judges=judges or ())
    plans = plan_rows(rows, by_category, use_judges=use_judges)
    if not use_judges:
        _say_left_out(plans)
    loaded = load_judges(plans.values(), judges or {}) if use_judges else {}
    run = _Run(
        inputs=fingerprint(rows, plans, loaded, checkers, f"{baseline} {scale} {use_judges}"),
        rows=rows,
        rubrics={plan.rubric.category: plan.rubric for plan in plans.values()},
        judges=loaded,
        config={"baseline": baseline, "scale": scale, "use_judges": use_judges},
    )
    work = [(plans[response.question_id], response) for response in rows.responses]
    async with AsyncExitStack() as stack:
        store = stack.enter_context(Log(log)) if log is not None else None
        run = run.resumed(store) if store and resume else run
        panel = await stack.enter_async_context(Panel(make_critics(loaded, store, run.name, run.answered), sandbox))
        panel.check(plans.values())
        await panel.reach()
        if store and not run.known:
            store.append(**run.opening())
        started = datetime.now(UTC)
        batch = await panel.judge_all(work, progress)
        results = settle(batch, baseline=baseline, scale=scale)
        if store and not run.finished:
            now = datetime.now(UTC)
            pairs = list(zip(batch, results, strict=True))
            store.append(
                verdicts=[row for pair in pairs for row in verdict_rows(run.name, 0, *pair, loaded, now)],
                rewards=[reward_row(run.name, 0, *pair, baseline, scale, now) for pair in pairs],
                steps=[step_row(run.name, 0, batch, results, started)],
            )
    records = [score_record(judged, settled) for judged, settled in zip(batch, results, strict=True)]
    if out is not None:
        write_lines(out, records)
    return records


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A run of `grape score`: its name in the log, and what the log has of it already."""

    inputs: str
    rows: Rows
    rubrics: Mapping[str, Rubric]
    judges: Mapping[str, Judge]
    config: Mapping[str, Any]
    name: str = ""
    known: bool = False
    finished: bool = False
    answered: Mapping[str, CallRecord] | None = None

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid4().hex[:6]}")

    def resumed(self, log: Log) -> _Run:
        """The last run of the same inputs, with the replies it had got; or this new one, if the log has none."""
        found = log.query(
            "select run, run in (select run from steps) from runs where kind = 'score' and inputs = ? "
            "order by started desc limit 1",
            [self.inputs],
        )
        if not found:
            logger.warning("nothing to resume: no run of these inputs in the log; a new run begins")
            return self
        ((name, finished),) = found
        return replace(self, name=name, known=True, finished=finished, answered=answered_calls(log, name))

    def opening(self) -> dict[str, list[Record]]:
        """The rows that a run begins with."""
        rubrics = {c: {"rubric": r.rubric, "version": r.version, "hash": r.hash} for c, r in self.rubrics.items()}
        judges = {name: {"model": judge.model, "hash": judge.hash} for name, judge in self.judges.items()}
        run = {
            "run": self.name,
            "kind": "score",
            "started": datetime.now(UTC),
            "version": version("grape-rl"),
            "inputs": self.inputs,
            "config": json.dumps({**self.config, "source": self.rows.source}),
            "rubrics": json.dumps(rubrics),
            "judges": json.dumps(judges),
        }
        questions, responses = question_rows(self.name, self.rows), response_rows(self.name, 0, self.rows)
        return {"runs": [run], "questions": questions, "responses": responses}


def _say_left_out(plans: Mapping[str, Plan]) -> None:
    """Say which judge items a run without judges leaves out."""
    left = {(plan.rubric.category, leaf.id) for plan in plans.values() for leaf in plan.leaves if leaf.judge}
    if left:
        names = ", ".join(f"{category}/{item}" for category, item in sorted(left)[:8])
        more = ", ..." if len(left) > 8 else ""
        logger.warning("no judges: left out as not applicable: %s%s", names, more)


def load_judges(plans: Iterable[Plan], files: Mapping[str, str | Path | Judge]) -> dict[str, Judge]:
    """The judges that the plans ask, and their fallbacks, by the names that rubrics use."""
    wanted = {item.judge: plan for plan in plans for item in plan.applicable if item.judge}
    loaded: dict[str, Judge] = {}
    queue = [(name, f"rubric {plan.rubric.rubric!r}") for name, plan in wanted.items()]
    while queue:
        name, asker = queue.pop()
        if name in loaded:
            continue
        given = files.get(name, name)
        loaded[name] = given if isinstance(given, Judge) else _load_judge(name, given, asker, files)
        if (fallback := loaded[name].fallback) is not None:
            queue.append((fallback, f"judge {name!r}"))
    for name in loaded:
        chain = [name]
        while (following := loaded[chain[-1]].fallback) is not None:
            if following in chain:
                raise ConfigError(f"judge {name!r}: fallback: {' -> '.join([*chain, following])} goes in a circle")
            chain.append(following)
    return loaded


def _load_judge(name: str, given: str | Path, asker: str, files: Mapping[str, Any]) -> Judge:
    try:
        return load_judge(given)
    except ConfigError as error:
        if str(error).startswith("no judge named"):
            raise ConfigError(f"{asker}: {error}; given: {known(files)}") from error
        raise


def make_critics(
    judges: Mapping[str, Judge], log: Log | None, run: str, answered: Mapping[str, CallRecord] | None
) -> dict[str, Critic]:
    """A critic for each judge, its fallback's made before it, all recording their calls in the log."""
    secret = log.secret if log else os.urandom(32)
    critics: dict[str, Critic] = {}

    def record(row: Record) -> None:
        if log:
            log.append(judge_calls=[{**row, "run": run}])

    def make(name: str) -> Critic:
        if name not in critics:
            fallback = judges[name].fallback
            critics[name] = Critic(
                judges[name],
                secret=secret,
                record=record,
                answered=answered or {},
                fallback=make(fallback) if fallback else None,
            )
        return critics[name]

    for name in judges:
        make(name)
    return critics


def answered_calls(log: Log, run: str) -> dict[str, CallRecord]:
    """The replies that a run has got so far, by call key."""
    columns = ["call", *(field.name for field in fields(CallRecord))]
    rows = log.query(f"select {', '.join(columns)} from judge_calls where run = ?", [run])
    return {row[0]: CallRecord.from_row(dict(zip(columns, row, strict=True))) for row in rows}


def fingerprint(
    rows: Rows, plans: Mapping[str, Plan], judges: Mapping[str, Judge], checkers: Sequence[str | Path], options: str
) -> str:
    """A hash of everything that decides the result: rows, rubrics, judges, the user's checkers and the options."""
    total = hashlib.sha256(options.encode())
    for question in rows.questions.values():
        own = [dump(item) for item in rows.items[question.question_id]]
        fields = [question.question_id, question.category, question.text, question.reference, question.tests]
        data = [*fields, question.entry_point, question.metadata, own]
        total.update(json.dumps(data, sort_keys=True, default=str).encode())
    for response in rows.responses:
        total.update(
            json.dumps(
                [response.response_id, response.question_id, response.text, response.metadata], default=str
            ).encode()
        )
    parts = [
        *{plan.rubric.hash for plan in plans.values()},
        *(f"{name} {judge.hash}" for name, judge in judges.items()),
    ]
    parts += [digest(read_text(file)) for file in checkers]
    total.update(json.dumps(sorted(parts)).encode())
    return total.hexdigest()


def write_lines(path: str | Path, records: Iterable[Record]) -> None:
    """JSON lines, whole or not at all: written beside the file and moved onto it. A pipe or a device is written to."""
    path = Path(path)
    plain = path.is_file() or not path.exists()
    target = path.with_name(f".{path.name}.{os.getpid()}") if plain else path
    try:
        with target.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=True) + "\n")
        if plain:
            target.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
