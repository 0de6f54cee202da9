"""An answer as it is compared: its words, or its number and unit, or an expression and its unit."""

from __future__ import annotations

import re
from typing import NamedTuple

from grape.checkers.answer import Answer, is_words
from grape.checkers.expression import assignment, is_relation, normal
from grape.checkers.quantity import Quantity, Unit, read, read_unit

_TRAILING = (
    re.compile(r"(?P<core>.*\S)(?P<unit>\s*\\text\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?)"),
    re.compile(r"(?P<core>.*[^\s\\])(?P<unit>\s*%)"),
    re.compile(r"(?P<core>(?!.*\\(?:sin|cos|tan)).*\S)(?P<unit>\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*[CF]?)"),
    re.compile(r"(?P<core>.*[\d)}])(?P<unit>\s+[A-Za-z][A-Za-z ]*(?:\^\{?[23]\}?)?)"),
)


class Reading(NamedTuple):
    """``text`` is all of it, ``core`` its value without unit and without the ``name`` it is given (`x = ...`)."""

    text: str
    name: str | None
    core: str
    unit: Unit
    quantity: Quantity | None = None
    words: str | None = None

    @property
    def equation(self) -> bool:
        """Whether it is a relation that gives no value to a name: `2x = 4`, `x > 2`."""
        return self.core == self.text and is_relation(self.text)

    @property
    def stated(self) -> str:
        """All of it but the unit: an equation, or the value with the name that it is given."""
        return self.core if self.name is None else f"{self.name} = {self.core}"


def reading(answer: Answer) -> Reading:
    """What an answer says."""
    if is_words(answer):
        plain = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r" \1 ", answer.text)
        words = " ".join(re.findall(r"[^\W_]+(?:'\w+)?", plain)).casefold()
        return Reading(answer.text, None, answer.text, Unit(None), words=words)
    text = normal(answer.text)
    given = assignment(text)
    value = given.value if given else text
    quantity = read(value, answer.latex)
    if quantity is not None:
        unit = Unit(quantity.unit, label=quantity.label)
        exact = f"\\frac{{{quantity.value.numerator}}}{{{quantity.value.denominator}}}"
        return Reading(text, given.name if given else None, exact, unit, quantity)
    core, unit = _split_unit(value, answer.latex)
    return Reading(text, given.name if given else None, core, unit)


def _split_unit(value: str, latex: bool) -> tuple[str, Unit]:
    for trailing in _TRAILING if not latex else _TRAILING[:3]:
        found = trailing.fullmatch(value)
        unit = read_unit(found["unit"], latex) if found else None
        if found and unit is not None:
            core = found["core"].strip().removeprefix("$")
            return (f"({core}) \\cdot 10^{{{unit.scale}}}" if unit.scale else core), unit
    if value.startswith("$"):
        return value[1:].strip(), Unit("$")
    return value.replace("$", ""), Unit(None)
