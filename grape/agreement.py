"""How well judgements agree, with one another and with the truth, and how sure that is: NumPy and nothing else.

Shapes: S judgements, R raters, B resamples. Every statistic takes ``weight_BS``, how often each resample holds each
judgement, and gives one value per resample; left out, it is one row of ones. NaN stands where a value is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Level = Literal["nominal", "interval"]

DRAWS = 2000
BINS = 10
AT_ONCE = 4_000_000  # weights that are in memory at a time
MOST_UNDEFINED = 0.05  # share of resamples without a value above which there are no bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value with the bounds of its 95 % bootstrap interval; NaN where there is none."""

    value: float
    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is above 0; not so where there is none."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is below 0; not so where there is none."""
        return self.high < 0


def resamples(cluster_S: ArrayLike, draws: int, seed: int) -> Iterator[Floats]:
    """Weights of ``draws`` resamples, in parts: whole clusters (questions, say) drawn with replacement.

    Judgements of one question resemble each other: to draw them one by one would make every interval too narrow.
    """
    names, index = np.unique(np.asarray(cluster_S), return_inverse=True)
    generator = np.random.default_rng(seed)
    part = max(1, AT_ONCE // max(1, len(index)))
    for first in range(0, draws, part):
        rows = min(part, draws - first)
        drawn = generator.integers(0, len(names), (rows, len(names))) + len(names) * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * len(names)).reshape(rows, len(names))
        yield counts.astype(np.float64)[:, index]


