"""Agreement with published examples, with the definitions, and with what must hold whatever the data."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grape.agreement import (
    alpha,
    calibration_error,
    equal_mass,
    folds,
    interval,
    is_right,
    isotonic,
    kappa,
    mean,
    resamples,
    spearman,
)

N = np.nan
# K. Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011, section E: four observers, twelve units.
KRIPPENDORFF = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, N, N, N],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, N, 3],
        [N, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, N],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, N],
    ]
).T
UNIT = st.floats(0, 1)
PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30)


def one(values):
    (value,) = values
    return float(value)


def test_krippendorffs_alpha_of_his_own_example():
    assert one(alpha(KRIPPENDORFF, "nominal")) == pytest.approx(0.743, abs=5e-4)
    assert one(alpha(KRIPPENDORFF, "interval")) == pytest.approx(0.849, abs=5e-4)


def test_krippendorffs_alpha_of_two_observers():
    binary = np.array([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]], dtype=float).T  # section A
    assert one(alpha(binary)) == pytest.approx(0.095, abs=5e-4)


def test_a_unit_with_one_rating_changes_no_alpha():
    alone = np.vstack([KRIPPENDORFF, [[9, N, N, N], [N, N, N, N]]])
    for level in ("nominal", "interval"):
        assert one(alpha(alone, level)) == one(alpha(KRIPPENDORFF, level))


def test_alpha_is_one_where_all_agree_and_undefined_where_nothing_varies():
    assert one(alpha([[0, 0], [1, 1], [1, 1]])) == 1
    assert np.isnan(one(alpha([[1, 1], [1, 1]])))
    assert np.isnan(one(alpha(np.full((3, 2), N))))


def test_cohens_kappa_of_a_published_table():
    # J. Sim and C. Wright, Physical Therapy 85, 2005, table 1: 22, 2, 4, 11 of 39: kappa .67
    first = [1] * 24 + [0] * 15
    second = [1] * 22 + [0] * 2 + [1] * 4 + [0] * 11
    assert one(kappa(first, second)) == pytest.approx(0.67, abs=5e-3)
    observed, chance = 33 / 39, (24 * 26 + 15 * 13) / 39**2
    assert one(kappa(first, second)) == pytest.approx((observed - chance) / (1 - chance))


def test_kappa_of_graded_scores_counts_what_is_within_the_tolerance():
    score, gold = [0.2, 0.5, 0.9, 0.4], [0.25, 0.9, 0.8, 0.0]
    assert is_right(score, gold, 0.2).tolist() == [1, 0, 1, 0]
    chance = np.mean([abs(s - g) < 0.2 for s in score for g in gold])
    assert one(kappa(score, gold, tolerance=0.2)) == pytest.approx((0.5 - chance) / (1 - chance))


def test_a_score_in_the_middle_is_on_nobodys_side():
    assert is_right([0.5, 0.5, 0.51, 0.49], [0, 1, 1, 0]).tolist() == [0, 0, 1, 1]


def test_kappa_is_undefined_where_nothing_could_be_wrong():
    assert np.isnan(one(kappa([1, 1, 1], [1, 1, 1])))


def test_spearman_with_ties_shares_the_mean_rank():
    x, y = [1, 2, 2, 3, 5], [2, 1, 4, 4, 9]
    ranks = np.array([1, 2.5, 2.5, 4, 5]), np.array([2, 1, 3.5, 3.5, 5])
    assert one(spearman(x, y)) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert one(spearman([1, 2, 3, 4], [1, 8, 27, 64])) == pytest.approx(1)
    assert one(spearman([1, 2, 3, 4], [4, 3, 2, 1])) == pytest.approx(-1)
    assert np.isnan(one(spearman([1, 2, 3], [5, 5, 5])))


def test_the_calibration_error_of_two_bins_by_hand():
    confidence = [0.6] * 4 + [0.9] * 6
    right = [1, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    assert one(calibration_error(confidence, right)) == pytest.approx(0.4 * (0.6 - 0.25) + 0.6 * (0.9 - 5 / 6))
    assert one(calibration_error(confidence, right, bins=1)) == pytest.approx(0.78 - 0.6)


def test_equal_confidences_share_a_bin_and_bins_are_of_equal_mass():
    assert equal_mass([0.5] * 30 + [0.9]).tolist() == [0] * 30 + [1]
    assert np.bincount(equal_mass(np.random.default_rng(0).random(1000), 10)).tolist() == [100] * 10


def test_isotonic_regression_pools_adjacent_violators():
    assert isotonic([1, 2, 3, 4], [1, 3, 2, 4]) == ([1, 2, 3, 4], [1, 2.5, 2.5, 4])
    assert isotonic([1, 2, 3], [3, 2, 1]) == ([1, 3], [2, 2])
    assert isotonic([0.5, 0.5, 0.9, 0.9, 0.9], [1, 0, 1, 1, 0]) == ([0.5, 0.9], [0.5, 2 / 3])


def test_a_weight_counts_a_judgement_as_often_as_it_is_drawn():
    generator = np.random.default_rng(1)
    score, gold, confidence = generator.integers(0, 2, 12), generator.integers(0, 2, 12), generator.integers(1, 5, 12)
    weight = generator.integers(0, 4, 12).astype(float)
    often = np.repeat(np.arange(12), weight.astype(int))
    right = is_right(score, gold)
    ratings = np.column_stack([score, gold]).astype(float)
    for weighted, repeated in (
        (mean(right, weight[None]), mean(right[often])),
        (kappa(score, gold, weight_BS=weight[None]), kappa(score[often], gold[often])),
        (alpha(ratings, weight_BS=weight[None]), alpha(ratings[often])),
        (alpha(ratings, "interval", weight[None]), alpha(ratings[often], "interval")),
        (spearman(confidence, right, weight[None]), spearman(confidence[often], right[often])),
    ):
        assert one(weighted) == pytest.approx(one(repeated))


def test_resamples_draw_whole_clusters():
    cluster = ["a", "b", "a", "c", "b"]
    (weight,) = resamples(cluster, 500, seed=3)
    assert weight.shape == (500, 5)
    assert (weight[:, 0] == weight[:, 2]).all() and (weight[:, 1] == weight[:, 4]).all()
    assert (weight[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert len(np.unique(weight[:, 0])) > 2


def test_an_interval_of_whole_clusters_is_wider_than_one_of_single_judgements():
    value = np.repeat(np.random.default_rng(5).integers(0, 2, 40), 10)
    whole = interval(lambda weight: mean(value, weight), np.repeat(np.arange(40), 10))
    single = interval(lambda weight: mean(value, weight), np.arange(400))
    assert whole.value == single.value == value.mean()
    assert whole.high - whole.low > 2.5 * (single.high - single.low)  # sqrt(10) in theory


def test_an_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(7)
    covered = 0
    for seed in range(200):
        value = generator.random(60) < 0.7
        found = interval(lambda weight, value=value: mean(value, weight), np.arange(60), draws=300, seed=seed)
        covered += found.low <= 0.7 <= found.high
    assert 180 <= covered <= 198  # of 200, at 95 %


def test_the_seed_decides_an_interval():
    value = np.random.default_rng(0).random(50)
    first, again, other = (
        interval(lambda weight: mean(value, weight), np.arange(50), draws=100, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other and first.value == other.value


def test_there_are_no_bounds_where_resamples_have_no_value():
    found = interval(lambda weight: spearman([1, 2, 3], [1, 2, 2], weight), ["a", "b", "c"])
    assert found.value == pytest.approx(np.sqrt(0.75))
    assert np.isnan(found.low) and not found.above_zero and not found.below_zero


def test_folds_keep_clusters_whole_and_even():
    fold = folds(np.repeat(np.arange(23), 2), 5, seed=0)
    assert (fold[::2] == fold[1::2]).all()
    assert sorted(np.bincount(fold[::2])) == [4, 4, 5, 5, 5]


@given(PAIRS)
@settings(deadline=None)
def test_alpha_and_kappa_do_not_depend_on_who_is_first(pairs):
    ratings = np.array(pairs, dtype=float)
    for level in ("nominal", "interval"):
        np.testing.assert_allclose(alpha(ratings, level), alpha(ratings[:, ::-1], level), atol=1e-12)
    np.testing.assert_allclose(kappa(*ratings.T), kappa(*ratings.T[::-1]), atol=1e-12)


@given(PAIRS)
@settings(deadline=None)
def test_alpha_is_the_definition_over_pairs_of_ratings(pairs):
    ratings = np.array(pairs, dtype=float)
    every = ratings.ravel()
    for level, distance in (("nominal", lambda a, b: float(a != b)), ("interval", lambda a, b: (a - b) ** 2)):
        observed = np.mean([distance(a, b) for a, b in ratings])
        n = len(every)
        expected = sum(distance(a, b) for i, a in enumerate(every) for j, b in enumerate(every) if i != j)
        got = one(alpha(ratings, level))
        if expected == 0:
            assert np.isnan(got)
        else:
            assert got == pytest.approx(1 - observed / (expected / (n * (n - 1))), abs=1e-9)


@given(st.lists(st.tuples(UNIT, st.integers(0, 1)), min_size=1, max_size=40))
@settings(deadline=None)
def test_isotonic_regression_rises_keeps_the_mean_and_is_calibrated_on_its_own_data(data):
    x, y = np.array(data).T
    points, values = isotonic(x, y)
    assert all(a < b for a, b in pairwise(points))
    assert all(a <= b for a, b in pairwise(values))
    fitted = np.interp(x, points, values)
    assert fitted.mean() == pytest.approx(y.mean(), abs=1e-9)
    for value in values:
        inside = np.abs(fitted - value) < 1e-12
        assert y[inside].mean() == pytest.approx(value, abs=1e-9)


@given(st.lists(st.tuples(UNIT, st.integers(0, 1)), min_size=1, max_size=40), st.integers(1, 15))
@settings(deadline=None)
def test_the_calibration_error_lies_between_that_of_one_bin_and_the_mean_distance(data, bins):
    confidence, right = np.array(data).T
    error = one(calibration_error(confidence, right, bins=bins))
    assert abs((confidence - right).mean()) - 1e-9 <= error <= np.abs(confidence - right).mean() + 1e-9


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
@settings(deadline=None)
def test_spearman_knows_only_the_order(pairs):
    x, y = np.array(pairs, dtype=float).T
    np.testing.assert_allclose(spearman(x, y), spearman(np.exp(x), y**3), atol=1e-9)
    np.testing.assert_allclose(spearman(x, y), -spearman(-x, y), atol=1e-9)
