"""Gold labels and the verdicts they are held against: which label is meant for which verdict."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, ValidationError

from grape.agreement import Interval, Level, alpha, interval
from grape.errors import ConfigError, invalid, known, one_line
from grape.judge.config import Judge
from grape.log import Log
from grape.rows import read
from grape.types import Strict, Unit

TIE = 0.5


def _id(value: Any) -> Any:
    """A whole number as an id is its digits."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class GoldRow(Strict):
    """One line of a file of gold labels. ``pair`` names what is resampled and held out whole, if not the question."""

    response_id: Annotated[str, BeforeValidator(_id)]
    item: str
    score: Unit
    labeler: str | None = None
    pair: Annotated[str | None, BeforeValidator(_id)] = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """What people say of one response on one item: the mean of their scores. ``place`` is where the first stands."""

    response_id: str
    item: str
    scores: tuple[float, ...]
    labelers: tuple[str, ...]
    place: str
    pair: str | None = None
    runs: frozenset[str] = frozenset()

    @property
    def score(self) -> float:
        """Their mean: of labels that are 0 or 1, it lies on the side of the majority."""
        return sum(self.scores) / len(self.scores)

    @property
    def tied(self) -> bool:
        """Whether labels of 0 and 1 are evenly split, so that no verdict could be right."""
        return set(self.scores) == {0.0, 1.0} and self.score == TIE


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One verdict beside its gold label. ``score`` is None where the judge failed; ``stated`` is its raw confidence."""

    judge: str
    item: str
    category: str
    response_id: str
    cluster: str
    score: float | None
    stated: float | None
    gold: float
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Humans:
    """How far the labelers of one item agree."""

    item: str
    num_labelers: int
    num_responses: int
    num_tied: int
    level: Level
    alpha: Interval


def read_gold(source: str | Path | None, log: Log) -> dict[tuple[str, str], Gold]:
    """The labels of a JSONL file, or else of the log's table `human_labels`, by response and item."""
    rows = _from_file(source) if source is not None else _from_log(log)
    found: dict[tuple[str, str], list[tuple[str, GoldRow, str | None]]] = {}
    for place, row, run in rows:
        found.setdefault((row.response_id, row.item), []).append((place, row, run))
    return {key: _joined(labels) for key, labels in found.items()}


def _from_file(source: str | Path) -> list[tuple[str, GoldRow, str | None]]:
    rows: list[tuple[str, GoldRow, str | None]] = []
    for place, data in read(Path(source)):
        if isinstance(data, ConfigError):
            raise data
        try:
            rows.append((place, GoldRow.model_validate(data), None))
        except ValidationError as error:
            raise invalid(place, error, sorted(GoldRow.model_fields)) from error
    if not rows:
        raise ConfigError(f"{source}: no gold labels")
    return rows


def _from_log(log: Log) -> list[tuple[str, GoldRow, str | None]]:
    rows = log.query("select run, response_id, item, score, labeler, note from human_labels order by rowid")
    if not rows:
        raise ConfigError(f"{log.path}: no human labels in it: give them with --gold FILE")
    labels = []
    for number, (run, response_id, item, score, labeler, note) in enumerate(rows, 1):
        place = f"{log.path}: human_labels: row {number}"
        data = {"response_id": response_id, "item": item, "score": score, "labeler": labeler, "note": note}
        try:
            labels.append((place, GoldRow.model_validate(data), run))
        except ValidationError as error:
            raise invalid(place, error, sorted(GoldRow.model_fields)) from error
    return labels


def _joined(labels: Sequence[tuple[str, GoldRow, str | None]]) -> Gold:
    """The labels of one response and item as one; the last of one labeler stands."""
    place, first, _ = labels[0]
    if len(labels) > 1 and any(row.labeler is None for _, row, _ in labels):
        where = labels[1][0]
        raise ConfigError(f"{where}: {first.response_id!r}, {first.item!r} has a label in {place}: name each labeler")
    by_labeler = {row.labeler or "": row.score for _, row, _ in labels}
    return Gold(
        response_id=first.response_id,
        item=first.item,
        scores=tuple(by_labeler.values()),
        labelers=tuple(by_labeler),
        place=place,
        pair=first.pair,
        runs=frozenset(run for _, _, run in labels if run is not None),
    )


COLUMNS = ("run", "judge", "judge_hash", "item", "category", "question_id", "response_id", "score")


