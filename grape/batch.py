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
from grape.types import Outcome, Response, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A response with its verdicts: one for each leaf of its plan.

    ``cut`` says why it was not judged at all. It then has no vote anywhere, and its reward is ``cut_reward``, set as a
    failed gate sets one; without that it is unscorable.
    """

    response: Response
    plan: Plan
    verdicts: Mapping[str, Verdict]
    cut: str | None = None
    cut_reward: float | None = None

    def __post_init__(self) -> None:
        assert self.cut is not None or self.cut_reward is None, "only a response that was not judged has its reward set"

    def gate(self) -> Item | None:
        """The first item, in the rubric's order, whose gate this response failed. A failed verdict gates only
        where it counts as the worst one."""
        return next((item for item in self.plan.applicable if fails_gate(item, self.verdicts[item.id])), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What a response got, and from what. ``reward`` is None where unscorable, with the reason.

    By item: ``credit`` is its part of the advantage, ``confidence`` the mean confidence that was used, and ``imputed``
    the score (before polarity) that stood in for a failed verdict's. ``reward`` is the rubric's own: ``penalty`` is
    what was added to it before the baseline, and its parts stand in ``credit`` under "+" and their names
    ("+cut": a reward that was set unjudged). ``in_baseline`` says whether its group was compared with it.
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
    penalty: float = 0.0
    in_baseline: bool = True


def not_judged(plan: Plan, response: Response, why: str, reward: float | None = None) -> Judged:
    """A response that no checker or judge is to see: its reward is set, or it is unscorable."""
    verdicts = {leaf.id: Verdict(item=leaf.id, outcome=Outcome.NOT_APPLICABLE, attempts=0) for leaf in plan.leaves}
    for item in plan.applicable:
        verdicts[item.id] = Verdict(item=item.id, outcome=Outcome.SKIPPED, detail=why, attempts=0)
    return Judged(response=response, plan=plan, verdicts=verdicts, cut=why, cut_reward=reward)


def fails_gate(item: Item, verdict: Verdict) -> bool:
    """Whether a verdict, after polarity, is below its item's gate. A failed one is, where it counts as the worst."""
    if item.gate is None:
        return False
    if verdict.score is None:
        return item.on_failure == "worst" and verdict.outcome is not Outcome.SKIPPED and item.gate.at_least > 0
    return (1 - verdict.score if item.undesirable else verdict.score) < item.gate.at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """A batch as arrays of S responses by J slots; a slot is a place among the leaves of the response's own plan.

    All members of a group share one plan, so within a group a slot is one item. Mean confidences cross groups and are
    therefore taken by item id, once, before; the reward then averages equal numbers. ``cut`` is the reward of a
    response that was not judged, whose cells are all as if they did not apply, and NaN elsewhere.
    """

    score: Floats
    confidence: Floats
    weight: Floats
    valid: Bools
    undesirable: Bools
    gate: Floats
    cut: Floats
    group: NDArray[np.object_]
    formula: NDArray[np.object_]

    @staticmethod
    def of(batch: Sequence[Judged]) -> Cells:
        """Verdicts to cells: a failed one is not valid, unless its item says `worst` (its score is then the worst one,
        without a vote on confidence) or `drop` (the response loses all its cells but a gate's)."""
        shape = (len(batch), max(1, *(len(judged.plan.leaves) for judged in batch)))
        score, confidence, gate = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
        weight, valid, undesirable = np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, bool)
        cut = np.array([np.nan if judged.cut_reward is None else judged.cut_reward for judged in batch])
        for i, judged in enumerate(batch):
            if judged.cut is not None:
                continue
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
            cut=cut, group=groups, formula=formulas,
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

    def sums(self, terms: Floats) -> Floats:
        """The rewards: the sums of their terms, or what was set."""
        return np.where(np.isnan(self.cut), terms.sum(axis=1), self.cut)

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
    batch: Sequence[Judged],
    *,
    baseline: Baseline = "group_mean",
    scale: Scale = "none",
    max_missing: float = 0.5,
    groups: Sequence[str] | None = None,
    counts: Sequence[bool] | None = None,
    extra: Mapping[str, Sequence[float]] | None = None,
) -> list[Settled]:
    """Rewards by each category's formula and advantages within each group, in the order of ``batch``.

    Mean confidences are taken over the whole batch (decision A2), stand-ins from the question's responses. ``groups``
    are the ids of the baseline groups, by default the questions; a group's members answer one question. ``counts``
    says who makes the baseline (see `grape.reward.advantage`). ``extra`` are terms by name that are added to a reward
    before its baseline, a set one, too; an unscorable response stays so.
    """
    cells = Cells.of(batch)
    group = cells.group if groups is None else _baseline_groups(batch, groups)
    counted = np.ones(len(batch), dtype=bool) if counts is None else np.asarray(counts, dtype=bool)
    terms = cells.terms(None, max_missing)
    reward = cells.sums(terms)
    normalized = cells.sums(cells.terms("normalized", max_missing))
    weighted = cells.sums(cells.terms("weighted", max_missing))
    added, penalty = _added(cells, extra or {})
    parts = np.column_stack([np.where(np.isnan(cells.cut)[:, None], terms, 0.0), *added.values()])
    total = reward + penalty
    relative = advantage(total, group, baseline=baseline, scale=scale, counts_S=counted)
    credit = item_credit(parts, total, group, baseline=baseline, scale=scale, counts_S=counted)
    imputed = _stand_ins(batch, cells, ~np.isnan(reward))
    return [
        Settled(
            reward=_number(reward[i]),
            normalized=_number(normalized[i]),
            weighted=_number(weighted[i]),
            advantage=float(relative[i]),
            credit=_by_item(judged.plan, credit[i])
            | dict(zip(added, credit[i, terms.shape[1] :].tolist(), strict=True)),
            confidence=_by_item(judged.plan, cells.confidence[i]),
            imputed=imputed[i],
            gate=gate.id if (gate := judged.gate()) else None,
            unscorable=_reason(judged) if np.isnan(reward[i]) else None,
            penalty=float(penalty[i]),
            in_baseline=bool(counted[i] and not np.isnan(reward[i])),
        )
        for i, judged in enumerate(batch)
    ]


