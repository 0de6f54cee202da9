"""Questions that are asked and judged without learning from them: held-out ones, and those of the difficulty filter."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

from grape.collect import Collector
from grape.config import RunConfig
from grape.decontaminate import apart
from grape.decontaminate import asked as asked_of
from grape.log import Log
from grape.material import Material, read_material, run_row
from grape.panel import Panel
from grape.questions import read_questions
from grape.scoring import make_critics
from grape.step import make_step, settled_groups

if TYPE_CHECKING:
    from grape.sandbox import Sandbox


class Heldout:
    """Held-out questions under the run's rubrics and judges, or others; in the log as the run `NAME.heldout`.

    An evaluation draws with the same seed every time, so that two of them differ by the policy alone, and touches
    nothing of the training. ``results`` are the metrics by step.
    """

    def __init__(
        self, config: RunConfig, run: str, store: Log, collector: Collector, material: Material,
        sandbox: Sandbox | None = None,
    ) -> None:  # fmt: skip
        assert config.evaluate is not None, "the configuration asks for it"
        self.name = f"{run}.heldout"
        self.every = config.evaluate.every
        self.results: dict[int, dict[str, float]] = {}
        self._config = config
        self._evaluate = config.evaluate
        self._store = store
        self._collector = collector
        self._sandbox = sandbox
        self._stack = AsyncExitStack()
        self._panel: Panel | None = None
        source = config.evaluate.questions
        read = read_material(config, source, rubrics=config.evaluate.rubrics, judges=config.evaluate.judges)
        self._material = read.with_room(collector, source)
        self._own = dict(self._material.judges) != dict(
            material.judges
        )  # else the run's panel serves, asked nothing twice

    async def __aenter__(self) -> Heldout:
        if self._own:
            critics = make_critics(self._material.judges, self._store, self.name)
            self._panel = await self._stack.enter_async_context(Panel(critics, self._sandbox))
        panel = self._panel or self._collector.panel
        panel.check(self._material.plans.values())
        await panel.reach()
        if not self._store.query("select 1 from runs where run = ?", [self.name]):
            plans = self._material.plans
            self._store.append(
                runs=[run_row(self.name, "heldout", self._config, self._material)],
                questions=self._material.question_rows(self.name, list(plans)),
            )
        found = self._store.query("select step, metrics from steps where run = ? order by step", [self.name])
        self.results |= {step: json.loads(metrics) for step, metrics in found}
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stack.aclose()

    async def evaluate(self, step: int) -> dict[str, float]:
        """The metrics of the policy as it is after a step; those of the log where it has been evaluated there."""
        if step not in self.results:
            self.results[step] = await asked(
                self._config, self.name, step, self._store, self._collector, self._material,
                responses=self._evaluate.responses, greedy=self._evaluate.greedy, panel=self._panel,
            )  # fmt: skip
        return self.results[step]


def apart_from_heldout(config: RunConfig, material: Material) -> Material:
    """The run's material without what ``evaluate.overlap: drop`` leaves out; what is there twice is said."""
    if config.evaluate is None or config.evaluate.overlap == "allow":
        return material
    held, own = read_questions(config.evaluate.questions).rows, material.questions.rows
    taught, heldout = (
        [(rows.places[name], asked_of(one.text)) for name, one in rows.questions.items()] for rows in (own, held)
    )
    how: Any = {"how": config.evaluate.overlap, "field": "evaluate.overlap", "source": own.source}
    left = apart(taught, heldout, **how)
    names = [name for place, name in enumerate(own.questions) if place not in left]
    plans = {name: material.plans[name] for name in names}
    return replace(material, questions=material.questions.only(names), plans=plans) if left else material


async def asked(
    config: RunConfig, run: str, step: int, store: Log, collector: Collector, material: Material, *, responses: int,
    greedy: bool = False, panel: Panel | None = None, only: Sequence[str] | None = None, draw: object = None,
) -> dict[str, float]:  # fmt: skip
    """Every question (or ``only`` these) asked so many times, judged and logged at once; the metrics.

    ``draw`` beside the run's seed decides what is drawn: by default the kind of run.
    """
    started = datetime.now(UTC)
    wanted = [
        collector.fresh(material.plans[question_id], f"{question_id}-{step}-{member}")
        for question_id in (material.plans if only is None else only)
        for member in range(responses)
    ]
    named = run.rpartition(".")[2] if draw is None else draw
    answered = await collector.answers(wanted, config.seed, named, greedy=greedy, panel=panel)
    settled = settled_groups(answered, config)
    made = make_step(step, 0, started, answered, settled, (), config, material.judges, run)
    (row,) = made.rows["steps"]
    row |= {"finished": datetime.now(UTC), "metrics": json.dumps(made.metrics)}
    store.append(**made.rows)
    return dict(made.metrics)


async def measured_difficulty(
    config: RunConfig, run: str, store: Log, collector: Collector, material: Material
) -> dict[str, Sequence[float]]:
    """The fixed-weight scores of the untrained policy's responses by question; from the log where it has them."""
    assert config.questions.difficulty is not None, "the configuration asks for it"
    name = f"{run}.difficulty"
    if not store.query("select 1 from steps where run = ?", [name]):
        if not store.query("select 1 from runs where run = ?", [name]):
            store.append(
                runs=[run_row(name, "difficulty", config, material)],
                questions=material.question_rows(name, list(material.plans)),
            )
        await asked(config, name, 0, store, collector, material, responses=config.questions.difficulty.responses)
    scores: dict[str, list[float]] = defaultdict(list)
    for question_id, weighted in store.query(
        "select question_id, weighted from rewards where run = ? and weighted is not null order by response_id", [name]
    ):
        scores[question_id].append(weighted)
    return dict(scores)
