"""Verbs about learning from given data, and of the best that was sampled: sft, reward-model, dpo, best-of."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grape.cli.options import FILE, PYTHON, SANDBOX, UNSAFE, make_sandbox, needs_torch

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
    f"""Train a reward model on pairs, rankings, labels or labelled steps.

{FILE_HELP % "reward-model"} Rows are {{"question", "chosen", "rejected"}}; {{"question", "responses"}}, best first;
{{"question", "response", "label"}}; or {{"question", "steps", "labels"}} (loss.kind=process). A rubric's item reads the
result, unless it is of steps: reward_model: FOLDER.
""",
)
dpo = _verb(
    "dpo",
    f"""Train a policy on preferences directly (DPO, KTO, ...).

{FILE_HELP % "dpo"} Rows are {{"question", "chosen", "rejected"}}; of loss.kind=kto also
{{"question", "response", "label"}}.
""",
)


@click.command("best-of")
@click.argument("run", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--out", type=FILE, metavar="FILE", help="What is kept, as rows of grape sft (.jsonl or .parquet).")
@click.option("--keep", type=click.Choice(["best", "top", "majority"]), default="best", show_default=True,
              help="The best of each question, the best of all, or what most say.")  # fmt: skip
@click.option("--number", type=int, metavar="K", help="How many --keep top keeps.")
@click.option("--by", type=click.Choice(["weighted", "reward", "normalized"]), default="weighted", show_default=True,
              help="The reward that is compared.")  # fmt: skip
@click.option("--min-reward", type=float, metavar="X", help="Keep nothing below.")
@click.option("--rounds", type=int, metavar="R", help="Go on with SFT on what is kept, and again, R times.")
@click.option("--sft", type=FILE, metavar="FILE", help="The file of grape sft for --rounds; its data is what is kept.")
@click.option("--resume", is_flag=True, help="Go on with the last run of the same inputs.")
@PYTHON
@SANDBOX
@UNSAFE
@click.option("--json", "as_json", is_flag=True, help="One JSON object per round on stdout instead of a table.")
def best_of(
    run: Path,
    overrides: tuple[str, ...],
    rounds: int | None,
    sft: Path | None,
    python: str | None,
    service: str | None,
    unsafe_code: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Sample several responses to each question and keep the best.

    RUN is the YAML file of grape train, of which policy, questions, rubrics, judges and sampling are used:
    sampling.responses=16 draws 16 to a question. With --rounds it is rejection sampling: grape sft on what was kept,
    then the same with the policy that came of it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall a busy machine
    needs_torch()
    if (rounds is None) != (sft is None) or (rounds is not None and (rounds < 1 or options["out"])):
        raise click.UsageError("--rounds goes with --sft, is at least 1, and leaves its rows in sft's checkpoint.dir")
    from grape.best_of import best_of, rejection_sampling
    from grape.config import load_run
    from grape.progress import TrainingProgress, selected_table
    from grape.recipes import SftRun, load_recipe
    from grape.report import show

    options["sandbox"] = make_sandbox(python, service, unsafe_code)
    config = load_run(run, overrides)
    with TrainingProgress("best-of") as bar, redirect_stdout(sys.stderr):

        def report(step: Any) -> None:
            bar.step(step.step, step.steps, step.metrics, step.seconds)

        if sft is None or rounds is None:
            found = [asyncio.run(best_of(config, report=report, **options))]
        else:
            del options["out"]
            recipe = load_recipe(SftRun, sft)
            done = asyncio.run(rejection_sampling(config, recipe, rounds, report=report, **options))
            found = [selected for selected, _ in done]
    if as_json:
        for one in found:
            click.echo(json.dumps({**asdict(one), "rows": len(one.rows)}))
        return
    show(selected_table(found))
    if options.get("out"):
        show(f"{options['out']}: {len(found[-1].rows)} rows", stderr=True)
    if sft is not None:
        show(f"policy: {done[-1][1].folder}", stderr=True)
    show(f'log: {config.log}   ask it: grape sql "from response_scores" --log {config.log}', stderr=True)
