"""A judged batch settled: failures, gates and policies, by the verdicts alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grape.batch import Judged, not_judged, settle
from grape.log import Log
from grape.plan import plan_rows
from grape.records import reward_row, step_row, verdict_rows
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


def test_an_item_that_nobody_could_judge_and_is_the_worst_counts_with_confidence_one():
    one, two = settle(batch([A, {**B, "on_failure": "worst"}], *[[(score, 0.5), Outcome.TIMEOUT] for score in (1, 0)]))
    assert one.confidence == two.confidence == {"a": 0.5, "b": 1}
    assert (one.reward, two.reward) == pytest.approx((2 * 0.25 / 1.5, 0))


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


def cut(judged, place, reward=None):
    """The batch with one response that was not judged."""
    one = judged[place]
    return [*judged[:place], not_judged(one.plan, one.response, "cut at 8 tokens", reward), *judged[place + 1 :]]


def test_a_response_that_was_not_judged_is_unscorable_and_as_if_absent():
    items = [
        A,
        {**B, "on_failure": "worst"},
        {"id": "c", "on_failure": "drop", "gate": {"at_least": 0.5, "reward": -1}},
    ]
    whole = batch(items, [(1, 1), (1, 0.5), (1, 0.2)], [(0, 0), (0, 0), (0, 0)], [(0.5, 1), (0.2, 0.7), (1, 0.4)])
    for limit in (0.5, 1.0):  # no share of missing weight makes it scorable
        one, two, three = settle(cut(whole, 1), max_missing=limit)
        assert (two.reward, two.normalized, two.weighted, two.advantage) == (None, None, None, 0)
        assert (two.unscorable, two.gate, two.imputed, two.in_baseline) == ("cut at 8 tokens", None, {}, False)
        assert two.credit == {"a": 0, "b": 0, "c": 0}
        assert [one, three] == settle([whole[0], whole[2]], max_missing=limit)
    every = [not_judged(judged.plan, judged.response, "cut") for judged in whole]
    assert [result.unscorable for result in settle(every, max_missing=1.0)] == ["cut"] * 3


def test_a_response_that_was_not_judged_can_have_its_reward_set_without_a_vote_on_confidence():
    whole = batch([A, B], [(1, 1), (1, 0.5)], [(0, 0), (0, 0)], [(0.5, 1), (0, 0.5)])
    results = settle(cut(whole, 1, -0.5))
    one, two, three = results
    assert (two.reward, two.normalized, two.weighted, two.unscorable) == (-0.5, -0.5, -0.5, None)
    assert (two.in_baseline, two.imputed, two.penalty) == (True, {}, 0)
    assert one.confidence == two.confidence == {"a": 1, "b": 0.5}
    assert (one.reward, three.reward) == pytest.approx((1, 1 / 3))
    mean = (1 - 0.5 + 1 / 3) / 3
    assert [result.advantage for result in results] == pytest.approx([1 - mean, -0.5 - mean, 1 / 3 - mean])
    assert two.credit == pytest.approx({"a": -(2 / 3 + 1 / 3) / 3, "b": -(1 / 3) / 3, "+cut": -0.5 + 0.5 / 3})
    assert one.credit["+cut"] == pytest.approx(0.5 / 3)
    for result in results:
        assert sum(result.credit.values()) == pytest.approx(result.advantage)


def test_a_set_reward_stands_where_no_item_applies():
    (only,) = batch([{**A, "applies_when": {"has": "tests"}}], [Outcome.NOT_APPLICABLE])
    (one,) = settle(cut([only], 0, -1), baseline="none")
    assert (one.reward, one.advantage, one.credit) == (-1, -1, {"+cut": -1})
    assert one.confidence == {}


def test_the_verdicts_of_a_response_that_was_not_judged_are_skipped_with_the_reason():
    (only,) = batch([A, {**B, "applies_when": {"has": "tests"}}], [(1, 1), Outcome.NOT_APPLICABLE])
    one = not_judged(only.plan, only.response, "cut at 8 tokens")
    assert {name: (v.outcome, v.detail, v.attempts) for name, v in one.verdicts.items()} == {
        "a": ("skipped", "cut at 8 tokens", 0),
        "b": ("not_applicable", None, 0),
    }
    with pytest.raises(AssertionError, match="only a response that was not judged has its reward set"):
        replace(only, cut_reward=0.5)


def test_terms_beside_the_rubrics_join_before_the_baseline_and_leave_the_reward_its_own():
    gate = {**A, "gate": {"at_least": 0.5, "reward": 0.2}}
    whole = batch([gate, B], [(1, 1), (1, 1)], [(0, 1), Outcome.SKIPPED], [(1, 1), (0, 1)], [(1, 1), (0, 1)])
    whole = cut(cut(whole, 3), 2, 0.1)
    extra = {"length": [-0.5, -0.25, -1, -0.75], "tone": [0, 0, 0.5, 0]}
    results = settle(whole, extra=extra)
    assert [result.reward for result in results] == [1, 0.2, 0.1, None]
    assert [result.weighted for result in results] == [1, 0.2, 0.1, None]
    assert [result.penalty for result in results] == [-0.5, -0.25, -0.5, -0.75]
    totals = np.array([0.5, -0.05, -0.4])
    assert [result.advantage for result in results] == pytest.approx([*(totals - totals.mean()), 0])
    assert results[0].credit["+length"] == pytest.approx(-0.5 + 1.75 / 3)
    assert results[1].credit["+tone"] == pytest.approx(-0.5 / 3)
    assert set(results[0].credit) == {"a", "b", "+length", "+tone", "+cut"}
    assert results[3].credit == dict.fromkeys(results[0].credit, 0)
    for result in results:
        assert sum(result.credit.values()) == pytest.approx(result.advantage)
    nothing = settle(whole, extra={"length": [0.0] * 4})
    plain = settle(whole)
    assert [result.advantage for result in nothing] == [result.advantage for result in plain]


@pytest.mark.parametrize(
    ("name", "values"), [("length", [0.0]), ("length", [0.0, np.nan]), ("length", [0.0, np.inf]), ("cut", [0.0, 0.0])]
)
def test_a_term_that_is_no_finite_number_for_each_response_is_refused(name, values):
    message = f"^extra '{name}': one finite number a response is needed, and a name other than cut$"
    with pytest.raises(ValueError, match=message):
        settle(batch([A], [(1, 1)], [(0, 1)]), extra={name: values})


def test_members_in_a_context_of_their_own_have_a_baseline_of_their_own_and_lend_stand_ins_to_the_question():
    whole = batch([A, B], [(1, 1), (1, 1)], [(0, 1), Outcome.TIMEOUT], [(1, 1), (0.5, 1)], [(0.5, 1), (0.5, 1)])
    results = settle(whole, groups=["fresh", "fresh", "improved", "improved"])
    assert results[1].imputed == pytest.approx({"b": 2 / 3})
    assert [result.reward for result in results] == pytest.approx([1, 1 / 3, 0.75, 0.5])
    assert [result.advantage for result in results] == pytest.approx([1 / 3, -1 / 3, 0.125, -0.125])
    assert results[2].credit == pytest.approx({"a": 0.125, "b": 0})
    with pytest.raises(AssertionError, match="group 'x' mixes questions"):
        settle(batch([A], [(1, 1)], [(1, 1)], groups=["q", "p"]), groups=["x", "x"])


def test_members_that_do_not_count_are_compared_with_those_that_do():
    whole = batch([A], [(1, 1)], [(0, 1)], [(0.75, 0.1)], [Outcome.TIMEOUT])
    results = settle(whole, counts=[True, True, False, True])
    assert [result.advantage for result in results] == pytest.approx([0.5, -0.5, 0.25, 0])
    assert [result.in_baseline for result in results] == [True, True, False, False]
    assert results[2].credit == pytest.approx({"a": 0.25})
    alone = settle(whole, baseline="leave_one_out", counts=[True, True, False, True])
    assert [result.advantage for result in alone] == pytest.approx([1, -1, 0.25, 0])


CELL = st.one_of(st.tuples(st.floats(0, 1), st.floats(0, 1)), st.sampled_from([Outcome.TIMEOUT, Outcome.UNPARSABLE]))
GOOD = st.tuples(st.floats(0, 1), st.floats(0.1, 1))


@given(
    st.lists(st.lists(st.tuples(GOOD, GOOD, GOOD), min_size=1, max_size=4), min_size=2, max_size=4),
    st.sampled_from(["grape", "weighted"]),
    st.data(),
)
def test_groups_without_a_failed_verdict_keep_their_scores_to_the_bit_whatever_fails_elsewhere(groups, formula, data):
    """And under `weighted`, which mean confidence does not enter, their rewards, advantages and credits."""
    items = [{"id": "a", "weight": 3}, {"id": "b", "on_failure": "worst"}, {"id": "c", "on_failure": "drop"}]
    names = [f"q{place}" for place, rows in enumerate(groups) for _ in rows]
    broken = data.draw(st.sets(st.sampled_from(sorted(set(names))), max_size=len(groups) - 1))
    cells = [row for rows in groups for row in rows]
    failing = [
        tuple(data.draw(CELL) for _ in row) if name in broken else row for name, row in zip(names, cells, strict=True)
    ]
    before = settle(batch(items, *cells, formula=formula, groups=names))
    after = settle(batch(items, *failing, formula=formula, groups=names))
    for name, one, two in zip(names, before, after, strict=True):
        if name in broken:
            continue
        assert (one.weighted, one.imputed, one.unscorable) == (two.weighted, {}, None)
        if formula == "weighted":
            assert (one.reward, one.advantage, one.credit) == (two.reward, two.advantage, two.credit)


def test_the_log_counts_no_failure_for_a_response_that_was_not_judged(tmp_path):
    whole = batch([A, B], [(1, 1), (1, 0.5)], [(0, 1), (0, 0.5)], [(0, 1), Outcome.TIMEOUT], [(0, 1), (0, 0.5)])
    judged = cut(cut(whole, 1), 3, -1)
    results = settle(judged, extra={"length": [-0.5, 0, 0, 0]}, counts=[True, True, True, False])
    now = datetime.now(UTC)
    pairs = list(zip(judged, results, strict=True))
    row = step_row("r", 1, judged, results, now)
    assert (row["num_verdicts"], row["num_failed"], row["num_unscorable"]) == (8, 1, 1)
    with Log(tmp_path / "log.duckdb") as log:
        log.append(
            verdicts=[row for pair in pairs for row in verdict_rows("r", 1, *pair, {}, now)],
            rewards=[reward_row("r", 1, *pair, "group_mean", "none", now) for pair in pairs],
            steps=[row],
        )
        log.flush()
        stored = log.query("SELECT reward, penalty, in_baseline, unscorable FROM rewards ORDER BY response_id")
        assert stored == [
            (1, -0.5, True, None),
            (None, 0, False, "cut at 8 tokens"),
            (pytest.approx(1 / 3), 0, True, None),
            (-1, 0, False, None),
        ]
        assert log.query("SELECT item, n, mean_confidence, share_failed FROM item_health ORDER BY item") == [
            ("a", 2, 1.0, 0.0),
            ("b", 2, 0.5, 0.5),
        ]
        assert log.query("SELECT response_id, num_failed FROM failure_siblings") == [
            (judged[2].response.response_id, 1)
        ]
        credit = "SELECT credit FROM item_credit WHERE item = '+length' ORDER BY response_id"
        assert log.query(credit) == [(-0.25,), (0.0,), (0.25,), (0.25,)]
