"""Make responses.jsonl: four models' solutions to the 1,319 test questions of GSM8K, 5,276 rows to score.

    python examples/gsm8k/make.py
    grape score examples/gsm8k/responses.jsonl --no-judges --log gsm8k.duckdb

The solutions and their stored `is_correct` come unchanged from openai/grade-school-math (MIT licence).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def rows() -> Iterator[dict[str, Any]]:
    """One row per question and model; the four responses to a question are its group."""
    with gzip.open(HERE / "model_solutions.jsonl.gz", "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            data = json.loads(line)
            for model in MODELS:
                yield {
                    "question_id": f"gsm8k-{number:04}",
                    "category": "math",
                    "question": data["question"],
                    "reference": data["ground_truth"],
                    "response": data[model]["solution"],
                    "response_id": f"gsm8k-{number:04}/{model}",
                    "metadata": {"model": model, "is_correct": data[model]["is_correct"]},
                }


def main() -> None:
    """Write the rows beside this file."""
    out = HERE / "responses.jsonl"
    lines = [json.dumps(row) + "\n" for row in rows()]
    out.write_text("".join(lines), encoding="utf-8")
    print(f"{out}: {len(lines)} responses")


if __name__ == "__main__":
    main()
