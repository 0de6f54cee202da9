"""`grape sql`: one read-only query over the critique log, confined to it, and its result in five formats."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, Literal

import duckdb

from grape.errors import ConfigError, LogError
from grape.log.database import connect, fault, schema_version
from grape.log.tables import BOOKKEEPING
from grape.log.writer import recover

Format = Literal["table", "csv", "json", "jsonl", "parquet"]
CONFINED = {
    "enable_external_access": False,  # no file but the log, no network
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "python_enable_replacements": False,  # no variable of the calling program
}
QUERIES = {"SELECT", "EXPLAIN", "MULTI"}  # DESCRIBE and SUMMARIZE are the first to DuckDB, PIVOT is the last
RECOVERY = 2.0  # seconds that recovering what a killed run left may wait for the file
ROWS_SHOWN = 500  # on a terminal
CELL_PIPED, CELL_SHOWN = 100, 500  # characters of a cell in a table
NARROWEST = 12  # columns of a terminal below which a table's column is no longer read
NUMERIC = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT",
           "UHUGEINT", "FLOAT", "DOUBLE", "DECIMAL")  # fmt: skip
# What steers a terminal or reorders its text: controls, and marks of direction.
STEERING = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb]")
ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
LISTING = f"""
SELECT table_name AS name, 'table' AS kind, estimated_size AS rows, comment FROM duckdb_tables()
WHERE NOT internal AND table_name NOT IN {BOOKKEEPING!r}
UNION ALL
SELECT view_name, 'view', NULL, comment FROM duckdb_views() WHERE NOT internal
ORDER BY kind, name"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a query gives: ``pandas.DataFrame(result.rows, columns=result.columns)`` makes a frame of it.

    ``types`` are DuckDB's, as it writes them. Times are UTC.
    """

    columns: tuple[str, ...]
    types: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def sql(query: str | None = None, log: str | Path = "critiques.duckdb") -> Result:
    """Ask the log one query; without one, list its tables and views (``FROM dictionary`` lists their columns).

    The connection is read-only and reaches no other file and no network. Rows that a killed run left in its spool are
    stored first. LogError if the log cannot be read, ConfigError of one line if the query is wrong.
    """
    path = Path(log)
    try:
        recover(path, RECOVERY)
    except (LogError, OSError) as error:
        logger.warning("what a killed run left beside the log cannot be seen yet: %s", error)
    with connect(path, read_only=True, config=CONFINED) as connection:
        schema_version(connection, path)
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET lock_configuration = true")  # and none of this can be undone
        try:
            return _ask(connection, _statement(connection, LISTING if query is None else query))
        except duckdb.Error as error:
            raise ConfigError(f"query: {fault(error)}") from error


def _statement(connection: duckdb.DuckDBPyConnection, query: str) -> str:
    """The text of the one statement in a query, which must be one that asks."""
    try:
        kinds = [(str(s.type).rpartition(".")[2], s.query) for s in connection.extract_statements(query)]
    except ValueError:  # a kind of statement that the client cannot name
        kinds = [("unknown", query)]
    if len(kinds) != 1:
        raise ConfigError(f"query: one statement is meant, not {len(kinds)}")
    ((kind, text),) = kinds
    if kind not in QUERIES:
        raise ConfigError(f"query: {kind} is not allowed: the log is read-only here, ask with SELECT")
    return text.strip().rstrip(";")


def _ask(connection: duckdb.DuckDBPyConnection, query: str) -> Result:
    """The rows of a statement, times with a zone as plain UTC: fetched as they are, they would need another package."""
    cursor = connection.execute(query)
    columns, types = [d[0] for d in cursor.description], [str(d[1]) for d in cursor.description]
    if any("TIMESTAMP WITH TIME ZONE" in kind for kind in types):
        values = [
            f"c{number} AT TIME ZONE 'UTC'" if kind == "TIMESTAMP WITH TIME ZONE"
            else f"c{number}::VARCHAR" if "TIMESTAMP WITH TIME ZONE" in kind
            else f"c{number}"
            for number, kind in enumerate(types)
        ]  # fmt: skip
        names = ", ".join(f"c{number}" for number in range(len(types)))
        cursor = connection.execute(f"SELECT {', '.join(values)} FROM ({query}\n) AS t({names})")
        types = [str(d[1]) for d in cursor.description]
    return Result(columns=tuple(columns), types=tuple(types), rows=cursor.fetchall())


def render(result: Result, format: Format, stream: IO[Any]) -> None:
    """Write a result. What a terminal gets is free of control characters; ``parquet`` is bytes, and not for one."""
    terminal = stream.isatty()
    if format == "parquet":
        if terminal:
            raise ConfigError("parquet is bytes, not for a terminal: redirect it, as in `grape sql ... > FILE`")
        getattr(stream, "buffer", stream).write(_parquet(result))
        return
    if format == "table":
        lines = _shown(result, stream) if terminal else _aligned(result)
    else:
        lines = {"csv": _csv, "json": _json, "jsonl": _jsonl}[format](result)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    for line in lines:
        safe = line if format == "table" or not terminal else clean(line, keep="\n")
        stream.write(safe.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def clean(text: str, keep: str = "") -> str:
    """Text in which whatever would steer a terminal is spelled out, as in JSON."""
    return STEERING.sub(lambda m: m[0] if m[0] in keep else ESCAPES.get(m[0], f"\\u{ord(m[0]):04x}"), text)


def plain(value: Any, kind: str = "") -> Any:
    """A value as JSON has it: times in ISO 8601, what is not finite null, bytes in hexadecimal."""
    if isinstance(value, str) and kind == "JSON":
        return plain(json.loads(value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, bytes | bytearray):
        return bytes(value).hex()
    if isinstance(value, dict):
        return {_text(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)


def _text(value: Any, missing: str = "") -> str:
    if value is None:
        return missing
    if isinstance(value, bool | dict | list | tuple):
        return _dumps(plain(value))
    return str(value if isinstance(value, str | float | Decimal) else plain(value))


def _dumps(value: Any) -> str:
    return clean(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _names(result: Result) -> list[str]:
    """The columns' names, told apart where a query gives one twice."""
    seen: list[str] = []
    for name in result.columns:
        tries = (name, *(f"{name}_{number}" for number in range(1, len(result.columns) + 1)))
        seen.append(next(candidate for candidate in tries if candidate not in seen))
    return seen


