"""One step of training as it stands between judging and learning: plain data, on disk before the weights change."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import orjson

from grape.batch import Settled, settle
from grape.collect import Answered
from grape.config import RunConfig
from grape.judge.config import Judge
from grape.metrics import step_metrics
from grape.optimize import Member, Update
from grape.records import Record, reward_row, step_row, verdict_rows

TUPLES = ("prompt_ids", "token_ids", "rollout_logprobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What there is to show after a step: its number, of how many, its metrics, and the seconds that it took."""

    step: int
    steps: int
    metrics: dict[str, float]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Groups that were sampled, judged and settled: what the optimizer gets, and what the log gets.

    ``position`` is that of the order of questions afterwards. ``rows`` are those of the log's `responses`, `verdicts`,
    `rewards` and `steps`, as far as they are known before the update.
    """

    number: int
    position: int
    members: list[Member]
    rows: Mapping[str, list[Record]]
    metrics: Mapping[str, float]

    def dump(self) -> bytes:
        """As JSON; numbers come back from `read` to the bit."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return orjson.dumps(data)

    @classmethod
    def read(cls, text: bytes) -> Step:
        """What `dump` wrote."""
        data = orjson.loads(text)
        data["members"] = [_member(member) for member in data["members"]]
        return cls(**data)

    def learned(self, update: Update, metrics: Mapping[str, float]) -> dict[str, list[Record]]:
        """The rows of the log, all of one record, after the update."""
        responses = [
            {**row, "logprob_trained": update.logprobs.get(row["response_id"])} for row in self.rows["responses"]
        ]
        (step,) = self.rows["steps"]
        step = {
            **step,
            "finished": datetime.now(UTC),
            "metrics": json.dumps({**json.loads(step["metrics"]), **metrics}),
        }
        return {**self.rows, "responses": responses, "steps": [step]}


def _member(data: dict[str, Any]) -> Member:
    lists = {name: None if data[name] is None else tuple(data[name]) for name in TUPLES}
    return Member(**{**data, **lists})


def settled_groups(answered: Sequence[Answered], config: RunConfig) -> list[Settled]:
    """Rewards and advantages. Responses trained in a context of their own have a baseline of their own."""
    soft = config.truncation.how == "soft"
    return settle(
        [one.judged for one in answered],
        baseline=config.advantage.baseline,
        scale=config.advantage.scale,
        groups=[_group(one, config) for one in answered],
        counts=[
            one.asked.route != "improve" or config.improve.baseline or config.improve.context == "behaviour"
            for one in answered
        ],
        extra={"length": [overlong(one, config) for one in answered]} if soft else None,
    )


def _group(one: Answered, config: RunConfig) -> str:
    name = one.asked.plan.question.question_id
    apart = one.asked.route == "improve" and config.improve.context == "behaviour"
    return f"{name} improving {one.asked.parent} ({one.asked.control})" if apart else name


def overlong(one: Answered, config: RunConfig) -> float:
    """DAPO's soft penalty: 0 up to the buffer, down to -1 at the limit, and -1 where the response was cut.

    (limit - buffer - length) / buffer         Yu et al. 2025, eq. 13
    """
    limit, buffer = config.sampling.max_tokens, config.truncation.buffer
    assert buffer is not None, "the configuration asks for one"
    if one.finish == "length":
        return -1.0
    return min(0.0, (limit - buffer - len(one.token_ids)) / buffer) if one.logprobs is not None else 0.0


def make_step(
    number: int,
    position: int,
    started: datetime,
    answered: Sequence[Answered],
    settled: Sequence[Settled],
    learning: Collection[str],
    config: RunConfig,
    judges: Mapping[str, Judge],
    run: str,
) -> Step:
    """The step of judged and settled groups; ``learning`` are the questions whose groups are trained on."""
    now = datetime.now(UTC)
    members = {
        one.asked.response_id: _to_member(one, result, config)
        for one, result in zip(answered, settled, strict=True)
        if one.asked.plan.question.question_id in learning
    }
    batch = [one.judged for one in answered]
    pairs = list(zip(batch, settled, strict=True))
    baseline, scale = config.advantage.baseline, config.advantage.scale
    rewards = [
        reward_row(run, number, judged, result, baseline, scale, now)
        | {"trained": judged.response.response_id in members and members[judged.response.response_id].trained}
        for judged, result in pairs
    ]
    return Step(
        number=number,
        position=position,
        members=list(members.values()),
        rows={
            "responses": [_response_row(run, number, one, now) for one in answered],
            "verdicts": [row for pair in pairs for row in verdict_rows(run, number, *pair, judges, now)],
            "rewards": rewards,
            "steps": [step_row(run, number, batch, settled, started)],
        },
        metrics=step_metrics(answered, settled),
    )


def _to_member(one: Answered, result: Settled, config: RunConfig) -> Member:
    route, scorable = one.asked.route, result.reward is not None
    masked = (route == "improve" and not config.improve.negative and result.advantage < 0) or (
        route == "sft" and config.sft is not None and config.sft.use == "baseline"
    )
    return Member(
        response_id=one.asked.response_id,
        group=_group(one, config),
        prompt_ids=one.asked.trained_ids,
        token_ids=one.token_ids,
        rollout_logprobs=one.logprobs,
        advantage=result.advantage,
        reward=(result.reward or 0.0) + result.penalty if scorable else 0.0,
        trained=scorable and not masked,
        off_policy=one.asked.trained_ids != one.asked.prompt_ids or one.logprobs is None,
    )


def _response_row(run: str, step: int, one: Answered, now: datetime) -> Record:
    response, question = one.judged.response, one.asked.plan.question
    return {
        "run": run,
        "step": step,
        "response_id": response.response_id,
        "question_id": question.question_id,
        "category": question.category,
        "response": response.text,
        "route": one.asked.route,
        "parent_id": one.asked.parent,
        "control": one.asked.control,
        "prompt_hash": one.asked.prompt_hash,
        "finish_reason": one.finish,
        "num_tokens": len(one.token_ids),
        "logprob_sampled": None if one.logprobs is None else sum(one.logprobs),
        "created": now,
    }
