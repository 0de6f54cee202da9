"""The policy: a causal language model with its tokenizer, its states and its logits.

Padding is free of meaning here: rows may be padded left or right, positions follow the attention mask, and what stands
under the padding changes no number.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as told

from grape.adapters import adapter_base, add_lora, read_adapters
from grape.config import Lora
from grape.errors import ConfigError, one_line

Dtype = Literal["float32", "bfloat16", "float16"]
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]  # no pickles: they run code
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A causal LM (or its PEFT wrapper) and its tokenizer; both are of transformers, which is typed loosely.

    ``stop_ids`` end a response: the tokenizer's EOS and those of the model's generation config, of which nothing else
    is used. ``pad_id`` only fills space. ``takes_masks`` says that a step of sampling may give the model the mask of
    its attention, R x 1 x 1 x T, in place of what it would make that of, token by token.
    """

    model: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    pad_id: int
    takes_masks: bool = False


def folder_of(model: str, *, where: str, local_only: bool = False) -> Path:
    """The folder of a model: a path, or a name on the Hugging Face hub, fetched once into its cache.

    Of a folder of checkpoints (`checkpoint.dir` of a run) it is the last one.
    """
    if not model:
        raise ConfigError(f"{where}: names no model")
    path = Path(model).expanduser()
    if path.is_dir():
        saved = sorted(path.glob("step-*")) if (path / "run.json").is_file() else []
        return saved[-1] if saved else path
    if path.exists():
        raise ConfigError(f"{where}: {model}: not a folder")
    if not HUB_NAME.fullmatch(model) or model.startswith("."):
        raise ConfigError(f"{where}: {model}: no such folder")
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, local_files_only=local_only))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"{where}: {model}: no such folder, and no such model on the hub or in its cache ({one_line(error, 120)})"
        ) from error


def load_policy(
    model: str,
    *,
    dtype: Dtype = "float32",
    lora: Lora | None = None,
    device: str = "cpu",
    seed: int = 0,
    local_only: bool = False,
    where: str = "policy.model",
) -> Policy:
    """The policy of a folder or hub name: safetensors only, and no code of the model's author is run.

    A folder saved with adapters gives them back, trainable; ``lora`` puts fresh ones on, drawn from ``seed``. Whatever
    cannot be used as it stands raises a `ConfigError`: weights that are missing (never replaced by random ones),
    a tokenizer without EOS or larger than the model, an architecture whose log-probabilities would come out wrong.
    """
    folder = folder_of(model, where=where, local_only=local_only)
    adapters = folder if (folder / "adapter_config.json").is_file() else None
    if adapters and lora:
        raise ConfigError(f"{where}: {model}: has adapters already; leave out lora")
    base = folder_of(adapter_base(folder, where), where=where, local_only=local_only) if adapters else folder
    loaded = read_model(base, dtype, where)
    tokenizer = read_tokenizer(folder, where)
    config = loaded.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(config if isinstance(config, list) else [config])} - {None}
    rows = loaded.get_input_embeddings().weight.shape[0]
    if (size := max(max(tokenizer.get_vocab().values()), *stop_ids) + 1) > rows:
        raise ConfigError(f"{where}: {model}: the tokenizer has {size} tokens, the model {rows}")
    takes_masks = check_architecture(loaded, f"{where}: {model}")
    if adapters:
        loaded = read_adapters(loaded, adapters, where)
    elif lora:
        loaded = add_lora(loaded, lora, seed)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Policy(
        model=loaded.eval().to(device), tokenizer=tokenizer, stop_ids=tuple(sorted(stop_ids)), pad_id=pad_id,
        takes_masks=takes_masks,
    )  # fmt: skip


