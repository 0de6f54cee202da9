"""Constitutions: pairs of a request to criticise a response and one to revise it.

Constitutional AI (arXiv 2212.08073) has no scores. A pair is the `principle` of an item of ours, whose criterion asks
how well a response stands up to the critique: that is desirable by its own wording, whatever the critique asks for. An
item without a principle is written as requests that follow from its criterion, and read back as it was.
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
    judged: Data = {"weight": 1, "judge": "default", "scale": "unit"}
    made = {"criterion": critic + STANDS, **judged, "principle": {"critique": critic, "revision": revision}}
    for ours, polarity in ((FALLS_SHORT, {}), (SHOWS, {"polarity": "undesirable"})):
        said = critic.removeprefix(ours[0])
        if said != critic and revision == ours[1] + said:
            made = {"criterion": said, **judged, **polarity}
    return {**made, "x-constitution": {NOTES: {"pair": PAIRS.index(pair)}}} if pair != PAIRS[0] else made


def dump(made: Data, writer: Writer) -> Data:
    number = notes(block(made, "x-constitution", writer.place)).get("pair")
    pair = PAIRS[number] if isinstance(number, int) and 0 <= number < len(PAIRS) else PAIRS[0]
    if made.get("principle") is not None:
        return {pair[0]: made["principle"]["critique"], pair[1]: made["principle"]["revision"]}
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
