"""Criteria with points: what is good when met adds, what is bad when met (a weight below 0) subtracts.

HealthBench (openai/simple-evals), RaR (arXiv 2507.17746), DR-Tulu (arXiv 2511.19399), autorubric (delip/autorubric)
and rubric (The-LLM-Data-Company/rubric) score such a list as

    sum of the weights of what is met / sum of the positive weights

and differ in what they do with the result: HealthBench clips the mean of a set, autorubric and rubric each score,
DR-Tulu nothing; RaR divides by the sum of all weights. With no positive weight, autorubric and rubric take
1 - (sum of the weights of what is met / sum of all), DR-Tulu divides by 1, HealthBench has no score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grape.formats.criteria import Criteria, Reader, Writer, scale_of, weighs_nothing
from grape.formats.keep import Data, Place, made_by, mapping, need, number, sequence, text
from grape.formats.sheet import Sheet, listed, points

PITFALL = "pitfall"


def item(criterion: str, weight: int | float, scale: Any = "binary") -> Data:
    """A judge's item of a signed weight."""
    made: Data = {"criterion": criterion, "weight": abs(weight)}
    if weight < 0:
        made["polarity"] = "undesirable"
    return {**made, "judge": "default", "scale": scale}


def signed(made: Data) -> int | float:
    """An item's weight, below 0 where it is bad when met."""
    weight: int | float = made.get("weight", 1)
    return -weight if made.get("polarity") == "undesirable" else weight


def load_healthbench(theirs: Data, place: Place, reader: Reader) -> Data:
    weight = number(need(theirs, "points", place), place.at("points"))
    made = item(text(theirs, "criterion", place), weight)
    tags = theirs.get("tags")
    if isinstance(tags, list) and tags and all(isinstance(tag, str) for tag in tags):
        made["tags"] = tags
    return made


def dump_healthbench(made: Data, writer: Writer) -> Data:
    return {"criterion": made["criterion"], "points": signed(made), "tags": made.get("tags", [])}


def load_rar(theirs: Data, place: Place, reader: Reader) -> Data:
    """A weight below 0, or a pitfall, says nothing about which way it counts: in one of the two published sets most
    are avoided faults ("Avoids ..."), in the other faults ("Does not mention ..."), under the same negative weights.
    """
    criterion = text(theirs, "description", place)
    weight = number(need(theirs, "weight", place), place.at("weight"))
    title = theirs.get("title")
    labels = [label for label in (title, criterion) if isinstance(label, str)]
    made = item(criterion, abs(weight))
    pitfall = weight < 0 or any(label.casefold().lstrip().startswith(PITFALL) for label in labels)
    if not pitfall or reader.decisions.polarity(place, *labels) != "undesirable":
        return made
    if reader.decisions.trusted is not None:
        return item(criterion, -abs(weight))
    return made_by(made, "x-rar", polarity="undesirable")


def dump_rar(made: Data, writer: Writer) -> Data:
    return {"description": made["criterion"], "weight": signed(made)}


def load_dr_tulu(theirs: Data, place: Place, reader: Reader) -> Data:
    weight = number(need(theirs, "weight", place), place.at("weight"))
    return item(text(theirs, "description", place), weight, {"numeric": [0, 2]})


def load_requirement(theirs: Data, place: Place, reader: Reader) -> Data:
    weight = number(need(theirs, "weight", place), place.at("weight"))
    return item(text(theirs, "requirement", place), weight)


def dump_requirement(made: Data, writer: Writer) -> Data:
    return {"weight": signed(made), "requirement": made["criterion"]}


def load_autorubric(theirs: Data, place: Place, reader: Reader) -> Data:
    weight = number(theirs.get("weight", 10.0), place.at("weight"))
    return item(text(theirs, "requirement", place), weight, _choices(theirs.get("options"), place.at("options")))


def _choices(options: Any, place: Place) -> Any:
    """The scale of an autorubric's options, without those that mean that the criterion does not apply."""
    if options is None:
        return "binary"
    values: Data = {}
    for place_in, option in enumerate(sequence(options, place)):
        at = place.at(place_in)
        if not mapping(option, at).get("na"):
            values[text(option, "label", at)] = number(need(option, "value", at), at.at("value"))
    return {"choices": values}


def dump_autorubric(made: Data, writer: Writer) -> Data:
    theirs = dump_requirement(made, writer)
    scale = scale_of(made, writer.place)
    if scale.kind in ("choices", "ordinal"):
        given = made["scale"].get("choices")
        worth: Mapping[str, Any] = given or dict(zip(scale.labels, scale.values, strict=True))
        theirs["options"] = [{"label": label, "value": value} for label, value in worth.items()]
    return theirs


HEALTHBENCH = Criteria(
    format="healthbench", load=load_healthbench, dump=dump_healthbench, skips=weighs_nothing("points"),
    order=("criterion", "points", "tags"),
)  # fmt: skip
RAR = Criteria(
    format="rar", load=load_rar, dump=dump_rar, name="title", named=True, skips=weighs_nothing("weight"),
    order=("description", "title", "weight"),
)  # fmt: skip
DR_TULU = Criteria(
    format="dr-tulu", load=load_dr_tulu, dump=dump_rar, name="title", skips=weighs_nothing("weight"),
    order=("description", "weight", "title"),
)  # fmt: skip
RUBRIC = Criteria(
    format="rubric", load=load_requirement, dump=dump_requirement, name="name", skips=weighs_nothing("weight"),
    order=("name", "weight", "requirement"),
)  # fmt: skip
AUTORUBRIC = Criteria(
    format="autorubric", load=load_autorubric, dump=dump_autorubric, name="name", skips=weighs_nothing("weight"),
    order=("name", "weight", "requirement", "scale_type", "options"),
)  # fmt: skip


def _sections(document: Any, take: Any, place: Place) -> Any:
    """Lifts criteria from a list of them, of sections that have them, or of both, itself or under `rubric`, `sections`
    or `criteria`.
    """
    if isinstance(document, list):
        found = []
        for number_in, entry in enumerate(document):
            at = place.at(number_in)
            if isinstance(entry, dict) and "criteria" in entry:
                below = [take(e, at.at("criteria", n)) for n, e in enumerate(sequence(entry["criteria"], at))]
                found.append({**entry, "criteria": below})
            else:
                found.append(take(entry, at))
        return found
    data = mapping(document, place, "a list of criteria")
    for key in ("rubric", "sections", "criteria"):
        if key in data:
            return {**data, key: _sections(data[key], take, place.at(key))}
    raise place.fail("no list of criteria; it would stand under rubric, sections or criteria")


def _sheet(criteria: Criteria, key: str, lift: Any, clip: str | None) -> Sheet:
    return Sheet(
        criteria=criteria,
        lift=lift,
        build=lambda objects: {key: list(objects.values())},
        list_key=key,
        formula=points,
        score=lambda items: {"clip": clip} if clip else {},
    )


HEALTHBENCH_SHEET = _sheet(HEALTHBENCH, "rubrics", listed("rubrics"), "mean")
RAR_SHEET = _sheet(RAR, "rubric", listed("rubric"), None)
DR_TULU_SHEET = _sheet(DR_TULU, "rubrics", listed("rubrics"), None)
RUBRIC_SHEET = _sheet(RUBRIC, "rubric", _sections, "item")
AUTORUBRIC_SHEET = _sheet(AUTORUBRIC, "rubric", _sections, "item")
