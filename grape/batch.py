"""A judged batch settled: its verdicts laid out as arrays, and rewards, advantages and credits read off them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from grape.item import Item
from grape.plan import Plan
from grape.reward import (
    Baseline,
    Bools,
    Floats,
    Formula,
    Scale,
    advantage,
    impute,
    item_credit,
    item_terms,
    mean_confidence,
)
from grape.types import Response, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A response with its verdicts: one for each leaf of its plan."""

    response: Response
    plan: Plan
    verdicts: Mapping[str, Verdict]

    def gate(self) -> Item | None:
        """The first item, in the rubric's order, whose gate this response failed. A failed verdict does not gate."""
        return next((item for item in self.plan.applicable if fails_gate(item, self.verdicts[item.id])), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What a response got, and from what. ``reward`` is None where unscorable, with the reason.

    By item: ``credit`` is its part of the advantage, ``confidence`` the mean confidence that was used, and ``imputed``
    the score (before polarity) that stood in for a failed verdict's.
    """

    reward: float | None
    normalized: float | None
    weighted: float | None
    advantage: float
    credit: Mapping[str, float]
    confidence: Mapping[str, float]
    imputed: Mapping[str, float]
    gate: str | None
    unscorable: str | None


def fails_gate(item: Item, verdict: Verdict) -> bool:
    """Whether a verdict, after polarity, is below its item's gate."""
    if item.gate is None or verdict.score is None:
        return False
    return (1 - verdict.score if item.undesirable else verdict.score) < item.gate.at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """A batch as arrays of S responses by J slots; a slot is a place among the leaves of the response's own plan.

    All members of a group share one plan, so within a group a slot is one item. Mean confidences cross groups and are
    therefore taken by item id, once, before; the reward then averages equal numbers.
    """

    score: Floats
    confidence: Floats
    weight: Floats
    valid: Bools
    undesirable: Bools
    gate: Floats
    group: NDArray[np.object_]
    formula: NDArray[np.object_]

    @staticmethod
    def of(batch: Sequence[Judged]) -> Cells:
        """Verdicts to cells: a failed one is not valid, unless its item says `worst` (its score is then the worst one,
        without a vote on confidence) or `drop` (the response loses all its cells but a gate's)."""
        shape = (len(batch), max(1, *(len(judged.plan.leaves) for judged in batch)))
        score, confidence, gate = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
        weight, valid, undesirable = np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, bool)
        for i, judged in enumerate(batch):
            gated = judged.gate()
            for j, item in enumerate(judged.plan.leaves):
                verdict = judged.verdicts[item.id]
                weight[i, j], undesirable[i, j] = judged.plan.weight[item.id], item.undesirable
                if verdict.score is not None:
                    valid[i, j], score[i, j] = True, verdict.score
                    confidence[i, j] = np.nan if verdict.confidence is None else verdict.confidence
                elif item.on_failure == "worst":
                    valid[i, j], score[i, j] = True, float(item.undesirable)
                if item is gated and item.gate is not None:
                    gate[i, j] = item.gate.reward
        confidence = _mean_confidences(batch, confidence, valid)
        confidence[valid & np.isnan(confidence)] = 1.0  # nobody has a verdict, and `worst` has to count all the same
        for i, judged in enumerate(batch):
            if judged.gate() is None and dropping(judged) is not None:
                valid[i] = False
        questions = [judged.plan.question for judged in batch]
        groups = np.array([f"{q.category} (question {q.question_id})" for q in questions], dtype=object)
        formulas = np.array([judged.plan.rubric.formula for judged in batch], dtype=object)
        return Cells(
            score=score, confidence=confidence, weight=weight, valid=valid, undesirable=undesirable, gate=gate,
            group=groups, formula=formulas,
        )  # fmt: skip

    def terms(self, formula: Formula | None, max_missing: float) -> Floats:
        """`item_terms` by one formula, or by each response's own."""
        if formula is not None:
            return self._terms(formula, np.ones(len(self.group), dtype=bool), max_missing)
        terms = np.full(self.score.shape, np.nan)
        for name in ("grape", "normalized", "weighted", "points"):
            rows = self.formula == name
            if rows.any():
                terms[rows] = self._terms(name, rows, max_missing)
        return terms

    def _terms(self, formula: Formula, rows: Bools, max_missing: float) -> Floats:
        return item_terms(
            self.score[rows], self.confidence[rows], self.weight[rows], self.valid[rows], self.group[rows],
            self.group[rows], formula=formula, undesirable_SJ=self.undesirable[rows], gate_SJ=self.gate[rows],
            max_missing=max_missing,
        )  # fmt: skip


