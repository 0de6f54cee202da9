"""TRL's GRPOTrainer and RLOOTrainer on recorded rollouts: what they make of the same weights, responses and rewards.

    result = train(folder, batches, trainer="grpo", rows=4, loss_type="dapo", learning_rate=1e-3)

``batches`` are generation batches, each of groups, each of the rollouts of one prompt. A batch is trained in micro-batches of
``rows`` responses that are accumulated to one optimizer step, ``num_iterations`` times over. Nothing is generated and
nothing is scored: TRL has the responses and the rewards that it is given. It shuffles the rows of a batch before it
cuts them into micro-batches, so losses compare by the optimizer step.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func warns
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A response that was drawn, without its padding, and its reward: None where it has none."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    reward: float | None


Batch = Sequence[Sequence[Rollout]]  # groups of equal size, each of one prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What TRL did, by optimizer step; ``metrics`` is all that it logs, ``weights`` are those after the last step.

    ``seconds`` and ``cpu_seconds`` are of the update alone: log-probabilities of the old policy and the reference, the
    passes forward and backward, clipping and the optimizer. The stored rollouts' way into TRL is not in them.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def train(
    folder: str | Path,
    batches: Sequence[Batch],
    *,
    trainer: Literal["grpo", "rloo"] = "grpo",
    rows: int,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    weights: Literal["float32", "bfloat16"] = "float32",
    gradient_checkpointing: bool = False,
    liger: bool = False,
    model: dict[str, Any] | None = None,
    on_load: Callable[[Any], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    **options: Any,
) -> Trained:
    """One optimizer step for each batch and iteration from the model (and tokenizer) in a folder.

    ``rows`` is TRL's per_device_train_batch_size, and gradient accumulation what makes a batch of it. ``dtype`` is that
    of the arithmetic (autocast), ``weights`` that of the parameters; ``model`` goes to from_pretrained, ``options`` to
    TRL's config. ``on_load`` gets the trainer before the first step, ``on_step`` each step's number, from 1, after it.
    """
    number = {len(group) for batch in batches for group in batch}
    size = {sum(map(len, batch)) for batch in batches}
    if len(number) != 1 or len(size) != 1 or next(iter(size)) % rows:
        raise ValueError("batches are of one size, a multiple of rows, and groups of one size")
    accumulation = size.pop() // rows
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        settings = {
            "output_dir": scratch,
            "use_cpu": device == "cpu",
            "bf16": dtype == "bfloat16",
            "model_init_kwargs": {"dtype": weights, **(model or {})},
            "gradient_checkpointing": gradient_checkpointing,
            "use_liger_kernel": liger,
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": accumulation,
            "steps_per_generation": accumulation,  # another number changes what the ratio compares with
            "num_generations": number.pop(),
            "num_iterations": 1,
            "max_steps": len(batches) * options.get("num_iterations", 1),
            "disable_dropout": True,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "shuffle_dataset": False,
            "dataloader_num_workers": 0,
            "dataloader_pin_memory": device != "cpu",
            "disable_tqdm": True,
            "seed": 42,
            **options,
        }
        return _train(str(folder), batches, trainer, settings, on_load, on_step)


def _train(
    folder: str,
    batches: Sequence[Batch],
    trainer: str,
    settings: dict[str, Any],
    on_load: Callable[[Any], None] | None,
    on_step: Callable[[int], None] | None,
) -> Trained:
    stored = {f"{step}:{at}": group for step, batch in enumerate(batches) for at, group in enumerate(batch)}
    clock = Clock(settings["use_cpu"], on_step)
    recorded: Any = recorded_grpo if trainer == "grpo" else recorded_rloo
    peer = recorded(
        stored,
        clock,
        model=folder,
        args=(GRPOConfig if trainer == "grpo" else RLOOConfig)(**settings),
        train_dataset=Dataset.from_dict({"prompt": list(stored)}),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        callbacks=[clock],
    )
    peer.remove_callback(PrinterCallback)
    if on_load:
        on_load(peer)
    peer.train()
    logs = [entry for entry in peer.state.log_history if "grad_norm" in entry]
    return Trained(
        losses=[entry["loss"] for entry in logs],
        grad_norms=[entry["grad_norm"] for entry in logs],
        metrics=logs,
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
        weights={name: weight.detach().cpu().clone() for name, weight in peer.model.named_parameters()},
    )


class Clock(TrainerCallback):
    """Wall and CPU seconds from the beginning of a step to the end of its update, less what is `apart` from it."""

    def __init__(self, cpu: bool, on_step: Callable[[int], None] | None) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self._cpu = cpu
        self._on_step = on_step
        self._began = self._left = (0.0, 0.0)

    def now(self) -> tuple[float, float]:
        """Both clocks, when the device has done all that it was asked for."""
        if not self._cpu:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def apart(self, call: Callable[..., Any], *args: Any) -> Any:
        """A call that is not part of the update: the clocks stand still."""
        before = self.now()
        result = call(*args)
        after = self.now()
        self._began = (self._began[0] + after[0] - before[0], self._began[1] + after[1] - before[1])
        return result

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first micro-batch of a step is next."""
        self._began = self.now()

    def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        """The weights have moved."""
        ended = self.now()
        self.seconds.append(ended[0] - self._began[0])
        self.cpu_seconds.append(ended[1] - self._began[1])
        if self._on_step:
            self._on_step(state.global_step)


