"""PaperBench's trees (openai/frontier-evals): a leaf is met or not, a parent the mean of its children by weight."""

from __future__ import annotations

from typing import Any

from grape.formats.criteria import Criteria, Reader, Writer, weighs_nothing, with_children
from grape.formats.keep import Data, Place, mapping, need, number, sequence, text
from grape.formats.sheet import Sheet, Take


def load(theirs: Data, place: Place, reader: Reader) -> Data:
    weight = number(need(theirs, "weight", place), place.at("weight"))
    if weight < 0:
        raise place.at("weight").fail(f"a weight from 0 up is meant (got {weight!r})")
    made = {"criterion": text(theirs, "requirements", place), "weight": weight}
    below = place.at("sub_tasks")
    tasks = sequence(theirs.get("sub_tasks", []), below)
    if not tasks:
        return {**made, "judge": "default", "scale": "binary"}
    found = reader.many(tasks, below)
    if not found[0]:
        raise below.fail("all of them weigh 0, so nothing is scored here")
    return with_children(made, reader.criteria.key, found)


def dump(made: Data, writer: Writer) -> Data:
    tasks = writer.below(made) if "items" in made else []
    return {"requirements": made.get("criterion", ""), "weight": made.get("weight", 1), "sub_tasks": tasks}


PAPERBENCH = Criteria(
    format="paperbench", load=load, dump=dump, name="id", named=True, children="sub_tasks",
    skips=weighs_nothing("weight"), penalties=False, order=("id", "requirements", "weight", "sub_tasks"),
)  # fmt: skip


def lift(document: Any, take: Take, place: Place) -> Any:
    """Lifts the tree whole; of one that we made of a rubric, what hangs below its root."""
    root = mapping(document, place, "a tree")
    if root.get("id") != ROOT:
        return take(root, place)
    tasks = [take(task, place.at("sub_tasks", n)) for n, task in enumerate(sequence(root["sub_tasks"], place))]
    return {**root, "sub_tasks": tasks}


ROOT = "grape-rubric"


def build(objects: dict[str, Any]) -> Data:
    """A tree over items that have none: a root of its own."""
    return {"id": ROOT, "requirements": "Everything below.", "weight": 1, "sub_tasks": list(objects.values())}


SHEET = Sheet(
    criteria=PAPERBENCH, lift=lift, build=build, list_key="sub_tasks", formula=lambda items: "weighted", nested=True
)
