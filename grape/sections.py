"""The sections of a run's file: read with what overrides them, the kinds of their values, and what is known in each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from grape import resources
from grape.errors import ConfigError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0, lt=2**63)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Number = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


def _many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Overlap = Literal["warn", "drop", "fail", "allow"]  # what becomes of taught questions that are held out too
Names = Annotated[list[str], BeforeValidator(_many)]


def read_sections(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """The sections of a run's file with the overrides, and what to call them in messages."""
    path = Path(path)
    data = resources.read_yaml(path, resources.read_text(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a run is a mapping of sections, not {type(data).__name__}")
    for override in overrides:
        name, equals, text = override.partition("=")
        if not (name and equals):
            raise ConfigError(f"{override!r} is not FIELD=VALUE, such as loss.clip_high=0.28")
        *sections, field = name.split(".")
        place: Any = data
        for section in sections:
            if place.get(section) is None:
                place[section] = {}
            place = place[section]
            if not isinstance(place, dict):
                raise ConfigError(f"{override!r}: {section} has no fields")
        place[field] = resources.read_yaml(Path(f"{override!r}"), text)
    return data, " with ".join([str(path), *([", ".join(overrides)] if overrides else [])])


def fields_at(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """The fields of a run, a ``model``, that are known where the first fault stands."""
    for part in error.errors(include_url=False)[0]["loc"][:-1]:
        info = model.model_fields.get(str(part))
        inner = _models(info.annotation) if info else []
        if not inner:
            return []
        model = inner[0]
    return sorted(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    kinds = [annotation, *get_args(annotation)]
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
