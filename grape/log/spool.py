"""The write-ahead spool: where a record waits, on disk, until the database has it.

Beside the log stands a folder ``<log>.spool``. Each writer owns one name in it: ``<name>.lock``, which it holds locked
for as long as it lives, and segments ``<name>-<number>.jsonl``, whose lines are rows, ``{"table": {..}}``, and in which
an empty line ends a record. A record goes into the file in one `write`, so it outlives the process that wrote it; it
is not synced, so it may not outlive the machine. A lock that nobody holds marks what a killed writer left behind.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from grape.errors import LogError, one_line

SEGMENT_BYTES = 64 * 2**20  # a segment is sealed beyond this, so that one transaction stays of moderate size


@dataclass(slots=True, kw_only=True)
class Segment:
    """A file of whole records, the tables that have rows in it, and the length of its longest line in bytes."""

    path: Path
    tables: set[str] = field(default_factory=set)
    longest: int = 0
    size: int = 0


class Spool:
    """One writer's own part of the spool. Not thread-safe: the log serializes its use."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        self._file = -1
        self._segment: Segment | None = None
        self.sealed: list[Segment] = []
        self.name, self._lock = _own(folder)
        _open_spools.add(self)

    def write(self, lines: list[bytes], tables: set[str]) -> None:
        """Add one record: when this returns, the record is the operating system's and survives a kill."""
        record = b"".join(lines) + b"\n"
        if self._segment is None:
            self._number += 1
            path = self.folder / f"{self.name}-{self._number:06}.jsonl"
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._segment = Segment(path=path)
        segment = self._segment
        try:
            written = 0
            while written < len(record):
                written += os.write(self._file, record[written:] if written else record)
        except OSError:
            os.ftruncate(self._file, segment.size)  # half a record would spoil the next
            raise
        segment.size += len(record)
        segment.tables |= tables
        segment.longest = max(segment.longest, max(map(len, lines)))
        if segment.size >= SEGMENT_BYTES:
            self.seal()

    def seal(self) -> list[Segment]:
        """Close the segment that is being written; all that are closed and not yet dropped, oldest first."""
        if self._segment is not None:
            os.close(self._file)
            self.sealed.append(self._segment)
            self._file, self._segment = -1, None
        return list(self.sealed)

    def drop(self, segment: Segment) -> None:
        """Forget a segment whose rows the database has."""
        segment.path.unlink(missing_ok=True)
        self.sealed.remove(segment)

    @property
    def draft(self) -> Path:
        """A file that is this writer's alone."""
        return self.folder / f"{self.name}.duckdb"

    @property
    def empty(self) -> bool:
        """Whether everything written has been dropped."""
        return self._segment is None and not self.sealed

    def close(self) -> None:
        """Let go. What has not been dropped stays for whoever opens the log next."""
        _open_spools.discard(self)
        self.seal()
        if self.empty:
            _lock_path(self.folder, self.name).unlink(missing_ok=True)
        os.close(self._lock)
        _remove(self.folder)

    def disown(self) -> None:
        """In a forked child: let go of the descriptors, so that the files stay the parent's alone."""
        os.close(self._lock)
        if self._file >= 0:
            os.close(self._file)


_open_spools: weakref.WeakSet[Spool] = weakref.WeakSet()


def _disown_all() -> None:
    for spool in list(_open_spools):
        spool.disown()
    _open_spools.clear()


os.register_at_fork(after_in_child=_disown_all)


def _lock_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.lock"


def _remove(folder: Path) -> None:
    with suppress(OSError):  # somebody else's files are in it
        folder.rmdir()


def _own(folder: Path) -> tuple[str, int]:
    """A name of one's own in the folder, and the descriptor that holds its lock."""
    for _ in range(100):
        name = uuid4().hex
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(_lock_path(folder, name), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another writer closed and took the folder along
            continue
        except OSError as error:
            raise LogError(f"{str(folder).removesuffix('.spool')}: {error.strerror}") from error
        if _hold(lock):
            return name, lock
        os.close(lock)  # taken for an orphan in the moment before it was locked
    raise LogError(f"{str(folder).removesuffix('.spool')}: no such folder")


def _hold(lock: int) -> bool:
    """Lock an open lock file without waiting; False if somebody holds it or has removed it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise LogError(f"cannot lock files beside the log: {one_line(error.strerror)}") from error
    return os.fstat(lock).st_nlink > 0


@contextmanager
def orphans(folder: Path) -> Iterator[list[Segment]]:
    """Claim what killed writers left, oldest first; inside the block the caller stores each and unlinks it."""
    claimed: list[tuple[Path, int]] = []
    segments: list[Segment] = []
    try:
        for path in sorted(folder.glob("*.lock")):
            with suppress(FileNotFoundError, PermissionError):
                lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                if not _hold(lock):
                    os.close(lock)
                    continue
                claimed.append((path, lock))
                segments += map(_scan, sorted(folder.glob(f"{path.stem}-*.jsonl")))
        yield sorted(segments, key=lambda segment: segment.path.stat().st_mtime_ns)
    finally:
        for path, lock in claimed:
            if not list(folder.glob(f"{path.stem}-*.jsonl")):
                for leftover in folder.glob(f"{path.stem}.*"):
                    leftover.unlink()
            os.close(lock)
        if claimed:
            _remove(folder)


def _scan(path: Path) -> Segment:
    """A segment as it was left: a record that the kill cut short was never acknowledged, and is cut off."""
    segment = Segment(path=path)
    tables: set[str] = set()
    longest = position = 0
    with path.open("r+b") as file:
        for line in file:
            position += len(line)
            if line == b"\n":
                segment.size = position
                segment.tables |= tables
                segment.longest = max(segment.longest, longest)
                tables.clear()
            elif line.endswith(b"}\n"):
                tables.add(line[2 : line.find(b'"', 2)].decode("utf-8", "replace"))
                longest = max(longest, len(line))
        file.truncate(segment.size)
    return segment
