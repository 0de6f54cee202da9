"""Checkers of form: JSON, JSON of a schema, and tags such as `<think>` and `<answer>` around the parts."""

from __future__ import annotations

import json as codec
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Any
from urllib.parse import urljoin

from jsonschema import ValidationError, validators
from jsonschema.exceptions import SchemaError
from jsonschema_specifications import REGISTRY
from pydantic import AfterValidator, Field
from referencing import Resource
from referencing.exceptions import NoSuchResource, Unresolvable
from referencing.jsonschema import DRAFT202012

from grape.checkers import Finding, checker
from grape.checkers.text import compiled
from grape.errors import one_line
from grape.types import Question, Response

PATTERN_SECONDS = 1.0
DIGITS = 4_000  # of an integer that a schema looks at
VALUES = 100_000  # of a JSON text that a schema looks at: more than a model writes
_FENCE = re.compile(r"\s*```[ \t]*(?:json|JSON)?[ \t]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)


class _NotJson(ValueError):
    """The response's own fault, in a line."""


def _constant(name: str) -> Any:
    raise _NotJson(f"{name} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise _NotJson(f"an integer of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _NotJson(f"{one_line(digits, 20)} is too large a number")
    return value


def _load(text: str, fenced: bool, numbers: bool) -> Any:
    """The value of a text that is JSON and nothing else. Raises _NotJson."""
    if fenced and (fence := _FENCE.fullmatch(text)):
        text = fence[1]
    parse_int, parse_float = (_integer, _float) if numbers else (len, len)
    try:
        return codec.loads(text, parse_int=parse_int, parse_float=parse_float, parse_constant=_constant)
    except RecursionError:
        raise _NotJson("nested too deeply") from None
    except codec.JSONDecodeError as error:
        raise _NotJson(f"{error.msg} at line {error.lineno}, column {error.colno}") from None


@checker
def json(question: Question, response: Response, *, fenced: bool = False) -> Finding:
    """1 if the response is one JSON value and nothing else; ``fenced`` lets it stand in a code fence."""
    try:
        _load(response.text, fenced, numbers=False)
    except _NotJson as error:
        return Finding(0.0, f"not JSON: {error}")
    return Finding(1.0, "is JSON")


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if isinstance(instance, str) and not compiled(pattern).search(instance, timeout=PATTERN_SECONDS, concurrent=True):
        yield ValidationError(f"{one_line(repr(instance), 60)} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    for pattern, inner in patterns.items():
        for key, value in instance.items():
            if compiled(pattern).search(key, timeout=PATTERN_SECONDS, concurrent=True):
                yield from validator.descend(value, inner, path=key, schema_path=pattern)


def _few(value: Any) -> Any:
    """The value, if it is not made of too many. Raises _NotJson."""
    left, number = [value], 0
    while left:
        one = left.pop()
        number += 1
        left.extend(one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
        if number > VALUES:
            raise _NotJson(f"more than {VALUES} values")
    return value


def _unique(validator: Any, unique: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """In linear time, as the library's own is not for items that do not sort."""
    if unique and isinstance(instance, list):
        seen = {codec.dumps(_comparable(item), sort_keys=True) for item in instance}
        if len(seen) < len(instance):
            yield ValidationError(f"{len(instance) - len(seen)} items are there twice")


def _comparable(value: Any) -> Any:
    """Numbers that are equal in JSON in one spelling, so that 1.0 is 1 and true is not."""
    if isinstance(value, dict):
        return {key: _comparable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_comparable(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@lru_cache(maxsize=256)
def _validator(dumped: str) -> Any:
    """The validator of a schema. Raises ValueError where it is none, has a bad pattern, or refers to elsewhere."""
    schema = codec.loads(dumped)
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        place = "".join(f"{part}: " for part in error.absolute_path)
        raise ValueError(f"not a JSON Schema: {place}{one_line(error.message)}") from None
    _check_keywords(schema)
    own = {"pattern": _pattern, "patternProperties": _pattern_properties, "uniqueItems": _unique}
    limited = validators.extend(kind, own)  # type: ignore[no-untyped-call]
    return limited(schema, registry=REGISTRY)


def _check_keywords(schema: Any) -> None:
    """Refuse patterns that are none, and references out of the schema: nothing is ever fetched (ValueError)."""
    root = Resource.from_contents(schema, default_specification=DRAFT202012)
    registry = REGISTRY.with_resource(root.id() or "", root).crawl()
    for base, name, value in _keywords(schema, ""):
        if name in {"$ref", "$dynamicRef"} and isinstance(value, str):
            try:
                registry.resolver(base).lookup(value)
            except (Unresolvable, NoSuchResource):
                raise ValueError(f"not a JSON Schema: {name} {value!r} is not in it, and nothing is fetched") from None
        if name == "pattern" and isinstance(value, str):
            compiled(value)
        if name == "patternProperties" and isinstance(value, dict):
            for pattern in value:
                compiled(pattern)


def _keywords(schema: Any, base: str) -> Iterator[tuple[str, str, Any]]:
    """Every key of a schema with its value and the address that references beside it start from."""
    if isinstance(schema, dict):
        base = urljoin(base, schema["$id"]) if isinstance(schema.get("$id"), str) else base
        for name, value in schema.items():
            yield base, name, value
            yield from _keywords(value, base)
    elif isinstance(schema, list):
        for value in schema:
            yield from _keywords(value, base)


def _valid_schema(schema: dict[str, Any] | bool) -> dict[str, Any] | bool:
    try:
        _validator(codec.dumps(schema, sort_keys=True))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not a JSON Schema: {error}") from None
    return schema


@checker
def json_schema(
    question: Question,
    response: Response,
    *,
    schema: Annotated[dict[str, Any] | bool, AfterValidator(_valid_schema)],
    fenced: bool = False,
) -> Finding:
    """1 if the response is JSON and fits the JSON Schema (2020-12 if it names no draft). References stay inside it."""
    try:
        value = _few(_load(response.text, fenced, numbers=True))
        error = next(_validator(codec.dumps(schema, sort_keys=True)).iter_errors(value), None)
    except _NotJson as fault:
        return Finding(0.0, f"not JSON that can be checked: {fault}")
    except RecursionError:
        return Finding(0.0, "nested too deeply")
    if error is not None:
        return Finding(0.0, f"does not fit the schema: {error.json_path}: {one_line(error.message, 120)}")
    return Finding(1.0, "fits the schema")


Tag = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", max_length=50)]


def _distinct(tags: list[str]) -> list[str]:
    if len(set(tags)) < len(tags):
        raise ValueError(f"a tag is named twice: {', '.join(tags)}")
    return tags


@checker
def format(
    question: Question,
    response: Response,
    *,
    tags: Annotated[list[Tag], Field(min_length=1), AfterValidator(_distinct)] = ["think", "answer"],  # noqa: B006
    outside: bool = False,
) -> Finding:
    """1 if the response is `<think>..</think><answer>..</answer>`: each tag once, in order, closed before the next.

    ``tags`` are which; ``outside`` allows text before, between and after them.
    """
    names = "|".join(map(re.escape, tags))
    found = list(re.finditer(rf"<(/?)({names})>", response.text))
    expected = [f"<{slash}{tag}>" for tag in tags for slash in ("", "/")]
    for tag in tags:
        for mark in (f"<{tag}>", f"</{tag}>"):
            times = sum(1 for each in found if each[0] == mark)
            if times != 1:
                return Finding(0.0, f"{mark} is there {times} times, expected once")
    if [each[0] for each in found] != expected:
        return Finding(0.0, f"reads {''.join(each[0] for each in found)}, expected {''.join(expected)}")
    ends = [0, *(each.end() for each in found[1::2])]
    starts = [*(each.start() for each in found[0::2]), len(response.text)]
    stray = "".join(response.text[end:start] for end, start in zip(ends, starts, strict=True)).strip()
    if stray and not outside:
        return Finding(0.0, f"has text outside of the tags: {one_line(stray, 60)!r}")
    return Finding(1.0, f"has {''.join(expected)}")
