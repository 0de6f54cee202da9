"""Models that do not move: the reference of the KL penalty, and the head of the policy as it was."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grape.member import Batch
from grape.policy import Policy, causal_lm, logits
from grape.shards import through


class Reference:
    """The policy as the run began: a second model, or the policy itself without its adapters."""

    def __init__(self, policy: Policy, reference: Policy | None) -> None:
        self._own = reference is None
        self._model = policy.model if reference is None else reference.model.eval()
        if self._own and not hasattr(self._model, "disable_adapter"):
            raise ValueError("a KL to the reference needs the reference: this policy has no adapters to switch off")
        head = causal_lm(self._model).get_output_embeddings()
        self.logits = partial(logits, self._model, head=getattr(head, "base_layer", head) if self._own else head)

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """The hidden states N x H before the tokens that count, for `logits`."""
        if not self._own:
            return through(self._model, partial(batch.text.states, self._model))
        with self._model.disable_adapter():
            return batch.text.states(self._model)


def head_of(model: Any, *, copied: bool) -> Any:
    """The output embeddings; ``copied`` where an update is to leave them as they are."""
    head = causal_lm(model).get_output_embeddings()
    if not copied or not any(weight.requires_grad for weight in head.parameters()):
        return head
    return copy.deepcopy(head).requires_grad_(False)
