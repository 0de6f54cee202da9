"""The command line: each verb parses, calls the library function of the same name, and prints."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Coroutine
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from grape.errors import ConfigError, GrapeError, known

if TYPE_CHECKING:
    from grape.log.query import Format
    from grape.sandbox import Sandbox
    from grape.schemas import Kind

T = TypeVar("T")
FILE = click.Path(path_type=Path)


class _Verbs(click.Group):
    """Commands in the order in which a newcomer needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="grape-rl", prog_name="grape")
def cli() -> None:
    """Score responses against rubrics in YAML, train a policy on the scores, and ask the critique log in SQL."""


class _Told(logging.Handler):
    """Says what the library has to say on stderr as it is then: above a progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(self.format(record))


def _say(line: str) -> None:
    sys.stderr.write(f"grape: {line}\n")
    sys.stderr.flush()


def main() -> None:
    """Entry point: errors of the user are one line and exit status 1; wrong usage exits with 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[_Told()])
    warnings.showwarning = lambda message, *_rest, **_more: _say(f"warning: {message}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # whatever a text holds, whatever the locale
    try:
        cli.main(standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted; what was answered is kept: --resume goes on from there")
        os._exit(130)  # the log is closed by now; a checker that hangs in its thread is not waited for
    except click.ClickException as error:
        _say(error.format_message())
        sys.exit(1)
    except GrapeError as error:
        _say(str(error))
        sys.exit(1)
    except BrokenPipeError:
        os._exit(1)  # the reader is gone: so is whoever would read a complaint, or the rest
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _say(f"{place}{error.strerror or error}")
        os._exit(1)  # a full disk holds up the rest of stdout too


def _named(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """NAME=FILE pairs."""
    pairs = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not (name and equals and file):
            raise click.BadParameter(f"{value!r} is not NAME=FILE")
        pairs[name] = file
    return pairs


JUDGE = click.option("--judge", "judges", multiple=True, metavar="NAME=FILE", callback=_named,
                     help="The file of a judge that rubrics name; may be repeated.")  # fmt: skip
CHECKERS = click.option("--checkers", multiple=True, type=FILE, metavar="FILE",
                        help="A Python file of your own checkers (@grape.checker).")  # fmt: skip


PYTHON = click.option(
    "--python", metavar="PATH", help="The interpreter of programs, e.g. a venv's. Default: the system's."
)
SANDBOX = click.option("--sandbox", "service", metavar="URL", help="A sandbox service that runs programs instead.")
UNSAFE = click.option("--unsafe-code", is_flag=True, help="Run programs as this user, UNCONFINED but for limits.")


def _sandbox(python: str | None, service: str | None, unsafe_code: bool) -> Sandbox | None:
    """Where programs run; None for the default, which starts only when a program does."""
    if not (python or service or unsafe_code):
        return None
    if service and (python or unsafe_code):
        raise click.UsageError("--sandbox goes without --python and --unsafe-code: the service runs the programs")
    from grape.sandbox import Sandbox
    from grape.sandbox.confine import DEFAULT_INTERPRETER

    sandbox = Sandbox(interpreter=python or DEFAULT_INTERPRETER, unsafe=unsafe_code, url=service)
    click.get_current_context().call_on_close(sandbox.close)
    return sandbox


def _with_progress(work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine function that reports progress, with a bar on stderr (rate and time left) on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("scoring"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("scoring", total=None, rate="")

        def report(done: int, total: int) -> None:
            speed = progress.tasks[0].speed
            progress.update(task, completed=done, total=total, rate=f"{speed:.0f}/s" if speed else "")

        with redirect_stdout(sys.stderr):  # what a user's checker prints is no result
            return asyncio.run(work(report))


@cli.command()
@click.argument("folder", default=".", type=FILE)
def init(folder: Path) -> None:
    """Write a first rubric, judge and responses into FOLDER."""
    from grape.starter import init

    for path in init(folder):
        click.echo(f"wrote {path}")
    place = "" if str(folder) == "." else f"cd {folder} && "
    click.echo(f"next: {place}grape check rubrics && grape score responses.jsonl --rubrics rubrics --no-judges")


@cli.command()
@click.argument("rubrics", nargs=-1)
@JUDGE
@CHECKERS
@PYTHON
@SANDBOX
@UNSAFE
@click.option("--live", is_flag=True, help="Ask the judges too; otherwise only replay judges answer.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines instead of text.")
def check(
    rubrics: tuple[str, ...],
    judges: dict[str, str],
    checkers: tuple[Path, ...],
    python: str | None,
    service: str | None,
    unsafe_code: bool,
    live: bool,
    as_json: bool,
) -> None:
    """Validate RUBRICS (names, files or folders; all where none is given) and run their cases."""
    from grape.cases import check, failed_cases
    from grape.report import check_lines, show

    sandbox = _sandbox(python, service, unsafe_code)
    records = asyncio.run(check(rubrics, judges=judges, checkers=checkers, sandbox=sandbox, live=live))
    if as_json:
        for record in records:
            click.echo(json.dumps(record))
    else:
        show(*check_lines(records))
    if failed_cases(records):
        sys.exit(1)


@cli.command()
@click.argument("kind", type=click.Choice(["rubric", "judge", "run"]))
def schema(kind: Kind) -> None:
    """Print the JSON Schema of a KIND of file, for editors."""
    from grape.schemas import schema

    click.echo(json.dumps(schema(kind), indent=2))


@cli.command()
@click.argument("file", type=FILE)
@click.option("--from", "from_", metavar="FORMAT", required=True, help="What FILE is written in.")
@click.option("--to", metavar="FORMAT", required=True, help="What it becomes.")
@click.option("--out", type=FILE, metavar="FILE", required=True, help="Where it is written.")
@click.option(
    "--polarity", type=FILE, metavar="FILE", help="YAML that decides what FILE leaves open: title -> polarity."
)
@CHECKERS
def convert(file: Path, from_: str, to: str, out: Path, polarity: Path | None, checkers: tuple[Path, ...]) -> None:
    """Convert a rubric or a data set of rubrics between formats, without loss.

    Formats: grape, healthbench, rar, paperbench, prometheus, autorubric, rubric, verifiers, openai-evals, dr-tulu,
    rlcf, promptfoo, ifeval, constitution.
    """
    from grape.checkers import load_checkers
    from grape.formats import convert

    for path in checkers:
        load_checkers(path)
    done = convert(file, from_, to, out, polarity=polarity)
    what = f"{done.questions} questions with " if done.questions else ""
    click.echo(f"{out}: {what}{done.items} items")


@cli.command()
@click.argument("responses", type=FILE)
@click.option("--rubrics", type=FILE, metavar="DIR", help="A folder of rubrics, or one file. Default: the search path.")
@JUDGE
@click.option("--log", type=FILE, default=Path("critiques.duckdb"), show_default=True, help="The critique log.")
@click.option("--out", type=FILE, metavar="FILE", help="Write one JSON line per response.")
@CHECKERS
@PYTHON
@SANDBOX
@UNSAFE
@click.option("--no-judges", is_flag=True, help="Leave judge items out as not applicable.")
@click.option("--resume", is_flag=True, help="Go on with the last run of the same inputs; ask nothing twice.")
@click.option(
    "--rescore", is_flag=True, help="New weights, formulas, calibrations on stored verdicts: no judge is asked."
)
@click.option(
    "--controls", is_flag=True, help="Have a trivial response to each question judged too; say if any is rewarded."
)
@click.option("--json", "as_json", is_flag=True, help="JSON lines on stdout instead of a table.")
def score(
    responses: Path,
    rubrics: Path | None,
    judges: dict[str, str],
    log: Path,
    out: Path | None,
    checkers: tuple[Path, ...],
    python: str | None,
    service: str | None,
    unsafe_code: bool,
    no_judges: bool,
    resume: bool,
    rescore: bool,
    controls: bool,
    as_json: bool,
) -> None:
    """Judge RESPONSES (.jsonl, .jsonl.gz or .parquet) against the rubrics of their categories."""
    from grape.report import failure_lines, score_summary, score_table, show
    from grape.scoring import score

    sandbox = _sandbox(python, service, unsafe_code)
    records = _with_progress(
        lambda progress: score(
            responses, rubrics=rubrics, judges=judges, log=log, out=out, checkers=checkers,
            sandbox=sandbox,
            use_judges=not no_judges, resume=resume, rescore=rescore, controls=controls,
            progress=progress,
        )
    )  # fmt: skip
    if as_json:
        for record in records:
            click.echo(json.dumps(record))
        return
    show(score_table(records), "", score_summary(records), *failure_lines(records))
    show(f'log: {log}   ask it: grape sql "from item_health" --log {log}', stderr=True)
    if all(record["reward"] is None for record in records):
        _say("no response could be scored: the reasons stand above, and in the view failures")


@cli.command()
@click.argument("run", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--resume", is_flag=True, help="Go on after the last checkpoint in checkpoint.dir.")
@click.option("--allow-changes", is_flag=True, help="Resume although a rubric, prompt, judge or setting has changed.")
@PYTHON
@SANDBOX
@UNSAFE
@click.option("--json", "as_json", is_flag=True, help="A JSON line per step on stdout instead of a table at the end.")
def train(
    run: Path,
    overrides: tuple[str, ...],
    resume: bool,
    allow_changes: bool,
    python: str | None,
    service: str | None,
    unsafe_code: bool,
    as_json: bool,
) -> None:
    """Train a policy as RUN (a run.yaml) says; FIELD=VALUE overrides it, as in loss.clip_high=0.28."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall a busy machine
    _needs_torch()
    from grape.config import load_run
    from grape.progress import TrainingProgress, heldout_table, training_table
    from grape.report import show
    from grape.training import StepReport, train

    sandbox = _sandbox(python, service, unsafe_code)
    config = load_run(run, overrides)
    steps: dict[int, dict[str, float]] = {}
    with TrainingProgress() as bar, redirect_stdout(sys.stderr):

        def report(step: StepReport) -> None:
            bar.step(step.step, step.steps, step.metrics, step.seconds)
            steps[step.step] = step.metrics
            if as_json:
                print(
                    json.dumps({"step": step.step, "seconds": step.seconds, **step.metrics}),
                    file=sys.__stdout__,
                    flush=True,
                )

        done = asyncio.run(train(config, resume=resume, allow_changes=allow_changes, sandbox=sandbox, report=report))
    if not as_json and steps:
        show(training_table(steps))
    if not as_json and done.heldout:
        show("", heldout_table(done.heldout))
    if done.folder:
        show(f"policy: {done.folder}", stderr=True)
    show(f'log: {config.log}   ask it: grape sql "from training_curve" --log {config.log}', stderr=True)


def _needs_torch() -> None:
    """One line where the extra is not installed; and where it is, no chatter of its libraries."""
    from importlib.util import find_spec

    for package in ("torch", "transformers", "accelerate", "peft", "datasets"):
        if find_spec(package) is None:
            raise ConfigError(f"training needs the package {package}: pip install 'grape-rl[train]'")
    from transformers.utils import logging as told

    warnings.simplefilter("ignore", FutureWarning)  # what they say to each other

    told.disable_progress_bar()  # type: ignore[no-untyped-call]  # of reading weights: noise beside the run's own
    told.set_verbosity_error()  # type: ignore[no-untyped-call]


@cli.command()
@click.option("--log", type=FILE, default=Path("critiques.duckdb"), show_default=True, help="The critique log.")
@click.option("--gold", type=FILE, metavar="FILE", help="JSON lines of response_id, item, score.")
@click.option("--run", metavar="RUN", help="Verdicts of this run alone. Default: the last ones of any run.")
@JUDGE
@click.option("--by", default="category", show_default=True, metavar="FIELD", help="Report each value of FIELD apart.")
@click.option("--tolerance", type=float, default=0.5, show_default=True, help="How far from gold a score is wrong.")
@click.option("--plot", type=FILE, metavar="FILE", help="Draw the reliability plot: a PNG.")
@click.option("--repeat", type=int, default=0, metavar="K", help="Ask judges again, K times, on 100 responses.")
@click.option("--rubrics", type=FILE, metavar="DIR", help="The rubrics of that run, for --repeat.")
@click.option("--dry-run", is_flag=True, help="Write no calibration.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of folds, resamples and samples.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of a table.")
def calibrate(as_json: bool, **options: Any) -> None:
    """Hold judges to gold labels, and fit what their confidence is worth: <judge>.calibration.json."""
    from grape.calibrate import calibrate
    from grape.reliability import report_lines, report_record
    from grape.report import show

    report = asyncio.run(calibrate(**options))
    if as_json:
        click.echo(json.dumps(report_record(report)))
    else:
        show(*report_lines(report))


@cli.command()
@click.argument("query", required=False)
@click.option("--log", type=FILE, default=Path("critiques.duckdb"), show_default=True, help="The critique log.")
@click.option(
    "--format", "format_", type=click.Choice(["table", "csv", "json", "jsonl", "parquet"]), default="table",
    show_default=True, help="How the result is written to stdout.",
)  # fmt: skip
def sql(query: str | None, log: Path, format_: Format) -> None:
    """Ask the critique log a QUERY, read-only; alone, list its tables and views."""
    from grape.log.query import render, sql

    if query and Path(query).suffix in {".duckdb", ".db"}:
        raise click.UsageError(f"{query!r} is no query; to ask that log: grape sql --log {query} QUERY")
    render(sql(query, log), format_, sys.stdout)


@cli.command()
@click.argument("name", required=False)
@CHECKERS
def checkers(name: str | None, checkers: tuple[Path, ...]) -> None:
    """List the checkers with their arguments; what NAME does, in full."""
    from inspect import getdoc

    from grape.checkers import load_checkers, registry
    from grape.report import checker_table, show

    for path in checkers:
        load_checkers(path)
    if name is None:
        show(checker_table(registry()))
    elif name in registry():
        show(checker_table({name: registry()[name]}), "", getdoc(registry()[name].function) or "")
    else:
        raise ConfigError(f"no checker named {name!r}; {known(registry(), name)}")


@cli.command()
@click.option("--log", type=FILE, default=Path("quickstart.duckdb"), show_default=True, help="The critique log.")
def quickstart(log: Path) -> None:
    """Train a small policy on two tasks by its rubrics, in two to three minutes, and show what SQL can ask."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall a busy machine
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what is so small is slower on two cores
    _needs_torch()
    from grape.log.query import render, sql
    from grape.progress import TrainingProgress, curve, heldout_table
    from grape.report import show
    from grape.tour import CRITIQUES, QUESTIONS, quickstart
    from grape.training import StepReport

    with TrainingProgress("quickstart") as bar, redirect_stdout(sys.stderr):

        def report(step: StepReport) -> None:
            bar.step(step.step, step.steps, step.metrics, step.seconds)

        done = asyncio.run(quickstart(log, report=report))
    show(heldout_table(done.heldout), "")
    show(f"score in training  {bar.scores[0]:.3f} {curve(bar.scores, 50)} {bar.scores[-1]:.3f}", "")
    show("Three critiques", "")
    render(sql(CRITIQUES, log), "table", sys.stdout)
    for title, query in QUESTIONS.items():
        show("", title, f'  grape sql --log {log} "', *(f"  {line}" for line in f'{query}"'.splitlines()), "")
        render(sql(query, log), "table", sys.stdout)
    show("", f"log: {log}")
