"""Programs per second: confined, with their tests in a second sandbox, beside a plain subprocess for each.

    python benchmarks/sandbox.py [--seconds 10] [--threads 2] [--rounds 3]

Both run the 164 canonical solutions of HumanEval with their tests, in turns, so that what else the machine does falls
on both. The plain subprocess is no sandbox: program and tests share one process, which can reach everything. Confined,
a program takes two processes, one for itself and one for its tests. The smallest script, alone in one process, shows
what a process costs. The best round of each counts.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grape.sandbox import Job, Sandbox
from grape.sandbox.confine import DEFAULT_INTERPRETER

TASKS = Path(__file__).resolve().parent.parent / "examples/coding/HumanEval.jsonl.gz"


def tasks() -> list[dict[str, Any]]:
    """The tasks of HumanEval."""
    with gzip.open(TASKS, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def confined(sandbox: Sandbox, task: dict[str, Any]) -> bool:
    """Judge a canonical solution as the checker `code` does."""
    prompt, entry_point = task["prompt"], task["entry_point"]
    job = Job(blocks=(task["canonical_solution"],), prompts=(prompt,), tests=task["test"], entry_point=entry_point)
    return sandbox.evaluate(job).held == 1


def plain(task: dict[str, Any]) -> bool:
    """Judge it in one ordinary process."""
    source = f"{task['prompt']}{task['canonical_solution']}\n{task['test']}\ncheck({task['entry_point']})\n"
    return subprocess.run([DEFAULT_INTERPRETER, "-I", "-c", source], check=False).returncode == 0


def rate(work: Callable[[dict[str, Any]], bool], threads: int, seconds: float) -> float:
    """How often per second ``work`` is done, by some threads for some seconds, on one task after the other."""
    todo = itertools.cycle(tasks())
    end = time.perf_counter() + seconds

    def turn(_: int) -> int:
        done = 0
        while time.perf_counter() < end:
            if not work(next(todo)):
                raise SystemExit("a canonical solution did not pass")
            done += 1
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(turn, range(threads))) / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    best: dict[str, float] = {}
    with Sandbox(workers=arguments.threads) as sandbox:
        ways: dict[str, Callable[[dict[str, Any]], bool]] = {
            "a script, confined": lambda _: sandbox.run("print(1)").stdout == "1\n",
            "HumanEval, confined": lambda task: confined(sandbox, task),
            "HumanEval, plain": plain,
        }
        for _ in range(arguments.rounds):
            for name, work in ways.items():
                share = arguments.seconds / arguments.rounds
                best[name] = max(best.get(name, 0.0), rate(work, arguments.threads, share))
    for name, value in best.items():
        print(f"{name:20} {value:7.1f} programs/s")
    print(f"confined / plain     {best['HumanEval, confined'] / best['HumanEval, plain']:7.2f}")


if __name__ == "__main__":
    main()
