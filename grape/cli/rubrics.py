"""Verbs about rubrics: init, check, schema, convert, checkers."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grape.cli.options import CHECKERS, FILE, JUDGE, PYTHON, SANDBOX, UNSAFE, make_sandbox
from grape.errors import ConfigError, known

if TYPE_CHECKING:
    from grape.schemas import Kind


@click.command()
@click.argument("folder", default=".", type=FILE)
def init(folder: Path) -> None:
    """Write a first rubric, judge and responses into FOLDER."""
    from grape.starter import init

    for path in init(folder):
        click.echo(f"wrote {path}")
    place = "" if str(folder) == "." else f"cd {folder} && "
    click.echo(f"next: {place}grape check rubrics && grape score responses.jsonl --rubrics rubrics --no-judges")


@click.command()
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

    sandbox = make_sandbox(python, service, unsafe_code)
    records = asyncio.run(check(rubrics, judges=judges, checkers=checkers, sandbox=sandbox, live=live))
    if as_json:
        for record in records:
            click.echo(json.dumps(record))
    else:
        show(*check_lines(records))
    if failed_cases(records):
        sys.exit(1)


@click.command()
@click.argument("kind", type=click.Choice(["rubric", "judge", "run", "sft", "reward-model", "dpo"]))
def schema(kind: Kind) -> None:
    """Print the JSON Schema of a KIND of file, for editors."""
    from grape.schemas import schema

    click.echo(json.dumps(schema(kind), indent=2))


@click.command()
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


@click.command()
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
