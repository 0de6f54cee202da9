"""Many questions with a rubric each: the rows of another format to rows of ours and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grape.errors import one_line
from grape.formats.criteria import Criteria, Reader, Writer
from grape.formats.decisions import Decisions
from grape.formats.keep import NOTES, Data, Ids, Place, block, keep, mapping, need, notes, ordered, restore, sequence
from grape.resources import digest

ROW_KEYS = (
    "question_id", "category", "question", "response", "response_id", "reference", "tests", "entry_point",
    "instruction_id_list", "kwargs", "instruction_form", "items", "metadata",
)  # fmt: skip
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
Items = Callable[[Any, Place], list[Data]]
Objects = Callable[[list[Data]], list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """How a format writes one question with its criteria.

    ``load`` makes a row (with the format's other fields in its metadata) and ``dump`` the object of one; each is
    given a function for the criteria. ``score`` says which formula the category's rubric needs and how to get from
    our reward to the score of the format's own.
    """

    format: str
    criteria: Criteria | None
    known: Callable[[Data], bool]
    load: Callable[[Data, Place, Items], Data]
    dump: Callable[[Data, Objects, Place], Data]
    score: Callable[[Data], Data]
    order: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Where a row's metadata keeps what only this format has."""
        return f"x-{self.format}"


def load_row(table: Table, value: Any, place: Place, decisions: Decisions) -> Data:
    """The row of one object."""
    theirs = mapping(value, place)
    kept = block(theirs, "x-grape", place)
    theirs.pop("x-grape", None)
    ids, documents = Ids(), Data()

    def items(value: Any, at: Place) -> list[Data]:
        assert table.criteria is not None, "a format without criteria has no list of them"
        found, document = Reader(criteria=table.criteria, decisions=decisions, ids=ids).many(value, at)
        if document is not None:
            documents["items"] = document
        return found

    row = restore(table.load(theirs, place, items), kept)
    metadata = mapping(row.get("metadata", {}), place.at("x-grape"))
    if documents:
        metadata[table.key] = {
            **metadata.get(table.key, {}),
            NOTES: {**notes(metadata.get(table.key, {})), **documents},
        }
    if not kept:
        metadata["x-score"] = table.score(row)
    row["metadata"] = metadata
    keep(theirs, metadata, _derive(table, row, place), table.key)
    return ordered({name: value for name, value in row.items() if value != {}}, ROW_KEYS)


def dump_row(table: Table, row: Data, place: Place) -> Data:
    """The object of one row, as it was before if it came from one."""
    theirs = restore(_derive(table, row, place), block(row.get("metadata", {}), table.key, place))
    again = table.load(dict(theirs), place, lambda *_: row.get("items", []))
    keep(_bare(table, row), theirs, _bare(table, again), "x-grape", order=False)
    return theirs


def _derive(table: Table, row: Data, place: Place) -> Data:
    document = noted(row, table.key).get("items")

    def objects(items: list[Data]) -> list[Any]:
        assert table.criteria is not None, "a format without criteria has no list of them"
        writer = Writer(criteria=table.criteria, place=place)
        return writer.many(items, document if isinstance(document, list) else None)

    return ordered(table.dump(row, objects, place), table.order)


def _bare(table: Table, row: Data) -> Data:
    """A row without what was added to it on the way in."""
    metadata = {key: value for key, value in row.get("metadata", {}).items() if key not in (table.key, "x-score")}
    bare = {key: value for key, value in row.items() if key != "metadata"}
    return {**bare, "metadata": metadata} if metadata else bare


def noted(row: Data, key: str) -> Data:
    """The notes in a row's metadata on how the object was written that it came from."""
    kept = row.get("metadata", {}).get(key)
    return notes(kept) if isinstance(kept, dict) else {}


def rest(theirs: Data, *taken: str) -> Data:
    """The fields of an object that a row has no place for; they become its metadata."""
    return {key: value for key, value in theirs.items() if key not in taken and not key.startswith("x-")}


def spread(row: Data) -> Data:
    """The fields that `rest` put into a row's metadata."""
    return {key: value for key, value in row.get("metadata", {}).items() if not key.startswith("x-")}


def question(theirs: Data, key: str, place: Place) -> str | list[Data]:
    """A prompt as a row has it: text, or turns of a role and text each."""
    value = need(theirs, key, place)
    if isinstance(value, str):
        return value
    turns = []
    for number, entry in enumerate(sequence(value, place.at(key))):
        at = place.at(key, number)
        turn = mapping(entry, at, "a message")
        role = need(turn, "role", at)
        if not isinstance(role, str) or role not in ROLES:
            raise at.at("role").fail(f"no such role: {one_line(repr(role), 60)}; known: {', '.join(sorted(ROLES))}")
        turn = {"role": ROLES[role], "content": _content(need(turn, "content", at), at.at("content"))}
        turns.append({name: turn[name] for name in entry if name in turn})
    if not turns:
        raise place.at(key).fail("text or messages are meant (got [])")
    return turns


def _content(value: Any, place: Place) -> str:
    """A message's text, of which chat formats make a list of parts."""
    if isinstance(value, str):
        return value
    parts = [mapping(part, place.at(number)) for number, part in enumerate(sequence(value, place))]
    return "\n".join(str(need(part, "text", place.at(number))) for number, part in enumerate(parts))


def turns(question: Any) -> list[Data]:
    """A row's question as a chat."""
    return [{"role": "user", "content": question}] if isinstance(question, str) else list(question)


def question_id(question: Any, *more: Any) -> str:
    """The id of a question that has none: the same for the same question with the same criteria, wherever it stands."""
    return f"q-{digest(repr([question, *more]))}"
