"""Verdicts to rewards to advantages: section 6 of the GRAPE paper (R. Patel, 2025) in float64.

Shapes: S responses, J rubric items. Groups and categories are carried by ids, one per response, never by position.
A cell of weight 0 does not apply. A cell of weight > 0 that is not valid failed: it may hold NaN, which never reaches
a result. A row that cannot be scored is NaN, and its advantage is 0.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Formula = Literal["grape", "normalized", "weighted", "points"]
Baseline = Literal["group_mean", "leave_one_out", "none"]
Scale = Literal["none", "group_std", "batch_std"]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

STD_EPSILON = 1e-4  # what GRPO adds to a standard deviation before it divides
TIE = 1e-12  # rewards of a group that differ by less, relatively, differ by rounding alone


def mean_confidence(confidence_SJ: ArrayLike, valid_SJ: ArrayLike, category_S: ArrayLike) -> Floats:
    """The mean confidence of each item over the valid cells of the row's category: phi-bar of section 6.

    phi-bar_ij = sum_{k in category of i, valid} phi_kj / number of them

    A valid cell whose confidence is NaN does not vote. NaN where a category has no voting cell.
    """
    confidence = np.asarray(confidence_SJ, dtype=np.float64)
    votes = np.asarray(valid_SJ, dtype=bool) & ~np.isnan(confidence)
    sums, counts, index = _by_id(np.where(votes, confidence, 0.0), votes, category_S)
    return _divide(sums, counts)[index]


def item_terms(
    score_SJ: ArrayLike,
    confidence_SJ: ArrayLike,
    weight_SJ: ArrayLike,
    valid_SJ: ArrayLike,
    category_S: ArrayLike,
    group_S: ArrayLike,
    *,
    formula: Formula = "grape",
    undesirable_SJ: ArrayLike | None = None,
    gate_SJ: ArrayLike | None = None,
    max_missing: float = 0.5,
) -> Floats:
    """What each item adds to the reward of its row, which is the row's sum. An unscorable row is NaN.

    grape       rho w tau phi-bar / sum_j phi-bar     (15), rho items, w their shares of 1: not bounded by 1
    normalized  w tau phi-bar / sum_j w phi-bar       in [0, 1]
    weighted    w tau                                 in [0, 1]
    points      +-w tau / sum of positive w           unclipped

    tau is the score, or 1 - score where undesirable (in `points` the sign instead). First rows that miss more than
    ``max_missing`` of their weight are dropped; then a failed cell takes the mean of its group's valid cells, so that
    it is neutral in the advantage; an item that nobody in the group has is dropped for that group, and the weights
    are renormalized. ``gate_SJ`` holds, where an item's gate failed, the reward that it sets, and NaN elsewhere: the
    first such valid cell is the row's only term, and a gated row is never dropped.
    """
    if formula not in ("grape", "normalized", "weighted", "points"):
        raise ValueError(f"formula must be grape, normalized, weighted or points, not {formula!r}")
    weight = np.asarray(weight_SJ, dtype=np.float64)
    applies = weight > 0
    valid = np.asarray(valid_SJ, dtype=bool) & applies
    score = np.asarray(score_SJ, dtype=np.float64)
    if not np.isfinite(score[valid]).all():
        raise ValueError("a valid cell needs a finite score")
    undesirable = np.zeros(weight.shape, dtype=bool) if undesirable_SJ is None else np.asarray(undesirable_SJ, bool)
    gates = np.full(weight.shape, np.nan) if gate_SJ is None else np.asarray(gate_SJ, dtype=np.float64)
    gating = valid & ~np.isnan(gates)
    gated = gating.any(axis=1)

    missing = np.where(applies & ~valid, weight, 0.0).sum(axis=1)
    kept = gated | (applies.any(axis=1) & (missing <= (max_missing + TIE) * weight.sum(axis=1)))
    score = impute(score, valid & kept[:, None], group_S)
    present = applies & ~np.isnan(score)
    phi = mean_confidence(confidence_SJ, valid, category_S)
    merit = np.where(undesirable, 1 - score, score) if formula != "points" else score
    terms = _terms(formula, merit, weight, phi, present, undesirable)
    unsure = kept & ~gated & (np.where(present, np.nan_to_num(phi), 0.0).sum(axis=1) == 0)
    if formula in ("grape", "normalized") and unsure.any():
        names = [str(name) for name in np.unique(np.asarray(category_S)[unsure])]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(f"every mean confidence of {', '.join(names[:3])}{more} is 0: unscorable", stacklevel=2)
    first = gating & (np.cumsum(gating, axis=1) == 1)
    terms = np.where(gated[:, None], np.where(first, gates, 0.0), terms)
    return np.where(kept[:, None], terms, np.nan)


def impute(score_SJ: ArrayLike, valid_SJ: ArrayLike, group_S: ArrayLike) -> Floats:
    """Scores whose invalid cells hold the mean of their group's valid ones, and NaN where the group has none."""
    valid = np.asarray(valid_SJ, dtype=bool)
    score = np.where(valid, np.asarray(score_SJ, dtype=np.float64), 0.0)
    sums, counts, index = _by_id(score, valid, group_S)
    return np.where(valid, score, _divide(sums, counts)[index])


