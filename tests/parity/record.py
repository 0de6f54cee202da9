"""How rollouts.jsonl came to be: four steps of a run of the quickstart's policy, as its optimizer had them.

    python tests/parity/record.py

Words of 2 to 16 letters instead of the quickstart's 5 to 7, so that prompts and responses differ in length and some
responses are cut; three of the rubrics' five items, so that rewards are often equal. The four are the first in a row
of which one has a group of equal rewards. Another sampler or processor may draw others.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch
os.environ.setdefault("OMP_NUM_THREADS", "1")

from grape.learner import Learner
from grape.member import Member
from grape.training import train

FILE = Path(__file__).with_name("rollouts.jsonl")
RUN = "examples/quickstart/run.yaml"
CHANGED = ["evaluate=null", "steps=30", "sampling={questions: 6, responses: 4, max_tokens: 10}", "truncation.how=keep"]
RUBRIC = """
rubric: {0}
category: {0}
items:
  - {{id: correct, criterion: The answer is right., weight: 8, check: word_is}}
  - {{id: sure, criterion: It commits to one answer., weight: 3, judge: reader, scale: binary}}
  - {{id: kind, criterion: It is friendly., weight: 3, judge: reader, scale: binary}}
"""
LETTERS = "abefgiklmnoprstuwxz"
Steps = list[list[Member]]


class Recorder(Learner):
    """A learner that keeps what it is given."""

    steps: Steps = []

    def update(self, members, step):
        self.steps.append(list(members))
        return super().update(members, step)


def questions(count: int, rng: random.Random) -> list[dict[str, str]]:
    """The quickstart's two tasks, with words of very different lengths."""
    rows = {}
    while len(rows) < count:
        word = "".join(rng.sample(LETTERS, rng.choice([2, 3, 5, 9, 16])))
        rows[f"b-{word}"] = {"category": "backwards", "question": f"Spell backwards: {word}", "reference": word[::-1]}
        rows[f"s-{word}"] = {
            "category": "sorted", "question": f"Sort the letters: {word}", "reference": "".join(sorted(word)),
        }  # fmt: skip
    return [{"question_id": name, **row} for name, row in rows.items()]


def with_a_dead_group(steps: Steps) -> Steps:
    """Four steps in a row, one of which has a group of equal rewards."""
    dead = []
    for step in steps:
        groups = defaultdict(set)
        for member in step:
            groups[member.group].add(member.reward)
        dead.append(any(len(rewards) == 1 for rewards in groups.values()))
    at = next(at for at in range(len(steps) - 3) if any(dead[at : at + 4]))
    return steps[at : at + 4]


async def main() -> None:
    """Run, choose, write."""
    sys.modules["grape.training"].Learner = Recorder
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "questions.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in questions(180, random.Random(0))))
        for name in ("backwards", "sorted"):
            Path(scratch, f"{name}.yaml").write_text(RUBRIC.format(name))
        places = [f"questions.path={path}", f"rubrics={scratch}", f"log={scratch}/log.duckdb"]
        await train(RUN, overrides=[*CHANGED, *places])
    FILE.write_text(
        "".join(
            json.dumps({"step": step, "group": m.group, "prompt_ids": m.prompt_ids, "completion_ids": m.token_ids,
                        "reward": m.reward}) + "\n"
            for step, members in enumerate(with_a_dead_group(Recorder.steps), 1)
            for m in members
        )
    )  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main())
