"""The policy as every process of a run has it: sampled from, and updated, by the leader's word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grape.checkpoint import Saved
from grape.config import RunConfig
from grape.member import Member
from grape.optimize import Optimizer, Update
from grape.policy import Policy, load_policy
from grape.sampler import Sampler, seeded


class Learner:
    """The policy with its sampler and its optimizer, as a run begins or as a checkpoint has left it."""

    def __init__(self, config: RunConfig, accelerator: Any, saved: Saved | None) -> None:
        device = str(accelerator.device)
        self.policy = _policy(config, saved, device)
        self.sampler = Sampler(self.policy, config, accelerator)
        self.ranks = self.sampler.ranks
        self.optimizer = Optimizer(self.policy, config, accelerator, reference=_reference(config, device))
        if saved:
            self.optimizer.load_state_dict(saved.optimizer())

    def update(self, members: Sequence[Member], step: int) -> Update:
        """One step of the optimizer over the members, shared out among the processes."""
        self.ranks.say("update", members, step)
        return self._update(members, step)

    def follow(self) -> Any:
        """Sample and update with the leader until it ends the run; what it says then."""
        while True:
            word, *rest = self.ranks.hear()
            if word == "draw":
                self.sampler.take_part(*rest)
            elif word == "update":
                self._update(*rest)
            else:
                return rest[0]

    def _update(self, members: Sequence[Member], step: int) -> Update:
        mine = self.optimizer.update(self.ranks.share(members), step)
        everybody = self.ranks.gathered([mine.logprobs])
        logprobs = {name: logprob for some in everybody for name, logprob in some.items()}
        return Update(metrics=mine.metrics, logprobs=logprobs)


def _policy(config: RunConfig, saved: Saved | None, device: str) -> Policy:
    """The policy as the run has left it, or as it begins. Full weights stay in float32, whatever they are used in."""
    lora = config.policy.lora
    dtype = config.policy.dtype if lora else "float32"
    if saved:
        return load_policy(str(saved.folder), dtype=dtype, device=device, where="checkpoint.dir")
    seed = seeded(config.seed, "lora")
    return load_policy(config.policy.model, dtype=dtype, lora=lora, device=device, seed=seed)


def _reference(config: RunConfig, device: str) -> Policy | None:
    """The policy as the run began, where the loss asks for it. Fresh adapters, switched off, are that already."""
    if config.loss.kl in ("none", "trpo") or config.policy.lora:
        return None
    return load_policy(config.policy.model, dtype="float32", device=device)
