"""The critique log: a DuckDB file that many processes write and read, in which nothing is lost or stored twice."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb

from grape.errors import LogError, one_line
from grape.log import database
from grape.log.database import PATIENCE, Busy, connect, read
from grape.log.record import PLAIN, Row, Schema, encode
from grape.log.spool import Segment, Spool, orphans

FLUSH_EVERY = 2.0  # seconds that a row waits in the spool at most while the file is free: each flush opens the file
RETRY_EVERY = 5.0  # seconds between attempts after a fault that is not a lock, such as a full disk
TIDY_BELOW = 8 * 2**20  # bytes in a segment from which on its flush has no time to tidy the file
CLOSING = 10.0  # seconds that closing waits for a file that others hold


logger = logging.getLogger(__name__)


class Log:
    """A writer of the critique log.

    `append` puts one record, rows of one or more tables, into a spool beside the log and returns: from then on a kill
    of this process loses none of it and stores none of it twice. (Not so a power cut: nothing is synced until it is
    in the database.) A thread moves what is queued into the database in one short transaction, every two seconds;
    whoever keeps the file open delays that, and never `append`. What a killed writer left in its spool is stored when
    the log is next opened. Threads may share a Log, processes may each open their own, and a forked child must.
    """

    def __init__(self, path: str | Path) -> None:
        database.refuse_data(Path(path))
        self.path = Path(path).resolve()
        self._owner = os.getpid()
        self._writing = threading.Lock()  # the spool's files
        self._storing = threading.Lock()  # the one connection
        self._queued, self._closing = threading.Event(), threading.Event()
        self._closed = False
        self._spool = Spool(spool_folder(self.path))
        try:
            database.create(self.path, self._spool.draft)
            with connect(self.path) as connection:
                database.migrate(connection, self.path)
                self._schema = writable(connection)
                ((self.secret,),) = connection.execute("SELECT secret FROM meta").fetchall()
                with orphans(self._spool.folder) as segments:
                    _store_all(connection, segments)
        except BaseException:
            self._spool.close()
            raise
        self._thread = threading.Thread(target=self._run, name=f"log {self.path.name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    secret: bytes
    """32 random bytes, made with the log: the key of the marks that fence responses in judge prompts."""

    def append(self, **tables: Iterable[Row]) -> None:
        """Add one record, all of it or nothing: ``append(verdicts=[{...}, ...], rewards=[...])``.

        A key that a row lacks is NULL. LogError for a table or column that is not there, a value of another type, or
        a spool that cannot be written; then nothing was added.
        """
        self._check_open()
        lines = encode(self._schema, tables)
        with self._writing:
            self._check_open()
            if lines:
                try:
                    self._spool.write(lines, {table for table, rows in tables.items() if rows})
                except OSError as error:
                    raise LogError(f"{self._spool.folder}: {error.strerror}") from error
                self._queued.set()

    def flush(self, timeout: float = PATIENCE) -> None:
        """Return when all that was appended before is in the database; `Busy` if the file is not free in time."""
        self._check_open()
        self._store(timeout)

    def query(self, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of one query, which sees all that was appended before."""
        self.flush()
        with self._storing:
            return read(self.path, sql, params)

    def close(self) -> None:
        """Store what is queued. What cannot be stored, because others hold the file, stays for the next opening."""
        if self._owner != os.getpid():
            return
        with self._writing:
            if self._closed:
                return
            self._closed = True
        atexit.unregister(self.close)
        self._closing.set()
        self._queued.set()
        try:
            self._thread.join()
            self._store(CLOSING)
        except Busy as error:
            logger.warning("%s; what waits in %s is stored when it is next opened", error, self._spool.folder)
        finally:
            self._spool.close()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise LogError(f"{self.path}: the log is closed")
        if self._owner != os.getpid():
            raise LogError(f"{self.path}: opened by another process; a forked one opens its own")

    def _run(self) -> None:
        """Flush what is queued, at most two seconds old, until the log is closed."""
        while self._queued.wait() and not self._closing.wait(FLUSH_EVERY):
            self._queued.clear()
            self._persist()

    def _persist(self) -> None:
        """Flush until it succeeds: what is queued waits in the spool meanwhile, and so may whatever is appended."""
        fault = ""
        while not self._closing.is_set():
            try:
                return self._store(FLUSH_EVERY)
            except Busy:
                continue
            except LogError as error:
                if str(error) != fault:
                    fault = str(error)
                    logger.warning("%s; what is appended waits in %s", error, self._spool.folder)
                self._closing.wait(RETRY_EVERY)
        return None

    def _store(self, timeout: float) -> None:
        """Move what the spool holds now into the database."""
        deadline = time.monotonic() + timeout
        if not self._storing.acquire(timeout=timeout):
            raise Busy(f"{self.path}: another thread is still storing")
        try:
            if self._spool.empty:
                return
            segments: list[Segment] | None = None
            while segments is None or segments:
                with connect(self.path, timeout=max(0.0, deadline - time.monotonic())) as connection:
                    with self._writing:
                        segments = self._spool.seal() if segments is None else segments
                    store(connection, self._schema, segments[0])
                with self._writing:
                    self._spool.drop(segments.pop(0))
                if segments:
                    database.pause()  # let readers in
        finally:
            self._storing.release()


