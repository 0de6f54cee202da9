"""Golden vectors of the reward, worked by hand from eqs. 13 and 15; each check takes the module under test.

They are plain functions of a module, so that the mutation run can give them a broken one.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType

import numpy as np

NAN = np.nan
TAU = np.array([[1, 0.5, 0.8], [0, 0.7, 0.6], [1, 0.9, 0.4], [1, 0.2, 0.9]])
PHI = np.array([[1, 0.8, 0.5], [1, 0.6, 0.3], [1, 0.7, 0.4], [1, 0.9, 0.4]])
OMEGA = np.tile([0.5, 0.3, 0.2], (4, 1))
ALL = np.ones((4, 3), dtype=bool)
CATEGORY = np.array(["c"] * 4)
GROUP = np.array(["q1", "q1", "q2", "q2"])


def close(got: object, wanted: object, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(got, float), np.asarray(wanted, float), rtol=0, atol=atol)


def golden_two_by_two(m: ModuleType) -> None:
    """Two questions, two responses each, three items: rewards above 1 are right."""
    close(m.mean_confidence(PHI, ALL, CATEGORY), np.tile([1, 0.75, 0.4], (4, 1)))
    reward = m.rubric_reward(TAU, PHI, OMEGA, ALL, CATEGORY, GROUP)
    close(reward, [0.943953, 0.286744, 1.024884, 0.860930])
    close(m.advantage(reward, GROUP), [0.328605, -0.328605, 0.081977, -0.081977])
    normalized = m.rubric_reward(TAU, PHI, OMEGA, ALL, CATEGORY, GROUP, formula="normalized")
    close(normalized, [0.840373, 0.255280, 0.912422, 0.766460])
    weighted = m.rubric_reward(TAU, PHI, OMEGA, ALL, CATEGORY, GROUP, formula="weighted")
    close(weighted, [0.81, 0.33, 0.85, 0.74], 1e-12)
    best = m.rubric_reward(np.ones((4, 3)), PHI, OMEGA, ALL, CATEGORY, GROUP)
    close(best, [1.123256] * 4)


def golden_terms(m: ModuleType) -> None:
    """Every term of the first row: 3 x (.5x1x1, .3x.5x.75, .2x.8x.4) / 2.15."""
    terms = m.item_terms(TAU, PHI, OMEGA, ALL, CATEGORY, GROUP)
    close(terms[0], np.array([0.5, 0.1125, 0.064]) * 3 / 2.15, 1e-12)
    close(terms.sum(axis=1), m.rubric_reward(TAU, PHI, OMEGA, ALL, CATEGORY, GROUP), 1e-12)
    close(m.item_terms(TAU, PHI, OMEGA * 10, ALL, CATEGORY, GROUP), terms, 1e-12)


def golden_bounds(m: ModuleType) -> None:
    """R_max = 1 + rho Cov(w, phi): above 1 when the heavy items are the confident ones."""
    one = np.ones((1, 2), dtype=bool)
    for omega, phi, wanted in [
        ((0.9, 0.1), (1, 0.2), 1.533333),
        ((0.9, 0.1), (0.2, 1), 0.466667),
    ]:
        close(m.rubric_reward(np.ones((1, 2)), [phi], [omega], one, ["c"], ["q"]), [wanted])
    five = np.ones((1, 5), dtype=bool)
    omega = [(0.4, 0.2, 0.2, 0.1, 0.1)]
    close(m.rubric_reward(np.ones((1, 5)), [(1, 0.9, 0.7, 0.6, 0.5)], omega, five, ["c"], ["q"]), [1.121622])
    close(m.rubric_reward(np.ones((1, 5)), [(0.5, 0.6, 0.7, 0.9, 1)], omega, five, ["c"], ["q"]), [0.878378])


def golden_advantages(m: ModuleType) -> None:
    reward, group = [1, 0, 0.5, 0.25], [7] * 4
    close(m.advantage(reward, group), [0.5625, -0.4375, 0.0625, -0.1875], 1e-12)
    close(m.advantage(reward, group, baseline="leave_one_out"), [0.75, -0.583333, 0.083333, -0.25])
    close(m.advantage(reward, group, baseline="none"), reward, 0)
    scaled = [1.317157, -1.024455, 0.146351, -0.439052]
    close(m.advantage(reward, group, scale="group_std"), scaled)
    close(m.advantage(reward, group, scale="batch_std"), scaled)
    close(m.advantage([2, 0, 5], [1, 1, 2], baseline="none", scale="group_std"), [1.414114, 0, 0], 1e-6)


def golden_scales_differ(m: ModuleType) -> None:
    """Two groups of unlike spread: group_std divides each by its own, batch_std both by that of all rewards."""
    reward, group = [0, 1, 0, 10], [1, 1, 2, 2]
    half = 0.5 / (np.sqrt(0.5) + 1e-4)
    close(
        m.advantage(reward, group, scale="group_std"),
        [-half, half, -5 / (np.sqrt(50) + 1e-4), 5 / (np.sqrt(50) + 1e-4)],
    )
    std = np.std(reward, ddof=1) + 1e-4
    close(m.advantage(reward, group, scale="batch_std"), np.array([-0.5, 0.5, -5, 5]) / std)
    close(m.advantage([*reward, NAN], [*group, 2], scale="batch_std"), np.array([-0.5, 0.5, -5, 5, 0]) / std)
    close(m.advantage([3.0], [1], baseline="none", scale="batch_std"), [3.0], 0)
    close(m.advantage([1.0, 3.0], [1, 2], baseline="none", scale="batch_std"), np.array([1, 3]) / (np.sqrt(2) + 1e-4))


def golden_unscorable_is_absent(m: ModuleType) -> None:
    for baseline in ("group_mean", "leave_one_out"):
        for scale in ("none", "group_std", "batch_std"):
            got = m.advantage([0.2, 0.9, NAN], [7, 7, 7], baseline=baseline, scale=scale)
            assert got[2] == 0
            close(got[:2], m.advantage([0.2, 0.9], [7, 7], baseline=baseline, scale=scale), 0)
    assert m.advantage([0.3, NAN], [1, 1]).tolist() == [0, 0]
    assert m.advantage([0.3, NAN], [1, 1], baseline="leave_one_out").tolist() == [0, 0]
    close(m.advantage([1, 1, 0, NAN], [1] * 4), [1 / 3, 1 / 3, -2 / 3, 0], 1e-12)


def golden_equal_rewards(m: ModuleType) -> None:
    """Exactly 0, though 0.1 + 0.2 is not 0.3 and the mean of three 0.1 is not 0.1; and not for a real difference."""
    for baseline in ("group_mean", "leave_one_out"):
        for scale in ("none", "group_std", "batch_std"):
            got = m.advantage([0.1, 0.1, 0.1, 0.1 + 0.2, 0.3], [1, 1, 1, 2, 2], baseline=baseline, scale=scale)
            assert got.tolist() == [0] * 5
            terms = [[0.1, 0.0], [0.0, 0.1], [0.05, 0.05]]
            credit = m.item_credit(terms, [0.1, 0.1, 0.1], [1, 1, 1], baseline=baseline, scale=scale)
            assert credit.tolist() == [[0, 0]] * 3
    assert m.advantage([1e9, 1e9 + 1e-6], [1, 1]).tolist() == [0, 0]
    close(m.advantage([1e9, 1e9 + 1], [1, 1]), [-0.5, 0.5], 0)
    close(m.advantage([0, 3e-12], [1, 1]), [-1.5e-12, 1.5e-12], 1e-20)
    close(m.advantage([0, 2e-9], [1, 1]), [-1e-9, 1e-9], 1e-15)
    close(m.advantage([-1e-9, 1e-9], [1, 1], scale="group_std"), np.array([-1e-5, 1e-5]), 1e-9)


def golden_members_that_do_not_count(m: ModuleType) -> None:
    """They are compared and not compared with: worked by hand, group 1 has mean 0.5 and variance 0.5 without them."""
    reward, group, counts = [1, 0, 0.75, 3, 5], [1, 1, 1, 2, 2], [True, True, False, True, False]
    close(m.advantage(reward, group, counts_S=counts), [0.5, -0.5, 0.25, 0, 2], 0)
    close(m.advantage(reward, group, baseline="leave_one_out", counts_S=counts), [1, -1, 0.25, 0, 2], 0)
    close(m.advantage(reward, group, baseline="none", counts_S=counts), reward, 0)
    std = np.sqrt(0.5) + 1e-4
    close(
        m.advantage(reward, group, scale="group_std", counts_S=counts), np.array([0.5, -0.5, 0.25, 0, 0]) / std, 1e-12
    )
    got = m.advantage(reward, group, baseline="none", scale="group_std", counts_S=counts)
    close(got, np.array([1, 0, 0.75, 0, 0]) / std, 1e-12)
    std = np.std([1, 0, 3], ddof=1) + 1e-4
    got = m.advantage(reward, group, scale="batch_std", counts_S=counts)
    close(got, np.array([0.5, -0.5, 0.25, 0, 2]) / std, 1e-12)
    got = m.advantage(reward, group, baseline="leave_one_out", scale="batch_std", counts_S=counts)
    close(got, np.array([1, -1, 0.25, 0, 2]) / std, 1e-12)
    terms = [[0.5, 0.5], [0, 0], [0.75, 0], [1, 2], [5, 0]]
    credit = [[0.25, 0.25], [-0.25, -0.25], [0.5, -0.25], [0, 0], [4, -2]]
    close(m.item_credit(terms, reward, group, counts_S=counts), credit, 0)


def golden_nothing_to_compare_with(m: ModuleType) -> None:
    """Exactly 0 where nobody counts, where those that count tie with the member, and where their spread has to scale."""
    for baseline in ("group_mean", "leave_one_out"):
        for scale in ("none", "group_std", "batch_std"):
            how = {"baseline": baseline, "scale": scale}
            assert m.advantage([1, 0, 2], [1, 1, 2], counts_S=[False] * 3, **how).tolist() == [0, 0, 0]
            tie = m.advantage([0.3, 0.3, 0.1 + 0.2], [1, 1, 1], counts_S=[True, True, False], **how)
            assert tie.tolist() == [0, 0, 0]
            terms = [[0.3, 0], [0, 0.3], [0.1, 0.2]]
            credit = m.item_credit(terms, [0.3, 0.3, 0.1 + 0.2], [1] * 3, counts_S=[True, True, False], **how)
            assert credit.tolist() == [[0, 0]] * 3
            unscorable = m.advantage([NAN, 0.5, NAN], [1, 1, 1], counts_S=[True, False, False], **how)
            assert unscorable.tolist() == [0, 0, 0]
        close(m.advantage([1, 1, 0.5], [1] * 3, baseline=baseline, counts_S=[True, True, False]), [0, 0, -0.5], 0)
    assert m.advantage([1, 1, 0.5], [1] * 3, scale="group_std", counts_S=[1, 1, 0]).tolist() == [0, 0, 0]
    assert m.advantage([1, 0.5], [1] * 2, baseline="none", scale="group_std", counts_S=[0, 0]).tolist() == [0, 0]
    assert m.advantage([1, 0.5], [1] * 2, baseline="none", counts_S=[0, 0]).tolist() == [1, 0.5]
    # the same mean as the group's, by other items: a sum of 0, and still a credit
    credit = m.item_credit([[1, 0], [0, 0], [0, 0.5]], [1, 0, 0.5], [1] * 3, counts_S=[True, True, False])
    close(credit, [[0.5, 0], [-0.5, 0], [-0.5, 0.5]], 0)


def golden_credit(m: ModuleType) -> None:
    terms = m.item_terms(TAU, PHI, OMEGA, ALL, CATEGORY, GROUP)
    reward = terms.sum(axis=1)
    for baseline in ("group_mean", "leave_one_out", "none"):
        for scale in ("none", "group_std", "batch_std"):
            credit = m.item_credit(terms, reward, GROUP, baseline=baseline, scale=scale)
            close(credit.sum(axis=1), m.advantage(reward, GROUP, baseline=baseline, scale=scale), 1e-12)
    close(m.item_credit(terms, reward, GROUP)[0], (terms[0] - terms[1]) / 2, 1e-12)
    broken = m.item_credit([[0.5], [NAN], [0.1]], [0.5, NAN, 0.1], [1, 1, 1])
    close(broken, [[0.2], [0], [-0.2]], 1e-12)


def golden_missing(m: ModuleType) -> None:
    """A row missing more than half of its weight is dropped; else the group's mean stands in."""
    score = [[1, NAN], [0.5, 0.4], [0.2, 0.8]]
    valid = [[True, False], [True, True], [True, True]]
    confidence = [[1, NAN], [1, 0.5], [1, 0.5]]
    arguments = (["c"] * 3, ["q"] * 3)
    got = m.item_terms(score, confidence, [[1, 1]] * 3, valid, *arguments, formula="weighted")
    close(got, [[0.5, 0.3], [0.25, 0.2], [0.1, 0.4]], 1e-12)
    got = m.item_terms(score, confidence, [[1, 1.1]] * 3, valid, *arguments, formula="weighted")
    assert np.isnan(got[0]).all()
    close(got[1:], np.array([[0.5, 0.44], [0.2, 0.88]]) / 2.1, 1e-12)
    got = m.item_terms(score, confidence, [[1, 3]] * 3, valid, *arguments, formula="weighted", max_missing=0.8)
    close(got[0], [0.25, 0.45], 1e-12)
    got = m.item_terms(score, confidence, [[1, 1]] * 3, valid, *arguments, formula="weighted", max_missing=0.4)
    assert np.isnan(got[0]).all()
    # what a dropped row scored is not in the mean that stands in for its siblings
    score = [[0, NAN, 1.0], [1, 1, NAN], [1, 1, 0.5]]
    valid = [[True, False, True], [True, True, False], [True, True, True]]
    got = m.item_terms(score, np.ones((3, 3)), [[1, 8, 1]] * 3, valid, *arguments, formula="weighted")
    assert np.isnan(got[0]).all()
    close(got[1], [0.1, 0.8, 0.05], 1e-12)
    # but its confidence, which was measured, is in the mean confidence
    assert m.mean_confidence([[0.2], [0.8]], [[True], [True]], ["c", "c"]).tolist() == [[0.5], [0.5]]


