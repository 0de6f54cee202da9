"""What of a critique log a command is about: the log, one of its runs, its questions, what people said of its
responses."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import duckdb

from grape.errors import ConfigError, known
from grape.log import Log
from grape.log.database import connect
from grape.resources import is_file
from grape.types import Message

ASIDE = ("controls", "heldout", "difficulty")  # kinds of runs that stand beside another one
LATEST = 5  # runs that a message names


def open_log(path: str | Path) -> Log:
    """The log, which has to be there."""
    if not is_file(path):
        raise ConfigError(f"{path}: no such log")
    return Log(path)


class Reader(Protocol):
    """What rows are had from: a log, or one connection to it for several queries."""

    @property
    def path(self) -> Path:
        """The log's file."""

    def query(self, sql: str, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of one query."""


@dataclass(frozen=True, slots=True)
class _Connected:
    path: Path
    connection: duckdb.DuckDBPyConnection

    def query(self, sql: str, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, params).fetchall()


@contextmanager
def reading(log: Log, named: str | Path) -> Iterator[Reader]:
    """The log as it is now, by one connection: each costs as much as most queries. Meanwhile nothing is stored.

    ``named`` is the path as messages give it.
    """
    log.flush()
    with connect(log.path, read_only=True) as connection:
        yield _Connected(Path(named), connection)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A run of the log."""

    name: str
    kind: str


def run_of(log: Reader, run: str | None, rows: str, what: str) -> Found:
    """The run that is meant: ``run``, or else the last one that has any of the ``rows`` (a table and a condition).

    Runs that stand beside another one (held-out questions, null controls, the difficulty filter) are taken only by
    name. ``what`` says in a message what the rows are.
    """
    runs = log.query(
        f"select run, coalesce(kind, ''), run in (select run from {rows}) from runs order by started desc, rowid desc"
    )
    if not runs:
        raise ConfigError(f"{log.path}: no runs in it")
    names = [name for name, _, _ in runs]
    if run is not None and run not in names:
        near = get_close_matches(run, names, n=1)
        raise ConfigError(f"{log.path}: no run {run!r}; {known({*names[:LATEST], *near}, run)}")
    for name, kind, has in runs:
        if has and (kind not in ASIDE if run is None else name == run):
            return Found(name=name, kind=kind)
    raise ConfigError(f"{log.path}: {f'run {run}' if run else 'no run in it'} has {'no ' * bool(run)}{what}")


def check_name(log: Reader, run: str, column: str, name: str | None) -> None:
    """`ConfigError` where the run has no judge's verdict on such an item, or by such a judge (the ``column``)."""
    if name is None:
        return
    found = log.query(f"select distinct {column} from verdicts where run = ? and kind = 'judge'", [run])
    names = {value for (value,) in found if value is not None}
    if name not in names:
        raise ConfigError(
            f"{log.path}: run {run} has no verdict of a judge with {column} {name!r}; {known(names, name)}"
        )


def chat(question: str) -> str | list[Message]:
    """A question as it was asked: the messages of a chat from their JSON, any other text as it is."""
    try:
        data = json.loads(question)
    except (ValueError, RecursionError):
        return question
    turns = isinstance(data, list) and data and all(isinstance(one, dict) for one in data)
    return data if turns and all(set(one) == {"role", "content"} for one in data) else question


def human_labels(log: Reader, run: str) -> dict[tuple[str, str], Mapping[str, float]]:
    """What people said of a run's responses, by response and item: the newest score of each labeler.

    A label that was given in another run counts where the response had the same text there.
    """
    rows = log.query(
        "with own as (select distinct response_id, response from responses where run = ?), "
        "same as (select distinct r.run, r.response_id from responses r join own using (response_id, response)) "
        "select response_id, item, coalesce(labeler, ''), score from human_labels "
        "where (run, response_id) in (select (run, response_id) from same) "
        "or (run is null and response_id in (select response_id from own)) order by human_labels.rowid",
        [run],
    )
    found: dict[tuple[str, str], dict[str, float]] = {}
    for response_id, item, labeler, score in rows:
        found.setdefault((response_id, item), {})[labeler] = score
    return dict(found)


def questions_of(log: Reader, run: str, ids: Collection[str] | None = None) -> dict[str, dict[str, Any]]:
    """The questions of a run (or those of these ids) by id, in their order: category, question and reference."""
    rows = log.query(
        "select question_id, category, question, reference from questions where run = ? "
        "and (?::varchar[] is null or question_id in (select unnest(?::varchar[]))) order by rowid",
        [run, None if ids is None else sorted(ids), None if ids is None else sorted(ids)],
    )
    return {
        question_id: {"category": category, "question": chat(text or ""), "reference": reference}
        for question_id, category, text, reference in rows
    }
