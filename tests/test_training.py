"""`grape train`: from a rubric to the optimizer's step, and all of it in the log."""

from __future__ import annotations

import asyncio
import json
import math
import shutil

import pytest
import torch
from apprentice import apprentice, ask, fair
from loopback import Answer, JudgeServer
from safetensors.torch import load_file

import grape
from grape.config import load_run
from grape.errors import ConfigError


def train(path, *overrides, **options):
    return asyncio.run(grape.train(path, overrides=overrides, **options))


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_weights_that_moved_and_a_log_that_tells_why(tmp_path):
    done = train(apprentice(tmp_path))
    assert done.folder == tmp_path / "checkpoints/step-000004"
    assert not same(weights(done.folder), weights(tmp_path / "policy"))
    log = tmp_path / "log.duckdb"
    assert ask(log, "select run, kind from runs") == [(done.run, "train")]
    assert ask(log, "select step, num_questions, num_responses from steps order by step") == [
        (step, 4, 16) for step in (1, 2, 3, 4)
    ]
    assert ask(log, "select count(*), count(distinct (step, response_id)) from responses") == [(64, 64)]
    assert ask(log, "select count(*) from verdicts where outcome = 'ok'") == [(128,)]
    assert ask(log, "select count(*) from questions") == [(8,)]
    assert ask(log, "select count(*) from rewards where trained and in_baseline") == [(64,)]
    (unequal,) = ask(log, "select max(abs(advantage - list_sum(map_values(credit)))) from rewards")
    assert unequal[0] < 1e-12
    # each advantage is the reward less its group's mean, and each step's loss can be followed to its responses
    ((wrong,),) = ask(
        log,
        "select max(abs(advantage - (reward - mean))) from (select *, avg(reward) over (partition by step, question_id)"
        " as mean from rewards)",
    )
    assert wrong < 1e-12
    for (metrics,) in ask(log, "select metrics from steps"):
        found = json.loads(metrics)
        assert {"loss", "entropy", "grad_norm", "lr", "reward/mean", "reward/std", "score/letters/starts", "failed",
                "confidence/letters/short", "length/mean", "truncated", "dead_groups", "off_policy", "clip_high",
                "clip_low", "approx_kl", "refusals", "stock_phrases", "repetition"} <= found.keys()  # fmt: skip
        assert all(math.isfinite(value) for name, value in found.items() if name != "outcomes")


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    ends = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        shutil.copytree(tmp_path / "a" / "policy", tmp_path / name / "policy") if ends else None
        ends.append(weights(train(apprentice(tmp_path / name, seed=seed)).folder))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_training_raises_what_the_rubric_asks_for(tmp_path):
    path = apprentice(
        tmp_path, steps=40, sampling={"questions": 8, "responses": 8}, optimizer={"lr": 3e-3}, checkpoint=None
    )
    train(path)
    log = tmp_path / "log.duckdb"
    ((before,), (after,)) = [
        ask(log, f"select avg(score) from verdicts where item = 'starts' and step {steps}")[0]
        for steps in ("<= 3", ">= 38")
    ]
    assert after > before + 0.3
