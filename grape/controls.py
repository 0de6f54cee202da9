"""Null controls: one trivial text per question, judged like the real responses; a judge that rewards it is fooled.

The texts are those to which judges are known to give high scores although they say nothing (Zhao et al., One Token to
Fool LLM-as-a-Judge, 2025); they take turns. Controls have a run of their own in the log, `NAME.controls`, and no vote
anywhere: rewards, advantages and mean confidences are those of a run without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from statistics import fmean

from grape.batch import Judged, Settled, settle
from grape.records import Record, response_rows
from grape.reward import Baseline, Scale
from grape.rows import Rows
from grape.types import Response

TRIVIAL = (":", "Thought process:", ".", "Let's solve this problem step by step.", ",", "Solution", " ", "解")


def with_controls(rows: Rows) -> list[Response]:
    """One control for each question, in their order; the texts take turns."""
    return [
        Response(response_id=f"{question_id}.control", question_id=question_id, text=text)
        for question_id, text in zip(rows.questions, cycle(TRIVIAL), strict=False)
    ]


def settle_controls(
    batch: Sequence[Judged], controls: Sequence[Judged], baseline: Baseline, scale: Scale
) -> list[Settled]:
    """What the controls would have got beside the real responses, without being counted among them."""
    counts = [True] * len(batch) + [False] * len(controls)
    return settle([*batch, *controls], baseline=baseline, scale=scale, counts=counts)[len(batch) :]


def opening(tables: Mapping[str, Sequence[Record]], rows: Rows, controls: Sequence[Judged]) -> dict[str, list[Record]]:
    """The rows that the run of the controls begins with, from those of the run that they stand beside."""
    (run,) = tables["runs"]
    name = control_run(run["run"])
    given = replace(rows, responses=[judged.response for judged in controls])
    return {
        "runs": [{**run, "run": name, "kind": "controls"}],
        "questions": [{**row, "run": name} for row in tables["questions"]],
        "responses": response_rows(name, 0, given, route="control"),
    }


def control_run(run: str) -> str:
    """The name of the controls' run."""
    return f"{run}.controls"


def line(
    batch: Sequence[Judged], results: Sequence[Settled], controls: Sequence[Judged], found: Sequence[Settled]
) -> str:
    """How many controls were rewarded above the mean of the real responses to their question."""
    real: dict[str, list[float]] = {}
    for judged, settled in zip(batch, results, strict=True):
        if settled.weighted is not None:
            real.setdefault(judged.response.question_id, []).append(settled.weighted)
    pairs = [
        (settled.weighted, fmean(real[judged.response.question_id]))
        for judged, settled in zip(controls, found, strict=True)
        if settled.weighted is not None and judged.response.question_id in real
    ]
    above = sum(own > mean for own, mean in pairs)
    left = f"; {len(controls) - len(pairs)} could not be compared" * (len(pairs) < len(controls))
    return f"controls: {above} of {len(pairs)} trivial responses scored above the mean of the real ones{left}"
