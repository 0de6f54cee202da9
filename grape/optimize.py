"""Epochs x micro-batches over a step's responses: one AdamW update per epoch, and none where a number is not finite."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from grape.config import RunConfig
from grape.descent import Descent
from grape.errors import ConfigError, GrapeError
from grape.kl import adapted_kl_coef
from grape.member import Batch, Member, blank
from grape.modes import Modes
from grape.objective import Before, Objective
from grape.packing import Packing
from grape.policy import Policy
from grape.ranks import Ranks
from grape.reward import advantage
from grape.shards import is_shared, release, through, whole

__all__ = ["Member", "Optimizer", "Update"]

OVER_TOKENS = ("approx_kl", "ref_kl", "old_kl", "entropy", "value_clip")  # `loss` divides these by all tokens
OVER_TERMS = ("clip_low", "clip_high", "clip_dual", "ratio_mean", "rollout_weight", "rollout_truncated")  # or sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What a step did: its metrics, means over epochs, and of each trained response log pi before the update."""

    metrics: dict[str, float]
    logprobs: dict[str, float]


class Optimizer:
    """Policy and value head under AdamW, in one process or in one of several.

    Each process has its own members, whole groups at a time; gradients and totals are summed over all, so that every
    process makes the same update. Processes that share the policy out (`grape.shards`) make as many passes as each
    other. There is no dropout but that of LoRA, which is drawn from the seed and the step.
    """

    def __init__(
        self, policy: Policy, config: RunConfig, accelerator: Accelerator, *, reference: Policy | None = None
    ) -> None:
        if config.loss.kl == "trpo" and config.loss.kl_target and config.optimizer.epochs == 1:
            raise ConfigError("loss.kl_target: kl trpo is 0 in the first epoch: set optimizer.epochs above 1")
        self.policy = policy
        self.config = config
        self.accelerator = accelerator
        self.objective = Objective(policy, config, reference)
        self._ranks = Ranks(accelerator)
        self._others = () if reference is None else (reference.model,)
        with whole(policy.model), self.objective.autocast():
            self.packing = Packing(policy.model, policy.pad_id, self._others)
            self._modes = Modes(policy.model, config.policy.gradient_checkpointing)
        parts = [(policy.model, config.optimizer.lr)]
        if self.objective.value_head is not None and config.value is not None:
            parts.append((self.objective.value_head, config.value.lr or config.optimizer.lr))
        self._descent = Descent(parts, config.optimizer, self._ranks)

    def update(self, members: Sequence[Member], step: int) -> Update:
        """Train on a step's members. ``step`` counts from 1.

        A step in which no process has a token to train on changes nothing. Raises `GrapeError`, of one line, before a
        number that is not finite reaches the weights.
        """
        self._agree(fault(members), step)
        trained = [member for member in members if member.trained]
        batches = self.packing.batches(trained, self.config.optimizer.micro_tokens)
        totals = self._totals(members, batches)
        batches += self._blanks(len(batches))
        if not totals["trained_tokens"]:
            return Update(metrics={}, logprobs={})
        epochs: list[dict[str, float]] = []
        before: dict[int, Before] = {}
        with self._modes.training(), self._gathered():
            if batches and self.config.loss.kl == "reward" and self.objective.per_sequence:
                batches = self._penalised(batches, step)
            for _ in range(self.config.optimizer.epochs):
                epochs.append(self._epoch(batches, before, totals, step))
        metrics = {name: sum(epoch[name] for epoch in epochs) / len(epochs) for name in epochs[0]}
        metrics["ratio_max"] = max(epoch["ratio_max"] for epoch in epochs)
        self._adapt(epochs[-1])
        logprobs = {
            member.response_id: value
            for number, batch in enumerate(batches)
            for member, value in zip(batch.members, before[number].logprobs_BT.double().sum(1).tolist(), strict=True)
            if member.trained
        }
        return Update(metrics=metrics, logprobs=logprobs)

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """All that a run goes on from but the policy's own weights, the same however many processes share it out.

        All of them take part; those that are not to ``keep`` it get tensors without numbers.
        """
        head = self.objective.value_head
        return {
            "adamw": self._descent.state_dict(keep=keep),
            "value_head": None if head is None else head.state_dict(),
            "kl_coef": self.objective.kl_coef,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, whose tensors become its own: later updates change them."""
        self._descent.load_state_dict(state["adamw"])
        if self.objective.value_head is not None and state["value_head"] is not None:
            self.objective.value_head.load_state_dict(state["value_head"])
        self.objective.kl_coef = state["kl_coef"]

    def _epoch(
        self, batches: Sequence[Batch], before: dict[int, Before], totals: dict[str, int], step: int
    ) -> dict[str, float]:
        """One update over all micro-batches, and its metrics over all processes."""
        sums: dict[str, float] = defaultdict(float)
        wrong, highest = None, 0.0
        over = {"num_sequences": totals["sequences"], "num_tokens": totals["tokens"]}
        for number, batch in enumerate(batches):
            with self._pass(batch, step, number):
                pass_ = partial(self.objective.loss, batch, before.get(number), **over)
                loss, metrics, before[number] = through(self.policy.model, pass_)
                counts = batch.members[0].trained
                if counts and not loss.isfinite():  # other processes go on: they need this one's part of every pass
                    wrong = wrong or blame(batch, before[number], loss.item())
                (loss if counts else 0.0 * loss).backward()  # type: ignore[no-untyped-call]
            if counts:
                for name, value in metrics.items():
                    sums[name] += value.item()
                highest = max(highest, metrics["ratio_max"].item())
        self._agree(wrong, step)
        norm, rate = self._descent.step(step, self.config.steps)
        return self._over_ranks(sums, highest, totals) | {
            "grad_norm": norm,
            "lr": rate,
            "kl_coef": self.objective.kl_coef,
            "tokens": float(totals["trained_tokens"]),
            "computed": totals["computed"] / totals["real"],
        }

    @contextmanager
    def _pass(self, batch: Batch, step: int, number: int) -> Iterator[None]:
        """The models take a micro-batch; its dropout is the same in all passes."""
        rank = self.accelerator.process_index
        with self._modes.seeded(self.config.seed, step, rank, number), self.packing.on(batch.text, *self._others):
            yield

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """A step of the objective; what it has left whole of a shared model goes at its end."""
        through(self.policy.model, self.objective.begin)
        try:
            yield
        finally:
            for model in (self.policy.model, *self._others):
                release(model)

    def _blanks(self, count: int) -> list[Batch]:
        """What this process computes while others have more micro-batches: all take part in every pass."""
        if not is_shared(self.policy.model):
            return []
        most = self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), "max").item()
        return [batch for _ in range(most - count) for batch in self.packing.batches([blank(self.policy.pad_id)], 1)]

    def _penalised(self, batches: Sequence[Batch], step: int) -> list[Batch]:
        """Eq. 12 with a ratio per sequence: each row's penalty is in its reward before the group's baseline."""
        penalties = []
        for number, batch in enumerate(batches):
            with self._pass(batch, step, number):
                penalties.append(through(self.policy.model, partial(self.objective.penalties, batch)))
        flat = torch.cat(penalties).double().cpu().numpy()
        groups = [member.group for batch in batches for member in batch.members]
        gains = torch.from_numpy(advantage(flat, groups, baseline=self.config.advantage.baseline))
        cut = torch.split(gains, [len(batch.members) for batch in batches])
        return [
            replace(batch, advantage_B=batch.advantage_B + gain.to(batch.advantage_B))
            for batch, gain in zip(batches, cut, strict=True)
        ]

    def _adapt(self, metrics: dict[str, float]) -> None:
        """Move the KL's coefficient towards its target."""
        target = self.config.loss.kl_target
        if target is not None:
            name = "old_kl" if self.config.loss.kl == "trpo" else "ref_kl"
            self.objective.kl_coef = adapted_kl_coef(self.objective.kl_coef, metrics[name], target=target)

    def _totals(self, members: Sequence[Member], batches: Sequence[Batch]) -> dict[str, int]:
        """Counts over all processes. What is not trained is in ``sequences`` and ``tokens``, which losses divide by."""
        rows = [member for batch in batches for member in batch.members]
        counts = {
            "sequences": len(members),
            "tokens": sum(len(member.token_ids) for member in members),
            "trained_sequences": len(rows),
            "trained_tokens": sum(len(member.token_ids) for member in rows),
            "real": sum(map(len, rows)),
            "computed": sum(len(batch.text) for batch in batches),
        }
        return {name: int(value) for name, value in self._sum(counts).items()}

    def _over_ranks(self, sums: dict[str, float], highest: float, totals: dict[str, int]) -> dict[str, float]:
        """The metrics of all processes, means over what was trained. One without members knows no names."""
        names = sums if self.accelerator.num_processes == 1 else sorted(set(gather_object(list(sums))))
        metrics = self._sum({name: sums.get(name, 0.0) for name in names})
        over_sequences = self.objective.per_sequence
        for name in metrics:
            if name in OVER_TOKENS or (name in OVER_TERMS and not over_sequences):
                metrics[name] *= totals["tokens"] / totals["trained_tokens"]
            elif name in OVER_TERMS:
                metrics[name] *= totals["sequences"] / totals["trained_sequences"]
        top = torch.tensor(highest, device=self.accelerator.device)
        return metrics | {"ratio_max": float(self.accelerator.reduce(top, "max"))}

    def _sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Numbers, summed over processes."""
        if self.accelerator.num_processes == 1:
            return dict(values)
        numbers = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(numbers, "sum").tolist(), strict=True))

    def _agree(self, wrong: str | None, step: int) -> None:
        """Raise what is wrong, in every process if in one, so that none waits for the others."""
        if self._sum({"wrong": float(wrong is not None)})["wrong"]:
            self._descent.clear()
            raise GrapeError(f"step {step}: {wrong or 'another process has numbers that are not finite'}")


def fault(members: Sequence[Member]) -> str | None:
    """What is not a finite number in the members, if anything."""
    for member in members:
        numbers = {"advantage": member.advantage, "reward": member.reward}
        numbers |= {f"rollout_logprobs[{at}]": value for at, value in enumerate(member.rollout_logprobs or ())}
        for name, value in numbers.items():
            if not math.isfinite(value):
                return f"response {member.response_id!r}: its {name} is {value}: the weights are left as they were"
    return None


def blame(batch: Batch, before: Before, loss: float) -> str:
    """A loss that is not finite, and the responses that it may come from."""
    bad = (~before.logprobs_BT.isfinite().all(1)).tolist()
    names = [member.response_id for member, one in zip(batch.members, bad, strict=True) if one or not any(bad)]
    some = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"the loss is {loss} with response {some}: the weights are left as they were"
