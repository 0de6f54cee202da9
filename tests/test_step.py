"""A step as plain data: what the journal gives back, and what counts for what."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grape.collect import Answered
from grape.config import parse_run
from grape.member import Member
from grape.optimize import Update
from grape.step import Step, overlong


def member(**values):
    given = {
        "response_id": "q-1-0", "group": "q", "prompt_ids": (1, 2), "token_ids": (3, 4), "rollout_logprobs": (-0.1, -1 / 3),
        "advantage": 0.1 + 0.2, "reward": math.pi, "trained": True, "off_policy": False,
    }  # fmt: skip
    return Member(**{**given, **values})


def step(**values):
    rows = {
        "responses": [{"response_id": "q-1-0", "response": "é\n"}, {"response_id": "q-1-1", "response": ""}],
        "verdicts": [],
        "rewards": [{"reward": None, "credit": {"a": 1e-300}}],
        "steps": [{"step": 1, "metrics": json.dumps({"outcomes": {"ok": 2}})}],
    }
    given = {
        "number": 1,
        "position": 7,
        "members": [member(), member(rollout_logprobs=None)],
        "rows": rows,
        "metrics": {"x": 0.1},
    }
    return Step(**{**given, **values})


def test_the_journal_gives_back_every_bit():
    one = step()
    assert Step.read(one.dump()) == one


def test_the_log_gets_what_the_update_measured():
    update = Update(metrics={"loss": 0.5}, logprobs={"q-1-0": -1.5})
    rows = step().learned(update, {"loss": 0.5, "x": 0.1})
    assert [row["logprob_trained"] for row in rows["responses"]] == [-1.5, None]
    assert json.loads(rows["steps"][0]["metrics"]) == {"outcomes": {"ok": 2}, "loss": 0.5, "x": 0.1}
    assert "logprob_trained" not in step().rows["responses"][0]


@pytest.mark.parametrize(
    ("length", "finish", "penalty"),
    [
        (1, "stop", 0.0),
        (4, "stop", 0.0),
        (5, "stop", -0.25),
        (7, "stop", -0.75),
        (8, "stop", -1.0),
        (8, "length", -1.0),
    ],
)
def test_the_soft_penalty_is_a_line_over_the_last_tokens(length, finish, penalty):
    config = parse_run(
        {
            "policy": {"model": "m"},
            "questions": {"path": "q"},
            "sampling": {"max_tokens": 8},
            "truncation": {"how": "soft", "buffer": 4},
        },
        "run",
    )
    tokens = tuple(range(length))
    drawn = Answered(asked=None, token_ids=tokens, logprobs=(-1.0,) * length, finish=finish, judged=None)
    assert overlong(drawn, config) == penalty
    given = Answered(asked=None, token_ids=tokens, logprobs=None, finish="stop", judged=None)
    assert overlong(given, config) == 0.0


@pytest.mark.slow
def test_the_phases_of_a_step_and_its_own_arithmetic_are_measured():
    script = Path(__file__).parent.parent / "benchmarks/step.py"
    command = [sys.executable, str(script), "--quick", "--steps", "1", "--warmup", "1", "--threads", "1"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {row[0]: row[1:] for row in (re.split(r" {2,}", line) for line in lines) if len(row) == 7}
    walls, own = ({name: float(row[at].replace(",", "")) for name, row in list(found.items())[1:]} for at in (0, 1))
    assert list(walls) == ["sample", "judge", "settle", "journal", "update", "log", "rest", "step"]
    assert sum(walls.values()) == pytest.approx(2 * walls["step"], abs=1)
    assert own["step"] == pytest.approx(own["sample"] + own["update"], abs=0.3)
    assert all(own[name] == 0 for name in ("judge", "settle", "journal", "log", "rest"))
    assert all(0 < own[name] < walls[name] for name in ("sample", "update"))
    assert lines[-1].startswith("the cost of measuring: ")
