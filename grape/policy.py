"""The policy: a causal language model with its tokenizer, and the log-probabilities of its responses.

Padding is free of meaning here: rows may be padded left or right, positions follow the attention mask, and what stands
under the padding changes no number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    is used. ``pad_id`` only fills space.
    """

    model: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    pad_id: int


def folder_of(model: str, *, where: str, local_only: bool = False) -> Path:
    """The folder of a model: a path, or a name on the Hugging Face hub, fetched once into its cache."""
    if not model:
        raise ConfigError(f"{where}: names no model")
    path = Path(model).expanduser()
    if path.is_dir():
        return path
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
    check_architecture(loaded, f"{where}: {model}")
    if adapters:
        loaded = read_adapters(loaded, adapters, where)
    elif lora:
        loaded = add_lora(loaded, lora, seed)
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Policy(model=loaded.to(device), tokenizer=tokenizer, stop_ids=tuple(sorted(stop_ids)), pad_id=pad_id)


def read_model(folder: Path, dtype: Dtype, where: str) -> Any:
    """The causal LM of a folder, in evaluation mode."""
    read: Any = AutoModelForCausalLM.from_pretrained  # its types do not know of the loading info
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


def save_policy(policy: Policy, folder: str | Path) -> None:
    """Write safetensors and the tokenizer, such that `load_policy` reads them back; with LoRA the adapters only."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
    policy.model.save_pretrained(str(folder))
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


def causal_lm(model: Any) -> Any:
    """The model of transformers inside a PEFT wrapper; the adapters stay in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def logits(model: Any, hidden_NH: Tensor) -> Tensor:
    """The logits N x V of hidden states, in float32 at least, scaled and capped as the model's config says."""
    model = causal_lm(model)
    logits_NV: Tensor = model.get_output_embeddings()(hidden_NH)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    config = model.config.get_text_config()
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits_NV = logits_NV / divisor
    if factor := getattr(config, "logit_scale", None):  # Cohere
        logits_NV = logits_NV * factor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits_NV = cap * torch.tanh(logits_NV / cap)
    return logits_NV


@torch.no_grad()
def check_architecture(model: Any, where: str) -> None:
    """Refuse a model that padding, the cache or `logits` would make wrong, by four tokens done in two ways."""
    ids_BT = torch.arange(4, device=model.device).remainder(model.get_input_embeddings().weight.shape[0])[None]
    padded_BT, attended_BT = ids_BT[:, [0, 0, 0, 1, 2]], torch.tensor([[0, 0, 1, 1, 1]], device=model.device)
    try:
        theirs_V = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits[0, -1].float()
        cache = hidden_states(model, padded_BT, attended_BT, use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([0, 0], device=model.device))
        next_BT = torch.cat([attended_BT, torch.ones_like(attended_BT[:, :1])], dim=1).repeat(2, 1)
        last = hidden_states(model, ids_BT[:, 3:].repeat(2, 1), next_BT, past_key_values=cache, use_cache=True)
        ours_V = logits(model, last.last_hidden_state[1, -1:])[0]
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"{where}: {type(model).__name__} is not supported: {one_line(error)}") from error
    if ours_V.shape != theirs_V.shape or (ours_V - theirs_V).norm() > 0.1 * theirs_V.std() * len(theirs_V) ** 0.5:
        raise ConfigError(f"{where}: {type(model).__name__} is not supported: its logits depend on padding or scaling")


def response_logprobs(
    model: Any, ids_BT: Tensor, attended_BT: Tensor, mask_BT: Tensor, *, entropy: bool = False, chunk: int = 256
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (natural, temperature 1) of the tokens under ``mask_BT``, and the entropies before them.

    Both are B x T, aligned with ``ids_BT``: entry t is log p(ids[t] | ids[:t]), and 0 where ``mask_BT`` is False. The
    mask is of response tokens, EOS included; ``attended_BT`` is False on padding only. The mask may not count a row's
    first token: nothing comes before it. Only ``chunk`` tokens have logits at a time, in the backward pass too, where
    they are computed anew: the largest tensor is chunk x V, never B x T x V.
    """
    mask_BT, attended_BT = mask_BT.bool(), attended_BT.bool()
    if bool((mask_BT & ~(attended_BT & (attended_BT.long().cumsum(1) > 1))).any()):
        raise ValueError("mask_BT counts padding or the first token of a row")
    states_BTH = hidden_states(model, ids_BT, attended_BT, use_cache=False).last_hidden_state
    states_NH = states_BTH[:, :-1][mask_BT[:, 1:]]
    labels_N = ids_BT[mask_BT]

    def piece(states_CH: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = logits(model, states_CH)
        norm_C = logits_CV.logsumexp(-1)
        logprobs_C = logits_CV.gather(-1, labels_C[:, None]).squeeze(-1) - norm_C
        if not entropy:
            return logprobs_C, logprobs_C.new_zeros(0)
        finite_CV = logits_CV.clamp(min=torch.finfo(logits_CV.dtype).min)  # 0 x -inf is no number
        return logprobs_C, norm_C - ((logits_CV - norm_C[:, None]).exp() * finite_CV).sum(-1)

    pieces = [
        checkpoint(piece, states_NH[start : start + chunk], labels_N[start : start + chunk], use_reentrant=False)
        for start in range(0, max(1, len(labels_N)), chunk)  # one empty piece where nothing counts
    ]

    def scattered(number: int) -> Tensor:
        values_N = torch.cat([piece[number] for piece in pieces])
        return values_N.new_zeros(ids_BT.shape).masked_scatter(mask_BT, values_N)

    return scattered(0), scattered(1) if entropy else None


def pad(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, device: Any = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """ids_BT, attended_BT and mask_BT of `response_logprobs`: prompt, response, then padding on the right."""
    width = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    ids_BT = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    attended_BT, mask_BT = torch.zeros(2, *ids_BT.shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        ids_BT[row, :end] = torch.tensor([*prompt, *response])
        attended_BT[row, :end] = True
        mask_BT[row, len(prompt) : end] = True
    return ids_BT.to(device), attended_BT.to(device), mask_BT.to(device)


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows cut into batches of at most ``budget`` tokens with their padding, the longest first.

    Every row is in one batch, a row longer than the budget alone. The same lengths give the same batches.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1, not {budget}")
    batches: list[list[int]] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if not batches or width * (len(batches[-1]) + 1) > budget:
            batches.append([])
            width = lengths[row]
        batches[-1].append(row)
    return batches
