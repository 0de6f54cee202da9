"""`grape score`: responses x items -> verdicts -> rewards and advantages, in the log."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grape.batch import settle
from grape.checkers import load_checkers
from grape.controls import control_run, line, opening, settle_controls, with_controls
from grape.crew import Progress
from grape.errors import ConfigError, known
from grape.judge.config import Judge, load_judge
from grape.judge.critic import Critic
from grape.judge.jury import Jury
from grape.judge.memory import Memory
from grape.log import Log
from grape.panel import Panel
from grape.plan import Plan, plan_rows
from grape.records import (
    Record,
    reward_row,
    score_record,
    step_row,
    verdict_rows,
)
from grape.reward import Baseline, Scale, advantage
from grape.rows import read_rows
from grape.rubric import load_rubrics
from grape.run import Run, fingerprint, hold, stored_records

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
    checkers: str | Path | Sequence[str | Path] = (),
    sandbox: Sandbox | None = None,
    use_judges: bool = True,
    resume: bool = False,
    rescore: bool = False,
    controls: bool = False,
    baseline: Baseline = "group_mean",
    scale: Scale = "none",
    progress: Progress | None = None,
) -> list[Record]:
    """Judge responses against the rubrics of their categories; one record per response, in the order given.

    ``responses`` is a JSONL or Parquet file, or mappings (a `datasets.Dataset`, say). ``judges`` maps names used in
    rubrics to judge files. With ``log`` every verdict, judge call, reward and advantage is stored in that DuckDB file;
    what a judge has answered there in any run is not asked again. ``resume`` takes up the last run of the same inputs;
    ``rescore`` asks no judge at all: new weights, formulas and calibrations on stored verdicts. ``out`` gets the
    records as JSON lines. ``use_judges=False`` leaves items of judges and reward models out as not applicable.
    ``controls`` has a trivial response to each question judged beside the others (`grape.controls`), and says in one
    line what became of it. Programs run in ``sandbox`` (default: confined on this machine).

    A record holds `response_id, question_id, category, reward` (None if unscorable), `advantage` and `items`.
    Raises `ConfigError`, before any work, for a wrong file, row or judge.
    """
    for name, asked in (("resume", resume), ("rescore", rescore)):
        if asked and log is None:
            raise ConfigError(f"{name}: a log is needed to {name} from")
    advantage([0.0], [0], baseline=baseline, scale=scale)  # a wrong word is an error now, not after the judging
    if out is not None:
        check_out(out, [file for file in (responses, log) if isinstance(file, str | Path)])
    checkers = [checkers] if isinstance(checkers, str | Path) else checkers
    for file in checkers:
        load_checkers(file)
    rows = read_rows(responses)
    by_category = load_rubrics(rubrics, judges=(judges or ()) if use_judges else None)
    plans = plan_rows(rows, by_category, use_judges=use_judges)
    if not use_judges:
        _say_left_out(plans)
    loaded = load_judges(plans.values(), judges or {}) if use_judges else {}
    run = Run(
        inputs=fingerprint(rows, plans, loaded, checkers, f"{baseline} {scale} {use_judges}{' controls' * controls}"),
        rows=rows,
        rubrics={plan.rubric.category: plan.rubric for plan in plans.values()},
        judges=loaded,
        config={"baseline": baseline, "scale": scale, "use_judges": use_judges},
    )
    given = [*rows.responses, *(with_controls(rows) if controls else ())]
    work = [(plans[response.question_id], response) for response in given]
    async with AsyncExitStack() as stack:
        store = stack.enter_context(Log(log)) if log is not None else None
        run = run.resumed(store) if store and resume else run
        if store:
            stack.enter_context(hold(store, run.name))
            run = run.answered_so_far(store) if run.known else run
        if store and run.finished:
            records = stored_records(store, run)
            if out is not None:
                write_lines(out, records)
            return records
        panel = await stack.enter_async_context(
            Panel(make_critics(loaded, store, run.name, stored_only=rescore), sandbox)
        )
        panel.check(plans.values())
        await panel.reach()
        if store and not run.known:
            store.append(**run.opening())
        started = datetime.now(UTC)
        everything = await panel.judge_all(work, progress)
        batch, nulls = everything[: len(rows.responses)], everything[len(rows.responses) :]
        results = settle(batch, baseline=baseline, scale=scale)
        parts = {run.name: (batch, results)}
        if nulls:
            parts[control_run(run.name)] = (nulls, settle_controls(batch, nulls, baseline, scale))
            logger.warning("%s", line(batch, results, *parts[control_run(run.name)]))
        if store:
            now = datetime.now(UTC)
            pairs = [(name, pair) for name, part in parts.items() for pair in zip(*part, strict=True)]
            store.append(
                **(opening(run.opening(), rows, nulls) if nulls else {}),
                verdicts=(row for name, pair in pairs for row in verdict_rows(name, 0, *pair, loaded, now)),
                rewards=[reward_row(name, 0, *pair, baseline, scale, now) for name, pair in pairs],
                steps=[step_row(name, 0, *part, started) for name, part in parts.items()],
            )
    records = [score_record(judged, settled) for judged, settled in zip(batch, results, strict=True)]
    if out is not None:
        write_lines(out, records)
    return records


def _say_left_out(plans: Mapping[str, Plan]) -> None:
    """Say which items a run without judges leaves out."""
    left = {(plan.rubric.category, leaf.id) for plan in plans.values() for leaf in plan.leaves if leaf.asks_a_model}
    if left:
        names = ", ".join(f"{category}/{item}" for category, item in sorted(left)[:8])
        more = ", ..." if len(left) > 8 else ""
        logger.warning("no judges: left out as not applicable: %s%s", names, more)


def load_judges(
    plans: Collection[Plan], files: Mapping[str, str | Path | Judge], *, spare: bool = False,
    also: Collection[str] = (),
) -> dict[str, Judge]:  # fmt: skip
    """The judges that the plans ask, ``also`` those that somebody else does, and their fallbacks, by the names that
    rubrics use.

    One of the ``files`` that nobody asks is a `ConfigError`, unless there may be ``spare`` ones.
    """
    wanted = {item.judge: plan for plan in plans for item in plan.applicable if item.judge}
    loaded: dict[str, Judge] = {}
    queue = [(name, f"rubric {plan.rubric.rubric!r}") for name, plan in wanted.items()]
    queue += [(name, "the run") for name in also]
    while queue:
        name, asker = queue.pop()
        if name in loaded:
            continue
        given = files.get(name, name)
        loaded[name] = given if isinstance(given, Judge) else _load_judge(name, given, asker)
        queue += [(other, f"judge {name!r}") for other in asks(loaded[name])]
    asked = {leaf.judge for plan in plans for leaf in plan.leaves if leaf.judge} | set(loaded)
    if (unused := sorted(set(files) - asked)) and not spare:
        raise ConfigError(f"judge {unused[0]!r}: no item asks it; {known(asked, unused[0])}")
    for name in loaded:
        _no_circle(loaded, [name])
    return loaded


def asks(judge: Judge) -> list[str]:
    """The other judges that a judge asks."""
    return [*(judge.judges or []), *([judge.fallback] if judge.fallback else [])]


def _no_circle(loaded: Mapping[str, Judge], chain: list[str]) -> None:
    for following in asks(loaded[chain[-1]]):
        if following in chain:
            field = "fallback" if following == loaded[chain[-1]].fallback else "judges"
            raise ConfigError(f"judge {chain[0]!r}: {field}: {' -> '.join([*chain, following])} goes in a circle")
        _no_circle(loaded, [*chain, following])


def _load_judge(name: str, given: str | Path, asker: str) -> Judge:
    try:
        return load_judge(given)
    except ConfigError as error:
        if str(error).startswith("no judge named"):
            raise ConfigError(f"{asker}: {error} (give a file: --judge {name}=FILE)") from error
        raise


def make_critics(
    judges: Mapping[str, Judge], log: Log | None, run: str, *, stored_only: bool = False
) -> dict[str, Critic | Jury]:
    """A critic for each judge, its fallback's and its members' made before it, all recording their calls in the log."""
    secret = log.secret if log else os.urandom(32)
    memory = Memory(log, run, failures=stored_only) if log else None
    critics: dict[str, Critic | Jury] = {}

    def record(row: Record) -> None:
        if log:
            log.append(judge_calls=[{**row, "run": run}])

    def make(name: str) -> Critic | Jury:
        if name not in critics:
            judge = judges[name]
            fallback = make(judge.fallback) if judge.fallback else None
            if judge.judges:
                critics[name] = Jury(judge, [make(member) for member in judge.judges], fallback)
            else:
                critics[name] = Critic(
                    judge, secret=secret, record=record, memory=memory, stored_only=stored_only, fallback=fallback
                )
        return critics[name]

    for name in judges:
        make(name)
    return critics


def check_out(out: str | Path, others: Sequence[str | Path]) -> None:
    """Refuse, before any work, an output that cannot be written or that would replace what is read or logged."""
    path = Path(out)
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{out}: {'Is a directory' if path.is_dir() else 'No such file or directory'}")
    for other in others:
        if path.resolve() == Path(other).resolve():
            raise ConfigError(f"{out}: is read or logged to by this run; the output needs a file of its own")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{out}: Permission denied")


def write_lines(path: str | Path, records: Iterable[Record]) -> None:
    """JSON lines, whole or not at all: written beside the file and moved onto it. A pipe or a device is written to."""
    path = Path(path).resolve()
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
    finally:
        if plain:
            target.unlink(missing_ok=True)
