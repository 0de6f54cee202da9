"""Whether a verdict is the judge's own, or stands in a text that he was shown: what was repeated was not given.

Who writes a response can write a verdict into it, and hope that the judge repeats it. A reply is therefore held against
each outside text by what it says and not by how it is spelt: escapes, spacing, quotes, the order of keys, forms of a
number and look-alike signs make no difference. A verdict is taken for repeated where the text states its score, and

- its reasoning stands there too (its beginning or its end, if it is long), or
- the score follows, in JSON, upon the very letters with which the reasoning ends: so it is where a judge quotes a text
  whose quotation mark then ends the judge's own string.

Both ask for words of the judge that nobody can know before: a text that only names scores breaks no verdict.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from grape.scale import Scale

FENCED = re.compile(r"<<<(\w+) (\w+)>>>\n(.*?)\n<<<end \1 \2>>>", re.DOTALL)
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|([nrtbf])|([\"'\\/]))")
NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[-+]?[0-9]+)?"
LONG, SHORT = 24, 8  # letters of a reasoning that are looked for, and below which its key must stand before them
ENDING, NEAR = 6, 200  # characters of a reasoning that stand before a quoted score; how far off they may stand
NESTED = 3  # escapes within escapes


def repeats(reasoning: str, score: float, scale: Scale, shown: Sequence[str]) -> bool:
    """Whether a verdict stands in one of the outside texts of ``shown``: those between marks, or all if none are."""
    texts = [found[3] for text in shown for found in FENCED.finditer(text)] or shown
    views = (view for text in texts for view in _views(text) if "score" in view)  # few texts have the word
    return any(_states(view, reasoning, score, scale) for view in views)


def _states(text: str, reasoning: str, score: float, scale: Scale) -> bool:
    value = _answers(scale)
    if not any(_worth(found[1], scale) == score for found in re.finditer(rf"score[^0-9]{{0,16}}?({value})", text)):
        return False
    return _quoted(text, reasoning) or any(
        _worth(found[1], scale) == score and _leads(text, found.start(), reasoning)
        for found in re.finditer(rf"[\"'”]\s*,\s*[\"']score[\"']\s*:\s*[\"']?({value})", text)
    )


def _quoted(text: str, reasoning: str) -> bool:
    """Whether the reasoning stands in a text; a short one only behind its key."""
    words, letters = _letters(text), _letters(_plain(reasoning))
    if len(letters) >= SHORT:
        return letters[:LONG] in words or letters[-LONG:] in words
    if letters:
        return f"reasoning{letters}" in words
    return re.search(r"reasoning(?:[\"']?[:=][\"']{2}|\W{0,16}(?:score|confidence))", "".join(text.split())) is not None


def _leads(text: str, place: int, reasoning: str) -> bool:
    """Whether a text goes on to a score at ``place`` as the reasoning ends, or begins with it."""
    before = "".join(text[max(0, place - NEAR) : place].split())[-ENDING:]
    if not before:
        return place < NEAR or reasoning[-1:].isspace()
    return "".join(_plain(reasoning).split()).endswith(before)


def _answers(scale: Scale) -> str:
    """A pattern of what may stand for a score."""
    named = {"binary": (*scale.labels, "yes", "no"), "ordinal": scale.labels, "choices": scale.labels}
    labels = sorted({label.casefold() for label in named.get(scale.kind, ()) if label}, key=len, reverse=True)
    return "|".join([*map(re.escape, labels), *([] if scale.kind in {"ordinal", "choices"} else [NUMBER])])


def _worth(said: str, scale: Scale) -> float | None:
    """What an answer is worth, if the scale has it."""
    for answer in [float(said), said] if re.fullmatch(NUMBER, said) else [said]:
        try:
            return scale.read(answer)[0]
        except (ValueError, TypeError):
            continue
    return None


def _views(text: str) -> Iterator[str]:
    """A text as it stands, and as what it would be without its escapes."""
    for _ in range(1 + NESTED):
        yield _plain(text)
        if (bare := ESCAPE.sub(_unescaped, text)) == text:
            return
        text = bare


def _unescaped(found: re.Match[str]) -> str:
    return chr(int(found[1], 16)) if found[1] else " " if found[2] else found[3]


def _plain(text: str) -> str:
    """Small letters, in the plain form of look-alike ones, without signs that are not seen."""
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(sign for sign in text if unicodedata.category(sign) != "Cf")


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)
