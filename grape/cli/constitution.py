"""The verb about constitutions."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import click

from grape.cli.options import FILE, PYTHON, SANDBOX, UNSAFE, make_sandbox, needs_torch


@click.command()
@click.argument("run", type=FILE)
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--resume", is_flag=True, help="Go on wherever the run in checkpoint.dir was.")
@click.option("--allow-changes", is_flag=True, help="Resume although a rubric, prompt, judge or setting has changed.")
@PYTHON
@SANDBOX
@UNSAFE
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout at the end instead of a table.")
def constitution(
    run: Path,
    overrides: tuple[str, ...],
    resume: bool,
    allow_changes: bool,
    python: str | None,
    service: str | None,
    unsafe_code: bool,
    as_json: bool,
) -> None:
    """Constitutional AI: a policy criticises and revises its responses by principles, then learns from AI feedback.

    RUN is the YAML file of grape train with two more sections (docs/constitution.md): supervised, the rounds of
    critique and revision and the SFT on what came of them, and feedback, whether the reward is a preference model, the
    judge, or each principle as an item. Principles are items of a rubric with `principle: {critique, revision}`;
    constitution-harmless and constitution-honest are shipped. FIELD=VALUE overrides a field, as in supervised.rounds=2.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall a busy machine
    needs_torch()
    from grape.constitution import constitution
    from grape.phases import load_phases
    from grape.progress import TrainingProgress, phases_table
    from grape.report import show
    from grape.step import StepReport

    sandbox = make_sandbox(python, service, unsafe_code)
    config = load_phases(run, overrides)
    with ExitStack() as stack, redirect_stdout(sys.stderr):
        bars: dict[str, TrainingProgress] = {}

        def report(phase: str, step: StepReport) -> None:
            if phase not in bars:
                stack.close()  # the bar of the phase before
                bars[phase] = stack.enter_context(TrainingProgress(phase))
            bars[phase].step(step.step, step.steps, step.metrics, step.seconds)

        work = constitution(config, resume=resume, allow_changes=allow_changes, sandbox=sandbox, report=report)
        done = asyncio.run(work)
    if as_json:
        counts = {"chains": done.chains, "revised": done.revised, "preferences": done.preferences}
        click.echo(json.dumps({"run": done.run, "policy": done.policy, **counts, "heldout": done.heldout}))
        return
    show(f"{done.revised} of {done.chains} responses were revised; {done.preferences} preferences")
    if done.model and done.model.heldout:
        last = done.model.heldout[max(done.model.heldout)]
        low, high = last["accuracy_low"], last["accuracy_high"]
        show(f"preference model: {last['accuracy']:.1%} of held-out pairs ({low:.1%} to {high:.1%})")
    if done.heldout:
        show("", phases_table(done.heldout))
    show(f"policy: {done.policy}", stderr=True)
    query = f"select round, item, critique, revision from revisions where run = '{done.run}'"
    show(f'log: {config.log}   ask it: grape sql "{query}" --log {config.log}', stderr=True)
