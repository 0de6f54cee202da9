"""The groups of a step: sampled from the policy, each response judged the moment it ends, and settled together."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from grape.batch import Judged, not_judged
from grape.chat import answer_ids, prompt_ids
from grape.config import RunConfig
from grape.errors import ConfigError
from grape.judge.prompt import load_prompt
from grape.panel import Panel
from grape.plan import Plan
from grape.records import Record
from grape.resources import digest
from grape.rollout import Finish, Rollout, positions
from grape.sampler import Sampler
from grape.types import Question, Response


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One response that is wanted: to which question, by which route, in which context.

    ``prompt_ids`` is what it is drawn from, ``trained_ids`` what it is trained on. ``given`` is the text of a response
    that is not drawn at all.
    """

    plan: Plan
    response_id: str
    route: str
    prompt_ids: tuple[int, ...]
    trained_ids: tuple[int, ...]
    prompt_hash: str | None = None
    parent: str | None = None
    control: str | None = None
    given: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A response with its tokens and its verdicts. ``logprobs`` is None where it was not drawn."""

    asked: Asked
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish: Finish
    judged: Judged


class Collector:
    """Asks the policy and the panel. The policy must be left to it while it asks."""

    def __init__(self, *, sampler: Sampler, config: RunConfig, panel: Panel) -> None:
        self.panel = panel
        self._sampler = sampler
        self._policy = sampler.policy
        self._config = config
        self._systems: dict[str, tuple[str | None, str | None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grape-policy")

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Any, *arguments: Any) -> Any:
        """Work with the policy, in the one thread that does."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def fresh(self, plan: Plan, response_id: str) -> Asked:
        """A response to the question alone, under the category's own system prompt."""
        system, hash_ = self.system(plan)
        ids = self.prompt(plan.question, system)
        return Asked(
            plan=plan, response_id=response_id, route="fresh", prompt_ids=ids, trained_ids=ids, prompt_hash=hash_
        )

    def given(self, plan: Plan, response_id: str, text: str) -> Asked:
        """A response that somebody wrote."""
        return replace(self.fresh(plan, response_id), route="sft", given=text, prompt_hash=None)

    def improved(self, asked: Asked, question: Question, system: str | None, parent: str, control: str) -> Asked | None:
        """A fresh one turned into one that improves ``parent``; None where its prompt leaves no room to answer."""
        ids = self.prompt(question, system)
        if not self.fits(ids):
            return None
        trained = asked.trained_ids if self._config.improve.context == "canonical" else ids
        hash_ = digest(system) if system else None
        return replace(
            asked, route="improve", prompt_ids=ids, trained_ids=trained, prompt_hash=hash_, parent=parent,
            control=control,
        )  # fmt: skip

    def prompt(self, question: Question, system: str | None = None) -> tuple[int, ...]:
        """What a response to a question is drawn from."""
        return tuple(prompt_ids(self._policy.tokenizer, question, system))

    async def drawn(self, prompts: Sequence[tuple[int, ...]], *seed: object) -> list[Rollout]:
        """One response to each prompt, judged by nobody; ``seed`` decides the draws."""
        ended: dict[int, Rollout] = {}

        def on_response(rollout: Rollout) -> None:
            ended[rollout.group] = rollout

        await self.run(self._sampler.draw, prompts, [1] * len(prompts), seed, False, on_response)
        return [ended[place] for place in range(len(prompts))]

    def system(self, plan: Plan) -> tuple[str | None, str | None]:
        """The system prompt of the question's category, and its hash."""
        name = plan.rubric.generate
        if name is None:
            return None, None
        if name not in self._systems:
            prompt = load_prompt(f"generate/{name}", ())
            self._systems[name] = (prompt.render()["system"], prompt.hash)
        return self._systems[name]

    def answer_ids(self, question: Question, text: str) -> tuple[int, ...]:
        """A given answer as the tokens of a response that has ended."""
        return answer_ids(self._policy.tokenizer, text, f"question {question.question_id!r}")

    def fits(self, ids: Sequence[int], more: int | None = None) -> bool:
        """Whether a prompt leaves room for so many tokens ``more``, by default a response of the greatest length."""
        more = self._config.sampling.max_tokens if more is None else more
        room = positions(self._policy)
        return not room or len(ids) + more <= room

    async def answers(
        self, asked: Sequence[Asked], *seed: object, greedy: bool = False, panel: Panel | None = None
    ) -> list[Answered]:
        """Every response that is asked for, in that order; ``seed`` decides the draws. ``panel`` judges instead."""
        loop = asyncio.get_running_loop()
        tasks: dict[int, asyncio.Task[Judged]] = {}
        ended: dict[int, Rollout] = {}
        prompts: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
        for place, one in enumerate(asked):
            if one.given is None:
                prompts[one.plan.question.question_id, one.prompt_ids].append(place)
        groups = list(prompts.values())

        def judge(place: int, text: str, finish: Finish) -> None:
            tasks[place] = loop.create_task(self._judge(panel or self.panel, asked[place], text, finish))

        def on_response(rollout: Rollout) -> None:
            place = groups[rollout.group][rollout.member]
            ended[place] = rollout
            loop.call_soon_threadsafe(judge, place, rollout.text, rollout.finish)

        try:
            for place, one in enumerate(asked):
                if one.given is not None:
                    judge(place, one.given, "stop")
            ids, counts = [ids for _, ids in prompts], [len(places) for places in groups]
            await self.run(self._sampler.draw, ids, counts, seed, greedy, on_response)
            judged = [await tasks[place] for place in range(len(asked))]
            (panel or self.panel).see_budgets()
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return [self._answered(one, ended.get(place), judged[place]) for place, one in enumerate(asked)]

    async def _judge(self, panel: Panel, asked: Asked, text: str, finish: Finish) -> Judged:
        question = asked.plan.question
        response = Response(
            response_id=asked.response_id, question_id=question.question_id, text=text, metadata=question.metadata
        )
        truncation = self._config.truncation
        if finish == "stop" or truncation.how == "keep":
            return await panel.judge(asked.plan, response)
        reward = {"penalty": truncation.penalty, "soft": 0.0}.get(truncation.how)
        why = f"cut at {self._config.sampling.max_tokens} tokens"
        return not_judged(asked.plan, response, why, reward)

    def _answered(self, asked: Asked, rollout: Rollout | None, judged: Judged) -> Answered:
        if rollout is not None:
            return Answered(
                asked=asked,
                token_ids=rollout.token_ids,
                logprobs=rollout.logprobs,
                finish=rollout.finish,
                judged=judged,
            )
        ids = self.answer_ids(asked.plan.question, asked.given or "")
        return Answered(asked=asked, token_ids=ids, logprobs=None, finish="stop", judged=judged)


def drawn_row(run: str, step: int, asked: Question, response_id: str, drawn: Rollout, **more: Any) -> Record:
    """A row of the log's `responses` for one that was drawn, whether or not anybody judges it."""
    return {
        "run": run,
        "step": step,
        "response_id": response_id,
        "question_id": asked.question_id,
        "category": asked.category,
        "response": drawn.text,
        "finish_reason": drawn.finish,
        "num_tokens": len(drawn.token_ids),
        "logprob_sampled": sum(drawn.logprobs),
        "created": datetime.now(UTC),
        **more,
    }


def sft_text(plan: Plan, field: str) -> str | None:
    """The answer that a question's row gives, if it gives one."""
    text = plan.question.get(field)
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"question {plan.question.question_id!r}: {field}: not a text, which sft.field needs")
    return text or None
