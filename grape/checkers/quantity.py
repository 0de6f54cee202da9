"""A plain number with its unit, read exactly: `$1,234.50`, `-3/4`, `1 1/2`, `5 cm`, `50%`."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

DIGITS = 1_000  # of one number; more are not read
EXPONENT = 1_000

_GROUPED = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+(?!\d)|\d+"
_DECIMAL = re.compile(
    rf"(?P<whole>{_GROUPED})?(?:\.(?P<part>\d*)(?:\\(?:overline|bar|dot)\s*\{{?(?P<repeat>\d{{1,50}})\}}?)?)?"
    r"(?:[eE](?P<exponent>[+-]?\d{1,4})(?![\d.]))?"
)
_FRACTION = re.compile(
    r"(?:(?P<whole>\d+)(?:\s+|\s*(?=\\frac)))?"
    r"(?:\\frac\s*(?:\{\s*(?P<minus>-)?\s*(?P<a>\d+)\s*\}|(?P<b>\d))\s*(?:\{\s*(?P<c>\d+)\s*\}|(?P<d>\d))"
    r"|(?P<e>\d+)\s*/\s*(?P<f>\d+))"
)
_SIGN = re.compile(r"(?P<sign>[+-]?)\s*(?P<currency>US\$|\$|€|£|¥|₹)?\s*(?P<second>-?)\s*(?=[\d.\\])")

_CURRENCY = {
    "$": "$", "us$": "$", "dollar": "$", "usd": "$", "buck": "$", "€": "€", "euro": "€", "eur": "€", "£": "£",
    "gbp": "£", "¥": "¥", "yen": "¥", "yuan": "yuan", "₹": "₹", "rupee": "₹", "rs": "₹", "peso": "peso",
}  # fmt: skip
_MEASURES = {
    "%": "% percent percentage pct",
    "degree": "degree deg",
    "cent": "cent cents ¢",
    "m": "m meter metre", "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre",
    "km": "km kilometer kilometre", "nm": "nm nanometer", "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard",
    "mi": "mi mile", "g": "g gram gm", "kg": "kg kilogram kilo", "mg": "mg milligram", "lb": "lb lbs pound",
    "oz": "oz ounce", "ton": "ton tonne", "l": "l L liter litre", "ml": "ml mL milliliter millilitre",
    "gal": "gal gallon", "s": "s sec second", "ms": "ms millisecond", "min": "min minute", "h": "h hr hour",
    "day": "day", "week": "week", "month": "month", "year": "year yr", "mph": "mph", "km/h": "kph kmh kmph",
    "hz": "Hz hertz", "khz": "kHz", "n": "N newton", "j": "J joule", "kj": "kJ", "w": "W watt", "kw": "kW kilowatt",
    "v": "V volt", "a": "A ampere amp", "ohm": "ohm Ω", "pa": "Pa pascal", "mol": "mol mole", "k": "K kelvin",
    "c": "C celsius", "f": "F fahrenheit", "rad": "rad radian", "am": "am", "pm": "pm", "acre": "acre",
    "hectare": "hectare ha", "unit": "unit", "b": "B byte", "kb": "kB KB", "mb": "MB", "gb": "GB",
}  # fmt: skip
_MEASURE = {name: unit for unit, names in _MEASURES.items() for name in names.split()}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_CONNECTIVES = """
    and or to plus minus over than not but nor between is are was were equals if when because approximately about
    one two three four five six seven eight nine ten half third quarter dozen hundred thousand million billion
    trillion k mod x choose factorial squared cubed root except either infinity
