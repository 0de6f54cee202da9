"""AI feedback on a constitution: pairs of responses compared by its principles, and the reward model of them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from grape.collect import Collector, drawn_row
from grape.crew import all_done
from grape.errors import GrapeError
from grape.item import Item
from grape.judge.critic import Critic
from grape.judge.jury import Jury
from grape.judge.pair import Comparison, clamped, compare
from grape.judge.reward_model import RewardModel
from grape.log import Log
from grape.material import Material
from grape.panel import Panel
from grape.phases import ConstitutionRun, FeedbackConfig
from grape.plan import Plan
from grape.principles import drawn, principles
from grape.records import Record, step_row
from grape.types import Question, Response

logger = logging.getLogger("grape")


@dataclass(frozen=True, slots=True, kw_only=True)
class Two:
    """Two responses to a question, and the principle that they are compared by."""

    plan: Plan
    item: Item
    first: Response
    second: Response


class Feedback:
    """Pairs of a policy's responses, compared as the run's file says; in the log as the run `NAME.feedback`.

    A batch of questions is one step there, and is in the log when all of it is compared.
    """

    def __init__(
        self, config: ConstitutionRun, run: str, store: Log, collector: Collector, material: Material,
        critics: Mapping[str, Critic | Jury],
    ) -> None:  # fmt: skip
        assert config.feedback is not None, "the configuration asks for it"
        self.run = f"{run}.feedback"
        self._config = config
        self._feedback: FeedbackConfig = config.feedback
        self._store = store
        self._collector = collector
        self._plans = [plan for plan in material.plans.values() if principles(plan)]
        self._critics = critics

    @property
    def batches(self) -> list[list[Plan]]:
        """The questions that have principles, as many at a time as `sampling.questions` says."""
        few = self._config.sampling.questions
        return [self._plans[start : start + few] for start in range(0, len(self._plans), few)]

    async def compared(self, number: int) -> None:
        """See that a batch (from 1) is compared and in the log."""
        if self._store.query("select 1 from steps where run = ? and step = ?", [self.run, number]):
            return
        started, plans = datetime.now(UTC), self.batches[number - 1]
        rows, twos = await self._drawn(number, plans)
        panel: Panel = self._collector.panel
        done = await all_done(
            twos,
            lambda two: compare(self._judge(two), two.plan.question, two.first, two.second, two.item),
            max(critic.width for critic in self._critics.values()),
            stop=panel.refused,
        )
        panel.see_budgets()
        found = [(two, one) for two, one in zip(twos, done, strict=True) if one is not None]
        preferences = [row for two, one in found if (row := self._preference(number, two, one)) is not None]
        failures = Counter(str(o) for _, one in found if one.probability is None for o in _outcomes(one))
        agreed = [one.consistent for _, one in found if one.consistent is not None]
        count = len(plans) * self._feedback.pairs
        metrics: dict[str, float] = {"pairs": count, "left_out": count - len(twos)}
        metrics |= {"failed": sum(one.probability is None for _, one in found), "preferences": len(preferences)}
        metrics |= {"consistent": fmean(agreed)} if agreed else {}
        step = step_row(self.run, number, (), (), started)
        step |= {"num_questions": len(plans), "num_responses": len(rows), "metrics": json.dumps(metrics)}
        self._store.append(responses=rows, preferences=preferences, steps=[step])
        if failures:
            told = ", ".join(f"{count} {outcome}" for outcome, count in failures.most_common())
            logger.warning("feedback: %d of %d comparisons give no label: %s", metrics["failed"], len(twos), told)

    async def _drawn(self, number: int, plans: Sequence[Plan]) -> tuple[list[Record], list[Two]]:
        """The responses of a batch, and those of two different texts that are to be compared."""
        wanted = [
            (plan, self._collector.fresh(plan, f"{plan.question.question_id}-{number}-{member}"))
            for plan in plans
            for member in range(2 * self._feedback.pairs)
        ]
        seed = (self._config.seed, "feedback", number)
        rollouts = await self._collector.drawn([asked.prompt_ids for _, asked in wanted], *seed)
        responses = [
            Response(response_id=asked.response_id, question_id=plan.question.question_id, text=rollout.text,
                     metadata=plan.question.metadata)
            for (plan, asked), rollout in zip(wanted, rollouts, strict=True)
        ]  # fmt: skip
        rows = [
            drawn_row(
                self.run,
                number,
                plan.question,
                asked.response_id,
                rollout,
                route="fresh",
                prompt_hash=asked.prompt_hash,
            )
            for (plan, asked), rollout in zip(wanted, rollouts, strict=True)
        ]
        kept = self._config.truncation.how == "keep"
        twos = [
            Two(plan=wanted[place][0], item=self._principle(wanted[place][0], responses[place]),
                first=responses[place], second=responses[place + 1])
            for place in range(0, len(wanted), 2)
            if responses[place].text != responses[place + 1].text
            and (kept or rollouts[place].finish == rollouts[place + 1].finish == "stop")
        ]  # fmt: skip
        return rows, twos

    def _principle(self, plan: Plan, response: Response) -> Item:
        return drawn(plan, self._config.seed, "feedback", response.response_id)

    def _judge(self, two: Two) -> Critic | Jury:
        name = self._feedback.judge or two.item.judge
        assert name is not None, "looked at before any work"
        return self._critics[name]

    def _preference(self, number: int, two: Two, compared: Comparison) -> Record | None:
        """The row of the log's `preferences`: none where the judge failed, or prefers neither."""
        likely = compared.probability
        if likely is None or likely == 0.5:
            return None
        chosen, rejected = (two.first, two.second) if likely > 0.5 else (two.second, two.first)
        both = (compared.forward, compared.backward)
        return {
            "run": self.run, "step": number, "question_id": two.plan.question.question_id,
            "category": two.plan.question.category, "chosen_id": chosen.response_id,
            "rejected_id": rejected.response_id, "source": "judge", "item": two.item.id,
            "judge": compared.forward.judge, "probability": max(likely, 1 - likely),
            "consistent": compared.consistent, "created": datetime.now(UTC),
            "calls": json.dumps(list(dict.fromkeys(call for verdict in both for call in verdict.calls))),
        }  # fmt: skip

    def rows(self) -> list[Record]:
        """All preferences as rows of `grape reward-model`, with labels no surer than `feedback.clamp`."""
        texts = dict(self._store.query("select response_id, response from responses where run = ?", [self.run]))
        questions = {plan.question.question_id: plan.question for plan in self._plans}
        found = self._store.query(
            "select question_id, chosen_id, rejected_id, item, probability from preferences where run = ? "
            "order by step, rowid",
            [self.run],
        )
        sure = self._feedback.clamp
        return [
            {
                "question_id": question_id, "question": _asked(questions[question_id]), "chosen": texts[chosen],
                "rejected": texts[rejected], "probability": clamped(probability, 1 - sure, sure), "item": item,
            }
            for question_id, chosen, rejected, item, probability in found
            if question_id in questions and texts[chosen].strip()
        ]  # fmt: skip


def _asked(question: Question) -> Any:
    return question.text if isinstance(question.text, str) else list(question.text)


def _outcomes(compared: Comparison) -> list[Any]:
    return [verdict.outcome for verdict in (compared.forward, compared.backward) if verdict.score is None]


async def spread_of(model: str | Path, rows: Sequence[Record]) -> tuple[float, float]:
    """The mean and the standard deviation of a reward model's values of the responses that it learned from."""
    item = Item.model_validate({"id": "value", "reward_model": str(model), "raw": True})
    reader, values = RewardModel(str(model)), []
    try:
        await reader.reach()
        for row in rows:
            text = row["question"] if isinstance(row["question"], str) else tuple(row["question"])
            question = Question(question_id=row["question_id"], category="", text=text)
            for side in ("chosen", "rejected"):
                response = Response(response_id=side, question_id=row["question_id"], text=row[side])
                verdict = await reader.verdict(question, response, item)
                values += [] if verdict.score is None else [verdict.score]
    finally:
        await reader.close()
    if len(values) < 2 or not (std := pstdev(values)) > 0:
        raise GrapeError(f"{model}: its values of {len(values)} responses do not differ: it has learned no preference")
    return fmean(values), std
