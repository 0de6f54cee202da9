"""A run in two processes is the run in one: one leads, judges and logs, and both sample and update."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from apprentice import apprentice, ask, fair
from loopback import JudgeServer
from safetensors.torch import load_file

OPTIONS = {
    "steps": 3,
    "sampling": {"questions": 4, "responses": 4, "rows": 8},
    "optimizer": {"lr": 1e-3, "epochs": 2},
    "loss": {"kl": "k3", "kl_coef": 0.1},
    "checkpoint": {"every": 1},
}


def launch(path, processes, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GRAPE_HOME": str(path.parent)}
    grape = str(Path(sys.executable).with_name("grape"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(torchrun if processes > 1 else []), grape, "train", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    with JudgeServer(fair) as server:
        runs = {}
        for processes in (1, 2):
            folder = tmp_path / str(processes)
            folder.mkdir()
            if processes == 2:
                shutil.copytree(tmp_path / "1/policy", folder / "policy")
            path = apprentice(folder, judge=server.url, questions=6, improve={"share": 0.25}, **OPTIONS)
            done = launch(path, processes)
            assert done.stdout.count("training  ") == 1  # the leader's table alone
            runs[processes] = folder
        resumed = launch(tmp_path / "2/run.yaml", 2, "--resume", "steps=4", "policy.shard=true")
    assert "step-000004" in resumed.stderr
    one, two = (load_file(folder / "checkpoints/step-000003/model.safetensors") for folder in runs.values())
    assert all(torch.allclose(one[name], two[name], atol=1e-5, rtol=0) for name in one)
    texts = "select step, response_id, route, response from responses where step <= 3 order by all"
    assert ask(runs[1] / "log.duckdb", texts) == ask(runs[2] / "log.duckdb", texts)
    rewards = (
        "select step, response_id, round(reward, 9), round(advantage, 9) from rewards where step <= 3 order by all"
    )
    assert ask(runs[1] / "log.duckdb", rewards) == ask(runs[2] / "log.duckdb", rewards)
    assert ask(runs[2] / "log.duckdb", "select count(*), count(distinct run) from runs") == [(1, 1)]
    trained = "select count(*) from responses where logprob_trained is not null and step <= 3"
    assert ask(runs[2] / "log.duckdb", trained) == [(48,)]
