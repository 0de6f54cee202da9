"""`grape report`: how far a training run went from the policy that it began with, and what that was worth.

A policy that leaves its beginning far behind may please its judge and nobody else (Gao et al. 2022): the score in
training goes on to rise with the KL divergence, the held-out one turns. What was held out stands beside the means of
the steps that are nearest to it: a step's responses are drawn before its update.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from rich.table import Table
from rich.text import Text

from grape.errors import ConfigError
from grape.selection import ROUNDING, pass_at
from grape.stored import Reader, open_log, reading, run_of

ROWS = 20  # of the table on the terminal
MEASURES = "no KL was logged: loss.kl=k3 loss.kl_coef=0 measures it, and changes no update"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The policy after ``step`` updates. ``kl`` is in nats a response, from the policy as the run began.

    ``training`` and ``heldout`` are means of the sum of weight x score, ``error`` the standard error of the second over
    its questions; ``kl`` and ``training`` of a held-out measure are means over the steps nearest to it. ``pass_at``
    says how probable it is that one of 1, 2, 4, ... held-out responses is solved.
    """

    step: int
    kl: float | None
    training: float | None
    heldout: float | None = None
    error: float | None = None
    pass_at: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """A run: all its ``steps``, and the ``points`` at which held-out questions were asked (or, where none were, evenly
    spread ones).

    ``fall`` is by how much the held-out score at the end is below its highest, with the ends of a 95 % interval over
    questions; ``unscored`` counts held-out responses without a score, which no mean has.
    """

    run: str
    steps: tuple[Point, ...]
    points: tuple[Point, ...]
    judged: str
    fall: tuple[float, float, float] | None = None
    unscored: int = 0

    @property
    def best(self) -> Point | None:
        """Where the held-out score is highest."""
        known = [one for one in self.points if one.heldout is not None]
        return max(known, key=lambda one: one.heldout or 0.0) if known else None


def drift(log: str | Path, run: str | None = None, *, solved: float = 1.0) -> Drift:
    """What the log has of a training run, by default the last one. A held-out response is ``solved`` from that sum of
    weight x score on."""
    with open_log(log) as store, reading(store, log) as reader:
        found = run_of(reader, run, "runs where kind = 'train'", "steps of grape train")
        steps = _steps(reader, found.name)
        scores, unscored = _heldout(reader, f"{found.name}.heldout")
        judged = _judged(reader, found.name)
    if not steps:
        raise ConfigError(f"{log}: run {found.name} has no steps yet")
    places = sorted(scores) or _spread(0, steps[-1].step)
    near: dict[int, list[Point]] = defaultdict(list)
    for one in steps:
        near[min(places, key=lambda place: (abs(place - one.step), place))].append(one)
    points = tuple(_point(place, near[place] or [steps[-1]], scores.get(place, {}), solved) for place in places)
    found_drift = Drift(run=found.name, steps=steps, points=points, judged=judged, unscored=unscored)
    best, last = found_drift.best, points[-1].step
    if best is None:
        return found_drift
    fall = _fall(scores[best.step], scores[last])
    return Drift(run=found.name, steps=steps, points=points, judged=judged, unscored=unscored, fall=fall)


def _steps(log: Reader, run: str) -> tuple[Point, ...]:
    """What was drawn for each step, by the policy as it was before: after one update less."""
    rows = log.query(
        "select s.step, s.metrics, avg(r.num_tokens) filter (w.trained is distinct from false) from steps s "
        "left join responses r on r.run = s.run and r.step = s.step "
        "left join rewards w on w.run = r.run and w.step = r.step and w.response_id = r.response_id "
        "where s.run = ? group by all order by s.step",
        [run],
    )
    points = []
    for step, text, tokens in rows:
        metrics = json.loads(text)
        per_token = metrics.get("ref_kl")
        kl = None if per_token is None or tokens is None else per_token * tokens
        points.append(Point(step=step - 1, kl=kl, training=metrics.get("weighted/mean"), pass_at={}))
    return tuple(points)


Scores = dict[str, list[float]]


def _heldout(log: Reader, run: str) -> tuple[dict[int, Scores], int]:
    """The scores of held-out responses by step and question, and how many have none."""
    scores: dict[int, Scores] = defaultdict(lambda: defaultdict(list))
    unscored = 0
    for step, question_id, weighted in log.query(
        "select step, question_id, weighted from rewards where run = ? order by step, response_id", [run]
    ):
        of_step = scores[step]  # there also where nothing has a score: the last measure is the last one
        if weighted is None:
            unscored += 1
        else:
            of_step[question_id].append(weighted)
    return scores, unscored


def _judged(log: Reader, run: str) -> str:
    """Whether what is held out is judged by others than the training."""
    rows = log.query(
        "select rubrics, judges from runs where run in (?, ?) order by length(run)", [run, f"{run}.heldout"]
    )
    if len(rows) < 2:
        return "nothing is held out: evaluate.questions asks what no step has seen, evaluate.judges has others judge it"
    (rubrics, judges), (held_rubrics, held_judges) = ([json.loads(text) for text in row] for row in rows)
    shared = rubrics.keys() & held_rubrics.keys()  # a run has those of its own questions' categories
    other = ["rubrics"] * (
        (bool(held_rubrics) and not shared) or any(rubrics[name] != held_rubrics[name] for name in shared)
    )
    other += ["judges"] * any(judges.get(name) != judge for name, judge in held_judges.items())
    return f"held out by other {' and '.join(other)}" if other else "held out by the rubrics and judges of the training"


