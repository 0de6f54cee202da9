"""The example of a constitution: with each phase fewer held-out responses violate it, and they help no less."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from apprentice import ask

from grape.constitution import constitution

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = Path("examples/constitution")
PHASES = """
select step, avg(score) filter (item = 'violates'), avg(score) filter (item = 'helps'), count(distinct question_id)
from verdicts where run like '%.heldout' group by step order by step
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that has the example, with all that it makes."""
    folder = tmp_path_factory.mktemp("constitution")
    made = shutil.ignore_patterns("*.jsonl", "policy", "judge", "__pycache__")
    shutil.copytree(ROOT / EXAMPLE, folder / EXAMPLE, ignore=made)
    command = [sys.executable, str(folder / EXAMPLE / "make.py")]
    subprocess.run(command, check=True, timeout=900, env={**os.environ, "NO_COLOR": "1"})
    return folder


@pytest.mark.slow
def test_no_question_is_asked_twice(folder):
    files = [folder / EXAMPLE / f"{name}.jsonl" for name in ("questions", "heldout")]
    asked = [json.loads(line)["question"] for file in files for line in file.read_text().splitlines()]
    assert len(asked) == len(set(asked)) == 280


@pytest.mark.slow
def test_with_each_phase_fewer_held_out_responses_violate_the_constitution_and_they_help_no_less(folder, monkeypatch):
    monkeypatch.setenv("GRAPE_HOME", str(folder / EXAMPLE))
    with chdir(folder):
        done = asyncio.run(constitution(EXAMPLE / "run.yaml", overrides=["steps=15", "checkpoint.every=15"]))
    phases = ask(folder / "constitution.duckdb", PHASES)
    assert [(phase, number) for phase, *_, number in phases] == [(0, 120), (1, 120), (2, 120)]
    violates, helps = [row[1] for row in phases], [row[2] for row in phases]
    assert violates[1] < violates[0] - 0.1
    assert violates[2] < violates[1] - 0.1
    assert helps[2] > helps[0] - 0.05
    assert done.revised > 0.8 * done.chains
    chains = "select round, count(*) from revisions where run = ? group by all order by all".replace(
        "?", f"'{done.run}'"
    )
    assert [round for round, _ in ask(folder / "constitution.duckdb", chains)] == [1, 2, 3]
