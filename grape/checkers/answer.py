"""The final answer of a text: the last one that is marked as such, freed of what it is wrapped in."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Literal, NamedTuple

TAIL = 1_000_000  # characters at the end of a response that are searched
LONGEST = 2_000  # characters of one answer
MARKS = 100  # marks that are looked at, from the last one back
Extract = Literal["marked", "last_number"]


class Answer(NamedTuple):
    """An answer's own text; ``latex`` where it stood in mathematics, so that bare letters there are variables."""

    text: str
    latex: bool = False


class _Cleaned(dict[int, "str | int | None"]):
    """A translation table that is filled as characters turn up."""

    def __missing__(self, code: int) -> str | int | None:
        char, kind = chr(code), unicodedata.category(chr(code))
        value: str | int | None = code
        if code >= 128 and kind == "Nd":
            value = str(unicodedata.decimal(char))
        elif kind == "Cf":
            value = None
        elif kind == "Zs":
            value = " "
        elif 0xFF01 <= code <= 0xFF5E:
            value = chr(code - 0xFEE0)
        elif char in "−‐‑–﹣":
            value = "-"
        elif char in "‘’′":
            value = "'"
        elif char in "“”":
            value = '"'
        self[code] = value
        return value


_CLEANED = _Cleaned()


def clean(text: str) -> str:
    """``text`` without invisible characters (direction marks, zero widths), every script's digits as 0-9."""
    return text if text.isascii() else text.translate(_CLEANED)


_MARK = re.compile(
    r"""
    (?P<box>\\(?:boxed|fbox)[ ]*(?=\{))
    | (?P<tag><answer>)
    | ^[ \t>*_]{0,8}\#{4}(?!\#)
    | ^[ \t>*_-]{0,8}A[*_]{0,2}:[*_]{0,2}
    | ^[ \t]{0,8}[\#*_]{1,6}[ \t]*(?i:(?:the[ ])?(?:final[ ])?answer)[ \t]*[*_]{0,2}[ \t]*$
    | \b(?i:answers?)\b[*_`]{0,3}
      (?:[ ](?i:to|for|of)[ ][^\n.:;!?]{1,60}?)?
      (?: [ \t]*[*_]{0,2}[ \t]*[:=]
        | [ \t]+(?i:is|are|was|equals|(?:must|should|would|will|has[ ]to)[ ]be)\b[ \t]*:? )
      [*_]{0,2}
    """,
    re.VERBOSE | re.MULTILINE,
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_DELIMITERS = (("\\[", "\\]"), ("$$", "$$"), ("\\(", "\\)"))
_FILLER = re.compile(
    r"(?i)(?:therefore|thus|hence|simply|just|indeed|clearly|then|now|also|actually|exactly|precisely|obviously|"
    r"equal to|given by|going to be|the number|the value)\b[:,]?\s*"
)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*_\"')\]]|$)")
_REASON = re.compile(
    r"[,;]?\s+(?i:because|since|as|so|which|where|for|when|that|given|if|after|with|i\.e|assuming)(?![A-Za-z])"
)
_CALCULATION = re.compile(r"<<[^<>]*>>")
_SPACING = re.compile(r"^(?:\\[,;:! ]|\\displaystyle\b|~)+|(?:\\[,;:! ]|~)+$")
_WHOLE_COMMAND = re.compile(r"\\(?:boxed|fbox|text|textbf|textrm|textit|mathbf|mathrm|mathit|bf|bold)\s*(?=\{)")
_NUMBER = re.compile(
    r"(?<![\w.\\])(?:(?<![\d)\]])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?(?:\s?\\?%)?"
)
_MATHEMATICS = """
    sin cos tan sec csc cot arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt pi abs min max gcd lcm lim mod
    infinity inf floor ceil alpha beta gamma delta epsilon theta lambda mu sigma phi omega tau rho
"""
MATHEMATICS = frozenset(_MATHEMATICS.split())
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def closing(text: str) -> dict[int, int]:
    """The place of each opening brace and of the one that closes it; escaped braces are no braces."""
    pairs: dict[int, int] = {}
    open_: list[int] = []
    for found in _BRACE.finditer(text):
        if found[0] == "{":
            open_.append(found.start())
        elif found[0] == "}" and open_:
            pairs[open_.pop()] = found.start()
    return pairs


