"""Verbs about training: train, report, quickstart."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import click

from grape.cli.options import FILE, LOG, PYTHON, SANDBOX, UNSAFE, make_sandbox, needs_torch


@click.command()
@click.argument("run", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--resume", is_flag=True, help="Go on after the last checkpoint in checkpoint.dir.")
@click.option("--allow-changes", is_flag=True, help="Resume although a rubric, prompt, judge or setting has changed.")
@PYTHON
@SANDBOX
@UNSAFE
@click.option("--json", "as_json", is_flag=True, help="A JSON line per step on stdout instead of a table at the end.")
def train(
    run: Path,
    overrides: tuple[str, ...],
    resume: bool,
    allow_changes: bool,
    python: str | None,
    service: str | None,
    unsafe_code: bool,
    as_json: bool,
) -> None:
    """Train a policy as RUN (a run.yaml) says; FIELD=VALUE overrides it, as in loss.clip_high=0.28."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall a busy machine
    needs_torch()
    from grape.config import load_run
    from grape.progress import TrainingProgress, heldout_table, training_table
    from grape.report import show
    from grape.step import StepReport
    from grape.training import train

    sandbox = make_sandbox(python, service, unsafe_code)
    config = load_run(run, overrides)
    steps: dict[int, dict[str, float]] = {}
    with TrainingProgress() as bar, redirect_stdout(sys.stderr):

        def report(step: StepReport) -> None:
            bar.step(step.step, step.steps, step.metrics, step.seconds)
            steps[step.step] = step.metrics
            if as_json:
                print(
                    json.dumps({"step": step.step, "seconds": step.seconds, **step.metrics}),
                    file=sys.__stdout__,
                    flush=True,
                )

        done = asyncio.run(train(config, resume=resume, allow_changes=allow_changes, sandbox=sandbox, report=report))
    if not as_json and steps:
        show(training_table(steps))
    if not as_json and done.heldout:
        show("", heldout_table(done.heldout))
    if done.folder:
        show(f"policy: {done.folder}", stderr=True)
    show(f'log: {config.log}   ask it: grape sql "from training_curve" --log {config.log}', stderr=True)


@click.command()
@LOG
@click.option("--run", metavar="RUN", help="A training run of the log. Default: the last one.")
@click.option("--solved", type=float, default=1.0, show_default=True, metavar="X",
              help="A held-out response is solved from that sum of weight x score on, for pass@k.")  # fmt: skip
@click.option("--plot", type=FILE, metavar="FILE", help="Draw score against the KL: a PNG.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of a table.")
def report(log: Path, run: str | None, solved: float, plot: Path | None, as_json: bool) -> None:
    """Show what a training run came to: its score and the held-out one against the KL, and pass@k.

    The KL is from the policy that the run began with. Where the held-out score falls while training's rises, the
    policy pleases its judge alone.
    """
    from grape.drift import draw_drift, drift, drift_lines
    from grape.reliability import needs_matplotlib
    from grape.report import show

    if plot:
        needs_matplotlib()
    found = drift(log, run, solved=solved)
    if plot:
        draw_drift(found, plot)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        show(*drift_lines(found))


@click.command()
@click.option("--log", type=FILE, default=Path("quickstart.duckdb"), show_default=True, help="The critique log.")
def quickstart(log: Path) -> None:
    """Train a small policy on two tasks by its rubrics, in two to three minutes, and show what SQL can ask."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall a busy machine
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what is so small is slower on two cores
    needs_torch()
    from grape.log.query import render, sql
    from grape.progress import TrainingProgress, curve, heldout_table
    from grape.report import show
    from grape.step import StepReport
    from grape.tour import CRITIQUES, QUESTIONS, quickstart

    with TrainingProgress("quickstart") as bar, redirect_stdout(sys.stderr):

        def report(step: StepReport) -> None:
            bar.step(step.step, step.steps, step.metrics, step.seconds)

        done = asyncio.run(quickstart(log, report=report))
    show(heldout_table(done.heldout), "")
    show(f"score in training  {bar.scores[0]:.3f} {curve(bar.scores, 50)} {bar.scores[-1]:.3f}", "")
    show("Three critiques", "")
    render(sql(CRITIQUES, log), "table", sys.stdout)
    for title, query in QUESTIONS.items():
        show("", title, f'  grape sql --log {log} "', *(f"  {line}" for line in f'{query}"'.splitlines()), "")
        render(sql(query, log), "table", sys.stdout)
    show("", f"log: {log}")
