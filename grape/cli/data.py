"""Verbs that make data of the log, and put people's labels into it: pairs, label, export."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from grape.cli.options import FILE, JUDGE, LOG, say, with_progress

RUN = click.option("--run", metavar="RUN", help="A run of the log. Default: the last one that has what is needed.")
ITEM = click.option("--item", metavar="ID", help="Verdicts on this item alone.")
BY_JUDGE = click.option("--judge", metavar="NAME", help="Verdicts of this judge alone.")


@click.command()
@LOG
@RUN
@click.option("--out", type=FILE, metavar="FILE", required=True, help="Where the pairs go: .jsonl or .parquet.")
@click.option("--by", default="weighted", show_default=True, metavar="reward|weighted|normalized|ITEM",
              help="What is better: a column of the table rewards, or an item's score after polarity.")  # fmt: skip
@click.option("--margin", type=float, default=0.0, show_default=True, help="Groups of a smaller spread give no pair.")
@JUDGE
@click.option("--criterion", metavar="TEXT", help="What the judge compares each pair by, or the id of such an item.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text.")
def pairs(log: Path, as_json: bool, **options: Any) -> None:
    """Make preferences of a run: of each group the best response against the worst.

    With --judge and --criterion the judge compares the two in both orders, and says which is chosen.
    """
    from grape.pairs import pairs

    report = with_progress(lambda progress: pairs(log, progress=progress, **options), "comparing")
    counts = {name: value for name, value in asdict(report).items() if name != "rows"} | {"pairs": len(report.rows)}
    if as_json:
        click.echo(json.dumps(counts))
    else:
        none = f"{report.ties} ties, {report.narrow} below the margin, {report.unscorable} with fewer than two scores"
        click.echo(f"{len(report.rows)} pairs of {report.groups} groups; {none}")
        if options["judges"]:
            click.echo(
                f"{report.failed} comparisons failed, {report.undecided} were undecided, "
                f"{report.inconsistent} preferred another response in the other order"
            )
    say(f"run {report.run}: {report.stored} pairs are new in {log}; {options['out']} has {len(report.rows)}")


@click.command()
@LOG
@RUN
@ITEM
@BY_JUDGE
@click.option("--labeler", metavar="NAME", help="Who labels. Default: the login name.")
@click.option("--limit", type=int, metavar="N", help="At most so many in this sitting.")
def label(log: Path, **options: Any) -> None:
    """Judge responses yourself, the least sure verdicts of the judges first; `grape calibrate` holds them to it.

    Each answer is stored at once; what the judge said is told after it. Ctrl-C or q ends the sitting.
    """
    from grape.labels import label
    from grape.log.query import clean

    terminal = sys.stdin.isatty()
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if terminal:
        import readline  # noqa: F401  so that a line can be edited

    def ask(prompt: str) -> str:
        line = input(prompt)
        if not terminal:
            click.echo(clean(line))  # as a terminal would have shown it
        return line

    done = label(log, ask=ask, tell=click.echo, **options)
    click.echo(f"{done.count} labels by {clean(done.labeler)}; {done.left} left")
    if done.count:
        click.echo(f"next: grape calibrate --log {shlex.quote(str(log))}")
    say(f"run {done.run} of {log}")


@click.command()
@click.argument("what", metavar="WHAT")
@click.option("--out", type=FILE, metavar="FILE", required=True,
              help="Where it goes: .jsonl, .parquet, or a folder for datasets.load_from_disk.")  # fmt: skip
@LOG
@RUN
@click.option("--min-reward", type=float, metavar="X", help="sft: leave out questions without so good a response.")
@click.option("--by", default="weighted", show_default=True, metavar="reward|weighted|normalized",
              help="sft: by which a response is the best one.")  # fmt: skip
@ITEM
@BY_JUDGE
@click.option("--labelled", is_flag=True, help="judge: only calls whose verdict is within 0.25 of people's labels.")
@click.option("--against", type=FILE, metavar="FILE",
              help="Leave out what overlaps the questions of FILE, which are held out, by 8-grams.")  # fmt: skip
@click.option("--limit", type=int, metavar="N", help="The first N rows alone.")
@click.option("--force", is_flag=True, help="Replace FILE where it is there already.")
def export(what: str, log: Path, out: Path, **options: Any) -> None:
    """Write a set out of the log.

    \b
    WHAT is one of
      sft         the best response to each question, as chat messages
      preference  the pairs of grape pairs (and of judges), with their texts
      judge       what judges were asked and replied, as chat messages, to train judges on
      critique    what judges said of each response and item, with the texts
      responses   questions and responses, which grape score reads: to judge them anew
    """
    from grape.export import export

    done = export(what, log, out, **options)
    left = f", {done.overlapping} left out, whose questions overlap {options['against']}" if options["against"] else ""
    click.echo(f"{out}: {done.count} rows{left}")
    say(f"run {done.run} of {log}")
