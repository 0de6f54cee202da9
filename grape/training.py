"""`grape train`: groups sampled, judged as they end, settled by eq. 15, a clipped step taken; all of it in the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from grape.checkpoint import Checkpoints, Saved
from grape.collect import Answered, Collector
from grape.config import RunConfig, load_run
from grape.errors import ConfigError
from grape.groups import Groups
from grape.heldout import Heldout, apart_from_heldout, measured_difficulty
from grape.learner import Learner
from grape.log import Log
from grape.material import Material, identity, make_accelerator, read_material, run_row
from grape.metrics import shifts
from grape.optimize import Update
from grape.order import Order
from grape.panel import Panel
from grape.ranks import Ranks
from grape.run import hold, new_name
from grape.scoring import make_critics
from grape.step import Step, StepReport, make_step, settled_groups

if TYPE_CHECKING:
    from grape.sandbox import Sandbox

logger = logging.getLogger("grape")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A finished run: its name in the log, the last checkpoint (None where none is kept), held-out metrics by step."""

    run: str
    folder: Path | None
    heldout: dict[int, dict[str, float]]


Report = Callable[[StepReport], None]


async def train(
    run: RunConfig | str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    allow_changes: bool = False,
    sandbox: Sandbox | None = None,
    report: Report | None = None,
    name: str | None = None,
    evaluating: bool = True,
) -> Trained:
    """Train a policy by GRAPE as a `run.yaml` says; ``overrides`` are `loss.clip_high=0.28` and the like.

    ``resume`` goes on after the last checkpoint, and ends with the weights of an uninterrupted run, on a CPU to the
    bit. What changed since then (a rubric, a prompt, a judge, the configuration) is an error unless ``allow_changes``.
    Every response, verdict, reward and step is in the log. ``report`` is called after each step. ``name`` is what a new
    run is called there, by default the time. Without ``evaluating`` somebody else asks what is held out.

    Raises `ConfigError`, before any work, for a wrong file, row or judge, and `GrapeError` where numbers are not
    finite, before they reach the weights.
    """
    config = run if isinstance(run, RunConfig) else load_run(run, overrides)
    if isinstance(run, RunConfig) and overrides:
        raise ConfigError("overrides: are for a run's file; a RunConfig is taken as it is")
    accelerator = make_accelerator(config)
    ranks = Ranks(accelerator)
    if not ranks.leads:
        with ranks.together():
            (saved,) = ranks.hear()
            ended: Trained = Learner(config, accelerator, saved).follow()
            return ended
    begun = begin(config, name or new_name(), resume=resume, allow_changes=allow_changes)
    async with AsyncExitStack() as stack:
        stack.enter_context(ranks.together())
        store = stack.enter_context(Log(config.log))
        stack.enter_context(hold(store, begun.name))
        begun = begun.looked_up(resume)
        ranks.say(begun.saved)
        learner = Learner(config, accelerator, begun.saved)
        critics = make_critics(begun.material.judges, store, begun.name)
        panel = await stack.enter_async_context(Panel(critics, sandbox))
        panel.check(begun.material.plans.values())
        await panel.reach()
        collector = Collector(sampler=learner.sampler, config=config, panel=panel)
        stack.callback(collector.close)
        begun = replace(begun, material=begun.material.with_room(collector, config.questions))
        loop = Loop(begun, store, collector, learner)
        if config.evaluate and evaluating:
            loop.heldout = Heldout(config, begun.name, store, collector, begun.material, sandbox)
        begun.claim(store)
        if loop.heldout:
            await stack.enter_async_context(loop.heldout)
        if config.trackers:
            accelerator.init_trackers("grape", config={"run": begun.name, **_flat(config.model_dump())})
            stack.callback(accelerator.end_training)
        done = await loop.run(report)
        ranks.say("end", done)
        return done


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A run that is about to begin or to go on: what it is made of, and how far it got before."""

    config: RunConfig
    name: str
    material: Material
    identity: Mapping[str, str]
    checkpoints: Checkpoints | None
    saved: Saved | None = None

    def looked_up(self, resume: bool) -> Begun:
        """With its last checkpoint, now that nobody else is at it."""
        saved = self.checkpoints.latest() if self.checkpoints and resume else None
        if saved:
            finished = saved.step >= self.config.steps
            logger.warning(
                "run %s %s step %d",
                self.name,
                "is finished: it ended with" if finished else "goes on after",
                saved.step,
            )
        return replace(self, saved=saved)

    def claim(self, store: Log) -> None:
        """From here on the checkpoints' folder and the log hold the run: all that could be wrong has been looked at."""
        known = store.query("select 1 from runs where run = ?", [self.name])
        if self.checkpoints:
            if self.saved and not known:
                raise ConfigError(
                    f"{self.config.log}: has nothing of run {self.name}, which {self.checkpoints.folder} holds: "
                    "a run is resumed with its own log"
                )
            self.checkpoints.claim(self.name, self.identity)
        if not known:
            store.append(runs=[run_row(self.name, "train", self.config, self.material)])


def begin(config: RunConfig, name: str, *, resume: bool, allow_changes: bool) -> Begun:
    """Everything that the run names, read and checked. Nothing is written."""
    if resume and config.checkpoint is None:
        raise ConfigError("checkpoint: is not set, so there is nothing to resume from")
    material = apart_from_heldout(config, read_material(config))
    if config.questions.difficulty is None:
        material.order()  # too few questions are an error now
    parts = identity(config, material)
    checkpoints = Checkpoints(config.checkpoint) if config.checkpoint else None
    if checkpoints:
        name = checkpoints.check(name, parts, resume=resume, allow_changes=allow_changes)
    return Begun(config=config, name=name, material=material, identity=parts, checkpoints=checkpoints)


