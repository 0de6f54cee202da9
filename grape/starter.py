"""`grape init`: the files of a first project, small enough to read and ready to run."""

from __future__ import annotations

from pathlib import Path

from grape.errors import ConfigError

RUBRIC = """\
# What a good answer of a support desk is. `grape check rubrics` validates this file and runs its cases;
# `grape schema rubric` prints the JSON Schema by which an editor completes it.
rubric: support
version: 1
category: support
description: Answers to customers of a shop.
items:
  - id: names-deadline
    criterion: Names the deadline of 30 days for returns.
    weight: 3
    check: regex                       # a verifiable checker
    with: {pattern: '\\b30[ -]days?\\b'}
  - id: short
    criterion: Stays under 60 words.
    weight: 1
    check: length
    with: {unit: words, max: 60}
  - id: kind
    criterion: Acknowledges the customer's trouble before it explains the rules.
    weight: 2
    judge: default                     # judges/default.yaml
cases:
  - question: May I send the shoes back?
    response: I am sorry they pinch. You have 30 days to send them back.
    expect: {names-deadline: 1, short: 1, kind: ">=0.7"}
  - question: May I send the shoes back?
    response: No.
    expect: {names-deadline: 0, short: 1}
"""

JUDGE = """\
# Any OpenAI-compatible server; `grape schema judge` prints what can stand here.
judge: default
client: openai
endpoint: http://localhost:8000/v1
model: some-model
prompt: score
sampling: {temperature: 0, max_tokens: 512}
confidence: verbal
timeout: 60
retries: 3
"""

ROWS = """\
{"question_id": "shoes", "category": "support", "question": "May I send the shoes back?", \
"response": "I am sorry they pinch. You have 30 days to send them back."}
{"question_id": "shoes", "category": "support", "question": "May I send the shoes back?", "response": "No."}
{"question_id": "lamp", "category": "support", "question": "The lamp arrived broken. What now?", \
"response": "How annoying, I am sorry. Send it back within 30 days and we pay the postage."}
{"question_id": "lamp", "category": "support", "question": "The lamp arrived broken. What now?", \
"response": "Read the terms on our site."}
"""

FILES = {"rubrics/support.yaml": RUBRIC, "judges/default.yaml": JUDGE, "responses.jsonl": ROWS}


def init(folder: str | Path = ".") -> list[Path]:
    """Write a rubric, a judge and four responses into ``folder``. Refuses to overwrite anything."""
    targets = {Path(folder) / name: text for name, text in FILES.items()}
    for target in targets:
        if target.exists():
            raise ConfigError(f"{target}: exists already; grape init overwrites nothing")
    for target, text in targets.items():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{target}: {error.strerror}") from error
    return list(targets)
