"""Checkers of habits that give a model away: repetition and stock phrases."""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from typing import Annotated

import regex as regular
from pydantic import Field

from grape.checkers import Finding, checker
from grape.errors import one_line
from grape.phrases import STOCK_PHRASES
from grape.types import Question, Response

TOKENS = 50_000  # of a response that are looked at for repetition
SECONDS = 10.0
_TOKEN = regular.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]|[\p{L}\p{M}\p{N}']{1,24}|[^\s\p{L}\p{M}\p{N}]")
Share = Annotated[float, Field(ge=0, lt=1)]


def repeated(text: str, size: int) -> float:
    """The share of runs of ``size`` words or signs that have been there before; runs of letters count by the 24."""
    found = _TOKEN.findall(text) if len(text) <= TOKENS else [one[0] for one in islice(_TOKEN.finditer(text), TOKENS)]
    tokens = list(map(str.casefold, found))
    runs = len(tokens) - size + 1
    if runs < 1:
        return 0.0
    return 1 - len(set(zip(*(tokens[start:] for start in range(size)), strict=False))) / runs


@checker
def repetition(
    question: Question,
    response: Response,
    *,
    size: Annotated[int, Field(ge=1, le=50)] = 4,
    limit: Share = 0.2,
) -> Finding:
    """1 up to a share of ``limit`` repeated runs of ``size`` words, from there down to 0 where all is repetition."""
    share = repeated(response.text, size)
    score = 1.0 if share <= limit else (1 - share) / (1 - limit)
    return Finding(score, f"{share:.0%} of its runs of {size} words repeat, {limit:.0%} allowed", f"{share:.4f}")


@checker
def stock_phrases(
    question: Question,
    response: Response,
    *,
    phrases: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None,
    allowed: Annotated[int, Field(ge=0)] = 0,
) -> Finding:
    """1 up to ``allowed`` stock phrases, then 1/2, 1/3 and so on with each one more.

    ``phrases`` replaces the list that comes with the package; case and the shape of apostrophes do not matter.
    """
    text = plain(response.text)
    found = {}
    for phrase, letters, pattern in _phrases(tuple(phrases or STOCK_PHRASES)):
        if letters in text and (number := sum(1 for _ in pattern.finditer(text, timeout=SECONDS, concurrent=True))):
            found[phrase] = number
    total = sum(found.values())
    if not found:
        return Finding(1.0, "no stock phrase", "0")
    listed = one_line(", ".join(repr(phrase) for phrase in found), 160)
    return Finding(1 / (1 + max(0, total - allowed)), f"{total} stock phrases: {listed}", str(total))


@lru_cache(maxsize=64)
def _phrases(phrases: tuple[str, ...]) -> list[tuple[str, str, regular.Pattern[str]]]:
    """Each phrase, its letters (looked for first: most texts have none), and its pattern as whole words."""
    return [
        (phrase, letters, regular.compile(r"(?<!\w)" + regular.escape(letters, literal_spaces=True) + r"(?!\w)"))
        for phrase, letters in ((phrase, plain(phrase)) for phrase in phrases)
    ]


def plain(text: str) -> str:
    """Lower case, straight apostrophes and single spaces."""
    return " ".join(text.replace("’", "'").replace("‘", "'").lower().split())
