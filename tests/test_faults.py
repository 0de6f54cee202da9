"""Scoring under a judge that fails and hangs, and in a process that is killed: bounded, typed, unbiased, asked once."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean, stdev

import duckdb
import pytest
from loopback import Answer, JudgeServer, user_text, verdict
from mortal import wait_for

import grape
from grape.judge import openai

ITEMS = 8
ASKED = re.compile(r"Response number (\d+)\b.*?Criterion number (\d+)\b", re.DOTALL)
FAULTS = (
    Answer(status=500), Answer(status=429), Answer(text="It is rather good."), Answer(text=verdict()[:30]), Answer(cut=True),
)  # fmt: skip
STUDENT = {20: 2.093}  # two-sided 95 %, by the number of seeds


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(openai, "FIRST_PAUSE", 0.001)


def truth(seed, response, item):
    return round(random.Random(f"truth {seed} {response} {item}").random(), 3)


class Faulty:
    """A judge who fails one attempt in ten and hangs in one of a hundred: which ones, the seed decides."""

    def __init__(self, seed, *, failures=0.1, hangs=0.01, delay=0.0):
        self.seed, self.failures, self.hangs, self.delay = seed, failures, hangs, delay
        self.attempts = Counter()

    def __call__(self, body, number):
        found = ASKED.search(user_text(body))
        if found is None:
            return verdict()  # whether it is there
        asked = int(found[1]), int(found[2])
        self.attempts[asked] += 1
        digest = hashlib.sha256(f"fate {self.seed} {asked} {self.attempts[asked]}".encode()).digest()
        lot = int.from_bytes(digest[:4], "big") / 2**32
        if lot < self.hangs:
            return Answer(hang=True)
        if lot < self.hangs + self.failures:
            return FAULTS[digest[4] % len(FAULTS)]
        return Answer(text=verdict(truth(self.seed, *asked)), delay=self.delay)


def files(folder, url, responses, **settings):
    """A rubric of eight judge items, its judge, and rows: the arguments of `grape.score`."""
    folder.mkdir(exist_ok=True)
    items = [{"id": f"i{n}", "criterion": f"Criterion number {n} holds.", "judge": "j"} for n in range(ITEMS)]
    (folder / "r.yaml").write_text(json.dumps({"rubric": "faults", "formula": "weighted", "items": items}))
    judge = {"judge": "j", "endpoint": url, "model": "m", "timeout": 1.0, "retries": 1, **settings}
    (folder / "j.yaml").write_text(json.dumps(judge))
    data = [
        {"question_id": f"q{n // 8}", "category": "faults", "question": f"Question {n // 8}?", "response_id": str(n),
         "response": f"Response number {n}."}
        for n in range(responses)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, data)))
    return {"rubrics": folder / "r.yaml", "judges": {"j": folder / "j.yaml"}, "log": folder / "log.duckdb"}


def ask(log, sql):
    with duckdb.connect(str(log), read_only=True) as connection:
        return connection.sql(sql).fetchall()


def passed(folder, seed, responses, *, timeout=1.0):
    """One pass over a faulty judge, held to all that must be so: the rewards' errors, and how many verdicts failed."""
    with JudgeServer(Faulty(seed)) as server:
        options = files(folder, server.url, responses, timeout=timeout)
        records = asyncio.run(grape.score(folder / "rows.jsonl", **options))
        asked = len(server.bodies)
        assert asyncio.run(grape.score(folder / "rows.jsonl", resume=True, **options)) == records
        assert len(server.bodies) == asked  # a second pass asks nothing
    cells = {(int(r["response_id"]), int(item[1:])): cell for r in records for item, cell in r["items"].items()}
    failed = {place for place, cell in cells.items() if cell["score"] is None}
    assert {cells[place]["outcome"] for place in failed} <= {"timeout", "transport", "unparsable"}
    assert all(cells[place]["score"] == truth(seed, *place) for place in cells.keys() - failed)
    assert all(cells[place]["detail"] for place in failed)
    ((shown,),) = ask(options["log"], "select coalesce(sum(n), 0)::int from failures")
    assert shown == len(failed)
    ((slowest, most),) = ask(options["log"], "select max(latency), max(attempts) from judge_calls")
    assert most <= 2
    assert slowest < 2 * timeout + 3  # each attempt ends with its time limit
    right = [fmean(truth(seed, n, item) for item in range(ITEMS)) for n in range(responses)]
    return [r["reward"] - one for r, one in zip(records, right, strict=True) if r["reward"] is not None], len(failed)


def test_under_failures_and_hangs_every_failure_is_typed_and_a_second_pass_asks_nothing(tmp_path):
    off, failed = passed(tmp_path, 3, 16)
    assert failed >= 1
    assert len(off) == 16  # none is lost
    exact = [value for value in off if abs(value) < 1e-9]
    assert 16 - failed <= len(exact) < 16  # only what failed is estimated, and by its siblings
    assert max(map(abs, off)) < 1 / ITEMS


@pytest.mark.slow
def test_over_20_seeds_failures_bias_no_reward(tmp_path):
    means, failed = [], 0
    for seed in range(20):
        off, lost = passed(tmp_path / str(seed), seed, 64, timeout=3.0)  # a busy machine is no fault of the judge
        assert len(off) == 64
        means.append(fmean(off))
        failed += lost
    assert failed >= 20  # of 10,240: what failed twice
    half = STUDENT[len(means)] * stdev(means) / len(means) ** 0.5
    assert fmean(means) - half <= 0 <= fmean(means) + half


@pytest.mark.slow
def test_killed_while_judging_20_times_it_asks_again_only_what_was_under_way(tmp_path):
    rng, limit = random.Random(0), 8
    with JudgeServer(Faulty(0, failures=0, hangs=0, delay=0.03)) as server:
        files(tmp_path, server.url, 128, concurrency=limit, timeout=30)
        command = [str(Path(sys.executable).parent / "grape"), "score", "rows.jsonl", "--rubrics", "r.yaml", "--judge", "j=j.yaml",
                   "--log", "log.duckdb", "--out", "out.jsonl", "--resume"]  # fmt: skip
        killed = 0
        for _ in range(20):
            before = len(server.bodies)
            child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            wait_for(lambda: len(server.bodies) >= before + rng.randrange(10, 30) or child.poll() is not None)  # noqa: B023
            time.sleep(rng.random() * 0.05)
            killed += child.poll() is None
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        assert killed == 20
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        asked = Counter(user_text(body) for body in server.bodies)
    assert len(asked) == 128 * ITEMS
    assert asked.total() <= 128 * ITEMS + 20 * limit  # what was under way at a kill, at most, is asked again
    log = tmp_path / "log.duckdb"
    assert ask(log, "select count(*), count(distinct call) from judge_calls") == [(128 * ITEMS, 128 * ITEMS)]
    assert ask(log, "select count(*), count(distinct (response_id, item)), min(outcome) from verdicts") == [
        (128 * ITEMS, 128 * ITEMS, "ok")
    ]
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [r["reward"] for r in records] == pytest.approx(
        [fmean(truth(0, n, item) for item in range(ITEMS)) for n in range(128)]
    )
