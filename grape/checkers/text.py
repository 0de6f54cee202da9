"""Checkers of what the text says: equal to, containing or matching something, and how long it is."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Literal

import regex as regular
from pydantic import AfterValidator, Field, ValidationInfo

from grape.checkers import Finding, checker, from_row
from grape.errors import ConfigError, one_line
from grape.types import Question, Response


@lru_cache(maxsize=1024)
def compiled(pattern: str, flags: int = 0) -> regular.Pattern[str]:
    """A pattern, compiled once. Raises ValueError saying what is wrong with it."""
    try:
        return regular.compile(pattern, flags)
    except (regular.error, OverflowError, RecursionError) as error:
        raise ValueError(f"not a regular expression: {error}") from None


def _valid_pattern(pattern: str) -> str:
    compiled(pattern)
    return pattern


def _not_below_min(value: int | None, info: ValidationInfo) -> int | None:
    if value is not None and value < (info.data.get("min") or 0):
        raise ValueError(f"max is below min, which is {info.data['min']}")
    return value


Pattern = Annotated[str, AfterValidator(_valid_pattern)]
Seconds = Annotated[float, Field(gt=0, le=60)]
Texts = str | Annotated[list[str], Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]


def _quoted(text: str) -> str:
    return repr(one_line(text, 60))


@checker
def exact(
    question: Question,
    response: Response,
    *,
    reference: str = from_row("reference"),
    ignore_case: bool = False,
    strip: bool = True,
) -> Finding:
    """1 if the response is the reference, but for space around it (``strip``)."""
    expected, got = (reference, response.text) if not strip else (reference.strip(), response.text.strip())
    equal = got.casefold() == expected.casefold() if ignore_case else got == expected
    return Finding(float(equal), f"reads {_quoted(got)}, expected {_quoted(expected)}")


@checker
def contains(
    question: Question,
    response: Response,
    *,
    text: Texts,
    ignore_case: bool = False,
    need: Literal["all", "any"] = "all",
) -> Finding:
    """1 if the text is in the response; of several, all of them or any (``need``)."""
    wanted = [text] if isinstance(text, str) else text
    where = response.text.casefold() if ignore_case else response.text
    missing = [each for each in wanted if (each.casefold() if ignore_case else each) not in where]
    met = not missing if need == "all" else len(missing) < len(wanted)
    if not missing:
        return Finding(1.0, f"contains {', '.join(map(_quoted, wanted))}")
    return Finding(float(met), f"lacks {', '.join(map(_quoted, missing))}")


@checker
def regex(
    question: Question,
    response: Response,
    *,
    pattern: Pattern,
    whole: bool = False,
    ignore_case: bool = False,
    timeout: Seconds = 1.0,
) -> Finding:
    """1 if the pattern (of the `regex` package) is found in the response, or matches the ``whole`` of it.

    Raises TimeoutError after ``timeout`` seconds: a pattern that backtracks without end is the rubric's fault.
    """
    expression = compiled(pattern, regular.IGNORECASE if ignore_case else 0)
    search = expression.fullmatch if whole else expression.search
    try:
        found = search(response.text, timeout=timeout, concurrent=True)
    except TimeoutError:
        raise TimeoutError(f"the pattern {_quoted(pattern)} took more than {timeout:g} s") from None
    if found is None:
        return Finding(0.0, f"no match of {_quoted(pattern)}")
    return Finding(1.0, f"matches {_quoted(pattern)}: {_quoted(found[0])}", one_line(found[0]))


_SENTENCE_END = regular.compile(r"[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+")
Unit = Literal["words", "characters", "sentences"]


def count(text: str, unit: Unit) -> int:
    """How many: words are runs without space, sentences end with . ! or ? before a space; so may the last one not."""
    if unit == "characters":
        return len(text)
    if unit == "words":
        return len(text.split())
    pieces = _SENTENCE_END.split(text)
    return sum(1 for piece in pieces if any(map(str.isalnum, piece)))


@checker
def length(
    question: Question,
    response: Response,
    *,
    min: Count | None = None,
    max: Annotated[Count | None, AfterValidator(_not_below_min)] = None,
    unit: Unit = "words",
) -> Finding:
    """1 if the response has from ``min`` to ``max`` words, characters or sentences."""
    if min is None and max is None:
        raise ConfigError("length: neither min nor max is given")
    number = count(response.text.strip(), unit)
    met = (min is None or number >= min) and (max is None or number <= max)
    limits = f"at least {min}" if max is None else f"at most {max}" if min is None else f"{min} to {max}"
    return Finding(float(met), f"{number} {unit}, {limits} asked", str(number))
