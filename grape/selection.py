"""Of many responses to a question: which are kept, and how many suffice.

Shapes: S responses, in any order, each with the number or name of its group. NaN is a response without a reward, which
is never kept. Of equal rewards the first response comes first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike

ROUNDING = 1e-9  # a sum of weight x score may come out that much below what it is


def best(reward_S: ArrayLike, group_S: Sequence[Hashable]) -> list[int]:
    """The response with the greatest reward of each group, best of N, groups in the order in which they first come."""
    rewards = np.asarray(reward_S, dtype=float)
    kept: dict[Hashable, int] = {}
    for place, group in enumerate(group_S):
        if not math.isnan(rewards[place]) and (group not in kept or rewards[place] > rewards[kept[group]]):
            kept[group] = place
    return [kept[group] for group in dict.fromkeys(group_S) if group in kept]


def top(reward_S: ArrayLike, number: int) -> list[int]:
    """The ``number`` responses with the greatest rewards of all, whatever their groups, best first."""
    rewards = np.asarray(reward_S, dtype=float)
    order = [int(place) for place in np.argsort(-rewards, kind="stable") if not math.isnan(rewards[place])]
    return order[:number]


def majority(answer_S: Sequence[Hashable], group_S: Sequence[Hashable]) -> list[int]:
    """Of each group the first response that gives its most frequent answer; of equally frequent ones the first."""
    places: dict[Hashable, list[int]] = {}
    for place, group in enumerate(group_S):
        places.setdefault(group, []).append(place)
    kept = []
    for some in places.values():
        counts = Counter(answer_S[place] for place in some)
        kept.append(max(some, key=lambda place: (counts[answer_S[place]], -place)))
    return kept


def pass_at(k: int, number: int, right: int) -> float:
    """The probability that of ``k`` responses, drawn without replacement from ``number``, one is ``right`` at least.

    pass@k = 1 - C(n - c, k) / C(n, k), unbiased: Chen et al. 2021 (1)
    """
    if not 0 <= right <= number or not 1 <= k <= number:
        raise ValueError(f"of {number} responses {right} cannot be right, or {k} be drawn")
    return 1 - math.comb(number - right, k) / math.comb(number, k)


def best_of_kl(number: int) -> float:
    """The KL divergence of the best of ``number`` responses from the policy, in nats, at most: log n - (n - 1)/n.

    It is this where no two rewards are equal: Stiennon et al. 2020, appendix G.3.
    """
    return math.log(number) - (number - 1) / number
