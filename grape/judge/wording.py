"""What a judge is asked: the messages of a critique, a score, a repair, and a whole rubric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grape.errors import ConfigError
from grape.item import Item
from grape.judge.config import Judge
from grape.judge.prompt import Prompt, fence, load_prompt, neutral
from grape.types import Message, Question, Response

FIELDS = ("question", "response", "reference", "critique", "criterion", "scale", "confidence")
WHOLE_FIELDS = ("question", "response", "reference", "items", "confidence")
PAIR_FIELDS = ("question", "first", "second", "reference", "criterion", "scale", "confidence")
REPAIR_FIELDS = ("problem", "scale", "confidence")


class Wording:
    """The prompts of one judge, filled: outside texts between marks made with ``secret``, a reference only where the
    item wants it."""

    def __init__(self, judge: Judge, secret: bytes) -> None:
        self._secret = secret
        self._verbal = judge.verbal
        self._score = load_prompt(judge.prompt, FIELDS)
        self._whole = load_prompt("whole", WHOLE_FIELDS)
        self._pair = load_prompt("pair", PAIR_FIELDS)
        self._repair = load_prompt("repair", REPAIR_FIELDS)
        self._critique = load_prompt("critique", FIELDS)
        self._critics: dict[str, Prompt] = {}

    def check(self, item: Item) -> None:
        """`ConfigError` where the prompts cannot serve this item: one is missing, or leaves out what is judged."""
        needs = ["response", "criterion"] + ["reference"] * item.reference + ["critique"] * bool(item.critique)
        _needs(self._score, needs, item)
        if item.critique:
            prompt = self._critic(item.critique)
            _needs(prompt if "user" in prompt.blocks else self._critique, ["response"], item)

    def critique(self, question: Question, response: Response, item: Item) -> tuple[Message, ...]:
        """The critic's own system text, with the standard user text where its file has none."""
        assert item.critique is not None, "the item wants one"
        prompt, values = self._critic(item.critique), self._values(question, response, item)
        if "user" in prompt.blocks:
            return prompt.messages(**values)
        texts = {**self._critique.render(**values), **prompt.render(**values)}
        return tuple({"role": role, "content": texts[role]} for role in ("system", "user"))

    def score(
        self, question: Question, response: Response, item: Item, critique: str | None = None
    ) -> tuple[Message, ...]:
        """The question about one item."""
        values = self._values(question, response, item)
        if critique is not None:
            values["critique"] = self.mark("critique", critique)
        return self._score.messages(**values)

    def pair(self, question: Question, first: Response, second: Response, item: Item) -> tuple[Message, ...]:
        """The question which of two responses is the better one by an item."""
        _needs(self._pair, ["first", "second", "criterion"], item)
        values = self._values(question, first, item)
        shown = {"first": self.mark("response_A", first.text)}
        shown["second"] = self.mark("response_B", second.text)
        return self._pair.messages(**shown, **{name: values[name] for name in PAIR_FIELDS if name not in shown})

    def whole(self, question: Question, response: Response, items: Sequence[Item]) -> tuple[Message, ...]:
        """One question about several items, all of which see the reference or none."""
        values = self._values(question, response, items[0])
        asked = [
            {"id": item.id, "criterion": neutral(item.criterion), "scale": item.scale.describe()} for item in items
        ]
        return self._whole.messages(**{name: values[name] for name in WHOLE_FIELDS if name != "items"}, items=asked)

    def mark(self, name: str, text: str) -> str:
        """A text from outside between its marks."""
        return fence(name, text, self._secret)

    def repair(self, said: str, problem: str, scale: str) -> tuple[Message, ...]:
        """The judge's own reply, and what is wrong with it in words of ours alone."""
        values = {"problem": problem, "scale": scale, "confidence": self._verbal}
        reply: Message = {"role": "assistant", "content": neutral(said) or "(nothing)"}
        return (reply, *self._repair.messages(**values))

    def _values(self, question: Question, response: Response, item: Item) -> dict[str, Any]:
        if item.reference and question.reference is None:
            raise ConfigError(f"question {question.question_id!r} has no field 'reference'; item {item.id!r} needs it")
        return {
            "question": self.mark("question", question.prompt),
            "response": self.mark("response", response.text),
            "reference": self.mark("reference", question.reference or "") if item.reference else "",
            "critique": "",
            "criterion": neutral(item.criterion),
            "scale": item.scale.describe(),
            "confidence": self._verbal,
        }

    def _critic(self, name: str) -> Prompt:
        if name not in self._critics:
            self._critics[name] = load_prompt(f"critique/{name}", FIELDS)
        return self._critics[name]


def _needs(prompt: Prompt, names: list[str], item: Item) -> None:
    if missing := [name for name in names if name not in prompt.fields]:
        raise ConfigError(f"{prompt.source}: never shows {missing[0]!r}, which item {item.id!r} needs")
