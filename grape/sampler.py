"""Groups of prompts to rollouts, on all processes of a run: draws that are a function of their seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from grape.config import RunConfig
from grape.errors import ConfigError
from grape.policy import Policy
from grape.ranks import Ranks
from grape.rollout import Rollout, Sampling, sample
from grape.served import Served
from grape.shards import whole

Prompts = Sequence[tuple[int, ...]]


def seeded(*parts: object) -> int:
    """A seed that is a function of its parts alone, so that no state of a generator has to be kept."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


class Sampler:
    """Samples from the policy as the run's file says. A setting that ``training`` cannot use is a `ConfigError`."""

    def __init__(self, policy: Policy, config: RunConfig, accelerator: Any, *, training: bool = True) -> None:
        self.policy = policy
        self.ranks = Ranks(accelerator)
        self._accelerator = accelerator
        self._config = config.sampling
        drawn = {name: getattr(self._config, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        self._sampling = Sampling(**drawn, training=training)
        if self._config.engine == "vllm" and self.ranks.count > 1:
            raise ConfigError("sampling.engine: vllm samples in a run of one process only")
        self.served = Served(policy, config) if self._config.engine == "vllm" else None

    def draw(
        self, prompts: Prompts, counts: Sequence[int], seed: Sequence[object], greedy: bool,
        on_response: Callable[[Rollout], None],
    ) -> None:  # fmt: skip
        """So many responses to each prompt; ``on_response`` gets each as it ends, other processes' when they are done.

        For the leader; `take_part` is the others' side of it.
        """
        if prompts:
            self.ranks.say("draw", prompts, counts, seed, greedy)
            for rollout in self.take_part(prompts, counts, seed, greedy, on_response):
                on_response(rollout)

    def take_part(
        self, prompts: Prompts, counts: Sequence[int], seed: Sequence[object], greedy: bool,
        on_response: Callable[[Rollout], None] | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """Draw this process's portions, and return the rollouts of the others. Each portion has a seed of its own."""
        mine: list[Rollout] = []
        with whole(self.policy.model):
            for number, (start, end) in enumerate(self.portions(counts)):
                if number % self.ranks.count != self.ranks.number:
                    continue

                def moved(rollout: Rollout, start: int = start) -> None:
                    mine.append(replace(rollout, group=rollout.group + start))
                    if on_response:
                        on_response(mine[-1])

                sampling = Sampling(temperature=0.0, training=False) if greedy else self._sampling
                own, draws = (prompts[start:end], counts[start:end]), seeded(*seed, number)
                if self.served:
                    self.served.sample(*own, self._config.max_tokens, draws, sampling, moved)
                    continue
                with self._accelerator.autocast():
                    sample(
                        self.policy,
                        own[0],
                        responses=own[1],
                        max_tokens=self._config.max_tokens,
                        generator=torch.Generator(device=self.policy.model.device).manual_seed(draws),
                        sampling=sampling,
                        on_response=moved,
                    )
        everybody = self.ranks.gathered([(self.ranks.number, rollout) for rollout in mine])
        return [rollout for number, rollout in everybody if number != self.ranks.number]

    def portions(self, counts: Sequence[int]) -> list[tuple[int, int]]:
        """The prompts cut so that at most ``sampling.rows`` responses, or one group, are decoded at a time.

        Left out, the responses are shared out evenly among the processes.
        """
        limit = self._config.rows or -(-sum(counts) // self.ranks.count)
        cuts, rows = [0], 0
        for place, count in enumerate(counts):
            if rows and rows + count > limit:
                cuts.append(place)
                rows = 0
            rows += count
        return list(zip(cuts, [*cuts[1:], len(counts)], strict=True))
