"""Critique logs made by hand: the rows that a run would have left, with the numbers that a test wants."""

from __future__ import annotations

import json
import shutil
import tempfile
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from grape.log import Log

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def store(
    path: Any,
    groups: dict[str, list[Any]],
    *,
    run: str = "r1",
    day: int = 1,
    step: int = 0,
    kind: str = "score",
    questions: dict[str, Any] | None = None,
    **more: Any,
) -> None:
    """A run of these groups: question id -> responses, each a mapping with `text`, `weighted`, and what else is known.

    `weighted` None is a response without a reward. `items` maps an item to the columns of its verdict. Responses are
    called `<question id>/<number>`, or `<question id>-<step>-<number>` where the step is not 0.
    """
    asked = questions or {}
    rows: dict[str, list[dict[str, Any]]] = {"responses": [], "rewards": [], "verdicts": []}
    for question_id, members in groups.items():
        for number, member in enumerate(members):
            response_id = f"{question_id}-{step}-{number}" if step else f"{question_id}/{number}"
            own = {"run": run, "step": step, "question_id": question_id, "response_id": response_id, "category": "c"}
            weighted = member.get("weighted")
            rows["responses"].append(
                {**own, "response": member["text"], "route": "given", **member.get("response", {})}
            )
            reward = {"reward": weighted, "weighted": weighted, "normalized": weighted, **member.get("reward", {})}
            unscorable = "every item failed" if reward["reward"] is None else None
            rows["rewards"].append({**own, "unscorable": unscorable, **reward})
            for item, verdict in member.get("items", {}).items():
                rows["verdicts"].append({
                    **own, "item": item, "kind": "judge", "criterion": f"Is {item}.", "polarity": "desirable",
                    "applicable": True, "outcome": "ok" if verdict.get("score") is not None else "timeout", "judge": "j",
                    "calls": "[]", **verdict,
                })  # fmt: skip
    if not Path(path).exists():
        Path(path).write_bytes(empty())
    texts = [{"run": run, "question_id": name, "category": "c", "question": f"Question {name}?", **asked.get(name, {})}
             for name in groups]  # fmt: skip
    with Log(path) as log:
        known = [name for (name,) in log.query("select run from runs")]
        begun = {"run": run, "kind": kind, "started": BEGAN + timedelta(days=day), **more}
        log.append(runs=[] if run in known else [begun], questions=[] if run in known else texts, **rows)


@cache
def empty() -> bytes:
    """The file of a log without rows: to make one takes longer than most tests that begin with it."""
    folder = Path(tempfile.mkdtemp())
    try:
        Log(folder / "log.duckdb").close()
        return (folder / "log.duckdb").read_bytes()
    finally:
        shutil.rmtree(folder)


def ask(path: Any, sql: str) -> list[tuple[Any, ...]]:
    with Log(path) as log:
        return log.query(sql)


def lines(path: Any) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores(*weighted: float | None) -> list[dict[str, Any]]:
    """Responses `answer 0`, `answer 1`, ... with these rewards."""
    return [{"text": f"answer {number}", "weighted": one} for number, one in enumerate(weighted)]
