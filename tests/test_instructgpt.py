"""The example of InstructGPT's three stages: each gains on what it has not seen."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import duckdb
import pytest

from grape.config import load_run
from grape.recipes import RewardModelRun, SftRun, load_recipe
from grape.training import train
from grape.tuning import tune

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = Path("examples/instructgpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that has the example, with all that it makes."""
    folder = tmp_path_factory.mktemp("instructgpt")
    own = ("*.py", "*.yaml", "*.md")
    shutil.copytree(ROOT / EXAMPLE, folder / EXAMPLE, ignore=lambda at, names: _made(at, names, own))
    subprocess.run(
        [sys.executable, str(folder / EXAMPLE / "make.py")],
        check=True,
        timeout=100,
        env={**os.environ, "NO_COLOR": "1"},
    )
    return folder


def _made(at, names, own):
    """What `make.py` has left in the repository."""
    here = Path(at)
    return [name for name in names if not (here / name).is_dir() and not any((here / name).match(one) for one in own)]


def rows(folder, name):
    return [json.loads(line) for line in (folder / EXAMPLE / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_no_word_is_asked_twice(folder):
    asked = [[row["question"] for row in rows(folder, name)] for name in NAMES]
    everything = [question for some in asked for question in some]
    assert len(everything) == len(set(everything))
    assert [len(some) for some in asked] == [480, 120, 8000, 8000]
    assert all(row["reference"] == row["question"].split()[-1][::-1] for row in rows(folder, "heldout"))


NAMES = ("questions", "heldout", "demonstrations", "preferences")


@pytest.mark.slow
def test_each_stage_gains_on_what_it_has_not_seen(folder):
    with chdir(folder):
        first = tune(load_recipe(SftRun, EXAMPLE / "sft.yaml", ["optimizer.epochs=3"]))
        second = tune(load_recipe(RewardModelRun, EXAMPLE / "reward-model.yaml", ["data.limit=5000"]))
        run = load_run(EXAMPLE / "run.yaml", ["steps=30", "evaluate.every=30", "checkpoint.every=30"])
        third = asyncio.run(train(run))
    assert first.heldout[max(first.heldout)]["nll"] < 0.3 * first.heldout[0]["nll"]
    assert second.heldout[max(second.heldout)]["accuracy_low"] > 0.6 > second.heldout[0]["accuracy"]
    right = [third.heldout[step]["score/backwards/correct"] for step in (0, 30)]
    assert right[0] > 0.15
    assert right[1] > right[0] + 0.05
    with duckdb.connect(str(folder / "instructgpt.duckdb"), read_only=True) as log:
        kinds = log.execute("select kind from runs where run not like '%.heldout' order by started").fetchall()
    assert kinds == [("sft",), ("reward-model",), ("train",)]
