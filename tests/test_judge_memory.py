"""The log is the cache of calls: nothing is asked twice, and new weights, formulas or calibrations ask nobody."""

from __future__ import annotations

import asyncio
import json

import duckdb
import pytest
from loopback import Answer, JudgeServer, user_text, verdict

import grape
from grape.errors import ConfigError
from grape.judge.config import load_judge

RUBRIC = """
rubric: support
formula: {formula}
items:
  - {{id: kind, criterion: Is kind., weight: {weight}, judge: default}}
  - {{id: clear, criterion: Says what to do., weight: 1, judge: default, critique: plain}}
"""
ROWS = [
    {"question_id": f"q{n // 2}", "category": "support", "question": f"May I, {n // 2}?", "response": f"Yes, {n}."}
    for n in range(6)
]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a rubric, a critic's prompt and a judge; returns what writes it and scores."""
    monkeypatch.setenv("GRAPE_HOME", str(tmp_path))
    (tmp_path / "prompts/critique").mkdir(parents=True)
    (tmp_path / "prompts/critique/plain.jinja").write_text("Say what is unclear.")
    (tmp_path / "rubrics").mkdir()

    def score(url, *, weight=1, formula="grape", rows=ROWS, judge=(), **options):
        (tmp_path / "rubrics/support.yaml").write_text(RUBRIC.format(weight=weight, formula=formula))
        settings = {"judge": "default", "endpoint": url, "model": "m", "retries": 0, "timeout": 5, **dict(judge)}
        (tmp_path / "default.yaml").write_text(json.dumps(settings))
        return asyncio.run(
            grape.score(
                rows,
                rubrics=tmp_path / "rubrics",
                judges={"default": tmp_path / "default.yaml"},
                log=tmp_path / "log.duckdb",
                **options,
            )
        )

    score.folder = tmp_path
    return score


def behave(body, number):
    if '"score"' not in body["messages"][0]["content"]:
        return f"Criticism of {user_text(body)[-40:]}"
    return verdict(0.25 if "3." in user_text(body) else 0.75, 0.5 + number % 4 / 10)


def query(folder, sql):
    with duckdb.connect(folder / "log.duckdb", read_only=True) as connection:
        return connection.execute(sql).fetchall()


def test_a_second_run_of_other_weights_and_another_formula_asks_nothing(project):
    with JudgeServer(behave) as server:
        first = project(server.url)
        asked = len(server.bodies)
        second = project(server.url, weight=3, formula="weighted")
        assert (asked, len(server.bodies)) == (18, 18)  # two calls for the item with a critique
    assert [r["items"] for r in first] == [r["items"] for r in second]
    for record in second:
        kind, clear = (record["items"][name]["score"] for name in ("kind", "clear"))
        assert record["reward"] == pytest.approx((3 * kind + clear) / 4)
    calls = query(project.folder, "select count(*), count(distinct call), count(distinct run) from judge_calls")
    assert calls == [(18, 18, 1)]
    ((known,),) = query(
        project.folder,
        "select count(*) from verdicts v, unnest(from_json(v.calls, '[\"varchar\"]')) as u(call) "
        "where u.call in (select call from judge_calls)",
    )
    assert known == 36  # verdicts of both runs lead to the same calls


def test_rescore_needs_no_server_and_says_what_is_missing(project):
    with JudgeServer(behave) as server:
        first = project(server.url)
    again = project("http://127.0.0.1:9/v1", weight=2, rescore=True)
    assert [r["items"] for r in first] == [r["items"] for r in again]
    more = [*ROWS, {**ROWS[0], "response": "Another."}]
    with pytest.raises(ConfigError) as caught:
        project("http://127.0.0.1:9/v1", rows=more, rescore=True)
    assert str(caught.value).startswith("rescore: the log has no ")
    assert "on response 'q0-" in str(caught.value)
    assert str(caught.value).endswith("score without --rescore to ask for what is missing")
    with pytest.raises(ConfigError, match="rescore: a log is needed to rescore from"):
        asyncio.run(grape.score(ROWS, rescore=True))


