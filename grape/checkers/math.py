r"""Mathematical equivalence of a response's final answer with the reference's, exact and strict.

What is read as the answer: the last of `#### N`, `A: N`, `\boxed{N}`, `<answer>N</answer>` and "the answer is N" (also
"Answer: N"), or a response that is nothing but an answer. What is equal:

* numbers by value, exactly: 0.5 is 1/2, 0.33 is not 1/3; `1,234`, `$1,234.00` and `1234` are one number;
* units as `quantity.same_unit` has it: 5 m is not 5 cm, 50% is neither 50 nor 0.5; where the reference has no unit the
  question has named it, so that `18 dollars` answers `18`; units are not converted;
* `x = 2` answers `2` and the other way round, but not `y = 2`; equations are equal up to a constant factor, and an
  unsolved one (`2x = 4`) does not answer a solved one (`x = 2`);
* lists and sets in any order; pairs, tuples and intervals in theirs and with the same brackets;
* words, such as `no solution`, by themselves. Infinity equals only itself, and what is no number equals nothing.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Annotated

from pydantic import Field

from grape.checkers import Finding, checker, from_row
from grape.checkers.answer import LONGEST, Extract, final_answer, stated_answer
from grape.checkers.quantity import same_unit
from grape.checkers.reading import Reading, reading
from grape.checkers.workers import OverLimit, Pool, WorkerError
from grape.errors import ConfigError, one_line
from grape.types import Question, Response

Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=600)]

WORKERS = Pool("grape.checkers.equivalence")
READ = 20.0  # seconds of processor time to read a reference


@checker
def math(
    question: Question,
    response: Response,
    *,
    reference: str | int | float = from_row("reference"),
    extract: Extract = "marked",
    tolerance: Tolerance = 0.0,
    timeout: Seconds = 3.0,
) -> Finding:
    """1 if the response's final answer equals the reference's, which may be a worked solution.

    ``extract``: `last_number` takes the last number where no answer is marked. ``tolerance``: how far two numbers may
    be apart, absolutely, that are not both integers. ``timeout``: seconds of processor time for one comparison; an
    answer that takes longer scores 0. A reference that cannot be read, or a worker that cannot be started, raises.
    """
    expected = expect(str(reference))
    answer = final_answer(response.text, extract, words=expected.words is not None)
    goal = f"expected {one_line(expected.text, 80)}"
    if answer is None:
        return Finding(0.0, f"no final answer found; {goal}")
    read = one_line(answer.text, 80)
    if len(answer.text) > LONGEST:
        return Finding(0.0, f"reads {read}, too long for an answer; {goal}", read)
    equal, why = _equal(expected, reading(answer), Fraction(tolerance), timeout)
    return Finding(float(equal), f"reads {read}{why}, {goal}", read)


def expect(reference: str) -> Reading:
    """What a reference says. Raises ConfigError where it says nothing that an answer could be compared with."""
    expected, error = _expect(reference)
    if error:
        raise ConfigError(f"reference {one_line(reference, 60)!r} cannot be read as mathematics: {one_line(error)}")
    return expected


@lru_cache(maxsize=4096)
def _expect(reference: str) -> tuple[Reading, str]:
    """What a reference says, and what is wrong with it; kept, since a group of responses shares it."""
    answer = stated_answer(reference)
    expected = reading(answer)
    if len(answer.text) > LONGEST:
        return expected, f"longer than {LONGEST} characters"
    if not answer.text or expected.words == "nan":
        return expected, "there is no answer in it"
    if expected.words is not None or expected.quantity is not None:
        return expected, ""
    try:
        errors = [WORKERS.ask({"reference": text}, READ)["error"] for text in {expected.core, expected.stated}]
    except OverLimit as error:
        return expected, f"reading it took {error}"
    return expected, errors[0] if all(errors) else ""


@lru_cache(maxsize=4096)
def _equal(expected: Reading, given: Reading, tolerance: Fraction, timeout: float) -> tuple[bool, str]:
    """Whether two answers are equal, and why not, where that is not plain to see."""
    if expected.words is not None or given.words is not None:
        ours, theirs = (each.words or " ".join(each.text.split()).casefold() for each in (expected, given))
        return ours == theirs, ""
    if not same_unit(expected.unit, given.unit):
        return False, f" ({given.unit.name or 'no unit'} is not {expected.unit.name or 'a bare number'})"
    named = expected.name is not None and given.name is not None and expected.name != given.name
    if expected.quantity and given.quantity and not named:
        one, two = expected.quantity.value, given.quantity.value
        integers = one.denominator == two.denominator == 1
        return one == two or (not integers and abs(one - two) <= tolerance), ""
    whole = named or expected.equation or given.equation
    pair = (expected.stated, given.stated) if whole else (expected.core, given.core)
    if pair[0].split() == pair[1].split():
        return True, ""
    try:
        reply = WORKERS.ask({"reference": pair[0], "answer": pair[1], "tolerance": str(tolerance)}, timeout)
    except OverLimit as error:
        return False, f" (given up after {error})"
    if reply["error"]:
        raise WorkerError(f"reference {one_line(pair[0], 60)!r} was readable before: {reply['error']}")
    return bool(reply["equal"]), f" (not readable: {one_line(reply['why'], 100)})" if reply["why"] else ""