def _terms(formula: Formula, merit: Floats, weight: Floats, phi: Floats, present: Bools, undesirable: Bools) -> Floats:
    """The terms of every row as if none were gated or dropped; NaN where the formula has nothing to divide by."""
    if formula == "points":
        positive = np.where(present & ~undesirable, weight, 0.0).sum(axis=1, keepdims=True)
        signed = np.where(undesirable, -weight, weight)
        return _divide(np.where(present, signed * merit, 0.0), positive)
    if formula != "weighted":
        present = present & ~np.isnan(phi)
    phi = np.where(present, phi, 0.0)
    share = np.where(present, weight, 0.0)
    share = _divide(share, share.sum(axis=1, keepdims=True))
    if formula == "weighted":
        return share * np.nan_to_num(merit)
    value = share * np.nan_to_num(merit) * phi
    if formula == "normalized":
        return _divide(value, (share * phi).sum(axis=1, keepdims=True))
    return _divide(present.sum(axis=1, keepdims=True) * value, phi.sum(axis=1, keepdims=True))


def rubric_reward(
    score_SJ: ArrayLike,
    confidence_SJ: ArrayLike,
    weight_SJ: ArrayLike,
    valid_SJ: ArrayLike,
    category_S: ArrayLike,
    group_S: ArrayLike,
    *,
    formula: Formula = "grape",
    undesirable_SJ: ArrayLike | None = None,
    gate_SJ: ArrayLike | None = None,
    max_missing: float = 0.5,
) -> Floats:
    """The reward of each response: the sums of the rows of `item_terms`, eq. 15 by default. NaN where unscorable."""
    terms = item_terms(
        score_SJ,
        confidence_SJ,
        weight_SJ,
        valid_SJ,
        category_S,
        group_S,
        formula=formula,
        undesirable_SJ=undesirable_SJ,
        gate_SJ=gate_SJ,
        max_missing=max_missing,
    )
    return np.asarray(terms.sum(axis=1)) if terms.shape[1] else np.full(len(terms), np.nan)


def advantage(
    reward_S: ArrayLike,
    group_S: ArrayLike,
    *,
    baseline: Baseline = "group_mean",
    scale: Scale = "none",
    counts_S: ArrayLike | None = None,
) -> Floats:
    """How much better each response is than its group. An unscorable (NaN) one is as if absent, and gets 0.

    group_mean      A = R - mean_group R                              eq. 13 (Dr. GRPO), GRAPE's own
    leave_one_out   A = R - mean of the others = n/(n-1) group_mean   RLOO
    none            A = R                                             REINFORCE

    ``group_std`` divides by the group's standard deviation (n - 1) + 1e-4, ``batch_std`` by that of all rewards.
    A group of equal rewards, or of fewer than two, gets exactly 0 (with a baseline, or scaled by its own spread).

    A member whose ``counts_S`` is False is compared and not compared with: no mean or spread knows it, and it gets
    R less the mean of the group's members that count (with leave_one_out, too), over their spread. It is 0 where none
    counts, where the group is of equal rewards with it, and, scaled by the group's spread, where there is no spread.
    """
    reward = np.asarray(reward_S, dtype=np.float64)
    return _relative(reward[:, None], reward, group_S, baseline, scale, counts_S)[:, 0]


