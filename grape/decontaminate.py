"""Questions that are taught and held out alike: found by the 8-grams of words that they share, and never in silence.

What is held out measures memory where it was taught. Word for word is not needed: a question is found in another one
where more than half of its words stand in 8-grams of both, or where the two are equal. Words are lower-cased, without
punctuation. A wording that more than a tenth of the held-out questions share is a form that they are asked in: it tells
nothing, and is left out of the half. Text without spaces between words is found only where it is equal.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grape.errors import ConfigError, one_line
from grape.rows import read
from grape.sections import Overlap

Asked = tuple[str, str]  # where a question stands, and its text

SIZE = 8  # words of a gram
FORM = 0.1  # of the held-out questions: a gram that more of them have is of their form
WORD = re.compile(r"\w+")
ASKS = ("user", "tool")

logger = logging.getLogger("grape")


def overlaps(taught: Sequence[str], heldout: Sequence[str]) -> dict[int, int]:
    """The places of taught questions that a held-out one is found in, each with the place of the first such one."""
    places: dict[str, int] = {}
    for place, text in enumerate(heldout):
        places.setdefault(_plain(text), place)
    texts = list(places)
    common = Counter(gram for text in texts for gram in set(_grams(text)))
    index: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    own = [0] * len(texts)
    for number, text in enumerate(texts):
        for at, gram in enumerate(_grams(text)):
            if common[gram] <= max(1, FORM * len(texts)):
                covered = ((1 << SIZE) - 1) << at  # a bit for each word
                index[gram].append((number, covered))
                own[number] |= covered
    found: dict[int, int] = {}
    for place, text in enumerate(map(_plain, taught)):
        shared: dict[int, int] = defaultdict(int)
        for gram in set(_grams(text)):
            for number, covered in index.get(gram, ()):
                shared[number] |= covered
        near = [
            places[texts[number]] for number, bits in shared.items() if 2 * bits.bit_count() > own[number].bit_count()
        ]
        near += [places[text]] if text in places else []
        if near:
            found[place] = min(near)
    return found


def apart(taught: Sequence[Asked], heldout: Sequence[Asked], *, how: Overlap, field: str, source: str) -> set[int]:
    """The places of taught questions to leave out: those found in held-out ones, with ``how`` drop.

    warn says how many there are, fail makes that an error, allow does not look. ``field`` is where a file says how.
    """
    if how == "allow":
        return set()
    found = overlaps([text for _, text in taught], [text for _, text in heldout])
    if not found:
        return set()
    first = next(iter(found))
    share = f"{len(found)} of {len(taught)} taught questions overlap held-out ones by their {SIZE}-grams"
    said = f"{source}: {share}, the first: {taught[first][0]} with {heldout[found[first]][0]}"
    if how == "fail":
        raise ConfigError(f"{said} ({field}: fail)")
    if how == "drop" and len(found) == len(taught):
        raise ConfigError(f"{said}: {field}: drop leaves none")
    logger.warning("%s%s", said, ": left out" if how == "drop" else f" ({field}: drop leaves them out)")
    return set(found) if how == "drop" else set()


def asked(turns: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a question: of a chat what its users and tools say."""
    if isinstance(turns, str):
        return turns
    return "\n".join(turn["content"] for turn in turns if turn["role"] in ASKS)


def without(rows: list[dict[str, Any]], path: str | Path) -> list[dict[str, Any]]:
    """Those of the rows (with a question or messages) in which no question of a file is found."""
    heldout = [asked(text) for _, text in _of_file(path)]
    if not heldout:
        raise ConfigError(f"{path}: no rows")
    found = overlaps([asked(row.get("question") or row.get("messages") or "") for row in rows], heldout)
    return [row for place, row in enumerate(rows) if place not in found]


def _of_file(path: str | Path) -> Iterator[tuple[str, Any]]:
    for place, row in read(Path(path)):
        if isinstance(row, ConfigError):
            raise row
        text = (row.get("question") or row.get("messages")) if isinstance(row, Mapping) else None
        turns = isinstance(text, list) and all(
            isinstance(turn, Mapping) and {"role", "content"} <= set(turn) and isinstance(turn["content"], str)
            for turn in text
        )
        if not (isinstance(text, str) or turns):
            raise ConfigError(f"{place}: needs a question or messages (got {one_line(repr(row), 60)})")
        yield place, text


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _grams(text: str) -> list[tuple[str, ...]]:
    words = WORD.findall(text.lower())
    return [tuple(words[at : at + SIZE]) for at in range(len(words) - SIZE + 1)]