def stored_verdicts(
    log: Log, run: str | None, judges: Mapping[str, Judge], response_ids: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """The last verdict of each judge on each response and item, of one run or of all, with the response's metadata.

    Of a judge whose file is given only verdicts count that it gave as it is now, of another only those of its last
    version: what it said under another prompt or model says nothing of it.
    """
    runs = log.query("select run, judges from runs where ? is null or run = ? order by started, run", [run, run])
    if not runs:
        latest = [name for (name,) in log.query("select run from runs order by started desc limit 5")]
        raise ConfigError(f"{log.path}: no run {run!r}; {known(latest, run)}" if run else f"{log.path}: no runs in it")
    told = {
        name: {one["hash"]: one.get("identity") for one in json.loads(text or "{}").values()} for name, text in runs
    }
    wanted = None if response_ids is None else sorted(response_ids)
    rows = log.query(
        f"select {', '.join(f'v.{name}' for name in COLUMNS)}, coalesce(v.stated, v.confidence), r.metadata "
        "from verdicts v left join responses r on v.run = r.run and v.step is not distinct from r.step "
        "and v.response_id = r.response_id where v.kind = 'judge' and v.applicable and v.outcome <> 'skipped' "
        "and (? is null or v.run = ?) and (?::varchar[] is null or v.response_id in (select unnest(?::varchar[]))) "
        "order by v.step, v.rowid",
        [run, run, wanted, wanted],
    )
    order = {name: place for place, name in enumerate(told)}
    rows.sort(key=lambda row: order.get(row[0], -1))
    found = [dict(zip([*COLUMNS, "stated", "metadata"], values, strict=True)) for values in rows]
    newest = {row["judge"]: row["judge_hash"] for row in found}
    now = {name: (judge.hash, judge.identity) for name, judge in judges.items()}
    last: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in found:
        hash_ = row["judge_hash"]
        identity = told.get(row["run"], {}).get(hash_)
        own_hash, own_identity = now.get(row["judge"], (newest[row["judge"]], None))
        if identity == own_identity if identity and own_identity else hash_ == own_hash:
            last[row["judge"], row["item"], row["response_id"]] = row
    _see_all(log, judges, newest, {key[0] for key in last})
    return list(last.values())


def _see_all(log: Log, judges: Mapping[str, Judge], found: Collection[str], counted: Collection[str]) -> None:
    """`ConfigError` for a judge that none of the verdicts is by, or none as it is now."""
    for name, judge in judges.items():
        if found and name not in found:
            raise ConfigError(f"{judge.source}: no verdict of judge {name!r} in {log.path}; {known(found, name)}")
        if found and name not in counted:
            raise ConfigError(
                f"{judge.source}: the verdicts of judge {name!r} in {log.path} are of another version: score again"
            )


def matched(
    log: Log, gold: Mapping[tuple[str, str], Gold], verdicts: Sequence[Mapping[str, Any]], run: str | None = None
) -> list[Case]:
    """Every verdict that has a gold label, beside it. Labels that are tied are left out."""
    _same_texts(log, gold, run)
    cases = []
    for row in verdicts:
        label = gold.get((row["response_id"], row["item"]))
        if label is None or label.tied:
            continue
        cases.append(
            Case(
                judge=row["judge"],
                item=row["item"],
                category=row["category"],
                response_id=row["response_id"],
                cluster=label.pair or row["question_id"],
                score=row["score"],
                stated=row["stated"],
                gold=label.score,
                metadata=json.loads(row["metadata"] or "{}"),
            )
        )
    if not cases:
        first = next(iter(gold.values()))
        judged = [item for (item,) in log.query("select distinct item from verdicts where kind = 'judge'")]
        raise ConfigError(
            f"{first.place}: response_id {one_line(first.response_id, 60)!r}, item {first.item!r}: no verdict in "
            f"{log.path} has this label, nor any other; items: {known(judged, first.item)}"
        )
    return cases


def _same_texts(log: Log, gold: Mapping[tuple[str, str], Gold], run: str | None) -> None:
    """See that an id names the same text in every run that is looked at, and in those whose responses were labelled."""
    runs = None if run is None else sorted({run, *(one for label in gold.values() for one in label.runs)})
    unlike = log.query(
        "select response_id, min(run), max(run) from responses where response_id in (select unnest(?::varchar[])) "
        "and (?::varchar[] is null or list_contains(?::varchar[], run)) group by response_id "
        "having count(distinct md5(response)) > 1 order by response_id limit 1",
        [sorted({response_id for response_id, _ in gold}), runs, runs],
    )
    for response_id, one, other in unlike:
        raise ConfigError(
            f"{log.path}: response_id {response_id!r} names different texts in runs {one} and {other}: name one (--run)"
        )


def agreement_of_humans(gold: Mapping[tuple[str, str], Gold], seed: int = 0) -> list[Humans]:
    """Krippendorff's alpha of each item that several people labelled."""
    found = []
    for item in sorted({item for _, item in gold}):
        labels = [label for label in gold.values() if label.item == item]
        names = sorted({name for label in labels for name in label.labelers})
        several = [label for label in labels if len(label.scores) > 1]
        if not several:
            continue
        ratings = np.full((len(labels), len(names)), np.nan)
        for row, label in enumerate(labels):
            ratings[row, [names.index(name) for name in label.labelers]] = label.scores
        level: Level = "nominal" if set(ratings[~np.isnan(ratings)].tolist()) <= {0.0, 1.0} else "interval"
        cluster = [label.pair or label.response_id for label in labels]
        measured = interval(lambda w, r=ratings, s=level: alpha(r, s, w), cluster, seed=seed)  # type: ignore[misc]
        found.append(
            Humans(
                item=item, num_labelers=len(names), num_responses=len(several), level=level, alpha=measured,
                num_tied=sum(label.tied for label in labels),
            )
        )  # fmt: skip
    return found
