"""A judged batch settled: failures, gates and policies, by the verdicts alone."""

from __future__ import annotations

import pytest

from grape.batch import Judged, settle
from grape.plan import plan_rows
from grape.rows import read_rows
from grape.rubric import parse_rubric
from grape.types import Outcome, Verdict

ITEM = {"criterion": "c", "judge": "default", "weight": 1}


def batch(items, *cells, formula="grape", groups=None, own=None):
    """Judged responses from (score, confidence) pairs or outcomes, one row of cells a response."""
    rubric = {"rubric": "r", "formula": formula, "items": [{**ITEM, **item} for item in items]}
    groups = groups or ["q"] * len(cells)
    rows = [
        {"question_id": g, "category": "r", "question": g, "response": str(n), "items": (own or {}).get(g)}
        for n, g in enumerate(groups)
    ]
    read = read_rows(rows)
    plans = plan_rows(read, {"r": parse_rubric(rubric, "f.yaml")})
    judged = []
    for response, row in zip(read.responses, cells, strict=True):
        plan = plans[response.question_id]
        verdicts = {item.id: verdict(item.id, cell) for item, cell in zip(plan.leaves, row, strict=True)}
        judged.append(Judged(response=response, plan=plan, verdicts=verdicts))
    return judged


def verdict(item, cell):
    if isinstance(cell, Outcome):
        return Verdict(item=item, outcome=cell)
    return Verdict(item=item, outcome=Outcome.OK, score=cell[0], confidence=cell[1])


A, B = {"id": "a"}, {"id": "b"}


def test_a_failed_verdict_is_neutral_and_not_zero():
    one, two, three = settle(batch([A, B], [(1, 1), (0.4, 1)], [(0, 1), (0.8, 1)], [(0.5, 1), Outcome.TIMEOUT]))
    assert (one.reward, two.reward) == pytest.approx((0.7, 0.4))
    assert three.reward == pytest.approx(0.55)
    assert three.imputed == pytest.approx({"b": 0.6})
    assert three.credit["b"] == pytest.approx(0)
    assert one.imputed == {}


def test_the_mean_confidence_is_over_the_whole_category_and_only_over_valid_verdicts():
    judged = batch(
        [A, B], [(1, 1), (1, 0.2)], [(1, 0.5), (0, 0.6)], [(0, 0.9), Outcome.REFUSED], groups=["q", "q", "p"]
    )
    results = settle(judged)
    assert results[0].confidence == pytest.approx({"a": 0.8, "b": 0.4})
    assert results[2].confidence == pytest.approx({"a": 0.8, "b": 0.4})
    assert results[0].reward == pytest.approx(1)
    assert results[1].reward == pytest.approx(0.8 / 1.2)
    assert results[1].normalized == pytest.approx(0.8 / 1.2)
    assert results[1].weighted == 0.5


def test_a_response_missing_more_than_half_its_weight_is_unscorable_with_the_reason():
    heavy = {"id": "b", "weight": 3}
    one, two = settle(batch([A, heavy], [(1, 1), (1, 1)], [(0, 1), Outcome.UNPARSABLE]))
    assert (two.reward, two.advantage, two.unscorable) == (None, 0, "75% of the weight failed: b (unparsable)")
    assert (one.reward, one.advantage) == (1, 0)


def test_drop_makes_a_response_unscorable_and_worst_scores_it_zero():
    good = [(1, 1), (0.5, 1)]
    one, two = settle(batch([A, {**B, "on_failure": "drop"}], good, [(1, 1), Outcome.REFUSED]))
    assert (two.reward, two.unscorable) == (None, "b failed (refused) and says on_failure: drop")
    assert one.advantage == 0
    one, two = settle(batch([A, {**B, "on_failure": "worst"}], good, [(1, 1), Outcome.REFUSED]))
    assert (one.reward, two.reward) == (0.75, 0.5)
    assert two.imputed == {"b": 0}
    assert two.confidence["b"] == 1
    bad = {**B, "on_failure": "worst", "polarity": "undesirable"}
    one, two = settle(batch([A, bad], good, [(1, 1), Outcome.REFUSED]))
    assert (one.reward, two.reward) == (0.75, 0.5)
    assert two.imputed == {"b": 1}


