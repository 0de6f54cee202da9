"""One micro-batch to its loss: log-probabilities, reference, KL, value head, and what `loss` makes of them.

What a micro-batch was before the step's first update (old log-probabilities, the reference's, values, returns) is
noted in the first epoch and holds for all: the first ratio is 1 to the bit, and no pass over the model is made for it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grape.config import RunConfig
from grape.head import Other, token_logprobs
from grape.kl import reward_kl
from grape.linear_head import Slopes
from grape.logprobs import scattered
from grape.loss import PER_SEQUENCE, Metrics, policy_loss, trpo_loss
from grape.member import Batch
from grape.policy import Policy, causal_lm, logits
from grape.reference import Reference, head_of
from grape.value import gae, value_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """A micro-batch before the step's first update: constants of all its epochs."""

    logprobs_BT: Tensor
    advantage: Tensor
    ref_BT: Tensor | None
    other: Other | None
    value_BT: Tensor | None
    return_BT: Tensor | None


class Objective:
    """The loss of a run's config for one policy. ``kl_coef`` is the caller's to move, where it is adaptive."""

    def __init__(self, policy: Policy, config: RunConfig, reference: Policy | None) -> None:
        self.model = policy.model
        self.config = config
        self.kl_coef = config.loss.kl_coef
        self.per_sequence = config.loss.ratio in PER_SEQUENCE
        self.value_head = value_head(policy.model) if config.value else None
        self._many = config.optimizer.epochs > 1
        self._old_head: Any = None
        self._logits = partial(logits, policy.model)
        needed = config.loss.kl in ("k2", "k3", "full", "reward")
        measured = config.loss.kl == "none" and reference is not None
        self._reference = Reference(policy, reference) if needed or measured else None

    def begin(self) -> None:
        """A step begins: what its later epochs compare with is noted from now on."""
        if self.config.loss.kl == "trpo":
            self._old_head = head_of(self.model, copied=self._many)

    def loss(
        self, batch: Batch, before: Before | None, *, num_sequences: int, num_tokens: int
    ) -> tuple[Tensor, Metrics, Before]:
        """The loss of a micro-batch, its metrics, and what it was before the first update, to hand in from then on."""
        totals: dict[str, Any] = {
            "aggregate": self.config.loss.aggregate,
            "norm_length": self.config.loss.norm_length,
            "num_sequences": num_sequences,
            "num_tokens": num_tokens,
        }
        with self.autocast():
            ref_BT, other = self._constants(batch) if before is None else (before.ref_BT, before.other)
            states_NH = batch.text.states(self.model)
            if before is None and self.config.loss.kl == "trpo":
                head = partial(logits, self.model, head=self._old_head)
                other = Other(states_NH=states_NH.detach(), logits=head, first=True)
        value_BT = self._values(states_NH, batch)
        slopes = self._slopes(batch, before, ref_BT, value_BT, totals)
        with self.autocast():
            values = token_logprobs(self._logits, states_NH, batch.labels_N, entropy=True, other=other, slopes=slopes)
        logprobs_BT, entropy_BT = (scattered(values_N, batch.mask_BT) for values_N in values[:2])
        kl_BT = None if other is None else scattered(values[2], batch.mask_BT)
        old_BT = before.logprobs_BT if before else None  # None: the ratio is 1, and the gradient -A grad log pi
        before = before or self._before(batch, logprobs_BT.detach(), ref_BT, other, value_BT)
        loss, metrics = self._policy_loss(batch, before, logprobs_BT, old_BT, entropy_BT, kl_BT, totals)
        if (value := self.config.value) and value_BT is not None and before.return_BT is not None:
            error, of_value = value_loss(
                value_BT, before.return_BT, batch.mask_BT, old_value_BT=before.value_BT, clip=value.clip, **totals
            )
            loss, metrics = loss + value.coef * error, metrics | of_value
        return loss, metrics | {"loss": loss.detach()}, before

    def _slopes(
        self,
        batch: Batch,
        before: Before | None,
        ref_BT: Tensor | None,
        value_BT: Tensor | None,
        totals: dict[str, Any],
    ) -> Slopes | None:
        """The loss's gradient by each token's log-probability and entropy, where it hangs on no later token's.

        It is the loss itself that is differentiated; the gradient is right where this is not.
        """
        config = self.config.loss
        by_row = self.per_sequence and (before is not None or config.rollout_cap is not None)
        if by_row or (config.kl == "reward" and self.value_head is not None):
            return None
        one = before is None and config.kl == "none" and config.rollout_cap is None  # the ratio, whatever comes
        told: list[tuple[Tensor, Tensor | None]] = []

        def slopes(logprobs_N: Tensor, entropy_N: Tensor) -> tuple[Tensor, Tensor | None]:
            if told and one:
                return told[0]
            with torch.enable_grad():
                pair = [values_N.detach().requires_grad_() for values_N in (logprobs_N, entropy_N)]
                logprobs_BT, entropy_BT = (scattered(values_N, batch.mask_BT) for values_N in pair)
                as_of = before or self._before(batch, logprobs_BT.detach(), ref_BT, None, value_BT)
                old_BT = before.logprobs_BT if before else None
                loss, _ = self._policy_loss(batch, as_of, logprobs_BT, old_BT, entropy_BT, None, totals)
                by_logprob_N, by_entropy_N = torch.autograd.grad(loss, pair, allow_unused=True)
                told[:] = [(by_logprob_N, by_entropy_N)]
            return told[0]

        return slopes

    def _policy_loss(
        self,
        batch: Batch,
        before: Before,
        logprobs_BT: Tensor,
        old_BT: Tensor | None,
        entropy_BT: Tensor,
        kl_BT: Tensor | None,
        totals: dict[str, Any],
    ) -> tuple[Tensor, Metrics]:
        config = self.config.loss
        options = {**totals, "entropy_BT": entropy_BT, "entropy_coef": config.entropy_coef}
        if config.rollout_cap is not None:
            drawn_BT = torch.where(batch.rollout_BT.isnan(), before.logprobs_BT, batch.rollout_BT)
            options |= {"rollout_logprobs_BT": drawn_BT, "rollout_cap": config.rollout_cap}
        if config.kl == "trpo":
            assert kl_BT is not None
            of = (logprobs_BT, before.logprobs_BT, before.advantage, batch.mask_BT, kl_BT)
            return trpo_loss(*of, kl_coef=self.kl_coef, **options)
        in_loss = config.kl in ("k2", "k3", "full")
        return policy_loss(
            logprobs_BT,
            old_BT,
            before.advantage,
            batch.mask_BT,
            ratio=config.ratio,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            ref_logprobs_BT=before.ref_BT,
            full_kl_BT=kl_BT,
            kl=config.kl if in_loss else "none",  # type: ignore[arg-type]  # as in_loss says
            kl_coef=self.kl_coef if in_loss else 0.0,
            **options,
        )

    def _before(
        self, batch: Batch, logprobs_BT: Tensor, ref_BT: Tensor | None, other: Other | None, value_BT: Tensor | None
    ) -> Before:
        """The constants of the step: eq. 12 goes onto the advantage, or into the rewards of the value head."""
        advantage, return_BT, penalty_BT = batch.advantage_B, None, None
        if self.config.loss.kl == "reward" and not self.per_sequence:
            assert ref_BT is not None
            penalty_BT = reward_kl(logprobs_BT, ref_BT, batch.mask_BT, kl_coef=self.kl_coef)
            advantage = advantage[:, None] + penalty_BT
        if self.config.value and value_BT is not None:
            value_BT = value_BT.detach()
            last_BT = batch.mask_BT & (batch.mask_BT.flip(1).long().cumsum(1).flip(1) == 1)
            reward_BT = torch.where(last_BT, batch.reward_B[:, None].to(value_BT), 0.0)
            reward_BT = reward_BT if penalty_BT is None else reward_BT + penalty_BT
            gamma, lam = self.config.value.gamma, self.config.value.lam
            advantage, return_BT = gae(reward_BT, value_BT, batch.mask_BT, gamma=gamma, lam=lam)
        return Before(
            logprobs_BT=logprobs_BT,
            advantage=advantage,
            ref_BT=ref_BT,
            other=other if self._many else None,  # N x H: as large as the batch
            value_BT=value_BT,
            return_BT=return_BT,
        )

    @torch.no_grad()
    def penalties(self, batch: Batch) -> Tensor:
        """Eq. 12 summed over each row, B: what a ratio per sequence takes into the reward, before the baseline."""
        with self.autocast():
            ref_BT, _ = self._constants(batch)
            states_NH = batch.text.states(self.model)
            logprobs_N, _, _ = token_logprobs(self._logits, states_NH, batch.labels_N)
        assert ref_BT is not None
        logprobs_BT = scattered(logprobs_N, batch.mask_BT)
        return reward_kl(logprobs_BT, ref_BT, batch.mask_BT, kl_coef=self.kl_coef).sum(1)

    @torch.no_grad()
    def _constants(self, batch: Batch) -> tuple[Tensor | None, Other | None]:
        """The reference's log-probabilities, or, for the exact KL, its states."""
        if self._reference is None:
            return None, None
        states_NH = self._reference.states(batch)
        if self.config.loss.kl == "full":
            return None, Other(states_NH=states_NH, logits=self._reference.logits)
        logprobs_N, _, _ = token_logprobs(self._reference.logits, states_NH, batch.labels_N)
        return scattered(logprobs_N, batch.mask_BT), None

    def _values(self, states_NH: Tensor, batch: Batch) -> Tensor | None:
        """The value of the text before each response token."""
        if self.value_head is None:
            return None
        values_N = self.value_head(states_NH.to(self.value_head.weight.dtype)).squeeze(-1)
        return scattered(values_N, batch.mask_BT)

    def autocast(self) -> AbstractContextManager[None]:
        """Arithmetic in bfloat16, where the config says so; the weights stay in float32."""
        enabled = self.config.policy.dtype == "bfloat16"
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=enabled)


def value_head(model: Any) -> torch.nn.Linear:
    """A value for each hidden state, in float32 at least: 0 at first, so that the first advantages are the rewards."""
    logits_of = causal_lm(model).get_output_embeddings()
    dtype = torch.promote_types(logits_of.weight.dtype, torch.float32)
    head = torch.nn.Linear(logits_of.in_features, 1, device="meta", dtype=dtype)  # draws no random numbers
    head = head.to_empty(device=model.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    return head
