"""The policy as vLLM serves it: the trainer's weights after every step, and the proof that they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory

import torch

from grape.config import RunConfig
from grape.engine import Engine
from grape.errors import ConfigError, GrapeError
from grape.policy import Policy, hidden_states, logits, save_policy
from grape.rollout import Rollout, Sampling, check, evaluating

Prompts = Sequence[tuple[int, ...]]
COMPARED = 64  # tokens of a prompt whose log-probabilities are compared
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}  # natural logarithms


class Served:
    """A policy sampled from by vLLM. ``stale`` says that the policy has moved since it was given over.

    ``gap`` is the largest difference of log-probabilities between the two after the last time: weights that were
    loaded wrongly would change results in silence.
    """

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        self.stale = False
        self.gap = 0.0
        self._policy = policy
        self._dtype = config.policy.dtype
        self._options = {"gpu_memory_utilization": 0.4, **config.sampling.options}
        self._engine: Engine | None = None

    def close(self) -> None:
        """Let go of the engine."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def sample(
        self,
        prompts: Prompts,
        counts: Sequence[int],
        max_tokens: int,
        seed: int,
        sampling: Sampling,
        on_response: Callable[[Rollout], None],
    ) -> None:
        """``counts`` responses to each prompt, as `grape.rollout.sample` gives them; each has a seed of its own."""
        check(self._policy, prompts, list(counts), max_tokens)
        places = [(group, member) for group, count in enumerate(counts) for member in range(count)]
        if not places:
            return
        engine = self._current(prompts[places[0][0]])
        needed = max(map(len, prompts)) + max_tokens
        if needed > engine.room:
            raise ConfigError(
                f"sampling.options.max_model_len: is {engine.room}; the longest prompt and sampling.max_tokens take "
                f"{needed} tokens"
            )
        own = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_tokens": max_tokens,
            "ignore_eos": True,  # what ends a response are the policy's own stop tokens
        }

        def on_end(place: int, rollout: Rollout) -> None:
            group, member = places[place]
            on_response(replace(rollout, group=group, member=member))

        engine.sample(
            [prompts[group] for group, _ in places],
            [{**own, "seed": (seed + place) % 2**63} for place in range(len(places))],
            self._policy.stop_ids,
            on_end,
        )

    def _current(self, text: Sequence[int]) -> Engine:
        """The engine with the policy's weights as they are."""
        engine = self._engine
        if engine is None:
            with TemporaryDirectory() as folder:
                save_policy(self._policy, folder)
                engine = Engine(folder, dtype=self._dtype, where="sampling.engine", options=self._options)
            self._engine = engine
        elif self.stale:
            engine.load(self._policy.model.state_dict().items())
        else:
            return engine
        self.stale = False
        self._compare(engine, text[:COMPARED])
        return engine

    @torch.no_grad()
    def _compare(self, engine: Engine, text: Sequence[int]) -> None:
        if len(text) < 2:
            return
        ids_BT = torch.tensor([list(text)], device=self._policy.model.device)
        with evaluating(self._policy.model):
            states_TH = hidden_states(self._policy.model, ids_BT, torch.ones_like(ids_BT)).last_hidden_state[0, :-1]
            logprobs_TV = logits(self._policy.model, states_TH).log_softmax(-1)
        ours_T = logprobs_TV.gather(1, ids_BT[0, 1:, None])[:, 0].cpu()
        self.gap = float((ours_T - torch.tensor(engine.logprobs(text))).abs().max())
        if not self.gap <= TOLERANCE[self._dtype]:
            raise GrapeError(
                f"sampling.engine: vllm gives log-probabilities that differ by {self.gap:.3g} from the policy's: "
                "its weights are not the policy's"
            )