def dropping(judged: Judged) -> Item | None:
    """The first item whose failure makes the response unscorable, by its `on_failure: drop`."""
    failed = (item for item in judged.plan.applicable if judged.verdicts[item.id].score is None)
    return next((item for item in failed if item.on_failure == "drop"), None)


def _mean_confidences(batch: Sequence[Judged], confidence: Floats, valid: Bools) -> Floats:
    """Each cell's mean confidence over the batch, per category and item."""
    rows, slots = np.nonzero(np.arange(confidence.shape[1]) < [[len(judged.plan.leaves)] for judged in batch])
    names = [
        f"{batch[i].plan.question.category}\0{batch[i].plan.leaves[j].id}"
        for i, j in zip(rows.tolist(), slots.tolist(), strict=True)
    ]
    means = np.full(confidence.shape, np.nan)
    cells = (rows, slots)
    means[cells] = mean_confidence(confidence[cells][:, None], valid[cells][:, None], np.array(names, dtype=object))[
        :, 0
    ]
    return means


def settle(
    batch: Sequence[Judged], *, baseline: Baseline = "group_mean", scale: Scale = "none", max_missing: float = 0.5
) -> list[Settled]:
    """Rewards by each category's formula and advantages within each question's group, in the order of ``batch``.

    Mean confidences are taken over the whole batch (decision A2).
    """
    cells = Cells.of(batch)
    terms = cells.terms(None, max_missing)
    reward = terms.sum(axis=1)
    normalized = cells.terms("normalized", max_missing).sum(axis=1)
    weighted = cells.terms("weighted", max_missing).sum(axis=1)
    relative = advantage(reward, cells.group, baseline=baseline, scale=scale)
    credit = item_credit(terms, reward, cells.group, baseline=baseline, scale=scale)
    scorable = ~np.isnan(reward)[:, None]
    filled = impute(cells.score, cells.valid & (cells.weight > 0) & scorable, cells.group)
    settled = []
    for i, judged in enumerate(batch):
        slots = [(j, item) for j, item in enumerate(judged.plan.leaves) if cells.weight[i, j] > 0]
        gate = judged.gate()
        stands_in = scorable[i, 0] and gate is None
        settled.append(
            Settled(
                reward=_number(reward[i]),
                normalized=_number(normalized[i]),
                weighted=_number(weighted[i]),
                advantage=float(relative[i]),
                credit={item.id: float(credit[i, j]) for j, item in slots},
                confidence={item.id: float(cells.confidence[i, j]) for j, item in slots},
                imputed={
                    item.id: float(filled[i, j])
                    for j, item in slots
                    if stands_in and judged.verdicts[item.id].score is None and not np.isnan(filled[i, j])
                },
                gate=gate.id if gate else None,
                unscorable=None if scorable[i, 0] else _reason(judged),
            )
        )
    return settled


def _number(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)


def _reason(judged: Judged) -> str:
    """Why a response has no reward."""
    if not judged.plan.applicable:
        return "no item applies"
    if (item := dropping(judged)) is not None:
        return f"{item.id} failed ({judged.verdicts[item.id].outcome}) and says on_failure: drop"
    failed = {
        i.id: judged.verdicts[i.id].outcome for i in judged.plan.applicable if judged.verdicts[i.id].score is None
    }
    if failed:
        share = sum(judged.plan.weight[item] for item in failed)
        return f"{share:.0%} of the weight failed: " + ", ".join(f"{item} ({how})" for item, how in failed.items())
    return "every mean confidence is 0" if judged.plan.rubric.formula != "points" else "no item has a positive weight"