def test_rescore_keeps_a_failure_as_it_was_and_a_second_run_asks_for_it_alone(project):
    def broken(body, number):
        return Answer(status=500) if "5." in user_text(body) else behave(body, number)

    with JudgeServer(broken) as server:
        first = project(server.url)
        asked = len(server.bodies)
    again = project("http://127.0.0.1:9/v1", weight=2, rescore=True)
    assert [r["items"] for r in first] == [r["items"] for r in again]
    assert first[5]["items"]["kind"]["outcome"] == "transport"
    with JudgeServer(behave) as server:
        last = project(server.url)
        assert (asked, len(server.bodies)) == (17, 3)  # the score, the critique, and then its score
    assert last[5]["items"]["kind"]["outcome"] == "ok"
    assert last[:5] == [record | {"reward": r["reward"], "advantage": r["advantage"]}
                        for record, r in zip(first[:5], last[:5], strict=True)]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "asks"),
    [
        ({"model": "other"}, 18),
        ({"sampling": {"temperature": 0.5}}, 18),
        ({"json_schema": "never"}, 12),
        ({"timeout": 9, "retries": 2, "concurrency": 3, "price": {"input": 1}}, 0),
        ({"judge": "another-name"}, 0),
    ],
)
@pytest.mark.slow
def test_what_decides_a_reply_is_asked_anew_and_how_it_is_reached_is_not(project, change, asks):
    with JudgeServer(behave) as server:
        project(server.url)
        project(server.url, judge=change)
        assert len(server.bodies) == 18 + asks


def test_a_calibration_is_applied_with_no_call_and_the_stated_value_is_kept(project):
    with JudgeServer(behave) as server:
        project(server.url)
    judge = load_judge(project.folder / "default.yaml")
    maps = {"support/kind": {"kind": "constant", "y": [0.25]}, "clear": {"kind": "isotonic", "x": [0.5], "y": [0.125]}}
    fitted = {"judge": "default", "identity": judge.identity, "maps": maps}
    (project.folder / "default.calibration.json").write_text(json.dumps(fitted))
    project("http://127.0.0.1:9/v1", judge={"sampling": {}}, rescore=True)
    got = query(
        project.folder,
        "select item, list(distinct confidence), min(stated) >= 0.5, count(distinct run) from verdicts "
        "where run = (select run from runs order by started desc limit 1) group by item order by item",
    )
    assert got == [("clear", [0.125], True, 1), ("kind", [0.25], True, 1)]
    with pytest.raises(ConfigError) as caught:
        project("http://127.0.0.1:9/v1", judge={"sampling": {"temperature": 0.5}}, rescore=True)
    assert str(caught.value) == (
        f"{project.folder}/default.calibration.json: was fitted before default.yaml or its prompt was changed: "
        "remove it, score again and run grape calibrate anew"
    )


@pytest.mark.parametrize(("aggregate", "score"), [("mean", 0.5), ("median", 0.4), ("majority", 0.2)])
@pytest.mark.slow
def test_a_jury_combines_its_judges_and_their_agreement_is_its_confidence(tmp_path, aggregate, score):
    servers = [JudgeServer(lambda body, number, value=value: verdict(value, 0.9)) for value in (0.2, 0.4, 0.9)]
    for number, server in enumerate(servers):
        server.__enter__()
        settings = {"judge": f"j{number}", "endpoint": server.url, "model": f"m{number}"}
        (tmp_path / f"j{number}.yaml").write_text(json.dumps(settings))
    jury = {"judge": "three", "client": "jury", "judges": ["j0", "j1", "j2"], "aggregate": aggregate}
    (tmp_path / "three.yaml").write_text(json.dumps(jury))
    (tmp_path / "r.yaml").write_text(
        "rubric: r\ncategory: support\nitems: [{id: i, criterion: Is it., judge: three}]\n"
    )
    judges = {name: tmp_path / f"{name}.yaml" for name in ("three", "j0", "j1", "j2")}
    log = tmp_path / "log.duckdb"
    try:
        (record, *_) = asyncio.run(grape.score(ROWS, rubrics=tmp_path / "r.yaml", judges=judges, log=log))
    finally:
        for server in servers:
            server.__exit__(None, None, None)
    assert record["items"]["i"]["score"] == pytest.approx(score)
    assert record["items"]["i"]["confidence"] == pytest.approx(1 - (0.2 + 0.5) / 3)
    ((judge, raw, attempts, calls),) = query(
        tmp_path, "select distinct judge, raw, attempts, json_array_length(calls) from verdicts"
    )
    assert (judge, raw, attempts, calls) == ("three", "0.2, 0.4, 0.9", 3, 3)
    assert [len(server.bodies) for server in servers] == [6, 6, 6]


def test_judges_that_ask_each_other_in_a_circle_are_one_line(tmp_path):
    for name, others in (("a", ["b", "c"]), ("b", ["a", "c"])):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"judge": name, "client": "jury", "judges": others}))
    (tmp_path / "c.yaml").write_text(json.dumps({"judge": "c", "endpoint": "http://127.0.0.1:9/v1", "model": "m"}))
    (tmp_path / "r.yaml").write_text("rubric: r\ncategory: support\nitems: [{id: i, criterion: Is it., judge: a}]\n")
    judges = {name: tmp_path / f"{name}.yaml" for name in "abc"}
    with pytest.raises(ConfigError, match="judge 'a': judges: a -> b -> a goes in a circle"):
        asyncio.run(grape.score(ROWS, rubrics=tmp_path / "r.yaml", judges=judges))
