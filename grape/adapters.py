"""Low-rank adapters (LoRA) on a policy: fresh ones, and those of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError

from grape.config import Lora
from grape.errors import ConfigError, one_line


def adapter_base(folder: Path, where: str) -> str:
    """The model that a folder of adapters belongs to."""
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{where}: {folder}: adapter_config.json: {one_line(error)}") from error
    if not isinstance(config, LoraConfig) or not config.base_model_name_or_path:
        raise ConfigError(f"{where}: {folder}: adapter_config.json: not LoRA adapters of a named model")
    return str(config.base_model_name_or_path)


def read_adapters(model: Any, folder: Path, where: str) -> Any:
    """The model with the adapters of a folder on it, trainable."""
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{where}: {folder}: the adapters do not fit: {one_line(error)}") from error


def add_lora(model: Any, lora: Lora, seed: int) -> Any:
    """Fresh low-rank adapters; they start as the identity. ``alpha`` is 2 r unless given, ``targets`` all linears."""
    config = LoraConfig(
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]  # it is a factor
        lora_dropout=lora.dropout,
        target_modules=lora.targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"policy.lora.targets: {one_line(error)}") from error
    finally:
        torch.set_rng_state(state)
