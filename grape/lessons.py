"""What a policy or a reward model is taught from: rows of chats, pairs, rankings and labels, read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from grape.errors import ConfigError, invalid
from grape.questions import read_source, renamed, tell
from grape.recipes import ChatDataConfig, DataConfig
from grape.resources import digest
from grape.rows import given
from grape.types import Message, Strict, Turn, Unit

Kind = Literal["chats", "pairs", "rankings", "labels"]
Text = Annotated[str, Field(min_length=1)]
Asked = Text | Annotated[list[Turn], Field(min_length=1)]
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


def _id(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class LessonRow(Strict):
    """What all rows may say: the question, and its name where the same one stands in several rows."""

    question_id: Annotated[str | None, BeforeValidator(_id)] = None
    question: Asked | None = None


class ChatRow(LessonRow):
    """A question with its response, or the ``messages`` of a chat."""

    response: Text | None = None
    messages: Annotated[list[Turn], Field(min_length=2)] | None = None


class PairRow(LessonRow):
    """Two responses to a question, or two whole dialogues that differ in their last turn (messages, or transcripts of
    "Human:" and "Assistant:"). ``margin``: how much better; ``probability``: that the chosen one is better."""

    chosen: Asked
    rejected: Asked
    margin: float | None = None
    probability: Unit | None = None


class RankingRow(LessonRow):
    """The responses to a question, best first."""

    responses: Annotated[list[Text], Field(min_length=2)]


class LabelRow(LessonRow):
    """A response, and whether it is right, or wanted."""

    response: Text
    label: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferred:
    """That one response of a lesson is better than another, by their positions."""

    better: int
    worse: int
    margin: float = 0.0
    probability: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """A question with responses, and what is said of them: pairs, a label, or nothing but their order.

    ``group`` is the question's name: what is held out is whole questions.
    """

    place: str
    group: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    pairs: tuple[Preferred, ...] = ()
    label: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """The lessons of a source, and a line on each row that was left out."""

    source: str
    lessons: tuple[Lesson, ...]
    skipped: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Of all that they say."""
        return digest(
            json.dumps([[one.prompt, one.responses, *map(str, one.pairs), one.label] for one in self.lessons])
        )


def read_lessons(config: DataConfig, kind: Kind, source: Any = None) -> Lessons:
    """The lessons of ``config.path``, or of a ``source`` from Python. Columns that no field is taken from are ignored.

    A row that cannot be used is a `ConfigError`, or is left out, named and counted (``bad_rows: skip``).
    """
    found: list[Lesson] = []
    skipped: list[str] = []
    for number, (place, data) in enumerate(read_source(config, source)):
        if number == config.limit:
            break
        try:
            found += _lessons(place, data, kind, config)
        except ConfigError as error:
            if config.bad_rows == "fail":
                raise
            skipped.append(str(error))
    if not (found or skipped):
        raise ConfigError(f"{config.path}: no rows")
    tell(config.path, len(found), skipped)
    return Lessons(source=config.path, lessons=tuple(found), skipped=tuple(skipped))


def by_question(lessons: Sequence[Lesson]) -> list[Lesson]:
    """All pairs of a question as one lesson, each response in it once (Ouyang et al. 2022, 3.5)."""
    grouped: dict[tuple[str, tuple[tuple[str, str], ...]], Lesson] = {}
    for one in lessons:
        key = one.group, tuple((turn["role"], turn["content"]) for turn in one.prompt)
        whole = grouped.setdefault(key, replace(one, responses=(), pairs=()))
        texts = list(dict.fromkeys((*whole.responses, *one.responses)))
        places = [texts.index(text) for text in one.responses]
        pairs = [replace(pair, better=places[pair.better], worse=places[pair.worse]) for pair in one.pairs]
        grouped[key] = replace(whole, responses=tuple(texts), pairs=(*whole.pairs, *pairs))
    return list(grouped.values())


def _lessons(place: str, data: Any, kind: Kind, config: DataConfig) -> Iterator[Lesson]:
    """What one row teaches."""
    if isinstance(data, ConfigError):
        raise data
    if not isinstance(data, Mapping):
        raise ConfigError(f"{place}: a row is a mapping of columns, not {type(data).__name__}")
    named = renamed(place, given(data), config.map)
    if kind == "chats":
        yield from _of_chat(place, _read(place, named, ChatRow), isinstance(config, ChatDataConfig) and config.turns)
    elif kind == "rankings" and "chosen" not in named:
        ranked = _read(place, named, RankingRow)
        if len(set(ranked.responses)) < len(ranked.responses):
            raise ConfigError(f"{place}: responses: one stands twice")
        yield _lesson(place, ranked, _asked(place, ranked), *ranked.responses)
    elif kind == "labels" and "chosen" not in named:
        row = _read(place, named, LabelRow)
        yield replace(_lesson(place, row, _asked(place, row), row.response), label=row.label)
    else:
        pair = _of_pair(place, _read(place, named, PairRow))
        if kind != "labels":
            yield pair
        else:
            for better, text in zip((True, False), pair.responses, strict=True):
                yield replace(pair, responses=(text,), pairs=(), label=better)


