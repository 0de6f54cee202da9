"""What leaves a settled batch: rows for the critique log, and one record per response for the user."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from grape.batch import Judged, Settled
from grape.item import Item
from grape.judge.config import Judge
from grape.reward import Baseline, Scale
from grape.rows import Rows
from grape.types import Outcome, Verdict

Record = dict[str, Any]
FAILED = frozenset(Outcome) - {Outcome.OK, Outcome.SKIPPED}


def score_record(judged: Judged, settled: Settled) -> Record:
    """One line of ``grape score --out``."""
    return {
        "response_id": judged.response.response_id,
        "question_id": judged.response.question_id,
        "category": judged.plan.question.category,
        "reward": settled.reward,
        "advantage": settled.advantage,
        "items": {leaf.id: _verdict_record(judged.verdicts[leaf.id]) for leaf in judged.plan.leaves},
    }


def _verdict_record(verdict: Verdict) -> Record:
    return item_record(verdict.score, verdict.confidence, verdict.outcome, verdict.reasoning, verdict.detail)


def item_record(
    score: float | None, confidence: float | None, outcome: str, reasoning: str | None, detail: str | None
) -> Record:
    """What a record says of one item; ``detail`` only where there is one."""
    record: Record = {"score": score, "confidence": confidence, "outcome": str(outcome), "reasoning": reasoning}
    return {**record, "detail": detail} if detail else record


def question_rows(run: str, rows: Rows) -> list[Record]:
    """Rows of the table `questions`."""
    return [
        {
            "run": run,
            "question_id": question.question_id,
            "category": question.category,
            "question": question.text if isinstance(question.text, str) else json.dumps(question.text),
            "reference": question.reference,
            "tests": question.tests,
            "entry_point": question.entry_point,
            "metadata": json.dumps(question.metadata, default=str),
            "items": json.dumps([dump(item) for item in rows.items[question.question_id]], default=str),
        }
        for question in rows.questions.values()
    ]


def dump(item: Item) -> Record:
    """An item as it stands in a row."""
    return item.model_dump(by_alias=True, exclude_unset=True) | item.extensions


def response_rows(run: str, step: int, rows: Rows, route: str = "given") -> list[Record]:
    """Rows of the table `responses`."""
    return [
        {
            "run": run,
            "step": step,
            "response_id": response.response_id,
            "question_id": response.question_id,
            "category": rows.questions[response.question_id].category,
            "response": response.text,
            "metadata": json.dumps(response.metadata, default=str),
            "route": route,
        }
        for response in rows.responses
    ]


def verdict_rows(
    run: str, step: int, judged: Judged, settled: Settled, judges: Mapping[str, Judge], now: datetime
) -> Iterable[Record]:
    """Rows of the table `verdicts`: everything the reward was made from, stored and not to be derived again."""
    rubric = judged.plan.rubric
    by_own_name = {judge.judge: judge for judge in judges.values()}
    for item in judged.plan.leaves:
        verdict = judged.verdicts[item.id]
        judge = by_own_name.get(verdict.judge) if verdict.judge else judges.get(item.judge or "")
        yield {
            "run": run,
            "step": step,
            "question_id": judged.response.question_id,
            "response_id": judged.response.response_id,
            "category": judged.plan.question.category,
            "rubric": rubric.rubric,
            "rubric_version": str(rubric.version),
            "rubric_hash": rubric.hash,
            "item": item.id,
            "kind": item.kind,
            "criterion": item.criterion,
            "weight": judged.plan.weight[item.id],
            "polarity": item.polarity,
            "gate": item.gate.at_least if item.gate else None,
            "gate_reward": item.gate.reward if item.gate else None,
            "on_failure": item.on_failure,
            "applicable": judged.plan.weight[item.id] > 0,
            "outcome": str(verdict.outcome),
            "score": verdict.score,
            "raw": verdict.raw,
            "confidence": verdict.confidence,
            "stated": verdict.stated,
            "mean_confidence": settled.confidence.get(item.id),
            "imputed": item.id in settled.imputed,
            "imputed_score": settled.imputed.get(item.id),
            "reasoning": verdict.reasoning,
            "critique": verdict.critique,
            "judge": judge.judge if judge else item.judge or item.check or item.reward_model,
            "judge_hash": judge.hash if judge else None,
            "calls": json.dumps(verdict.calls),
            "attempts": verdict.attempts,
            "latency": verdict.latency,
            "input_tokens": verdict.input_tokens,
            "output_tokens": verdict.output_tokens,
            "detail": verdict.detail,
            "created": now,
        }


def reward_row(
    run: str, step: int, judged: Judged, settled: Settled, baseline: Baseline, scale: Scale, now: datetime
) -> Record:
    """A row of the table `rewards`."""
    return {
        "run": run,
        "step": step,
        "question_id": judged.response.question_id,
        "response_id": judged.response.response_id,
        "category": judged.plan.question.category,
        "formula": judged.plan.rubric.formula,
        "baseline": baseline,
        "scale": scale,
        "reward": settled.reward,
        "normalized": settled.normalized,
        "weighted": settled.weighted,
        "advantage": settled.advantage,
        "penalty": settled.penalty,
        "in_baseline": settled.in_baseline,
        "credit": dict(settled.credit),
        "gate": settled.gate,
        "unscorable": settled.unscorable,
        "created": now,
    }


def step_row(run: str, step: int, batch: Sequence[Judged], results: Sequence[Settled], started: datetime) -> Record:
    """The row of the table `steps` that closes a step: it is there only when all of the step's rows are."""
    outcomes = [v.outcome for judged in batch for v in _applicable(judged)]
    groups: dict[str, set[float]] = {}
    for judged, settled in zip(batch, results, strict=True):
        groups.setdefault(judged.response.question_id, set()).add(settled.advantage)
    return {
        "run": run,
        "step": step,
        "started": started,
        "finished": datetime.now(UTC),
        "num_questions": len(groups),
        "num_responses": len(batch),
        "num_verdicts": len(outcomes),
        "num_failed": sum(outcome in FAILED for outcome in outcomes),
        "num_unscorable": sum(settled.reward is None for settled in results),
        "num_dead_groups": sum(advantages == {0.0} for advantages in groups.values()),
        "metrics": json.dumps({"outcomes": {str(o): outcomes.count(o) for o in sorted(set(outcomes))}}),
    }


def _applicable(judged: Judged) -> list[Verdict]:
    return [judged.verdicts[item.id] for item in judged.plan.applicable]
