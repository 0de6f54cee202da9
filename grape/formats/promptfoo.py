"""promptfoo's `llm-rubric` assertions: alone, in sets, or in the tests of a configuration.

promptfoo takes the mean by weight of the scores (1 - score for `not-llm-rubric`), an `assert-set` counting as one.
Assertions of other types are kept where they stand; they are no part of the rubric.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from grape.errors import one_line
from grape.formats.criteria import Criteria, Reader, Writer, weighs_nothing, with_children
from grape.formats.keep import Data, Place, mapping, need, number, sequence
from grape.formats.sheet import Sheet, Take

TYPES = ("llm-rubric", "not-llm-rubric")
SET = "assert-set"


def load(theirs: Data, place: Place, reader: Reader) -> Data:
    weight = number(theirs.get("weight", 1), place.at("weight"))
    if weight < 0:
        raise place.at("weight").fail(f"a weight from 0 up is meant (got {weight!r})")
    kind = theirs.get("type")
    if kind == SET or "assert" in theirs:
        found = reader.many(need(theirs, "assert", place), place.at("assert"))
        return with_children({"weight": weight}, reader.criteria.key, found)
    value = need(theirs, "value", place)
    if isinstance(value, str) and value.startswith("file://"):
        raise place.at("value").fail(f"stands in another file: {one_line(value, 100)}; put its text here")
    if not isinstance(value, str):
        value = json.dumps(value, ensure_ascii=False)
    if not value.strip():
        raise place.at("value").fail("text is meant")
    made: Data = {"criterion": value, "weight": weight, "judge": "default", "scale": "unit"}
    return {**made, "polarity": "undesirable"} if kind == TYPES[1] else made


def skips(value: Any) -> bool:
    """Whether an assertion is left where it stands: it weighs nothing, or no judge scores it."""
    if not isinstance(value, Mapping) or weighs_nothing("weight")(value):
        return True
    if value.get("type") == SET:
        return not isinstance(value.get("assert"), list) or all(map(skips, value["assert"]))
    return value.get("type") not in TYPES


def dump(made: Data, writer: Writer) -> Data:
    if "items" in made:
        return {"type": SET, "weight": made.get("weight", 1), "assert": writer.below(made)}
    kind = TYPES[1] if made.get("polarity") == "undesirable" else TYPES[0]
    return {"type": kind, "value": made["criterion"], "weight": made.get("weight", 1)}


PROMPTFOO = Criteria(
    format="promptfoo", load=load, dump=dump, name="metric", children="assert", skips=skips,
    order=("type", "value", "threshold", "weight", "metric", "provider", "assert"),
)  # fmt: skip


def lift(document: Any, take: Take, place: Place) -> Any:
    """Lifts assertions from a list of them, from what has them under `assert`, or from the tests of a configuration."""

    def taken(entries: Any, at: Place, **made: Any) -> list[Any]:
        return [take(entry, at.at(place_in), made=made) for place_in, entry in enumerate(sequence(entries, at))]

    if isinstance(document, list):
        return taken(document, place)
    config = mapping(document, place, "assertions")
    if "assert" in config:
        return {**config, "assert": taken(config["assert"], place.at("assert"))}
    default = config.get("defaultTest")
    if isinstance(default, Mapping) and isinstance(default.get("assert"), list):
        config["defaultTest"] = {**default, "assert": taken(default["assert"], place.at("defaultTest", "assert"))}
    if isinstance(config.get("tests"), list):
        tests = []
        for place_in, test in enumerate(config["tests"]):
            if isinstance(test, Mapping) and isinstance(test.get("assert"), list):
                at, only = place.at("tests", place_in, "assert"), {"promptfoo_test": f"test-{place_in + 1}"}
                test = {**test, "assert": taken(test["assert"], at, applies_when=only)}
            tests.append(test)
        config["tests"] = tests
    return config


SHEET = Sheet(
    criteria=PROMPTFOO, lift=lift, build=lambda objects: {"assert": list(objects.values())}, list_key="assert",
    formula=lambda items: "weighted", nested=True,
)  # fmt: skip
