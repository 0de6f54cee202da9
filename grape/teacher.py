"""Batches of examples to steps of AdamW: each batch in micro-batches, shared out among the processes of a run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any

import torch

from grape.descent import Descent
from grape.errors import GrapeError
from grape.examples import Example, Task, Totals
from grape.member import Batch, Member
from grape.modes import Modes
from grape.packing import Packing
from grape.policy import Policy
from grape.preference import kto_kl
from grape.ranks import Ranks
from grape.recipes import Recipe
from grape.rollout import evaluating
from grape.tasks import Likelihood, autocast

ALL = 2**62  # tokens: a cut of examples is one micro-batch whatever its size


class Teacher:
    """A policy, or a reward model, that learns a task from examples.

    The order of the examples is drawn from the seed and the epoch, and dropout from the seed and the step: a run that
    goes on after a step makes the same ones as if it had never stopped.
    """

    def __init__(
        self, config: Recipe, policy: Policy, task: Task, examples: Sequence[Example], accelerator: Any
    ) -> None:
        self.policy = policy
        self.examples = list(examples)
        self._config = config
        self._task = task
        self._ranks = Ranks(accelerator)
        self._drawn, self._order = -1, list[int]()  # the epoch whose order this is
        with autocast(config.policy, policy.model.device):
            self._packing = Packing(policy.model, policy.pad_id)
            self._modes = Modes(policy.model, config.policy.gradient_checkpointing)
        self.descent = Descent([(policy.model, config.optimizer.lr)], config.optimizer, self._ranks)

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self._ranks.leads

    @property
    def steps(self) -> int:
        """How many there are: one a batch, in every epoch."""
        return self._per_epoch * self._config.optimizer.epochs

    @property
    def _per_epoch(self) -> int:
        return math.ceil(len(self.examples) / self._config.optimizer.batch)

    def batch(self, step: int) -> list[Example]:
        """The examples of a step, from 1."""
        epoch, place = divmod(step - 1, self._per_epoch)
        if epoch != self._drawn:
            drawn = Random(f"{self._config.seed}/{epoch}").sample(range(len(self.examples)), len(self.examples))
            self._drawn, self._order = epoch, drawn
        size = self._config.optimizer.batch
        return [self.examples[number] for number in self._order[place * size : (place + 1) * size]]

    def update(self, step: int) -> dict[str, float]:
        """One step, and its metrics. `GrapeError` before a number that is not finite reaches the weights."""
        batch = self.batch(step)
        totals, sums, wrong = counts(batch), defaultdict[str, float](float), None
        with self._modes.training():
            self._task.begin(self._estimate(batch))
            for number, (few, packed) in enumerate(self._micro_batches(self._mine(batch))):
                seeded = self._modes.seeded(self._config.seed, step, self._ranks.number, number)
                with seeded, self._packing.on(packed.text):
                    with autocast(self._config.policy, self.policy.model.device):
                        loss, metrics = self._task.loss(few, packed, totals)
                    if not loss.isfinite():
                        wrong = wrong or f"the loss is {loss.item()} with {few[0].lesson.place} or one beside it"
                    loss.backward()  # type: ignore[no-untyped-call]
                for name, value in {"loss": loss.detach(), **metrics}.items():
                    sums[name] += float(value)
        found = self._summed(sums, wrong, step)
        norm, rate = self.descent.step(step, self.steps)
        size = {"tokens": float(totals.tokens), "examples": float(totals.examples), "epoch": step / self._per_epoch}
        return found | size | {"grad_norm": norm, "lr": rate}

    @torch.no_grad()
    def measure(self, examples: Sequence[Example]) -> dict[str, float]:
        """The loss and the metrics of examples, by the weights as they are."""
        totals, sums = counts(examples), defaultdict[str, float](float)
        with evaluating(self.policy.model):
            self._task.begin(self._estimate(examples))
            for few, packed in self._micro_batches(self._mine(examples)):
                with self._packing.on(packed.text), autocast(self._config.policy, self.policy.model.device):
                    loss, metrics = self._task.loss(few, packed, totals)
                for name, value in {"loss": loss, **metrics}.items():
                    sums[name] += float(value)
        return self._summed(sums, None, 0)

    @torch.no_grad()
    def logprobs(self, members: Iterable[Member]) -> dict[str, float]:
        """The summed log-probability of each row, by its name, by the weights as they are."""
        task, found = self._task, dict[str, float]()
        assert isinstance(task, Likelihood), "only a policy has log-probabilities"
        mine = list(members)[self._ranks.number :: self._ranks.count]
        with evaluating(self.policy.model):
            for batch in self._packing.batches(mine, self._config.optimizer.micro_tokens):
                with self._packing.on(batch.text), autocast(self._config.policy, self.policy.model.device):
                    sums_B = task.logprobs(batch).double().sum(1)
                found |= dict(zip((one.response_id for one in batch.members), sums_B.tolist(), strict=True))
        return {name: value for some in self._ranks.gathered([found]) for name, value in some.items()}

    def _mine(self, examples: Sequence[Example]) -> Sequence[Example]:
        return examples[self._ranks.number :: self._ranks.count]

    def _micro_batches(self, examples: Sequence[Example]) -> list[tuple[list[Example], Batch]]:
        """The examples, whole, in micro-batches of at most ``micro_tokens``; a longer one is alone."""
        cuts: list[list[Example]] = []
        rows = longest = filled = 0
        for one in examples:
            rows, longest = rows + len(one.members), max(longest, *map(len, one.members))
            filled = filled + sum(map(len, one.members)) if self._packing.packs else rows * longest
            if not cuts or filled > self._config.optimizer.micro_tokens:
                cuts.append([])
                rows, longest = len(one.members), max(map(len, one.members))
                filled = sum(map(len, one.members)) if self._packing.packs else rows * longest
            cuts[-1].append(one)
        return [(few, self._packing.batches([row for one in few for row in one.members], ALL)[0]) for few in cuts]

    def _estimate(self, examples: Sequence[Example]) -> float:
        """KTO's estimate of the KL, of the whole batch; 0 where nothing is mismatched."""
        others = [one for one in examples if one.other is not None]
        if not others:
            return 0.0
        found = self.logprobs([one.other for one in others if one.other])
        own = torch.tensor([found[one.other.response_id] for one in others if one.other], dtype=torch.float64)
        return float(kto_kl(own, torch.tensor([one.ref[-1] for one in others], dtype=torch.float64)))

    def _summed(self, sums: Mapping[str, float], wrong: str | None, step: int) -> dict[str, float]:
        """The metrics of all processes. What is wrong in one is raised in all, so that none waits for the others."""
        everybody = self._ranks.gathered([(dict(sums), wrong)])
        if faults := [fault for _, fault in everybody if fault]:
            self.descent.clear()
            raise GrapeError(f"step {step}: {faults[0]}: the weights are left as they were")
        names = sorted({name for some, _ in everybody for name in some})
        found = {name: sum(some.get(name, 0.0) for some, _ in everybody) for name in names}
        if {"rewards/chosen", "rewards/rejected"} <= found.keys():
            found["rewards/margin"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


def counts(examples: Sequence[Example]) -> Totals:
    """What the losses of a batch are divided by."""
    return Totals(
        examples=len(examples),
        tokens=sum(len(row.token_ids) for one in examples for row in one.members),
        wanted=sum(bool(one.lesson.label) for one in examples),
        steps=sum(len(one.lesson.labels) for one in examples),
    )
