"""One criterion of another format to one grape item and back, with its id, its children and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from grape.errors import one_line
from grape.formats.decisions import Decisions
from grape.formats.keep import (
    GROUP,
    ITEM,
    NOTES,
    Data,
    Ids,
    Place,
    block,
    fill,
    is_id,
    keep,
    made_fields,
    mapping,
    name_id,
    notes,
    ordered,
    restore,
    sequence,
    text_id,
)
from grape.scale import Scale, parse_scale

ITEM_KEYS = (
    "id",
    "criterion",
    "weight",
    "polarity",
    "check",
    "with",
    "judge",
    "scale",
    "applies_when",
    "tags",
    "items",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Criteria:
    """How a format writes one criterion.

    ``load`` makes an item of an object, and ``dump`` the object of an item, without ids, names or ``x-`` keys: those
    are the same for all formats. ``name`` is the object's key for its name (written only where the id does not follow
    from the criterion, or always if ``named``) and ``children`` its key for those below it. An object that the format
    ``skips``, because it weighs 0, has no part in a score: it is kept where it stands, as it is.
    """

    format: str
    load: Callable[[Data, Place, Reader], Data]
    dump: Callable[[Data, Writer], Data]
    order: tuple[str, ...] = ()
    name: str | None = None
    named: bool = False
    children: str | None = None
    skips: Callable[[Any], bool] = lambda value: False
    penalties: bool = True

    @property
    def key(self) -> str:
        """Where an item keeps what only this format has."""
        return f"x-{self.format}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Objects of a format to items with ids that are distinct among all that it reads.

    ``ours`` holds, by id, what was kept of items of our own by a format whose objects have no room for it.
    """

    criteria: Criteria
    decisions: Decisions
    ids: Ids = field(default_factory=Ids)
    ours: Mapping[str, Any] = field(default_factory=dict)

    def one(self, value: Any, place: Place, name: str | None = None) -> Data:
        """The item of one object, which may have its name elsewhere."""
        criteria = self.criteria
        theirs = mapping(value, place)
        kept = block(theirs, "x-grape", place)
        theirs.pop("x-grape", None)
        trusted = self.decisions.trust(kept.get("polarity"))
        item = criteria.load(theirs, place, Reader(criteria=criteria, decisions=trusted, ids=self.ids))
        own = theirs.get(criteria.name) if criteria.name else None
        called = name if name is not None else own if isinstance(own, str) and own.strip() else None
        item = {"id": text_id(item.get("criterion", "")) if called is None else name_id(called), **item}
        weight = item["weight"]
        item = _numbered(restore(item, kept or block(self.ours, item["id"], place)))
        item["id"] = self.ids.take(str(item["id"]))
        if criteria.name and isinstance(own, str) and own != item["id"]:
            item[criteria.key] = {criteria.name: own, **item.get(criteria.key, {})}
        shown = {**item, "weight": weight} if GROUP in item else item  # its weight in the whole
        derived = Writer(criteria=criteria, place=place, alone=True).derive(shown)
        if criteria.children in theirs and criteria.children in derived:
            derived[criteria.children] = theirs[criteria.children]  # each child keeps its own
        keep(theirs, item, derived, criteria.key)
        return ordered(item, ITEM_KEYS)

    def many(self, value: Any, place: Place) -> tuple[list[Data], list[Any] | None]:
        """The items of a list of objects and, if some of them weigh nothing, the list as it is to be filled again."""
        items, document = [], []
        for number, entry in enumerate(sequence(value, place)):
            if self.criteria.skips(entry):
                document.append(entry)
            else:
                items.append(self.one(entry, place.at(number)))
                document.append({ITEM: items[-1]["id"]})
        return items, document if len(items) < len(document) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Items to objects of a format. ``alone`` leaves out what the format has no place for, instead of keeping it."""

    criteria: Criteria
    place: Place
    alone: bool = False

    def derive(self, item: Data) -> Data:
        """What follows from an item's own fields."""
        criteria = self.criteria
        if "items" not in item and not str(item.get("criterion", "")).strip():
            raise self.place.fail(f"item {item.get('id')!r} has no criterion, which {criteria.format} needs")
        if item.get("polarity") == "undesirable" and not criteria.penalties:
            raise self.place.fail(f"item {item.get('id')!r} is undesirable, and {criteria.format} has no penalties")
        theirs = criteria.dump(item, self)
        name = str(item["id"])
        if criteria.name and (criteria.named or not is_id(name, text_id(item.get("criterion", "")))):
            own = block(item, criteria.key, self.place).get(criteria.name)
            theirs[criteria.name] = own if isinstance(own, str) and is_id(name, name_id(own)) else name
        return ordered(theirs, criteria.order)

    def one(self, item: Data, whole: Data | None = None) -> Data:
        """The object of one item, or of one that stands for a ``whole`` of which more is to be kept."""
        key = self.criteria.key
        kept = block(item, key, self.place)
        theirs = restore(self.derive(item), kept)
        if self.alone:
            return theirs
        ours = {name: value for name, value in (whole or item).items() if name != key}
        again = Reader(criteria=self.criteria, decisions=Decisions()).one(theirs, self.place, self._called(item))
        again.pop(key, None)
        for name in made_fields(item, key):
            ours.pop(name, None)
            again.pop(name, None)
        if is_id(item["id"], again["id"]):
            again["id"] = item["id"]
        if "items" in ours and "items" in again:
            again["items"] = ours["items"]  # each child keeps its own
        keep(ours, theirs, again, "x-grape", order=False)
        return theirs

    def many(self, items: list[Data], document: list[Any] | None = None) -> list[Any]:
        """The objects of a list of items, in the places that they had."""
        objects = {item["id"]: self.one(item) for item in items}
        return list(objects.values()) if document is None else list(fill(document, objects))

    def below(self, item: Data) -> list[Any]:
        """The objects of an item's children."""
        document = notes(block(item, self.criteria.key, self.place)).get("items")
        return self.many(item["items"], document if isinstance(document, list) else None)

    def _called(self, item: Data) -> str | None:
        return str(item["id"]) if self.criteria.name is None and self.criteria.named else None


def scale_of(item: Data, place: Place) -> Scale:
    """An item's scale, of which nobody may have made sure yet that it is one."""
    try:
        return parse_scale(item.get("scale", "unit"))
    except (TypeError, ValueError) as error:
        raise place.fail(f"item {item['id']!r}: {one_line(error)}") from error


def _numbered(item: Data) -> Data:
    """An item whose Likert points are numbers; JSON makes text of them."""
    scale = item.get("scale")
    if not isinstance(scale, Mapping) or not isinstance(scale.get("likert"), Mapping):
        return item
    points = {int(p) if isinstance(p, str) and p.isdecimal() else p: words for p, words in scale["likert"].items()}
    return {**item, "scale": {"likert": points}}


def weighs_nothing(key: str) -> Callable[[Any], bool]:
    """Whether an object's weight under ``key`` is 0."""

    def skips(value: Any) -> bool:
        weight = value.get(key) if isinstance(value, Mapping) else None
        return isinstance(weight, int | float) and not isinstance(weight, bool) and weight == 0

    return skips


def with_children(item: Data, key: str, children: tuple[list[Data], list[Any] | None]) -> Data:
    """A group of the items that were read, which remembers what stood between them."""
    items, document = children
    item["items"] = items
    if document is not None:
        item[key] = {NOTES: {"items": document}}
    return item
