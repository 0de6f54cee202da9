from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grape.log import Log
from grape.log.query import sql


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with Log(tmp_path / "log.duckdb") as log:
        yield log


def verdict(question: str, response: str, item: str, score: float | None = None, **more: Any) -> dict[str, Any]:
    row = {"run": "r", "step": 0, "question_id": question, "response_id": response, "category": "math", "item": item}
    judged = {"outcome": "ok", "score": score, "confidence": 0.5, "applicable": True, "weight": 0.5}
    return {**row, "rubric": "math", "rubric_hash": "h", "kind": "judge", "judge": "default", **judged, **more}


def failed(question: str, response: str, item: str, outcome: str, **more: Any) -> dict[str, Any]:
    return verdict(question, response, item, outcome=outcome, confidence=None, **more)


def records(log: Log, query: str) -> list[dict[str, Any]]:
    log.flush()
    result = sql(query, log.path)
    return [dict(zip(result.columns, row, strict=True)) for row in result.rows]


def test_every_table_view_and_column_has_a_comment_that_fits_a_line(log):
    tables = "SELECT table_name, comment FROM duckdb_tables()"
    views = "SELECT view_name, comment FROM duckdb_views() WHERE NOT internal"
    for name, comment in log.query(f"{tables} UNION ALL {views}"):
        assert comment, name
        assert len(comment) <= 100 or name in {"meta", "spools"}, name
    columns = log.query('SELECT name, "column", comment FROM dictionary')
    assert len(columns) > 180
    assert [f"{name}.{column}" for name, column, comment in columns if not comment] == []
    assert {name for name, _, _ in columns} == {
        "dictionary", "failure_siblings", "failures", "human_labels", "improve_effect", "item_credit", "item_health", "judge_calls",
        "judge_cost", "moved_most", "preferences", "questions", "revisions", "response_scores", "responses", "rewards", "runs", "steps",
        "training_curve", "verdicts",
            "score_by_length", "judge_gap", "constant_items", "judge_disagreement", "stock_phrases", "null_controls",
    }  # fmt: skip


def test_item_health_shows_mean_spread_failures_and_separation_lowest_confidence_first(log):
    log.append(
        verdicts=[
            verdict("q1", "a", "style", 0.0, confidence=0.2, polarity="undesirable"),
            verdict("q1", "b", "style", 1.0, confidence=0.4, polarity="undesirable"),
            verdict("q2", "a", "style", 0.5, confidence=0.6, polarity="undesirable"),
            verdict("q2", "b", "style", 0.5, confidence=0.4, polarity="undesirable"),
            verdict("q3", "a", "style", 0.75, confidence=0.4, polarity="undesirable"),
            failed("q3", "b", "style", "timeout", polarity="undesirable"),
            failed("q3", "c", "style", "skipped", polarity="undesirable"),
            failed("q4", "a", "style", "not_applicable", applicable=False, weight=0, polarity="undesirable"),
            *(verdict("q1", name, "tests", 1.0, confidence=1.0, kind="check", judge=None) for name in "ab"),
        ]
    )
    style, tests = records(log, "FROM item_health")
    assert (style["item"], style["kind"], style["polarity"], style["n"]) == ("style", "judge", "undesirable", 6)
    assert style["mean_score"] == pytest.approx(0.55)
    assert style["mean_merit"] == pytest.approx(0.45)
    assert style["std_score"] == pytest.approx(0.3708099243547831)
    assert style["mean_confidence"] == pytest.approx(0.4)
    assert style["std_confidence"] == pytest.approx(0.1414213562373095)
    assert style["share_failed"] == pytest.approx(1 / 6)
    assert (style["groups"], style["share_separated"]) == (2, 0.5)
    assert (tests["item"], tests["n"], tests["share_failed"]) == ("tests", 2, 0.0)
    assert (tests["mean_confidence"], tests["groups"], tests["share_separated"]) == (1.0, 1, 0.0)


def test_item_health_keeps_versions_of_a_rubric_apart(log):
    log.append(verdicts=[verdict("q", "a", "style", 1.0), verdict("q", "a", "style", 0.0, rubric_hash="other")])
    assert {(r["rubric_hash"], r["mean_score"]) for r in records(log, "FROM item_health")} == {
        ("h", 1.0),
        ("other", 0.0),
    }


