"""Programs judged by the question's tests, which run where the program cannot reach (`grape.sandbox`).

Which text is the program: the last fenced block of Python (tagged `python` or `py`, or without a tag where no block has
one) that defines the function the tests call first, or for tests that run it as a script the last that is Python at
all; failing that the whole response, after the question's own code where that defines the entry point (so that a body
alone completes it). What stands in a leading `<think>` is not the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from grape.checkers import Finding, checker, from_row
from grape.errors import ConfigError
from grape.sandbox import Job, Report, Sandbox
from grape.types import Question, Response

Seconds = Annotated[float, Field(gt=0, le=600)]
Megabytes = Annotated[int, Field(ge=64, le=65536)]

THINK = re.compile(r"\s*<think>.*</think>", re.DOTALL)
PYTHON = {"python", "py", "python3", "py3"}
SHOWN = 5  # failures told of
LONGEST = 2000  # characters of a reasoning


@checker
def code(
    question: Question,
    response: Response,
    *,
    tests: str = from_row("tests"),
    timeout: Seconds = 3.0,
    memory: Megabytes = 512,
    sandbox: Sandbox,
) -> Finding:
    """The share of the tests that the response's program passes; all or nothing for `check(candidate)`.

    ``tests`` is Python with `run(stdin)`, `call(name, *args)` and `expect(condition)`, or defines `check(candidate)`
    for the row's `entry_point`. ``timeout`` is in seconds for one run or call, five times that for all; ``memory`` in
    MB. A program's crash, endless loop or flood fails what it touches. Tests that are broken themselves raise
    ConfigError, a sandbox that is missing or broken SandboxError.
    """
    job = Job(
        blocks=pieces(answer(response.text)),
        prompts=pieces(prompt_text(question)),
        tests=sound(tests),
        entry_point=question.entry_point,
        timeout=timeout,
        memory=memory,
    )
    report = sandbox.evaluate(job)
    if report.fault:
        raise ConfigError(f"question {question.question_id!r}: {printable(report.fault)}")
    return Finding(report.held / report.total, told(report), f"{report.held}/{report.total}")


def answer(text: str) -> str:
    """A response without the thinking that it opens with."""
    thinking = THINK.match(text)
    return text[thinking.end() :] if thinking else text


def pieces(text: str) -> tuple[str, ...]:
    """The text itself, and then its fenced blocks of Python."""
    text = sound(text)
    found = list(fenced(text))
    tagged = [block for tag, block in found if tag in PYTHON]
    return (text, *(tagged or [block for tag, block in found if not tag]))


def fenced(text: str) -> Iterator[tuple[str, str]]:
    """Each fenced block with its tag in lower case. A block that nothing closes goes to the end of the text."""
    tag = mark = ""
    length = indent = 0  # of the fence that is open
    block: list[str] = []
    for line in text.split("\n"):
        bare = line.strip()
        margin = len(line) - len(line.lstrip(" \t"))
        run = len(bare) - len(bare.lstrip(bare[:1]))
        if length:
            if run == len(bare) >= length and bare[0] == mark:
                yield tag, "\n".join([*block, ""])
                length, block = 0, []
            else:
                block.append(line[min(margin, indent) :])
        elif run >= 3 and (bare[0] == "~" or (bare[0] == "`" and "`" not in bare[run:])):
            tag, mark, length, indent = bare[run:].lower().strip("{} ").partition(" ")[0], bare[0], run, margin
    if length:
        yield tag, "\n".join(block)


def prompt_text(question: Question) -> str:
    """The question, or of a chat the last thing that its user said."""
    if isinstance(question.text, str):
        return question.text
    said = [message["content"] for message in question.text if message["role"] == "user"]
    return said[-1] if said else ""


def told(report: Report) -> str:
    """How many tests hold, and which do not and why."""
    lines = [f"{report.held} of {report.total} tests {'holds' if report.total == 1 else 'hold'}"]
    lines += [f"line {failure.line}: {failure.test}: {failure.how}" for failure in report.failures[:SHOWN]]
    if (more := report.total - report.held - SHOWN) > 0:
        lines.append(f"and {more} more")
    text = "\n".join(printable(line) for line in lines)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def sound(text: str) -> str:
    """``text`` with a question mark for each lone surrogate: no sandbox service takes them, and no Python program."""
    return text.encode("utf-8", "replace").decode("utf-8")


def printable(text: str) -> str:
    """``text`` as any log takes it: a program chose part of it."""
    return "".join(character if character.isprintable() else " " for character in text)
