"""From rows to records and the log, through a real judge server and real checkers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from loopback import Answer, JudgeServer, user_text, verdict

import grape
from grape.errors import ConfigError
from grape.log import Log

RUBRIC = """
rubric: support
items:
  - {id: deadline, criterion: Names 30 days., weight: 3, check: contains, with: {text: 30 days}}
  - {id: kind, criterion: Is kind to the customer., weight: 2, judge: default}
  - {id: clear, criterion: Says clearly what to do., weight: 1, judge: default, scale: {ordinal: [no, partly, fully]}}
  - {id: rude, criterion: Insults the customer., weight: 2, judge: default, scale: binary, polarity: undesirable}
"""


def project(tmp_path, url, *, rubric=RUBRIC, **judge):
    """A folder with a rubric and a judge at ``url``; returns the keyword arguments of `grape.score`."""
    (tmp_path / "rubrics").mkdir(exist_ok=True)
    (tmp_path / "rubrics/support.yaml").write_text(rubric)
    settings = {
        "judge": "default",
        "client": "openai",
        "endpoint": url,
        "model": "m",
        "timeout": 5,
        "retries": 2,
        **judge,
    }
    (tmp_path / "judge.yaml").write_text(json.dumps(settings))
    return {
        "rubrics": tmp_path / "rubrics",
        "judges": {"default": tmp_path / "judge.yaml"},
        "log": tmp_path / "log.duckdb",
    }


def rows(questions=4, responses=4):
    return [
        {"question_id": f"q{q}", "category": "support", "question": f"May I return it, {q}?", "metadata": {"model": f"m{r}"},
         "response": f"Within 30 days, {q} {r}." if r % 2 else f"No, {q} {r}."}
        for q in range(questions)
        for r in range(responses)
    ]  # fmt: skip


def honest(body, number):
    """A judge that answers each criterion on its scale, by the text it was shown."""
    text = user_text(body)
    if "Insults" in text:
        return verdict(0, 0.8)
    if "clearly" in text:
        return verdict("fully" if "30 days" in text else "partly", 0.6)
    return verdict(0.9 if "30 days" in text else 0.3, 0.5)


def run(*arguments, **options):
    return asyncio.run(grape.score(*arguments, **options))


def query(log, sql):
    with duckdb.connect(str(log), read_only=True) as connection:
        return connection.sql(sql).fetchall()


def test_scores_become_rewards_advantages_and_rows_of_the_log(tmp_path):
    with JudgeServer(honest) as server:
        options = project(tmp_path, server.url)
        records = run(rows(2, 2), out=tmp_path / "out.jsonl", **options)
    first, second = records[0], records[1]
    phi = np.array([1, 0.5, 0.6, 0.8])
    omega = np.array([3, 2, 1, 2]) / 8
    wanted = [4 * (omega * tau * phi).sum() / phi.sum() for tau in ([0, 0.3, 0.5, 1], [1, 0.9, 1, 1])]
    assert [first["reward"], second["reward"]] == pytest.approx(wanted)
    assert first["advantage"] == pytest.approx((wanted[0] - wanted[1]) / 2)
    assert first["items"]["rude"] == {"score": 0, "confidence": 0.8, "outcome": "ok", "reasoning": "because"}
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == records
    assert len(server.bodies) == 12
    log = options["log"]
    assert query(log, "select count(*) from judge_calls") == [(12,)]
    assert query(log, "select num_questions, num_responses, num_verdicts, num_failed from steps") == [(2, 4, 16, 0)]
    assert query(log, "select distinct item, round(mean_confidence, 9) from verdicts order by 1") == [
        ("clear", 0.6), ("deadline", 1.0), ("kind", 0.5), ("rude", 0.8),
    ]  # fmt: skip
    assert query(log, "select metadata->>'model' from responses where response_id = 'q1-1'") == [("m1",)]


def test_rewards_advantages_and_credits_come_out_of_sql_over_the_verdicts_alone(tmp_path):
    """Eq. 15, the group mean and the credit per item, from raw verdicts with failures among them, to 1e-9."""

    def flaky(body, number):
        return (
            Answer(text="no JSON") if "1 2" in user_text(body) and "kind" in user_text(body) else honest(body, number)
        )

    with JudgeServer(flaky) as server:
        options = project(tmp_path, server.url)
        records = run(rows(3, 4), **options)
    (failed,) = query(options["log"], "select count(*) from verdicts where outcome = 'unparsable'")
    assert failed == (1,)
    sql = """
    with phi as (
      select category, item, avg(confidence) as phi from verdicts where outcome = 'ok' group by all
    ), cells as (
      select *, if(polarity = 'undesirable', 1 - tau, tau) as merit from (
        select v.*, phi, coalesce(score, avg(score) over (partition by question_id, item)) as tau
        from verdicts v join phi using (category, item) where applicable)
    ), terms as (
      select *, count(*) over r * weight / sum(weight) over r * merit * phi / sum(phi) over r as term
      from cells window r as (partition by response_id)
    ), credits as (
      select *, term - avg(term) over (partition by question_id, item) as part from terms
    )
    select response_id, sum(term), sum(part), map_from_entries(list((item, part))) from credits group by all
    """
    derived = {row[0]: row[1:] for row in query(options["log"], sql)}
    stored = query(options["log"], "select response_id, reward, advantage, credit from rewards")
    assert len(stored) == len(derived) == len(records) == 12
    for response_id, reward, advantage, credit in stored:
        wanted = derived[response_id]
        assert (reward, advantage) == pytest.approx(wanted[:2], abs=1e-9)
        credit = json.loads(credit) if isinstance(credit, str) else credit
        assert credit == pytest.approx(wanted[2], abs=1e-9)
        assert sum(credit.values()) == pytest.approx(advantage, abs=1e-9)
    assert {r["response_id"]: r["reward"] for r in records} == {s[0]: s[1] for s in stored}


FAULTS = [
    Answer(status=429, headers={"Retry-After": "0"}), Answer(status=500), Answer(hang=True), Answer(cut=True),
    Answer(text="I think it is good."), Answer(text=verdict(97)), Answer(text='{"reasoning": "r", "score": NaN, '
    '"confidence": 1}'), Answer(text="I'm sorry, but I can't help with that."),
]  # fmt: skip


def test_broken_replies_are_typed_bounded_and_never_zero(tmp_path):
    def broken(body, number):
        text = user_text(body)
        for fault in range(len(FAULTS)):
            if f"q{fault} " in text and "Is kind" in text:
                return FAULTS[fault]
        return verdict("fully" if "clearly" in text else 1, 1)

    data = [
        {"question_id": f"{g}", "category": "support", "question": f"Question {g}", "response": f"q{n} 30 days {g}"}
        for g in range(8)
        for n in range(8, 15)
    ] + [
        {"question_id": f"{g}", "category": "support", "question": f"Question {g}", "response": f"q{g} 30 days"}
        for g in range(8)
    ]
    with JudgeServer(broken) as server:
        start = time.monotonic()
        options = project(tmp_path, server.url, timeout=0.5, retries=1)
        records = run(data, **options)
        took = time.monotonic() - start
    assert took < 30
    kinds = Counter(record["items"]["kind"]["outcome"] for record in records)
    assert kinds == {
        "ok": 56, "transport": 3, "timeout": 1, "unparsable": 1, "out_of_range": 2, "refused": 1,
    }  # fmt: skip
    for record in records:
        assert (record["items"]["kind"]["score"] is None) == (record["items"]["kind"]["outcome"] != "ok")
        assert record["reward"] is not None
        assert record["advantage"] == pytest.approx(0, abs=1e-12)
    ((lowest,),) = query(options["log"], "select min(reward) from rewards")
    assert lowest > 0.4
    assert query(options["log"], "select count(*) from verdicts where imputed") == [(8,)]


CHILD = """
import asyncio, sys, grape
folder, resume = sys.argv[1], sys.argv[2] == "resume"
asyncio.run(grape.score(f"{folder}/rows.jsonl", rubrics=f"{folder}/rubrics", judges={"default": f"{folder}/judge.yaml"},
                        log=f"{folder}/log.duckdb", out=f"{folder}/out.jsonl", resume=resume))
