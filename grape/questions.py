"""The questions of a training run: read from wherever they stand, and a row that cannot be used is named."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from sys import float_info
from typing import Any, Protocol

from grape.config import QuestionsConfig
from grape.errors import ConfigError, known, one_line
from grape.plan import Plan, plan_question
from grape.rows import QuestionRow, Rows, given, items_of, parse, read
from grape.rubric import Rubric

logger = logging.getLogger(__name__)

SHOWN = 3  # faults that are said one by one; of the others the number
FILES = {".jsonl", ".json", ".gz", ".parquet"}
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
FIELDS = frozenset(QuestionRow.model_fields)
MAX = float_info.max


class Source(Protocol):
    """Where rows come from, as a run's file says it."""

    @property
    def path(self) -> str:
        """A file, a folder or a data set's name."""

    @property
    def split(self) -> str:
        """The part of a data set that has several."""

    @property
    def subset(self) -> str | None:
        """The data set, where a name stands for several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """The questions of a source, as rows without responses, and a line on each row that was left out."""

    rows: Rows
    skipped: tuple[str, ...] = ()

    def only(self, ids: Iterable[str]) -> Questions:
        """These questions alone, in the order of the source."""
        ids, old, rows = set(ids), self.rows, Rows(source=self.rows.source)
        for name in (name for name in old.questions if name in ids):
            rows.questions[name], rows.items[name] = old.questions[name], old.items[name]
            rows.places[name] = old.places[name]
        return replace(self, rows=rows)


def read_questions(
    config: QuestionsConfig, source: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None
) -> Questions:
    """The questions of ``config.path``, or of a ``source`` from Python: a `datasets.Dataset`, any mappings.

    Columns that are neither fields of a row nor named in ``config.map`` become metadata. A null is as if absent. Rows
    without a question_id are called q-1, q-2, ... by their position in the source.
    """
    rows = Rows(source=config.path)
    skipped = []
    for number, (place, data) in enumerate(read_source(config, source), 1):
        try:
            _take(rows, place, data, number, config)
        except ConfigError as error:
            if config.bad_rows == "fail":
                raise
            skipped.append(str(error))
    if not (rows.questions or skipped):
        raise ConfigError(f"{config.path}: no rows")
    return _told(Questions(rows=rows), skipped)


def read_source(config: Source, source: Any = None) -> Iterator[tuple[str, Any]]:
    """Each row at ``config.path``, or of a ``source`` from Python, with its place for messages."""
    found: Any = _at(config) if source is None else source
    return read(_split(found, config) if isinstance(found, Mapping) else found, config.path)


def plan_questions(
    questions: Questions, rubrics: Mapping[str, Rubric], config: QuestionsConfig
) -> tuple[Questions, dict[str, Plan]]:
    """The questions that the rubrics can judge, each with its plan; ``bad_rows`` says what becomes of the others."""
    plans: dict[str, Plan] = {}

    def plan(question_id: str) -> None:
        plans[question_id] = plan_question(questions.rows, question_id, rubrics)

    return usable(questions, config, plan), plans


def usable(questions: Questions, config: QuestionsConfig, check: Callable[[str], None]) -> Questions:
    """The questions whose id ``check`` takes without a `ConfigError`; ``bad_rows`` says what becomes of the others."""
    kept, skipped = [], []
    for question_id in questions.rows.questions:
        try:
            check(question_id)
            kept.append(question_id)
        except ConfigError as error:
            if config.bad_rows == "fail":
                raise
            skipped.append(str(error))
    return _told(questions.only(kept) if skipped else questions, skipped)


def _told(questions: Questions, skipped: list[str]) -> Questions:
    """The questions with these further lines on rows left out, said. It is an error if nothing is left."""
    tell(questions.rows.source, len(questions.rows.questions), skipped)
    return replace(questions, skipped=(*questions.skipped, *skipped))


def tell(source: str, kept: int, skipped: Sequence[str]) -> None:
    """Say which rows were left out, a line for each of the first; `ConfigError` if none was kept."""
    total = kept + len(skipped)
    if skipped and not kept:
        raise ConfigError(f"{source}: none of {total} rows can be used; the first: {skipped[0]}")
    for line in skipped[:SHOWN]:
        logger.warning("skipped: %s", line)
    if skipped:
        more = f", of which {SHOWN} are named here" if len(skipped) > SHOWN else ""
        logger.warning("%s: skipped rows: %d of %d%s", source, len(skipped), total, more)


def _take(rows: Rows, place: str, data: Any, number: int, config: QuestionsConfig) -> None:
    """Add one row's question."""
    if isinstance(data, Mapping):
        row = parse(place, _shaped(place, data, number, config), QuestionRow, columns=data)
    else:
        row = parse(place, data, QuestionRow)
    if row.question_id.encode("utf-8", "replace").decode() != row.question_id:
        raise ConfigError(f"{place}: question_id: {row.question_id!r} is no Unicode text")
    if row.question_id in rows.questions:
        raise ConfigError(f"{place}: question_id: {row.question_id!r} stands already in {rows.places[row.question_id]}")
    question, items = row.to_question(), items_of(row, place)
    if not question.prompt.strip():
        raise ConfigError(f"{place}: question: is empty")
    difficulty = question.get("difficulty")
    if config.order == "easy-to-hard" and not (difficulty is None and config.difficulty) and not is_number(difficulty):
        raise ConfigError(
            f"{place}: difficulty: order easy-to-hard goes by this number (got {one_line(repr(difficulty), 60)}); "
            "or set questions.difficulty, which measures it"
        )
    rows.questions[row.question_id] = question
    rows.items[row.question_id] = items
    rows.places[row.question_id] = place


