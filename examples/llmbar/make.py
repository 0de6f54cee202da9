"""Make responses.jsonl and replies/: LLMBar's 468 outputs, and what GPT-4 and ChatGPT once rated each of them.

    python examples/llmbar/make.py
    grape score examples/llmbar/responses.jsonl --rubrics examples/llmbar/rubrics \
        --judge rater=examples/llmbar/judges/gpt-4.yaml --log llmbar.duckdb

And votes/: the same pairs as comparisons, each in both orders, with what three judges chose under up to seven prompts
(README.md calibrates them). The judges replay stored replies, so nothing is asked of anybody. Instructions, outputs,
labels, ratings and votes come unchanged from princeton-nlp/LLMBar (MIT licence): the lines of kind `pair`, the votes of
its two rating protocols, and of all votes the winner (the original output 1 or 2; null where the reply named none).
A rating is one digit from 0 to 9, or whatever the judge wrote instead: nothing at all, or 10.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
JUDGES = {
    "gpt-4": ("GPT-4", "Rating"),
    "gpt-4-norules": ("GPT-4", "Rating_NoRules"),
    "chatgpt": ("ChatGPT", "Rating"),
    "chatgpt-norules": ("ChatGPT", "Rating_NoRules"),
}
VOTERS = {"gpt-4": "GPT-4", "chatgpt": "ChatGPT", "llama2": "LLaMA2"}
OUTPUTS = (1, 2)
ORDERS = {"ab": (1, 2), "ba": (2, 1)}


def read(name: str) -> list[dict[str, Any]]:
    """The stored lines."""
    with gzip.open(HERE / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def responses(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per output; the two outputs to an instruction are a group, and `better` is the human label."""
    return [
        {
            "question_id": pair["id"],
            "category": "llmbar",
            "question": pair["instruction"],
            "response": pair[f"output_{output}"],
            "response_id": f"{pair['id']}/{output}",
            "metadata": {"subset": pair["id"].split("-")[0], "better": pair["label"] == output},
        }
        for pair in lines
        if pair["kind"] == "pair"
        for output in OUTPUTS
    ]


def replies(lines: list[dict[str, Any]], judge: str, protocol: str) -> list[dict[str, Any]]:
    """One line per rating. Each output was rated alone: the votes in the other order repeat these and are left out."""
    return [
        {"response_id": f"{vote['id']}/{output}", "item": "rating", "reply": vote[f"score_{output}"]}
        for vote in lines
        if vote["kind"] == "vote" and (vote["judge"], vote["protocol"]) == (judge, protocol) and not vote["swapped"]
        for output in OUTPUTS
    ]


def comparisons(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per pair and order: the instruction's outputs as the judges saw them, (a) first."""
    return [
        {
            "question_id": pair["id"],
            "category": pair["id"].split("-")[0],
            "question": pair["instruction"],
            "response": "\n\n".join(f"Output ({x}):\n{pair[f'output_{n}']}" for x, n in zip("ab", shown, strict=True)),
            "response_id": f"{pair['id']}/{order}",
            "metadata": {
                "subset": pair["id"].split("-")[0],
                "pair": pair["id"],
                "order": order,
                "swapped_with": f"{pair['id']}/{order[::-1]}",
            },
        }
        for pair in lines
        if pair["kind"] == "pair"
        for order, shown in ORDERS.items()
    ]


def gold(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One label per comparison: 1 where the output that is shown first is the better one."""
    return [
        {"response_id": f"{pair['id']}/{order}", "item": "first", "score": int(pair["label"] == shown[0])}
        for pair in lines
        if pair["kind"] == "pair"
        for order, shown in ORDERS.items()
    ]


def votes(lines: list[dict[str, Any]], judge: str) -> list[dict[str, Any]]:
    """One line per comparison and prompt, which is a sample: whether the output that was shown first won."""
    return [
        {
            "response_id": f"{line['id']}/{order}",
            "item": "first",
            "sample": sample,
            "reply": None if winner is None else "met" if winner == ORDERS[order][0] else "not met",
        }
        for line in lines
        if line["judge"] == judge
        for order in ["ba" if line["swapped"] else "ab"]
        for sample, winner in enumerate(line["winner"].values())
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main(folder: Path = HERE) -> None:
    """Write the files into a folder: beside this one, or the one that is named on the command line."""
    lines, winners = read("llmbar_ratings.jsonl.gz"), read("llmbar_votes.jsonl.gz")
    write(folder / "responses.jsonl", responses(lines))
    for name, (judge, protocol) in JUDGES.items():
        write(folder / "replies" / f"{name}.jsonl", replies(lines, judge, protocol))
    write(folder / "votes/responses.jsonl", comparisons(lines))
    write(folder / "votes/gold.jsonl", gold(lines))
    for name, judge in VOTERS.items():
        write(folder / "votes/replies" / f"{name}.jsonl", votes(winners, judge))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