def read_model(folder: Path, dtype: Dtype, where: str) -> Any:
    """The causal LM of a folder, in evaluation mode."""
    read: Any = AutoModelForCausalLM.from_pretrained  # its types do not know of the loading info
    bars = told.is_progress_bar_enabled()
    told.disable_progress_bar()  # type: ignore[no-untyped-call]  # noise beside the command's own
    try:
        model, info = read(
            str(folder),
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ConfigError(f"{where}: {folder}: no causal language model: {one_line(error)}") from error
    finally:
        if bars:
            told.enable_progress_bar()  # type: ignore[no-untyped-call]
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(f"{where}: {folder}: weights are missing: {one_line(', '.join(missing), 120)}")
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # models are published with such files, and transformers would refuse to save them
        old = model.generation_config
        model.generation_config = type(old)(eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id)
    return model


def read_tokenizer(folder: Path, where: str) -> Any:
    """The tokenizer of a folder; one without tokens or without an end is refused."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: {folder}: no tokenizer: {one_line(error)}") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()):  # what transformers makes of a missing file
        raise ConfigError(f"{where}: {folder}: no tokenizer: its vocabulary is empty")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{where}: {folder}: the tokenizer has no EOS token, so no response could end")
    return tokenizer


def save_policy(policy: Policy, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write safetensors and the tokenizer, such that `load_policy` reads them back; with LoRA the adapters only.

    ``weights`` by name stand for the model's own, where those are not all in this process.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
    policy.model.save_pretrained(str(folder), **({} if weights is None else {"state_dict": weights}))
    policy.tokenizer.save_pretrained(str(folder))


def hidden_states(model: Any, ids_BT: Tensor, attended_BT: Tensor, **kwargs: Any) -> Any:
    """The last hidden states (``.last_hidden_state``, B x T x H) of rows padded on any side: no logits are made.

    ``attended_BT`` is True on tokens, False on padding; with a cache it also covers what the cache holds, and the
    positions are those of its last T columns.
    """
    positions_BT = (attended_BT.long().cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
    return causal_lm(model).base_model(
        input_ids=ids_BT, attention_mask=attended_BT.long(), position_ids=positions_BT, **kwargs
    )


def step(model: Any, ids_R: Tensor, mask: Tensor | None, positions_R1: Tensor, cache: Any) -> Tensor:
    """The last hidden states R x H of one more token for each row.

    ``mask`` is R x T as in `hidden_states`, the new tokens included, or what a model `takes_masks` of; None where there
    is no padding.
    """
    out = causal_lm(model).base_model(
        input_ids=ids_R[:, None], attention_mask=mask, position_ids=positions_R1, past_key_values=cache, use_cache=True
    )
    states_RH: Tensor = out.last_hidden_state[:, -1]
    return states_RH


def causal_lm(model: Any) -> Any:
    """The model of transformers inside a PEFT wrapper; the adapters stay in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logits(model: Any, hidden_NH: Tensor, head: Any = None) -> Tensor:
    """The logits N x V of hidden states, in float32 at least, scaled and capped as the model's config says.

    ``head`` stands for the model's own output embeddings.
    """
    model = causal_lm(model)
    logits_NV: Tensor = (head or model.get_output_embeddings())(hidden_NH)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    factor, cap = logit_scaling(model)
    if factor != 1:
        logits_NV = logits_NV * factor
    return cap * torch.tanh(logits_NV / cap) if cap else logits_NV


def logit_scaling(model: Any) -> tuple[float, float | None]:
    """What the logits of a model's head are multiplied by, and what they are then capped at, as its config says."""
    config = causal_lm(model).config.get_text_config()
    granite, cohere = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    return (cohere or 1.0) / (granite or 1.0), getattr(config, "final_logit_softcapping", None)  # the cap: Gemma


@torch.no_grad()
def check_architecture(model: Any, where: str) -> bool:
    """Refuse a model that padding, the cache or `logits` would make wrong, by four tokens done in two ways.

    Whether it `takes_masks`, by the last token done in a third.
    """
    ids_BT = torch.arange(4, device=model.device).remainder(model.get_input_embeddings().weight.shape[0])[None]
    padded_BT, attended_BT = ids_BT[:, [0, 0, 0, 1, 2]], torch.tensor([[0, 0, 1, 1, 1]], device=model.device)
    try:
        theirs_V = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits[0, -1].float()
        cache = hidden_states(model, padded_BT, attended_BT, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0, 0], device=model.device))
        next_BT = torch.cat([attended_BT, torch.ones_like(attended_BT[:, :1])], dim=1).repeat(2, 1)
        again = copy.deepcopy(cache)
        last = hidden_states(model, ids_BT[:, 3:].repeat(2, 1), next_BT, past_key_values=cache, use_cache=True)
        ours_V = logits(model, last.last_hidden_state[1, -1:])[0]
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"{where}: {type(model).__name__} is not supported: {one_line(error)}") from error
    if ours_V.shape != theirs_V.shape or (ours_V - theirs_V).norm() > 0.1 * theirs_V.std() * len(theirs_V) ** 0.5:
        raise ConfigError(f"{where}: {type(model).__name__} is not supported: its logits depend on padding or scaling")
    whole = model.config._attn_implementation == "sdpa" and all(type(layer) is DynamicLayer for layer in again.layers)
    if not whole:  # one mask is not for all layers, or no mask like this is for any
        return False
    mask_B11T, position_B1 = next_BT.bool()[:, None, None], next_BT.sum(1, keepdim=True) - 1
    try:
        masked = step(model, ids_BT[0, 3:].repeat(2), mask_B11T, position_B1, again)
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return False
    return torch.equal(masked, last.last_hidden_state[:, -1])