def test_response_scores_shows_what_a_response_earned_and_who_judged(log):
    response = {"run": "r", "step": 0, "question_id": "q", "response_id": "a", "category": "math", "response": "text"}
    log.append(
        responses=[
            {**response, "route": "improve", "metadata": {"model": "m"}, "parent_id": "b", "control": "own",
             "finish_reason": "stop", "num_tokens": 7},
            {**response, "response_id": "b"},
            {**response, "question_id": "p"},
        ],
        verdicts=[
            verdict("q", "a", "style", 0.25, weight=0.25, polarity="undesirable", judge="one"),
            verdict("q", "a", "tests", 0.5, weight=0.25, judge="two"),
            failed("q", "a", "proof", "refused", weight=0.25, judge="two"),
            failed("q", "a", "late", "skipped", weight=0.25, judge="three"),
            failed("q", "a", "na", "not_applicable", weight=0.0, applicable=False, judge="four"),
        ],
        rewards=[{**{k: response[k] for k in ("run", "step", "question_id", "response_id")}, "reward": 0.7,
                  "advantage": -0.1, "weighted": 0.6, "gate": "late", "penalty": -0.25, "trained": True}],
    )  # fmt: skip
    first, second, third = records(log, "FROM response_scores ORDER BY question_id DESC, response_id")
    assert first == {
        "run": "r", "step": 0, "question_id": "q", "response_id": "a", "category": "math", "route": "improve",
        "parent_id": "b", "control": "own", "finish_reason": "stop", "num_tokens": 7, "penalty": -0.25, "trained": True,
        "metadata": '{"model":"m"}', "reward": 0.7, "advantage": -0.1, "weighted": 0.6, "num_items": 4, "num_failed": 1,
        "judges": ["one", "three", "two"], "failed_judges": ["two"], "gate": "late", "unscorable": None,
        "response": "text",
    }  # fmt: skip
    for other in (second, third):  # same id in another group is another response
        assert (other["reward"], other["weighted"], other["num_items"], other["judges"]) == (None, None, 0, None)


def test_before_there_is_a_reward_weighted_is_the_mean_of_what_was_measured(log):
    log.append(
        responses=[{"run": "r", "step": 0, "question_id": "q", "response_id": "a"}],
        verdicts=[
            verdict("q", "a", "one", 0.25, weight=0.25, polarity="undesirable"),
            verdict("q", "a", "two", 0.5, weight=0.5),
            failed("q", "a", "three", "timeout", weight=0.25),
        ],
    )
    ((weighted,),) = log.query("SELECT weighted FROM response_scores")
    assert weighted == pytest.approx((0.25 * 0.75 + 0.5 * 0.5) / 0.75)


def test_failures_counts_by_judge_item_and_outcome_and_tells_the_response_from_the_judge(log):
    log.append(
        verdicts=[
            *(failed("q1", name, "style", "timeout", detail="60 s") for name in "abc"),  # all siblings: the judge
            failed("q2", "a", "style", "refused"),  # one of three: the response
            verdict("q2", "b", "style", 1.0),
            verdict("q2", "c", "style", 1.0),
            failed("q3", "a", "style", "refused"),  # no siblings: cannot tell
            failed("q2", "b", "tests", "sandbox", kind="check", judge=None),
            failed("q2", "c", "tests", "skipped", kind="check", judge=None),
            failed("q2", "c", "off", "not_applicable", applicable=False),
        ]
    )
    assert records(log, "FROM failures") == [
        {"run": "r", "kind": "judge", "judge": "default", "rubric": "math", "item": "style", "outcome": "timeout",
         "n": 3, "share": 3 / 7, "share_alone": 0.0, "example": "60 s"},
        {"run": "r", "kind": "judge", "judge": "default", "rubric": "math", "item": "style", "outcome": "refused",
         "n": 2, "share": 2 / 7, "share_alone": 1.0, "example": None},
        {"run": "r", "kind": "check", "judge": None, "rubric": "math", "item": "tests", "outcome": "sandbox",
         "n": 1, "share": 1.0, "share_alone": None, "example": None},
    ]  # fmt: skip


def test_failure_siblings_puts_the_response_that_breaks_the_judge_first_and_says_what_it_earned(log):
    log.append(
        verdicts=[
            *(failed("q1", "breaker", item, "unparsable") for item in ("one", "two")),
            *(verdict("q1", name, item, 0.5) for name in ("x", "y") for item in ("one", "two")),
            *(failed("q2", name, "one", "timeout") for name in ("x", "y")),
            failed("q3", "alone", "one", "refused"),
        ],
        rewards=[
            {"run": "r", "step": 0, "question_id": "q1", "response_id": "breaker", "reward": 0.5, "advantage": 0.0}
        ],
    )
    breaker, x, y, alone = records(log, "FROM failure_siblings")
    assert breaker == {
        "run": "r", "step": 0, "question_id": "q1", "response_id": "breaker", "category": "math", "num_failed": 2,
        "share_failed": 1.0, "num_siblings": 2, "sibling_share": 0.0, "excess": 1.0, "outcomes": ["unparsable"],
        "items": ["one", "two"], "judges": ["default"], "reward": 0.5, "advantage": 0.0,
    }  # fmt: skip
    assert [(row["response_id"], row["excess"], row["sibling_share"]) for row in (x, y)] == [("x", 0, 1), ("y", 0, 1)]
    assert (alone["response_id"], alone["num_siblings"], alone["excess"]) == ("alone", 0, None)