def golden_item_nobody_has(m: ModuleType) -> None:
    score = [[1, NAN, 0.5], [0.6, NAN, 0.1]]
    valid = [[True, False, True]] * 2
    got = m.item_terms(score, np.full((2, 3), 0.5), [[1, 1, 2]] * 2, valid, ["c"] * 2, ["q"] * 2)
    close(got, [[1 / 3, 0, 1 / 3], [0.2, 0, 0.2 / 3]], 1e-12)
    normalized = m.item_terms(
        score, np.full((2, 3), 0.5), [[1, 1, 2]] * 2, valid, ["c"] * 2, ["q"] * 2, formula="normalized"
    )
    close(normalized, got, 1e-12)
    weighted = m.item_terms(
        score, np.full((2, 3), 0.5), [[1, 1, 2]] * 2, valid, ["c"] * 2, ["q"] * 2, formula="weighted"
    )
    close(weighted, got, 1e-12)
    points = m.item_terms(score, np.full((2, 3), 0.5), [[1, 1, 2]] * 2, valid, ["c"] * 2, ["q"] * 2, formula="points")
    close(points, got, 1e-12)


def golden_not_applicable(m: ModuleType) -> None:
    """Weight 0: as if the item were not there, whatever its cell holds."""
    got = m.rubric_reward([[1, NAN], [0.5, 0.5]], [[1, NAN], [1, 0.5]], [[1, 0], [1, 1]], [[True, True], [True, True]],
                          ["c"] * 2, ["a", "b"])  # fmt: skip
    close(got, [1, 0.5], 1e-12)
    assert np.isnan(m.rubric_reward([[1.0]], [[1.0]], [[0.0]], [[True]], ["c"], ["q"])).all()
    none = np.zeros((1, 0))
    assert np.isnan(m.rubric_reward(none, none, none, none, ["c"], ["q"])).tolist() == [True]
    assert m.mean_confidence([[1.0], [0.5]], [[True], [False]], ["c", "d"])[0] == 1
    assert np.isnan(m.mean_confidence([[1.0], [0.5]], [[True], [False]], ["c", "d"])[1]).all()


