"""RLCF's checklists (arXiv 2507.18624): questions about the response, each with an importance from 1 to 100.

The score of a response is the mean of the answers (0 to 100 each) by importance, over 100.
"""

from __future__ import annotations

import re
from typing import Any

from grape.errors import one_line
from grape.formats.criteria import Criteria, Reader, Writer
from grape.formats.keep import NOTES, Data, Place, need, number, sequence, text
from grape.formats.questions import hide, unhide
from grape.formats.table import Items, Objects, Table, noted, question, question_id, rest, spread

ENTRY = re.compile(
    r"\s*(?:[-*]\s+|\d+[.)]\s+)?(.*?)\s*\((?:importance:\s*)?(\d+(?:\.\d+)?)(?:/100)?\)[ \t]*(?:\n|\Z)", re.S
)
QUESTIONS = ("prompt", "instruction", "question")


def load_criterion(theirs: Data, place: Place, reader: Reader) -> Data:
    weight = number(need(theirs, "importance", place), place.at("importance"))
    if weight < 0:
        raise place.at("importance").fail(f"a number from 0 to 100 is meant (got {weight!r})")
    made = {"criterion": text(theirs, "question", place), "weight": weight, "judge": "default"}
    return {**made, "scale": {"numeric": [0, 100]}}


def dump_criterion(made: Data, writer: Writer) -> Data:
    return {"question": made["criterion"], "importance": made.get("weight", 1)}


RLCF = Criteria(
    format="rlcf", load=load_criterion, dump=dump_criterion, order=("question", "importance"), penalties=False
)


def load(theirs: Data, place: Place, items: Items) -> Data:
    key = next((key for key in QUESTIONS if key in theirs), QUESTIONS[0])
    asked = question(theirs, key, place)
    at = place.at("requirements")
    found, style = _parse(need(theirs, "requirements", place), theirs.get("importances"), at)
    asides = [entry for entry in found if entry["importance"] != 0]
    made = items(unhide(asides, theirs.get("x-grape-items")), at)
    taken = ["requirements", "response", key, *(["importances"] if style == "importances" else [])]
    note = {**({"style": style} if style != "pairs" else {}), **({"question": key} if key != QUESTIONS[0] else {})}
    metadata = {**rest(theirs, *taken), **({"x-rlcf": {NOTES: note}} if note else {})}
    gist = [(item["criterion"], item["weight"]) for item in made]
    row = {"question_id": question_id(asked, *gist), "category": "rlcf", "question": asked}
    if isinstance(theirs.get("response"), str):
        row["response"] = theirs["response"]
    return {**row, "items": made, "metadata": metadata}


def _parse(value: Any, importances: Any, place: Place) -> tuple[list[Data], str]:
    """The requirements and how they were written: pairs, lines, a text of lines, or beside their importances."""
    if isinstance(value, str):
        found = [_entry(match[1], match[2]) for match in ENTRY.finditer(value)]
        if ENTRY.sub("", value).strip():
            raise place.fail(f"a question and its importance in brackets are meant (got {one_line(value, 60)!r})")
        return found, "text"
    entries = sequence(value, place)
    if importances is not None:
        weights = sequence(importances, place.at("importances"))
        if len(weights) != len(entries):
            raise place.fail(f"{len(entries)} requirements, {len(weights)} importances")
        return [{"question": q, "importance": w} for q, w in zip(entries, weights, strict=True)], "importances"
    found, style = [], "pairs"
    for place_in, entry in enumerate(entries):
        if isinstance(entry, str):
            match = ENTRY.fullmatch(entry)
            if match is None:
                raise place.at(place_in).fail(f"an importance in brackets is missing (got {one_line(entry, 60)!r})")
            found.append(_entry(match[1], match[2]))
            style = "lines"
        elif isinstance(entry, list) and len(entry) == 2:
            found.append({"question": entry[0], "importance": entry[1]})
        else:
            raise place.at(place_in).fail(f"a question and its importance are meant (got {one_line(repr(entry), 60)})")
    return found, style


def _entry(asked: str, digits: str) -> Data:
    return {"question": asked, "importance": float(digits) if "." in digits else int(digits)}


def dump(row: Data, objects: Objects, place: Place) -> Data:
    note = noted(row, "x-rlcf")
    found = objects(row.get("items", []))
    hidden = hide(found)
    pairs = [(entry["question"], entry["importance"]) for entry in found]
    style = note.get("style", "pairs")
    written: Any = [[asked, weight] for asked, weight in pairs]
    if style == "text":
        written = "\n".join(f"{n}) {asked} (importance: {weight}/100)" for n, (asked, weight) in enumerate(pairs, 1))
    elif style == "lines":
        written = [f"{asked} ({weight})" for asked, weight in pairs]
    elif style == "importances":
        written = [asked for asked, _ in pairs]
    theirs = {**spread(row), note.get("question", QUESTIONS[0]): row["question"], "requirements": written, **hidden}
    if style == "importances":
        theirs["importances"] = [weight for _, weight in pairs]
    if "response" in row:
        theirs["response"] = row["response"]
    return theirs


TABLE = Table(
    format="rlcf", criteria=RLCF, known=lambda data: True, load=load, dump=dump,
    score=lambda row: {"formula": "weighted"}, order=(*QUESTIONS, "requirements", "importances"),
)  # fmt: skip
