"""What a question keeps from the policy: its reference, its tests, and whatever else its checkers are given."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from grape.checkers import FromRow, registry
from grape.item import Item
from grape.plan import Plan

WORD = re.compile(r"\d+(?:[.,]\d+)*|\w+")  # 0.4 is one word, and no quotation of 4
BREAK = re.compile(r"((?<=[.!?])\s+|\s*\n\s*)")
RUN = 8  # so many words in a row of a hidden text are a quotation of it, or a whole sentence of fewer
EXACT = 1  # characters up to which case counts in a word by itself: an answer A is not the article
INSIDE = 8  # characters from which on a sentence is also found inside words
REMARK = 20  # characters from which on a field that no checker is given counts too: a solution, and no label


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """The quotable pieces of hidden texts: words in a row, and strings that are found even inside words."""

    runs: frozenset[tuple[str, ...]]
    strings: frozenset[str]

    @classmethod
    def of(cls, sentences: Collection[str]) -> Hidden:
        """What quotes any of these sentences."""
        inside = [s for s in sentences if len(s) >= INSIDE or not s.isascii() or not _words(s)]
        split = [_words(sentence) for sentence in sentences]
        runs = {run for words in split for run in _windows(words, min(RUN, len(words)))}
        return cls(runs=frozenset(runs), strings=frozenset(map(_flat, inside)))

    def quoted_in(self, text: str) -> bool:
        """Whether a text quotes a hidden one, whatever its layout and punctuation."""
        return not self._quoted(text).empty

    def without(self, text: str) -> str:
        """``text`` less every sentence that quotes a hidden one, and nothing of it where a quotation spans sentences.

        The sentence goes, and not the quotation alone, because what surrounds a gap tells what was in it.
        """
        if not self.quoted_in(text):
            return text
        parts = [*BREAK.split(text), ""]
        sentences = zip(parts[::2], parts[1::2], strict=True)
        kept = "".join(sentence + gap for sentence, gap in sentences if not self.quoted_in(sentence)).rstrip()
        return "" if self.quoted_in(kept) else kept

    def unless(self, text: str) -> Hidden:
        """Less what ``text`` gives away."""
        given = self._quoted(text)
        return Hidden(runs=self.runs - given.runs, strings=self.strings - given.strings)

    def __or__(self, other: Hidden) -> Hidden:
        return Hidden(runs=self.runs | other.runs, strings=self.strings | other.strings)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to quote."""
        return not self.runs and not self.strings

    def _quoted(self, text: str) -> Hidden:
        flat, words = _flat(text), _words(text)
        windows = {run for length in {len(run) for run in self.runs} for run in _windows(words, length)}
        return Hidden(
            runs=self.runs & windows, strings=frozenset(string for string in self.strings if string in flat)
        )  # fmt: skip


def hidden(plan: Plan, also: Collection[str] = ()) -> Hidden:
    """What the policy must not be shown of a plan's question, wherever it is quoted.

    Its reference, every field that a checker is given, the fields ``also`` (the given answer, say), answers that the
    rubric holds in place of a field, long texts in other fields; its tests and entry point, less what the question
    itself gives away.
    """
    question = plan.question
    fields = {"reference", *also} | {field for item in plan.leaves for field in item.row_fields.values()}
    fields -= {"tests", "entry_point"}
    told: list[Any] = [question.get(field) for field in fields]
    told += [value for item in plan.leaves for value in literal_answers(item)]
    rest = [value for name, value in question.metadata.items() if name not in fields]
    programs = Hidden.of(_sentences([question.tests, question.entry_point])).unless(question.prompt)
    long = [sentence for sentence in _sentences(rest) if len(sentence) >= REMARK]
    return Hidden.of(_sentences(told)) | Hidden.of(long).unless(question.prompt) | programs


def saw_hidden(item: Item) -> bool:
    """Whether an item's judge or checker is given what is hidden, so that its prose may tell it in other words."""
    return bool(item.row_fields) or bool(literal_answers(item))


def literal_answers(item: Item) -> list[Any]:
    """Values that the rubric gives a checker where it would otherwise take the row's reference or tests."""
    if item.check is None:
        return []
    defaults = registry()[item.check].defaults
    return [value for name, value in item.arguments.items() if isinstance(defaults.get(name), FromRow)]


def _sentences(values: Iterable[Any]) -> list[str]:
    """The sentences and lines of all texts and numbers in values, but for the `else:` and `}` of a longer text."""
    sentences = []
    for text in _texts(values):
        parts = [part.strip() for part in BREAK.split(text)[::2] if part.strip()]
        sentences += parts if len(parts) == 1 else [part for part in parts if not _trivial(part)]
    return sentences


def _trivial(sentence: str) -> bool:
    words = _words(sentence)
    return sentence.isascii() and (not words or (len(words) == 1 and words[0].isalpha()))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, Iterable):
        for part in value:
            yield from _texts(part)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.replace(",", "") for word in WORD.findall(unicodedata.normalize("NFKC", text)))


def _flat(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _windows(words: tuple[str, ...], length: int) -> Iterator[tuple[str, ...]]:
    folded = tuple(word if length == 1 and len(word) <= EXACT else word.casefold() for word in words)
    return (folded[start : start + length] for start in range(len(words) - length + 1) if length)
