"""A response's number against the reference's, within a tolerance."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

from pydantic import Field

from grape.checkers import Finding, checker, from_row
from grape.checkers.answer import Extract, final_answer, stated_answer
from grape.checkers.quantity import Quantity, same_unit, shown
from grape.checkers.reading import reading
from grape.errors import ConfigError, one_line
from grape.types import Question, Response

Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@checker
def numeric(
    question: Question,
    response: Response,
    *,
    reference: str | int | float = from_row("reference"),
    tolerance: Tolerance = 0.0,
    relative: Tolerance = 0.0,
    extract: Extract = "last_number",
) -> Finding:
    """1 if the response's number is the reference's to within ``tolerance``, or ``relative`` times the reference.

    The number is the last marked answer, or else the last number (``extract: marked`` takes only marked ones). Units
    are as strict as in `math`; what is not a finite number is equal to nothing.
    """
    expected = reading(stated_answer(str(reference))).quantity
    if expected is None:
        raise ConfigError(f"reference {one_line(reference, 60)!r} is not a number")
    answer = final_answer(response.text, extract)
    goal = f"expected {_written(expected)}"
    if answer is None:
        return Finding(0.0, f"no number found; {goal}")
    read = one_line(answer.text, 80)
    got = reading(answer).quantity
    if got is None:
        return Finding(0.0, f"reads {read}, which is not a number; {goal}", read)
    if not same_unit(expected, got):
        return Finding(0.0, f"reads {read}, which has {got.unit or 'no unit'}; {goal}", read)
    off = abs(got.value - expected.value)
    allowed = max(Fraction(tolerance), Fraction(relative) * abs(expected.value))
    within = f" within {shown(allowed)}" if allowed else ""
    return Finding(float(off <= allowed), f"reads {read}, {goal}{within}", read)


def _written(quantity: Quantity) -> str:
    return one_line(f"{shown(quantity.value)} {quantity.unit or ''}", 80)
