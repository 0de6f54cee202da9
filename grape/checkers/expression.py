"""The form of a mathematical text: one notation for many, and its parts at the top level. Nothing is evaluated."""

from __future__ import annotations

import re
from typing import NamedTuple

_COMMANDS = {
    r"[dtc]frac": r"\\frac", r"[dt]binom": r"\\binom", r"(?:leqslant|leqq|leq|le)": r"\\le ",
    r"(?:geqslant|geqq|geq|ge)": r"\\ge ", r"lt": "<", r"gt": ">", r"(?:neq|ne)": r"\\ne ",
    r"(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|bigg|Bigg|middle)": " ",
    r"(?:displaystyle|textstyle|limits|nolimits|quad|qquad)": " ",
    r"(?:lvert|rvert|vert)": "|", r"(?:lbrace)": r"\\{", r"(?:rbrace)": r"\\}", 
    r"langle": "(", r"rangle": ")", r"(?:lbrack)": "[", r"(?:rbrack)": "]",
    r"(?:dots|cdots|ldots|dotsc)": r"\\ldots ", r"varnothing": r"\\emptyset ", r"(?:iff|Leftrightarrow)": r"\\iff ",
}  # fmt: skip
_COMMAND = [(re.compile(rf"\\{name}(?![A-Za-z])\s*"), value) for name, value in _COMMANDS.items()]
_CHARACTERS = str.maketrans({
    "π": "\\pi ", "∞": "\\infty ", "×": "\\times ", "÷": "\\div ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ",
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ",
    "±": "\\pm ", "∅": "\\emptyset ", "°": "^{\\circ}", "²": "^{2}", "³": "^{3}", "⁴": "^{4}", "¹": "^{1}",
    "½": " \\frac{1}{2}", "¼": " \\frac{1}{4}", "¾": " \\frac{3}{4}", "⅓": " \\frac{1}{3}", "⅔": " \\frac{2}{3}",
    "⁄": "/", "∕": "/", "ℝ": "\\mathbb{R}", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "λ": "\\lambda ",
    "μ": "\\mu ", "σ": "\\sigma ", "φ": "\\phi ", "ω": "\\omega ", "Δ": "\\Delta ", "√": "\\sqrt ", "…": "\\ldots ",
    "\t": " ", "\n": " ", "\r": " ",
})  # fmt: skip
_FUNCTIONS = (
    "arcsin|arccos|arctan|asin|acos|atan|sinh|cosh|tanh|sin|cos|tan|sec|csc|cot|log|ln|exp|sqrt|min|max|gcd|lcm"
)
_ASCII = re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?=[\s(\\{{\d^_])")
_FONT = re.compile(
    r"\\(?:mathrm|mathbf|mathit|mathsf|textbf|textit|textrm|textnormal|mbox|operatorname|bm|boldsymbol)\b"
)
_LETTER = re.compile(r"\\text\s*\{\s*([A-Za-z])\s*\}")
_NAMED = re.compile(rf"\\text\s*\{{\s*({_FUNCTIONS})\s*\}}")
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!;: ]|\{,\})(?=\d{3}(?!\d))")
_SPACE = re.compile(r"(\\\\)|\\[,;:!> ]|~")
_OPEN, _CLOSE = "([{", ")]}"


