"""`grape calibrate`: gold labels against verdicts, and from them what each judge's confidence is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grape.agreement import DRAWS, Floats, Interval, alpha, calibration_error, interval, intervals, mean
from grape.errors import ConfigError, known
from grape.fitting import HeldOut, Sample, decide, held_out, joined
from grape.gold import Case, Gold, Humans, agreement_of_humans, matched, read_gold, stored_verdicts
from grape.judge.calibration import Calibration, Map, calibration_path
from grape.judge.config import Judge, load_judge
from grape.log import Log
from grape.repeat import Repeated, judge_again
from grape.resources import is_file
from grape.scoring import check_out, write_lines

TOGETHER = "together"
SWAPPED = "swapped_with"  # metadata of a response: the one that shows the same comparison in the other order


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One judge on one item in one group of responses, held to its gold labels.

    ``order`` is the share of comparisons, judged in both orders, whose two verdicts contradict each other. ``before``
    is the calibration error of the stated confidence. ``after`` is the one of calibrated confidences on questions that
    they were not fitted to (`HeldOut`), and ``change`` what it is there above that of the stated ones.
    """

    judge: str
    item: str
    group: str
    num_failed: int
    accuracy: Interval
    kappa: Interval
    alpha: Interval
    order: Interval
    num_ordered: int
    before: Interval
    after: Interval
    change: Interval
    rank: Interval
    map: Map | None
    why: str
    by_category: bool
    sample: Sample = field(repr=False)
    held_out: HeldOut = field(repr=False)

    @property
    def gets(self) -> str:
        """What stands for its confidence from now on, and why."""
        if self.group == TOGETHER and self.map is not None and self.by_category:
            return f"as its category; elsewhere {described(self.map)}"
        return f"{described(self.map)}: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `grape calibrate` found. ``changes`` says of each map what it was and what it is."""

    lines: Sequence[Line] = ()
    humans: Sequence[Humans] = ()
    repeated: Sequence[Repeated] = ()
    changes: Sequence[str] = ()


async def calibrate(
    log: str | Path,
    gold: str | Path | None = None,
    *,
    run: str | None = None,
    judges: Mapping[str, str | Path] | None = None,
    by: str = "category",
    tolerance: float = 0.5,
    plot: str | Path | None = None,
    repeat: int = 0,
    rubrics: str | Path | None = None,
    dry_run: bool = False,
    seed: int = 0,
    draws: int = DRAWS,
) -> Report:
    """Hold the verdicts of a log to gold labels (``gold``, or the log's human labels) and fit what they say.

    The maps of a judge are written beside its file and applied from then on, unless ``dry_run``. ``judges`` are the
    files of those to be held to it, by any name; without, they are all of the log's, found by their names. ``by`` is a
    field of the responses' metadata, or `category`: only by category can a judge have several maps for one item.
    ``repeat`` asks the judges again, so often, on responses of the last run (or of ``run``); it needs no gold.
    ``draws`` resamples make an interval.
    """
    _check(log, gold, tolerance, repeat, plot)
    given = named_judges(judges or {})
    with Log(log) as store:
        lines: list[Line] = []
        humans: list[Humans] = []
        known_judges: dict[str, Judge] = {}
        if gold is not None or not repeat:
            labels = read_gold(gold, store)
            cases, known_judges = _cases(store, labels, run, given, dry_run=dry_run)
            lines, humans = assess(cases, by, tolerance, seed, draws), agreement_of_humans(labels, seed)
        repeated = await judge_again(store, given, repeat, run=run, rubrics=rubrics, seed=seed) if repeat else []
    changes = [
        change
        for name in sorted({line.judge for line in lines})
        for change in _store(name, known_judges.get(name), lines, by, dry_run=dry_run)
    ]
    if plot is not None and lines:
        from grape.reliability import draw

        draw(lines, Path(plot))
    return Report(lines=lines, humans=humans, repeated=repeated, changes=changes)


def _check(log: str | Path, gold: str | Path | None, tolerance: float, repeat: int, plot: str | Path | None) -> None:
    """What is wrong with the arguments, before any work."""
    if not 0 < tolerance <= 1:
        raise ConfigError(f"--tolerance: {tolerance:g} is not above 0 and at most 1")
    if repeat < 0 or repeat == 1:
        raise ConfigError(f"--repeat: {repeat} is not 2 or more: one score has no variance")
    if not is_file(log):
        raise ConfigError(f"{log}: no such log")
    if plot is not None:
        from grape.reliability import needs_matplotlib

        needs_matplotlib()
        check_out(plot, [file for file in (log, gold) if file is not None])


def named_judges(files: Mapping[str, str | Path]) -> dict[str, Judge]:
    """The judges of files, by the names that they have themselves: verdicts carry those."""
    loaded: dict[str, Judge] = {}
    for name, file in files.items():
        judge = load_judge(file)
        if judge.judge in loaded:
            raise ConfigError(
                f"--judge {name}={file}: judge {judge.judge!r} is given by {loaded[judge.judge].source} too"
            )
        loaded[judge.judge] = judge
    return loaded


def _cases(
    log: Log, gold: Mapping[tuple[str, str], Gold], run: str | None, given: Mapping[str, Judge], *, dry_run: bool
) -> tuple[list[Case], dict[str, Judge]]:
    """The verdicts beside their labels, of the judges given, or else of all, whose files are found by name."""
    labelled = {response_id for response_id, _ in gold}
    verdicts = stored_verdicts(log, run, given, labelled)
    if given:
        return matched(log, gold, [row for row in verdicts if row["judge"] in given], run), dict(given)
    cases = matched(log, gold, verdicts, run)
    if dry_run:
        return cases, {}
    judges = {}
    for name in sorted({case.judge for case in cases}):
        try:
            judges[name] = load_judge(name)
        except ConfigError as error:
            raise ConfigError(f"judge {name!r}: {error} (give its file: --judge {name}=FILE, or --dry-run)") from error
    return matched(log, gold, stored_verdicts(log, run, judges, labelled), run), judges


