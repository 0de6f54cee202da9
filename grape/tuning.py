"""`grape sft`, `grape reward-model`, `grape dpo`: epochs over lessons, held-out ones measured, all of it in the log."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from grape.agreement import wilson
from grape.checkpoint import Checkpoints, Saved, State
from grape.classifier import load_classifier
from grape.course import Course, read_course
from grape.errors import ConfigError
from grape.examples import Task
from grape.log import Log
from grape.material import make_accelerator
from grape.policy import Policy, load_policy
from grape.ranks import Ranks
from grape.recipes import DpoRun, Recipe, RewardModelRun, SftRun
from grape.records import Record
from grape.resources import digest
from grape.run import hold, new_name
from grape.sampler import seeded
from grape.step import StepReport
from grape.tasks import Alignment, Process, Reward, Sft, Unpaired
from grape.teacher import Teacher

logger = logging.getLogger("grape")

VERBS: dict[type[Recipe], str] = {SftRun: "sft", RewardModelRun: "reward-model", DpoRun: "dpo"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A finished run: its name in the log, the folder of its result, held-out metrics by step."""

    run: str
    folder: Path
    heldout: dict[int, dict[str, float]]


def tune(
    config: Recipe,
    *,
    resume: bool = False,
    allow_changes: bool = False,
    report: Callable[[StepReport], None] | None = None,
    name: str | None = None,
) -> Tuned:
    """Teach a policy, or a reward model, as the file of its verb says (`grape.recipes.load_recipe`).

    ``resume`` goes on after the last checkpoint, and ends with the weights of an uninterrupted run, on a CPU to the
    bit; what changed since then is an error unless ``allow_changes``. ``report`` is called after each step.
    ``name`` is what a new run is called in the log, by default the time.

    Raises `ConfigError`, before any work, for a wrong file or row, and `GrapeError` where numbers are not finite,
    before they reach the weights.
    """
    accelerator = make_accelerator(config)
    ranks = Ranks(accelerator)
    checkpoints = Checkpoints(config.checkpoint)
    with ExitStack() as stack:
        stack.enter_context(ranks.together())
        policy, task = _begin(config, accelerator, None)
        course = read_course(config, policy, task)
        name, store, saved = name or new_name(), None, None
        if ranks.leads:
            name = checkpoints.check(name, course.identity, resume=resume, allow_changes=allow_changes)
            store = stack.enter_context(Log(config.log))
            stack.enter_context(hold(store, name))
            saved = checkpoints.latest() if resume else None
            _claim(config, store, checkpoints, name, course, saved)
            ranks.say(name, saved)
        else:
            name, saved = ranks.hear()
        if task.reference:
            course = _compared(config, policy, task, course, accelerator, saved)
        if saved:
            policy, task = _begin(config, accelerator, saved)
        teacher = Teacher(config, policy, task, course.examples, accelerator)
        if saved:
            teacher.descent.load_state_dict(saved.optimizer()["adamw"])
            if ranks.leads:
                how = "is finished: it ended with" if saved.step >= teacher.steps else "goes on after"
                logger.warning("run %s %s step %d", name, how, saved.step)
        if config.trackers and ranks.leads:
            accelerator.init_trackers("grape", config={"run": name})
            stack.callback(accelerator.end_training)
        return Lectures(config, teacher, course, name, store, checkpoints, accelerator).run(saved, report)


class Lectures:
    """The steps of a run, from the first that is not done to the last."""

    def __init__(
        self, config: Recipe, teacher: Teacher, course: Course, name: str, store: Log | None,
        checkpoints: Checkpoints, accelerator: Any,
    ) -> None:  # fmt: skip
        self._config = config
        self._teacher = teacher
        self._course = course
        self._name = name
        self._store = store  # of the leader
        self._checkpoints = checkpoints
        self._accelerator = accelerator
        self._heldout: dict[int, dict[str, float]] = {}
        logged = store.query("select step, metrics from steps where run = ? order by step", [name]) if store else []
        self._logged = {step: json.loads(metrics) for step, metrics in logged}

    def run(self, saved: Saved | None, report: Callable[[StepReport], None] | None) -> Tuned:
        """Every step, and the result."""
        done, steps = saved.step if saved else 0, self._teacher.steps
        for step, metrics in self._logged.items():
            told = {key.removeprefix("heldout/"): value for key, value in metrics.items() if key.startswith("heldout/")}
            if step <= done and told:
                self._heldout[step] = told
        if done == 0:
            self._told(0, datetime.now(UTC), self._measured(0))
        for step in range(done + 1, steps + 1):
            started, clock = datetime.now(UTC), perf_counter()
            metrics = self._teacher.update(step)
            metrics |= self._measured(step) if self._due(step) else {}
            self._told(step, started, metrics)
            if self._store and (step % self._config.checkpoint.every == 0 or step == steps):
                state = State(weights=None, optimizer={"adamw": self._teacher.descent.state_dict()})
                self._checkpoints.save(step, 0, self._teacher.policy, state)
            self._accelerator.log(metrics, step=step)
            if report and self._store:
                report(StepReport(step=step, steps=steps, metrics=metrics, seconds=perf_counter() - clock))
        folder = Path(self._config.checkpoint.dir) / f"step-{max(done, steps):06d}"
        return Tuned(run=self._name, folder=folder, heldout=self._heldout)

    def _due(self, step: int) -> bool:
        """Whether the held-out examples are measured after a step."""
        heldout = self._config.heldout
        if heldout is None:
            return False
        return step == self._teacher.steps or (heldout.every is not None and step % heldout.every == 0)

    def _measured(self, step: int) -> dict[str, float]:
        """The held-out metrics of now; a share of right answers has its 95 % interval (Wilson's)."""
        if not self._course.heldout:
            return {}
        found = self._teacher.measure(self._course.heldout)
        number = sum(len(one.lesson.steps) or 1 for one in self._course.heldout)
        for name in [name for name in found if name.rpartition("/")[2] == "accuracy"]:
            found[f"{name}_low"], found[f"{name}_high"] = wilson(found[name], number)
        self._heldout[step] = found = {**found, "examples": float(len(self._course.heldout))}
        return {f"heldout/{name}": value for name, value in found.items()}

    def _told(self, step: int, started: datetime, metrics: dict[str, float]) -> None:
        """The step's row, once: a run that was resumed may be at a step that the log has."""
        if self._store is None or step in self._logged or not metrics:
            return
        batch = self._teacher.batch(step) if step else self._course.heldout
        row: Record = {
            "run": self._name,
            "step": step,
            "started": started,
            "finished": datetime.now(UTC),
            "num_questions": len({one.lesson.group for one in batch}),
            "num_responses": sum(len(one.members) for one in batch),
            "metrics": json.dumps(metrics),
        }
        self._store.append(steps=[row])