def spool_folder(path: Path) -> Path:
    """Where the records of a log wait: beside the file itself, by whatever link it was opened."""
    path = path.resolve()
    return path.with_name(f"{path.name}.spool")


def recover(path: Path, timeout: float = PATIENCE) -> None:
    """Store what killed writers left beside a log, if there is anything and nobody else is about it."""
    with orphans(spool_folder(path)) as segments:
        if segments:
            with connect(path, timeout=timeout) as connection:
                database.schema_version(connection, path)
                _store_all(connection, segments)


def _store_all(connection: duckdb.DuckDBPyConnection, segments: Iterable[Segment]) -> None:
    schema = writable(connection)
    for segment in segments:
        store(connection, schema, segment)
        segment.path.unlink(missing_ok=True)


def writable(connection: duckdb.DuckDBPyConnection) -> Schema:
    """The tables and the columns that rows can be written to."""
    tables = database.columns(connection).items()
    return {table: {name: kind for name, kind in columns.items() if kind in PLAIN} for table, columns in tables}


def store(connection: duckdb.DuckDBPyConnection, schema: Schema, segment: Segment) -> None:
    """Insert the rows of a segment, and in the same transaction note that it is done, so that it is done once.

    A segment that cannot be read (a damaged disk, a hand that edited it) is set aside under another name.
    """
    name, folder = segment.path.name, segment.path.parent
    # Merging older row groups costs half of a flush: at a high rate it waits, and then goes on one merge at a time.
    connection.execute("SET max_vacuum_tasks = ?", [0 if segment.size >= TIDY_BELOW else 1])
    connection.execute("BEGIN")
    try:
        if not connection.execute("SELECT 1 FROM spools WHERE segment = ?", [name]).fetchall():
            for table in sorted(segment.tables):
                connection.execute(_insert(table, schema[table]), [escape(str(segment.path)), segment.longest + 2**20])
            connection.execute("INSERT INTO spools VALUES (?)", [name])
        waiting = [path.name for path in folder.glob("*.jsonl")]
        connection.execute("DELETE FROM spools WHERE NOT list_contains(?::VARCHAR[], segment)", [waiting])
    except (KeyError, duckdb.ConversionException, duckdb.InvalidInputException) as error:
        connection.execute("ROLLBACK")
        aside = segment.path.rename(segment.path.with_suffix(".unreadable"))
        logger.warning("%s: cannot be stored and is kept: %s", aside, one_line(error))
    else:
        connection.execute("COMMIT")


def _insert(table: str, columns: Mapping[str, str]) -> str:
    """The SQL that reads the rows of one table from a segment: its path, and a bound on the bytes of a line."""
    names, fields, values = [], [], []
    for name, kind in columns.items():
        moment = kind == "TIMESTAMP"  # stored in UTC, whatever zone it was given in
        names.append(f'"{name}"')
        fields.append(f'"{name}" {"TIMESTAMPTZ" if moment else kind}')
        values.append(f'{table}."{name}"' + (" AT TIME ZONE 'UTC'" if moment else ""))
    return (
        f"INSERT INTO {table} ({', '.join(names)}) SELECT {', '.join(values)} FROM read_json(?, "
        "format='newline_delimited', sample_size=1, maximum_object_size=?, "
        f"columns={{'{table}': 'STRUCT({', '.join(fields)})'}}) WHERE {table} IS NOT NULL"
    )
