"""The registry of verifiable checkers: plain functions `(question, response, *, arguments) -> float or Finding`.

A checker returns a score in [0, 1]. What is wrong with the response, however broken its text, is a score of 0; an
exception means that the checker itself broke, which is an outcome and never a score.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_type_hints

from pydantic import Field, ValidationError, create_model

from grape.errors import ConfigError, SandboxError, known, one_line, path_of
from grape.resources import digest, is_file
from grape.types import Outcome, Question, Response, Strict, Verdict

if TYPE_CHECKING:
    from grape.sandbox import Sandbox

SHIPPED = ("text", "structure", "style", "refusal", "choice", "numeric", "math", "instructions", "code")


class Finding(NamedTuple):
    """A checker's score with the reason for it and, where there is one, what it read in the response."""

    score: float
    reasoning: str = ""
    raw: str | None = None


@dataclass(frozen=True, slots=True)
class FromRow:
    """An argument taken from a field of the question's row: `{field: name}` in YAML, or a checker's own default."""

    field: str


def from_row(field: str) -> Any:
    """The default of a checker's argument that comes from the question's row, such as its reference."""
    return FromRow(field)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checker:
    """A registered function with the strict model of its keyword arguments.

    ``sandboxed`` if it takes one more, ``sandbox``: no argument of a rubric's, but where the run has programs run.
    """

    name: str
    function: Callable[..., float | Finding]
    arguments: type[Strict]
    defaults: Mapping[str, Any]
    sandboxed: bool = False


REGISTRY: dict[str, Checker] = {}
F = TypeVar("F", bound=Callable[..., Any])


def checker(name: str | F) -> Any:
    """Register a function as a checker under its own name, or under the one given: ``@checker("json")``."""
    if callable(name):
        return _register(name.__name__, name)
    return lambda function: _register(name, function)


def _register(name: str, function: F) -> F:
    if name in REGISTRY and REGISTRY[name].function.__module__ != function.__module__:
        raise ConfigError(f"{function.__module__}: a checker named {name!r} exists already")
    signature = inspect.signature(function)
    first = list(signature.parameters.values())[:2]
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function) or len(first) < 2:
        raise ConfigError(f"{function.__module__}: checker {name!r}: a plain function of (question, response, *, ...)")
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for parameter in list(signature.parameters.values())[2:]:
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or parameter.name not in hints:
            raise ConfigError(f"{function.__module__}: checker {name!r}: arguments are keyword-only and have types")
        if parameter.name == "sandbox":
            continue
        default = parameter.default
        if default is inspect.Parameter.empty:
            default = ...
        else:
            defaults[parameter.name] = default
        fields[parameter.name] = (hints[parameter.name], Field(default, validate_default=False))
    with warnings.catch_warnings():  # an argument may be called `schema`, whatever pydantic calls its own methods
        warnings.filterwarnings("ignore", message="Field name .* shadows an attribute", category=UserWarning)
        model = create_model(name, __base__=Strict, **fields)
    sandboxed = "sandbox" in signature.parameters
    REGISTRY[name] = Checker(name=name, function=function, arguments=model, defaults=defaults, sandboxed=sandboxed)
    return function


def registry() -> dict[str, Checker]:
    """All checkers by name, the shipped ones included."""
    for module in SHIPPED:
        if (name := f"grape.checkers.{module}") not in sys.modules:  # asked for every verdict, it has to be quick
            importlib.import_module(name)
    return REGISTRY


def load_checkers(path: str | Path) -> None:
    """Run a user's file, which registers its checkers with ``@grape.checker``. Only files named by the user are run."""
    if Path(path).suffix != ".py" or not is_file(path):
        raise ConfigError(f"{path}: no such Python file")
    name = f"grape_user_{digest(str(Path(path).resolve()))}"  # the same file again replaces what it registered
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    registry()
    before = set(REGISTRY)
    try:
        spec.loader.exec_module(module)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix(f'{name}: ')}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}: {told(error)}") from error
    if not set(REGISTRY) - before and not any(c.function.__module__ == name for c in REGISTRY.values()):
        raise ConfigError(f"{path}: registers no checker (decorate a function with @grape.checker)")


