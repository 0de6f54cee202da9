"""The benchmarks beside TRL run, in small, and their arms agree; what they measure is the machine's matter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from arms import Figures, Lengths, Shape, agreed, record  # noqa: E402  (from the folder of benchmarks)

SHAPE = Shape(hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8, intermediate=8, vocab=32, ends=4)
FIGURES = Figures(losses=[0.5, 0.02], grad_norms=[1.0, 2.0])


def run(script: str, *arguments: str) -> list[str]:
    """The lines that a benchmark prints where there is no GPU."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.splitlines()


def cells(lines: list[str], title: str) -> dict[str, str]:
    """The rows of the table with this title: the first cell, and the second one's median."""
    start = next(at for at, line in enumerate(lines) if line.startswith(f"{title}  ")) + 1
    end = next((at for at in range(start, len(lines)) if not lines[at]), len(lines))
    return {row[0]: row[1].split(" ")[0] for row in (re.split(r" {2,}", line) for line in lines[start:end])}


@pytest.mark.parity
def test_updates_whole_steps_and_shared_prompts_are_measured():
    lines = run("train.py", "--quick", "--steps", "1")
    assert len(cells(lines, "update")) == 8
    assert set(cells(lines, "whole step")) == {"TRL", "ours"}
    ratios = cells(lines, "ratio")
    assert len(ratios) == 13
    assert all(float(value) > 0 for value in ratios.values())
    assert float(ratios["update, peak memory: ours, 8 rows / TRL, 8 rows"]) < 1
    assert float(ratios["prompt 4 x response, greatest difference of gradients / greatest gradient"]) < 1e-5


@pytest.mark.parity
def test_without_a_gpu_the_plan_of_the_gpu_runs_in_miniature():
    lines = run("gpu.py", "--model", "0.6B", "--prompt", "256", "--steps", "1", "--warmup", "1")
    assert lines[0].startswith("No GPU here: the same plan in miniature on the CPU, and no figure of it is a GPU's")
    assert lines[1].startswith("TRL with Liger: left out")
    rows = [re.split(r" {2,}", line) for line in lines if re.match(r"(ours|TRL)(, bfloat16 weights)? {2,}", line)]
    assert [row[:2] for row in rows] == [
        [name, rows] for name in ("ours", "TRL", "TRL, bfloat16 weights") for rows in ("8", "16")
    ]
    assert all(float(row[2].split(" ")[0].replace(",", "")) > 0 for row in rows)


def test_arms_that_do_not_agree_end_a_benchmark():
    agreed(
        {"a": FIGURES, "b": replace(FIGURES, losses=[0.5 + 4e-6, 0.02], grad_norms=[1.0, 2.0 + 1e-5])},
        loss=1e-5,
        norm=1e-5,
    )
    for wrong in ({"losses": [0.5, 0.021]}, {"grad_norms": [1.0001, 2.0]}, {"grad_norms": [1.0, float("nan")]}):
        with pytest.raises(SystemExit, match="of a and b differ"):
            agreed({"a": FIGURES, "b": replace(FIGURES, **wrong)}, loss=1e-5, norm=1e-5)


def test_recorded_responses_are_log_normal_and_a_function_of_the_seed():
    lengths = Lengths(prompt=3, mean=100, sigma=0.75, longest=500)
    (groups,) = record(SHAPE, lengths, steps=1, groups=500, size=8, seed=1)
    assert ([groups],) == (record(SHAPE, lengths, steps=1, groups=500, size=8, seed=1),)
    responses = [response for group in groups for response in group.responses]
    assert 95 < fmean(map(len, responses)) < 105
    assert max(map(len, responses)) == 500
    assert all(response[-1] == 1 and min(response[:-1], default=5) > SHAPE.ends for response in responses)
    assert groups[0].tokens == 8 * 3 + sum(map(len, groups[0].responses))


@pytest.mark.parity
def test_sampling_is_measured_and_all_arms_give_as_many_tokens_as_asked():
    lines = run("sampling.py", "--quick", "--repeats", "1")  # which exits with 1 where lengths differ
    found = [re.split(r" {2,}", line) for line in lines if line.startswith("0.4 M, ")]
    assert [row[0] for row in found] == [
        f"0.4 M, {prompt}, {lengths}" for prompt in (16, 256) for lengths in ("equal", "log-normal")
    ]
    for row in found:
        assert [float(cell.split(" ")[0].replace(",", "")) > 0 for cell in row[1:]] == [True] * 8
