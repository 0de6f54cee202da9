"""The responses that a step asks for: fresh ones, improvements of earlier ones, and answers that a row gives."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from grape.collect import Answered, Asked, Collector, sft_text
from grape.config import RunConfig
from grape.improve import (
    Control,
    Previous,
    improve_messages,
    improve_prompt,
    pick,
    pick_other,
    previous_groups,
    previous_of,
    routes,
)
from grape.log import Log
from grape.plan import Plan
from grape.sampler import seeded
from grape.step import settled_groups
from grape.types import Question

logger = logging.getLogger("grape")
Earlier = Mapping[str, Sequence[Previous]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The group of one question: its fresh and given responses, and how those that improve another are made."""

    plan: Plan
    first: list[Asked]
    improving: list[tuple[Asked, Control]]
    rng: Random


class Groups:
    """Composes the groups of a step and has them answered."""

    def __init__(self, config: RunConfig, plans: Mapping[str, Plan], collector: Collector, log: Log, run: str) -> None:
        self._config = config
        self._plans = plans
        self._collector = collector
        self._log = log
        self._run = run
        self._improves = bool(config.improve.share or config.improve.probability)
        self._told = False  # that an improvement prompt was too long
        self._hidden = (config.sft.field,) if config.sft else ()
        if self._improves:
            for plan in plans.values():
                improve_prompt(plan.rubric)  # a prompt that is missing, or asks for what is hidden, is an error now

    def see_turns(self, questions: int) -> None:
        """Say so where no question gets a second turn, so that no earlier response is there to improve."""
        turns, step = self._config.steps * self._config.sampling.questions, self._config.sampling.questions
        if self._improves and self._config.improve.source == "log" and turns <= questions:
            logger.warning(
                "improve: no question comes twice in %d steps of %d of %d questions, so nothing will be improved "
                "(improve.source: step improves within a step)",
                self._config.steps, step, questions,
            )  # fmt: skip

    async def answers(self, ids: Sequence[str], step: int, round_: int) -> list[Answered]:
        """One group for each question, in their order, by member."""
        seed = (self._config.seed, "step", step, round_)
        within = self._config.improve.source == "step"
        earlier: Earlier = {}
        if self._improves and not within:
            plans = {name: self._plans[name] for name in ids}
            earlier = previous_groups(self._log, self._run, plans, before=step, also=self._hidden)
        wanted = [self._wanted(name, step, name in earlier) for name in ids]
        first = [asked for group in wanted for asked in group.first]
        if not within:
            first += self._improved(wanted, earlier)
        answered = await self._collector.answers(first, *seed)
        if within and any(group.improving for group in wanted):
            improved = self._improved(wanted, self._fresh(answered, step))
            answered += await self._collector.answers(improved, *seed, "improve")
        places = {asked.response_id: place for place, asked in enumerate(self._in_order(wanted))}
        return sorted(answered, key=lambda one: places[one.asked.response_id])

    def _wanted(self, name: str, step: int, asked_before: bool) -> Wanted:
        plan = self._plans[name]
        rng = Random(seeded(self._config.seed, "routes", step, name))
        text = sft_text(plan, self._config.sft.field) if self._config.sft else None
        number = self._config.sampling.responses - (text is not None)
        ways: list[Control | None] = [None] * number
        if self._improves:
            ways = routes(self._config.improve, number, rng, asked_before=asked_before)
        fresh = self._collector.fresh(plan, name)  # the prompt's tokens are those of all
        asked = [replace(fresh, response_id=f"{name}-{step}-{member}") for member in range(number)]
        first = [one for one, way in zip(asked, ways, strict=True) if way is None]
        if text is not None:
            first.append(self._collector.given(plan, f"{name}-{step}-{number}", text))
        improving = [(one, way) for one, way in zip(asked, ways, strict=True) if way is not None]
        return Wanted(plan=plan, first=first, improving=improving, rng=rng)

    def _improved(self, wanted: Sequence[Wanted], earlier: Earlier) -> list[Asked]:
        """What improves one of ``earlier``; a fresh response instead where its prompt is too long to be answered."""
        pool = [one for group in earlier.values() for one in group]
        made = []
        for group in wanted:
            chosen: Previous | None = None
            other: Previous | None = None  # in the context behaviour, too, one for all: they share a baseline
            for asked, control in group.improving:
                if chosen is None or self._config.improve.context == "canonical":
                    chosen = pick(earlier[asked.plan.question.question_id], self._config.improve.pick, group.rng)
                    other = None
                if control == "shuffled" and other is None:
                    other = pick_other(chosen, pool, group.rng)
                improving = self._improving(asked, chosen, control, other)
                if improving is None and not self._told:
                    self._told = True
                    logger.warning(
                        "an improvement prompt leaves no room for %d tokens in the policy's context: such responses "
                        "are fresh ones instead (improve.max_chars shortens the assessment)",
                        self._config.sampling.max_tokens,
                    )
                made.append(improving or asked)
        return made

    def _improving(self, asked: Asked, chosen: Previous, control: Control, other: Previous | None) -> Asked | None:
        other = other if control == "shuffled" else None
        control = "own" if control == "shuffled" and other is None else control
        question = asked.plan.question
        messages = improve_messages(
            question, chosen, improve_prompt(asked.plan.rubric), control=control, other=other,
            max_chars=self._config.improve.max_chars,
        )  # fmt: skip
        texts = {message["role"]: message["content"] for message in messages}
        posed = Question(
            question_id=question.question_id, category=question.category, text=texts.get("user") or question.prompt
        )
        return self._collector.improved(asked, posed, texts.get("system"), chosen.response_id, control)

    def _fresh(self, answered: Sequence[Answered], step: int) -> Earlier:
        """The fresh responses of this step, by question."""
        groups: dict[str, list[Previous]] = {}
        for one, result in zip(answered, settled_groups(answered, self._config), strict=True):
            if one.asked.route == "fresh":
                previous = previous_of(one.judged, result, step, also=self._hidden)
                groups.setdefault(previous.question_id, []).append(previous)
        return groups

    @staticmethod
    def _in_order(wanted: Sequence[Wanted]) -> list[Asked]:
        groups = [[*group.first, *(asked for asked, _ in group.improving)] for group in wanted]
        return [
            asked
            for group in groups
            for asked in sorted(group, key=lambda one: int(one.response_id.rpartition("-")[2]))
        ]
