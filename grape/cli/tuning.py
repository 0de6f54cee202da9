"""Verbs about learning from given data: sft, reward-model, dpo."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grape.cli.options import FILE, needs_torch

if TYPE_CHECKING:
    from grape.recipes import Recipe


def _verb(name: str, help: str) -> click.Command:
    """A verb of this family: they differ in the model of their file alone."""

    def run(run: Path, overrides: tuple[str, ...], resume: bool, allow_changes: bool, as_json: bool) -> None:
        _tune(name, run, overrides, resume, allow_changes, as_json)

    run.__doc__ = help
    options: list[Callable[[Any], Any]] = [
        click.option("--json", "as_json", is_flag=True, help="A JSON line per step on stdout instead of a table."),
        click.option("--allow-changes", is_flag=True, help="Resume although the data or a setting has changed."),
        click.option("--resume", is_flag=True, help="Go on after the last checkpoint in checkpoint.dir."),
        click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]..."),
        click.argument("run", type=FILE),
    ]
    for option in options:
        run = option(run)
    return click.command(name)(run)


def _tune(name: str, run: Path, overrides: tuple[str, ...], resume: bool, allow_changes: bool, as_json: bool) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall a busy machine
    needs_torch()
    from grape.progress import TrainingProgress, tuned_table
    from grape.recipes import DpoRun, RewardModelRun, SftRun, load_recipe
    from grape.report import show
    from grape.step import StepReport
    from grape.tuning import tune

    kinds: dict[str, type[Recipe]] = {"sft": SftRun, "reward-model": RewardModelRun, "dpo": DpoRun}
    config = load_recipe(kinds[name], run, overrides)
    steps: dict[int, dict[str, float]] = {}
    with TrainingProgress(name) as bar, redirect_stdout(sys.stderr):

        def report(step: StepReport) -> None:
            bar.step(step.step, step.steps, step.metrics, step.seconds)
            steps[step.step] = step.metrics
            if as_json:
                line = {"step": step.step, "seconds": step.seconds, **step.metrics}
                print(json.dumps(line), file=sys.__stdout__, flush=True)

        done = tune(config, resume=resume, allow_changes=allow_changes, report=report)
    if not as_json and steps:
        show(tuned_table(steps, done.heldout))
    show(f"{'reward model' if name == 'reward-model' else 'policy'}: {done.folder}", stderr=True)
    query = f"select step, metrics->>'loss' as loss from steps where run = '{done.run}'"
    show(f'log: {config.log}   ask it: grape sql "{query}" --log {config.log}', stderr=True)


FILE_HELP = """RUN is a YAML file: policy: {model: FOLDER}, data: {path: rows.jsonl}, checkpoint: {dir: FOLDER},
and more (docs/tuning.md; `grape schema %s`); FIELD=VALUE overrides a field, as in optimizer.lr=1e-4."""

sft = _verb(
    "sft",
    f"""Teach a policy given responses (supervised fine-tuning).

{FILE_HELP % "sft"} Rows are {{"question", "response"}} or {{"messages"}}.
""",
)
reward_model = _verb(
    "reward-model",
    f"""Train a reward model on pairs, rankings or labels.

{FILE_HELP % "reward-model"} Rows are {{"question", "chosen", "rejected"}}; {{"question", "responses"}}, best first; or
{{"question", "response", "label"}}. A rubric's item reads the result: reward_model: FOLDER.
""",
)
dpo = _verb(
    "dpo",
    f"""Train a policy on preferences directly (DPO, KTO, ...).

{FILE_HELP % "dpo"} Rows are {{"question", "chosen", "rejected"}}; of loss.kind=kto also
{{"question", "response", "label"}}.
""",
)
