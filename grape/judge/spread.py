"""Scores that a judge might have given, and how probable each is: one score and one confidence from them.

They come from the tokens of one reply, from several replies, or from several judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Aggregate = Literal["mean", "median", "majority"]


def combined(scores: Sequence[float], shares: Sequence[float], aggregate: Aggregate) -> tuple[float, float]:
    """The score and the confidence of ``scores`` in [0, 1] that have these ``shares`` (positive, of any sum).

    The score is their mean, their median, or the one with the greatest share (of several, the lowest). The confidence
    is 1 - sum_k p_k |s_k - median|: from 0.5, for a toss-up between 0 and 1, to 1. Of two scores 0 and 1 it is the
    share of the greater, so that it can be read as the probability that another vote would agree.
    """
    values, where = np.unique(np.asarray(scores, dtype=float), return_inverse=True)
    weight_K = np.bincount(where, weights=np.asarray(shares, dtype=float))
    share_K = weight_K / weight_K.sum()
    below_K = share_K.cumsum()
    half = 0.5 * (1 - 1e-12)  # so that rounding does not move a half
    low, high = values[np.searchsorted(below_K, half)], values[np.searchsorted(below_K, 1 - half)]
    median = (low + high) / 2
    confidence = 1 - float(share_K @ np.abs(values - median))
    if aggregate == "mean":
        return float(np.clip(share_K @ values, 0.0, 1.0)), confidence
    if aggregate == "median":
        return float(median), confidence
    return float(values[np.argmax(np.round(share_K, 12))]), confidence
