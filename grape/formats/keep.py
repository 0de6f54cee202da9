"""What one side of a conversion cannot say is kept beside what it can, so that nothing is lost on the way back.

An object of another format becomes a grape object whose fields follow from it; what has no place there, or would come
back otherwise, is kept under ``x-<format>``. The other way round it is kept under ``x-grape``. A kept value speaks
only for as long as the field that it stands for is as it was: an edit on either side wins.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from grape.errors import ConfigError, one_line
from grape.resources import digest

Data = dict[str, Any]
NOTES = "x-convert"  # within a kept block: how to put it back
GROUP = "x-group"  # on a leaf, in a format without groups: those that it stood in
ITEM = "x-item"  # within a kept document: the item that stood here


class Place(NamedTuple):
    """Where in the user's file a value stands."""

    file: str
    path: tuple[str | int, ...] = ()

    def at(self, *keys: str | int) -> Place:
        """A place further down."""
        return Place(self.file, (*self.path, *keys))

    def fail(self, problem: str) -> ConfigError:
        """The error that says so, in one line."""
        path = ".".join(str(key) for key in self.path)
        return ConfigError(": ".join([self.file, path, problem] if path else [self.file, problem]))


def mapping(value: Any, place: Place, what: str = "a mapping") -> Data:
    """``value`` as a mapping of its own, or an error."""
    if not isinstance(value, Mapping):
        raise place.fail(f"{what} is meant (got {one_line(repr(value), 60)})")
    return dict(value)


def sequence(value: Any, place: Place) -> list[Any]:
    """``value`` as a list of its own, or an error."""
    if not isinstance(value, list):
        raise place.fail(f"a list is meant (got {one_line(repr(value), 60)})")
    return list(value)


def need(data: Mapping[str, Any], key: str, place: Place) -> Any:
    """A field that the format always has."""
    if key not in data:
        raise place.fail(f"{key}: missing; there is: {', '.join(str(k) for k in data) or 'nothing'}")
    return data[key]


def text(data: Mapping[str, Any], key: str, place: Place) -> str:
    """A field that holds words."""
    value = need(data, key, place)
    if not isinstance(value, str) or not value.strip():
        raise place.at(key).fail(f"text is meant (got {one_line(repr(value), 60)})")
    return value


def number(value: Any, place: Place) -> int | float:
    """A finite number, whole ones left whole."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise place.fail(f"a finite number is meant (got {one_line(repr(value), 60)})")
    return value


def words(value: str, limit: int = 60) -> str:
    """``value`` in the alphabet of an id; empty where nothing is left of it."""
    plain = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^a-z0-9]+", "-", plain.casefold()).strip("-")
    return slug if len(slug) <= limit else slug[:limit].rsplit("-", 1)[0]


def name_id(name: str) -> str:
    """The id of something that has a name: the name itself where it can stand, else its words or its hash."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", name):
        return name
    return words(name) or f"item-{digest(name)[:8]}"


def text_id(criterion: str) -> str:
    """The id of something without a name: its first words and four digits of the hash of all of it."""
    start = "-".join(words(criterion[:400]).split("-")[:5])
    return f"{start or 'item'}-{digest(criterion)[:4]}"


def is_id(name: str, made: str) -> bool:
    """Whether ``name`` is the id ``made``, perhaps with the number that tells it from others."""
    return name == made or re.fullmatch(re.escape(made[:190]) + r"-\d+", name) is not None