def assess(cases: Sequence[Case], by: str, tolerance: float = 0.5, seed: int = 0, draws: int = DRAWS) -> list[Line]:
    """A line per judge, item and value of a field, and where it has several values one of them together."""
    if by != "category" and not any(by in case.metadata for case in cases):
        fields = sorted({"category", *(name for case in cases for name in case.metadata)})
        raise ConfigError(f"--by: no response has the field {by!r}; {known(fields, by)}")
    lines = []
    for judge, item in sorted({(case.judge, case.item) for case in cases}):
        own = [case for case in cases if (case.judge, case.item) == (judge, item)]
        groups: dict[str, list[Case]] = {}
        for case in own:
            groups.setdefault(case.category if by == "category" else str(case.metadata.get(by, "-")), []).append(case)
        parts: list[HeldOut] = []
        for group in sorted(groups):
            sample = Sample.of(groups[group], tolerance)
            parts.append(held_out(sample, seed=seed, draws=draws))
            lines.append(_line(judge, item, group, groups[group], sample, parts[-1], by, seed, draws))
        if len(groups) > 1 or by != "category":
            members = [case for group in sorted(groups) for case in groups[group]]
            sample = Sample.of(members, tolerance)
            held = joined(parts) if by == "category" else held_out(sample, seed=seed, draws=draws)
            lines.append(_line(judge, item, TOGETHER, members, sample, held, by, seed, draws))
    return lines


def _line(
    judge: str,
    item: str,
    group: str,
    cases: Sequence[Case],
    sample: Sample,
    held: HeldOut,
    by: str,
    seed: int,
    draws: int,
) -> Line:
    right, stated = sample.right, sample.stated
    decision = decide(sample, seed=seed, draws=draws)
    binary = set(sample.gold.tolist()) <= {0.0, 1.0}
    seen = 0.5 * (1 + np.sign(sample.score - 0.5)) if binary else sample.score  # the side, or the score itself
    ratings = np.column_stack([seen, sample.gold])
    accuracy, agreed, before, after, change = intervals(
        [
            lambda w: mean(right, w),
            lambda w: alpha(ratings, "nominal" if binary else "interval", w),
            lambda w: calibration_error(stated, right, weight_BS=w),
            lambda w: held.error(right, w),
            lambda w: held.error(right, w) - held.error(right, w, stated),
        ],
        sample.cluster,
        draws=draws,
        seed=seed,
    )
    contradicts, pairs = _orders(cases)
    order = interval(lambda w: mean(contradicts, w), pairs, draws=draws, seed=seed)
    return Line(
        judge=judge, item=item, group=group, num_failed=len(cases) - len(right), accuracy=accuracy,
        kappa=decision.kappa, alpha=agreed, order=order,
        num_ordered=len(contradicts), before=before, after=after, change=change, rank=decision.rank, map=decision.map,
        why=decision.why, by_category=by == "category", sample=sample, held_out=held,
    )  # fmt: skip


def _orders(cases: Sequence[Case]) -> tuple[Floats, list[str]]:
    """Of each comparison that was judged in both orders: whether its verdicts contradict each other.

    The gold labels tell whether the truth turns with the order (the first is better) or not (the one by X is better).
    """
    by_id = {case.response_id: case for case in cases if case.score is not None}
    contradicts, cluster = [], []
    for case in by_id.values():
        other = by_id.get(str(case.metadata.get(SWAPPED)))
        if other is None or (other.response_id < case.response_id and _partner(other) == case.response_id):
            continue  # seen from the other side already
        truth = (case.gold - 0.5) * (other.gold - 0.5)
        assert case.score is not None and other.score is not None
        if truth:
            contradicts.append(float(truth * (case.score - 0.5) * (other.score - 0.5) < 0))
            cluster.append(case.cluster)
    return np.array(contradicts, dtype=np.float64), cluster


def _partner(case: Case) -> str:
    return str(case.metadata.get(SWAPPED))


def described(map_: Map | None) -> str:
    """A map in a few words."""
    if map_ is None:
        return "as stated"
    if map_.kind == "isotonic":
        return f"{map_.y[0]:.2f} to {map_.y[-1]:.2f}"
    return f"{map_.y[0]:.2f}" if map_.kind == "constant" else "0"


def _store(name: str, judge: Judge | None, lines: Sequence[Line], by: str, *, dry_run: bool) -> list[str]:
    """Write a judge's maps beside its file, whole or not at all, and say of each what it was and is.

    By category each has its own, and the item one of all together for those that have none; by another field, which a
    map cannot know, the item has one.
    """
    before = dict(judge.calibration.maps) if judge and judge.calibration else {}
    after = dict(before)
    for line in (line for line in lines if line.judge == name):
        if by != "category":
            after = {key: map_ for key, map_ in after.items() if not key.endswith(f"/{line.item}")}
        if line.map is not None and (by == "category" or line.group == TOGETHER):
            after[line.item if line.group == TOGETHER else f"{line.group}/{line.item}"] = line.map
    place = str(calibration_path(judge.source)) if judge else f"judge {name}"
    changes = [
        f"{key}: {described(after.get(key))} (before: {described(before.get(key))})"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    if judge and changes and not dry_run:
        calibration = Calibration(judge=judge.judge, identity=judge.identity, maps=after)
        write_lines(calibration_path(judge.source), [calibration.model_dump()])
    head = f"{place}: {'would change' if dry_run else 'written'}" if changes else f"{place}: nothing changes"
    return [head, *(f"  {change}" for change in changes)]