def normal(text: str) -> str:
    """One spelling for what is written in several: sizes, spaces, fonts, signs, and plain-text `sqrt(2)**3`."""
    text = _THOUSANDS.sub(",", text.translate(_CHARACTERS))
    text = _SPACE.sub(lambda found: found[1] or " ", text)
    for command, value in _COMMAND:
        text = command.sub(value, text)
    text = _NAMED.sub(r"\\\1", _LETTER.sub(r" \1 ", _FONT.sub(r"\\text", text)))
    text = text.replace("**", "^").replace("<=", "\\le ").replace(">=", "\\ge ").replace("!=", "\\ne ")
    text = re.sub(r"\\a(sin|cos|tan)(?![A-Za-z])", r"\\arc\1", _ASCII.sub(r"\\\1", text))
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    text = re.sub(r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty ", text)
    return re.sub(r"\s+", " ", text.replace("\\$", "$").replace("\\%", "%")).strip()


def split(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """The parts between the separators that stand in no bracket, and those separators."""
    parts, between, depth, last, at = [], [], 0, 0, 0
    while at < len(text):
        if text.startswith("\\begin", at):
            depth += 1
        elif text.startswith("\\end", at):
            depth -= 1
        found = separator.match(text, at) if depth == 0 else None
        if found and found.end() > at:
            parts.append(text[last:at].strip())
            between.append(found[0].strip())
            last = at = found.end()
            continue
        if text[at] == "\\" and at + 1 < len(text):
            at += 1
        depth += (text[at] in _OPEN) - (text[at] in _CLOSE)
        at += 1
    parts.append(text[last:].strip())
    return parts, between


def enclosed(text: str) -> tuple[str, str, str] | None:
    """The bracket, inside and bracket of a text that one pair encloses; brackets need not match: `[1, 2)`."""
    opener = next((each for each in ("\\{", "(", "[", "{") if text.startswith(each)), None)
    closer = next((each for each in ("\\}", ")", "]", "}") if text.endswith(each)), None)
    if opener is None or closer is None or len(text) < len(opener) + len(closer):
        return None
    depth = 0
    for found in re.finditer(r"\\[{}]|\\.|[()\[\]{}]", text):
        depth += (found[0] in {"\\{", "(", "[", "{"}) - (found[0] in {"\\}", ")", "]", "}"})
        if depth == 0 and found.end() < len(text):
            return None
    return (opener.lstrip("\\"), text[len(opener) : -len(closer)].strip(), closer.lstrip("\\")) if depth == 0 else None


LIST = re.compile(
    r"(?<=\d),(?!\d{3}(?!\d))|(?<!\d),|;|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![\\A-Za-z])(?:and|or)(?![A-Za-z])"
)
RELATION = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|\\ne(?![a-z])|\\approx(?![a-z])|\\in(?![a-z])|[=<>]")
_NAME = re.compile(
    r"(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?'*(?:\s*\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])*\s*\))?"
    r"|\\text\s*\{[^{}]*\}(?:_\{?\w+\}?)?|[A-Za-z][A-Za-z' ]{2,39})"
)


def is_relation(text: str) -> bool:
    """Whether an equals sign, an inequality or `in` stands at the top level."""
    return bool(split(text, RELATION)[1])


class Assignment(NamedTuple):
    """`x = 5`: what is named, and the value it is given. ``name`` is None where a sum is worked out: `3 + 4 = 7`."""

    name: str | None
    value: str


def assignment(text: str) -> Assignment | None:
    """The text as an answer that is given a name; None for any other equation, relation or list."""
    parts, between = split(text, RELATION)
    if not between or set(between) - {"=", "\\approx"} or "\\approx" in between[1:] or "" in parts:
        return None
    if len(split(text, LIST)[0]) > 1:
        return None
    first = parts[0]
    if _NAME.fullmatch(first) and (len(first) == 1 or first.startswith("\\") or not re.fullmatch(r"[a-z]{2}", first)):
        return Assignment(re.sub(r"\s+", " ", first), parts[-1])
    if "\\approx" in between or any(re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", part)) for part in parts[:-1]):
        return None
    if _NAME.fullmatch(parts[-1]) and len(parts) == 2:  # 5 = x
        return Assignment(parts[-1], first)
    return Assignment(None, parts[-1])


class Form(NamedTuple):
    """A mathematical text taken apart.

    ``kind`` is scalar (``text``), ordered (``brackets`` around ``parts``), unordered (``parts``, of the variable
    ``name`` if it is named), relation (``between`` the ``parts``), matrix (``parts`` in rows of ``columns``), union, or
    opaque: what can only be compared as text.
    """

    kind: str
    text: str
    parts: tuple[Form, ...] = ()
    between: tuple[str, ...] = ()
    brackets: str = ""
    name: str | None = None
    columns: int = 0


_OPAQUE = re.compile(
    r"\\ldots|\\mid|\\equiv|\\pmod|\\bmod|\\mod|\\iff|\\forall|\\exists|\\begin\{cases\}|:|\d\s*_|\.\.|\\to\b"
)
_MATRIX = re.compile(r"\\begin\{([pb]matrix|matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
_CUP = re.compile(r"\\cup(?![a-z])")
_COMMA = re.compile(r"[,;]")
DEPTH = 30


class Unreadable(ValueError):
    """A text that is no mathematics."""


def take_apart(text: str, depth: int = 0, bracketed: bool = False) -> Form:
    """The form of a normal text. Raises Unreadable for an empty part and for one that is nested too deeply."""
    if not text or depth > DEPTH:
        raise Unreadable("nothing there" if not text else "nested too deeply")
    if _OPAQUE.search(text) and "\\lim" not in text:
        return Form("opaque", re.sub(r"[\s{}]+", "", text))
    parts, _ = split(text, _COMMA if bracketed else LIST)
    parts = [part for part in parts if part] if not bracketed else parts
    if len(parts) > 1:
        return _listed(text, parts, depth)
    parts, between = split(text, RELATION)
    if between:
        return _related(text, parts, between, depth)
    parts, between = split(text, _CUP)
    if between:
        return Form("union", text, tuple(take_apart(part, depth + 1) for part in parts))
    if "\\pm" in text or "\\mp" in text:
        upper = text.replace("\\pm", "+").replace("\\mp", "-").strip().removeprefix("+")
        lower = text.replace("\\pm", "-").replace("\\mp", "+").strip().removeprefix("+")
        return Form("unordered", text, (take_apart(upper, depth + 1), take_apart(lower, depth + 1)))
    return _single(text, depth)


def _listed(text: str, parts: list[str], depth: int) -> Form:
    """`1, 2`; and `x = 1, 2` or `x = 1 or x = 2`, whose values are those of one variable."""
    given = [assignment(part) for part in parts]
    names = {each.name for each in given if each}
    name = names.pop() if len(names) == 1 and given[0] is not None else None
    bare = [each.value if each and name else part for each, part in zip(given, parts, strict=True)]
    forms = [take_apart(part, depth + 1) for part in bare]
    flat = [
        inner
        for form in forms
        for inner in (form.parts if form.kind == "unordered" and "\\p" in form.text else (form,))
    ]
    return Form("unordered", text, tuple(flat), name=name)


def _related(text: str, parts: list[str], between: list[str], depth: int) -> Form:
    if "\\approx" in between:
        parts, between = parts[: between.index("\\approx") + 1], between[: between.index("\\approx")]
        return take_apart(
            "".join(f"{part} {sign} " for part, sign in zip(parts, [*between, ""], strict=True)).strip(), depth + 1
        )
    if between[0] == "\\in" and len(parts) == 2:
        return take_apart(parts[1], depth + 1)
    return Form("relation", text, tuple(take_apart(part, depth + 1) for part in parts), tuple(between))


def _single(text: str, depth: int) -> Form:
    """One bracket, one matrix or one expression."""
    if matrix := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\", matrix[2]) if row.strip()]
        cells = [[take_apart(cell.strip(), depth + 1, True) for cell in split(row, re.compile("&"))[0]] for row in rows]
        if not cells or len({len(row) for row in cells}) != 1:
            raise Unreadable("rows of unequal length")
        return Form("matrix", text, tuple(cell for row in cells for cell in row), columns=len(cells[0]))
    if re.fullmatch(r"\][^\[\]]*[\[\]]|\[[^\[\]]*\[", text):  # ]0, 1[ is (0, 1)
        text = ("(" if text[0] == "]" else "[") + text[1:-1] + (")" if text[-1] == "[" else "]")
    pair = enclosed(text)
    if pair is None:
        return Form("scalar", text)
    opener, inside, closer = pair
    if opener == "{":
        if not inside:
            return Form("scalar", "\\emptyset")
        form = take_apart(inside, depth + 1, bracketed=True)
        return form if form.kind == "unordered" or "\\" not in text[:2] else Form("unordered", text, (form,))
    parts, _ = split(inside, _COMMA)
    if len(parts) > 1:
        return Form(
            "ordered", text, tuple(take_apart(part, depth + 1, True) for part in parts), brackets=opener + closer
        )
    if opener + closer == "()":
        return take_apart(inside, depth + 1, bracketed=True)
    if opener + closer == "[]":
        return Form("ordered", text, (take_apart(inside, depth + 1, True),), brackets="[]")
    raise Unreadable(f"brackets {opener}{closer} around one value")
