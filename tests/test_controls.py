"""Null controls: judged like the others, counted among nobody, and told of in one line."""

from __future__ import annotations

import json

import pytest
from loopback import JudgeServer, user_text, verdict
from test_scoring import honest, project, query, rows, run

from grape.controls import TRIVIAL


def fooled(body, number):
    """A judge that likes whatever says nothing."""
    text = user_text(body)
    if any(f">>>\n{null}\n<<<end response" in text for null in TRIVIAL):
        return verdict("fully" if "clearly" in text else 1, 0.3)
    return honest(body, number)


def test_controls_leave_every_record_and_every_row_of_the_run_as_it_is_without_them(tmp_path, caplog):
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    with JudgeServer(fooled) as server:
        options = project(tmp_path / "with", server.url)
        records = run(rows(3, 2), controls=True, out=tmp_path / "out.jsonl", **options)
        asked = len(server.bodies)
        plain = project(tmp_path / "without", server.url)
        assert run(rows(3, 2), **plain) == records
        assert (asked, len(server.bodies)) == (3 * (6 + 3), 3 * (6 + 3) + 3 * 6)
    assert [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()] == records
    columns = "reward, weighted, advantage, credit::varchar, in_baseline"
    same = f"select response_id, {columns} from rewards where run not like '%.controls' order by 1"
    assert query(options["log"], same) == query(plain["log"], same)
    means = "select distinct item, mean_confidence from verdicts where run not like '%.controls' order by 1"
    assert query(options["log"], means) == query(plain["log"], means)
    assert caplog.messages == ["controls: 0 of 3 trivial responses scored above the mean of the real ones"]


def test_a_control_is_a_response_of_its_own_run_with_its_verdicts_and_its_text_takes_turns(tmp_path, caplog):
    with JudgeServer(fooled) as server:
        options = project(tmp_path, server.url)
        run(rows(3, 2), controls=True, **options)
    log = options["log"]
    assert query(log, "select response_id, response, route from responses where run like '%.controls' order by 1") == [
        (f"q{n}.control", TRIVIAL[n], "control") for n in range(3)
    ]
    assert query(
        log, "select count(*) from verdicts where run like '%.controls' and kind = 'judge' and outcome = 'ok'"
    ) == [(9,)]
    assert query(log, "select distinct in_baseline from rewards where run like '%.controls'") == [(False,)]
    assert query(log, "select kind, count(*) from runs group by 1 order by 1") == [("controls", 1), ("score", 1)]
    assert query(log, "select num_responses from steps order by run") == [(6,), (3,)]
    # kind (2 of 8) and clear (1 of 8) are met, and so is rude, which is bad when met
    found = query(log, "select response, n, scored, weighted, rewarded, share from null_controls order by 1")
    assert found == [(text, 1, 1, 0.375, 0, 0.0) for text in sorted(TRIVIAL[:3])]
    assert caplog.messages == ["controls: 0 of 3 trivial responses scored above the mean of the real ones"]


def test_a_control_that_is_rewarded_is_said_to_be(tmp_path, caplog):
    rubric = "rubric: support\nitems: [{id: kind, criterion: Is kind., judge: default}]"
    with JudgeServer(fooled) as server:
        options = project(tmp_path, server.url, rubric=rubric)
        run(rows(2, 2), controls=True, **options)
    assert caplog.messages == ["controls: 2 of 2 trivial responses scored above the mean of the real ones"]
    assert query(options["log"], "select sum(rewarded)::int, min(share) from null_controls") == [(2, 1.0)]


def test_a_control_whose_judge_fails_cannot_be_compared(tmp_path, caplog):
    rubric = "rubric: support\nitems: [{id: kind, criterion: Is kind., judge: default}]"

    def behaviour(body, number):
        return "no JSON" if ">>>\n:\n<<<end" in user_text(body) else honest(body, number)

    with JudgeServer(behaviour) as server:
        run(rows(2, 2), controls=True, **project(tmp_path, server.url, rubric=rubric))
    assert caplog.messages == [
        "controls: 0 of 1 trivial responses scored above the mean of the real ones; 1 could not be compared"
    ]


@pytest.mark.slow
def test_a_finished_run_with_controls_is_answered_from_its_log_and_is_not_that_without(tmp_path):
    with JudgeServer(honest) as server:
        options = project(tmp_path, server.url)
        first = run(rows(2, 2), controls=True, **options)
        asked = len(server.bodies)
        assert run(rows(2, 2), controls=True, resume=True, **options) == first
        assert run(rows(2, 2), resume=True, **options) == first  # a run of its own, from what was judged before
        assert len(server.bodies) == asked
    assert query(options["log"], "select count(*) from runs where kind = 'score'") == [(2,)]
