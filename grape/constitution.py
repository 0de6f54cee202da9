"""`grape constitution`: a policy that revises itself by principles, and then learns from what a judge makes of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from grape.checkpoint import Checkpoints
from grape.collect import Collector
from grape.config import CheckpointConfig
from grape.errors import ConfigError, GrapeError
from grape.feedback import Feedback
from grape.heldout import Heldout, apart_from_heldout
from grape.judge.critic import Critic
from grape.judge.jury import Jury
from grape.log import Log
from grape.material import Material, identity, make_accelerator, read_material, run_row
from grape.output import ASKED, NUMBER, TEXT, write_rows
from grape.panel import Panel
from grape.phases import ConstitutionRun, load_phases
from grape.policy import load_policy
from grape.principles import FIELDS, check_principles, principles
from grape.ranks import Ranks
from grape.recipes import RewardModelRun, SftRun
from grape.records import Record
from grape.resources import digest, find, read_text
from grape.revision import Chain, Revisions
from grape.rl_phase import look_at_files, preference_run, training_run
from grape.run import hold, new_name
from grape.sampler import Sampler
from grape.scoring import make_critics
from grape.sft_phase import COLUMNS, mixed, sft_run, taught
from grape.step import StepReport
from grape.training import Trained, train
from grape.tuning import Tuned, tune

if TYPE_CHECKING:
    from grape.sandbox import Sandbox

PREFERRING = "preference-model"
PAIR_COLUMNS = {
    **dict.fromkeys(("question_id", "chosen", "rejected", "item"), TEXT),
    "question": ASKED,
    "probability": NUMBER,
}
Told = Callable[[str, StepReport], None]  # the phase, and a step of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Constituted:
    """What the phases came to: ``policy`` is the folder (or name) of the last one.

    ``chains`` were begun, and ``revised`` of them at least once; ``preferences`` came of the comparisons. ``heldout``
    has metrics by phase: 0 before any, 1 after the supervised one, 2 after the RL phase.
    """

    run: str
    policy: str
    chains: int = 0
    revised: int = 0
    preferences: int = 0
    supervised: Tuned | None = None
    model: Tuned | None = None
    trained: Trained | None = None
    heldout: dict[int, dict[str, float]] = field(default_factory=dict)


async def constitution(
    run: ConstitutionRun | str | Path,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    allow_changes: bool = False,
    sandbox: Sandbox | None = None,
    report: Told | None = None,
) -> Constituted:
    """Constitutional AI (Bai et al. 2022, arXiv 2212.08073) with the principles of rubrics, as a run's file says.

    The supervised phase has the policy's responses criticised and revised, and teaches it the last revisions. The RL
    phase is `grape train` on what the same principles reward. ``resume`` goes on wherever it was, and ends with the
    weights of an uninterrupted run, on a CPU to the bit; what changed since then is an error unless ``allow_changes``.

    Raises `ConfigError`, before any work, for a wrong file, row, rubric or judge.
    """
    config = run if isinstance(run, ConstitutionRun) else load_phases(run, overrides)
    return await Phases(config, resume, allow_changes, sandbox, report).run()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """A policy and its judges, with the log open."""

    store: Log
    collector: Collector
    critics: Mapping[str, Critic | Jury]
    material: Material


class Phases:
    """The phases of a run, one after the other. Each leaves its result in a folder of `checkpoint.dir`."""

    def __init__(
        self, config: ConstitutionRun, resume: bool, allow_changes: bool, sandbox: Sandbox | None, report: Told | None
    ) -> None:
        if Ranks(make_accelerator(config)).count > 1:
            raise ConfigError("grape constitution samples in one process: start it without torchrun")
        self._config = config
        self._resume, self._allow_changes = resume, allow_changes
        self._sandbox = sandbox
        self._report = report
        self._folder = Path(config.checkpoint.dir)
        self._material = apart_from_heldout(config, read_material(config, config.questions, also=config.asked))
        check_principles(config, self._material)
        if config.feedback and config.questions.difficulty is None:
            self._material.order()  # too few questions are an error now
        look_at_files(config)
        self._mixed = mixed(config.supervised) if config.supervised else []
        parts = identity(config, self._material)
        for name in (*(f"principle/{step}" for step in FIELDS), "pair"):
            parts[f"prompt {name}"] = digest(read_text(find("prompts", name)))
        self._checkpoints, self._parts = Checkpoints(config.checkpoint), parts
        self._name = self._checkpoints.check(new_name(), parts, resume=resume, allow_changes=allow_changes)
        self._heldout: dict[int, dict[str, float]] = {}

    async def run(self) -> Constituted:
        """All of them. Each lets go of its policy before the next loads its own."""
        model, feedback = self._config.policy.model, self._config.feedback
        supervised = reward_model = trained = None
        chains, rows = await self._before(model)
        if self._config.supervised:
            supervised = self._taught(rows)
            model = str(supervised.folder)
        compared = feedback is not None and feedback.reward == "preferences"
        preferences = await self._between(model, compared=compared)
        if feedback:
            reward_model = self._preferring(model, preferences) if compared else None
            trained = await self._trained(model, reward_model, preferences)
            model = str(trained.folder)
            await self._after(model)
        return Constituted(
            run=self._name, policy=model, chains=sum(bool(principles(chain.plan)) for chain in chains),
            revised=sum(chain.round > 0 for chain in chains), preferences=len(preferences), supervised=supervised,
            model=reward_model, trained=trained, heldout=self._heldout,
        )  # fmt: skip

    async def _before(self, model: str) -> tuple[list[Chain], list[Record]]:
        """The chains of revisions, and what SFT is to learn."""
        async with self._asking(model) as asking:
            self._checkpoints.claim(self._name, self._parts)
            self._claim(asking, self._name, "constitution")
            await self._evaluated(asking, 0)
            if not self._config.supervised:
                return [], []
            critics = {name: critic for name, critic in asking.critics.items() if isinstance(critic, Critic)}
            parts = (asking.store, asking.collector, asking.material, critics, self._told("revision"))
            chains = await Revisions(self._config, self._name, *parts).run()
            whole = self._config.truncation.how != "keep"
            return chains, taught(chains, lambda plan: asking.collector.system(plan)[0], whole=whole)

    async def _between(self, model: str, *, compared: bool) -> list[Record]:
        """The held-out questions after the supervised phase, and pairs of responses that the judge has labelled."""
        if not (compared or (self._config.supervised and self._config.evaluate)):
            return []
        async with self._asking(model) as asking:
            if self._config.supervised:
                await self._evaluated(asking, 1)
            if not compared:
                return []
            parts = (asking.store, asking.collector, asking.material, asking.critics)
            feedback = Feedback(self._config, self._name, *parts)
            self._claim(asking, feedback.run, "feedback")
            report, count = self._told("feedback"), len(feedback.batches)
            for number in range(1, count + 1):
                clock = perf_counter()
                await feedback.compared(number)
                report(StepReport(step=number, steps=count, metrics={}, seconds=perf_counter() - clock))
            return feedback.rows()

    async def _after(self, model: str) -> None:
        if self._config.evaluate:
            async with self._asking(model) as asking:
                await self._evaluated(asking, 2)

    @asynccontextmanager
    async def _asking(self, model: str) -> AsyncIterator[Asking]:
        config, accelerator = self._config, make_accelerator(self._config)
        async with AsyncExitStack() as stack:
            store = stack.enter_context(Log(config.log))
            stack.enter_context(hold(store, self._name))
            policy = load_policy(model, dtype=config.policy.dtype, device=str(accelerator.device))
            sampler = Sampler(policy, config, accelerator, training=config.feedback is not None)
            if sampler.served:
                stack.callback(sampler.served.close)
            critics = make_critics(self._material.judges, store, self._name)
            panel = await stack.enter_async_context(Panel(critics, self._sandbox))
            panel.check(self._material.plans.values())
            await panel.reach()
            collector = Collector(sampler=sampler, config=config, panel=panel)
            stack.callback(collector.close)
            material = self._material.with_room(collector, config.questions)
            yield Asking(store=store, collector=collector, critics=critics, material=material)

    def _claim(self, asking: Asking, name: str, kind: str) -> None:
        """The rows that a run of the log begins with, once."""
        if not asking.store.query("select 1 from runs where run = ?", [name]):
            questions = asking.material.question_rows(name, list(asking.material.plans))
            asking.store.append(runs=[run_row(name, kind, self._config, asking.material)], questions=questions)

    async def _evaluated(self, asking: Asking, phase: int) -> None:
        """The held-out questions after a phase."""
        if self._config.evaluate:
            store, collector, material = asking.store, asking.collector, asking.material
            async with Heldout(self._config, self._name, store, collector, material, self._sandbox) as heldout:
                self._heldout[phase] = await heldout.evaluate(phase)

    def _taught(self, rows: list[Record]) -> Tuned:
        """SFT on the last revisions, the policy's own helpful responses, and what is mixed in."""
        if not rows:
            raise GrapeError("supervised: no response was revised, so there is nothing to teach")
        file = self._folder / "revised.jsonl"
        write_rows(file, [*rows, *self._mixed], COLUMNS)
        return self._tuned(sft_run(self._config, file, **self._shared("supervised")), "supervised")

    def _preferring(self, model: str, rows: Sequence[Record]) -> Tuned:
        """A preference model of the judge's labels."""
        if not rows:
            raise GrapeError("feedback: the judge preferred no response, so there is nothing to learn")
        file = self._folder / "preferences.jsonl"
        write_rows(file, rows, PAIR_COLUMNS)
        return self._tuned(preference_run(self._config, model, file, **self._shared(PREFERRING)), PREFERRING)

    async def _trained(self, model: str, preferring: Tuned | None, rows: Sequence[Record]) -> Trained:
        """`grape train` on what the principles reward; what is held out is asked by this run."""
        checkpoint = self._checkpoint("policy").model_dump()
        folder = preferring.folder if preferring else None
        run = await training_run(
            self._config, self._material, self._folder, model, folder, rows, checkpoint=checkpoint
        )  # fmt: skip
        more = self._going_on("policy")
        return await train(run, sandbox=self._sandbox, report=self._told("training"), evaluating=False, **more)

    def _tuned(self, recipe: SftRun | RewardModelRun, phase: str) -> Tuned:
        return tune(recipe, report=self._told(phase), **self._going_on(phase))

    def _going_on(self, phase: str) -> dict[str, Any]:
        """A phase's name in the log, and whether it is to go on."""
        begun = (self._folder / phase / "run.json").is_file()
        return {
            "name": f"{self._name}.{phase}", "resume": self._resume and begun, "allow_changes": self._allow_changes,
        }  # fmt: skip

    def _checkpoint(self, phase: str) -> CheckpointConfig:
        return self._config.checkpoint.model_copy(update={"dir": str(self._folder / phase)})

    def _shared(self, phase: str) -> dict[str, Any]:
        """What the file of a phase has in common with this one."""
        config = self._config
        return {
            "checkpoint": self._checkpoint(phase), "trackers": config.trackers, "log": config.log, "seed": config.seed,
        }  # fmt: skip

    def _told(self, phase: str) -> Callable[[StepReport], None]:
        """What reports a phase's steps."""
        return lambda step: self._report(phase, step) if self._report else None