def test_judge_cost_sums_by_run_judge_and_model(log):
    call = {"run": "r", "judge": "default", "model": "m", "outcome": "ok", "attempts": 1, "latency": 0.5,
            "input_tokens": 100, "output_tokens": 10, "cost": 0.25}  # fmt: skip
    log.append(
        judge_calls=[
            {**call, "call": "1"},
            {**call, "call": "2", "attempts": 3, "latency": 1.5, "outcome": "timeout", "cost": None},
            {**call, "call": "3", "model": "n", "cost": 1.0, "input_tokens": None, "output_tokens": None},
        ]
    )
    assert records(log, "FROM judge_cost") == [
        {"run": "r", "judge": "default", "model": "n", "calls": 1, "failed": 0, "attempts": 1, "input_tokens": None,
         "output_tokens": None, "cost": 1.0, "mean_latency": 0.5},
        {"run": "r", "judge": "default", "model": "m", "calls": 2, "failed": 1, "attempts": 4, "input_tokens": 200,
         "output_tokens": 20, "cost": 0.25, "mean_latency": 1.0},
    ]  # fmt: skip


def test_item_credit_unfolds_the_credits_and_they_sum_to_the_advantage(log):
    reward = {"run": "r", "step": 0, "question_id": "q", "response_id": "a", "reward": 0.5, "advantage": -0.25}
    log.append(
        verdicts=[
            verdict("q", "a", "style", 0.25, polarity="undesirable", mean_confidence=0.4),
            failed("q", "a", "tests", "timeout", imputed=True, imputed_score=0.75),
            verdict("p", "a", "style", 1.0),
        ],
        rewards=[{**reward, "credit": {"style": 0.5, "tests": -0.75}}, {**reward, "response_id": "b"}],
    )
    style, tests = records(log, "FROM item_credit ORDER BY item")
    assert (style["credit"], style["score"], style["merit"], style["mean_confidence"]) == (0.5, 0.25, 0.75, 0.4)
    assert (tests["credit"], tests["score"], tests["imputed_score"], tests["outcome"]) == (-0.75, None, 0.75, "timeout")
    assert style["credit"] + tests["credit"] == style["advantage"]


def test_views_join_rows_outside_training_whose_step_is_null(log):
    key = {"run": "r", "question_id": "q", "response_id": "a"}
    log.append(
        responses=[key],
        verdicts=[{**key, "item": "one", "applicable": True, "outcome": "timeout", "weight": 1.0}],
        rewards=[{**key, "reward": 1.0, "credit": {"one": 0.0}}],
    )
    assert log.query("SELECT reward, num_failed FROM response_scores") == [(1.0, 1)]
    assert log.query("SELECT outcome FROM item_credit") == [("timeout",)]
    assert log.query("SELECT reward FROM failure_siblings") == [(1.0,)]


def answered(question: str, response: str, weighted: float | None, **more: Any) -> dict[str, dict[str, Any]]:
    """A response and its reward: fresh, in step 1, unless something else is said."""
    key = {"run": "r", "step": 1, "question_id": question, "response_id": response, "category": "math"}
    names = ("route", "parent_id", "control", "num_tokens", "finish_reason")
    response_row = {**key, "route": "fresh", **{name: more.pop(name) for name in names if name in more}}
    return {"responses": response_row, "rewards": {**key, "weighted": weighted, "reward": weighted, **more}}


def append(log: Log, *rows: dict[str, dict[str, Any]], **key: Any) -> None:
    log.append(**{table: [{**row[table], **key} for row in rows] for table in ("responses", "rewards")})


def test_training_curve_has_rewards_lengths_and_dead_groups_by_step_and_category(log):
    append(
        log,
        answered("q", "a", 0.2, advantage=-0.3, num_tokens=10, finish_reason="stop"),
        answered("q", "b", 0.8, advantage=0.3, num_tokens=20, finish_reason="length", route="improve"),
        answered("dead", "a", 0.5, advantage=0.0, num_tokens=30, finish_reason="stop"),
        answered("dead", "b", None, advantage=0.0, unscorable="all failed"),
    )
    code = [answered("other", "a", 0.25, advantage=-0.25), answered("other", "b", 0.25, advantage=0.0)]
    append(log, *code, category="code")
    append(log, answered("q", "a", 1.0, advantage=0.5), step=2)
    log.append(responses=[{"run": "r", "step": 2, "question_id": "p", "response_id": "a", "category": "math"}])
    other, first, second = records(log, "FROM training_curve ORDER BY step, category")
    assert first == {
        "run": "r", "step": 1, "category": "math", "responses": 4, "groups": 2, "dead_groups": 1,
        "mean_reward": pytest.approx(0.5), "mean_weighted": pytest.approx(0.5), "fresh_weighted": pytest.approx(0.35),
        "improved_weighted": 0.8, "advantage_spread": pytest.approx((0.18 / 4) ** 0.5), "mean_tokens": 20.0,
        "share_truncated": pytest.approx(1 / 3), "share_unscorable": 0.25,
    }  # fmt: skip
    assert (other["category"], other["dead_groups"], other["mean_reward"]) == ("code", 0, 0.25)
    assert (second["step"], second["groups"], second["dead_groups"], second["advantage_spread"]) == (2, 2, 0, 0.0)