"""


def canonical(messages):
    return json.dumps(messages, sort_keys=True)


@pytest.mark.slow
def test_what_was_answered_is_never_asked_again_after_a_kill(tmp_path):
    def slow(body, number):
        answer = honest(body, number)
        return Answer(text=answer, delay=0.02)

    with JudgeServer(slow) as server:
        options = project(tmp_path, server.url, concurrency=4)
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(8, 4))))
        kills: list[tuple[int, set[str]]] = []  # how much was asked by then, and what of it was answered
        while True:
            before = len(server.bodies)
            child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), "resume" if kills else "fresh"])
            while child.poll() is None and len(server.bodies) < before + 20:
                time.sleep(0.01)
            if child.poll() is not None:
                break
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            with Log(options["log"]) as log:
                stored = log.query("select messages from judge_calls where reply is not null")
            kills.append((len(server.bodies), {canonical(json.loads(messages)) for (messages,) in stored}))
        assert child.returncode == 0
    assert len(kills) >= 3
    assert kills[-1][1]
    for asked, answered in kills:
        assert not answered & {canonical(body["messages"]) for body in server.bodies[asked:]}
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(records) == 32
    assert {cell["outcome"] for record in records for cell in record["items"].values()} == {"ok"}
    assert query(options["log"], "select count(*), count(distinct run) from runs") == [(1, 1)]
    assert query(options["log"], "select count(*), count(distinct (response_id, item)) from verdicts") == [(128, 128)]
    assert query(options["log"], "select count(*), count(distinct call) from judge_calls") == [(96, 96)]


def test_resuming_a_finished_run_asks_nothing_and_stores_nothing_twice(tmp_path):
    with JudgeServer(honest) as server:
        options = project(tmp_path, server.url)
        first = run(rows(), **options)
        asked = len(server.bodies)
        again = run(rows(), resume=True, **options)
        assert len(server.bodies) == asked
    assert again == first
    assert query(options["log"], "select count(*) from rewards") == [(16,)]


def test_equal_responses_are_judged_once(tmp_path):
    data = [{"question_id": "q", "category": "support", "question": "May I?", "response": "Same."} for _ in range(6)]
    with JudgeServer(honest) as server:
        records = run(data, **project(tmp_path, server.url))
    assert len(server.bodies) == 3
    assert len({json.dumps(record["items"]) for record in records}) == 1
    assert [record["advantage"] for record in records] == [0.0] * 6


def test_without_judges_their_items_do_not_apply(tmp_path, caplog):
    options = project(tmp_path, "http://127.0.0.1:9/v1")
    records = run(rows(1, 2), use_judges=False, **options)
    assert records[1]["items"]["kind"]["outcome"] == "not_applicable"
    assert [record["reward"] for record in records] == [0, 1]
    assert caplog.messages == ["no judges: left out as not applicable: support/clear, support/kind, support/rude"]


def test_a_judge_that_is_not_there_is_one_line_before_any_work(tmp_path):
    options = project(tmp_path, "http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match=r"judge 'default': cannot reach http://127.0.0.1:9/v1"):
        run(rows(), **options)
    with duckdb.connect(str(options["log"])) as connection:
        assert connection.sql("select count(*) from runs").fetchall() == [(0,)]


GATED = """
rubric: support
items:
  - {id: long-enough, weight: 1, check: length, with: {unit: words, min: 3}, gate: {at_least: 1, reward: -0.5}}
  - {id: kind, criterion: Is kind to the customer., weight: 2, judge: default}