def intervals(
    statistics: Sequence[Callable[[Floats], Floats]], cluster_S: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> list[Interval]:
    """Statistics of the weights, each with the 2.5 and 97.5 % points of its resamples (percentile bootstrap).

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. There are no bounds where more than 5 %
    of the resamples have no value.
    """
    cluster = np.asarray(cluster_S)
    if not len(cluster):
        return [Interval(value=np.nan, low=np.nan, high=np.nan) for _ in statistics]
    values = [float(statistic(np.ones((1, len(cluster))))[0]) for statistic in statistics]
    parts = [[statistic(weight) for statistic in statistics] for weight in resamples(cluster, draws, seed)]
    drawn = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return [_bounded(value, column) for value, column in zip(values, drawn, strict=True)]


def interval(
    statistic: Callable[[Floats], Floats], cluster_S: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """One of the `intervals`."""
    (one,) = intervals([statistic], cluster_S, draws=draws, seed=seed)
    return one


def _bounded(value: float, drawn: Floats) -> Interval:
    defined = drawn[~np.isnan(drawn)]
    if np.isnan(value) or len(defined) < (1 - MOST_UNDEFINED) * len(drawn):
        return Interval(value=value, low=np.nan, high=np.nan)
    low, high = np.quantile(defined, [0.025, 0.975]).tolist()
    return Interval(value=value, low=low, high=high)


def wilson(share: float, number: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share of ``number`` independent trials: Wilson 1927."""
    middle = share + z * z / (2 * number)
    spread = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    whole = 1 + z * z / number
    return max(0.0, (middle - spread) / whole), min(1.0, (middle + spread) / whole)


def mean(value_S: ArrayLike, weight_BS: Floats | None = None) -> Floats:
    """sum w v / sum w: of what is right or wrong the accuracy, of squared errors the Brier score."""
    value = np.asarray(value_S, dtype=np.float64)
    weight = _weights(weight_BS, len(value))
    return _ratio(weight @ value, weight.sum(axis=1))


def is_right(score_S: ArrayLike, gold_S: ArrayLike, tolerance: float = 0.5) -> Floats:
    """1 where a score is nearer than ``tolerance`` to the gold one: with 0.5 and gold 0 or 1, on the gold's side."""
    distance = np.abs(np.asarray(score_S, dtype=np.float64) - np.asarray(gold_S, dtype=np.float64))
    return (distance < tolerance).astype(np.float64)


def kappa(score_S: ArrayLike, gold_S: ArrayLike, *, tolerance: float = 0.5, weight_BS: Floats | None = None) -> Floats:
    """Cohen's kappa (Educational and Psychological Measurement 20, 1960): accuracy beyond what chance gives.

    kappa = (p_o - p_e) / (1 - p_e)

    p_o is the accuracy and p_e the accuracy of the same scores dealt out at random among the same golds:
    sum_st p(score = s) p(gold = t) [|s - t| < tolerance]. Of scores and golds that are 0 or 1 this is Cohen's own.
    NaN where p_e is 1: then nothing could be wrong.
    """
    scores, score_place = np.unique(np.asarray(score_S, dtype=np.float64), return_inverse=True)
    golds, gold_place = np.unique(np.asarray(gold_S, dtype=np.float64), return_inverse=True)
    weight = _weights(weight_BS, len(score_place))
    right = is_right(scores[:, None], golds[None, :], tolerance)
    observed = mean(right[score_place, gold_place], weight)
    total = weight.sum(axis=1)
    met = ((_sums(weight, score_place, len(scores)) @ right) * _sums(weight, gold_place, len(golds))).sum(axis=1)
    expected = _ratio(met, total**2)
    return _ratio(observed - expected, np.where(1 - expected > 1e-12, 1 - expected, 0.0))


def alpha(rating_SR: ArrayLike, level: Level = "nominal", weight_BS: Floats | None = None) -> Floats:
    """Krippendorff's alpha of any number of raters, NaN where one gave no rating (Content Analysis, 2004, ch. 11).

    alpha = 1 - D_o / D_e
    D_o = 1/n sum_u sum_{i != j in u} d(v_ui, v_uj) / (m_u - 1),   D_e = 1/(n (n - 1)) sum_{all i, j} d(v_i, v_j)

    u are the units with m_u >= 2 ratings, n their ratings in all; d is [v != w] (nominal) or (v - w)^2 (interval).
    """
    rating = np.asarray(rating_SR, dtype=np.float64)
    given = ~np.isnan(rating)
    given &= given.sum(axis=1, keepdims=True) >= 2  # a rating alone in its unit is compared with nothing
    count = given.sum(axis=1).astype(np.float64)
    weight = _weights(weight_BS, len(rating))
    total = weight @ count
    value = np.where(given, rating, 0.0)
    if level == "nominal":
        values = np.unique(rating[given])
        counts_SV = ((rating[:, :, None] == values) & given[:, :, None]).sum(axis=1).astype(np.float64)
        apart = count**2 - (counts_SV**2).sum(axis=1)
        expected = total**2 - ((weight @ counts_SV) ** 2).sum(axis=1)
    else:
        sums, squares = value.sum(axis=1), (value**2).sum(axis=1)
        apart = 2 * (count * squares - sums**2)
        expected = 2 * (total * (weight @ squares) - (weight @ sums) ** 2)
    observed = weight @ np.divide(apart, count - 1, out=np.zeros_like(apart), where=count > 1)
    return 1 - _ratio((total - 1) * observed, np.where(expected > 1e-9 * np.maximum(1.0, total), expected, 0.0))


def spearman(x_S: ArrayLike, y_S: ArrayLike, weight_BS: Floats | None = None) -> Floats:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing the mean of theirs.

    NaN where one of the two is the same everywhere.
    """
    x, y = np.asarray(x_S, dtype=np.float64), np.asarray(y_S, dtype=np.float64)
    weight = _weights(weight_BS, len(x))
    total = weight.sum(axis=1, keepdims=True)
    ranks = [_ranks(weight, values) for values in (x, y)]
    a, b = (rank - (weight * rank).sum(axis=1, keepdims=True) / total for rank in ranks)
    spread = [(weight * rank**2).sum(axis=1) for rank in (a, b)]
    flat = np.minimum(spread[0], spread[1]) < 1e-9 * total[:, 0]
    return _ratio((weight * a * b).sum(axis=1), np.where(flat, 0.0, np.sqrt(spread[0] * spread[1])))


def equal_mass(confidence_S: ArrayLike, bins: int = BINS) -> NDArray[np.intp]:
    """The bin of each confidence, from 0: as even in number as can be, equal confidences in the same one."""
    values, place = np.unique(np.asarray(confidence_S, dtype=np.float64), return_inverse=True)
    count = np.bincount(place, minlength=len(values))
    middle = (count.cumsum() - count / 2) / max(1, len(place))
    used, bin_ = np.unique(np.minimum((middle * bins).astype(np.intp), bins - 1), return_inverse=True)
    assert len(used) <= bins
    return np.asarray(bin_[place], dtype=np.intp)


def calibration_error(
    confidence_S: ArrayLike,
    right_S: ArrayLike,
    *,
    bins: int = BINS,
    bin_S: NDArray[np.intp] | None = None,
    weight_BS: Floats | None = None,
) -> Floats:
    """The expected calibration error over bins of equal mass (Naeini et al., AAAI 2015; Nixon et al., 2019).

    ECE = sum_b n_b / n |accuracy_b - mean confidence_b|

    The bins are those of the data as it is (or ``bin_S``, numbered from 0), in every resample. Resamples are noisier
    than the data, so the interval lies a little high.
    """
    confidence = np.asarray(confidence_S, dtype=np.float64)
    bin_ = equal_mass(confidence, bins) if bin_S is None else bin_S
    weight = _weights(weight_BS, len(confidence))
    size = int(bin_.max()) + 1 if len(bin_) else 1
    gaps = _sums(weight * (np.asarray(right_S, dtype=np.float64) - confidence), bin_, size)
    return _ratio(np.abs(gaps).sum(axis=1), weight.sum(axis=1))


def isotonic(x_S: ArrayLike, y_S: ArrayLike) -> tuple[list[float], list[float]]:
    """The points (x, y) of the rising steps nearest to the data in squared error, by pooling adjacent violators.

    Ayer et al., Annals of Mathematical Statistics 26, 1955. A step is given by its first and its last x.
    """
    values, place = np.unique(np.asarray(x_S, dtype=np.float64), return_inverse=True)
    sums = np.bincount(place, weights=np.asarray(y_S, dtype=np.float64), minlength=len(values))
    counts = np.bincount(place, minlength=len(values)).astype(np.float64)
    steps: list[tuple[float, float, float, float]] = []  # first x, last x, sum of y, number
    for x, sum_, count in zip(values.tolist(), sums.tolist(), counts.tolist(), strict=True):
        step = (x, x, sum_, count)
        while steps and steps[-1][2] * step[3] >= step[2] * steps[-1][3]:
            before = steps.pop()
            step = (before[0], step[1], before[2] + step[2], before[3] + step[3])
        steps.append(step)
    points = [(x, sum_ / count) for first, last, sum_, count in steps for x in dict.fromkeys((first, last))]
    return [x for x, _ in points], [y for _, y in points]


def folds(cluster_S: ArrayLike, number: int, seed: int) -> NDArray[np.intp]:
    """The fold of each judgement: whole clusters, dealt out at random as evenly as can be."""
    names, index = np.unique(np.asarray(cluster_S), return_inverse=True)
    dealt = np.random.default_rng(seed).permutation(len(names)) % number
    return np.asarray(dealt[index], dtype=np.intp)


def _weights(weight_BS: Floats | None, number: int) -> Floats:
    return np.ones((1, number)) if weight_BS is None else weight_BS


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    nothing = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=nothing, where=denominator != 0)
    return nothing


def _sums(value_BS: Floats, place_S: NDArray[np.intp], size: int) -> Floats:
    """Sums over the judgements of each place from 0 to size - 1."""
    order = np.argsort(place_S, kind="stable")
    used, starts = np.unique(place_S[order], return_index=True)
    sums = np.zeros((len(value_BS), size))
    if len(used):
        sums[:, used] = np.add.reduceat(value_BS[:, order], starts, axis=1)
    return sums


def _ranks(weight_BS: Floats, value_S: Floats) -> Floats:
    """Mid-ranks of the judgements in each resample."""
    values, place = np.unique(value_S, return_inverse=True)
    counts = _sums(weight_BS, place, len(values))
    return np.asarray((counts.cumsum(axis=1) - counts / 2 + 0.5)[:, place])