def row_fields(name: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Which arguments come from the row: argument -> field, from `{field: ..}` and from the checker's defaults."""
    sources = {key: value.field for key, value in registry()[name].defaults.items() if isinstance(value, FromRow)}
    for key, value in arguments.items():
        sources.pop(key, None)
        if (field := _field(value)) is not None:
            sources[key] = field
    return sources


def _field(value: object) -> str | None:
    if isinstance(value, Mapping) and set(value) == {"field"} and isinstance(value["field"], str):
        return str(value["field"])
    return None


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse an unknown checker, and arguments it does not take or of another type, with one line (ValueError)."""
    if name not in registry():
        plain = [other for other in REGISTRY if ":" not in other or ":" in name]
        raise ValueError(f".check: no checker named {name!r}; {known(plain, name)} (see `grape checkers`)")
    entry = REGISTRY[name]
    given = {key: value for key, value in arguments.items() if _field(value) is None}
    deferred = set(arguments) - set(given)
    fields = entry.arguments.model_fields
    if unknown := sorted(deferred - set(fields)):
        raise ValueError(f".with.{unknown[0]}: {name} takes no such argument; {known(fields, unknown[0])}")
    try:
        entry.arguments.model_validate(given)
    except ValidationError as error:
        faults = [fault for fault in error.errors() if fault["type"] != "missing" or fault["loc"][0] not in deferred]
        if faults:
            raise ValueError(f".with.{_fault(faults, list(fields))}") from None


def _fault(faults: list[Any], fields: list[str]) -> str:
    """The first fault, an unknown argument before any other, with its value and what is known."""
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    path, got = path_of(fault["loc"]), one_line(repr(fault["input"]), 60)
    if fault["type"] == "extra_forbidden":
        return f"{path}: no such argument (got {got}; {known(fields, path)})"
    if fault["type"] == "missing":
        return f"{path}: the argument is needed; {known(fields)}"
    return f"{path}: {one_line(fault['msg'].removeprefix('Value error, '))} (got {got})"


def run_checker(
    name: str,
    arguments: Mapping[str, Any],
    question: Question,
    response: Response,
    sandbox: Sandbox | None = None,
) -> Finding:
    """The finding of one checker on one response; raises whatever the checker raises, and ValueError for a bad score.

    Without a ``sandbox`` a checker of programs has them confined on this machine, by its own Python.
    """
    entry = registry()[name]
    given = bind_arguments(name, arguments, question)
    if entry.sandboxed:
        given["sandbox"] = sandbox or importlib.import_module("grape.sandbox").local()
    found = entry.function(question, response, **given)
    finding = found if isinstance(found, Finding) else Finding(found)
    score = finding.score
    if isinstance(score, str) or not isfinite(score) or not 0 <= score <= 1:
        raise ValueError(f"checker {name!r} returned {score!r}, which is not a number from 0 to 1")
    if not isinstance(finding.reasoning, str) or not isinstance(finding.raw, str | None):
        raise TypeError(f"checker {name!r}: a finding's reasoning and raw are text")
    reasoning = finding.reasoning or f"{name}: {float(score):g}"
    return Finding(float(score), reasoning, finding.raw)


def bind_arguments(name: str, arguments: Mapping[str, Any], question: Question) -> dict[str, Any]:
    """The arguments with those from the question's row filled in. ValueError, with the path, where one does not fit."""
    model = registry()[name].arguments
    values = {key: value for key, value in arguments.items() if _field(value) is None}
    sources = row_fields(name, arguments)
    for key, field in sources.items():
        if (value := question.get(field)) is None:
            raise ValueError(f"{field}: question {question.question_id!r} has no such field")
        values[key] = value
    try:
        bound = model.model_validate(values)
    except ValidationError as error:
        fault = _fault(error.errors(), list(model.model_fields))
        key, _, rest = fault.partition(":")
        raise ValueError(f"{sources.get(key.split('.')[0], key)}:{rest}") from None
    return {key: getattr(bound, key) for key in model.model_fields}


def told(error: BaseException) -> str:
    """An error in one line, even one that cannot be told."""
    try:
        return one_line(f"{type(error).__name__}: {error}")
    except Exception:  # noqa: BLE001 - its own __str__ raises, whatever
        return type(error).__name__


def check_response(
    item: str,
    name: str,
    arguments: Mapping[str, Any],
    confidence: float,
    question: Question,
    response: Response,
    sandbox: Sandbox | None = None,
) -> Verdict:
    """One checker's verdict. A checker that raises is outcome `checker` (`sandbox` for confinement) and no score."""
    try:
        finding = run_checker(name, arguments, question, response, sandbox)
    except SandboxError as error:
        return Verdict(item=item, outcome=Outcome.SANDBOX, detail=one_line(error))
    except BaseException as error:  # noqa: BLE001 - the one place where a checker's own fault becomes an outcome
        return Verdict(item=item, outcome=Outcome.CHECKER, detail=told(error))
    return Verdict(
        item=item,
        outcome=Outcome.OK,
        score=finding.score,
        raw=finding.raw,
        confidence=confidence,
        reasoning=finding.reasoning,
    )


__all__ = ["Finding", "checker", "from_row", "load_checkers", "registry"]
