"""Rows to score: JSON lines, Parquet or mappings, read strictly into questions and their responses."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from grape.errors import ConfigError, invalid, one_line
from grape.item import Item, distinct_ids, keys_at
from grape.types import Question, Response, Strict, Turn

MAX_DEPTH = 100


def _id(value: Any) -> Any:
    """A whole number as an id is its digits."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class QuestionRow(Strict):
    """A question with what is known about its answer. Fields beyond these stand in ``metadata``."""

    question_id: Annotated[str, BeforeValidator(_id)]
    category: str
    question: str | Annotated[list[Turn], Field(min_length=1)]
    reference: str | int | float | None = None
    tests: str | None = None
    entry_point: str | None = None
    items: list[Item] | None = None
    metadata: dict[str, Any] | None = None
    instruction_id_list: list[str] | None = None
    kwargs: list[dict[str, Any]] | None = None
    instruction_form: Literal["strict", "loose"] = "strict"

    def to_question(self) -> Question:
        """The question, without anything of the response."""
        turns = self.question if isinstance(self.question, str) else tuple(t.model_dump() for t in self.question)
        return Question(
            question_id=self.question_id,
            category=self.category,
            text=turns,
            reference=None if self.reference is None else str(self.reference),
            tests=self.tests,
            entry_point=self.entry_point,
            metadata=self.to_metadata(),
        )

    def to_metadata(self) -> dict[str, Any]:
        """The further fields, IFEval's list of instructions among them, on which a rubric's conditions may look."""
        ids = self.instruction_id_list
        return {**(self.metadata or {}), **({"instruction_id_list": ids} if ids is not None else {})}

    def to_items(self) -> list[Item]:
        """The items of this question alone: its own, and one for each of IFEval's instructions."""
        items = list(self.items or [])
        if self.kwargs is not None and self.instruction_id_list is None:
            raise ValueError("kwargs: goes only with instruction_id_list")
        if self.instruction_id_list is not None:
            from grape.checkers.instructions import instruction_items

            kwargs = self.kwargs if self.kwargs is not None else [{} for _ in self.instruction_id_list]
            made = instruction_items(self.instruction_id_list, kwargs, self.instruction_form)
            items += [Item.model_validate(item) for item in made]
        distinct_ids(items)
        return items


class Row(QuestionRow):
    """One response to score, with its question."""

    response: str
    response_id: Annotated[str | None, BeforeValidator(_id)] = None


AnyRow = TypeVar("AnyRow", bound=QuestionRow)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of a source, grouped: questions by id, each with its own items and the place where it first stands."""

    source: str
    questions: dict[str, Question] = field(default_factory=dict)
    items: dict[str, list[Item]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    responses: list[Response] = field(default_factory=list)


def read_rows(source: str | Path | Iterable[Mapping[str, Any]]) -> Rows:
    """All rows of a ``.jsonl`` (or ``.jsonl.gz``) or ``.parquet`` file, or of any iterable of mappings.

    The first row that is wrong raises a `ConfigError` with its line, the field, the value and what is known.
    """
    rows = Rows(source=str(source) if isinstance(source, str | Path) else "rows")
    seen: dict[str, str] = {}
    positions: dict[str, Iterator[int]] = {}
    for place, data in read(source):
        row = parse(place, data, Row)
        position = next(positions.setdefault(row.question_id, count()))
        response_id = f"{row.question_id}-{position}" if row.response_id is None else row.response_id
        if response_id in seen:
            raise ConfigError(f"{place}: response_id: {response_id!r} stands already in {seen[response_id]}")
        seen[response_id] = place
        _join(rows, row.to_question(), items_of(row, place), place)
        response = Response(
            response_id=response_id, question_id=row.question_id, text=row.response, metadata=row.to_metadata()
        )
        rows.responses.append(response)
    if not rows.responses:
        raise ConfigError(f"{rows.source}: no rows")
    return rows


def _join(rows: Rows, question: Question, items: list[Item], place: str) -> None:
    """Add a question, or see that it is the one which its id stood for before."""
    known = rows.questions.setdefault(question.question_id, question)
    if known is question:
        rows.items[question.question_id] = items
        rows.places[question.question_id] = place
        return
    own = [f.name for f in fields(Question) if f.name != "metadata"]  # metadata may tell the responses apart
    unlike = [name for name in own if getattr(known, name) != getattr(question, name)]
    if rows.items[question.question_id] != items:
        unlike.append("items")
    if unlike:
        name = "question" if unlike[0] == "text" else unlike[0]
        raise ConfigError(
            f"{place}: {name}: question_id {question.question_id!r} has another {name} in "
            f"{rows.places[question.question_id]}"
        )


def items_of(row: QuestionRow, place: str) -> list[Item]:
    """The items of a row's question alone. What is wrong with them is a `ConfigError` of one line."""
    try:
        return row.to_items()
    except ValidationError as error:
        raise invalid(place, error) from error
    except ValueError as error:
        raise ConfigError(f"{place}: {one_line(error).removeprefix('.')}") from error