def golden_polarity(m: ModuleType) -> None:
    undesirable = [[False, True]] * 2
    one = ([[0.8, 1.0], [0.6, 0.25]], [[1, 1], [1, 1]], [[2, 1]] * 2, [[True, True]] * 2, ["c"] * 2, ["q"] * 2)
    close(m.rubric_reward(*one, formula="weighted", undesirable_SJ=undesirable), [1.6 / 3, (1.2 + 0.75) / 3], 1e-12)
    close(m.item_terms(*one, formula="points", undesirable_SJ=undesirable), [[0.8, -0.5], [0.6, -0.125]], 1e-12)
    both = [[True, True]] * 2
    assert np.isnan(m.rubric_reward(*one, formula="points", undesirable_SJ=both)).all()
    close(m.rubric_reward(*one, undesirable_SJ=both), [0.4 / 3, (0.8 + 0.75) / 3], 1e-12)


def golden_gate(m: ModuleType) -> None:
    score = [[0.2, NAN, NAN], [0.9, 1, 1], [0.9, 0.1, NAN], [NAN, 0.5, 1]]
    valid = [[True, False, False], [True] * 3, [True, True, False], [False, True, True]]
    gate = [[-1, NAN, NAN], [NAN] * 3, [NAN, 0.25, NAN], [-1, NAN, NAN]]
    got = m.item_terms(
        score, np.ones((4, 3)), [[1, 1, 2]] * 4, valid, ["c"] * 4, ["q"] * 4, formula="weighted", gate_SJ=gate
    )
    close(got[0], [-1, 0, 0], 0)
    close(got[1], [0.225, 0.25, 0.5], 1e-12)
    close(got[2], [0, 0.25, 0], 0)
    close(got[3], [(0.2 + 0.9 + 0.9) / 3 / 4, 0.125, 0.5], 1e-12)
    twice = m.item_terms([[0.1, 0.1]], [[1, 1]], [[1, 1]], [[True, True]], ["c"], ["q"], gate_SJ=[[0.3, 0.7]])
    close(twice, [[0.3, 0]], 0)
    elsewhere = m.item_terms([[0.1, 0.5]], [[1, 1]], [[0, 1]], [[True, True]], ["c"], ["q"], gate_SJ=[[0.3, NAN]])
    close(elsewhere, [[0, 0.5]], 0)


