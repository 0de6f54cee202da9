"""The groups of a step: sampled from the policy, each response judged the moment it ends, and settled together."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from grape.batch import Judged, not_judged
from grape.chat import harmless, prompt_ids
from grape.config import RunConfig
from grape.errors import ConfigError
from grape.judge.prompt import load_prompt
from grape.panel import Panel
from grape.plan import Plan
from grape.policy import Policy, causal_lm
from grape.resources import digest
from grape.rollout import Finish, Rollout, Sampling, sample
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


def seeded(*parts: object) -> int:
    """A seed that is a function of its parts alone, so that no state of a generator has to be kept."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


class Collector:
    """Asks the policy and the panel. The policy must be left to it while it asks."""

    def __init__(self, *, policy: Policy, config: RunConfig, panel: Panel, accelerator: Any) -> None:
        self._policy = policy
        self._config = config
        self.panel = panel
        self._accelerator = accelerator
        self._systems: dict[str, tuple[str | None, str | None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grape-policy")
        Sampling(**self._drawn())  # a setting that training cannot use is an error now

    def close(self) -> None:
        """Let go of the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def run(self, work: Any, *arguments: Any) -> Any:
        """Work with the policy, in the one thread that does."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def fresh(self, plan: Plan, response_id: str) -> Asked:
        """A response to the question alone, under the category's own system prompt."""
        system, hash_ = self.system(plan)
        ids = tuple(prompt_ids(self._policy.tokenizer, plan.question, system))
        return Asked(
            plan=plan, response_id=response_id, route="fresh", prompt_ids=ids, trained_ids=ids, prompt_hash=hash_
        )

    def given(self, plan: Plan, response_id: str, text: str) -> Asked:
        """A response that somebody wrote."""
        return replace(self.fresh(plan, response_id), route="sft", given=text, prompt_hash=None)

    def improved(self, asked: Asked, question: Question, system: str | None, parent: str, control: str) -> Asked | None:
        """A fresh one turned into one that improves ``parent``; None where its prompt leaves no room to answer."""
        ids = tuple(prompt_ids(self._policy.tokenizer, question, system))
        if not self.fits(ids):
            return None
        trained = asked.trained_ids if self._config.improve.context == "canonical" else ids
        hash_ = digest(system) if system else None
        return replace(
            asked, route="improve", prompt_ids=ids, trained_ids=trained, prompt_hash=hash_, parent=parent,
            control=control,
        )  # fmt: skip

    def system(self, plan: Plan) -> tuple[str | None, str | None]:
        """The system prompt of the question's category, and its hash."""
        name = plan.rubric.generate
        if name is None:
            return None, None
        if name not in self._systems:
            prompt = load_prompt(f"generate/{name}", ())
            self._systems[name] = (prompt.render()["system"], prompt.hash)
        return self._systems[name]

    def fits(self, ids: Sequence[int]) -> bool:
        """Whether a prompt leaves room for a response of the greatest length."""
        room = getattr(causal_lm(self._policy.model).config.get_text_config(), "max_position_embeddings", None)
        return not room or len(ids) + self._config.sampling.max_tokens <= room

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

        def on_response(rollout: Rollout, start: int) -> None:
            place = groups[rollout.group + start][rollout.member]
            ended[place] = rollout
            loop.call_soon_threadsafe(judge, place, rollout.text, rollout.finish)

        def draw() -> None:
            for number, (start, end) in enumerate(self._portions([len(places) for places in groups])):
                generator = torch.Generator(device=self._policy.model.device).manual_seed(seeded(*seed, number))
                with self._accelerator.autocast():
                    sample(
                        self._policy,
                        [ids for _, ids in list(prompts)[start:end]],
                        responses=[len(places) for places in groups[start:end]],
                        max_tokens=self._config.sampling.max_tokens,
                        generator=generator,
                        sampling=Sampling(temperature=0.0, training=False) if greedy else Sampling(**self._drawn()),
                        on_response=partial(on_response, start=start),
                    )

        try:
            for place, one in enumerate(asked):
                if one.given is not None:
                    judge(place, one.given, "stop")
            await self.run(draw)
            judged = [await tasks[place] for place in range(len(asked))]
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
        return [self._answered(one, ended.get(place), judged[place]) for place, one in enumerate(asked)]

    def _portions(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        """The prompts cut so that at most ``sampling.rows`` responses are decoded at a time, or one group."""
        limit = self._config.sampling.rows
        cuts, rows = [0], 0
        for place, count in enumerate(counts):
            if limit is not None and rows and rows + count > limit:
                cuts.append(place)
                rows = 0
            rows += count
        return [(start, end) for start, end in zip(cuts, [*cuts[1:], len(counts)], strict=True) if start < end]

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
        tokenizer = self._policy.tokenizer
        text = harmless(tokenizer, asked.given or "", f"question {asked.plan.question.question_id!r}")
        ids = (*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
        return Answered(asked=asked, token_ids=ids, logprobs=None, finish="stop", judged=judged)

    def _drawn(self) -> dict[str, Any]:
        config = self._config.sampling
        return {name: getattr(config, name) for name in ("temperature", "top_p", "top_k", "min_p")}


def sft_text(plan: Plan, field: str) -> str | None:
    """The answer that a question's row gives, if it gives one."""
    text = plan.question.get(field)
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"question {plan.question.question_id!r}: {field}: not a text, which sft.field needs")
    return text or None
