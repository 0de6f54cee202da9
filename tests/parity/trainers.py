"""TRL's SFTTrainer, RewardTrainer, DPOTrainer, KTOTrainer, CPOTrainer and ORPOTrainer on given rows in a given order.

    result = teach("dpo", folder, rows, [[3, 0, 2, 1], [1, 2, 0, 3]], batch=2, beta=0.1, learning_rate=1e-3)

``rows`` are of TRL's own conversational or plain form; the trainer renders, tokenizes, masks and pads them by itself.
The order has, for each epoch, the rows' numbers: a batch is the next ``batch`` of them.
"""

from __future__ import annotations

import atexit
import gc
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPO and ORPO warn
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

gc.freeze()  # accelerate collects garbage before every run, for long where all that was imported is looked at
atexit.register(gc.unfreeze)

TRAINERS: dict[str, tuple[Any, Any]] = {
    "sft": (SFTTrainer, SFTConfig),
    "reward": (RewardTrainer, RewardConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "kto": (KTOTrainer, KTOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """What TRL did, by optimizer step; ``metrics`` is all that it logs, ``weights`` are those after the last step."""

    losses: list[float]
    grad_norms: list[float]
    metrics: list[dict[str, float]] = field(repr=False)
    weights: dict[str, Tensor] = field(repr=False)


class Given(Sampler[int]):
    """The rows' numbers, epoch by epoch."""

    def __init__(self, epochs: Sequence[Sequence[int]]) -> None:
        self._epochs = epochs
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch is next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self._epochs[self._epoch])

    def __len__(self) -> int:
        return len(self._epochs[0])


def teach(
    kind: str,
    folder: str | Path,
    rows: Sequence[dict[str, Any]],
    order: Sequence[Sequence[int]],
    *,
    batch: int,
    micro: int | None = None,
    rates: Callable[[int], float] | None = None,
    on_made: Callable[[Any], None] | None = None,
    **options: Any,
) -> Taught:
    """All epochs over the rows, from the model and the tokenizer in a folder, in float32 on the CPU.

    ``micro`` is TRL's per_device_train_batch_size, and gradient accumulation what makes a batch of it. ``rates`` is the
    share of the learning rate after so many steps, in place of TRL's own schedules. ``on_made`` gets the trainer before
    the first step, ``options`` go to TRL's config.
    """
    micro = micro or batch
    trainer, config = TRAINERS[kind]
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        settings = {
            "output_dir": scratch,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": batch // micro,
            "num_train_epochs": len(order),
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "optim": "adamw_torch",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "seed": 42,
            **options,
        }
        made = trainer(
            model=model_of(kind, folder),
            args=config(**settings),
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        made.remove_callback(PrinterCallback)
        made._get_train_sampler = lambda *_: Given(order)
        if on_made:
            on_made(made)
        if rates:
            made.create_optimizer()
            made.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(made.optimizer, rates)
        made.train()
    return taught(made)


def taught(made: Trainer) -> Taught:
    """What a trainer's log and model have."""
    logs = [entry for entry in made.state.log_history if "grad_norm" in entry]
    return Taught(
        losses=[entry["loss"] for entry in logs],
        grad_norms=[entry["grad_norm"] for entry in logs],
        metrics=logs,
        weights={name: weight.detach().clone() for name, weight in made.model.named_parameters()},
    )


def model_of(kind: str, folder: str | Path) -> Any:
    """The model in a folder; of a reward model with its one logit."""
    if kind == "reward":
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
