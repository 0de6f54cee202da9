"""What the terminal shows while a run trains: step, rate, time left and the reward's curve; and what it learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from time import monotonic
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LABELS = {"weighted/mean": "sum of weight x score", "reward/mean": "reward", "length/mean": "length"}
BARS = "▁▂▃▄▅▆▇█"
SILENCE = 30.0  # seconds after which a run says something of itself where there is no terminal
LINES = 20  # that it says at least


def curve(values: Sequence[float], width: int = 24) -> str:
    """A line of at most ``width`` bars, each the mean of its part of the values, from their least to their greatest."""
    number = min(width, len(values))
    cuts = [round(place * len(values) / number) for place in range(number + 1)] if number else []
    parts = [values[start:end] for start, end in pairwise(cuts)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


class TrainingProgress:
    """A bar on a terminal's stderr, or a line now and then where there is none. `step` is to be called after each."""

    def __init__(self, what: str = "training") -> None:
        self._console = Console(stderr=True)
        self._what = what
        self.scores: list[float] = []
        self._said = 0.0
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[said]}"),
        )  # fmt: skip
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal, transient=True)
        self._task = self._bar.add_task(what, total=None, said="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def step(self, number: int, total: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Show a step that is done."""
        if "weighted/mean" in metrics:
            self.scores.append(metrics["weighted/mean"])
        said = f"{seconds:.2g} s/step"
        if self.scores:
            said += f"  score {self.scores[-1]:.3f} {curve(self.scores)}"
        elif "loss" in metrics:
            said += f"  loss {metrics['loss']:.3f}"
        self._bar.update(self._task, completed=number, total=total, said=said)
        due = number in (1, total) or number % max(1, total // LINES) == 0 or monotonic() - self._said > SILENCE
        if not self._console.is_terminal and due:
            self._said = monotonic()
            self._console.print(f"{self._what}: step {number}/{total}, {said}", markup=False, highlight=False)


def heldout_table(results: Mapping[int, Mapping[str, float]]) -> Table:
    """Held-out results before and after: the mean of every item, and of sum weight x score, with its change."""
    first, last = results[min(results)], results[max(results)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("held out", "before", "after", "change", "confidence"):
        table.add_column(name, justify="left" if name == "held out" else "right")
    names = sorted(name for name in {*first, *last} if name.startswith("score/") or name.endswith("weighted/mean"))
    for name in names:
        before, after = first.get(name), last.get(name)
        confidence = last.get(f"confidence/{name.removeprefix('score/')}")
        change = None if before is None or after is None else after - before
        label = LABELS.get(name, name.removeprefix("score/"))
        table.add_row(Text(label), _number(before), _number(after), _number(change, "+.3f"), _number(confidence))
    return table


def phases_table(results: Mapping[int, Mapping[str, float]]) -> Table:
    """Held-out results of `grape constitution`: before any phase, after the supervised one, and at the end."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("held out")
    for phase in results:
        table.add_column(("before", "supervised", "feedback")[phase], justify="right")
    shown = {name for one in results.values() for name in one}
    for name in sorted(name for name in shown if name.startswith("score/") or name.endswith("weighted/mean")):
        label = LABELS.get(name, name.removeprefix("score/"))
        table.add_row(Text(label), *(_number(one.get(name)) for one in results.values()))
    return table


def training_table(steps: Mapping[int, Mapping[str, float]]) -> Table:
    """The first and the last of these steps: scores, and what tells whether the policy is well."""
    begin, end = min(steps), max(steps)
    first, last = steps[begin], steps[end]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("training", f"step {begin}", f"step {end}"):
        table.add_column(name, justify="left" if name == "training" else "right")
    shown = ["reward/mean", *(name for name in last if name == "weighted/mean" or name.startswith("score/"))]
    shown += [name for name in ("entropy", "approx_kl", "ref_kl", "length/mean", "truncated", "dead_groups", "failed")
              if name in last]  # fmt: skip
    for name in shown:
        table.add_row(Text(LABELS.get(name, name)), _number(first.get(name)), _number(last.get(name)))
    return table


def tuned_table(steps: Mapping[int, Mapping[str, float]], heldout: Mapping[int, Mapping[str, float]]) -> Table:
    """The first and the last of these steps, and of the measures of what was held out."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("metric", "first", "last"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for part, prefix in ((steps, ""), (heldout, "held-out ")):
        first, last = (part[min(part)], part[max(part)]) if part else ({}, {})
        for name in (name for name in last if not name.startswith(("heldout/", "lr", "epoch", "tokens", "examples"))):
            table.add_row(Text(f"{prefix}{name}"), _number(first.get(name)), _number(last.get(name)))
    return table


def selected_table(rounds: Sequence[Any]) -> Table:
    """Of each round of `grape best-of`: the rewards of all and of those that were kept, and pass@k."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("round", "questions", "kept", "reward of all", "of kept", "KL at most",
                 *(f"pass@{k}" for k in rounds[0].pass_at)):  # fmt: skip
        table.add_column(name, justify="right")
    for number, one in enumerate(rounds, 1):
        shares = (_number(share) for share in one.pass_at.values())
        size = (str(one.questions), str(len(one.rows)))
        table.add_row(str(number), *size, _number(one.mean), _number(one.kept), _number(one.kl), *shares)
    return table


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}"
