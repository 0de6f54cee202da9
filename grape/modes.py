"""The modes of a model in training: no dropout but LoRA's, from a seed; states made anew where memory is short."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from grape.errors import ConfigError, one_line
from grape.logprobs import pad, response_states
from grape.policy import causal_lm
from grape.rollout import evaluating

WHERE = "policy.gradient_checkpointing"


class Modes:
    """The model is in evaluation mode, but for the parts that a training pass needs otherwise."""

    def __init__(self, model: Any, gradient_checkpointing: bool) -> None:
        self._model = model
        self._dropouts = [
            module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Dropout) and module.p > 0 and ".lora_dropout." in name
        ]
        self._layers: list[Any] = []
        if gradient_checkpointing:
            try:
                base = causal_lm(model)  # transformers is renaming this
                enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
                enable({"use_reentrant": False})
            except ValueError as error:
                raise ConfigError(f"{WHERE}: {one_line(error)}") from error
            self._layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
            self._check()

    @contextmanager
    def training(self) -> Iterator[None]:
        """The mode of a pass whose gradient is wanted."""
        with evaluating(self._model):
            for module in (*self._dropouts, *self._layers):
                module.training = True  # of this module alone: what is in it stays in evaluation mode
            try:
                yield
            finally:
                for module in (*self._dropouts, *self._layers):
                    module.training = False

    @contextmanager
    def seeded(self, *place: int) -> Iterator[None]:
        """Dropout from a place: the same in every epoch, so that no ratio is of two different draws."""
        if not self._dropouts:
            yield
            return
        device = self._model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.random.manual_seed(random.Random("/".join(map(str, place))).getrandbits(63))
            yield

    @torch.no_grad()
    def _check(self) -> None:
        """Refuse a model whose layers differ by mode in more than memory: they drop out what cannot be switched off."""
        device, dropouts, self._dropouts = self._model.device, self._dropouts, []
        batch = pad([[0]], [[1, 2, 3]], 0, device)
        with evaluating(self._model):
            wanted = response_states(self._model, *batch)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.training():
            got = response_states(self._model, *batch)
        self._dropouts = dropouts
        if not self._layers or not torch.allclose(wanted, got, rtol=1e-3, atol=1e-3):
            raise ConfigError(f"{WHERE}: {type(causal_lm(self._model)).__name__} cannot do without dropout in it")
