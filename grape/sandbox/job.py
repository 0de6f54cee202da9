"""What is asked of a sandbox and what it answers: the same two records in a process and over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from grape.types import Strict


class Job(Strict):
    """A program and the tests that judge it.

    ``blocks`` are the pieces of an answer that may be the program (`program.choose` picks one); ``prompts`` are texts
    that may hold the stub and the helpers which the question gave; ``tests`` is as formats.md has it. ``timeout`` is
    in seconds for one run or call, ``memory`` in MB for the program and all its processes.
    """

    blocks: Annotated[tuple[str, ...], Field(min_length=1)]
    tests: str
    prompts: tuple[str, ...] = ()
    entry_point: str | None = None
    timeout: Annotated[float, Field(gt=0, le=600)] = 3.0
    memory: Annotated[int, Field(ge=64, le=65536)] = 512


class Failure(Strict):
    """One expectation that does not hold: its line in the tests, its source, and how it failed."""

    line: int
    test: str
    how: str


class Report(Strict):
    """How many of the tests hold. ``fault`` is set where the tests themselves are broken: then nothing was measured."""

    held: Annotated[int, Field(ge=0)] = 0
    total: Annotated[int, Field(ge=0)] = 0
    failures: tuple[Failure, ...] = ()
    fault: str = ""

    @model_validator(mode="after")
    def _adds_up(self) -> Report:
        if self.held > self.total or bool(self.total) == bool(self.fault):
            raise ValueError("a report has tests of which some hold, or a fault")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of a script. ``how`` is empty if it ended by itself with status 0, else says what befell it."""

    stdout: str
    stderr: str
    how: str
