"""Rows to a file of the user's choice: JSON lines, Parquet, or a folder of `datasets`; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grape.errors import ConfigError, known, one_line
from grape.log.database import fault
from grape.log.tables import quote
from grape.records import Record
from grape.scoring import check_out, write_lines

SUFFIXES = (".jsonl", ".parquet")
TEXT, NUMBER, TRUTH = "VARCHAR", "DOUBLE", "BOOLEAN"
MESSAGES = "STRUCT(role VARCHAR, content VARCHAR)[]"
ASKED = "a text, or messages"  # of a question: in a file of columns either all are texts or all are messages
WRITTEN_BY_DATASETS = ("dataset_info.json", "state.json")


def check_target(out: str | Path, log: str | Path, *, folders: bool = False, replace: bool = False) -> None:
    """Refuse, before any work, what cannot be written: `ConfigError` of one line.

    With ``folders`` a name without a suffix is a folder of `datasets`. Without ``replace`` nothing that exists is.
    """
    path = Path(out)
    try:
        folder, exists = is_folder(path), path.exists()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{one_line(out, 100)}: {getattr(error, 'strerror', None) or error}") from error
    if not (folders if folder else path.suffix.lower() in SUFFIXES):
        kinds = f"{'.jsonl, .parquet' if folders else '.jsonl and .parquet'}{', or a folder (no suffix)' * folders}"
        raise ConfigError(f"{out}: rows are written as {kinds}, not {path.suffix or 'a folder'}")
    if exists and not replace:
        raise ConfigError(f"{out}: exists already; --force replaces it")
    if not folder:
        return check_out(path, [log])
    if find_spec("datasets") is None:
        raise ConfigError(f"{out}: a folder is written by the package datasets: pip install 'grape-rl[train]'")
    if exists and not (path.is_dir() and (_by_datasets(path) or not any(path.iterdir()))):
        raise ConfigError(f"{out}: not a folder that datasets wrote: it is not replaced")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{out}: No such file or directory")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ConfigError(f"{out}: Permission denied")
    return None


def is_folder(path: Path) -> bool:
    """Whether a folder of `datasets` is meant."""
    return path.is_dir() or not path.suffix


def _by_datasets(folder: Path) -> bool:
    return all((folder / name).is_file() for name in WRITTEN_BY_DATASETS)


def write_rows(out: str | Path, rows: Sequence[Record], columns: Mapping[str, str]) -> None:
    """Write rows with these columns and types, in their order; beside the file first, and moved onto it when whole."""
    path = Path(out)
    if not is_folder(path) and path.suffix.lower() == ".jsonl":
        return write_lines(path, rows)
    rows, types = _uniform(rows, columns)
    if is_folder(path):
        return _write_folder(path, rows, types)
    with _draft(path) as draft:
        _write_parquet(draft, rows, types, str(out))
        draft.replace(path.resolve())
    return None


def _uniform(rows: Sequence[Record], columns: Mapping[str, str]) -> tuple[Sequence[Record], dict[str, str]]:
    """Rows whose questions are of one type: where one is a chat, a text is a chat of one message."""
    types = dict(columns)
    for name in (name for name, kind in columns.items() if kind == ASKED):
        chats = any(isinstance(row[name], list) for row in rows)
        types[name] = MESSAGES if chats else TEXT
        if chats:
            rows = [{**row, name: _as_chat(row[name])} for row in rows]
    return rows, types


def _as_chat(question: Any) -> Any:
    return [{"role": "user", "content": question}] if isinstance(question, str) else question


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A place beside the file, empty again afterwards."""
    path = path.resolve()
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield draft
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or one_line(error)}") from error
    finally:
        for left in (draft, draft.with_name(f"{draft.name}.jsonl")):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            left.unlink(missing_ok=True)


def _write_parquet(draft: Path, rows: Sequence[Record], types: Mapping[str, str], name: str) -> None:
    """By way of JSON lines, which DuckDB reads in the types that are given and in their order."""
    import duckdb

    lines, longest = draft.with_name(f"{draft.name}.jsonl"), 0
    with lines.open("wb") as file:
        for number, row in enumerate(rows, 1):
            try:
                line = json.dumps({key: row[key] for key in types}, ensure_ascii=False).encode() + b"\n"
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"{name}: row {number}: holds half of a surrogate pair, which is no text there: write .jsonl"
                ) from error
            longest = max(longest, len(line))
            file.write(line)
    fields = ", ".join(f"{quote(key)}: {quote(kind)}" for key, kind in types.items())
    source = (
        f"read_json(?, format='newline_delimited', maximum_object_size={longest + 2**20}, columns={{{fields}}})"
        if rows
        else f"(SELECT {', '.join(f'NULL::{kind} AS {key}' for key, kind in types.items())}) WHERE false"
    )
    try:
        with duckdb.connect() as connection:
            connection.execute(
                f"COPY (SELECT * FROM {source}) TO {quote(str(draft))} (FORMAT parquet)",
                [[str(lines)]] if rows else [],
            )
    except duckdb.Error as error:
        raise ConfigError(f"{name}: {fault(error)}") from error


def _write_folder(path: Path, rows: Sequence[Record], types: Mapping[str, str]) -> None:
    import datasets
    import pyarrow.parquet

    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # noise beside the command's own
    try:
        with _draft(path) as draft:
            _write_parquet(draft, rows, types, str(path))
            table = pyarrow.parquet.read_table(draft)
            draft.unlink()
            datasets.Dataset(table).save_to_disk(str(draft))
            if path.is_dir():
                shutil.rmtree(path)
            draft.replace(path.resolve())
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def check_limit(limit: int | None) -> None:
    """`ConfigError` for a limit that takes nothing."""
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: {limit} is not 1 or more")


def one_of(name: str, value: str, names: Sequence[str]) -> None:
    """`ConfigError` where a value is none of those that there are."""
    if value not in names:
        raise ConfigError(f"{name}: no {value!r}; {known(names, value)}")
