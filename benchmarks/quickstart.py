"""Whether the quickstart learns, seed by seed: held-out results before and after, greedy accuracy, and the time taken.

    python benchmarks/quickstart.py [--seeds 0 1 2 3 4]

Every seed is a run of its own in a folder of its own. Exit status 1 where a seed's held-out correctness or its sum of
weight x score rises by less than 0.2, or its greedy accuracy does not rise.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from time import perf_counter

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as the command does
os.environ.setdefault("OMP_NUM_THREADS", "1")

from grape.chat import prompt_ids
from grape.checkers import check_response, load_checkers
from grape.config import QuestionsConfig
from grape.policy import load_policy
from grape.questions import read_questions
from grape.resources import packaged
from grape.rollout import Sampling, sample
from grape.tour import quickstart
from grape.types import Response

LEAST = 0.2
FOLDER = packaged("quickstart")


def main() -> int:
    """Run the seeds and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    seeds, good = parser.parse_args().seeds, 0
    before = greedy(FOLDER / "policy")
    print("seed  held-out correct    sum of weight x score  greedy accuracy     seconds")
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            start = perf_counter()
            done = asyncio.run(quickstart(Path(name) / "log.duckdb", seed=seed, checkpoint=Path(name) / "policy"))
            seconds = perf_counter() - start
            assert done.folder is not None, "it has a checkpoint"
            pairs = [
                tuple(accuracy(done.heldout[step]) for step in (min(done.heldout), max(done.heldout))),
                tuple(done.heldout[step]["weighted/mean"] for step in (min(done.heldout), max(done.heldout))),
                (before, greedy(done.folder)),
            ]
        rises = [last - first for first, last in pairs]
        good += rises[0] >= LEAST and rises[1] >= LEAST and rises[2] > 0
        cells = [f"{first:.3f} {last:.3f} ({last - first:+.3f})" for first, last in pairs]
        print(f"{seed:4}  {'  '.join(cells)}  {seconds:7.1f}", flush=True)
    print(f"{good} of {len(seeds)} seeds learn")
    return 0 if good == len(seeds) else 1


def accuracy(metrics: dict[str, float]) -> float:
    """The mean score of the item `correct` over both tasks, which have as many held-out questions each."""
    return fmean(value for name, value in metrics.items() if name.startswith("score/") and name.endswith("/correct"))


def greedy(folder: Path) -> float:
    """The share of held-out questions that the policy's likeliest response answers rightly."""
    policy = load_policy(str(folder))
    rows = read_questions(QuestionsConfig(path=str(FOLDER / "heldout.jsonl"))).rows
    questions = list(rows.questions.values())
    prompts = [prompt_ids(policy.tokenizer, question) for question in questions]
    likeliest = Sampling(temperature=0, training=False)
    said = sample(policy, prompts, responses=1, max_tokens=20, sampling=likeliest)
    load_checkers(FOLDER / "checkers.py")
    return fmean(
        check_response("correct", "word_is", {}, 1.0, questions[one.group], response(one.text)).score or 0.0
        for one in said
    )


def response(text: str) -> Response:
    """A response of this text."""
    return Response(response_id="", question_id="", text=text)


if __name__ == "__main__":
    sys.exit(main())
