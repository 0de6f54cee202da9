"""What a run of `grape sft`, `reward-model` or `dpo` teaches and holds out: its lessons as rows of tokens."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from grape.decontaminate import apart, asked
from grape.errors import ConfigError
from grape.examples import Example, Task, make_examples
from grape.lesson_rows import Kind
from grape.lessons import Lesson, Preferred, read_lessons
from grape.policy import Policy
from grape.questions import tell
from grape.recipes import DpoRun, Recipe, RewardModelRun, SftRun
from grape.resources import digest
from grape.rollout import positions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What a run teaches and what it holds out, with hashes of all that decides its result."""

    examples: list[Example]
    heldout: list[Example]
    identity: dict[str, str]


def _kind(config: Recipe) -> Kind:
    """What the rows of the data are."""
    if isinstance(config, SftRun):
        return "chats"
    kind = config.loss.kind if isinstance(config, RewardModelRun | DpoRun) else ""
    kinds: dict[str, Kind] = {"ranking": "rankings", "outcome": "labels", "process": "steps", "kto": "labels"}
    return kinds.get(kind, "pairs")


def read_course(config: Recipe, policy: Policy, task: Task) -> Course:
    """The lessons of a run, read, held out and made rows of tokens. `ConfigError` for what cannot be used."""
    kind = _kind(config)
    parts = [read_lessons(config.data, kind)]
    if config.heldout and config.heldout.data:
        parts.append(read_lessons(config.data.model_copy(update={"path": config.heldout.data, "limit": None}), kind))
    rows = digest(" ".join(part.hash for part in parts))
    usable = [named(_usable(config, policy, task, part.source, part.lessons)) for part in parts]
    grouped = isinstance(config, RewardModelRun) and config.loss.kind == "bradley-terry"
    lessons = [by_question(some) if grouped else some for some in usable]
    if _by_margin(config) and not any(pair.margin for one in lessons[0] for pair in one.pairs):
        raise ConfigError(f"{config.data.path}: none of the rows has a margin, which loss.margin goes by")
    if kind == "steps" and {label for one in lessons[0] for label in one.labels} == {0, 1}:
        told = "labels: are 0 and 1, none is -1, and 0 is neutral: wrong and right are false and true, or -1 and 1"
        raise ConfigError(f"{config.data.path}: {told}")
    if isinstance(config, DpoRun) and config.loss.kind != "dpo":
        soft = sum(pair.probability < 1 for one in lessons[0] for pair in one.pairs)
        if soft:
            told = "%s: %d pairs have a probability, which %s does not take: their chosen one counts as surely better"
            logger.warning(told, config.data.path, soft, config.loss.kind)
    if config.heldout and config.heldout.share:
        lessons = parted(lessons[0], config.heldout.share, config.seed, config.data.path)
    if config.heldout:
        taught, heldout = ([(one.place, asked(one.prompt)) for one in some] for some in lessons)
        how: Any = {"how": config.heldout.overlap, "field": "heldout.overlap", "source": config.data.path}
        left = apart(taught, heldout, **how)
        lessons[0] = [one for place, one in enumerate(lessons[0]) if place not in left]
    sections = config.model_dump(exclude={"checkpoint": True, "trackers": True, "log": True})
    identity = {name: digest(json.dumps(value, sort_keys=True)) for name, value in sections.items()}
    mismatched = kind == "labels" and isinstance(config, DpoRun)
    made = [make_examples(task, some, mismatched=mismatched) for some in lessons]
    return Course(
        examples=made[0], heldout=made[1] if len(made) > 1 else [], identity={**identity, "data's rows": rows}
    )


def _by_margin(config: Recipe) -> bool:
    """Whether the loss goes by the rows' margins."""
    return isinstance(config, RewardModelRun) and config.loss.margin


def _usable(config: Recipe, policy: Policy, task: Task, source: str, lessons: Sequence[Lesson]) -> list[Lesson]:
    """The lessons whose rows the model has room for; ``bad_rows`` says what becomes of the others."""
    kept, skipped = [], []
    room = min(config.data.max_tokens or math.inf, positions(policy) or math.inf)
    for lesson in lessons:
        try:
            if _by_margin(config) and (least := min(pair.margin for pair in lesson.pairs)) < 0:
                raise ConfigError(f"{lesson.place}: margin: {least:g} is below 0, and loss.margin goes by it")
            longest = max(len(prompt) + len(response) for prompt, response in task.rows(lesson))
            if longest > room:
                raise ConfigError(f"{lesson.place}: {longest} tokens; there is room for {room:.0f}")
            kept.append(lesson)
        except ConfigError as error:
            if config.data.bad_rows == "fail":
                raise
            skipped.append(str(error))
    tell(source, len(kept), skipped)
    return kept


def named(lessons: Sequence[Lesson]) -> list[Lesson]:
    """The lessons, those of one prompt or one name (and what these are joined by) under the name of the first."""
    same: dict[str, str] = {}  # each name and each prompt leads to another one of the same question, at last to itself

    def first(name: str) -> str:
        while same.setdefault(name, name) != name:
            same[name] = name = same[same[name]]
        return name

    for one in lessons:
        asked, group = first(json.dumps(one.prompt)), first(one.group)
        same[asked] = group
    names: dict[str, str] = {}
    return [replace(one, group=names.setdefault(first(one.group), one.group)) for one in lessons]


def by_question(lessons: Sequence[Lesson]) -> list[Lesson]:
    """All pairs of a question as one lesson, each response in it once (Ouyang et al. 2022, 3.5)."""
    firsts: dict[tuple[str, str], Lesson] = {}
    texts: dict[tuple[str, str], dict[str, int]] = {}
    pairs: dict[tuple[str, str], list[Preferred]] = {}
    for one in lessons:
        key = one.group, json.dumps(one.prompt)
        firsts.setdefault(key, one)
        seen = texts.setdefault(key, {})
        places = [seen.setdefault(text, len(seen)) for text in one.responses]
        own = pairs.setdefault(key, [])
        own += [replace(pair, better=places[pair.better], worse=places[pair.worse]) for pair in one.pairs]
    return [replace(one, responses=tuple(texts[key]), pairs=tuple(pairs[key])) for key, one in firsts.items()]


def parted(lessons: Sequence[Lesson], share: float, seed: int, source: str) -> list[list[Lesson]]:
    """The lessons to learn from, and those of the share of questions that is held out, in their own order."""
    groups = list(dict.fromkeys(one.group for one in lessons))
    if len(groups) < 2:
        raise ConfigError(f"{source}: has but one question, of which no share can be held out")
    number = min(len(groups) - 1, max(1, round(share * len(groups))))
    out = set(Random(f"{seed}/heldout").sample(groups, number))
    return [[one for one in lessons if (one.group in out) == held] for held in (False, True)]
