"""What can go wrong, by whose fault it is: the user's, the judge's, or ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

    from grape.types import Outcome


class GrapeError(Exception):
    """The root of every error that this package raises on purpose. Its text is one line."""


class ConfigError(GrapeError):
    """The user's file, row or flag is wrong: says which file, field and value, and what is known."""


class JudgeError(GrapeError):
    """A judge gave no usable verdict; ``outcome`` says how. Never the response's fault, so never a score.

    ``reasoning`` is the judge's own, where it gave one (it abstained, say, or left its scale).
    """

    def __init__(self, outcome: Outcome, detail: str, reasoning: str | None = None) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.reasoning = reasoning


class SandboxError(GrapeError):
    """The confinement of a program is missing or broke: ours, so an outcome and not a score."""


class LogError(GrapeError):
    """The critique log cannot be read or written."""


def one_line(text: object, limit: int = 200) -> str:
    """``text`` without line breaks, cut to ``limit`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def known(names: Iterable[str], missing: str | None = None) -> str:
    """The tail of a message about an unknown name: the nearest known one first, then all of them."""
    names = sorted(names)
    near = get_close_matches(missing, names, n=1) if missing else []
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(names) if names else 'none'}"


# What pydantic puts into a path for the member of a union that it tried: no part of the user's file.
UNION_MEMBER = re.compile(r"str|int|float|bool|(list|dict|tuple)\[.*|(function|constrained|lax-or-strict|nullable)\b.*")


def path_of(location: Iterable[int | str]) -> str:
    """The path to a field, as `items.0.weight`, from the location that pydantic gives."""
    return ".".join(str(part) for part in location if isinstance(part, int) or not UNION_MEMBER.fullmatch(part))


def invalid(where: str, error: ValidationError, fields: Sequence[str] = ()) -> ConfigError:
    """The first fault of a pydantic error as one line: file, path to the field, what is wrong, value, what is known."""
    faults = error.errors(include_url=False)
    same = [fault for fault in faults if path_of(fault["loc"]).startswith(path_of(faults[0]["loc"]))]
    furthest = max(same, key=lambda fault: len(path_of(fault["loc"])))  # of the members of a union
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), furthest)
    path = path_of(fault["loc"])
    message = one_line(fault["msg"].removeprefix("Value error, "))
    if message.startswith("."):  # a validator's own fault deeper down: ".with.text: ..."
        line = f"{where}: {f'{path}{message}'.removeprefix('.')}"
    else:
        line = ": ".join([where, path, message] if path else [where, message])
    if fault["type"] == "extra_forbidden":
        line += f" (got {one_line(repr(fault['input']), 60)}; {known(fields, str(fault['loc'][-1]))})"
    elif fault["type"] not in {"missing", "value_error"}:
        line += f" (got {one_line(repr(fault['input']), 60)})"
    return ConfigError(line)
