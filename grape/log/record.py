"""What one `append` writes: rows of several tables as lines of JSON, checked against the columns they go to.

Everything is refused here that the database would refuse later, so that what has been spooled can always be stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from itertools import islice
from numbers import Integral, Real
from typing import Any

import orjson

from grape.errors import LogError, known, one_line

Row = Mapping[str, Any]
Schema = Mapping[str, Mapping[str, str]]  # table -> column -> DuckDB type
OPTIONS = orjson.OPT_NAIVE_UTC | orjson.OPT_SERIALIZE_NUMPY
CHUNK = 10_000  # rows that are checked and encoded at a time
BITS = {"INTEGER": 31, "BIGINT": 63}
NONE = type(None)
# What goes through as it is; anything else takes the slow way through `CONVERT`.
PLAIN: dict[str, set[type]] = {
    "VARCHAR": {str, NONE},
    "INTEGER": {int, NONE},
    "BIGINT": {int, NONE},
    "DOUBLE": {float, int, NONE},
    "BOOLEAN": {bool, NONE},
    "TIMESTAMP": {datetime, NONE},
    "JSON": {dict, list, NONE},
    "MAP(VARCHAR, DOUBLE)": {NONE},
}


def encode(schema: Schema, tables: Mapping[str, Iterable[Row]]) -> list[bytes]:
    """The lines of one record. Numbers that are not finite are null; text outside Unicode is replaced, never refused.

    LogError names the table, column and value of what does not fit.
    """
    lines: list[bytes] = []
    for table, rows in tables.items():
        if table not in schema:
            raise LogError(f"the log has no table {table!r}; {known(schema, table)}")
        if isinstance(rows, Mapping):
            raise LogError(f"{table}: a list of rows is meant, not one row")
        head = b'{"' + table.encode() + b'":'
        remaining = iter(rows)
        while chunk := list(islice(remaining, CHUNK)):  # a generator's rows are never all in memory
            lines += [head + row + b"}\n" for row in _dump(table, _checked(table, schema[table], chunk))]
    return lines


def _dump(table: str, rows: Sequence[Row]) -> list[bytes]:
    try:
        return [orjson.dumps(row, option=OPTIONS) for row in rows]
    except TypeError:  # text outside Unicode, keys that are no text, integers beyond 64 bits, mappings that are no dict
        pass
    try:
        return [orjson.dumps(plain(row), option=OPTIONS) for row in rows]
    except (TypeError, RecursionError) as error:
        raise LogError(f"{table}: {one_line(error)}") from error


def _checked(table: str, columns: Mapping[str, str], rows: list[Row]) -> list[Row]:
    """The rows with every value of a type that its column takes."""
    checked: list[Row] = []
    for row in rows:
        changed: dict[str, Any] = {}
        for name, value in row.items():
            kind = columns.get(name)
            if kind is None:
                raise LogError(f"{table} has no column {name!r}; {known(columns, str(name))}")
            if type(value) not in PLAIN[kind]:
                value = changed[name] = _convert(table, name, kind, value)
            if kind in BITS and value is not None and value.bit_length() > BITS[kind]:
                raise LogError(f"{table}.{name}: {one_line(value, 60)} is too large for {kind}")
        checked.append({**row, **changed} if changed else row)
    return checked


def _convert(table: str, name: str, kind: str, value: Any) -> Any:
    if value is None:
        return None
    try:
        return CONVERT[kind](value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LogError(f"{table}.{name}: {one_line(repr(value), 60)} is no {kind}: {one_line(error)}") from error


def _text(value: Any) -> str:
    """Text as it is, an enum's value, and anything else as JSON."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        return str(value)
    return orjson.dumps(plain(value), option=OPTIONS).decode().strip('"')


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"a {type(value).__name__}")
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"a {type(value).__name__}")
    return float(value)


def _truth(value: Any) -> bool:
    if type(value).__name__ not in {"bool", "bool_"}:  # NumPy's own is no subclass of bool
        raise TypeError(f"a {type(value).__name__}")
    return bool(value)


def _moment(value: Any) -> datetime:
    """A moment in UTC. Without a zone it is taken to be UTC."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        raise TypeError(f"a {type(value).__name__}")
    moment = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return datetime.combine(moment.date(), moment.time(), UTC)


def _document(value: Any) -> Any:
    """JSON; a str is JSON text already, and must be."""
    if not isinstance(value, str):
        return plain(value)
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return plain(json.loads(value))  # also takes NaN, lone surrogates and integers of any length


def _numbers(value: Any) -> dict[str, float | None]:
    return {_text(key): None if number is None else _number(number) for key, number in dict(value).items()}


CONVERT: dict[str, Callable[[Any], Any]] = {
    "VARCHAR": _text,
    "INTEGER": _integer,
    "BIGINT": _integer,
    "DOUBLE": _number,
    "BOOLEAN": _truth,
    "TIMESTAMP": _moment,
    "JSON": _document,
    "MAP(VARCHAR, DOUBLE)": _numbers,
}


def plain(value: Any) -> Any:
    """The value as JSON can hold it: surrogate pairs joined, lone ones replaced, integers beyond 64 bits as text."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {plain(key) if isinstance(key, str) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return str(value)
    return value