def parse(place: str, data: Any, model: type[AnyRow], columns: Iterable[str] = ()) -> AnyRow:
    """One row, strictly. What is wrong with it, be it no JSON even, is a `ConfigError` of one line.

    ``columns`` are what the row had, where its fields are called otherwise.
    """
    if isinstance(data, ConfigError):
        raise data
    try:
        row = model.model_validate(data)
        if row.metadata and not _plain(row.metadata):
            raise ConfigError(f"{place}: metadata: not plain data of text keys, nested at most {MAX_DEPTH} deep")
        return row
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        line = invalid(place, error, keys_at(error, model))
        if any(fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1 for fault in error.errors()):
            raise ConfigError(f"{line}; further fields go under metadata") from error
        if fault["type"] == "missing" and isinstance(data, Mapping):
            raise ConfigError(f"{line}; the row has: {', '.join(map(str, columns or data))}") from error
        raise line from error


def read(source: str | Path | Iterable[Mapping[str, Any]], name: str | None = None) -> Iterator[tuple[str, Any]]:
    """Each row with its place, for messages: the file or the ``name``, and the line or row.

    A line that is not JSON comes as the `ConfigError` that says so, and those after it still come.
    """
    if not isinstance(source, str | Path):
        for number, row in enumerate(source, 1):
            place = f"{name}: row {number}" if name else f"row {number}"
            yield place, given(row) if isinstance(row, Mapping) else row
    elif Path(source).suffix == ".parquet":
        yield from _read_parquet(Path(source))
    else:
        yield from _read_lines(Path(source))


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}: line {number}", _json(f"{path}: line {number}", line)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _json(place: str, line: bytes) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(items)
        if len(data) < len(items):
            twice = next(key for key, _ in items if sum(key == other for other, _ in items) > 1)
            raise ValueError(f"duplicate key {twice!r}")
        return data

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        return ConfigError(f"{place}: not JSON: {one_line(error)}")


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import duckdb

    source = [re.sub(r"([*?\[])", r"[\1]", str(path))]  # a name is a name, and no pattern
    try:
        with duckdb.connect() as connection:
            columns = connection.execute("describe from read_parquet(?)", source).fetchall()
            zoned = ", ".join(f'"{name}"::varchar as "{name}"' for name, kind, *_ in columns if "TIME ZONE" in kind)
            replaced = f" replace ({zoned})" if zoned else ""  # a moment with a zone is read as its text
            cursor = connection.execute(f"select *{replaced} from read_parquet(?)", source)
            names = [column[0] for column in cursor.description]
            number = 0
            while batch := cursor.fetchmany(1000):
                for values in batch:
                    number += 1
                    yield f"{path}: row {number}", given(dict(zip(names, values, strict=True)))
    except duckdb.Error as error:
        raise ConfigError(f"{path}: {one_line(str(error).splitlines()[0])}") from error


def _plain(value: Any, depth: int = 0) -> bool:
    """Whether a value can be stored as JSON: a circle is as deep as can be."""
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item, depth + 1) for key, item in value.items())
    return all(_plain(item, depth + 1) for item in value) if isinstance(value, list | tuple) else True


def given(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the fields that only fill a column: those that are None, and in its items at any depth."""
    return {key: _dense(value) if key == "items" else value for key, value in row.items() if value is not None}


def _dense(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _dense(item) for key, item in value.items() if item is not None}
    return [_dense(item) for item in value] if isinstance(value, list | tuple) else value
