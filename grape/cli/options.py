"""What verbs have in common: options, where programs run, progress, what training needs."""

from __future__ import annotations

import asyncio
import sys
import warnings
from collections.abc import Callable, Coroutine
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from grape.errors import ConfigError

if TYPE_CHECKING:
    from grape.sandbox import Sandbox

T = TypeVar("T")
FILE = click.Path(path_type=Path)
LOG = click.option("--log", type=FILE, default=Path("critiques.duckdb"), show_default=True, help="The critique log.")


def say(line: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"grape: {line}\n")
    sys.stderr.flush()


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


def make_sandbox(python: str | None, service: str | None, unsafe_code: bool) -> Sandbox | None:
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


def with_progress(work: Callable[[Any], Coroutine[Any, Any, T]], what: str = "scoring") -> T:
    """Run a coroutine function that reports progress, with a bar on stderr (rate and time left) on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what, total=None, rate="")

        def report(done: int, total: int) -> None:
            speed = progress.tasks[0].speed
            progress.update(task, completed=done, total=total, rate=f"{speed:.0f}/s" if speed else "")

        with redirect_stdout(sys.stderr):  # what a user's checker prints is no result
            return asyncio.run(work(report))


def needs_torch() -> None:
    """One line where the extra is not installed; and where it is, no chatter of its libraries."""
    from importlib.util import find_spec

    for package in ("torch", "transformers", "accelerate", "peft", "datasets"):
        if find_spec(package) is None:
            raise ConfigError(f"training needs the package {package}: pip install 'grape-rl[train]'")
    from transformers.utils import logging as told

    warnings.simplefilter("ignore", FutureWarning)  # what they say to each other

    told.disable_progress_bar()  # type: ignore[no-untyped-call]  # of reading weights: noise beside the run's own
    told.set_verbosity_error()  # type: ignore[no-untyped-call]
