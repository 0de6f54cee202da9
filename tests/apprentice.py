"""A training run small enough for tests: a random policy of 0.1 M parameters, questions, a rubric, and a judge."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import duckdb
from loopback import user_text, verdict
from tiny import tiny_folder

RUBRIC = """
rubric: letters
category: letters
items:
  - {id: starts, criterion: Starts with a lower-case letter., weight: 2, check: regex, with: {pattern: '^[a-z]'}}
  - {id: short, criterion: Is at most 6 characters long., weight: 1, check: regex, with: {pattern: '^.{0,6}$'}}
"""
JUDGED = RUBRIC + "  - {id: pleasant, criterion: Is pleasant to read., weight: 1, judge: default}\n"

IMPROVE = """
{% block user %}{{ question }} Not {{ response }}:{% for item in items %} {{ item.id }} {{ item.reasoning }}{% endfor %}{% endblock %}
"""


def apprentice(folder: Path, *, judge: str | None = None, questions: int = 8, **sections: Any) -> Path:
    """A folder with everything that its `run.yaml` names; ``sections`` replace or add sections. ``judge`` is a URL.

    Its short improvement prompt is found where $GRAPE_HOME is the folder.
    """
    if not (folder / "policy").exists():
        tiny_folder(folder / "policy")
    (folder / "rubrics").mkdir(exist_ok=True)
    (folder / "rubrics/letters.yaml").write_text(JUDGED if judge else RUBRIC)
    (folder / "prompts/improve").mkdir(parents=True, exist_ok=True)
    (folder / "prompts/improve/default.jinja").write_text(IMPROVE)
    rows = [{"question_id": f"q{n}", "question": f"Write {n}.", "reference": f"canary-{n}"} for n in range(questions)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run: dict[str, Any] = {
        "policy": {"model": str(folder / "policy"), "dtype": "float32"},
        "questions": {"path": str(folder / "questions.jsonl"), "category": "letters"},
        "rubrics": str(folder / "rubrics"),
        "sampling": {"questions": 4, "responses": 4, "max_tokens": 8},
        "truncation": {"how": "keep"},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"dir": str(folder / "checkpoints"), "every": 2},
        "steps": 4,
        "log": str(folder / "log.duckdb"),
    }
    if judge:
        settings = {
            "judge": "default",
            "client": "openai",
            "endpoint": judge,
            "model": "m",
            "timeout": 10,
            "retries": 1,
        }
        (folder / "judge.yaml").write_text(json.dumps(settings))
        run["judges"] = {"default": str(folder / "judge.yaml")}
    for name, section in sections.items():
        run[name] = {**run[name], **section} if isinstance(run.get(name), dict) and section else section
    path = folder / "run.yaml"
    path.write_text(json.dumps({name: section for name, section in run.items() if section is not None}))
    return path


def fair(body: dict[str, Any], number: int) -> str:
    """A judge whose verdict is a function of what it was shown, marks apart, in whatever order it is asked."""
    found = re.search(r"<<<response \w+>>>\n(.*)\n<<<end response", user_text(body), re.DOTALL)
    assert found is not None
    digits = hashlib.sha256(found[1].encode()).digest()
    return verdict(digits[0] / 255, 0.5 + digits[1] / 510, f"it reads like {digits[2]}")


def ask(log: Path, sql: str) -> list[tuple[Any, ...]]:
    """A query of a log that nobody is writing to."""
    with duckdb.connect(str(log), read_only=True) as connection:
        return connection.execute(sql).fetchall()
