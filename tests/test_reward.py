"""Eq. 15 and the advantage: golden vectors, the properties that follow from them, and a mutation run."""

from __future__ import annotations

import numpy as np
import pytest
from golden import CHECKS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mutants import survivors

from grape import reward as module
from grape.reward import advantage, item_credit, item_terms, mean_confidence, rubric_reward

UNIT = st.floats(0, 1, width=32)
POSITIVE = st.floats(0.015625, 1, width=32)
BASELINES = st.sampled_from(["group_mean", "leave_one_out", "none"])
SCALES = st.sampled_from(["none", "group_std", "batch_std"])


@st.composite
def batches(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Two categories, up to four questions, groups of unlike size, one item set a category; some cells failed."""
    items = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    group = np.repeat(np.arange(len(sizes)), sizes)
    category = group % 2
    shape = (len(group), items)
    weight = draw(arrays(float, (2, items), elements=POSITIVE))[category]
    return {
        "score": draw(arrays(float, shape, elements=UNIT)),
        "confidence": draw(arrays(float, shape, elements=POSITIVE)),
        "weight": weight,
        "valid": draw(arrays(bool, shape, elements=st.booleans())),
        "category": category,
        "group": group,
    }


def call(batch: dict[str, np.ndarray], **changes: object) -> np.ndarray:
    names = ("score", "confidence", "weight", "valid", "category", "group")
    given = {**batch, **{name: changes.pop(name) for name in names if name in changes}}
    return rubric_reward(*(given[name] for name in names), **changes)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_golden_vectors_hold(check):
    check(module)


@given(batches(), st.floats(0.01, 1))
def test_only_relative_confidence_matters(batch, factor):
    np.testing.assert_allclose(call(batch), call(batch, confidence=batch["confidence"] * factor), atol=1e-9)


@given(batches(), POSITIVE)
def test_equal_confidences_give_the_plain_weighted_score(batch, phi):
    same = {**batch, "confidence": np.full_like(batch["score"], phi)}
    np.testing.assert_allclose(call(same), call(same, formula="weighted"), atol=1e-9)


@given(batches())
def test_a_reward_lies_between_zero_and_rho_times_the_heaviest_weight(batch):
    reward = call({**batch, "valid": np.ones_like(batch["valid"])})
    share = batch["weight"] / batch["weight"].sum(axis=1, keepdims=True)
    assert (reward >= 0).all()
    assert (reward <= share.shape[1] * share.max(axis=1) + 1e-9).all()


@given(batches())
def test_one_item_gives_its_score(batch):
    one = {name: value[:, :1] if value.ndim == 2 else value for name, value in batch.items()}
    one["valid"] = np.ones_like(one["valid"])
    np.testing.assert_allclose(call(one), one["score"][:, 0], atol=1e-12)


@given(batches())
def test_the_reward_is_the_normalized_one_times_a_constant_of_the_category(batch):
    whole = {**batch, "valid": np.ones_like(batch["valid"])}
    best = call({**whole, "score": np.ones_like(batch["score"])})
    np.testing.assert_allclose(call(whole), best * call(whole, formula="normalized"), atol=1e-9)
    for category in np.unique(batch["category"]):
        assert np.ptp(best[batch["category"] == category]) < 1e-9


@given(batches())
def test_masked_cells_may_hold_anything(batch):
    poisoned = {
        **batch,
        "score": np.where(batch["valid"], batch["score"], np.nan),
        "confidence": np.where(batch["valid"], batch["confidence"], np.inf),
    }
    np.testing.assert_array_equal(call(batch), call(poisoned))


@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_responses_does_not_matter(batch, random):
    order = np.array(random.sample(range(len(batch["group"])), len(batch["group"])))
    shuffled = {name: value[order] for name, value in batch.items()}
    reward = call(batch)
    np.testing.assert_allclose(call(shuffled), reward[order], atol=1e-12)
    np.testing.assert_allclose(advantage(reward[order], batch["group"][order]), advantage(reward, batch["group"])[order],
                               atol=1e-12)  # fmt: skip


@given(batches())
def test_advantages_of_a_group_sum_to_zero_and_leave_one_out_is_n_over_n_minus_one_of_them(batch):
    reward = call(batch)
    got, loo = advantage(reward, batch["group"]), advantage(reward, batch["group"], baseline="leave_one_out")
    for group in np.unique(batch["group"]):
        rows = (batch["group"] == group) & ~np.isnan(reward)
        assert abs(got[rows].sum()) < 1e-9
        if rows.sum() > 1:
            np.testing.assert_allclose(loo[rows], got[rows] * rows.sum() / (rows.sum() - 1), atol=1e-9)
        else:
            assert (got[rows] == 0).all()


@given(batches())
def test_a_mean_confidence_is_one_number_for_a_category_and_item(batch):
    phi = mean_confidence(batch["confidence"], batch["valid"], batch["category"])
    for category in np.unique(batch["category"]):
        rows = batch["category"] == category
        for j in range(phi.shape[1]):
            votes = batch["confidence"][rows, j][batch["valid"][rows, j]]
            if len(votes):
                np.testing.assert_allclose(phi[rows, j], votes.mean(), atol=1e-12)
            else:
                assert np.isnan(phi[rows, j]).all()


@given(batches(), BASELINES, SCALES)
@settings(max_examples=200)
def test_credit_sums_to_the_advantage(batch, baseline, scale):
    terms = item_terms(*(batch[n] for n in ("score", "confidence", "weight", "valid", "category", "group")))
    reward = terms.sum(axis=1)
    credit = item_credit(terms, reward, batch["group"], baseline=baseline, scale=scale)
    wanted = advantage(reward, batch["group"], baseline=baseline, scale=scale)
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(credit.sum(axis=1), wanted, atol=1e-7)


@given(batches(), BASELINES, SCALES)
def test_where_all_count_nothing_changes_by_a_bit(batch, baseline, scale):
    reward, how = call(batch), {"baseline": baseline, "scale": scale}
    plain = advantage(reward, batch["group"], **how)
    np.testing.assert_array_equal(plain, advantage(reward, batch["group"], counts_S=np.ones(len(reward)), **how))
    terms = item_terms(*(batch[n] for n in ("score", "confidence", "weight", "valid", "category", "group")))
    np.testing.assert_array_equal(
        item_credit(terms, reward, batch["group"], **how),
        item_credit(terms, reward, batch["group"], counts_S=[True] * len(reward), **how),
    )


@given(batches(), BASELINES, SCALES, st.data())
@settings(max_examples=200)
def test_a_member_that_does_not_count_changes_nobody_else_by_a_bit(batch, baseline, scale, data):
    reward, group, how = call(batch), batch["group"], {"baseline": baseline, "scale": scale}
    counts = data.draw(arrays(bool, len(group), elements=st.booleans()))
    got = advantage(reward, group, counts_S=counts, **how)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[counts], advantage(reward[counts], group[counts], **how))
    for i in np.flatnonzero(~counts):
        alone = counts.copy()
        alone[i] = True  # the others that do not count are as if absent
        with_one = advantage(reward[alone], group[alone], counts_S=counts[alone], **how)
        assert with_one[alone[:i].sum()] == got[i]


@given(batches(), SCALES, st.data())
def test_a_member_that_does_not_count_gets_its_reward_less_the_mean_of_those_that_do(batch, scale, data):
    reward, group = call(batch), batch["group"]
    counts = data.draw(arrays(bool, len(group), elements=st.booleans()))
    for baseline in ("group_mean", "leave_one_out"):
        got = advantage(reward, group, baseline=baseline, counts_S=counts)
        for i in np.flatnonzero(~counts & ~np.isnan(reward)):
            siblings = reward[counts & (group == group[i]) & ~np.isnan(reward)]
            wanted = reward[i] - siblings.mean() if len(siblings) else 0
            assert got[i] == pytest.approx(wanted, abs=1e-9)
    terms = item_terms(*(batch[n] for n in ("score", "confidence", "weight", "valid", "category", "group")))
    credit = item_credit(terms, reward, group, scale=scale, counts_S=counts)
    wanted = advantage(reward, group, scale=scale, counts_S=counts)
    np.testing.assert_allclose(credit.sum(axis=1), wanted, atol=1e-7)


def test_inverse_variance_confidence_reduces_variance_for_equal_weights_and_need_not_for_others():
    """Lemma 8.1 in closed form, and its counter-example: Var(R) = rho^2 sum(w^2 s^2 phi^2) / (sum phi)^2, phi = 1/s^2."""

    def variances(omega: list[float], variance: list[float]) -> tuple[float, float]:
        phi = 1 / np.array(variance)
        ones = np.ones((1, len(omega)), dtype=bool)
        gain = np.array([
            item_terms(np.eye(len(omega))[[j]], [phi], [omega], ones, ["c"], ["q"])[0, j] for j in range(len(omega))
        ])  # fmt: skip
        return float((np.square(omega) * variance).sum()), float((gain**2 * variance).sum())

    plain, weighted = variances([0.5, 0.5], [0.1, 1.0])
    assert plain == pytest.approx(0.275)
    assert weighted == pytest.approx(0.0909, abs=1e-4)
    assert variances([0.7, 0.3], [0.1, 1.0]) == pytest.approx((0.139, 0.165), abs=5e-4)
    assert variances([0.9, 0.1], [0.1, 1.0]) == pytest.approx((0.091, 0.268), abs=5e-4)


@pytest.mark.slow
def test_every_mutant_of_the_reward_is_caught_by_a_golden_vector():
    alive, total = survivors(module, CHECKS)
    assert total > 140
    # Two comparisons allow for rounding: `<=` and `<` differ there only at a value that no input reaches.
    assert [line.split(": ")[1:3] for line in alive] == [
        ["LtE", "kept = gated | (applies.any(axis=1) & (missing <= (max_missing + TIE) * weight.sum(axis=1)))"],
        ["Gt", "alive = distance > TIE * np.maximum(1.0, np.abs(mean))  # never where one of them is NaN"],
    ]
