"""The scales of judge items: what a judge may answer and what each answer is worth in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

SHAPES = (
    "unit, binary, {ordinal: [..]}, {choices: {label: value}}, {likert: {1: anchor, 5: anchor}}, {numeric: [low, high]}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """One scale. A judge's raw answer maps to [0, 1] here, once, and nowhere else.

    ``labels`` are the answers of `binary`, `ordinal` and `choices` (with their ``values``) or a Likert scale's anchors;
    ``low`` and ``high`` bound the numbers of `unit`, `likert` and `numeric`.
    """

    kind: Literal["unit", "binary", "ordinal", "choices", "likert", "numeric"] = "unit"
    labels: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    low: float = 0.0
    high: float = 1.0

    def read(self, raw: object) -> tuple[float, str]:
        """(score in [0, 1], raw label) of a judge's answer; ValueError where the scale has no such answer."""
        if isinstance(raw, bool) or not isinstance(raw, str | int | float):
            raise TypeError(f"{raw!r} is neither a number nor a label")
        if self.kind in {"ordinal", "choices", "binary"}:
            text = f"{raw:g}" if isinstance(raw, float) else str(raw).strip()
            if self.kind == "binary":
                text = {"1": "met", "0": "not met", "yes": "met", "no": "not met"}.get(text.casefold(), text)
            for label, value in zip(self.labels, self.values, strict=True):
                if label.casefold() == text.casefold():
                    return value, label
            raise ValueError(f"{raw!r} is not one of {', '.join(self.labels)}")
        if isinstance(raw, str):
            raise TypeError(f"{raw!r} is text where a number is meant")
        if not math.isfinite(raw) or not self.low <= raw <= self.high:
            raise ValueError(f"{raw!r} is outside {self.low:g} to {self.high:g}")
        return (raw - self.low) / (self.high - self.low), f"{raw:g}"

    def describe(self) -> str:
        """What the judge is told to put under "score"."""
        if self.kind == "unit":
            return "a number from 0 (not at all) to 1 (fully)"
        if self.kind == "binary":
            return "1 if the criterion is met, 0 if it is not"
        if self.kind == "numeric":
            return f"a number from {self.low:g} (worst) to {self.high:g} (best)"
        if self.kind == "likert":
            anchors = "; ".join(f"{value:g} = {label}" for label, value in zip(self.labels, self.values, strict=True))
            return f"a number from {self.low:g} to {self.high:g}, where {anchors}"
        quoted = ", ".join(f'"{label}"' for label in self.labels)
        return f"one of these labels: {quoted}" + (" (from worst to best)" if self.kind == "ordinal" else "")

    def schema(self) -> dict[str, Any]:
        """The JSON schema of an answer."""
        if self.kind == "binary":
            return {"type": "integer", "enum": [0, 1]}
        if self.kind in {"ordinal", "choices"}:
            return {"type": "string", "enum": list(self.labels)}
        if self.kind == "likert" and all(value == int(value) for value in self.values):
            return {"type": "integer", "minimum": int(self.low), "maximum": int(self.high)}
        return {"type": "number", "minimum": self.low, "maximum": self.high}

    def dump(self) -> Any:
        """The scale as it stands in YAML."""
        if self.kind in {"unit", "binary"}:
            return self.kind
        if self.kind == "ordinal":
            return {"ordinal": list(self.labels)}
        if self.kind == "numeric":
            return {"numeric": [self.low, self.high]}
        if self.kind == "choices":
            return {"choices": dict(zip(self.labels, self.values, strict=True))}
        return {"likert": {int(v) if v == int(v) else v: k for k, v in zip(self.labels, self.values, strict=True)}}


def parse_scale(value: object) -> Scale:
    """A scale from its YAML form."""
    if isinstance(value, Scale):
        return value
    if value == "unit":
        return Scale()
    if value == "binary":
        return Scale(kind="binary", labels=("not met", "met"), values=(0.0, 1.0))
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(f"unknown scale {value!r}; known: {SHAPES}")
    ((kind, body),) = value.items()
    if kind == "ordinal" and isinstance(body, list) and len(body) >= 2:
        labels = tuple(_label(label) for label in body)
        _distinct(labels)
        return Scale(kind="ordinal", labels=labels, values=tuple(i / (len(labels) - 1) for i in range(len(labels))))
    if kind == "choices" and isinstance(body, Mapping) and len(body) >= 2:
        labels = tuple(_label(label) for label in body)
        _distinct(labels)
        values = tuple(_number(number) for number in body.values())
        if not all(0 <= number <= 1 for number in values):
            raise ValueError(f"choices must be worth 0 to 1, not {max(values, key=lambda v: abs(v - 0.5)):g}")
        return Scale(kind="choices", labels=labels, values=values)
    if kind == "likert" and isinstance(body, Mapping) and len(body) >= 2:
        points = sorted((_point(point), _label(anchor)) for point, anchor in body.items())
        values, labels = tuple(p for p, _ in points), tuple(a for _, a in points)
        if len(set(values)) != len(values):
            raise ValueError(f"a Likert scale has each point once, not {', '.join(f'{value:g}' for value in values)}")
        return Scale(kind="likert", labels=labels, values=values, low=values[0], high=values[-1])
    if kind == "numeric" and isinstance(body, list) and len(body) == 2:
        low, high = _number(body[0]), _number(body[1])
        if low >= high:
            raise ValueError(f"a numeric scale runs from low to high, not from {low:g} to {high:g}")
        return Scale(kind="numeric", low=low, high=high)
    raise ValueError(f"unknown scale {value!r}; known: {SHAPES}")


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e12:
        raise ValueError(f"a number up to 1e12 is meant, not {str(value)[:40]!r}")
    return float(value)


def _point(value: object) -> float:
    """A point of a Likert scale; as a key of JSON it is text."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"a finite number is meant, not {value!r}") from None
    return _number(value)


def _label(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        raise ValueError(f'a label is meant, not {value!r} (quote words such as "true")')
    return f"{value:g}" if isinstance(value, float) else str(value).strip()


def _distinct(labels: tuple[str, ...]) -> None:
    if len({label.casefold() for label in labels}) != len(labels):
        raise ValueError(f"labels are not distinct: {', '.join(labels)}")


SCHEMA: dict[str, Any] = {
    "description": "What the judge may answer; see " + SHAPES,
    "anyOf": [
        {"enum": ["unit", "binary"]},
        *(
            {"type": "object", "properties": {kind: body}, "required": [kind], "additionalProperties": False}
            for kind, body in {
                "ordinal": {"type": "array", "items": {"type": ["string", "number"]}, "minItems": 2},
                "choices": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0, "maximum": 1}},
                "likert": {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 2},
                "numeric": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            }.items()
        ),
    ],
}
