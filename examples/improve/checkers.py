"""The checkers of the example. Both spell the question's word backwards themselves: no row needs a reference."""

from __future__ import annotations

from grape import Finding, Question, Response, checker


def backwards(question: Question) -> str:
    """The last word of the question from its end to its start."""
    return question.prompt.split()[-1][::-1]


def answer(response: Response) -> str:
    """A response less its closing mark."""
    return response.text.strip().rstrip(".!")


@checker
def spelt_backwards(question: Question, response: Response) -> Finding:
    """1 if the response is the question's word backwards."""
    right = answer(response) == backwards(question)
    return Finding(float(right), "right" if right else "wrong", answer(response))


@checker
def letters_in_place(question: Question, response: Response) -> Finding:
    """The share of letters in place; the reasoning shows the letters that may stay, and no other."""
    got, right = answer(response), backwards(question)
    stay = [got[place : place + 1] == letter for place, letter in enumerate(right)]
    shown = "".join(letter if stays else "-" for letter, stays in zip(right, stay, strict=True))
    return Finding(sum(stay) / max(len(got), len(right)), shown, got)