class Loop:
    """The steps of a run, from the first that is not done to the last."""

    def __init__(self, begun: Begun, store: Log, collector: Collector, learner: Learner) -> None:
        self.heldout: Heldout | None = None
        self._begun = begun
        self._config, self._name, self._checkpoints = begun.config, begun.name, begun.checkpoints
        self._store = store
        self._collector = collector
        self._learner = learner
        self._groups = Groups(begun.config, begun.material.plans, collector, store, begun.name)
        self._logged = {step for (step,) in store.query("select step from steps where run = ?", [begun.name])}
        self._known = {one for (one,) in store.query("select question_id from questions where run = ?", [begun.name])}

    async def run(self, report: Report | None) -> Trained:
        """Every step, and the result."""
        order, saved, steps = await self._order(), self._begun.saved, self._config.steps
        done, position = (saved.step, saved.position) if saved else (0, 0)
        self._groups.see_turns(len(order))
        before = self._last_metrics(done)
        if self.heldout and self._due(done):  # not where a checkpoint happens to be
            await self.heldout.evaluate(done)
        for number in range(done + 1, steps + 1):
            started = perf_counter()
            step = await self._judged(number, position, order)
            update = await self._update(step)
            metrics = {**step.metrics, **shifts(step.metrics, before), **update.metrics, **gap(step, update)}
            metrics["seconds"] = perf_counter() - started
            self._append(step, update, metrics)
            position, before = step.position, before | metrics
            if self._checkpoints and (number % self._checkpoints.config.every == 0 or number == steps):
                self._checkpoints.save(number, position, self._learner.policy, self._learner.state())
            if self.heldout and self._due(number):
                found = await self.heldout.evaluate(number)
                metrics |= {f"heldout/{name}": value for name, value in found.items()}
            self._learner.optimizer.accelerator.log(metrics, step=number)
            if report:
                seconds = perf_counter() - started
                report(StepReport(step=number, steps=steps, metrics=metrics, seconds=seconds))
        latest = self._checkpoints.latest() if self._checkpoints else None
        results = self.heldout.results if self.heldout else {}
        return Trained(run=self._name, folder=latest.folder if latest else None, heldout=results)

    def _due(self, step: int) -> bool:
        """Whether the held-out questions are asked after a step."""
        return self.heldout is not None and (step % self.heldout.every == 0 or step == self._config.steps)

    async def _order(self) -> Order:
        """The order of questions: those that the untrained policy finds neither too easy nor too hard, if asked for."""
        if self._config.questions.difficulty is None:
            return self._begun.material.order()
        scores = await measured_difficulty(self._config, self._name, self._store, self._collector, self._begun.material)
        return self._begun.material.order(scores)

    async def _judged(self, number: int, position: int, order: Order) -> Step:
        """The step's groups, from the journal where they are in it."""
        if self._checkpoints and (step := self._checkpoints.judged(number)) is not None:
            return step
        started, answered = datetime.now(UTC), list[Answered]()
        taken: set[str] = set()
        wanted = missing = self._config.sampling.questions
        for round_ in range(self._config.sampling.rounds):
            few, due = min(missing, len(order) - len(taken)), (number - 1) * wanted
            ids, position = order.draw(position, few, taken, due=due)
            taken |= set(ids)
            answered += await self._groups.answers(ids, number, round_)
            settled = settled_groups(answered, self._config)
            alive = {
                one.asked.plan.question.question_id
                for one, result in zip(answered, settled, strict=True)
                if result.advantage != 0
            }
            missing = wanted - len(alive)
            if missing <= 0 or len(taken) == len(order):
                break
        asked = list(dict.fromkeys(one.asked.plan.question.question_id for one in answered))
        learning = sorted(asked, key=lambda question: question not in alive)[:wanted]  # dead ones only fill up
        judges = self._begun.material.judges
        step = make_step(number, position, started, answered, settled, set(learning), self._config, judges, self._name)
        if self._checkpoints:
            self._checkpoints.keep(step)
        return step

    async def _update(self, step: Step) -> Update:
        """One step; none where no response is trained on, since momentum alone would move the weights."""
        if not any(member.trained for member in step.members):
            logger.warning("step %d: no response could be trained on; the weights stay as they are", step.number)
            return Update(metrics={}, logprobs={})
        update: Update = await self._collector.run(self._learner.update, step.members, step.number)
        return update

    def _append(self, step: Step, update: Update, metrics: dict[str, float]) -> None:
        """The step's rows, once: a run that was resumed may be at a step that the log has."""
        if step.number in self._logged:
            return
        there = self._begun.material.plans  # not all that the journal has, where changes were allowed
        new = sorted(({row["question_id"] for row in step.rows["responses"]} - self._known) & there.keys())
        questions = self._begun.material.question_rows(self._name, new)
        self._store.append(**step.learned(update, metrics), questions=questions)
        self._known |= set(new)

    def _last_metrics(self, step: int) -> dict[str, float]:
        found = self._store.query(
            "select metrics from steps where run = ? and step <= ? order by step", [self._name, step]
        )
        return {name: value for (metrics,) in found for name, value in json.loads(metrics).items()}


def gap(step: Step, update: Update) -> dict[str, float]:
    """How much likelier improved responses were where they were drawn than where they are trained, per token."""
    off = [
        one for one in step.members if one.off_policy and one.rollout_logprobs and one.response_id in update.logprobs
    ]
    if not off:
        return {}
    drawn = sum(sum(one.rollout_logprobs or ()) for one in off)
    trained = sum(update.logprobs[one.response_id] for one in off)
    return {"off_policy/gap": (drawn - trained) / sum(len(one.token_ids) for one in off)}


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, as trackers take them."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
