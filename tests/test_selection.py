"""What is kept of many responses, and pass@k."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grape.selection import best, best_of_kl, majority, pass_at, top

MATRIX = [[0.7, 0.3, 0.5, 0.2], [0.4, 0.8, 0.6, 0.5], [0.9, 0.3, 0.4, 0.7], [0.2, 0.5, 0.8, 0.6], [0.5, 0.4, 0.3, 0.6]]
FLAT = [reward for row in MATRIX for reward in row]
GROUPS = [f"q{row}" for row in range(5) for _ in range(4)]


def test_the_books_matrix():
    """Lambert 2025, 10.1.2: the best of each prompt, and the five best of all (index 11, not the printed 19)."""
    assert [place % 4 + 1 for place in best(FLAT, GROUPS)] == [1, 2, 1, 3, 4]
    assert set(top(FLAT, 5)) == {8, 5, 14, 0, 11}
    assert top(FLAT, 5)[0] == 8
    assert top(FLAT[:4], 1) == best(FLAT[:4], GROUPS[:4]) == [0]


def test_a_response_without_a_reward_is_never_kept_and_ties_go_to_the_first():
    rewards = [math.nan, 0.5, 0.5, math.nan, 0.1, 0.5]
    groups = ["a", "a", "a", "b", "c", "c"]
    assert best(rewards, groups) == [1, 5]
    assert top(rewards, 9) == [1, 2, 5, 4]
    assert top(rewards, 2) == [1, 2]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-1, 1) | st.just(math.nan)), max_size=20))
def test_the_best_of_a_group_is_its_greatest_wherever_its_members_stand(pairs):
    groups, rewards = [group for group, _ in pairs], [reward for _, reward in pairs]
    kept = best(rewards, groups)
    known = {
        group: max(found) for group in groups if (found := [r for g, r in pairs if g == group and not math.isnan(r)])
    }
    assert {groups[place]: rewards[place] for place in kept} == known
    assert len(kept) == len(known)
    everything = [r for r in rewards if not math.isnan(r)]
    assert [rewards[place] for place in top(rewards, 3)] == sorted(everything, reverse=True)[:3]


def test_the_majority_of_each_group_speaks_by_its_first_response():
    answers = ["x", "y", "y", "z", "x", "w", "w"]
    groups = ["a", "a", "a", "a", "b", "b", "b"]
    assert majority(answers, groups) == [1, 5]
    assert majority(["p", "q"], ["a", "a"]) == [0]
    assert majority([], []) == []


@pytest.mark.parametrize("number", [1, 4, 7])
def test_pass_at_k_is_the_share_of_draws_with_one_that_is_right(number):
    for right in range(number + 1):
        for k in range(1, number + 1):
            draws = list(combinations(range(number), k))
            share = sum(any(place < right for place in draw) for draw in draws) / len(draws)
            assert pass_at(k, number, right) == pytest.approx(share)


def test_what_cannot_be_is_refused():
    for arguments in ((0, 4, 1), (5, 4, 1), (1, 4, 5), (1, 4, -1)):
        with pytest.raises(ValueError, match=r"of 4 responses -?\d cannot be right, or \d be drawn"):
            pass_at(*arguments)


def test_the_kl_of_the_best_of_n_is_that_of_the_tilted_uniform_distribution():
    """The best of n has the density n u^(n - 1) where u is its place among all that the policy might say."""
    assert best_of_kl(1) == 0
    u = (np.arange(200_000) + 0.5) / 200_000
    for number in (2, 8):
        density = number * u ** (number - 1)
        assert best_of_kl(number) == pytest.approx(float(np.mean(density * np.log(density))), abs=1e-4)
