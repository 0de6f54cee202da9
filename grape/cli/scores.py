"""Verbs about scores: score, calibrate, sql."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grape.cli.options import CHECKERS, FILE, JUDGE, LOG, PYTHON, SANDBOX, UNSAFE, make_sandbox, say, with_progress

if TYPE_CHECKING:
    from grape.log.query import Format


@click.command()
@click.argument("responses", type=FILE)
@click.option("--rubrics", type=FILE, metavar="DIR", help="A folder of rubrics, or one file. Default: the search path.")
@JUDGE
@LOG
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

    sandbox = make_sandbox(python, service, unsafe_code)
    records = with_progress(
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
        say("no response could be scored: the reasons stand above, and in the view failures")


@click.command()
@LOG
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


@click.command()
@click.argument("query", required=False)
@LOG
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
