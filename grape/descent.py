"""AdamW over some weights: its schedule, clipped gradients, and no step on a number that is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grape.config import OptimizerConfig
from grape.errors import ConfigError, GrapeError, one_line
from grape.ranks import Ranks
from grape.shards import clipped, full_state, own_state


class Descent:
    """The weights of some modules, each with its own greatest rate, moved by the gradients that were summed on them.

    All processes make the same step, from the sums of all their gradients.
    """

    def __init__(self, parts: Sequence[tuple[Any, float]], config: OptimizerConfig, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        self._groups = param_groups(parts, config.weight_decay)
        self.weights: list[Tensor] = [weight for group in self._groups for weight in group["params"]]
        # Not fused: on a CPU torch 2.13 then takes a gradient that is not contiguous in the order of its memory.
        self.adamw = torch.optim.AdamW([dict(group) for group in self._groups])

    def step(self, step: int, steps: int) -> tuple[float, float]:
        """Clip the gradients, let AdamW move the weights; the norm before that, and the rate. ``step`` is from 1."""
        self._ranks.sum_gradients(self.weights)
        norm = clipped(self.weights, self._config.max_grad_norm)
        if not math.isfinite(norm):
            self.clear()
            raise GrapeError(f"step {step}: the norm of the gradient is {norm}: the weights are left as they were")
        factor = schedule(step, steps, self._config)
        for group, ours in zip(self.adamw.param_groups, self._groups, strict=True):
            group["lr"] = factor * ours["lr"]
        self.adamw.step()
        self.clear()
        return norm, factor * self._config.lr

    def clear(self) -> None:
        """Forget the gradients."""
        self.adamw.zero_grad()

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """AdamW's state, the same however many processes share it out; those that do not ``keep`` it get no numbers."""
        return full_state(self.adamw.state_dict(), keep=keep)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, whose tensors become its own: later steps change them."""
        try:
            self.adamw.load_state_dict(own_state(state, self.weights))
        except ValueError as error:
            raise ConfigError(f"the optimizer's state is of other weights: {one_line(error)}") from error


def schedule(step: int, steps: int, config: OptimizerConfig) -> float:
    """The share of the learning rate in a step, from 1: up to 1 over ``warmup`` steps, then as it says towards 0.

    The first step after the warmup has 1 and 0 would be the one after the last: no step is wasted.
    """
    if step <= config.warmup:
        return step / config.warmup
    done = min(1.0, (step - config.warmup - 1) / max(1, steps - config.warmup))
    if config.schedule == "constant":
        return 1.0
    return 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def param_groups(parts: Sequence[tuple[Any, float]], decay: float) -> list[dict[str, Any]]:
    """The weights of modules that are trained, with their rates: matrices decay, norms and biases do not."""
    groups: list[dict[str, Any]] = [
        {"params": some, "lr": rate, "weight_decay": rule}
        for module, rate in parts
        for matrices, rule in ((True, decay), (False, 0.0))
        if (
            some := [
                weight for weight in module.parameters() if weight.requires_grad and (weight.dim() > 1) == matrices
            ]
        )
    ]
    small = {weight.dtype for group in groups for weight in group["params"]} & {torch.bfloat16, torch.float16}
    if small:
        raise ValueError(f"weights that are trained must be in float32, not {small.pop()}: small updates would be lost")
    return groups