"""
_NO_UNIT = frozenset(_CONNECTIVES.split())
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|operatorname|rm|textrm|textbf)\s*\{([^{}]*)\}")
_POWER = {"square": "^2", "sq": "^2", "squared": "^2", "cubic": "^3", "cu": "^3", "cubed": "^3"}


class Quantity(NamedTuple):
    """An exact number and its unit; ``label`` where the unit is a noun (`apples`) and no unit of measure."""

    value: Fraction
    unit: str | None = None
    label: bool = False
    written: str = ""


class Unit(NamedTuple):
    """A unit in one spelling, the scale that belongs to the number (`million`), and whether it is only a noun."""

    name: str | None
    scale: int = 0
    label: bool = False


def read(text: str, latex: bool = False) -> Quantity | None:
    """The number that ``text`` is, with nothing left over; None where it is anything else or not finite."""
    text = text.strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    if len(text) > DIGITS or (start := _SIGN.match(text)) is None or (start["sign"] and start["second"]):
        return None
    body = text[start.end() :]
    number = _fraction(body) or _decimal(body)
    if number is None:
        return None
    value, end = number
    unit = read_unit(body[end:], latex)
    if unit is None or (start["currency"] and unit.name and not unit.label):
        return None
    if start["sign"] == "-" or start["second"]:
        value = -value
    value *= Fraction(10) ** unit.scale
    if start["currency"]:
        return Quantity(value, _CURRENCY[start["currency"].lower()], False, text)
    return Quantity(value, unit.name, unit.label, text)


def _fraction(body: str) -> tuple[Fraction, int] | None:
    found = _FRACTION.match(body)
    if found is None or re.match(r"[\d.,]*[\d/]", body[found.end() :]):
        return None
    below = int(found["c"] or found["d"] or found["f"])
    if below == 0:
        return None
    value = Fraction(int(found["a"] or found["b"] or found["e"]), below)
    if found["whole"] is not None and (found["minus"] or value >= 1):
        return None
    value = -value if found["minus"] else value
    return value + int(found["whole"] or 0), found.end()


def _decimal(body: str) -> tuple[Fraction, int] | None:
    found = _DECIMAL.match(body)
    if found is None or not (found["whole"] or found["part"] or found["repeat"]):
        return None
    whole = re.sub(r"[, ]", "", found["whole"] or "0")
    part = found["part"] or ""
    value = Fraction(int(whole + part), 10 ** len(part))
    if found["repeat"]:
        value += Fraction(int(found["repeat"]), (10 ** len(found["repeat"]) - 1) * 10 ** len(part))
    exponent = int(found["exponent"] or 0)
    if abs(exponent) > EXPONENT:
        return None
    return value * Fraction(10) ** exponent, found.end()


def read_unit(rest: str, latex: bool = False) -> Unit | None:
    """The unit that ``rest`` is; Unit(None) for nothing; None where it is no unit at all."""
    texted = _TEXT.sub(lambda found: f" {found[1]} ", rest)
    words_are_units = not latex or texted != rest
    attached = rest[:1].isalpha()
    plain = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " degree ", texted).replace("\\%", "%")
    plain = re.sub(r"\bper\s+cent\b", "%", plain)
    plain = re.sub(r"[²³]", lambda power: "^2" if power[0] == "²" else "^3", plain)
    plain = re.sub(r"\s*\^\s*\{?([23])\}?", r"^\1", plain).replace("\\cdot", "*").replace("·", "*")
    plain = re.sub(r"\\[,;:! ]|~|\\$|(?<=[A-Za-z])-(?=[A-Za-z])", " ", plain).replace("\\$", "$").strip()
    if not plain:
        return Unit(None)
    tokens = re.findall(r"[^\W\d_]+(?:'[a-z]*)?(?:\^[23])?|[%$€£¥₹¢/*]", plain)
    if "".join(tokens) != re.sub(r"[\s.]", "", plain) or len(tokens) > 10:
        return None
    scale = 0
    while tokens and tokens[0].lower() in _SCALES:
        scale += _SCALES[tokens.pop(0).lower()]
    if not tokens:
        return Unit(None, scale)
    if (name := _measure(tokens)) is not None:
        return None if attached and len(tokens[0]) == 1 and name != "%" else Unit(name, scale)
    if not words_are_units or attached or any(token.lower() in _NO_UNIT for token in tokens):
        return None
    for length in range(len(tokens) - 1, 0, -1):  # `cm of rope`, `dollars in total`
        if (name := _measure(tokens[:length])) is not None:
            return Unit(name, scale)
    if len(tokens[0]) < 3 or not tokens[0].isalpha() or (tokens[0] == "times" and len(tokens) > 1):
        return None
    return Unit(_singular(tokens[0].lower()), scale, label=True)


def _measure(tokens: list[str]) -> str | None:
    """A unit of measure in its one spelling: `square meters` is m^2, `kilometers per hour` is km/h."""
    out, power = "", ""
    for token in tokens:
        if token.lower() in _POWER:
            power = _POWER[token.lower()]
            if out and out[-1].isalpha() and token.lower() in {"squared", "cubed"}:
                out, power = out + power, ""
            continue
        if token in {"/", "*", "per", "a", "an"}:
            out += "*" if token == "*" else "/"
            continue
        base, _, exponent = token.partition("^")
        name = _CURRENCY.get(_singular(base.lower())) or _MEASURE.get(base) or _word_measure(base)
        if name is None or (out and out[-1].isalnum() and out != "degree"):
            return None
        out += name + (f"^{exponent}" if exponent else power)
        power = ""
    return None if power or not out or out[-1] in "/*" or out[0] in "/*" else out


def _word_measure(word: str) -> str | None:
    """The measure of a written-out name or a plural; short signs such as `M` and `m` are told apart by case."""
    return _MEASURE.get(_singular(word.lower())) if len(word) > 2 else None


def _singular(word: str) -> str:
    word = word.removesuffix("'")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def same_unit(expected: Quantity | Unit, got: Quantity | Unit) -> bool:
    """Whether an answer's unit can stand for the reference's.

    The same unit always can. A percentage is only ever a percentage. A reference without a unit leaves it to the
    question, so any unit will do; a currency and a noun may be left out; a unit of measure may not.
    """
    ours = expected.unit if isinstance(expected, Quantity) else expected.name
    theirs = got.unit if isinstance(got, Quantity) else got.name
    if ours == theirs:
        return True
    if "%" in (ours, theirs):
        return False
    if ours is None:
        return True
    return theirs is None and (expected.label or ours in _CURRENCY.values())


def shown(value: Fraction) -> str:
    """A number as one writes it: 18, 0.5, 1/3."""
    if value.denominator == 1:
        return str(value.numerator)
    ten = value.denominator
    for prime in (2, 5):
        while ten % prime == 0:
            ten //= prime
    return f"{float(value):.12g}" if ten == 1 and abs(value) < 10**12 else f"{value.numerator}/{value.denominator}"
