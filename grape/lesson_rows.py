"""What a row may say that a policy or a reward model is taught from: one strict model per kind."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from grape.errors import one_line
from grape.sections import Number
from grape.types import Strict, Turn

Kind = Literal["chats", "pairs", "rankings", "labels", "steps"]
Text = Annotated[str, Field(min_length=1)]
Asked = Text | Annotated[list[Turn], Field(min_length=1)]
Likely = Annotated[float, Field(ge=0.5, le=1)]  # below one half the other response would be the chosen one


def _id(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class LessonRow(Strict):
    """What all rows may say: the question, and its name where the same one stands in several rows."""

    question_id: Annotated[Text | None, BeforeValidator(_id)] = None
    question: Asked | None = None


class ChatRow(LessonRow):
    """A question with its response, or the ``messages`` of a chat."""

    response: Text | None = None
    messages: Annotated[list[Turn], Field(min_length=2)] | None = None


class PairRow(LessonRow):
    """Two responses to a question, or two whole dialogues that differ in their last turn (messages, or transcripts of
    "Human:" and "Assistant:"). ``margin``: how much better; ``probability``: that the chosen one is better."""

    chosen: Asked
    rejected: str | Annotated[list[Turn], Field(min_length=1)]  # nothing said is worse than something
    margin: Number | None = None
    probability: Likely | None = None


class RankingRow(LessonRow):
    """The responses to a question, best first."""

    responses: Annotated[list[Text], Field(min_length=2)]


class LabelRow(LessonRow):
    """A response, and whether it is right, or wanted."""

    response: Text
    label: bool


def _class(label: Any) -> Any:
    if isinstance(label, bool):
        return 1 if label else -1
    if label in (-1, 0, 1):
        return int(label)
    told = one_line(repr(label), 60)
    raise ValueError(f"a step is true or false, or 1 (right), 0 (neutral) or -1 (wrong), not {told}")


class StepsRow(LessonRow):
    """A response in steps, and of each whether it is right: true or false, or 1, 0 (neutral) and -1."""

    steps: Annotated[list[Text], Field(min_length=1)]
    labels: Annotated[list[Annotated[int, BeforeValidator(_class)]], Field(min_length=1)]


ROWS: dict[Kind, tuple[type[LessonRow], ...]] = {
    "chats": (ChatRow,), "pairs": (PairRow,), "rankings": (RankingRow, PairRow), "labels": (LabelRow, PairRow),
    "steps": (StepsRow,),
}  # fmt: skip
