"""Other people's rubrics to ours and back, without loss: `grape convert`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from grape.errors import ConfigError, invalid, known, one_line
from grape.formats import constitution, files, paperbench, promptfoo, questions, rlcf, scaled, signed
from grape.formats.decisions import Decisions, read_decisions
from grape.formats.keep import NOTES, Data, Place, mapping, same
from grape.formats.sheet import Sheet, dump_sheet, load_sheet
from grape.formats.table import Table, dump_row, load_row
from grape.item import distinct_ids
from grape.resources import read_yaml
from grape.rows import Row
from grape.rubric import dump_rubric, parse_rubric


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What a format can hold: a rubric, questions that bring their own, or either; and how its files are written."""

    sheet: Sheet | None = None
    table: Table | None = None
    yaml: bool = False


FORMATS: dict[str, Format] = {
    "healthbench": Format(sheet=signed.HEALTHBENCH_SHEET, table=questions.TABLES["healthbench"]),
    "rar": Format(sheet=signed.RAR_SHEET, table=questions.TABLES["rar"]),
    "paperbench": Format(sheet=paperbench.SHEET),
    "prometheus": Format(sheet=scaled.PROMETHEUS_SHEET, table=questions.TABLES["prometheus"]),
    "autorubric": Format(sheet=signed.AUTORUBRIC_SHEET),
    "rubric": Format(sheet=signed.RUBRIC_SHEET),
    "verifiers": Format(sheet=scaled.VERIFIERS_SHEET),
    "openai-evals": Format(sheet=scaled.GRADERS_SHEET, yaml=True),
    "dr-tulu": Format(sheet=signed.DR_TULU_SHEET, table=questions.TABLES["dr-tulu"]),
    "rlcf": Format(table=rlcf.TABLE),
    "promptfoo": Format(sheet=promptfoo.SHEET, yaml=True),
    "ifeval": Format(table=questions.TABLES["ifeval"]),
    "constitution": Format(sheet=constitution.SHEET),
}
NAMES = ("grape", *FORMATS)