def _spread(first: int, last: int) -> list[int]:
    """At most so many numbers, both ends among them."""
    number = min(ROWS, last - first + 1)
    return [first + round(at * (last - first) / max(1, number - 1)) for at in range(number)]


def _point(step: int, near: Sequence[Point], scores: Scores, solved: float) -> Point:
    """A held-out measure, and what the steps near to it were like."""
    kls, trained = (
        [one.kl for one in near if one.kl is not None],
        [one.training for one in near if one.training is not None],
    )
    means = [fmean(some) for some in scores.values()]
    most = max(map(len, scores.values()), default=0)
    shares = {}
    for k in (2**power for power in range(most.bit_length())):
        shares[k] = fmean(
            pass_at(k, len(some), sum(one >= solved - ROUNDING for one in some))
            for some in scores.values()
            if len(some) >= k
        )
    return Point(
        step=step, kl=fmean(kls) if kls else None, training=fmean(trained) if trained else None,
        heldout=fmean(means) if means else None, pass_at=shares,
        error=stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
    )  # fmt: skip


def _fall(best: Scores, last: Scores) -> tuple[float, float, float] | None:
    """The mean difference over the questions that have both, and its interval."""
    gaps = [fmean(best[name]) - fmean(last[name]) for name in best if name in last]
    if len(gaps) < 2:
        return None
    error = stdev(gaps) / math.sqrt(len(gaps))
    return fmean(gaps), fmean(gaps) - 1.96 * error, fmean(gaps) + 1.96 * error


def drift_table(found: Drift) -> Table:
    """A line per point: at most so many, evenly spread, the first, the highest and the last among them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    shares = sorted({k for one in found.points for k in one.pass_at})
    held = any(one.heldout is not None for one in found.points)
    columns = ["updates", "KL", "sqrt KL", "training", *(("held out", "+-") if held else ())]
    for name in (*columns, *(f"pass@{k}" for k in shares)):
        table.add_column(name, justify="right")
    places = set(_spread(0, len(found.points) - 1))
    places |= {at for at, one in enumerate(found.points) if found.best is one}
    for at in sorted(places):
        one = found.points[at]
        root = None if one.kl is None else math.sqrt(max(0.0, one.kl))
        cells = [_number(one.kl, ".2f"), _number(root, ".2f"), _number(one.training)]
        cells += [_number(one.heldout), _number(one.error)] if held else []
        table.add_row(str(one.step), *cells, *(_number(one.pass_at.get(k)) for k in shares))
    return table


def drift_lines(found: Drift) -> list[Table | Text | str]:
    """The table, and what it comes to."""
    lines: list[Table | Text | str] = [f"run {found.run}; {found.judged}", "", drift_table(found), ""]
    if (best := found.best) and found.fall:
        last = found.points[-1]
        if best is last:
            lines.append("held out: highest at the end")
        else:
            by, low, high = found.fall
            rise = None if last.training is None or best.training is None else last.training - best.training
            lines.append(
                f"held out: highest after {best.step} updates, lower by {by:.3f} [{low:.3f} {high:.3f}] at the end; "
                f"training since then {_number(rise, '+.3f')}"
            )
    if found.unscored:
        lines.append(f"{found.unscored} held-out responses have no score and are left out")
    lines.append(
        MEASURES
        if all(one.kl is None for one in found.steps)
        else "KL, in nats a response from where the run began, and training: means of the steps nearest to each row"
    )
    return lines


def draw_drift(found: Drift, path: Path) -> None:
    """Scores against the square root of the KL (Gao et al. 2022), or against updates where no KL is known: training by
    step, below it what is held out, with two standard errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    held = found.best is not None
    by_kl = any(one.kl is not None for one in found.steps)
    figure = Figure(figsize=(6.4, 3.2 * (1 + held)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1 + held, 1, sharex=True, squeeze=False)[:, 0]
    for axes, points in zip(panels, (found.steps, found.points), strict=False):
        x, y, error = _curve(points, by_kl, held=axes is not panels[0])
        axes.errorbar(x, y, yerr=error, marker="o", markersize=3, linestyle="", capsize=2)
        axes.set_ylabel("training" if axes is panels[0] else "held out")
    panels[-1].set_xlabel("sqrt KL (nats a response)" if by_kl else "updates")
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error_:
        raise ConfigError(f"{path}: {error_.strerror}") from error_


def _curve(points: Sequence[Point], by_kl: bool, *, held: bool) -> tuple[list[float], list[float], list[float]]:
    """Places, scores and what the scores may be off by, of the points that have both."""
    x, y, error = list[float](), list[float](), list[float]()
    for one in points:
        place, score = one.kl if by_kl else one.step, one.heldout if held else one.training
        if place is not None and score is not None:
            x.append(math.sqrt(max(0.0, place)) if by_kl else place)
            y.append(score)
            error.append(2 * (one.error or 0.0))
    return x, y, error


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}"
