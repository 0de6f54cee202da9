"""Which option of a multiple-choice question a response settles on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

from grape.checkers import Finding, checker, from_row
from grape.checkers.answer import MARKS, TAIL, clean, line_after, unwrap
from grape.errors import ConfigError, one_line
from grape.types import Question, Response

_IS = r"(?:[ \t]*[*_]{0,2}[ \t]*[:=]|[ \t]+(?:is|was|(?:must|should|would|will|has to) be)\b[ \t]*:?)"
_MARK = re.compile(
    rf"\\(?:boxed|fbox)[ ]*(?=\{{)|<answer>|^[ \t]{{0,8}}####(?!#)"
    rf"|\b(?i:answers?|choice|option|selection|letter)\b[*_`]{{0,3}}(?i:(?: (?:to|for) [^\n.:;!?]{{1,60}}?)?{_IS})"
    r"|\b(?i:(?:i|we)(?:'ll| will| would|'d)? (?:choose|pick|select|go with|answer))\b"
    r"|(?P<before>(?:\b(?i:option|choice|answer)[ ]+)?(?:\([A-Z]\)|\b[A-Z]\b[).]?)"
    r"(?=[ ]+(?i:is|seems|must be)[ ]+(?i:the[ ]+)?(?i:correct|right|best|answer)\b))",
    re.MULTILINE,
)
_LETTER = re.compile(
    r"(?:(?i:the[ ]+)?(?i:option|choice|letter|answer)[ ]*:?[ ]*)?(?P<open>[(\[{]?)[*_]{0,2}(?P<letter>[A-Za-z])"
    r"[*_]{0,2}(?P<close>[)\]}.:]*)(?P<rest>(?![A-Za-z0-9'^_=+*/]).*)",
    re.DOTALL,
)
_OTHER = re.compile(
    r"(?:^[ ]|\b(?:or|and|nor|versus|vs)\b|[,/&;])[ ]*(?:(?i:option|choice)[ ]+)?\(?(?P<letter>[A-Z])(?![A-Za-z'])"
)
_GOES_ON = re.compile(r"[ ]*(?:[,;:(\-–—]|(?:because|since|as|is|which|for|with|due|given|and|or)\b)")


def _letters(letters: str) -> str:
    if len(letters) < 2 or len(set(letters)) < len(letters) or not re.fullmatch(r"[A-Z]+", letters):
        raise ValueError("letters are two or more different capital letters, such as ABCD")
    return letters


class Choice(NamedTuple):
    """The options that a response settles on: one, or several where it does not settle."""

    options: tuple[str, ...]


def _read(text: str, letters: str) -> Choice | None:
    """The option that a short text is: `B`, `(b)`, `B. Paris`, `option B`; None where it is none."""
    found = _LETTER.fullmatch(text.strip())
    if found is None:
        return None
    letter, rest = found["letter"], found["rest"]
    if letter.islower() and not (rest.strip() == "" or (found["open"] and found["close"])):
        return None
    if letter.upper() not in letters:
        return None
    others = [other["letter"] for other in _OTHER.finditer(rest) if other["letter"] in letters]
    options = tuple(sorted({letter.upper(), *others}))
    if len(options) == 1 and rest.strip() and not found["close"] and letter in "AI" and not _GOES_ON.match(rest):
        return None  # `A dog`: an article
    return Choice(options)


def _marked(text: str, letters: str) -> Iterator[Choice]:
    """The marked options, last one first."""
    for mark in reversed(list(_MARK.finditer(text))[-MARKS:]):
        if mark["before"]:
            content = mark["before"]
        elif mark[0].startswith("\\"):
            end = text.find("}", mark.end(), mark.end() + 200)
            if end < 0:
                continue
            content = re.sub(r"\\[a-z]+\s*|[{}]", " ", text[mark.end() : end])
        else:
            content = unwrap(line_after(text, mark.end())).text
        content = re.sub(r"^(?:(?i:both|either|neither)[ ]+)", "", content.strip())
        if (choice := _read(content, letters)) is not None:
            yield choice


def choose(text: str, letters: str) -> Choice | None:
    """The option a response settles on: the last marked one; else a line that is nothing but an option."""
    text = clean(text[-TAIL:])
    if (choice := next(_marked(text, letters), None)) is not None:
        return choice
    lines = [unwrap(line).text for line in text.splitlines() if line.strip()][-MARKS:]
    if not lines:
        return None
    bare = {choice for line in lines if len(line) <= 4 and (choice := _read(line, letters)) is not None}
    listed = [line for line in lines if re.match(r"\(?[A-Za-z][).:]", line)]
    choices = bare or {choice for line in listed if (choice := _read(line, letters)) is not None}
    return choices.pop() if len(choices) == 1 else None


@checker
def choice(
    question: Question,
    response: Response,
    *,
    reference: str = from_row("reference"),
    letters: Annotated[str, AfterValidator(_letters)] = "ABCDEFGHIJ",
) -> Finding:
    r"""1 if the response settles on the reference's option.

    Read are `The answer is (B)`, `**Answer: B**`, `\boxed{B}`, `Option B is correct`, or a line `B.` alone; the last
    one wins. A response that names several at once (`A or B`), or none, scores 0.
    """
    expected = _read(clean(reference), letters) or choose(reference, letters)
    if expected is None or len(expected.options) > 1:
        raise ConfigError(f"reference {one_line(reference, 60)!r} is not one option of {letters}")
    wanted = expected.options[0]
    got = choose(response.text, letters)
    if got is None:
        return Finding(0.0, f"no option found; expected {wanted}")
    read = " or ".join(got.options)
    if len(got.options) > 1:
        return Finding(0.0, f"reads {read}, more than one option; expected {wanted}", read)
    return Finding(float(read == wanted), f"reads {read}, expected {wanted}", read)