class Converted(NamedTuple):
    """What was written: so many questions (none where it is a rubric) with so many items in all."""

    questions: int
    items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a file holds, in our terms: a rubric, or rows; and how rows stood in it, where that is not plain."""

    rubric: Data | None = None
    rows: tuple[Data, ...] = ()
    places: tuple[Place, ...] = ()


def convert(
    file: str | Path,
    from_: str,
    to: str,
    out: str | Path,
    *,
    polarity: str | Path | Mapping[str, Any] | None = None,
) -> Converted:
    """Read ``file`` as the format ``from_`` and write it to ``out`` as the format ``to``.

    Formats are named in `NAMES`; ``grape`` is one of them. A grape rubric is YAML, grape rows are JSON lines; the
    other formats are written as the suffix of ``out`` says (``.json``, ``.jsonl``, ``.yaml``), or as is usual for them.
    What a format has no place for is kept under an ``x-`` key and comes back on the way back. ``polarity`` is a file
    (YAML or JSON) or a mapping that says of RaR's pitfalls, by title or by a prefix of title or description, whether
    they are ``desirable`` or ``undesirable``, and of model-graded specs without scores what each choice is worth.

    Raises `ConfigError`: one line with the file, the place in it, the value and what is known; for questions that the
    source leaves open one line and the list of them.
    """
    for name in (from_, to):
        if name not in NAMES:
            raise ConfigError(f"no format named {name!r}; {known(NAMES, name)}")
    source, target = Path(file), Path(out)
    content = _read_grape(source) if from_ == "grape" else _read(source, from_, read_decisions(polarity))
    if from_ == to == "grape" and content.rubric:  # the same rubric in its normal form
        parsed = parse_rubric(content.rubric, str(source), judges=_judges(content.rubric["items"]))
        content = Content(rubric=dump_rubric(parsed))
    text = _grape_text(content, target) if to == "grape" else _text(content, source, to, target)
    files.write(target, text)
    items = content.rubric["items"] if content.rubric else [i for row in content.rows for i in row.get("items", [])]
    return Converted(questions=len(content.rows), items=_count(items))


def _count(items: list[Data]) -> int:
    return sum(_count(item["items"]) if "items" in item else 1 for item in items)


def _read(path: Path, name: str, decisions: Decisions) -> Content:
    """A file of another format, checked to come back as it was."""
    form = FORMATS[name]
    data, shape = files.read(path)
    entries = data if isinstance(data, list) else [data]
    first = entries[0] if entries else None
    place = Place(str(path))
    asks = form.table is not None and isinstance(first, Mapping) and form.table.known(dict(first))
    if form.sheet is not None and not asks:
        rubric = load_sheet(form.sheet, data, place, path.name.split(".")[0], decisions)
        decisions.check(str(path))
        parse_rubric(rubric, str(path), judges=_judges(rubric["items"]))
        _comes_back(place, data, dump_sheet(form.sheet, rubric, place))
        return Content(rubric=rubric)
    assert form.table is not None, "a format has rows or a rubric"
    rows, places = [], []
    for number, entry in enumerate(entries, 1):
        at = _row_place(path, shape, number)
        rows.append(load_row(form.table, entry, at, decisions))
        places.append(at)
    decisions.check(str(path))
    for entry, row, at in zip(entries, rows, places, strict=True):
        _check_row(row, at)
        _comes_back(at, entry, dump_row(form.table, row, at))
    if not rows:
        raise place.fail("no rows")
    if shape != files.form(path.suffix, len(rows)):
        _note_shape(rows[0], form.table.key, shape)
    return Content(rows=tuple(rows), places=tuple(places))


def _row_place(path: Path, shape: str, number: int) -> Place:
    if shape == "object":
        return Place(str(path))
    return Place(f"{path}: {'line' if shape == 'lines' else 'row'} {number}")


def _note_shape(row: Data, key: str, shape: str) -> None:
    kept = mapping(row.setdefault("metadata", {}).get(key, {}), Place(key))
    row["metadata"][key] = {**kept, NOTES: {**kept.get(NOTES, {}), "shape": shape}}


def _comes_back(place: Place, source: Any, again: Any) -> None:
    """Nothing may get lost on the way: better no conversion than one that drops something."""
    if not same(source, again):
        raise place.fail("cannot be converted without loss; please report it with this file")


def _read_grape(path: Path) -> Content:
    """A rubric or rows of ours, checked by the models that scoring reads them with."""
    data, shape = files.read(path)
    if isinstance(data, dict) and "items" in data and "question" not in data:
        parse_rubric(data, str(path), judges=_judges(data["items"]))
        return Content(rubric=data)
    rows = data if isinstance(data, list) else [data]
    places = tuple(_row_place(path, shape, number) for number in range(1, len(rows) + 1))
    for row, place in zip(rows, places, strict=True):
        _check_row(mapping(row, place), place)
    if not rows:
        raise ConfigError(f"{path}: neither a rubric (items) nor rows (question)")
    return Content(rows=tuple(rows), places=places)


def _judges(items: Any) -> set[str]:
    """The judges that a rubric names: whether they are there is for scoring to ask."""
    found: set[str] = set()
    for item in items if isinstance(items, list) else []:
        if isinstance(item, Mapping):
            found |= {item["judge"]} if isinstance(item.get("judge"), str) else _judges(item.get("items"))
    return found


def _check_row(row: Data, place: Place) -> None:
    """A row as scoring would read it; a question alone has no response yet."""
    try:
        parsed = Row.model_validate({"response": "", **row})
        distinct_ids(parsed.items or [])
    except ValidationError as error:
        raise invalid(str(place.file), error, sorted(Row.model_fields)) from error
    except ValueError as error:
        raise place.fail(one_line(error).removeprefix(".")) from error


def _grape_text(content: Content, out: Path) -> str:
    if content.rubric is None:
        return "\n".join(_json(row, out) for row in content.rows)
    if out.suffix == ".json":
        return _json(content.rubric, out, indent=2)
    text = files.yaml_text(content.rubric)
    assert same(read_yaml(out, text), content.rubric), "our reader reads what we write"
    return text


def _text(content: Content, source: Path, name: str, out: Path) -> str:
    """The text of a file of another format."""
    form = FORMATS[name]
    if content.rubric is not None:
        if form.sheet is None:
            raise ConfigError(f"{source}: a rubric, and {name} holds questions with their items; convert rows")
        document = dump_sheet(form.sheet, content.rubric, Place(str(source)))
        if out.suffix == ".jsonl" and isinstance(document, list):
            return "\n".join(_json(entry, out) for entry in document)
        yaml = out.suffix in files.YAML_SUFFIXES or (form.yaml and out.suffix != ".json")
        return files.yaml_text(document) if yaml else _json(document, out, indent=2)
    if form.table is None:
        raise ConfigError(f"{source}: rows, and {name} holds one rubric without questions; convert a rubric")
    rows = [dump_row(form.table, row, place) for row, place in zip(content.rows, content.places, strict=True)]
    kept = content.rows[0].get("metadata", {}).get(form.table.key, {})
    shape = kept.get(NOTES, {}).get("shape") or files.form(out.suffix, len(rows))
    if out.suffix in files.YAML_SUFFIXES:
        return files.yaml_text(rows[0] if shape == "object" else rows)
    if shape == "lines" or out.suffix == ".jsonl":
        return "\n".join(_json(row, out) for row in rows)
    return _json(rows if shape == "array" else rows[0], out, indent=2)


def _json(data: Any, out: Path, indent: int | None = None) -> str:
    try:
        return files.json_text(data, indent)
    except (TypeError, ValueError) as error:  # a date of Parquet's, an infinity of YAML's
        raise ConfigError(f"{out}: cannot be written as JSON: {one_line(error)}") from error


__all__ = ["FORMATS", "NAMES", "Converted", "convert"]
