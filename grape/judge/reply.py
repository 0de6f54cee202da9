"""What a judge's text says: one strict reading of its reply, or the typed reason why it is no verdict.

A verdict is read only from a reply that is nothing but one JSON object. Neither the first nor the last object of a
longer text is picked out: either rule hands the verdict to whoever gets his own object repeated by the judge.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from grape.checkers.refusal import is_refusal
from grape.errors import JudgeError, one_line
from grape.judge.echo import repeats
from grape.judge.prompt import well_formed
from grape.scale import Scale
from grape.types import Outcome

KEYS = ("reasoning", "score", "confidence")
MARK = re.compile(r"<<<(?:end )?\w+ [0-9a-f]{32}>>>")
REFUSALS = {"content_filter", "refusal"}  # finish reasons
NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A judge's verdict: the score on [0, 1], the judge's own label for it, and how sure it is, in [0, 1]."""

    reasoning: str
    score: float
    raw: str
    confidence: float


def parse_reply(
    text: str,
    scale: Scale,
    *,
    parser: str = "json",
    verbal: bool = True,
    finish_reason: str | None = None,
    prompt: Sequence[str] = (),
) -> Reply:
    """The verdict that a reply states; `JudgeError` with the outcome where it states none.

    ``verbal``: the reply states a confidence (else it must not, and confidence is 1). ``prompt`` holds the texts that
    the judge was shown: a verdict that stands in one of them was repeated and not given.
    """
    if finish_reason in REFUSALS:
        raise JudgeError(Outcome.REFUSED, f"the server ended the reply with {finish_reason}")
    try:
        reply = parse_json(text, scale, verbal=verbal) if parser == "json" else PARSERS[parser](text, scale)
    except JudgeError as error:
        if error.outcome is not Outcome.UNPARSABLE:
            raise
        if finish_reason == "length":
            raise JudgeError(Outcome.UNPARSABLE, f"cut off at max_tokens ({error})") from None
        if _refuses(text.rpartition("</think>")[2]):
            raise JudgeError(Outcome.REFUSED, f"the judge refuses: {one_line(text, 120)}") from None
        raise
    if prompt and parser == "json" and repeats(reply.reasoning, reply.score, scale, prompt):
        _unparsable("the reply repeats a verdict that stands in the texts to judge")
    return reply


def parse_json(text: str, scale: Scale, *, verbal: bool = True) -> Reply:
    """Our own form: one JSON object with reasoning, score and, where ``verbal``, confidence."""
    return _verdict(_object(_unwrap(text)), scale, verbal)


def parse_whole(
    text: str,
    scales: Mapping[str, Scale],
    *,
    verbal: bool = True,
    finish_reason: str | None = None,
    prompt: Sequence[str] = (),
) -> dict[str, Reply | JudgeError]:
    """The verdicts of one reply about several items: one JSON object whose keys are theirs, each value our own form.

    What is wrong with one item is its own `JudgeError`; one is raised where the reply cannot be read at all. A reply
    that repeats one verdict of the texts to judge (``prompt``) gives none.
    """
    if finish_reason in REFUSALS:
        raise JudgeError(Outcome.REFUSED, f"the server ended the reply with {finish_reason}")
    data = _object(_unwrap(text))
    if strange := len(set(data) - set(scales)):
        _unparsable(f"the keys must be the items; the object has {strange} other")
    found: dict[str, Reply | JudgeError] = {}
    for name, scale in scales.items():
        try:
            if not isinstance(data.get(name), dict):
                _unparsable("no verdict on this item")
            reply = found[name] = _verdict(data[name], scale, verbal)
        except JudgeError as error:
            found[name] = error
        else:
            if prompt and repeats(reply.reasoning, reply.score, scale, prompt):
                _unparsable("the reply repeats a verdict that stands in the texts to judge")
    return found


def _verdict(data: dict[str, Any], scale: Scale, verbal: bool) -> Reply:
    keys = KEYS if verbal else KEYS[:2]
    if set(data) != set(keys):
        lacks = [key for key in keys if key not in data]
        extra = len(set(data) - set(keys))
        faults = [f"lacks {', '.join(lacks)}"] * bool(lacks) + [f"has {extra} other"] * bool(extra)
        _unparsable(f"the keys must be {', '.join(keys)}; the object {' and '.join(faults)}")
    if not isinstance(data["reasoning"], str):
        _unparsable("reasoning is not text")
    reasoning = well_formed(data["reasoning"])
    label = data["score"].strip().casefold() if isinstance(data["score"], str) else None
    if data["score"] is None:
        raise JudgeError(Outcome.ABSTAINED, "the judge abstained", reasoning)
    if label == "n/a" and label not in {own.casefold() for own in scale.labels}:
        raise JudgeError(Outcome.NOT_APPLICABLE, "the judge holds the criterion not applicable", reasoning)
    confidence = _confidence(data["confidence"], reasoning) if verbal else 1.0
    score, raw = _score(data["score"], scale, reasoning)
    return Reply(reasoning=reasoning, score=score, raw=raw, confidence=confidence)


def score_span(text: str) -> tuple[int, int] | None:
    """Where in a reply of our own form the characters of its score stand; None where it states none."""
    try:
        inner = _unwrap(text)
        if not isinstance(DECODER.decode(inner), dict):
            return None
    except (JudgeError, json.JSONDecodeError, RecursionError):
        return None
    start, end = text.rindex(inner), 1
    while '"' in inner[end:]:
        key, end = DECODER.raw_decode(inner, inner.index('"', end))  # only a comma and white space before it
        at = inner.index(":", end) + 1
        at += len(inner[at:]) - len(inner[at:].lstrip())
        end = DECODER.raw_decode(inner, at)[1]
        if key == "score":
            return start + at, start + end
    return None


