"""A training run in a process of its own, which a kill -9 may end at a chosen point or at any moment; and its log."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import duckdb

# One server has loaded torch and the rest, once, and forks for each run: a kill every second would be no test else.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["grape.training", "transformers.models.qwen3.modeling_qwen3", "openai", "peft"])

Death = tuple[str, str]  # an event of Python's audit, or one of ours below, and what its arguments must hold
APART = {"created", "started", "finished", "latency", "attempts"}  # what two equal runs differ in, but for their names


def begin(folder: Path, *overrides: str, death: Death | None = None, **options: Any) -> Any:
    """Start `run.yaml` of a folder in that folder; it ends itself at ``death``, before what the event announces."""
    process = FORKS.Process(target=_live, args=(str(folder), overrides, death, options), daemon=True)
    process.start()
    return process


def live(folder: Path, *overrides: str, death: Death | None = None, timeout: float = 120, **options: Any) -> None:
    """The same to its end, which must be the one that is expected."""
    process = begin(folder, *overrides, death=death, **options)
    process.join(timeout)
    assert process.exitcode == (-signal.SIGKILL if death else 0), f"ended with {process.exitcode} (death: {death})"


def _live(folder: str, overrides: tuple[str, ...], death: Death | None, options: dict[str, Any]) -> None:
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    import grape

    os.chdir(folder)
    torch.set_num_threads(1)
    if death:
        updates = iter(range(1, 1000))
        register_optimizer_step_pre_hook(lambda *_: sys.audit("update", f"before {(number := next(updates))}", number))
        register_optimizer_step_post_hook(lambda *_: sys.audit("update", "after"))
        sys.addaudithook(lambda event, arguments: _die(death, event, arguments))
    verb = options.pop("verb", "train")
    options["report"] = lambda step: sys.audit("reported", f"step {step.step}")
    if verb == "train":
        asyncio.run(grape.train("run.yaml", overrides=overrides, **options))
    elif verb == "constitution":
        from grape.constitution import constitution

        options["report"] = lambda phase, step: sys.audit("reported", f"{phase} {step.step}")
        asyncio.run(constitution("run.yaml", overrides=overrides, **options))
    else:
        from grape.recipes import load_recipe
        from grape.tuning import VERBS, tune

        (kind,) = (kind for kind, name in VERBS.items() if name == verb)
        tune(load_recipe(kind, "run.yaml", overrides), **options)


def _die(death: Death, event: str, arguments: tuple[Any, ...]) -> None:
    if event == death[0] and death[1] in " ".join(map(str, arguments)):
        os.kill(os.getpid(), signal.SIGKILL)


def logged(log: Path) -> dict[str, list[str]]:
    """The rows of every table of a log, sorted: all that two equal runs must agree in."""
    tables = {}
    with duckdb.connect(str(log), read_only=True) as connection:
        for (table,) in connection.execute(
            "select table_name from duckdb_tables() where table_name <> 'spools'"
        ).fetchall():
            found = connection.execute(f"from {table}")
            names = [column[0] for column in found.description]
            tables[table] = sorted(_row(dict(zip(names, row, strict=True))) for row in found.fetchall())
    return tables


def _row(row: dict[str, Any]) -> str:
    kept = {name: value for name, value in row.items() if name not in APART}
    if "run" in kept:
        kept["run"] = re.sub(r"^\d{8}-\d{6}-\w{6}", "RUN", kept["run"])
    if "metrics" in kept:
        kept["metrics"] = {name: value for name, value in json.loads(kept["metrics"]).items() if name != "seconds"}
    return json.dumps(kept, sort_keys=True, default=repr)


def state(folder: Path) -> dict[str, bytes]:
    """Weights, optimizer and position in the last checkpoint, byte by byte."""
    last, files = sorted(folder.glob("checkpoints/step-*"))[-1], ("optimizer.pt", "state.json")
    return {
        f"{last.name}/{path.name}": path.read_bytes()
        for path in sorted(last.iterdir())
        if path.name in files or path.suffix == ".safetensors"
    }


def wait_for(condition: Any, seconds: float = 60) -> None:
    """Return when it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)