"""


def test_a_failed_gate_spares_the_judge(tmp_path):
    data = [
        {"question_id": "q", "category": "support", "question": "May I?", "response": r}
        for r in ("No.", "You surely may, friend.")
    ]
    with JudgeServer(honest) as server:
        records = run(data, **project(tmp_path, server.url, rubric=GATED))
    assert len(server.bodies) == 1
    assert [record["reward"] for record in records] == pytest.approx([-0.5, 2 * (1 / 3 + 2 / 3 * 0.3 * 0.5) / 1.5])
    assert records[0]["items"]["kind"] == {
        "score": None, "confidence": None, "outcome": "skipped", "reasoning": None, "detail": "long-enough failed its gate",
    }  # fmt: skip


def test_records_become_a_frame_or_a_table_in_one_call(tmp_path):
    with JudgeServer(honest) as server:
        records = run(rows(1, 2), **project(tmp_path, server.url))
    assert list(pd.DataFrame(records)["reward"]) == [record["reward"] for record in records]
    assert pa.Table.from_pylist(records).num_rows == 2


def test_scoring_awaits_inside_a_running_loop_and_takes_mappings(tmp_path):
    async def inside():
        with JudgeServer(honest) as server:
            return await grape.score(iter(rows(1, 2)), **project(tmp_path, server.url))

    assert len(asyncio.run(inside())) == 2


def test_a_users_own_checker_is_run_and_its_fault_is_an_outcome(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import grape\n"
        "@grape.checker\n"
        "def shouts(question, response, *, limit: int = 1) -> float:\n"
        "    if 'boom' in response.text:\n"
        "        raise RuntimeError('broke')\n"
        "    return 1.0 if response.text.count('!') > limit else 0.0\n"
    )
    (tmp_path / "r.yaml").write_text("rubric: r\nitems: [{id: loud, check: shouts, with: {limit: 0}}]\n")
    data = [{"question_id": "q", "category": "r", "question": "?", "response": r} for r in ("a!", "a", "boom")]
    records = run(data, rubrics=tmp_path / "r.yaml", checkers=[tmp_path / "mine.py"])
    assert [r["items"]["loud"]["score"] for r in records] == [1, 0, None]
    assert records[2]["items"]["loud"]["outcome"] == "checker"
    assert records[2]["items"]["loud"]["detail"] == "RuntimeError: broke"
    assert records[2]["reward"] is None
    (tmp_path / "r.yaml").write_text("rubric: r\nitems: [{id: loud, check: shouts, with: {limit: '0'}}]\n")
    with pytest.raises(ConfigError, match=r"items\.0\.with\.limit: Input should be a valid integer \(got '0'\)"):
        run(data, rubrics=tmp_path / "r.yaml", checkers=[tmp_path / "mine.py"])


WORST = """
rubric: support
items:
  - {id: deadline, criterion: Names 30 days., weight: 1, check: contains, with: {text: 30 days}}
  - {id: kind, criterion: Is kind to the customer., weight: 3, judge: default, on_failure: worst}
