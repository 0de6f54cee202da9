"""`grape train`: groups sampled, judged as they end, settled by eq. 15, a clipped step taken; all of it in the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from grape.checkpoint import Checkpoints, Saved
from grape.collect import Answered, Collector, seeded
from grape.config import RunConfig, load_run
from grape.errors import ConfigError
from grape.groups import Groups
from grape.heldout import Heldout, measured_difficulty
from grape.log import Log
from grape.material import Material, identity, make_accelerator, read_material, run_row
from grape.metrics import shifts
from grape.optimize import Optimizer, Update
from grape.order import Order
from grape.panel import Panel
from grape.policy import Policy, load_policy
from grape.run import answered_calls, hold, new_name
from grape.scoring import make_critics
from grape.step import Step, make_step, settled_groups

if TYPE_CHECKING:
    from grape.sandbox import Sandbox

logger = logging.getLogger("grape")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What there is to show after a step: its number, of how many, its metrics, and the seconds that it took."""

    step: int
    steps: int
    metrics: dict[str, float]
    seconds: float


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
) -> Trained:
    """Train a policy by GRAPE as a `run.yaml` says; ``overrides`` are `loss.clip_high=0.28` and the like.

    ``resume`` goes on after the last checkpoint, and ends with the weights of an uninterrupted run, on a CPU to the
    bit. What changed since then (a rubric, a prompt, a judge, the configuration) is an error unless ``allow_changes``.
    Every response, verdict, reward and step is in the log.

    Raises `ConfigError`, before any work, for a wrong file, row or judge, and `GrapeError` where numbers are not finite,
    before they reach the weights.
    """
    config = run if isinstance(run, RunConfig) else load_run(run, overrides)
    if isinstance(run, RunConfig) and overrides:
        raise ConfigError("overrides: are for a run's file; a RunConfig is taken as it is")
    if resume and config.checkpoint is None:
        raise ConfigError("checkpoint: is not set, so there is nothing to resume from")
    accelerator = make_accelerator(config)
    material = read_material(config)
    if config.questions.difficulty is None:
        material.order()  # too few questions are an error now
    checkpoints = Checkpoints(config.checkpoint) if config.checkpoint else None
    name, parts = new_name(), identity(config, material)
    if checkpoints:
        name = checkpoints.check(name, parts, resume=resume, allow_changes=allow_changes)
    saved = checkpoints.latest() if checkpoints and resume else None
    if saved and saved.step >= config.steps:
        logger.warning("run %s is finished: it has %d steps", name, saved.step)
    policy = _policy(config, saved, str(accelerator.device))
    async with AsyncExitStack() as stack:
        store = stack.enter_context(Log(config.log))
        stack.enter_context(hold(store, name))
        critics = make_critics(material.judges, store, name, answered_calls(store, name) if resume else None)
        panel = await stack.enter_async_context(Panel(critics, sandbox))
        panel.check(material.plans.values())
        await panel.reach()
        collector = Collector(policy=policy, config=config, panel=panel, accelerator=accelerator)
        stack.callback(collector.close)
        material = material.with_room(collector, config.questions)
        loop = Loop(config, material, name, store, collector, checkpoints)
        if config.evaluate:
            loop.heldout = Heldout(config, name, store, collector, material, sandbox)
        optimizer = Optimizer(policy, config, accelerator, reference=_reference(config, str(accelerator.device)))
        if saved:
            optimizer.load_state_dict(saved.optimizer())
        if checkpoints:
            checkpoints.claim(name, parts)  # from here on the folder and the log hold the run
        if not store.query("select 1 from runs where run = ?", [name]):
            store.append(runs=[run_row(name, "train", config, material)])
        if loop.heldout:
            await stack.enter_async_context(loop.heldout)
        if config.trackers:
            accelerator.init_trackers("grape", config={"run": name, **_flat(config.model_dump())})
            stack.callback(accelerator.end_training)
        return await loop.run(optimizer, saved, accelerator, report)


