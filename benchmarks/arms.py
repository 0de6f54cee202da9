"""What the benchmarks of training share: models, recorded rollouts, arms, their figures, tables.

An arm is a trainer with its settings. All arms of a comparison train the same weights on the same recorded responses.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal

ALL = 2**40  # tokens: a micro-batch of whatever there is
PAD, END = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Qwen3 with its embeddings tied. ``ends`` tokens end a response: one of random weights is V / ends tokens long.

    Any token is about as likely as any other where the weights are random.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    ends: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A prompt, the responses to it, and their rewards."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    rewards: tuple[float, ...]

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response, over all responses."""
        return sum(len(self.prompt) + len(response) for response in self.responses)


Steps = Sequence[Sequence[Group]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of a prompt, and of responses: log-normal of this mean and sigma, cut at ``longest``."""

    prompt: int
    mean: float
    sigma: float
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A trainer and its settings: DAPO's loss, AdamW, the same in each.

    TRL takes micro-batches of ``rows``, ours of ``micro_tokens``. ``dtype`` is that of the arithmetic, ``weights`` that
    of TRL's parameters (ours are float32). ``sampled``: responses are sampled, the rewards alone are recorded.
    ``compact``: TRL makes logits at responses alone, as it does with Triton, where it would make them everywhere.
    ``entropy`` and ``share`` (the prompt of a group once) can be switched off in ours, to see what they do.
    """

    trainer: Literal["grape", "trl"]
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool = False
    rows: int = 8
    micro_tokens: int = ALL
    liger: bool = False
    compact: bool = False
    sampled: bool = False
    longest: int = 512
    entropy: bool = True
    share: bool = True
    max_grad_norm: float = 1.0
    gradient: str | None = None  # ours: the file for the gradient of the first step


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What an arm did, by step. ``peak`` and ``loaded`` are bytes, of the process or its GPU: see `Memory`.

    ``computed`` are the places that the model was computed at for each token: padding adds some, a shared prompt saves
    some.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    peak: int = 0
    loaded: int = 0

    def after(self, warmup: int) -> Figures:
        """Without the first steps; the losses and norms of all stay."""
        names = ("seconds", "cpu_seconds", "tokens", "computed")
        return replace(self, **{name: getattr(self, name)[warmup:] for name in names})

    def rates(self, of: Literal["seconds", "cpu_seconds"]) -> list[float]:
        """Tokens per second of each step."""
        return [tokens / spent for tokens, spent in zip(self.tokens, getattr(self, of), strict=True)]


def record(shape: Shape, lengths: Lengths, *, steps: int, groups: int, size: int, seed: int) -> list[list[Group]]:
    """Random groups of ``size`` responses, of log-normal lengths, each with a random reward."""
    rng = random.Random(seed)
    words = range(shape.ends + 1, shape.vocab)

    def response() -> tuple[int, ...]:
        drawn = lengths.mean * rng.lognormvariate(-(lengths.sigma**2) / 2, lengths.sigma)
        return (*rng.choices(words, k=min(lengths.longest, max(1, round(drawn))) - 1), END)

    return [
        [
            Group(
                prompt=tuple(rng.choices(words, k=lengths.prompt)),
                responses=tuple(response() for _ in range(size)),
                rewards=tuple(rng.random() for _ in range(size)),
            )
            for _ in range(groups)
        ]
        for _ in range(steps)
    ]


def make_model(folder: str, shape: Shape, device: str = "cpu", dtype: str = "float32") -> None:
    """Random weights of the shape and a tokenizer of as many words, in a folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

    config = Qwen3Config(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
        bos_token_id=None,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = list(range(END, END + shape.ends))
    model.save_pretrained(folder)
    core = Tokenizer(models.WordLevel({f"w{number}": number for number in range(shape.vocab)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", eos_token="w1").save_pretrained(folder)


def agreed(figures: Mapping[str, Figures], *, loss: float, norm: float) -> None:
    """Exit with 1 where an arm's losses or gradient norms differ from the first arm's by more than these shares.

    A loss below 0.1 may differ by that share of 0.1.
    """
    (first, wanted), *others = figures.items()
    for name, got in others:
        for what, limit, least in (("losses", loss, 0.1), ("grad_norms", norm, 0.0)):
            for step, (a, b) in enumerate(zip(getattr(wanted, what), getattr(got, what), strict=True), 1):
                if not abs(a - b) <= limit * max(abs(a), least):  # so that NaN differs, too
                    sys.exit(f"step {step}: the {what} of {first} and {name} differ: {a!r} and {b!r}")


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """The median, with the least and the greatest."""
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def ratios(these: Sequence[float], those: Sequence[float]) -> list[float]:
    """Step by step."""
    return [one / other for one, other in zip(these, those, strict=True)]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under one another, the first cells to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
