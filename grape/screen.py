"""What `grape label` shows: a response with what it is judged by, cut to the terminal, and harmless to it.

Every line of an outside text stands behind a bar, and whatever would steer a terminal is spelled out: a text can
neither move the cursor nor pass for a line of ours.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, chop_cells

from grape.log.query import clean
from grape.stored import chat
from grape.types import Question

BAR = "| "
FEWEST = 3  # lines of a text that are always shown
OWN = 6  # lines of the screen that are not texts: the head, an empty line, the prompt, and what is told after it
REASONING = 6  # lines of a judge's reasoning
LONG = 5_000  # characters of a line from which on it is cut anywhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One verdict of a judge, with the texts that it is about."""

    response_id: str
    question_id: str
    item: str
    category: str
    question: str
    response: str
    reference: str | None
    criterion: str
    judge: str | None
    outcome: str
    score: float | None
    confidence: float | None
    reasoning: str | None
    detail: str | None


def card(case: Case, head: str, *, whole: bool = False) -> str:
    """What a person sees before an answer: nothing of the judge's verdict is in it."""
    asked = chat(case.question or "")
    text = asked if isinstance(asked, str) else Question(question_id="", category="", text=tuple(asked)).prompt
    parts = {"question": text, "response": case.response or ""}
    if case.reference is not None:
        parts["reference"] = case.reference
    parts["criterion"] = case.criterion or ""
    width, height = shutil.get_terminal_size((100, 40))
    folded = {name: fold(text, width) for name, text in parts.items()}
    room = dict.fromkeys(folded, 0) if whole else _room({name: len(lines) for name, lines in folded.items()}, height)
    lines = ["", clean(f"{head}   item {case.item}   response {case.response_id}   category {case.category}")]
    for name, own in folded.items():
        lines += [name, *(own if whole else cut(own, room[name]))]
    return "\n".join(lines)


def verdict_lines(case: Case) -> str:
    """What the judge said, for after the answer."""
    width, _ = shutil.get_terminal_size((100, 40))
    who = clean(f"judge {case.judge or '-'}")
    if case.score is None:
        return "\n".join(
            [f"{who} gave no score: {clean(case.outcome)}", *cut(fold(case.detail or "", width), REASONING)]
        )
    sure = "" if case.confidence is None else f" (confidence {case.confidence:.2f})"
    said = cut(fold(case.reasoning, width), REASONING) if case.reasoning else []
    return "\n".join([f"{who} said {case.score:.3g}{sure}", *said])


def fold(text: str, width: int) -> list[str]:
    """A text as lines that fit the terminal, each behind a bar."""
    plain = text.replace("\r\n", "\n").expandtabs(4)
    space = max(width - len(BAR) - 1, 10)
    by_words = textwrap.TextWrapper(space, replace_whitespace=False, expand_tabs=False, break_on_hyphens=False)
    folded = []
    for line in clean(plain, keep="\n").split("\n"):
        simple = len(line) < LONG and cell_len(line) == len(line)
        folded += (by_words.wrap(line) if simple else chop_cells(line, space)) or [""]
    return [f"{BAR}{line}".rstrip() for line in folded]


def cut(lines: Sequence[str], room: int) -> list[str]:
    """The first lines, and how many more there are."""
    if len(lines) <= room:
        return list(lines)
    return [*lines[: room - 1], f"... {len(lines) - room + 1} more lines (m shows them)"]


def _room(needs: dict[str, int], height: int) -> dict[str, int]:
    """How many lines each text gets: what it needs, and where that is too much, a share of what is left over."""
    left = max(height - OWN - len(needs), FEWEST * len(needs))
    room: dict[str, int] = {}
    for number, (name, need) in enumerate(sorted(needs.items(), key=lambda pair: pair[1])):
        room[name] = min(need, max(FEWEST, left // (len(needs) - number)))
        left -= room[name]
    return room