class Loop:
    """The steps of a run, from the first that is not done to the last."""

    def __init__(
        self, config: RunConfig, material: Material, name: str, store: Log, collector: Collector,
        checkpoints: Checkpoints | None,
    ) -> None:  # fmt: skip
        self.config = config
        self.material = material
        self.name = name
        self.store = store
        self.collector = collector
        self.checkpoints = checkpoints
        self.heldout: Heldout | None = None
        self._logged = {step for (step,) in store.query("select step from steps where run = ?", [name])}
        self._known = {one for (one,) in store.query("select question_id from questions where run = ?", [name])}
        self.groups = Groups(config, material.plans, collector, store, name)

    async def run(self, optimizer: Optimizer, saved: Saved | None, accelerator: Any, report: Report | None) -> Trained:
        """Every step, and the result."""
        order = await self._order()
        done, position = (saved.step, saved.position) if saved else (0, 0)
        before = self._last_metrics(done)
        if self.heldout:
            await self.heldout.evaluate(done)
        for number in range(done + 1, self.config.steps + 1):
            started = perf_counter()
            step = await self._judged(number, position, order)
            update = await self._update(optimizer, step)
            metrics = {**step.metrics, **shifts(step.metrics, before), **update.metrics}
            metrics |= self._gap(step, update) | {"seconds": perf_counter() - started}
            self._append(step, update, metrics)
            position, before = step.position, before | metrics
            if self.checkpoints and (number % self.checkpoints.config.every == 0 or number == self.config.steps):
                self.checkpoints.save(number, position, optimizer.policy, optimizer.state_dict())
            if self.heldout and (number % self.heldout.every == 0 or number == self.config.steps):
                metrics |= {f"heldout/{key}": value for key, value in (await self.heldout.evaluate(number)).items()}
            if accelerator.trackers:
                accelerator.log(metrics, step=number)
            if report:
                seconds = perf_counter() - started
                report(StepReport(step=number, steps=self.config.steps, metrics=metrics, seconds=seconds))
        latest = self.checkpoints.latest() if self.checkpoints else None
        return Trained(
            run=self.name,
            folder=latest.folder if latest else None,
            heldout=self.heldout.results if self.heldout else {},
        )

    async def _order(self) -> Order:
        """The order of questions: those that the untrained policy finds neither too easy nor too hard, if asked for."""
        if self.config.questions.difficulty is None:
            return self.material.order()
        scores = await measured_difficulty(self.config, self.name, self.store, self.collector, self.material)
        return self.material.order(scores)

    async def _judged(self, number: int, position: int, order: Order) -> Step:
        """The step's groups, from the journal where they are in it."""
        if self.checkpoints and (step := self.checkpoints.judged(number)) is not None:
            return step
        started, answered = datetime.now(UTC), list[Answered]()
        taken: set[str] = set()
        wanted = missing = self.config.sampling.questions
        for round_ in range(self.config.sampling.rounds):
            ids, position = order.draw(position, min(missing, len(order) - len(taken)), taken)
            taken |= set(ids)
            answered += await self.groups.answers(ids, number, round_)
            settled = settled_groups(answered, self.config)
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
        step = make_step(
            number, position, started, answered, settled, set(learning), self.config, self.material.judges, self.name
        )
        if self.checkpoints:
            self.checkpoints.keep(step)
        return step

    async def _update(self, optimizer: Optimizer, step: Step) -> Update:
        """One step of the optimizer; none where nothing can be learned, since momentum alone would move the weights."""
        if not any(member.trained for member in step.members):
            logger.warning("step %d: no response could be trained on; the weights stay as they are", step.number)
            return Update(metrics={}, logprobs={})
        update: Update = await self.collector.run(optimizer.update, step.members, step.number)
        return update

    def _append(self, step: Step, update: Update, metrics: dict[str, float]) -> None:
        """The step's rows, once: a run that was resumed may be at a step that the log has."""
        if step.number in self._logged:
            return
        new = sorted({row["question_id"] for row in step.rows["responses"]} - self._known)
        self.store.append(**step.learned(update, metrics), questions=self.material.question_rows(self.name, new))
        self._known |= set(new)

    def _last_metrics(self, step: int) -> dict[str, float]:
        found = self.store.query(
            "select metrics from steps where run = ? and step <= ? order by step", [self.name, step]
        )
        return {name: value for (metrics,) in found for name, value in json.loads(metrics).items()}

    @staticmethod
    def _gap(step: Step, update: Update) -> dict[str, float]:
        """How much likelier improved responses were where they were drawn than where they are trained, per token."""
        off = [one for one in step.members if one.off_policy and one.rollout_logprobs]
        drawn = {member.response_id: member for member in off}
        tokens = sum(len(member.token_ids) for name, member in drawn.items() if name in update.logprobs)
        if not tokens:
            return {}
        gap = sum(
            sum(member.rollout_logprobs or ()) - update.logprobs[name]
            for name, member in drawn.items()
            if name in update.logprobs
        )
        return {"off_policy/gap": gap / tokens}


def _policy(config: RunConfig, saved: Saved | None, device: str) -> Policy:
    """The policy as the run has left it, or as it begins. Full weights stay in float32, whatever they are used in."""
    lora = config.policy.lora
    dtype = config.policy.dtype if lora else "float32"
    if saved:
        return load_policy(str(saved.folder), dtype=dtype, device=device, where="checkpoint.dir")
    return load_policy(
        config.policy.model, dtype=dtype, lora=lora, device=device, seed=seeded(config.seed, "lora") >> 1
    )


def _reference(config: RunConfig, device: str) -> Policy | None:
    """The policy as the run began, where the loss asks for it. Fresh adapters, switched off, are that already."""
    if config.loss.kl in ("none", "trpo") or config.policy.lora:
        return None
    return load_policy(config.policy.model, dtype="float32", device=device)


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, as trackers take them."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
