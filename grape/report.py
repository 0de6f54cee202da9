"""Records as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from inspect import getdoc

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grape.checkers import Checker, FromRow
from grape.errors import one_line
from grape.records import Record

MOST_FAILURES = 3
MOST_ITEMS = 40  # lines of a table on the terminal


def score_table(records: Sequence[Record]) -> Table:
    """One line per category and item: how many were scored, how many failed and how, the mean score and confidence."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("category", "item", "scored", "failed", "mean score", "mean confidence"):
        table.add_column(name, justify="left" if name in {"category", "item"} else "right")
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        for item, cell in record["items"].items():
            cells.setdefault((record["category"], item), []).append(cell)
    previous = None
    for (category, item), group in sorted(cells.items(), key=lambda pair: pair[0][0])[:MOST_ITEMS]:
        scored = [cell for cell in group if cell["score"] is not None]
        left = [cell["outcome"] for cell in group if cell["outcome"] in {"not_applicable", "skipped"}]
        table.add_row(
            Text(category if category != previous else ""),
            Text(item),
            str(len(scored)),
            str(len(group) - len(scored) - len(left)),
            _mean([cell["score"] for cell in scored]),
            _mean([cell["confidence"] for cell in scored if cell["confidence"] is not None]),
        )
        previous = category
    if len(cells) > MOST_ITEMS:
        table.add_row("...", f"and {len(cells) - MOST_ITEMS} more: see the view item_health", "", "", "", "")
    return table


def score_summary(records: Sequence[Record]) -> str:
    """The batch in one line."""
    rewards = [record["reward"] for record in records if record["reward"] is not None]
    groups = len({record["question_id"] for record in records})
    return (
        f"{len(records)} responses to {groups} questions; mean reward {_mean(rewards)}; "
        f"{len(records) - len(rewards)} unscorable"
    )


def _mean(values: Sequence[float]) -> str:
    return f"{math.fsum(values) / len(values):.3f}" if values else "-"


def failure_lines(records: Sequence[Record]) -> list[str]:
    """The most frequent ways in which verdicts failed, with an example of each."""
    ways: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for item, cell in record["items"].items():
            if cell["score"] is None and cell["outcome"] not in {"not_applicable", "skipped"}:
                ways.setdefault((item, cell["outcome"]), []).append(cell.get("detail") or "")
    most = sorted(ways.items(), key=lambda way: -len(way[1]))[:MOST_FAILURES]
    return [f"failed: {len(details)} x {item}: {how}: {one_line(details[0], 120)}" for (item, how), details in most]


def checker_table(checkers: Mapping[str, Checker]) -> Table:
    """One line per checker: its arguments, with their defaults, and the first sentence of what it says of itself."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("checker", "arguments", "what it does"):
        table.add_column(name)
    for name, checker in checkers.items():
        arguments = []
        for key, field in checker.arguments.model_fields.items():
            default = checker.defaults.get(key, "needed")
            shown = f"{{field: {default.field}}}" if isinstance(default, FromRow) else default
            arguments.append(f"{field.alias or key}={shown}")
        first = " ".join((getdoc(checker.function) or "").split("\n\n")[0].split())
        table.add_row(Text(name), Text(", ".join(arguments)), Text(first))
    return table


def check_lines(records: Sequence[Record]) -> list[Text]:
    """A line per rubric, and one below it for each expectation that failed."""
    lines = []
    for record in records:
        cases = record["cases"]
        failed = [case for case in cases if case["passed"] is False]
        held = sum(case["passed"] is True for case in cases)
        text = Text("FAIL" if failed else "ok  ", style="bold red" if failed else "green")
        text.append(
            f"  {record['rubric']}  {record['items']} items, {held} of {len(cases)} expectations hold", "default"
        )
        if (waiting := len(cases) - held - len(failed)) > 0:
            text.append(f", {waiting} wait for a judge (--live)", "default")
        lines.append(text)
        for case in failed:
            got = case["outcome"] if case["score"] is None else f"{case['score']:g}"
            why = f" ({case['reasoning']})" if case["reasoning"] else ""
            place = f"{record['source']}: cases.{case['case']}.expect.{case['item']}"
            lines.append(Text(f"      {place}: expected {case['expected']}, got {got}{why}"))
    return lines


def show(*things: Table | Text | str, stderr: bool = False) -> None:
    """Print without markup, so that no user's text is taken for a style; wide where the output is not a terminal."""
    console = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True, width=200)
    for thing in things:
        console.print(thing)
