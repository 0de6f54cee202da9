"""Constitutions: pairs of a request to criticise a response and one to revise it.

Constitutional AI (arXiv 2212.08073) has no scores. An item of ours asks how well a response stands up to a critique,
which is desirable by its own wording, whatever the critique asks for; what is to be revised is kept beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grape.formats.criteria import Criteria, Reader, Writer
from grape.formats.keep import NOTES, Data, Place, block, mapping, notes, text
from grape.formats.sheet import Sheet, Take

PAIRS = (("critic", "revision"), ("critique_request", "revision_request"), ("prompt", "edit_request"))
STANDS = "\n\nScore how well the response stands up to this, from 0 to 1: 1 where nothing in it calls for a revision."
FALLS_SHORT = ("Point out where the response falls short of this: ", "Rewrite the response so that it meets this: ")
SHOWS = ("Point out where the response shows this fault: ", "Rewrite the response so that it is free of this fault: ")


def load(theirs: Data, place: Place, reader: Reader) -> Data:
    pair = next((pair for pair in PAIRS if pair[0] in theirs), None)
    if pair is None:
        raise place.fail(f"no critique; it would stand under {' or '.join(first for first, _ in PAIRS)}")
    critic, revision = text(theirs, pair[0], place), text(theirs, pair[1], place)
    made: Data = {"criterion": critic + STANDS, "weight": 1}
    for ours, polarity in ((FALLS_SHORT, "desirable"), (SHOWS, "undesirable")):
        said = critic.removeprefix(ours[0])
        if said != critic and revision == ours[1] + said:
            made["criterion"] = said
            made |= {"polarity": polarity} if polarity == "undesirable" else {}
    made |= {"judge": "default", "scale": "unit"}
    note = {"pair": PAIRS.index(pair)} if pair != PAIRS[0] else {}
    kept = {pair[1]: revision} if made["criterion"].endswith(STANDS) else {}
    return {**made, "x-constitution": {**kept, NOTES: note} if note else kept} if kept or note else made


def dump(made: Data, writer: Writer) -> Data:
    kept = block(made, "x-constitution", writer.place)
    number = notes(kept).get("pair")
    pair = PAIRS[number] if isinstance(number, int) and 0 <= number < len(PAIRS) else PAIRS[0]
    critic = made["criterion"].removesuffix(STANDS)
    if critic != made["criterion"] and pair[1] in kept:
        return {pair[0]: critic, pair[1]: kept[pair[1]]}
    ours = SHOWS if made.get("polarity") == "undesirable" else FALLS_SHORT
    return {pair[0]: ours[0] + made["criterion"], pair[1]: ours[1] + made["criterion"]}


CONSTITUTION = Criteria(format="constitution", load=load, dump=dump, name="name")


def lift(document: Any, take: Take, place: Place) -> Any:
    """Lifts a list of pairs, the one under `constitutions`, or pairs by name."""
    if isinstance(document, list):
        return [take(pair, place.at(number)) for number, pair in enumerate(document)]
    data = mapping(document, place, "a constitution")
    if "constitutions" in data:
        return {**data, "constitutions": lift(data["constitutions"], take, place.at("constitutions"))}
    named = {name: pair for name, pair in data.items() if isinstance(pair, Mapping)}
    if not named:
        raise place.fail("no pairs; they would stand under constitutions")
    return {name: take(pair, place.at(name), str(name)) if name in named else pair for name, pair in data.items()}


SHEET = Sheet(
    criteria=CONSTITUTION, lift=lift, build=lambda objects: {"constitutions": list(objects.values())},
    list_key="constitutions", formula=lambda items: "weighted",
)  # fmt: skip