def golden_confidence_that_does_not_vote(m: ModuleType) -> None:
    """A score that was set, not measured, counts with the mean confidence of those that were."""
    close(m.mean_confidence([[NAN], [0.4]], [[True], [True]], ["c"] * 2), [[0.4], [0.4]], 0)
    got = m.rubric_reward(
        [[0, 1], [1, 0]], [[NAN, 1], [0.5, 1]], [[1, 1]] * 2, [[True, True]] * 2, ["c"] * 2, ["q"] * 2
    )
    close(got, [1 / 1.5, 0.5 / 1.5], 1e-12)
    got = m.rubric_reward(
        [[0, 1], [1, 0]], [[NAN, 1], [NAN, 1]], [[1, 1]] * 2, [[True, True]] * 2, ["c"] * 2, ["q"] * 2
    )
    close(got, [1, 0], 1e-12)
    plain = m.rubric_reward([[0, 1], [1, 0]], np.full((2, 2), NAN), [[1, 3]] * 2, [[True, True]] * 2, ["c"] * 2, ["q"] * 2,
                            formula="weighted")  # fmt: skip
    close(plain, [0.75, 0.25], 1e-12)


def golden_no_confidence(m: ModuleType) -> None:
    """All mean confidences 0: unscorable, with a warning that names the category; one of 0 still counts in rho."""
    arguments = ([[1, 0.5]] * 2, np.zeros((2, 2)), [[1, 1]] * 2, [[True, True]] * 2, ["calm"] * 2, ["q"] * 2)
    for formula in ("grape", "normalized"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert np.isnan(m.rubric_reward(*arguments, formula=formula)).all()
        assert [str(w.message) for w in caught] == ["every mean confidence of calm is 0: unscorable"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(m.rubric_reward(*arguments, formula="weighted"), [0.75, 0.75], 0)
        half = m.rubric_reward([[1, 0.5]], [[0.5, 0]], [[1, 1]], [[True, True]], ["c"], ["q"])
        close(half, [1.0], 0)
        gate = [[0.3, NAN]]
        close(m.rubric_reward([[0.0, 1]], [[0, 0]], [[1, 1]], [[True, True]], ["c"], ["q"], gate_SJ=gate), [0.3], 0)
        nothing = m.rubric_reward([[NAN, NAN]], [[NAN, NAN]], [[1, 1]], [[False, False]], ["c"], ["q"])
        assert np.isnan(nothing).all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        many = [f"c{i}" for i in range(5)]
        m.item_terms(np.ones((5, 1)), np.zeros((5, 1)), np.ones((5, 1)), np.ones((5, 1)), many, many)
        m.item_terms(np.ones((4, 1)), np.zeros((4, 1)), np.ones((4, 1)), np.ones((4, 1)), many[:4], many[:4])
        three = many[:3]
        m.item_terms(np.ones((3, 1)), np.zeros((3, 1)), np.ones((3, 1)), np.ones((3, 1)), three, three)
    assert [str(w.message) for w in caught] == [
        "every mean confidence of c0, c1, c2 and 2 more is 0: unscorable",
        "every mean confidence of c0, c1, c2 and 1 more is 0: unscorable",
        "every mean confidence of c0, c1, c2 is 0: unscorable",
    ]
    assert {Path(w.filename).stem for w in caught} == {"golden"}, "the warning points at the caller"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        m.item_terms([[1, 1]], [[0, 1]], [[1, 0]], [[True, True]], ["c"], ["q"])
    assert len(caught) == 1, "an item that does not apply lends no confidence"


def golden_refusals(m: ModuleType) -> None:
    """What cannot be meant is an error, not a number."""
    cell = ([[0.5]], [[1.0]], [[1.0]], [[True]], ["c"], ["q"])
    for call in (
        lambda: m.item_terms(*cell, formula="median"),
        lambda: m.item_terms([[NAN]], *cell[1:]),
        lambda: m.item_terms([[np.inf]], *cell[1:]),
        lambda: m.advantage([1.0, np.inf], [1, 1]),
        lambda: m.advantage([1.0], [1], baseline="median"),
        lambda: m.advantage([1.0], [1], scale="mad"),
    ):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("accepted")


def golden_categories_apart(m: ModuleType) -> None:
    """Confidence is averaged within a category, scores within a group, and never across."""
    score, weight = [[1, 0], [0, 1], [1, 0], [0, 1]], [[1, 1]] * 4
    confidence = [[1, 0.2], [1, 0.6], [0.5, 0.5], [0.5, 0.5]]
    category, group = ["a", "a", "b", "b"], ["q", "r", "s", "s"]
    reward = m.rubric_reward(score, confidence, weight, np.ones((4, 2)), category, group)
    close(reward, [1 / 1.4, 0.4 / 1.4, 0.5, 0.5], 1e-12)
    holes = [[True, True], [True, True], [True, False], [True, True]]
    close(m.item_terms(score, confidence, weight, holes, category, group, formula="weighted")[2], [0.5, 0.5], 1e-12)
    filled = m.impute([[1.0, NAN], [0.0, 0.25], [NAN, NAN]], [[True, False], [True, True], [False, False]], [1, 1, 2])
    close(filled, [[1, 0.25], [0, 0.25], [NAN, NAN]], 0)


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("golden_")]
