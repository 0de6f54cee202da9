"""A reward model in training: a policy's body under one logit, as `reward_model:` items read it, or, where steps are
labelled, under three."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification

from grape.errors import ConfigError, one_line
from grape.policy import Policy, folder_of, read_tokenizer

WHERE = "policy.model"
STEPS = ("wrong", "neutral", "right")  # the logits of a process reward model, in the order of `preference.step_loss`


def load_classifier(model: str, *, device: str, seed: int, steps: bool = False, where: str = WHERE) -> Policy:
    """The sequence classifier of a folder or hub name, with one logit (or, for ``steps``, three), in float32.

    A causal language model gets a head, drawn from ``seed`` with a variance of 1 / (hidden units + 1) (Stiennon et al.
    2020); a classifier keeps its own.
    """
    folder = folder_of(model, where=where)
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{where}: {model}: has adapters; merge them into its weights")
    loaded, fresh = _read(folder, where, steps)
    tokenizer = read_tokenizer(folder, where)
    size, rows = max(tokenizer.get_vocab().values()) + 1, loaded.get_input_embeddings().weight.shape[0]
    if size > rows:
        raise ConfigError(f"{where}: {model}: the tokenizer has {size} tokens, the model {rows}")
    own_pad = tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    # It finds the end of a row by its padding: were that the end token itself, an item would read one token too early.
    loaded.config.pad_token_id = tokenizer.pad_token_id if own_pad else None
    pad_id = tokenizer.pad_token_id if own_pad else tokenizer.eos_token_id
    if fresh:
        weight = loaded.score.weight
        generator = torch.Generator().manual_seed(random.Random(f"{seed}/head").getrandbits(63))
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1))
    return Policy(
        model=loaded.eval().to(device), tokenizer=tokenizer, stop_ids=(tokenizer.eos_token_id,), pad_id=pad_id
    )


def _read(folder: Path, where: str, steps: bool) -> tuple[Any, bool]:
    """The model, and whether its head is not in the folder."""
    read: Any = AutoModelForSequenceClassification.from_pretrained
    labels = {"id2label": dict(enumerate(STEPS)), "label2id": {name: at for at, name in enumerate(STEPS)}}
    state = torch.get_rng_state()  # transformers draws a head of its own
    try:
        model, info = read(
            str(folder), dtype=torch.float32, trust_remote_code=False, use_safetensors=True, local_files_only=True,
            output_loading_info=True, **(labels if steps else {"num_labels": 1}),
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        if "ignore_mismatched_sizes" in str(error):
            number = f"{len(STEPS)} labels (loss.kind process)" if steps else "one label"
            raise ConfigError(f"{where}: {folder}: a classifier, but not one of {number}") from error
        raise ConfigError(f"{where}: {folder}: no model that can be a reward model: {one_line(error)}") from error
    finally:
        torch.set_rng_state(state)
    missing = set(info["missing_keys"])
    head = {f"score.{name}" for name, _ in model.score.named_parameters()} if hasattr(model, "score") else set()
    if rest := sorted(missing - head):
        raise ConfigError(f"{where}: {folder}: weights are missing: {one_line(', '.join(rest), 120)}")
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ConfigError(f"{where}: {folder}: {type(model).__name__} has no linear head called score")
    return model, bool(missing)
