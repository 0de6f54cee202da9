"""What a good response is: the rubric of one category, read strictly from YAML."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, model_validator

from grape import resources
from grape.errors import ConfigError, invalid, known
from grape.item import Extensible, Item, distinct_ids, flatten, keys_at, paths
from grape.types import Name, Outcome, Turn

Formula = Literal["grape", "normalized", "weighted", "points"]


class Case(Extensible):
    """A unit test of the rubric: a row and what its items must score."""

    question: str | Annotated[list[Turn], Field(min_length=1)]
    response: str
    reference: str | None = None
    tests: str | None = None
    entry_point: str | None = None
    items: list[Item] = []
    metadata: dict[str, Any] = {}
    expect: Annotated[dict[str, Annotated[float, Field(ge=0, le=1)] | str], Field(min_length=1)]

    @model_validator(mode="after")
    def _expectations(self) -> Case:
        for item, expected in self.expect.items():
            if isinstance(expected, str):
                try:
                    bounds(expected)
                except ValueError as error:
                    raise ValueError(f".expect.{item}: {error}") from None
        return self


def bounds(expected: str | float) -> Outcome | tuple[float, float]:
    """What a case expects: an outcome, or the least and the greatest score that pass."""
    if not isinstance(expected, str):
        return (expected, expected)
    text = expected.strip()
    if text in set(Outcome):
        return Outcome(text)
    for sign, low, high in ((">=", 0, 1), ("<=", 1, 0)):
        if text.startswith(sign):
            number = float(text[2:])
            if 0 <= number <= 1:
                return (number, 1.0) if low < high else (0.0, number)
    raise ValueError(
        f"{expected!r} is neither a number from 0 to 1, nor >= or <= and one, nor one of {', '.join(Outcome)}"
    )


class Rubric(Extensible):
    """The rubric of one category of questions."""

    rubric: Name
    version: int | str = 1
    category: str = ""
    description: str = ""
    formula: Formula = "grape"
    generate: Name | None = None
    improve: Name = "default"
    items: list[Item]  # empty where the rows of a category bring all that they are judged on
    cases: list[Case] = []
    _source: str = PrivateAttr("")
    _hash: str = PrivateAttr("")

    @model_validator(mode="before")
    @classmethod
    def _default_category(cls, data: Any) -> Any:
        return {"category": data.get("rubric"), **data} if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _distinct(self) -> Rubric:
        distinct_ids(self.items)
        for number, case in enumerate(self.cases):
            ids = {item.id for item in flatten([*self.items, *case.items])}
            if unknown := sorted(set(case.expect) - ids):
                raise ValueError(f".cases.{number}.expect: no item {unknown[0]!r}; {known(ids, unknown[0])}")
        return self

    @property
    def source(self) -> str:
        """The file it was read from."""
        return self._source

    @property
    def hash(self) -> str:
        """The content hash of that file, which stands in every verdict."""
        return self._hash

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant."""
        return [
            f"{self.source}: {where}: weights sum to {total:g}, which is neither 1 nor a sum of whole numbers"
            for where, total in _odd_sums("items", self.items)
        ]


def _odd_sums(where: str, items: list[Item]) -> Iterator[tuple[str, float]]:
    weights = [item.weight for item in items]
    total = math.fsum(weights)
    if not all(weight.is_integer() for weight in weights) and not math.isclose(total, 1, abs_tol=1e-9):
        yield where, total
    for number, item in enumerate(items):
        if item.items:
            yield from _odd_sums(f"{where}.{number}.items", item.items)


def parse_rubric(data: Any, source: str, *, judges: Collection[str] | None = ()) -> Rubric:
    """A rubric from plain data. Unknown names are errors of one line.

    ``judges`` are known besides those on disk; None where no judge will be asked, and any name will do.
    """
    try:
        rubric = Rubric.model_validate(data)
    except ValidationError as error:
        raise invalid(source, error, keys_at(error, Rubric, cases=Case)) from error
    rubric._source = source
    known_judges = {*(judges or ()), *resources.names("judges")}
    known_prompts = set(resources.names("prompts"))

    def name(kind: str, path: str, value: str, names: Collection[str]) -> None:
        if value not in names:
            raise ConfigError(f"{source}: {path}: no {kind} named {value!r}; {known(names, value)}")

    for field, folder in (("generate", "generate"), ("improve", "improve")):
        if (value := getattr(rubric, field)) is not None:
            name("prompt", field, value, {p.removeprefix(folder + "/") for p in known_prompts if p.startswith(folder)})
    for path, item in paths("items", rubric.items):
        if item.judge and judges is not None:
            name("judge", f"{path}.judge", item.judge, known_judges)
        if item.critique:
            critics = {p.removeprefix("critique/") for p in known_prompts if p.startswith("critique/")}
            name("prompt", f"{path}.critique", item.critique, critics)
    return rubric


def dump_rubric(rubric: Rubric) -> dict[str, Any]:
    """Plain data that parses to the same rubric: what was set, with the ``x-*`` keys where they stood."""
    return _dump(rubric)


def _dump(model: Extensible) -> dict[str, Any]:
    data = model.model_dump(by_alias=True, exclude_unset=True, exclude={"items", "cases"})
    data = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in data.items()}
    for key in ("items", "cases"):
        if key in model.model_fields_set and (children := getattr(model, key)) is not None:
            data[key] = [_dump(child) for child in children]
    return {**data, **model.extensions}


def load_rubric(name: str | Path, *, judges: Collection[str] | None = ()) -> Rubric:
    """The rubric of a name or a file. Doubtful weights are warned of; everything else that is wrong raises."""
    path = resources.find("rubrics", name)
    text = resources.read_text(path)
    rubric = parse_rubric(resources.read_yaml(path, text), str(path), judges=judges)
    rubric._hash = resources.digest(text)
    for warning in rubric.warnings():
        warnings.warn(warning, stacklevel=2)
    return rubric


def load_rubrics(folder: str | Path | None = None, *, judges: Collection[str] | None = ()) -> dict[str, Rubric]:
    """All rubrics of a folder (or one file), or of the search path, by category."""
    if folder is None:
        known_files = resources.names("rubrics").values()
        places = [[f for f in known_files if place in f.parents] for place in resources.search_path("rubrics")]
    elif resources.is_file(folder):
        places = [[Path(folder)]]
    elif Path(folder).is_dir():
        places = [sorted(Path(folder).rglob("*.yaml"))]
    else:
        raise ConfigError(f"{folder}: no such file or folder")
    rubrics: dict[str, Rubric] = {}
    for files in places:  # an earlier folder's rubric of a category stands before a later one's
        found: dict[str, Rubric] = {}
        for file in files:
            rubric = load_rubric(file, judges=judges)
            if rubric.category in found:
                other = found[rubric.category].source
                raise ConfigError(f"{file}: category {rubric.category!r} has a rubric already: {other}")
            found[rubric.category] = rubric
        rubrics = found | rubrics
    if not rubrics:
        raise ConfigError(f"{folder}: no rubrics (*.yaml) in it")
    return rubrics
