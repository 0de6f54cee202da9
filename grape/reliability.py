"""What `grape calibrate` found, to be read: tables for the terminal, JSON, and the reliability plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from grape.agreement import Interval, equal_mass
from grape.errors import ConfigError

if TYPE_CHECKING:
    from grape.calibrate import Line, Report
    from grape.gold import Humans

COLUMNS = (
    "judge", "item", "group", "n", "accuracy", "kappa", "alpha", "order", "ECE stated", "ECE calibrated", "change",
    "rank >", "confidence from now on",
)  # fmt: skip
NAMES = {
    "order": "contradicts",
    "before": "ece_stated",
    "after": "ece_calibrated",
    "change": "ece_change",
    "rank": "rank_correlation",
}  # in JSON
LEGEND = (
    "accuracy, kappa, alpha: with the gold labels; order: contradicts itself when the order is turned;",
    "ECE calibrated: cross-validated, on halves of the questions held out; change: of ECE on those, better below 0;",
    "rank >: lower bound of the rank correlation of confidence with being right; [95 % bootstrap intervals]",
)


def report_lines(report: Report) -> list[Table | str]:
    """All that was found, in the order in which it is read."""
    shown: list[Table | str] = []
    if report.lines:
        shown += [calibration_table(report.lines), "", *LEGEND]
    shown += [_human_line(humans) for humans in report.humans]
    if report.repeated:
        shown += [""] * bool(shown)
        for one in report.repeated:
            shown += [
                one.says,
                f"  Spearman of stated confidence with variance: {spread(one.rank)}, {one.num_responses} responses, "
                f"{one.num_samples} samples, {one.num_failed} failed, mean variance {_number(one.mean_variance)}",
            ]
    return [*shown, *([""] * bool(shown and report.changes)), *report.changes]


def calibration_table(lines: Sequence[Line]) -> Table:
    """One line per judge, item and group of responses."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        table.add_column(
            name, justify="left" if name in {*COLUMNS[:3], COLUMNS[-1]} else "right", no_wrap=name != COLUMNS[-1]
        )
    previous: tuple[str, str] | None = None
    for line in lines:
        same = (line.judge, line.item) == previous
        previous = (line.judge, line.item)
        failed = f" (+{line.num_failed} failed)" if line.num_failed else ""
        table.add_row(
            Text("" if same else line.judge), Text("" if same else line.item), Text(line.group),
            f"{len(line.sample.score)}{failed}", spread(line.accuracy), spread(line.kappa), spread(line.alpha),
            spread(line.order) if line.num_ordered else "-", spread(line.before), spread(line.after),
            spread(line.change),
            _number(line.rank.low), Text(line.gets),
        )  # fmt: skip
    return table


def spread(value: Interval) -> str:
    """A value with its interval: `.94 [.90 .97]`."""
    bounds = "" if math.isnan(value.low) else f" [{_number(value.low)} {_number(value.high)}]"
    return f"{_number(value.value)}{bounds}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}".replace("0.", ".", 1)


def _human_line(humans: Humans) -> str:
    tied = f"; {humans.num_tied} tied and left out" if humans.num_tied else ""
    return (
        f"{humans.num_labelers} people on {humans.item}: alpha ({humans.level}) {spread(humans.alpha)} over "
        f"{humans.num_responses} responses{tied}"
    )


def report_record(report: Report) -> dict[str, Any]:
    """The report as plain data; what is not defined is null."""
    return {
        "lines": [_line_record(line) for line in report.lines],
        "humans": [_plain(humans) for humans in report.humans],
        "repeated": [{**_plain(one), "says": one.says} for one in report.repeated],
        "changes": list(report.changes),
    }


def _line_record(line: Line) -> dict[str, Any]:
    left = {"sample", "held_out", "map"}
    values = {name: _plain(getattr(line, name)) for name in (f.name for f in fields(line)) if name not in left}
    counts = {"n": len(line.sample.score), "questions": line.sample.questions}
    map_ = {"map": line.map.model_dump() if line.map else None}
    return counts | {NAMES.get(name, name): value for name, value in values.items()} | map_


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return None if isinstance(value, float) and np.isnan(value) else value


def needs_matplotlib() -> None:
    """One line where the extra is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs the package matplotlib: pip install 'grape-rl[plot]'") from error


def draw(lines: Sequence[Line], path: Path) -> None:
    """The reliability plot: how often a judge is right at each confidence, stated (hollow) and calibrated (filled).

    A panel per judge and item, a colour per group; the size of a mark is the number of verdicts in its bin. The filled
    ones are of one half of the questions, mapped by what was fitted to the other half.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((line.judge, line.item) for line in lines))
    figure = Figure(figsize=(4.2 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for colour, line in enumerate(one for one in lines if (one.judge, one.item) == panel):
            _marks(axes, line, f"C{colour}")
        axes.set(title=f"{panel[0]}: {panel[1]}", xlabel="confidence", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.set_aspect("equal")
        axes.legend(loc="upper left", fontsize=8, frameon=False)
        if number == 1:
            axes.set_ylabel("share right")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _marks(axes: Any, line: Line, colour: str) -> None:
    """The bins of a line, stated and calibrated."""
    if len(line.sample.score) < 2:
        return
    held = line.held_out.half[0] == 0
    for confidence, right, filled in (
        (line.sample.stated, line.sample.right, False),
        (line.held_out.mapped[0, held], line.sample.right[held], True),
    ):
        bins = equal_mass(confidence)
        count = np.bincount(bins)
        x, y = np.bincount(bins, weights=confidence) / count, np.bincount(bins, weights=right) / count
        axes.scatter(
            x, y, s=12 + 160 * count / count.sum(), facecolors=colour if filled else "none", edgecolors=colour,
            alpha=0.8, label=line.group if filled else None,
        )  # fmt: skip
        if not filled:
            axes.plot(x, y, color=colour, linewidth=0.8, linestyle=":", alpha=0.6)
