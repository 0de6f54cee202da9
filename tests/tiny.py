"""A policy small enough for tests: a random model of a real architecture and a tokenizer of single characters."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: two spinning threads on a busy machine stall

import math
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from grape.policy import Policy, load_policy

PAD, END, START = "<|pad|>", "<|end|>", "<|start|>"
CONTROL = [PAD, END, START]
CHARS = sorted(set(string.digits + string.ascii_letters + string.punctuation + " \n"))
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
HEAD = '{"reasoning": "ok", "score": '  # one token of `tiny_judge`
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def tiny_tokenizer(*, template: str | None = TEMPLATE, eos: str | None = END) -> PreTrainedTokenizerFast:
    """One token for each character (others are lost), and three control tokens."""
    vocab = {token: number for number, token in enumerate([*CONTROL, *CHARS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=eos, additional_special_tokens=[START, END]
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(kind: str = "qwen3", *, tied: bool = True, seed: int = 0, **config: Any) -> Any:
    """A random causal LM of 0.1 M parameters: "qwen3", "qwen2", "llama", "gemma2", ... in float32, evaluation mode.

    The weights are drawn wider than usual, so that its predictions differ from token to token.
    """
    shape = {**SHAPE, "vocab_size": len(CONTROL) + len(CHARS), "tie_word_embeddings": tied, **config}
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.1)
    finally:
        torch.set_rng_state(state)
    return model.eval()


def tiny_folder(folder: Path, kind: str = "qwen3", *, tied: bool = True, seed: int = 0, **config: Any) -> Path:
    """The model and the tokenizer, saved."""
    tiny_model(kind, tied=tied, seed=seed, **config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_policy(folder: Path, kind: str = "qwen3", **config: Any) -> Policy:
    """The policy of `tiny_folder`, loaded as a user's would be."""
    return load_policy(str(tiny_folder(folder, kind, **config)))


def tiny_judge(folder: Path, *, share: float = 0.75, **config: Any) -> Path:
    """A judge made by hand: it always replies `{"reasoning": "ok", "score": 1}`, or 0 with probability 1 - ``share``.

    Each token decides the next one, but for a little that the prompt adds by attention, so that its probabilities
    differ from prompt to prompt in the third digit.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([HEAD])
    model = tiny_model(tied=False, vocab_size=len(tokenizer), **{"max_position_embeddings": 1024, **config})
    chain = {"\n": {HEAD: 1.0}, HEAD: {"1": share, "0": 1 - share}, "1": {"}": 1.0}, "0": {"}": 1.0}, "}": {END: 1.0}}
    with torch.no_grad():
        before_VH, after_VH = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        before_VH[:, : len(chain)], after_VH[:, : len(chain)] = 0, 0
        for place, (token, following) in enumerate(chain.items()):
            before_VH[tokenizer.convert_tokens_to_ids(token)] = torch.eye(64)[place] * 8
            for other, probability in following.items():
                after_VH[tokenizer.convert_tokens_to_ids(other), place] = (12 + math.log(probability)) / 8
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_classifier(folder: Path, kind: str = "qwen3", *, seed: int = 0, **config: Any) -> Path:
    """A random reward model and its tokenizer, saved: one logit for a chat."""
    shape = {**SHAPE, "vocab_size": len(CONTROL) + len(CHARS), "num_labels": 1, **config}
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(kind, **shape), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.1, generator=generator)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
