"""The checkers of the quickstart: with which word a response answers, and how many of its letters are right."""

from __future__ import annotations

import re

from grape import Finding, Question, Response, checker, from_row

TALK = re.compile(r"Maybe it is|It is|I give up|Sure!|Ugh|You are welcome!|Whatever")


def answer(text: str) -> str:
    """The one word that is no talk; nothing where there are several."""
    words = re.findall(r"[a-z]+", TALK.sub(" ", text))
    return words[0] if len(words) == 1 else ""


@checker
def word_is(question: Question, response: Response, *, reference: str = from_row("reference")) -> Finding:
    """1 if the response answers with the reference."""
    got = answer(response.text)
    return Finding(float(got == reference), f"answers {got!r}, expected {reference!r}", got)


@checker
def letters_right(question: Question, response: Response, *, reference: str = from_row("reference")) -> Finding:
    """The share of letters that stand where the reference has them."""
    got = answer(response.text)
    right = sum(a == b for a, b in zip(got, reference, strict=False))
    return Finding(right / max(len(got), len(reference)), f"{right} letters of {reference!r} in place", got)