def test_moved_most_is_each_items_share_of_the_credit_of_what_was_trained_on(log):
    append(
        log,
        answered("q", "a", 0.5, credit={"style": -0.5, "tests": 0.125}, trained=True),
        answered("q", "b", 0.5, credit={"style": 0.5, "tests": 0.125, "+length": -0.25}),
        answered("q", "c", 0.5, credit={"tests": 9.0}, trained=False),
    )
    append(log, answered("q", "a", 0.5, credit={"style": 0.5}, trained=True), category="code")
    append(log, answered("q", "a", 0.5, credit={"still": 0.0}), run="s")
    assert [tuple(row.values()) for row in records(log, "FROM moved_most")] == [
        ("r", "math", "style", 2, 0.5, 1.0, 0.5),
        ("r", "code", "style", 1, 0.5, 0.5, 0.25),
        ("r", "math", "+length", 1, 0.25, 0.25, 0.125),
        ("r", "math", "tests", 2, 0.125, 0.25, 0.125),
        ("s", "math", "still", 1, 0.0, 0.0, None),
    ]


def better(question: str, response: str, weighted: float | None, parent: str, control: str | None = "own", **more: Any):
    return answered(question, response, weighted, route="improve", parent_id=parent, control=control, **more)


def test_improve_effect_compares_within_groups_and_with_parents_per_assessment(log):
    append(log, answered("q", "old", 0.25), answered("p", "old", 0.5), answered("s", "old", 0.0), step=0)
    append(
        log,
        answered("q", "f1", 0.25), answered("q", "f2", 0.75),  # the fresh mean is 0.5
        better("q", "i1", 0.625, "old"), better("q", "i2", 0.875, "old", None),  # 0.75: one pair, gain 0.25
        better("q", "i3", 0.5, "f2", "shuffled"),  # gain 0
        answered("p", "f1", 0.5), better("p", "i1", 1.0, "old"),  # gain 0.5
        better("p", "i2", 0.25, "old", "shuffled"),  # gain -0.25
        better("p", "i3", 0.25, "old", "none"),
        answered("p", "given", 0.0, route="sft"), answered("p", "broken", None), better("p", "i4", None, "old"),
        better("s", "i1", 0.5, "old"),  # no fresh ones beside it: only its parent
    )  # fmt: skip
    append(log, answered("q", "old", 1.0), step=2)  # a later response is nobody's parent before
    append(log, answered("q", "old", 1.0), better("q", "i1", 0.5, "missing"), run="other")
    own, shuffled, none = records(log, "FROM improve_effect WHERE run = 'r'")
    assert (own["control"], own["responses"], own["n"], own["gain"]) == ("own", 4, 2, 0.375)
    assert (own["mean_improved"], own["mean_fresh"]) == (0.875, 0.5)
    assert own["se"] == pytest.approx(0.125)
    assert (own["low"], own["high"]) == pytest.approx((0.375 - 0.245, 0.375 + 0.245))
    assert (own["own_more"], own["own_low"]) == (None, None)
    assert (own["parents"], own["over_parent"]) == (3, 0.5)  # (0.75 - 0.25, 1 - 0.5, 0.5 - 0)
    assert (own["parent_se"], own["parent_low"], own["parent_high"]) == (0.0, 0.5, 0.5)
    assert (shuffled["control"], shuffled["n"], shuffled["gain"], shuffled["own_more"]) == ("shuffled", 2, -0.125, 0.5)
    assert shuffled["over_parent"] == pytest.approx((-0.25 - 0.25) / 2)
    half = 1.96 * (2 * 0.125**2) ** 0.5
    assert (shuffled["own_low"], shuffled["own_high"]) == pytest.approx((0.5 - half, 0.5 + half))
    assert (none["control"], none["n"], none["gain"], none["se"], none["own_more"]) == ("none", 1, -0.25, None, 0.625)
    (other,) = records(log, "FROM improve_effect WHERE run = 'other'")
    assert (other["gain"], other["parents"], other["over_parent"]) == (-0.5, 0, None)