def _baseline_groups(batch: Sequence[Judged], groups: Sequence[str]) -> NDArray[np.object_]:
    """The ids as an array: a slot is one item within a group only if all its members share a plan."""
    question: dict[str, str] = {}
    for judged, group in zip(batch, groups, strict=True):
        asked = judged.plan.question.question_id
        assert question.setdefault(group, asked) == asked, f"group {group!r} mixes questions"
    return np.array(groups, dtype=object)


def _added(cells: Cells, extra: Mapping[str, Sequence[float]]) -> tuple[dict[str, Floats], Floats]:
    """The terms that no item gave, by their names in `Settled.credit`, and the sum of the ``extra`` ones."""
    added = {f"+{name}": np.asarray(values, dtype=np.float64) for name, values in extra.items()}
    for name, values in added.items():
        if values.shape != cells.cut.shape or not np.isfinite(values).all() or name == "+cut":
            raise ValueError(f"extra {name[1:]!r}: one finite number a response is needed, and a name other than cut")
    penalty = np.sum([np.zeros_like(cells.cut), *added.values()], axis=0)
    if not np.isnan(cells.cut).all():
        added["+cut"] = np.nan_to_num(cells.cut)
    return added, penalty


def _stand_ins(batch: Sequence[Judged], cells: Cells, scorable: Bools) -> list[dict[str, float]]:
    """By item, what stood in for each response's failed verdicts; nothing does where a reward was set."""
    filled = impute(cells.score, cells.valid & (cells.weight > 0) & scorable[:, None], cells.group)
    return [
        {
            item.id: float(filled[i, j])
            for j, item in enumerate(judged.plan.leaves)
            if cells.weight[i, j] > 0 and judged.verdicts[item.id].score is None and not np.isnan(filled[i, j])
        }
        if scorable[i] and judged.gate() is None
        else {}
        for i, judged in enumerate(batch)
    ]


def _by_item(plan: Plan, values: Floats) -> dict[str, float]:
    """A row's slots as numbers by item, where the item applies."""
    return {leaf.id: float(values[j]) for j, leaf in enumerate(plan.leaves) if plan.weight[leaf.id] > 0}


def _number(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)


def _reason(judged: Judged) -> str:
    """Why a response has no reward."""
    if judged.cut is not None:
        return judged.cut
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