class Ids:
    """The ids of one tree of items; one that was given before gets a number."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, name: str) -> str:
        """``name``, or ``name-2``, ``name-3``, ..."""
        free, count = name, 1
        while free in self._taken:
            count += 1
            free = f"{name[:190]}-{count}"
        self._taken.add(free)
        return free


def same(one: Any, other: Any) -> bool:
    """Whether two values are written alike: 1, 1.0 and true are three things, and the order of keys counts."""
    return one is other or json.dumps(one, default=repr) == json.dumps(other, default=repr)


def mark(value: Any) -> str:
    """A short stand-in for a value, to see later whether it has changed."""
    return digest(json.dumps(value, default=repr))


def block(data: Mapping[str, Any], key: str, place: Place) -> Data:
    """What is kept under ``key``; empty where nothing is."""
    return mapping(data[key], place.at(key)) if data.get(key) is not None else {}


def notes(kept: Mapping[str, Any]) -> Data:
    """The notes within a kept block."""
    found = kept.get(NOTES)
    return dict(found) if isinstance(found, Mapping) else {}


def made_by(item: Data, key: str, **fields: Any) -> Data:
    """An item with fields that do not follow from its object, but from what stands around it or from the user."""
    kept = dict(item.get(key) or {})
    note = notes(kept)
    note["made"] = {**note.get("made", {}), **{name: mark(value) for name, value in fields.items()}}
    return {**item, **fields, key: {**kept, NOTES: note}}


def made_fields(item: Data, key: str) -> list[str]:
    """Those fields of an item, as long as they are as they were made."""
    made = notes(item.get(key) or {}).get("made")
    return [n for n, was in made.items() if n in item and mark(item[n]) == was] if isinstance(made, Mapping) else []


def keep(source: Mapping[str, Any], target: Data, derived: Mapping[str, Any], key: str, *, order: bool = True) -> None:
    """Put under ``target[key]`` whatever of ``source`` is not in ``derived``, which follows from ``target``.

    That is also the ``order`` of the keys; where it does not matter they are kept in that of the alphabet.
    """
    kept = dict(target.get(key) or {})
    note = notes(kept)
    was = {name: mark(value) for name, value in derived.items() if name not in source}
    for name, value in source.items():
        if name not in derived:
            kept[name] = value
        elif not same(value, derived[name]):
            kept[name] = value
            was[name] = mark(derived[name])
    if was:
        note["was"] = was
    kept = {name: value for name, value in kept.items() if name != NOTES}
    if not order:
        kept = dict(sorted(kept.items()))
    elif list(restore(derived, {**kept, NOTES: note})) != list(source):
        note["order"] = list(source)
    if note:
        kept[NOTES] = note
    if kept:
        target[key] = kept


def restore(derived: Mapping[str, Any], kept: Mapping[str, Any]) -> Data:
    """What ``derived`` came from, by what was kept of it. Fields that have changed since speak for themselves."""
    note = notes(kept)
    was = note.get("was")
    was = was if isinstance(was, Mapping) else {}
    found: Data = {}
    for name, value in derived.items():
        if name not in was or was[name] != mark(value):
            found[name] = value
        elif name in kept:
            found[name] = kept[name]
    found |= {name: value for name, value in kept.items() if name != NOTES and name not in derived}
    order = note.get("order")
    return ordered(found, order) if isinstance(order, list) else found


def ordered(data: Mapping[str, Any], order: Iterable[Any]) -> Data:
    """``data`` with the keys of ``order`` first, in that order."""
    return {**{name: data[name] for name in order if name in data}, **data}


def fill(document: Any, objects: Mapping[str, Any]) -> Any:
    """``document`` with every ``{x-item: id}`` replaced by the object of that id; None if there is no place for all.

    A new object takes the place of one that is gone if it follows the same neighbour; else a place whose item is gone
    is dropped with it, and the new object goes where the last of the others stands.
    """
    rest, gone = dict(objects), object()
    renamed = _renamed(_slots(document), list(objects))
    homes: list[list[Any] | Data] = []

    def put(node: Any) -> Any:
        if _is_slot(node):
            return rest.pop(renamed.get(node[ITEM], node[ITEM]), gone)
        if isinstance(node, Mapping):
            filled = {name: value for name, entry in node.items() if (value := put(entry)) is not gone}
            if any(map(_is_slot, node.values())):
                homes.append(filled)
            return filled
        if isinstance(node, list):
            entries = [value for entry in node if (value := put(entry)) is not gone]
            if any(map(_is_slot, node)):
                homes.append(entries)
            return entries
        return node

    filled = put(document)
    if rest and isinstance(filled, list) and not homes:
        homes.append(filled)
    if filled is gone or (rest and not homes):
        return None
    home = homes[-1] if rest else None
    if isinstance(home, list):
        home.extend(rest.values())
    elif home is not None:
        home.update(rest)
    return filled


def _is_slot(node: Any) -> bool:
    return isinstance(node, Mapping) and set(node) == {ITEM} and isinstance(node[ITEM], str)


def _renamed(was: list[str], now: list[str]) -> dict[str, str]:
    """Which new ids stand for which old ones, going by the order of both."""
    renamed, known, at = {}, set(was), 0
    for name in was:
        if name in now:
            at = now.index(name) + 1
        elif at < len(now) and now[at] not in known:
            renamed[name] = now[at]
            at += 1
    return renamed


def _slots(node: Any) -> list[str]:
    """The ids of all the items that stood in a document."""
    if _is_slot(node):
        return [node[ITEM]]
    entries = node.values() if isinstance(node, Mapping) else node if isinstance(node, list) else ()
    return [name for entry in entries for name in _slots(entry)]