def reply_schema(scale: Scale, *, verbal: bool) -> dict[str, Any]:
    """The JSON schema of our own form, for servers that hold a reply to one."""
    score = {"anyOf": [scale.schema(), {"type": "null"}, {"type": "string", "enum": ["n/a"]}]}
    properties: dict[str, Any] = {"reasoning": {"type": "string"}, "score": score}
    if verbal:
        properties["confidence"] = {"type": "number", "minimum": 0, "maximum": 1}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def whole_schema(scales: Mapping[str, Scale], *, verbal: bool) -> dict[str, Any]:
    """The JSON schema of a reply about several items."""
    properties = {name: reply_schema(scale, verbal=verbal) for name, scale in scales.items()}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def parse_prose(text: str, *, finish_reason: str | None = None) -> str:
    """A critique: the judge's text without its thinking. `JudgeError` for nothing, or a refusal."""
    prose = _thought(text, "critique", finish_reason)
    if _refuses(prose):
        raise JudgeError(Outcome.REFUSED, f"critique: the judge refuses: {one_line(prose, 120)}")
    return prose


def parse_revision(text: str, *, finish_reason: str | None = None) -> str:
    """A revised response, which may well decline what was asked. `JudgeError` for nothing, one that was cut, and one
    that repeats the marks around what the judge was shown."""
    revision = _thought(text, "revision", finish_reason)
    if finish_reason == "length":
        raise JudgeError(Outcome.UNPARSABLE, "revision: the reply was cut off")
    if MARK.search(revision):
        raise JudgeError(Outcome.UNPARSABLE, "revision: it repeats the marks around what was shown")
    return revision


def _thought(text: str, what: str, finish_reason: str | None) -> str:
    """What is said after the thinking."""
    if finish_reason in REFUSALS:
        raise JudgeError(Outcome.REFUSED, f"{what}: the server ended the reply with {finish_reason}")
    prose = text.strip()
    if prose.startswith("<think>"):
        prose = prose.rpartition("</think>")[2].strip() if "</think>" in prose else ""
    if not prose:
        raise JudgeError(Outcome.UNPARSABLE, f"{what}: empty reply")
    return prose


def parse_rating(text: str, scale: Scale) -> Reply:
    """A bare number on the item's scale, such as ``7``: the form of pointwise rating prompts."""
    bare = _unwrap(text)
    if not NUMBER.fullmatch(bare):
        _unparsable("the reply is not a bare number" if bare else "empty reply")
    score, raw = _score(float(bare), scale, "")
    return Reply(reasoning="", score=score, raw=raw, confidence=1.0)


def parse_label(text: str, scale: Scale) -> Reply:
    """A bare label of the item's scale, such as ``met`` or ``partly``."""
    bare = _unwrap(text)
    if not bare:
        _unparsable("empty reply")
    score, raw = _score(bare, scale, "")
    return Reply(reasoning="", score=score, raw=raw, confidence=1.0)


PARSERS: dict[str, Callable[[str, Scale], Reply]] = {"json": parse_json, "rating": parse_rating, "label": parse_label}


def _refuses(text: str) -> bool:
    try:
        return is_refusal(text)
    except TimeoutError:  # its search has a time limit; a text so odd is no plain refusal
        return False


def _unparsable(detail: str) -> NoReturn:
    # The detail goes back to the judge in the repair question, so it never quotes the reply.
    raise JudgeError(Outcome.UNPARSABLE, detail)


def _unwrap(text: str) -> str:
    """The reply without one leading <think> block (to its last closing tag) and one code fence around all the rest."""
    text = text.strip()
    if text.startswith("<think>"):
        _, closed, text = text.rpartition("</think>")
        if not closed:
            _unparsable("the reply ends inside its thinking")
        text = text.strip()
    if len(text) >= 6 and text.startswith("```") and text.endswith("```"):
        info, newline, rest = text[3:-3].partition("\n")
        text = (rest if newline and (not info.strip() or info.strip().isalnum()) else text[3:-3]).strip()
    return text


def _object(text: str) -> dict[str, Any]:
    if not text:
        _unparsable("empty reply")
    try:
        data = DECODER.decode(text)
    except json.JSONDecodeError as error:
        hint = " (a </think> without its <think>: let the server part thinking and reply)" * ("</think>" in text)
        _unparsable(f"not one JSON object and nothing else: {error.msg} at character {error.pos}{hint}")
    except RecursionError:
        _unparsable("the JSON is nested too deeply")
    if not isinstance(data, dict):
        _unparsable("the JSON is not an object")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        _unparsable("a key stands twice in one object")
    return mapping


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= 18 else float(digits)  # longer ones would be slow, or break int()


# strict=False: servers with constrained decoding leave raw control characters inside strings.
DECODER = json.JSONDecoder(strict=False, object_pairs_hook=_unique, parse_int=_integer)


def _confidence(value: object, reasoning: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _unparsable("confidence is not a number")
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise JudgeError(Outcome.OUT_OF_RANGE, f"confidence {value:g} is outside 0 to 1", reasoning)
    return float(value)


def _score(value: object, scale: Scale, reasoning: str) -> tuple[float, str]:
    if isinstance(value, str):
        value = well_formed(value)
    try:
        return scale.read(value)
    except TypeError:
        _unparsable(f"score must be {scale.describe()}")
    except ValueError as error:
        raise JudgeError(Outcome.OUT_OF_RANGE, one_line(f"score {error}"), reasoning) from None
