"""The metrics of a step are what SQL finds in the log of it."""

from __future__ import annotations

import asyncio
import json

import pytest
from apprentice import apprentice, ask, fair
from loopback import Answer, JudgeServer

import grape
from grape.metrics import shifts

SQL = {
    "reward/mean": "select avg(reward) from rewards where step = {step}",
    "reward/std": "select stddev_pop(reward) from rewards where step = {step}",
    "reward/letters/mean": "select avg(reward) from rewards where step = {step} and category = 'letters'",
    "weighted/mean": "select avg(weighted) from rewards where step = {step}",
    "score/letters/starts": "select avg(score) from verdicts where step = {step} and item = 'starts'",
    "score/letters/pleasant": "select avg(score) from verdicts where step = {step} and item = 'pleasant'",
    "confidence/letters/pleasant": "select any_value(mean_confidence) from verdicts where step = {step} and item = 'pleasant'",
    "confidence_n/letters/pleasant": "select count(confidence) from verdicts where step = {step} and item = 'pleasant'",
    "failed": "select avg((outcome <> 'ok')::int) from verdicts where step = {step} and outcome <> 'skipped'",
    "unscorable": "select avg((reward is null)::int) from rewards where step = {step}",
    "truncated": "select avg((finish_reason = 'length')::int) from responses where step = {step}",
    "length/mean": "select avg(num_tokens) from responses where step = {step}",
    "length/max": "select max(num_tokens) from responses where step = {step}",
    "off_policy": "select avg((route <> 'fresh')::int) from responses where step = {step}",
    "dead_groups": "select avg(dead::int) from (select bool_and(advantage = 0) as dead from rewards where step = {step}"
    " group by question_id)",
}


@pytest.mark.slow
def test_metrics_are_what_the_log_says(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPE_HOME", str(tmp_path))

    def sometimes(body, number):
        reply = fair(body, number)
        return Answer(status=400) if json.loads(reply)["score"] < 0.3 else reply

    with JudgeServer(sometimes) as server:
        path = apprentice(
            tmp_path, judge=server.url, questions=4, steps=2, improve={"share": 0.5}, truncation={"how": "mask"},
            sampling={"max_tokens": 40},
        )  # fmt: skip
        asyncio.run(grape.train(path))
    log = tmp_path / "log.duckdb"
    for step, text in ask(log, "select step, metrics from steps order by step"):
        metrics = json.loads(text)
        for name, sql in SQL.items():
            ((found,),) = ask(log, sql.format(step=step))
            assert metrics[name] == pytest.approx(found, abs=1e-9), name
    assert 0 < metrics["failed"] < 1
    assert 0 < metrics["unscorable"] < 1
    before, after = (json.loads(text) for (text,) in ask(log, "select metrics from steps order by step"))
    name = "confidence/letters/pleasant"
    assert after["confidence_shift/letters/pleasant"] == pytest.approx(after[name] - before[name])


def test_a_shift_is_from_the_last_measurement():
    assert shifts({"confidence/a/x": 0.7, "confidence/a/y": 0.5, "score/a/x": 1.0}, {"confidence/a/x": 0.9}) == {
        "confidence_shift/a/x": pytest.approx(-0.2)
    }