"""


def test_a_group_that_breaks_its_judge_together_gains_nothing_where_the_item_says_worst(tmp_path):
    with JudgeServer(lambda body, number: "no JSON") as server:
        records = run(rows(1, 2), **project(tmp_path, server.url, rubric=WORST))
    assert [record["reward"] for record in records] == pytest.approx([0, 0.25])


DROP = """
rubric: support
items:
  - {id: deadline, criterion: Names 30 days., weight: 3, check: contains, with: {text: 30 days}}
  - {id: kind, criterion: Is kind to the customer., weight: 1, judge: default}
  - {id: calm, criterion: Stays calm., weight: 1, judge: default, on_failure: drop}
"""


def test_the_mean_confidence_is_that_of_every_ok_verdict_also_of_dropped_responses(tmp_path):
    def judge(body, number):
        text = user_text(body)
        if "calm" in text:
            return "no JSON" if "0 1" in text else verdict(1, 1)
        return verdict(0.5, 0.2 if "0 1" in text else 0.8)

    with JudgeServer(judge) as server:
        options = project(tmp_path, server.url, rubric=DROP)
        records = run(rows(1, 3), **options)
    assert [record["reward"] is None for record in records] == [False, True, False]
    sql = "select distinct item, round(mean_confidence, 9) from verdicts order by item"
    assert query(options["log"], sql) == query(
        options["log"],
        "select item, round(avg(confidence), 9) from verdicts where outcome = 'ok' group by 1 order by 1",
    )


def test_a_finished_run_is_answered_from_its_log_failures_included(tmp_path):
    broken = True

    def half(body, number):
        return Answer(status=400) if broken and number % 2 else honest(body, number)

    with JudgeServer(half) as server:
        options = project(tmp_path, server.url)
        first = run(rows(), **options)
        asked, broken = len(server.bodies), False
        again = run(rows(), resume=True, out=tmp_path / "again.jsonl", **options)
        assert len(server.bodies) == asked
    assert any(cell["outcome"] == "transport" for record in first for cell in record["items"].values())
    assert again == first
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()] == first


@pytest.mark.slow
def test_a_run_that_is_still_going_is_not_taken_up_by_another(tmp_path):
    async def twice(options):
        first = asyncio.create_task(grape.score(rows(), **options))
        while not query_or_none(options["log"], "select count(*) from judge_calls"):
            await asyncio.sleep(0.05)
        with pytest.raises(ConfigError, match=r"another process is at run .*; resume it when that has ended"):
            await grape.score(rows(), resume=True, **options)
        return await first

    with JudgeServer(lambda body, number: Answer(text=honest(body, number), delay=0.2)) as server:
        options = project(tmp_path, server.url, concurrency=2)
        assert len(asyncio.run(twice(options))) == 16
    assert query(options["log"], "select count(*) from verdicts") == [(64,)]


def query_or_none(log, sql):
    """The first number of a query, 0 while the log is held or not there yet."""
    try:
        return query(log, sql)[0][0]
    except duckdb.Error:
        return 0


@pytest.mark.parametrize(
    ("out", "line"),
    [("rows.jsonl", "is read or logged to by this run"), ("log.duckdb", "is read or logged to by this run"),
     ("rubrics", "Is a directory"), ("none/out.jsonl", "No such file or directory")],
)  # fmt: skip
def test_an_output_that_would_destroy_something_is_refused_before_any_work(tmp_path, out, line):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows(1, 2))))
    before = (tmp_path / "rows.jsonl").read_text()
    options = project(tmp_path, "http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match=line):
        run(tmp_path / "rows.jsonl", use_judges=False, out=tmp_path / out, **options)
    assert (tmp_path / "rows.jsonl").read_text() == before
    assert not options["log"].exists()


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("raise SystemExit(3)", "SystemExit: 3"), ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("return grape.Finding(1.0, 5)", "a finding's reasoning and raw are text"), ("return None", "TypeError"),
        ("return 1.5", "which is not a number from 0 to 1"), ("return float('nan')", "which is not a number from 0 to 1"),
        ("raise Mute", "Mute"),
    ],
)  # fmt: skip
def test_whatever_a_checker_does_is_an_outcome(tmp_path, body, detail):
    (tmp_path / "mine.py").write_text(
        "import grape\n"
        "class Mute(Exception):\n    def __str__(self): raise RuntimeError\n"
        f"@grape.checker\ndef own_{abs(hash(body))}(question, response):\n    {body}\n"
    )
    (tmp_path / "r.yaml").write_text(f"rubric: r\nitems: [{{id: own, check: own_{abs(hash(body))}}}]\n")
    data = [{"question_id": 7, "category": "r", "question": "?", "response": "a"}]
    (record,) = run(data, rubrics=tmp_path / "r.yaml", checkers=tmp_path / "mine.py")
    assert record["items"]["own"]["outcome"] == "checker"
    assert detail in record["items"]["own"]["detail"]
    assert record["reward"] is None


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("import sys\nsys.exit(0)", "SystemExit: 0"), ("x = (", "SyntaxError"), ("x = 1", "registers no checker"),
        ("import grape\n@grape.checker\nasync def a(question, response): ...", "a plain function of"),
        ("import grape\n@grape.checker\ndef b(response): ...", "a plain function of"),
        ("import grape\n@grape.checker\nclass C: ...", "a plain function of"),
        ("import grape\n@grape.checker\ndef contains(question, response): ...", "a checker named 'contains' exists already"),
        ("import grape\n@grape.checker\ndef d(question, response, *, n=1): ...", "arguments are keyword-only and have types"),
    ],
)  # fmt: skip
def test_a_checkers_file_that_cannot_be_meant_is_one_line(tmp_path, source, line):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(ConfigError) as caught:
        run(rows(1, 1), use_judges=False, checkers=[tmp_path / "mine.py"], rubrics=tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/mine.py: ")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rows_value_that_its_checker_cannot_take_is_named_before_any_work(tmp_path):
    rubric = "rubric: support\nitems: [{id: own, check: regex, with: {pattern: {field: pattern}}}]\n"
    (tmp_path / "r.yaml").write_text(rubric)
    data = [{**row, "metadata": {"pattern": "("}} for row in rows(1, 1)]
    with pytest.raises(ConfigError, match=r"row 1: item 'own' of rubric 'support': pattern: "):
        run(data, rubrics=tmp_path / "r.yaml")


def test_a_rubric_without_items_leaves_a_bare_row_unscorable(tmp_path):
    (tmp_path / "r.yaml").write_text("rubric: support\nitems: []\n")
    (record,) = run(rows(1, 1), rubrics=tmp_path / "r.yaml")
    assert (record["reward"], record["advantage"]) == (None, 0)