def members(stored: dict[str, Sequence[Rollout]], prompts: Sequence[str]) -> list[Rollout]:
    """The rollouts of prompts' names, each of which comes once for every rollout."""
    seen: Counter[str] = Counter()
    found = []
    for name in prompts:
        found.append(stored[name][seen[name]])
        seen[name] += 1
    return found


def recorded_grpo(stored: dict[str, Sequence[Rollout]], clock: Clock, **arguments: Any) -> GRPOTrainer:
    """GRPOTrainer on stored rollouts, by its own `rollout_func`."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        found = members(stored, prompts)
        return {
            "prompt_ids": [list(one.prompt_ids) for one in found],
            "completion_ids": [list(one.completion_ids) for one in found],
            "logprobs": None,
        }

    class Recorded(GRPOTrainer):
        def _generate(self, prompts: list[str]) -> Any:
            return clock.apart(super()._generate, prompts)

        def _calculate_rewards(self, *inputs: Any) -> Any:
            return clock.apart(super()._calculate_rewards, *inputs)

    return Recorded(reward_funcs=reward_of(stored), rollout_func=rollout, **arguments)


def recorded_rloo(stored: dict[str, Sequence[Rollout]], clock: Clock, **arguments: Any) -> RLOOTrainer:
    """RLOOTrainer on stored rollouts. It has no `rollout_func`: tokens come where it tokenizes and where it generates."""

    class Recorded(RLOOTrainer):
        def _generate(self, prompts: list[str]) -> Any:
            self.found = members(stored, prompts)
            return clock.apart(super()._generate, prompts)

        def _tokenize_prompts(self, prompts: list[str]) -> Any:
            return [list(one.prompt_ids) for one in self.found], None, {}

        def _generate_single_turn(self, *inputs: Any) -> Any:
            return [list(one.completion_ids) for one in self.found]

        def _calculate_rewards(self, *inputs: Any) -> Any:
            return clock.apart(super()._calculate_rewards, *inputs)

    return Recorded(reward_funcs=reward_of(stored), **arguments)


def reward_of(stored: dict[str, Sequence[Rollout]]) -> Callable[..., list[float | None]]:
    """The recorded rewards, as TRL asks for them."""

    def recorded(prompts: list[str], **_: Any) -> list[float | None]:
        return [one.reward for one in members(stored, prompts)]

    return recorded
