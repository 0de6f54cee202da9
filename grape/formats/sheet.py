"""One rubric: a document of another format to a grape rubric and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grape.formats.criteria import ITEM_KEYS, Criteria, Reader, Writer
from grape.formats.decisions import Decisions
from grape.formats.keep import (
    GROUP,
    ITEM,
    NOTES,
    Data,
    Place,
    block,
    fill,
    made_by,
    mapping,
    mark,
    name_id,
    notes,
    ordered,
    sequence,
)

RUBRIC_KEYS = ("rubric", "version", "category", "description", "formula", "generate", "improve", "items", "cases")
GROUPS = "x-groups"  # in a format without groups: what they were
Take = Callable[..., Any]  # (object, place, name=None, made=None) -> what stands in the kept document instead


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """How a format writes a rubric.

    ``lift`` hands each criterion of a document to ``take`` and returns the document with what it got instead.
    ``build`` is the document of a rubric that comes from nowhere, by id of its items; ``list_key`` is where a document
    that is a bare list keeps that list when there is more to say. ``score`` says how to get from our reward to the
    score that the format's own formula gives. ``nested`` formats have groups; ``strict`` ones refuse unknown fields
    within a criterion.
    """

    criteria: Criteria
    lift: Callable[[Any, Take, Place], Any]
    build: Callable[[dict[str, Any]], Data]
    list_key: str
    formula: Callable[[list[Data]], str]
    score: Callable[[list[Data]], Data] = lambda items: {}
    nested: bool = False
    strict: bool = False


def load_sheet(sheet: Sheet, document: Any, place: Place, name: str, decisions: Decisions) -> Data:
    """The rubric of a document, called ``name`` unless it was ours and had a name already."""
    ours: Data = {}
    if isinstance(document, dict) and "rubric" in block(document, "x-grape", place):
        ours = block(document, "x-grape", place)
        document = {key: value for key, value in document.items() if key != "x-grape"}
    reader = Reader(criteria=sheet.criteria, decisions=decisions, ours=block(ours, "items", place.at("x-grape")))
    items: list[Data] = []

    def take(value: Any, at: Place, name: str | None = None, made: Data | None = None) -> Any:
        if sheet.criteria.skips(value):
            return value
        item = reader.one(value, at, name)
        items.append(ordered(made_by(item, sheet.criteria.key, **made), ITEM_KEYS) if made else item)
        return {ITEM: item["id"]}

    kept = sheet.lift(document, take, place)
    if not items:
        raise place.fail(f"no criterion in it that {sheet.criteria.format} would score")
    derived = {"rubric": name_id(name), "formula": sheet.formula(items)}
    groups = block(ours, GROUPS, place.at("x-grape"))
    header = {key: value for key, value in ours.items() if key not in ("items", GROUPS)}
    rubric = {**(header or derived), "items": regroup(items, groups)}
    if not ours:
        if score := sheet.score(items):
            rubric["x-score"] = score
        rubric[sheet.criteria.key] = {"document": kept, NOTES: {"was": {key: mark(derived[key]) for key in derived}}}
    elif kept != sheet.build({item["id"]: {ITEM: item["id"]} for item in items}):
        rubric[sheet.criteria.key] = {"document": kept}
    return ordered(rubric, RUBRIC_KEYS)


def dump_sheet(sheet: Sheet, rubric: Data, place: Place) -> Any:
    """The document of a rubric, as it was before if it came from one."""
    kept = block(rubric, sheet.criteria.key, place)
    leaves, groups = ([(item, item) for item in rubric["items"]], {}) if sheet.nested else flatten(rubric["items"])
    was = mapping(notes(kept).get("was", {}), place.at(sheet.criteria.key))
    writer = Writer(criteria=sheet.criteria, place=place)
    objects = {leaf["id"]: writer.one(leaf, whole) for leaf, whole in leaves}
    ours = {key: value for key, value in rubric.items() if key not in ("items", sheet.criteria.key)}
    said = {"x-score": mark(sheet.score([leaf for leaf, _ in leaves])), **was}
    silent = all(said.get(key) == mark(value) for key, value in ours.items())
    hidden = {name: value.pop("x-grape") for name, value in objects.items() if sheet.strict and "x-grape" in value}
    ours |= {key: value for key, value in ((GROUPS, groups), ("items", hidden)) if value}
    document = fill(kept["document"], objects) if "document" in kept else None
    document = document if isinstance(document, list | dict) else sheet.build(objects)
    if silent and not groups and not hidden:
        return document
    if isinstance(document, list):
        document = {sheet.list_key: document}
    elif any(document is value for value in objects.values()):
        document = sheet.build(objects)
    return {**document, "x-grape": dict(sorted(ours.items()))}


def flatten(items: list[Data], path: tuple[str, ...] = (), whole: float | None = None) -> Any:
    """The leaves of a tree, each as it weighs in the whole beside what it was, and its groups without their items."""
    leaves: list[tuple[Data, Data]] = []
    groups: Data = {}
    total = sum(item.get("weight", 1) for item in items)
    for item in items:
        weight = item.get("weight", 1) if whole is None else whole * item.get("weight", 1) / total
        if "items" in item:
            groups[item["id"]] = {key: value for key, value in item.items() if key not in ("id", "items")}
            below, more = flatten(item["items"], (*path, item["id"]), weight)
            leaves += below
            groups |= more
        else:
            weight = int(weight) if weight == int(weight) and whole is not None else weight
            leaf = {**item, "weight": weight} if weight != item.get("weight", 1) else item
            leaves.append((leaf, {**item, GROUP: list(path)} if path else item))
    return leaves, groups


def regroup(items: list[Data], groups: Data) -> list[Data]:
    """The tree that was flattened."""
    tree: list[Data] = []
    made: dict[str, Data] = {}
    for item in items:
        path = item.pop(GROUP, None)
        level = tree
        for name in path if isinstance(path, list) else []:
            if name not in groups:
                break
            if name not in made:
                made[name] = ordered(
                    {"id": name, **mapping(groups[name], Place(GROUPS, (name,))), "items": []}, ITEM_KEYS
                )
                level.append(made[name])
            level = made[name]["items"]
        level.append(item)
    return tree


def listed(*keys: str) -> Callable[[Any, Take, Place], Any]:
    """Lifts a bare list of criteria, or a mapping that has the list under one of ``keys``."""

    def lift(document: Any, take: Take, place: Place) -> Any:
        if isinstance(document, list):
            return [take(entry, place.at(number)) for number, entry in enumerate(document)]
        data = mapping(document, place, "a list of criteria")
        for key in keys:
            if key in data:
                return {**data, key: lift(sequence(data[key], place.at(key)), take, place.at(key))}
        raise place.fail(f"no list of criteria; it would stand under {' or '.join(keys)}")

    return lift


def points(items: list[Data]) -> str:
    """The formula of signed weights; where all are penalties nothing is left to divide by, and 1 is where it starts."""
    return "points" if any(item.get("polarity") != "undesirable" for item in items) else "weighted"
