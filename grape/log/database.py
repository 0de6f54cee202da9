"""Short connections to the log's DuckDB file.

DuckDB lets one process write, or several read, so a connection is opened late, closed early, and asked for again while
somebody else has the file.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from grape.errors import LogError, one_line
from grape.log.tables import BOOKKEEPING, MIGRATIONS
from grape.log.views import VIEWS

PATIENCE = 60.0  # seconds that a reader or a writer waits for the file before it gives up
LONGEST_PAUSE = 0.1  # seconds between two attempts
_jitter = random.SystemRandom()  # leaves the user's seeded generator alone
DATA = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".yaml", ".py"}
# The file is another process's, or has in this one a connection of another kind, or one that is just closing.
HELD = re.compile(r"Could not set lock on|with a different configuration than existing|Unique file handle conflict")
HOLDER = re.compile(r"\(PID (\d+)\)")


class Busy(LogError):
    """Another process, or another connection of this one, has the log's file and has not let go in time."""


@contextmanager
def connect(
    path: Path, *, read_only: bool = False, timeout: float = PATIENCE, config: Mapping[str, Any] | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection for the length of a block. `Busy` after ``timeout`` s; `LogError` for whatever DuckDB reports."""
    connection = _open(path, read_only, timeout, dict(config or {}))
    try:
        yield connection
        connection.close()
    except duckdb.Error as error:
        raise LogError(f"{path}: {fault(error)}") from error
    finally:
        connection.close()


def _open(path: Path, read_only: bool, timeout: float, config: dict[str, Any]) -> duckdb.DuckDBPyConnection:
    deadline = time.monotonic() + timeout
    longest = LONGEST_PAUSE / 16
    while True:
        try:
            return duckdb.connect(str(path), read_only=read_only, config=config)
        except duckdb.Error as error:
            if not HELD.search(str(error)):
                raise LogError(_unopenable(path, error)) from error
            if time.monotonic() >= deadline:
                holder = HOLDER.search(str(error))
                who = f"process {holder[1]}" if holder else "this process"
                raise Busy(f"{path}: in use by {who}, and was not free within {timeout:.3g} s") from error
        pause(longest)
        longest = min(2 * longest, LONGEST_PAUSE)


def pause(longest: float = LONGEST_PAUSE) -> None:
    """Let go for a random time, so that those who want the file do not ask for it in step."""
    time.sleep(_jitter.uniform(0, longest))


def refuse_data(path: Path) -> None:
    """DuckDB opens a data file as a database of one table, by its name; a log is never one."""
    if {suffix.lower() for suffix in path.suffixes} & DATA:
        raise LogError(f"{path}: a data file by its name, not a log (name it *.duckdb)")


def _unopenable(path: Path, error: duckdb.Error) -> str:
    if path.is_dir():
        return f"{path}: a folder, not a log"
    if "not a valid DuckDB database" in str(error):
        return f"{path}: not a DuckDB file"
    if not path.exists():
        return f"{path}: no such log"
    return f"{path}: {fault(error)}"


def fault(error: duckdb.Error) -> str:
    """What DuckDB complains of, in one line: without its name for the error and the drawing of the place."""
    message = re.split(r"\n\nLINE \d+:|\n\s*Traceback", str(error), maxsplit=1)[0]
    return one_line(re.sub(r"^[A-Z]\w*(?: \w+)? Error: ", "", message), 300)


def schema_version(connection: duckdb.DuckDBPyConnection, path: Path) -> int:
    """How many migrations the file has seen; LogError if it is no log, or a newer grape's."""
    tables = {name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
    if "meta" not in tables:
        if tables:
            raise LogError(f"{path}: not a critique log: a database with tables of its own ({min(tables)}, ...)")
        return 0
    ((version,),) = connection.execute("SELECT schema_version FROM meta").fetchall()
    if version > len(MIGRATIONS):
        newer = f"its schema is version {version}, of a newer grape"
        raise LogError(f"{path}: {newer}; this one knows {len(MIGRATIONS)}: upgrade grape-rl")
    return int(version)


def migrate(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Bring a log of an older schema up to this one's, in one transaction. What users added is left alone."""
    version = schema_version(connection, path)
    if version == len(MIGRATIONS):
        return
    connection.execute("BEGIN")
    for script in MIGRATIONS[version:]:
        connection.execute(script)
    connection.execute(VIEWS)
    if version == 0:
        connection.execute("INSERT INTO meta VALUES (0, ?)", [secrets.token_bytes(32)])
    connection.execute("UPDATE meta SET schema_version = ?", [len(MIGRATIONS)])
    connection.execute("COMMIT")


def create(path: Path, draft: Path) -> None:
    """A new log, unless there is one. Drafted beside it, it appears whole, however many processes try at once."""
    if "?" in str(path):
        raise LogError(f"{path}: DuckDB cannot write to a path with a question mark")
    if path.exists():
        return
    try:
        with connect(draft) as connection:
            migrate(connection, draft)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another process was first
        except OSError:  # no hard links on this file system
            if not path.exists():
                draft.rename(path)
    except OSError as error:
        raise LogError(f"{path}: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)


def columns(connection: duckdb.DuckDBPyConnection) -> dict[str, dict[str, str]]:
    """The tables of the log with the type of each column, bookkeeping left out."""
    schema: dict[str, dict[str, str]] = {}
    for table, name, kind in connection.execute(
        "SELECT table_name, column_name, data_type FROM duckdb_columns() "
        "WHERE table_oid IN (SELECT table_oid FROM duckdb_tables()) ORDER BY table_oid, column_index"
    ).fetchall():
        if table not in BOOKKEEPING:
            schema.setdefault(table, {})[name] = kind
    return schema


def read(
    path: str | Path, sql: str, params: Sequence[Any] | Mapping[str, Any] = (), timeout: float = PATIENCE
) -> list[tuple[Any, ...]]:
    """The rows of one query by a short read-only connection, for processes that do not write."""
    with connect(Path(path), read_only=True, timeout=timeout) as connection:
        schema_version(connection, Path(path))
        return connection.execute(sql, params).fetchall()
