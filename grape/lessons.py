"""What a policy or a reward model is taught from: rows of chats, pairs, rankings, labels and steps, read strictly."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from grape.errors import ConfigError, invalid, known, one_line
from grape.lesson_rows import ROWS, ChatRow, Kind, LabelRow, LessonRow, PairRow, RankingRow, StepsRow
from grape.questions import read_source, renamed, tell
from grape.recipes import ChatDataConfig, DataConfig
from grape.resources import digest
from grape.rows import given
from grape.transcript import OPEN, TRANSCRIPT, transcript
from grape.types import Message, Turn

ASKS = ("user", "tool")  # whose turns there is a response to
STEP_END = "\n"


class Lacks(ConfigError):
    """A row lacks a field that it needs: the line goes on with what it has."""


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

    ``group`` is the question's name: what is held out is whole questions. One response may be in ``steps``, each ended,
    with a label for each: 1 is right, 0 neutral, -1 wrong.
    """

    place: str
    group: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    pairs: tuple[Preferred, ...] = ()
    label: bool | None = None
    steps: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """The lessons of a source, and a line on each row that was left out."""

    source: str
    lessons: tuple[Lesson, ...]
    skipped: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Of all that they say."""
        return digest(json.dumps([_said(one) for one in self.lessons]))


def _said(one: Lesson) -> list[Any]:
    return [one.group, one.prompt, one.responses, *map(str, one.pairs), one.label, *one.steps, *one.labels]


def read_lessons(config: DataConfig, kind: Kind, source: Any = None) -> Lessons:
    """The lessons of ``config.path``, or of a ``source`` from Python. Columns that no field is taken from are ignored.

    A row that cannot be used is a `ConfigError`, or is left out, named and counted (``bad_rows: skip``).
    """
    fields = {name for model in ROWS[kind] for name in model.model_fields}
    if strange := next((name for name in config.map if name not in fields), None):
        raise ConfigError(f"{config.path}: map: {strange!r} is no field of {kind}; {known(fields, strange)}")
    found: list[Lesson] = []
    skipped: list[str] = []
    used = 0
    for number, (place, data) in enumerate(read_source(config, source)):
        if number == config.limit:
            break
        try:
            found += _lessons(place, data, kind, config)
            used += 1
        except ConfigError as error:
            if config.bad_rows == "fail":
                raise
            skipped.append(str(error))
    if not (found or skipped):
        raise ConfigError(f"{config.path}: no rows")
    tell(config.path, used, skipped)
    return Lessons(source=config.path, lessons=tuple(found), skipped=tuple(skipped))


def _lessons(place: str, data: Any, kind: Kind, config: DataConfig) -> list[Lesson]:
    """What one row teaches: all of it, or nothing."""
    if isinstance(data, ConfigError):
        raise data
    if not isinstance(data, Mapping):
        raise ConfigError(f"{place}: a row is a mapping of columns, not {type(data).__name__}")
    named = renamed(place, given(data), config.map)
    try:
        return list(_taught(place, named, kind, config))
    except Lacks as error:
        has = one_line(", ".join(map(str, named)) or "nothing")
        raise ConfigError(f"{error}; the row has: {has}") from error


def _taught(place: str, named: Mapping[str, Any], kind: Kind, config: DataConfig) -> Iterator[Lesson]:
    if kind == "chats":
        yield from _of_chat(place, _read(place, named, ChatRow), isinstance(config, ChatDataConfig) and config.turns)
    elif kind == "rankings" and "chosen" not in named:
        ranked = _read(place, named, RankingRow)
        if len(set(ranked.responses)) < len(ranked.responses):
            raise ConfigError(f"{place}: responses: one stands twice")
        texts = {f"responses.{rank}": text for rank, text in enumerate(ranked.responses)}
        yield _lesson(place, ranked, _asked(place, ranked), texts)
    elif kind == "labels" and "chosen" not in named:
        row = _read(place, named, LabelRow)
        yield replace(_lesson(place, row, _asked(place, row), {"response": row.response}), label=row.label)
    elif kind == "steps":
        yield _in_steps(place, _read(place, named, StepsRow))
    else:
        pair = _of_pair(place, _read(place, named, PairRow))
        if kind != "labels":
            yield pair
        else:
            for better, text in zip((True, False), pair.responses, strict=True):
                yield replace(pair, responses=(text,), pairs=(), label=better)


def _read(place: str, named: Mapping[str, Any], model: type[Any]) -> Any:
    row = {key: _turns(value) for key, value in named.items() if key in model.model_fields}
    try:
        return model.model_validate(row)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        line = invalid(place, error, sorted(Turn.model_fields))
        if fault["type"] == "missing" and len(fault["loc"]) == 1:
            raise Lacks(str(line)) from error
        raise line from error


def _turns(value: Any) -> Any:
    """Turns without the keys that only fill a column: those that are None."""
    if not isinstance(value, list | tuple):
        return value
    return [given(turn) if isinstance(turn, Mapping) else turn for turn in value]


def _asked(place: str, row: LessonRow) -> tuple[Message, ...]:
    """The turns up to where the response begins."""
    if row.question is None:
        raise Lacks(f"{place}: question: is missing")
    if isinstance(row.question, str) and not TRANSCRIPT.match(row.question):
        return ({"role": "user", "content": row.question},)
    turns = tuple(
        _spoken(place, "question", OPEN.sub("", row.question))
        if isinstance(row.question, str)
        else (turn.model_dump() for turn in row.question)
    )
    if turns[-1]["role"] == "assistant":
        raise ConfigError(f"{place}: question: ends with a turn of the assistant, where the response begins")
    return turns


def _lesson(
    place: str, row: LessonRow, prompt: tuple[Message, ...], texts: Mapping[str, str], silent: str = ""
) -> Lesson:
    """A lesson of these responses, by the names of their fields; that of the field ``silent`` may be empty."""
    if empty := next((name for name, text in texts.items() if not text.strip() and name != silent), None):
        raise ConfigError(f"{place}: {empty}: the response has no text")
    if not any(turn["role"] in ASKS and turn["content"].strip() for turn in prompt):
        raise ConfigError(f"{place}: nothing is asked before the response")
    if prompt[-1]["role"] == "assistant":
        raise ConfigError(f"{place}: {next(iter(texts))}: two turns of the assistant follow one another")
    group = json.dumps(prompt) if row.question_id is None else row.question_id
    return Lesson(place=place, group=group, prompt=prompt, responses=tuple(texts.values()))


def _of_chat(place: str, row: ChatRow, turns: Any) -> Iterator[Lesson]:
    if (row.messages is None) == (row.response is None) or (row.messages and row.question):
        raise Lacks(f"{place}: needs either question and response, or messages")
    if row.messages is None:
        yield _lesson(place, row, _asked(place, row), {"response": row.response or ""})
        return
    messages = [turn.model_dump() for turn in row.messages]
    if messages[-1]["role"] != "assistant":
        raise ConfigError(
            f"{place}: messages: end with a turn of the {messages[-1]['role']}: there is nothing to learn"
        )
    asked = next((at for at, turn in enumerate(messages) if turn["role"] in ASKS), len(messages))
    ends = [at for at, turn in enumerate(messages) if turn["role"] == "assistant" and at > asked]
    if not ends:
        raise ConfigError(f"{place}: messages: no turn of the assistant follows one of the user")
    for end in ends if turns == "all" else ends[-1:]:
        lesson = _lesson(place, row, tuple(messages[:end]), {f"messages.{end}": messages[end]["content"]})
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
    texts = {"chosen": chosen, "rejected": rejected}
    silent = "rejected" if row.question is not None and isinstance(row.rejected, str) else ""
    return replace(_lesson(place, row, asked, texts, silent), pairs=(pair,))


def _in_steps(place: str, row: StepsRow) -> Lesson:
    if len(row.steps) != len(row.labels):
        raise ConfigError(f"{place}: labels: there are {len(row.labels)} for {len(row.steps)} steps")
    lesson = _lesson(place, row, _asked(place, row), {f"steps.{at}": text for at, text in enumerate(row.steps)})
    steps = tuple(f"{text}{STEP_END}" for text in row.steps)
    return replace(lesson, responses=("".join(steps),), steps=steps, labels=tuple(row.labels))


def _dialogue(place: str, name: str, said: str | Sequence[Turn], row: LessonRow) -> tuple[tuple[Message, ...], str]:
    """What was asked, and the response, of one side of a pair."""
    if row.question is not None and isinstance(said, str) and not TRANSCRIPT.match(said):
        return _asked(place, row), said
    turns = _spoken(place, name, said) if isinstance(said, str) else [turn.model_dump() for turn in said]
    asked = [] if row.question is None else list(_asked(place, row))
    if not any(turns[at : at + len(asked)] == asked for at in range(len(turns) - len(asked))):
        if turns[0]["role"] != "assistant" and asked[-1]["role"] != "system":
            raise ConfigError(f"{place}: {name}: its turns ask something else than question")
        turns = asked + turns
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ConfigError(f"{place}: {name}: does not end with a response of the assistant to something asked")
    return tuple(turns[:-1]), turns[-1]["content"]


def _spoken(place: str, name: str, text: str) -> list[Message]:
    """The turns of a transcript, which the text has to be where the row has no question."""
    if turns := transcript(place, name, text):
        return turns
    raise Lacks(f"{place}: question: is missing, and {name} is no dialogue of Human: and Assistant:")
