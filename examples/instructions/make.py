"""Make responses.jsonl: six answers to each of the 541 prompts of IFEval, 3,246 rows with 834 instructions to check.

    python examples/instructions/make.py
    grape score examples/instructions/responses.jsonl --no-judges --log instructions.duckdb

The dataset has no responses. The answers are ours, one in each of six manners, the same for every prompt: what follows
an instruction does so by its manner (small letters, a title, a fence of JSON), and not because it knows the prompt.
With `loose` as an argument the rows are judged in the loose form. Prompts: README.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def rows(form: str = "strict") -> Iterator[dict[str, Any]]:
    """One row per prompt and answer; the six answers to a prompt are its group."""
    answers = {file.stem: file.read_text(encoding="utf-8") for file in sorted((HERE / "answers").iterdir())}
    with (HERE / "ifeval_prompts.jsonl").open(encoding="utf-8") as file:
        for line in file:
            data = json.loads(line)
            for manner, answer in answers.items():
                yield {
                    "question_id": f"ifeval-{data['key']}",
                    "category": "instructions",
                    "question": data["prompt"],
                    "response": answer.replace("{question}", data["prompt"]),
                    "response_id": f"ifeval-{data['key']}/{manner}",
                    "instruction_id_list": data["instruction_id_list"],
                    "kwargs": data["kwargs"],
                    "instruction_form": form,
                    "metadata": {"manner": manner},
                }


def main() -> None:
    """Write the rows beside this file."""
    out = HERE / "responses.jsonl"
    lines = [json.dumps(row) + "\n" for row in rows(*sys.argv[1:2])]
    out.write_text("".join(lines), encoding="utf-8")
    print(f"{out}: {len(lines)} responses")


if __name__ == "__main__":
    main()
