"""The command line: each verb parses, calls the library function of the same name, and prints."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings

import click

from grape.cli import constitution, data, rubrics, scores, training, tuning
from grape.cli.options import say
from grape.errors import GrapeError

VERBS = (
    rubrics.init,
    rubrics.check,
    rubrics.schema,
    rubrics.convert,
    scores.score,
    training.train,
    training.report,
    tuning.sft,
    tuning.reward_model,
    tuning.dpo,
    tuning.best_of,
    constitution.constitution,
    scores.calibrate,
    scores.sql,
    data.pairs,
    data.label,
    data.export,
    rubrics.checkers,
    training.quickstart,
)


class _Verbs(click.Group):
    """Commands in the order in which a newcomer needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="grape-rl", prog_name="grape")
def cli() -> None:
    """Score responses against rubrics in YAML, train a policy on the scores, and ask the critique log in SQL."""


for verb in VERBS:
    cli.add_command(verb)


class _Told(logging.Handler):
    """Says what the library has to say on stderr as it is then: above a progress bar, where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def main() -> None:
    """Entry point: errors of the user are one line and exit status 1; wrong usage exits with 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[_Told()])
    warnings.showwarning = lambda message, *_rest, **_more: say(f"warning: {message}")
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
        say("interrupted; what was answered is kept: --resume goes on from there")
        os._exit(130)  # the log is closed by now; a checker that hangs in its thread is not waited for
    except click.ClickException as error:
        say(error.format_message())
        sys.exit(1)
    except GrapeError as error:
        say(str(error))
        sys.exit(1)
    except BrokenPipeError:
        os._exit(1)  # the reader is gone: so is whoever would read a complaint, or the rest
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        say(f"{place}{error.strerror or error}")
        os._exit(1)  # a full disk holds up the rest of stdout too