def item_credit(
    term_SJ: ArrayLike,
    reward_S: ArrayLike,
    group_S: ArrayLike,
    *,
    baseline: Baseline = "group_mean",
    scale: Scale = "none",
    counts_S: ArrayLike | None = None,
) -> Floats:
    """Each item's part of the advantage: `advantage` is linear in the terms, so the rows sum to it."""
    terms = np.asarray(term_SJ, dtype=np.float64)
    return _relative(terms, np.asarray(reward_S, dtype=np.float64), group_S, baseline, scale, counts_S)


def _relative(
    value_SJ: Floats, reward_S: Floats, group_S: ArrayLike, baseline: Baseline, scale: Scale, counts_S: ArrayLike | None
) -> Floats:
    """``value_SJ`` less its mean over the scorable members of the row's group that count, over their spread."""
    if baseline not in ("group_mean", "leave_one_out", "none"):
        raise ValueError(f"baseline must be group_mean, leave_one_out or none, not {baseline!r}")
    if scale not in ("none", "group_std", "batch_std"):
        raise ValueError(f"scale must be none, group_std or batch_std, not {scale!r}")
    if np.isinf(reward_S).any():
        raise ValueError("a reward must be finite, or NaN where the response is unscorable")
    scorable = ~np.isnan(reward_S)[:, None]
    votes = scorable if counts_S is None else scorable & np.asarray(counts_S, dtype=bool)[:, None]
    sums, counts, index = _by_id(np.where(votes, value_SJ, 0.0), votes, group_S)
    number = counts[index]
    mean = _divide(_by_id(np.where(votes, reward_S[:, None], 0.0), votes, group_S)[0], counts)[index]
    deviation = reward_S[:, None] - mean  # NaN where unscorable, or where there is nothing to compare with
    voting = np.where(votes, deviation, 0.0)
    spread = np.zeros(len(sums))
    np.maximum.at(spread, index, np.abs(voting[:, 0]))
    distance = spread[index][:, None]
    if scale != "group_std":  # a member that does not count may differ from a group of equal rewards
        distance = np.maximum(distance, np.abs(deviation))
    alive = distance > TIE * np.maximum(1.0, np.abs(mean))  # never where one of them is NaN

    value = value_SJ
    if baseline != "none":
        value = value - _divide(sums, counts)[index]
    if baseline == "leave_one_out":
        value = np.where(votes, value * _divide(number, number - 1.0), value)
    if scale == "group_std":
        squares = _by_id(voting**2, votes, group_S)[0][index]
        value = value / (np.sqrt(_divide(squares, number - 1.0)) + STD_EPSILON)
    if scale == "batch_std":
        value = value / (np.std(reward_S[votes[:, 0]], ddof=1) + STD_EPSILON if votes.sum() > 1 else 1.0)
    relative = baseline != "none" or scale == "group_std"
    return np.where(scorable & (alive | (not relative)), value, 0.0)


def _by_id(value_SJ: Floats, counted_SJ: Bools, id_S: ArrayLike) -> tuple[Floats, Floats, NDArray[np.intp]]:
    """Sums and counts per id, and each row's place among the ids."""
    names, index = np.unique(np.asarray(id_S), return_inverse=True)
    sums = np.zeros((len(names), value_SJ.shape[1]))
    counts = np.zeros((len(names), counted_SJ.shape[1]))
    np.add.at(sums, index, value_SJ)
    np.add.at(counts, index, counted_SJ)
    return sums, counts, index


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """The quotient, and NaN where there is nothing to divide by."""
    nothing = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=nothing, where=denominator != 0)
    return nothing
