"""The policy as the processes of a run have it, each all or a part: sampled from, and updated, by the leader's word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grape.checkpoint import Saved, State
from grape.config import RunConfig
from grape.member import Member
from grape.optimize import Optimizer, Update
from grape.policy import Dtype, Policy, load_policy
from grape.sampler import Sampler, seeded
from grape.shards import full_weights, shard


class Learner:
    """The policy with its sampler and its optimizer, as a run begins or as a checkpoint has left it."""

    def __init__(self, config: RunConfig, accelerator: Any, saved: Saved | None) -> None:
        self.policy = _policy(config, saved, accelerator)
        self.sampler = Sampler(self.policy, config, accelerator)
        self.ranks = self.sampler.ranks
        self.optimizer = Optimizer(self.policy, config, accelerator, reference=_reference(config, accelerator))
        if saved:
            self.optimizer.load_state_dict(saved.optimizer())

    def update(self, members: Sequence[Member], step: int) -> Update:
        """One step of the optimizer over the members, shared out among the processes."""
        self.ranks.say("update", members, step)
        return self._update(members, step)

    def state(self) -> State:
        """What a checkpoint of now holds, in the leader: each process gives its part of a policy that is shared out."""
        if self.ranks.count > 1:
            self.ranks.say("state")
        return self._state()

    def follow(self) -> Any:
        """Sample, update and save with the leader until it ends the run; what it says then."""
        while True:
            word, *rest = self.ranks.hear()
            if word == "draw":
                self.sampler.take_part(*rest)
            elif word == "update":
                self._update(*rest)
            elif word == "state":
                self._state()
            else:
                return rest[0]

    def _update(self, members: Sequence[Member], step: int) -> Update:
        mine = self.optimizer.update(self.ranks.share(members), step)
        served = self.sampler.served
        if served:
            served.stale = True
        everybody = self.ranks.gathered([mine.logprobs])
        logprobs = {name: logprob for some in everybody for name, logprob in some.items()}
        metrics = mine.metrics | ({"engine_gap": served.gap} if served and mine.metrics else {})
        return Update(metrics=metrics, logprobs=logprobs)

    def _state(self) -> State:
        leads = self.ranks.leads
        return State(
            weights=full_weights(self.policy.model, keep=leads), optimizer=self.optimizer.state_dict(keep=leads)
        )


def _policy(config: RunConfig, saved: Saved | None, accelerator: Any) -> Policy:
    """The policy as the run has left it, or as it begins. Full weights stay in float32, whatever they are used in."""
    lora = config.policy.lora
    dtype: Dtype = config.policy.dtype if lora else "float32"
    if saved:
        return _loaded(config, accelerator, str(saved.folder), dtype=dtype, where="checkpoint.dir")
    seed = seeded(config.seed, "lora")
    return _loaded(config, accelerator, config.policy.model, dtype=dtype, lora=lora, seed=seed)


def _reference(config: RunConfig, accelerator: Any) -> Policy | None:
    """The policy as the run began, where the loss asks for it. Fresh adapters, switched off, are that already."""
    if config.loss.kl in ("none", "trpo") or config.policy.lora:
        return None
    return _loaded(config, accelerator, config.policy.model, dtype="float32")


def _loaded(config: RunConfig, accelerator: Any, model: str, **options: Any) -> Policy:
    """A policy, or this process's part of it: then it is read beside the device, which may not have room for all."""
    shared = config.policy.shard and accelerator.num_processes > 1  # one process has nobody to share with
    policy = load_policy(model, device="cpu" if shared else str(accelerator.device), **options)
    if shared:
        shard(policy.model, accelerator.device, accelerator.num_processes)
    return policy
