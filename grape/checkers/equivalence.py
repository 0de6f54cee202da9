"""Whether two mathematical texts are equal: the program of a worker process, on math-verify and SymPy.

math-verify's parser reads the expressions. Constants are compared exactly where they are rational and to 40 digits
where they are not, expressions with variables at fixed points of both signs; what cannot be evaluated is left to
math-verify's own `verify`. Only a worker imports this module: nowhere else does a model's text reach SymPy.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

from math_verify import verify
from sympy import Abs, Basic, Expr, FiniteSet, Integer, Interval, Rational, Set, Symbol, Union, nan, oo, simplify, zoo
from sympy.core.function import AppliedUndef

from grape.checkers.expression import Form, normal, take_apart
from grape.checkers.scalar import scalar
from grape.checkers.serving import serve

POINTS = 8
ENOUGH = 3  # points at which both sides have a value
CLOSE = Rational(1, 10**40)
EXACTLY = Integer(0)


def _value(part: Basic, point: dict[Symbol, Rational]) -> Expr | None:
    """The number of an expression at a point; None where it has none."""
    at = part.xreplace(point).doit() if point else part
    if at.is_Rational or at in (oo, -oo):
        return at
    if not getattr(at, "is_number", False) or at.has(oo, -oo, nan, zoo):
        return None
    number = at.evalf(60)
    real, imaginary = number.as_real_imag()
    return number if real.is_Float or imaginary.is_Float or number.is_Number else None


def _agree(left: Expr, right: Expr) -> bool:
    if (left.is_Rational and right.is_Rational) or left in (oo, -oo) or right in (oo, -oo):
        return bool(left == right)
    size = max(Abs(left), Abs(right))
    return bool(size == 0 or Abs(left - right) <= CLOSE * size)


def _points(symbols: Iterable[Symbol]) -> list[dict[Symbol, Rational]]:
    names = sorted(symbols, key=str)
    if not names:
        return [{}]
    return [
        {
            name: Rational(random.Random(f"{name} {number}").randint(30, 300), 101) * (-1 if number % 3 == 2 else 1)
            for name in names
        }
        for number in range(POINTS)
    ]


def compare(left: Basic, right: Basic, tolerance: Rational = EXACTLY) -> bool:
    """Whether two scalars are equal; of constants that are not both integers, whether within ``tolerance``."""
    if left == right:
        return True
    if isinstance(left, Set) or isinstance(right, Set):
        return bool(isinstance(left, Set) and isinstance(right, Set) and verify(left, right, timeout_seconds=None))
    symbols = left.free_symbols | right.free_symbols
    pairs = [(_value(left, point), _value(right, point)) for point in _points(symbols)]
    known = [(ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    real = [pair for pair in known if pair[0].is_real and pair[1].is_real]
    used = real if len(real) >= ENOUGH else known
    if not symbols and used:
        ours, theirs = used[0]
        if tolerance and not (ours.is_Integer and theirs.is_Integer) and ours.is_finite and theirs.is_finite:
            return bool(Abs(ours - theirs) <= tolerance)
        return _agree(ours, theirs) or (_tiny(ours) and _tiny(theirs) and simplify(left - right) == 0)
    if any(not _agree(*pair) for pair in used):
        return False
    if len(used) >= ENOUGH and not left.has(AppliedUndef) and not right.has(AppliedUndef):
        return True
    return bool(verify(left, right, float_rounding=15, timeout_seconds=None))


def _tiny(number: Expr) -> bool:
    return bool(Abs(number) < CLOSE)


def _proportional(left: Basic, right: Basic, positive: bool) -> bool:
    """Whether left = c * right for one number c other than 0, above 0 if ``positive``."""
    ratios = []
    for point in _points(left.free_symbols | right.free_symbols):
        ours, theirs = _value(left, point), _value(right, point)
        if ours is not None and theirs is not None and ours != 0 and theirs != 0:
            ratios.append(ours / theirs)
    first = ratios[0] if ratios else None
    if first is None or len(ratios) < ENOUGH or (positive and not first.is_positive):
        return False
    return all(_agree(first, ratio) for ratio in ratios[1:])


_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}


def _upward(form: Form) -> Form:
    """A relation that runs from the smaller to the larger side: `x > 2` is `2 < x`."""
    if set(form.between) <= {">", "\\ge"}:
        signs = tuple(_FLIPPED[sign] for sign in reversed(form.between))
        return form._replace(parts=form.parts[::-1], between=signs)
    return form


def _same_relation(ours: Form, theirs: Form, tolerance: Rational) -> bool:
    ours, theirs = _upward(ours), _upward(theirs)
    if ours.between != theirs.between:
        return False
    orders = [theirs.parts, theirs.parts[::-1]] if set(ours.between) <= {"=", "\\ne"} else [theirs.parts]
    if any(_all_same(ours.parts, order, tolerance) for order in orders):
        return True
    if len(ours.between) > 1 or any(part.kind != "scalar" for part in (*ours.parts, *theirs.parts)):
        return False
    left, right, left_too, right_too = (scalar(part.text) for part in (*ours.parts, *theirs.parts))
    if _solved(left, right) or _solved(left_too, right_too):  # `2x = 4` is not the answer `x = 2`
        return False
    return _proportional(left - right, left_too - right_too, positive=ours.between[0] in {"<", "\\le"})


def _solved(left: Basic, right: Basic) -> bool:
    return bool((left.is_Symbol and not right.free_symbols) or (right.is_Symbol and not left.free_symbols))


def _as_set(form: Form) -> Set | None:
    """Intervals, unions, inequalities of one variable and lists as sets of numbers; None for anything else."""
    if form.kind == "scalar":
        found = scalar(form.text)
        return found if isinstance(found, Set) else None
    either = form.kind == "unordered" and re.search(r"(?<![A-Za-z])or(?![A-Za-z])", form.text) is not None
    if form.kind == "union" or (either and any(part.kind == "relation" for part in form.parts)):
        parts = [_as_set(part) for part in form.parts]
        return Union(*parts) if all(part is not None for part in parts) else None
    if any(part.kind != "scalar" for part in form.parts):
        return None
    values = [scalar(part.text) for part in form.parts]
    if form.kind == "unordered":
        return None if any(value.free_symbols for value in values) else FiniteSet(*values)
    if form.kind == "ordered" and len(values) == 2 and all(value.is_extended_real for value in values):
        return Interval(values[0], values[1], form.brackets[0] == "(", form.brackets[1] == ")")
    if form.kind == "relation" and set(form.between) <= {"<", "\\le", ">", "\\ge"}:
        return _solution(_upward(form), values if _upward(form) is form else values[::-1])
    return None


def _solution(form: Form, values: list[Basic]) -> Set | None:
    bounds = [value for value in values if not value.is_Symbol]
    if len(bounds) != len(values) - 1 or any(bound.free_symbols for bound in bounds) or len(values) > 3:
        return None
    signs = form.between
    if len(values) == 2:
        return (
            Interval(-oo, bounds[0], True, signs[0] == "<")
            if values[0].is_Symbol
            else Interval(bounds[0], oo, signs[0] == "<")
        )
    return Interval(bounds[0], bounds[1], signs[0] == "<", signs[1] == "<") if values[1].is_Symbol else None


def _all_same(ours: Iterable[Form], theirs: Iterable[Form], tolerance: Rational) -> bool:
    ours, theirs = list(ours), list(theirs)
    return len(ours) == len(theirs) and all(map(lambda a, b: same(a, b, tolerance), ours, theirs))


def _same_elements(ours: Iterable[Form], theirs: Iterable[Form], tolerance: Rational) -> bool:
    left = list(theirs)
    for one in ours:
        match = next((number for number, other in enumerate(left) if same(one, other, tolerance)), None)
        if match is None:
            return False
        left.pop(match)
    return not left


def same(ours: Form, theirs: Form, tolerance: Rational = EXACTLY) -> bool:
    """Whether two texts taken apart mean the same; the order counts in brackets and not in lists and braces."""
    if ours.kind == theirs.kind:
        if ours.kind == "scalar":
            return compare(scalar(ours.text), scalar(theirs.text), tolerance)
        if ours.kind == "opaque":
            return ours.text == theirs.text
        if ours.kind == "relation" and _same_relation(ours, theirs, tolerance):
            return True
        if ours.kind == "unordered":
            named = ours.name is not None and theirs.name is not None and ours.name != theirs.name
            return not named and _same_elements(ours.parts, theirs.parts, tolerance)
        if ours.kind in {"ordered", "matrix"}:
            alike = ours.brackets == theirs.brackets and ours.columns == theirs.columns
            return alike and _all_same(ours.parts, theirs.parts, tolerance)
    if "opaque" in (ours.kind, theirs.kind):
        return False
    sets = _as_set(ours), _as_set(theirs)
    return None not in sets and bool(sets[0] == sets[1])


def _check(form: Form) -> None:
    """Read every expression of a form, so that what cannot be read is found whatever it is compared with."""
    if form.kind == "scalar":
        scalar(form.text)
    for part in form.parts:
        _check(part)


def _attempt(work: Callable[[], Any]) -> tuple[Any, str]:
    """The result of SymPy's work on a text, or what it raised: its parser raises any kind of exception."""
    try:
        return work(), ""
    except (MemoryError, SystemExit):
        raise
    except Exception as error:  # noqa: BLE001 - the parser raises bare Exception, SymPy whatever it meets
        return None, f"{type(error).__name__}: {error}"[:200]


def _read(text: str) -> Form:
    form = take_apart(normal(text))
    _check(form)
    return form


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """`{reference}` -> `{error}`; `{reference, answer, tolerance}` -> `{error, equal, why}`.

    ``error`` says what is wrong with the reference, ``why`` what is wrong with the answer.
    """
    reference, error = _attempt(lambda: _read(request["reference"]))
    if reference is None or "answer" not in request:
        return {"error": error}
    theirs, why = _attempt(lambda: _read(request["answer"]))
    if theirs is None:
        return {"error": "", "equal": False, "why": why}
    equal, why = _attempt(lambda: same(reference, theirs, Rational(request.get("tolerance", "0"))))
    return {"error": "", "equal": bool(equal), "why": why}


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    serve(answer)