def _csv(result: Result) -> Iterator[str]:
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\r\n")  # its characters are what is quoted beside commas
    for row in [result.columns, *result.rows]:
        writer.writerow([_text(value) for value in row])
        yield line.getvalue().removesuffix("\r\n")
        line.seek(0)
        line.truncate()


def _jsonl(result: Result) -> Iterator[str]:
    names = _names(result)
    for row in result.rows:
        yield _dumps({n: plain(v, kind) for n, v, kind in zip(names, row, result.types, strict=True)})


def _json(result: Result) -> Iterator[str]:
    yield "["
    last = len(result.rows) - 1
    for number, line in enumerate(_jsonl(result)):
        yield line if number == last else line + ","
    yield "]"


def _parquet(result: Result) -> bytes:
    """A Parquet file, by way of a table with the result's own types."""
    with duckdb.connect() as connection, tempfile.TemporaryDirectory() as folder:
        names = ['"' + name.replace('"', '""') + '"' for name in _names(result)]
        types = ["INTEGER" if kind in {"NULL", '"NULL"'} else kind for kind in result.types]
        try:
            connection.execute(f"CREATE TABLE result ({', '.join(map(' '.join, zip(names, types, strict=True)))})")
            if result.rows:
                appender = connection.appender("result")
                appender.append_rows(result.rows)
                appender.flush()
            connection.execute(f"COPY result TO '{folder}/result.parquet' (FORMAT parquet)")
        except duckdb.Error as error:
            raise ConfigError(f"query: its result does not fit Parquet: {fault(error)}") from error
        return Path(folder, "result.parquet").read_bytes()


def _cell(value: Any, width: int) -> str:
    """A value on one line of a table: short, and harmless to a terminal."""
    if isinstance(value, float) and math.isfinite(value):
        text = f"{value:.6g}" if abs(value) < 1e6 else f"{value:.0f}"
    else:
        text = clean(_text(value, "NULL")[: width + 1])
    return text if len(text) <= width else text[: width - 1] + "…"


def _aligned(result: Result, width: int = CELL_PIPED) -> Iterator[str]:
    """Plain text in columns, numbers to the right."""
    from rich.cells import cell_len

    rows = [[_cell(value, width) for value in row] for row in [result.columns, *result.rows]]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    numeric = [kind.startswith(NUMERIC) for kind in result.types]
    rows.insert(1, ["-" * wide for wide in widths])
    for row in rows:
        padded = [
            " " * (wide - cell_len(cell)) + cell if right else cell + " " * (wide - cell_len(cell))
            for cell, wide, right in zip(row, widths, numeric, strict=True)
        ]
        yield "  ".join(padded).rstrip()


def _shown(result: Result, stream: IO[Any]) -> Iterator[str]:
    """A table as wide as the terminal; where its columns do not fit, each row as a list of its values."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream)
    shown = Result(columns=result.columns, types=result.types, rows=result.rows[:ROWS_SHOWN])
    if len(result.columns) * NARROWEST > console.width:
        label = max(map(len, result.columns))
        for row in shown.rows:
            for name, value in zip(result.columns, row, strict=True):
                yield f"{clean(name):>{label}}  {_cell(value, CELL_SHOWN)}"
            yield ""
    else:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="")
        for name, kind in zip(result.columns, result.types, strict=True):
            side: Literal["left", "right"] = "right" if kind.startswith(NUMERIC) else "left"
            table.add_column(Text(clean(name)), justify=side, overflow="fold")
        for row in shown.rows:
            table.add_row(*(Text(_cell(value, CELL_SHOWN)) for value in row))
        with console.capture() as captured:
            console.print(table)
        yield "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")
    if hidden := len(result.rows) - len(shown.rows):
        yield f"... and {hidden:,} more rows; --format csv, json, jsonl or parquet gives all"
