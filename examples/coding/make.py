"""Make responses.jsonl: four answers to each of the 164 programming tasks of HumanEval, 656 rows to score.

    python examples/coding/make.py
    grape score examples/coding/responses.jsonl --no-judges --log coding.duckdb

The tasks, tests and canonical solutions come unchanged from openai/human-eval (MIT licence). The dataset has no
responses of models; the answers are its own solution bare and in an explained block, an empty body, and a program that
tries to pass for any.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

ANSWER = """The function follows the examples in its docstring.

```python
{program}```

It uses the standard library only.
"""

PRETENDER = """
import sys

class Right:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True

def {entry_point}(*arguments):
    print("1 passed")
    return Right()
"""


def tasks() -> list[dict[str, Any]]:
    """The 164 tasks as they are published."""
    with gzip.open(HERE / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def row(task: dict[str, Any]) -> dict[str, Any]:
    """What the rows of one task share."""
    return {
        "question_id": task["task_id"],
        "category": "coding",
        "question": task["prompt"],
        "tests": task["test"],
        "entry_point": task["entry_point"],
    }


def responses(task: dict[str, Any]) -> dict[str, str]:
    """The answers to one task, by their kind."""
    program = task["prompt"] + task["canonical_solution"]
    return {
        "canonical": task["canonical_solution"],
        "explained": ANSWER.format(program=program if program.endswith("\n") else program + "\n"),
        "empty": "    pass\n",
        "pretender": PRETENDER.format(entry_point=task["entry_point"]),
    }


def rows() -> Iterator[dict[str, Any]]:
    """One row per task and kind of answer."""
    for task in tasks():
        for kind, response in responses(task).items():
            response_id = f"{task['task_id']}/{kind}"
            yield {**row(task), "response": response, "response_id": response_id, "metadata": {"kind": kind}}


def main() -> None:
    """Write the rows beside this file."""
    out = HERE / "responses.jsonl"
    lines = [json.dumps(row) + "\n" for row in rows()]
    out.write_text("".join(lines), encoding="utf-8")
    print(f"{out}: {len(lines)} responses")


if __name__ == "__main__":
    main()
