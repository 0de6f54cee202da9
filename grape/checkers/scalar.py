"""One expression as a SymPy object, read by math-verify's parser. Imported by worker processes only."""

from __future__ import annotations

import math
import re
from itertools import accumulate

from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from sympy import Abs, Basic, Expr, Float, I, Integer, Mul, Pow, Rational, Symbol, factorial, nan, zoo

from grape.checkers.expression import DEPTH, Unreadable

CONFIG = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
DIGITS = 1_000_000  # of a number that is worked out
LARGEST = 12  # digits of an exponent
_PROSE = re.compile(r"(?<![\\A-Za-z])(?![A-Z]+(?![A-Za-z]))[A-Za-z]{4,}")  # no product of so many variables
_GREEK = "pi|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|sigma|phi|omega|rho|tau"


def _operand(text: str, at: int) -> tuple[str, int]:
    """The argument that a command takes at ``at``: a group, a parenthesis, a command, a number, or one character."""
    while at < len(text) and text[at] == " ":
        at += 1
    if at >= len(text):
        raise Unreadable("an argument is missing")
    if text[at] in "{(":
        end, depth = at, 0
        while end < len(text):
            depth += (text[end] in "{(") - (text[end] in "})")
            end += 1
            if depth == 0:
                return _arguments(text[at + 1 : end - 1]), end
        raise Unreadable("a bracket that is not closed")
    found = re.match(r"\\[A-Za-z]+|-?\s*(?:\d+(?:\.\d+)?|\.\d+|[A-Za-z]|\\[A-Za-z]+)|.", text[at:])
    assert found is not None
    return found[0], at + found.end()


def _arguments(text: str) -> str:
    r"""Braces around every argument: `\frac12`, `\sqrt2`, `2^10`, `2^(x+1)`, `2^-1`."""
    out, at = "", 0
    while at < len(text):
        found = re.match(r"\\[A-Za-z]+|\\.|.", text[at:], re.DOTALL)
        assert found is not None
        token, at = found[0], at + found.end()
        out += token
        if token in {"\\frac", "\\binom"}:
            for _ in range(2):
                digit = re.match(r"\s*(\d)", text[at:])  # \frac12 is a half, one digit each
                argument, at = (digit[1], at + digit.end()) if digit else _operand(text, at)
                out += f"{{{argument}}}"
        elif token == "\\sqrt":
            if root := re.match(r"\s*\[([^\]]*)\]", text[at:]):
                out, at = f"{out}[{root[1]}]", at + root.end()
            argument, at = _operand(text, at)
            out += f"{{{argument}}}"
        elif token in {"^", "_"}:
            argument, at = _operand(text, at)
            out += f"{{{argument}}}"
    return out


def _spelled(text: str) -> str:
    """A scalar in the spelling that math-verify's parser reads as it is meant."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if _PROSE.search(re.sub(r"\\text\s*\{[^{}]*\}", " ", text)):
        raise Unreadable(f"words, and no expression: {text[:60]}")
    brackets = re.findall(r"[()\[\]{}]", text)
    depths = list(accumulate(1 if bracket in "([{" else -1 for bracket in brackets))
    if depths and (depths[-1] or min(depths) < 0 or max(depths) > DEPTH):  # the parser takes long to refuse these
        raise Unreadable("brackets that do not match, or nested too deeply")
    text = re.sub(r"([A-Za-z])('+)", lambda found: f"{found[1]}_{{{'p' * len(found[2])}}}", text)
    text = re.sub(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,4})(?![\w.])", r"(\1 \\cdot 10^{\2})", _repeating(text))
    text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)", r"(\\frac{\1 \\pi}{180})", text)
    text = re.sub(r"(?<![\w.^/}!)\]])(\d+)\s*/\s*(\d+)(?![\d.^!/])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<![\w.^/}!)\]])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\\frac{\2}{\3})", text)
    text = re.sub(rf"\\({_GREEK})\s*\(", r"\\\1 \\cdot (", text)
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", _arguments(text))
    if re.search(r"\d\s+[\d.]|\.\s*\d*\s*\.|[$#&?@]", text):
        raise Unreadable(f"not one expression: {text[:60]}")
    return text


def _repeating(text: str) -> str:
    def fraction(found: re.Match[str]) -> str:
        whole, part, repeat = found[1] or "0", found[2], found[3]
        top = int(whole + part + repeat) - int(whole + part)
        return f"\\frac{{{top}}}{{{(10 ** len(repeat) - 1) * 10 ** len(part)}}}"

    return re.sub(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", fraction, text)


def scalar(text: str) -> Basic:
    """The SymPy object of one expression: decimals exact, `i` the imaginary unit, odd roots of negatives real."""
    parsed = latex2sympy(_spelled(text), is_real=True, normalization_config=None, conversion_config=CONFIG)
    if not isinstance(parsed, Basic) or parsed.has(nan, zoo):
        raise Unreadable(f"no finite value: {text[:60]}")
    if parsed.is_Relational or parsed.is_Boolean:
        raise Unreadable(f"not one expression: {text[:60]}")
    exact = parsed.xreplace({number: Rational(str(number)) for number in parsed.atoms(Float)})
    exact = exact.xreplace({Symbol("i", real=True): I})
    _size(exact)
    done = exact.replace(_is_odd_root, _real_root).doit()
    if done.has(nan, zoo):
        raise Unreadable(f"no finite value: {text[:60]}")
    return done


def _size(part: Basic) -> float:
    """About how many digits a constant has once it is worked out; towers of powers are refused before they are."""
    parts = [_size(each) for each in part.args]
    size = max(parts, default=0.0)
    if isinstance(part, Rational):
        size = math.log10(max(abs(part.p), part.q))
    elif isinstance(part, Pow) and part.exp.is_number and part.base not in (0, 1, -1):
        size = math.inf if parts[1] > LARGEST else parts[0] * abs(float(part.exp.doit()))
    elif isinstance(part, factorial) and part.args[0].is_number:
        size = math.inf if parts[0] > LARGEST else 10 ** parts[0] * parts[0]
    elif isinstance(part, Mul):
        size = sum(parts)
    if size > DIGITS:
        raise Unreadable("a number too large to work out")
    return size


def _is_odd_root(part: Basic) -> bool:
    return isinstance(part, Pow) and part.exp.is_Rational and part.exp.q % 2 == 1 and bool(part.base.is_negative)


def _real_root(part: Pow) -> Expr:
    return Integer(-1) ** part.exp.p * Abs(part.base) ** part.exp
