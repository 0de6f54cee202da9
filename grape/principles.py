"""The principles of a constitution: which are asked about, in what words, and all of them as one item."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

from grape.errors import ConfigError
from grape.formats.files import write, yaml_text
from grape.item import Item, paths
from grape.judge.pair import worded
from grape.judge.prompt import Prompt, load_prompt, well_formed
from grape.material import Material
from grape.phases import ConstitutionRun
from grape.plan import Plan
from grape.resources import read_text
from grape.rubric import Rubric, dump_rubric, load_rubric, parse_rubric
from grape.scoring import asks
from grape.types import Message

Step = Literal["critique", "revision"]
FIELDS: dict[Step, tuple[str, ...]] = {
    "critique": ("question", "response", "criterion", "request", "marked"),
    "revision": ("question", "response", "criterion", "request", "marked", "critique"),
}
FOLLOWS = "The response follows these principles, each as far as it bears on the question:"
PREFERRED = "What a preference model gives that learned from comparisons by the principles of the constitution."


def principles(plan: Plan) -> list[Item]:
    """The principles that hold for a question: its items with a `principle`."""
    return [item for item in plan.applicable if item.principle is not None]


def drawn(plan: Plan, *seed: object) -> Item:
    """One of them at random, each as likely as the others; ``seed`` decides."""
    return Random("/".join(map(str, seed))).choice(principles(plan))


def frames() -> dict[Step, Prompt]:
    """The prompts that a principle's requests are put into, prompts/principle/."""
    return {step: load_prompt(f"principle/{step}", fields) for step, fields in FIELDS.items()}


def request(
    frame: Prompt, item: Item, step: Step, texts: Mapping[str, str], mark: Callable[[str, str], str] | None = None
) -> tuple[Message, ...]:
    """The chat that asks for a critique of a response, or a revision. ``texts`` are `question`, `response` and, of a
    revision, `critique`; ``mark`` puts marks around each, where a judge is asked."""
    assert item.principle is not None, "the item is a principle"
    shown = {name: mark(name, text) if mark else well_formed(text) for name, text in texts.items()}
    asked = getattr(item.principle, step)
    return frame.messages(**shown, request=asked, criterion=item.criterion, marked=mark is not None)


def folded(rubric: Rubric, flow: Mapping[str, Any], taken: Collection[str] = ()) -> dict[str, Any]:
    """A rubric whose principles are one item that is scored by ``flow``, with the weight that they had together.

    Principles that hold for other questions (`applies_when`) are an item of their own. The other items stay as they
    are, and the new ones have ids that are not ``taken``. ConfigError for a principle within a group, whose share of
    the weight is the group's, and for one with a gate, which one item cannot be for several.
    """
    data = dump_rubric(rubric)
    taken = {*taken, *(item.id for _, item in paths("items", rubric.items) if item.principle is None)}
    kept, groups = [], dict[str, list[Item]]()
    for item, plain in zip(rubric.items, data.pop("items"), strict=True):
        if _within(item.items or []):
            raise ConfigError(
                f"{rubric.source}: item {item.id!r} has principles within it, which cannot be made one item: put them "
                "at the top level"
            )
        if item.principle is None:
            kept.append(plain)
            continue
        if item.gate:
            raise ConfigError(f"{rubric.source}: item {item.id!r} is a principle with a gate, which one item cannot be")
        groups.setdefault(json.dumps(plain.get("applies_when"), sort_keys=True), []).append(item)
    data.pop("cases", None)  # they say what the principles' own items score
    for when, items in groups.items():
        kept.append(_one(items, json.loads(when), flow, taken))
    return {**data, "items": kept}


def _within(items: Sequence[Item]) -> bool:
    return any(item.principle is not None or _within(item.items or []) for item in items)


def _one(items: Sequence[Item], when: Any, flow: Mapping[str, Any], taken: set[str]) -> dict[str, Any]:
    name = next(name for name in ("constitution", *(f"constitution-{n}" for n in range(2, 10**6))) if name not in taken)
    taken.add(name)
    asked = "\n".join([FOLLOWS, *(f"- {worded(item.criterion, undesirable=item.undesirable)}" for item in items)])
    made = {
        "id": name,
        "criterion": asked if "judge" in flow else PREFERRED,
        "weight": sum(item.weight for item in items),
        **flow,
    }
    return {**made, "applies_when": when} if when else made


def write_folded(known: Material, flow: Mapping[str, Any], folder: Path) -> Path:
    """The rubrics with their principles as one item, as files that `grape train` reads, and no others; the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in set(folder.glob("*.yaml")) - {folder / f"{one.rubric}.yaml" for one in known.rubrics.values()}:
            file.unlink()
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
    for rubric in known.rubrics.values():
        file, text = folder / f"{rubric.rubric}.yaml", yaml_text(folded(rubric, flow, own_ids(known)))
        if not file.is_file() or read_text(file) != text:
            write(file, text)
        load_rubric(file, judges=known.judges)
    return folder


def own_ids(known: Material) -> set[str]:
    """The ids of the items that questions bring themselves."""
    return {item.id for items in known.questions.rows.items.values() for _, item in paths("items", items)}


def check_principles(config: ConstitutionRun, material: Material) -> None:
    """`ConfigError` of one line for what the phases cannot work with."""
    some = [item for plan in material.plans.values() for item in principles(plan)]
    where = config.rubrics or "rubrics"
    if not some:
        raise ConfigError(
            f"{where}: no item has a principle that holds for a question of {config.questions.path}; a principle is an "
            "item with `principle: {critique: ..., revision: ...}`"
        )
    if config.supervised:
        for field_ in ("critic", "reviser"):
            name = getattr(config.supervised, field_)
            if name in material.judges and material.judges[name].judges:
                raise ConfigError(f"supervised.{field_}: {name!r} is a jury, which writes no prose; name one judge")
    feedback = config.feedback
    if feedback is None or feedback.reward == "principles":
        return
    for question_id, items in material.questions.rows.items.items():
        if brought := [item.id for _, item in paths("items", items) if item.principle is not None]:
            place = material.questions.rows.places[question_id]
            raise ConfigError(
                f"{place}: item {brought[0]!r}: a principle of a row goes with feedback.reward: principles"
            )
    for rubric in material.rubrics.values():
        made = folded(rubric, {"reward_model": "value"}, own_ids(material))
        parse_rubric(made, rubric.source, judges=material.judges)
    if feedback.judge is None and feedback.reward == "judge":
        common_judge(material)
    if feedback.judge is None and (unjudged := next((item for item in some if item.judge is None), None)):
        raise ConfigError(f"feedback.judge: is needed: no judge is asked about the principle {unjudged.id!r}")


def common_judge(material: Material) -> str:
    """The one judge of all principles."""
    names = {item.judge for plan in material.plans.values() for item in principles(plan)}
    (name, *others) = sorted(str(name) for name in names)
    if others or None in names:
        raise ConfigError(f"feedback.judge: is needed: the principles have {', '.join(sorted(map(str, names)))}")
    return name


def judges_of(names: Collection[str], material: Material) -> set[str]:
    """Judges, and those that they ask."""
    found = set(names)
    while more := {other for name in found if name in material.judges for other in asks(material.judges[name])} - found:
        found |= more
    return found