def _read(place: str, named: Mapping[str, Any], model: type[Any]) -> Any:
    row = {key: value for key, value in named.items() if key in model.model_fields}
    try:
        return model.model_validate(row)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        line = invalid(place, error, sorted(model.model_fields))
        if fault["type"] == "missing" and len(fault["loc"]) == 1:
            raise ConfigError(f"{line}; the row has: {', '.join(map(str, named))}") from error
        raise line from error


def _asked(place: str, row: LessonRow) -> tuple[Message, ...]:
    """The turns up to where the response begins."""
    if row.question is None:
        raise ConfigError(f"{place}: question: is missing")
    if isinstance(row.question, str):
        return ({"role": "user", "content": row.question},)
    turns = tuple(turn.model_dump() for turn in row.question)
    if turns[-1]["role"] == "assistant":
        raise ConfigError(f"{place}: question: ends with a turn of the assistant, where the response begins")
    return turns


def _lesson(place: str, row: LessonRow, prompt: tuple[Message, ...], *responses: str) -> Lesson:
    if empty := [text for text in responses if not text.strip()]:
        raise ConfigError(f"{place}: {len(empty)} of its responses have no text")
    group = json.dumps(prompt) if row.question_id is None else row.question_id
    return Lesson(place=place, group=group, prompt=prompt, responses=responses)


def _of_chat(place: str, row: ChatRow, turns: Any) -> Iterator[Lesson]:
    if (row.messages is None) == (row.response is None) or (row.messages and row.question):
        raise ConfigError(f"{place}: needs either question and response, or messages")
    if row.messages is None:
        yield _lesson(place, row, _asked(place, row), row.response or "")
        return
    messages = [turn.model_dump() for turn in row.messages]
    if messages[-1]["role"] != "assistant":
        raise ConfigError(
            f"{place}: messages: end with a turn of the {messages[-1]['role']}: there is nothing to learn"
        )
    ends = [at for at, turn in enumerate(messages) if turn["role"] == "assistant" and at]
    for end in ends if turns == "all" else ends[-1:]:
        lesson = _lesson(place, row, tuple(messages[:end]), messages[end]["content"])
        yield replace(lesson, group=row.question_id or json.dumps(messages))  # turns of one chat are never parted


def _of_pair(place: str, row: PairRow) -> Lesson:
    sides = [_dialogue(place, name, getattr(row, name), row) for name in ("chosen", "rejected")]
    (asked, chosen), (other, rejected) = sides
    if asked != other:
        raise ConfigError(
            f"{place}: chosen and rejected answer different questions: their turns before the last differ"
        )
    if chosen == rejected:
        raise ConfigError(f"{place}: chosen and rejected are the same text")
    probability = 1.0 if row.probability is None else row.probability
    pair = Preferred(better=0, worse=1, margin=row.margin or 0.0, probability=probability)
    return replace(_lesson(place, row, asked, chosen, rejected), pairs=(pair,))


def _dialogue(place: str, name: str, said: str | Sequence[Turn], row: LessonRow) -> tuple[tuple[Message, ...], str]:
    """What was asked, and the response, of one side of a pair."""
    if row.question is not None and isinstance(said, str):
        return _asked(place, row), said
    turns = _transcript(place, name, said) if isinstance(said, str) else [turn.model_dump() for turn in said]
    asked = [] if row.question is None else list(_asked(place, row))
    if asked and turns[: len(asked)] != asked:
        turns = asked + turns
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ConfigError(f"{place}: {name}: does not end with a response of the assistant to something asked")
    return tuple(turns[:-1]), turns[-1]["content"]


def _transcript(place: str, name: str, text: str) -> list[Message]:
    """The turns of a text such as "\\n\\nHuman: ...\\n\\nAssistant: ...": the form of the HH data."""
    head, *parts = TRANSCRIPT.split(text if text.startswith("\n\n") else f"\n\n{text}")
    turns = [
        {"role": SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    if head.strip() or not turns:
        raise ConfigError(f"{place}: question: is missing, and {name} is no dialogue of Human: and Assistant:")
    for before, turn in pairwise(turns):
        if before["role"] == turn["role"]:
            raise ConfigError(f"{place}: {name}: two turns of the {turn['role']} follow one another")
    if empty := next((turn["role"] for turn in turns if not turn["content"]), None):
        raise ConfigError(f"{place}: {name}: a turn of the {empty} has no text")
    return turns