def test_a_failed_gate_sets_the_reward_after_polarity_and_a_failed_verdict_does_not_gate():
    gate = {**B, "polarity": "undesirable", "gate": {"at_least": 0.5, "reward": -1}}
    one, two, three = settle(
        batch([A, gate], [Outcome.SKIPPED, (0.9, 1)], [(1, 1), (0.5, 1)], [(1, 1), Outcome.TRANSPORT])
    )
    assert (one.reward, one.gate, one.unscorable) == (-1, "b", None)
    assert one.credit == pytest.approx({"a": -2 / 3 * 0.5, "b": one.advantage + 1 / 3})
    assert (two.reward, two.gate) == (0.75, None)
    assert three.gate is None
    assert three.imputed == pytest.approx({"b": 0.7})


def test_a_skipped_item_is_never_imputed_and_never_the_worst():
    gate = {**A, "gate": {"at_least": 0.5, "reward": 0}}
    worst = {**B, "on_failure": "worst"}
    one, two, three = settle(batch([gate, worst], [(0, 1), Outcome.SKIPPED], [(1, 1), (0.6, 1)], [(1, 1), (1, 1)]))
    assert (one.reward, one.imputed) == (0, {})
    assert (two.reward, three.reward) == (0.8, 1)


def test_questions_with_items_of_their_own_are_settled_together():
    own = {
        "p": [{"id": "x", "criterion": "c", "judge": "default", "weight": 1}],
        "q": [{"id": "y", "criterion": "c", "judge": "default", "weight": 3},
              {"id": "x", "criterion": "c", "judge": "default", "weight": 1}],
    }  # fmt: skip
    judged = batch([A], [(1, 1), (1, 0.5)], [(0, 1), (0, 0.1)], [(1, 1), (0, 0.5), (1, 0.9)], groups=["p", "p", "q"],
                   own=own)  # fmt: skip
    results = settle(judged)
    assert results[0].confidence == pytest.approx({"a": 1, "x": 0.5})
    assert results[2].confidence == pytest.approx({"a": 1, "y": 0.5, "x": 0.5})
    assert results[2].reward == pytest.approx(3 * (0.2 * 1 + 0.2 * 0.5) / 2)
    assert results[0].advantage == pytest.approx(0.5)


def test_points_are_signed_and_need_a_positive_weight():
    fault = {**B, "polarity": "undesirable", "weight": 2}
    one, two = settle(batch([A, fault], [(1, 1), (1, 1)], [(1, 1), (0, 1)], formula="points"))
    assert (one.reward, two.reward) == (-1, 1)
    (only,) = settle(batch([fault], [(1, 1)], formula="points"))
    assert (only.reward, only.unscorable) == (None, "no item has a positive weight")


def test_no_confidence_at_all_is_unscorable_and_warned_of():
    with pytest.warns(UserWarning, match=r"every mean confidence of r \(question q\) is 0"):
        (one,) = settle(batch([A], [(1, 0)]))
    assert (one.reward, one.unscorable) == (None, "every mean confidence is 0")


def test_a_question_to_which_nothing_applies_is_unscorable():
    (one,) = settle(batch([{**A, "applies_when": {"has": "tests"}}], [Outcome.NOT_APPLICABLE]))
    assert (one.reward, one.unscorable, one.credit) == (None, "no item applies", {})


def test_a_failed_gate_stands_although_an_item_that_it_spared_would_drop_the_response():
    gate = {**A, "gate": {"at_least": 0.5, "reward": -1}}
    one, two = settle(batch([gate, {**B, "on_failure": "drop"}], [(0, 1), Outcome.SKIPPED], [(1, 1), (1, 1)]))
    assert (one.reward, one.gate, one.unscorable) == (-1, "a", None)
    assert (one.advantage, two.advantage) == (-1, 1)


def test_what_a_dropped_response_scored_stands_in_for_nobody():
    items = [A, {"id": "b", "weight": 8}, {"id": "c"}]
    one, two, three = settle(
        batch(items, [(0, 1), Outcome.TIMEOUT, (1, 1)], [(1, 1), (1, 1), Outcome.TIMEOUT], [(1, 1), (1, 1), (0.5, 1)])
    )
    assert (one.reward, one.imputed) == (None, {})
    assert two.imputed == {"c": 0.5}
    assert (two.reward, three.reward) == pytest.approx((0.95, 0.95))