def _shaped(place: str, data: Mapping[str, Any], number: int, config: QuestionsConfig) -> dict[str, Any]:
    """The columns of a row as its fields: renamed, filled up, and what is no field under metadata."""
    named = renamed(place, given(data), config.map, may_lack="category" if config.category is not None else None)
    row = {key: value for key, value in named.items() if key in FIELDS}
    further = {key: value for key, value in named.items() if key not in FIELDS}
    if further and isinstance(row.get("metadata", {}), Mapping):
        row["metadata"] = {**row.get("metadata", {}), **further}
    row.setdefault("question_id", f"q-{number}")
    if config.category is not None:
        row.setdefault("category", config.category)
    return given(row)


def renamed(
    place: str, data: Mapping[str, Any], names: Mapping[str, str], may_lack: str | None = None
) -> dict[str, Any]:
    """The columns of a row under the names of fields: ``names`` says which column a field is taken from."""
    mapped = {}
    for target, column in names.items():
        value = _column(data, column)
        if value is not None:
            mapped[target] = value
        elif target != may_lack:
            has = one_line(", ".join(map(str, data)))
            raise ConfigError(f"{place}: {column}: map takes {target} from it and the row lacks it; the row has: {has}")
    return {**{key: value for key, value in data.items() if key not in names.values()}, **mapped}


def _column(data: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of a field inside one (``extra_info.answer``); None where there is none."""
    if column in data:
        return data[column]
    value: Any = data
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX <= value <= MAX


def _at(config: Source) -> Any:
    """What stands at the path: a file, a folder that `datasets` wrote, or a data set of the hub."""
    path = Path(config.path)
    try:
        folder, there = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{one_line(path, 100)}: {getattr(error, 'strerror', None) or error}") from error
    if not folder and (there or path.suffix in FILES or not HUB_NAME.fullmatch(config.path)):
        return path
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{config.path}: {error.name} is not installed, which reads data sets: pip install 'grape-rl[train]'"
        ) from error
    try:
        if folder:
            return datasets.load_from_disk(config.path)
        return datasets.load_dataset(config.path, config.subset, split=config.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        where = "no folder of `datasets`" if folder else "no file here, and not loaded from the hub"
        raise ConfigError(f"{config.path}: {where}: {one_line(error)}") from error


def _split(splits: Mapping[str, Any], config: Source) -> Any:
    if config.split not in splits:
        raise ConfigError(f"{config.path}: no split {config.split!r}; {known(splits, config.split)}")
    return splits[config.split]