def unwrap(content: str, latex: bool = False) -> Answer:
    """The answer without emphasis, dollar signs of mathematics, boxes, braces around it and a full stop at its end."""
    text = _CALCULATION.sub("", content).strip()
    for _ in range(20):
        before = text
        text = _SPACING.sub("", text.strip().rstrip(",;:")).strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        text = text.strip("*_`").strip()
        if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'":
            text = text[1:-1]
        text = _FILLER.sub("", text, count=1) if _FILLER.match(text) else text
        for opener, closer in (*_DELIMITERS, ("$", "$")):
            inside = text[len(opener) : -len(closer)]
            if text.startswith(opener) and text.endswith(closer) and inside and closer not in inside:
                text, latex = inside, True
        command = _WHOLE_COMMAND.match(text)
        start = command.end() if command else 0
        if text[start : start + 1] == "{" and closing(text).get(start) == len(text) - 1:
            text, latex = text[start + 1 : -1], not command or "text" not in command[0]
        if text == before:
            break
    return Answer(_without_dollars(text), latex)


def _without_dollars(text: str) -> str:
    """Without the dollar signs of mathematics inside; a sign before each number is a currency and stays."""
    if text.count("$") - text.count("\\$") < 2 or re.search(r"(?<!\\)\$(?!\s*-?[\d.])", text) is None:
        return text
    return re.sub(r"(?<!\\)\$", "", text).strip()


def line_after(text: str, start: int) -> str:
    """What follows a mark: the rest of its line, or the next line with something on it; up to the sentence's end."""
    rest = text[start : start + LONGEST].lstrip()
    for opener, closer in (*_DELIMITERS, ("$", "$")):
        end = rest.find(closer, len(opener))
        if rest.startswith(opener) and end > 0 and not (opener == "$" and "\n" in rest[:end]):
            end += len(closer)
            return rest[:end] + _clause(rest[end:].split("\n", 1)[0])
    return _clause(rest.split("\n", 1)[0])


def _clause(line: str) -> str:
    line = line.split("</", 1)[0]
    end = _SENTENCE_END.search(line)
    line = line[: end.start()] if end else line
    reason = _REASON.search(line)
    return line[: reason.start()] if reason else line


def is_words(answer: Answer) -> bool:
    """Whether an answer is plain words, such as `no solution`, and nothing to reckon with."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r" \1 ", answer.text)
    if re.search(r"[\d\\=<>^+*/|]", text) or not re.search(r"[^\W\d_]{2}", text):
        return False
    words = [word for word in re.findall(r"[^\W\d_]+", text) if word.lower() not in MATHEMATICS]
    return any(len(word) > (2 if text == answer.text and answer.latex else 1) for word in words)


def _claims(answer: Answer, words: bool) -> bool:
    """Whether a line after `the answer is` states an answer, rather than going on in prose."""
    first = _WORD.match(answer.text)
    if first is None or first[0].lower() in MATHEMATICS or answer.latex:
        return bool(answer.text)
    if re.match(r"[\w\s(),']{1,40}=", answer.text):
        return True
    return words and is_words(answer)


def answers(text: str, words: bool = False) -> Iterator[Answer]:
    """The marked answers, last one first; those in words count only where ``words`` are looked for."""
    text = clean(text[-TAIL:])
    marks = list(_MARK.finditer(text))
    braces = closing(text) if any(mark["box"] for mark in marks) else {}
    outer: list[re.Match[str]] = []
    inside = -1
    for mark in marks:
        if mark.start() < inside or (mark["box"] and mark.end() not in braces):
            continue  # part of the answer in a box; or a box that is never closed: a response cut short
        inside = braces[mark.end()] if mark["box"] else inside
        outer.append(mark)
    for mark in reversed(outer[-MARKS:]):
        start = mark.end()
        if mark["box"]:
            answer = unwrap(text[start + 1 : braces[start]][: LONGEST + 1], latex=True)
        elif mark["tag"]:
            end = text.find("</answer>", start, start + LONGEST)
            answer = unwrap(text[start:end] if end >= 0 else "")
        else:
            answer = unwrap(line_after(text, start))
        if answer.text and (mark["box"] or _claims(answer, words)):
            yield answer


def final_answer(text: str, extract: Extract = "marked", words: bool = False) -> Answer | None:
    """The last marked answer; the text itself where it is nothing but an answer; by request the last number in it."""
    if (answer := next(answers(text, words), None)) is not None:
        return answer
    tail = clean(text[-TAIL:]).strip()
    if 0 < len(tail) <= LONGEST and "\n" not in tail and _claims(bare := unwrap(tail), words) and not _prose(bare):
        return bare
    if extract == "last_number":
        numbers = _NUMBER.findall(tail)
        return Answer(numbers[-1]) if numbers else None
    return None


def stated_answer(reference: str) -> Answer:
    """The answer of a reference: the last marked one of a worked solution, or else the whole text."""
    return next(answers(reference, words=True), None) or unwrap(clean(reference)[: LONGEST + 1])


def _prose(answer: Answer) -> bool:
    words = [word for word in _WORD.findall(answer.text) if word.lower() not in MATHEMATICS]
    return len(words) > 4 or any(word in {"is", "are", "was", "were", "has", "makes", "gives"} for word in words)