def _begin(config: Recipe, accelerator: Any, saved: Saved | None) -> tuple[Policy, Task]:
    """The model as the run begins or as a checkpoint has left it, and what it is taught."""
    device, seed = str(accelerator.device), seeded(config.seed, "lora")
    model, where = (str(saved.folder), "checkpoint.dir") if saved else (config.policy.model, "policy.model")
    if isinstance(config, RewardModelRun):
        steps = config.loss.kind == "process"
        policy = load_classifier(model, device=device, seed=config.seed, steps=steps, where=where)
        return policy, (Process if steps else Reward)(policy, config)
    lora = None if saved else config.policy.lora
    dtype = config.policy.dtype if config.policy.lora else "float32"
    policy = load_policy(model, dtype=dtype, device=device, lora=lora, seed=seed, where=where)
    if isinstance(config, SftRun):
        return policy, Sft(policy, config)
    assert isinstance(config, DpoRun), config
    return policy, Unpaired(policy, config) if config.loss.kind == "kto" else Alignment(policy, config)


def _claim(
    config: Recipe, store: Log, checkpoints: Checkpoints, name: str, course: Course, saved: Saved | None
) -> None:
    """From here on the checkpoints' folder and the log hold the run: all that could be wrong has been looked at."""
    known = store.query("select kind, config from runs where run = ?", [name])
    for kind, text in known:
        if kind != VERBS[type(config)]:
            raise ConfigError(f"{checkpoints.folder}: holds a run of grape {kind}, not of {VERBS[type(config)]}")
        if (json.loads(text)["policy"]["lora"] is None) != (config.policy.lora is None):
            how = "without fresh adapters" if config.policy.lora else "with fresh adapters"
            raise ConfigError(f"policy.lora: run {name} began {how}, and goes on so")
    if saved and not known:
        raise ConfigError(
            f"{config.log}: has nothing of run {name}, which {checkpoints.folder} holds: a run is "
            "resumed with its own log"
        )
    checkpoints.claim(name, course.identity)
    if not known:
        row: Record = {
            "run": name,
            "kind": VERBS[type(config)],
            "started": datetime.now(UTC),
            "version": version("grape-rl"),
            "inputs": digest(json.dumps(course.identity, sort_keys=True)),
            "config": json.dumps(config.model_dump()),
            "seed": config.seed,
        }
        store.append(runs=[row])


def _compared(
    config: Recipe, policy: Policy, task: Task, course: Course, accelerator: Any, saved: Saved | None
) -> Course:
    """With what the policy thought of every row before the first step: computed once, and kept with the checkpoints."""
    path = Path(config.checkpoint.dir) / "reference.pt"
    everything = [*course.examples, *course.heldout]
    rows = digest(json.dumps([[[*row.prompt_ids, -1, *row.token_ids] for row in one.rows] for one in everything]))
    if saved is None:
        teacher = Teacher(config, policy, task, course.examples, accelerator)
        refs = []
        for part in (course.examples, course.heldout):
            found = teacher.logprobs([row for one in part for row in one.rows])
            refs += [tuple(found[row.response_id] for row in one.rows) for one in part]
        if teacher.leads:
            draft = path.with_name(f".{path.name}")
            torch.save({"rows": rows, "logprobs": refs}, draft)
            draft.replace(path)
    else:
        try:
            stored = torch.load(path, weights_only=True)
            refs, known = stored["logprobs"], stored["rows"]
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise ConfigError(f"{path}: damaged: no log-probabilities of the reference") from error
        if known != rows:
            raise ConfigError(f"{path}: is of other rows: another checkpoint.dir begins anew with these")
    with_refs = [replace(one, ref=tuple(ref)) for one, ref in zip(everything, refs, strict=True)]
    cut = len(course.examples)
    return replace(course, examples=with_refs[:cut], heldout=with_refs[cut:])
