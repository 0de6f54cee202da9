"""Attention over packed tokens: rows behind one another without padding, a prompt that several responses share once.

`packed_attention` is what transformers calls in place of its own, between `switched`. On a CPU the parts that a token
attends to (its own text, the shared prompt) are computed apart and joined by their normalisers, forward and backward,
as blockwise attention is (Liu et al. 2023, Ring Attention); on CUDA it is one call of a kernel for rows of any length.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

NAME = "grape"
KNOWN = ("sliding_window", "dropout", "position_ids", "use_cache")  # arguments that are heeded, or change nothing here

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class Blocks:
    """What attends to what among T packed tokens.

    ``own`` are spans (start, end), one behind the other over all T: each token sees those of its span up to itself.
    ``shared`` are (start, end, first, last): those from start to end, whole spans, also see all from first to last.
    """

    own: tuple[tuple[int, int], ...]
    shared: tuple[tuple[int, int, int, int], ...]
    device: Any = "cpu"

    @cached_property
    def longest(self) -> int:
        """The greatest number of tokens that one sees."""
        return max(sum(last - first for first, last in spans) for spans in self._seen())

    def _seen(self) -> Iterator[list[tuple[int, int]]]:
        """For each span of ``own`` the spans that its last token sees."""
        for start, end in self.own:
            yield [(first, last) for a, b, first, last in self.shared if a <= start < b] + [(start, end)]

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
        """The same as rows of a varlen kernel: where queries and keys begin, which keys (None: all), greatest lengths.

        A row's keys are those that it shares, then its own, so that the causal mask is aligned at the end of both.
        """
        queries, keys, index = [0], [0], list[int]()
        for (_, end), spans in zip(self.own, self._seen(), strict=True):
            index += [place for first, last in spans for place in range(first, last)]
            queries.append(end)
            keys.append(len(index))
        begins = [torch.tensor(places, dtype=torch.int32, device=self.device) for places in (queries, keys)]
        longest = [max(b - a for a, b in pairwise(places)) for places in (queries, keys)]
        index_K = torch.tensor(index, device=self.device) if self.shared else None
        return begins[0], begins[1], index_K, longest[0], longest[1]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Blocks,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The outputs 1 x T x heads x D of queries (1 x heads x T x D) as ``packed`` says; keys may have fewer heads.

    Raises NotImplementedError for what other attentions can do and this one cannot: a window shorter than a row, too,
    and a mask, which only a model that chooses keys by rules of its own still makes.
    """
    if attention_mask is not None:
        raise NotImplementedError("packed attention has no mask")
    if asked := [name for name, value in options.items() if not (name in KNOWN or value is None or value is False)]:
        raise NotImplementedError(f"packed attention has no {', '.join(asked)}")
    if (options.get("sliding_window") or packed.longest) < packed.longest:
        raise NotImplementedError(f"packed attention has no window: of {packed.longest} tokens all are seen")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (states.to(dtype) for states in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if device == "cpu":
        out: Tensor = Joined.apply(query, key, value, packed, scale)  # type: ignore[no-untyped-call]
        return out.transpose(1, 2), None
    return varlen(query, key, value, packed, scale)[None], None


def varlen(
    query: Tensor, key: Tensor, value: Tensor, packed: Blocks, scale: float, kernel: Any = varlen_attn
) -> Tensor:
    """The outputs T x heads x D, by one call of a kernel for rows of any length."""
    begin_q, begin_k, index_K, longest_q, longest_k = packed.rows
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    if index_K is not None:
        key, value = key[index_K], value[index_K]
    out: Tensor = kernel(
        query.contiguous(), key.contiguous(), value.contiguous(), begin_q, begin_k, longest_q, longest_k,
        scale=scale, window_size=(-1, 0), enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    return out


class Joined(torch.autograd.Function):
    """Parts of one softmax: out = sum_p out_p exp(lse_p - lse), lse = log sum_p exp lse_p.

    With the joint out and lse the gradient of each part is that of the whole with respect to its keys.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packed: Blocks, scale: float) -> Tensor:
        """1 x heads x T x D."""
        exact = torch.promote_types(query.dtype, torch.float32)
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=exact)
        for start, end in packed.own:
            at = (..., slice(start, end), slice(None))
            out[at], lse[..., start:end] = flash(query[at], key[at], value[at], 0.0, True, scale=scale)
        for start, end, first, last in packed.shared:
            at, seen = (..., slice(start, end), slice(None)), (..., slice(first, last), slice(None))
            more, more_lse = flash(query[at], key[seen], value[seen], 0.0, False, scale=scale)
            own_lse = lse[..., start:end]
            joint = torch.logaddexp(own_lse, more_lse)
            out[at] = out[at] * (own_lse - joint).exp()[..., None] + more * (more_lse - joint).exp()[..., None]
            lse[..., start:end] = joint
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.packed, ctx.scale = packed, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of queries, keys and values."""
        query, key, value, out, lse = ctx.saved_tensors
        grads = [torch.empty_like(states) for states in (query, key, value)]
        for start, end in ctx.packed.own:
            at = (..., slice(start, end), slice(None))
            of = (grad[at], query[at], key[at], value[at], out[at], lse[..., start:end])
            for whole, part in zip(grads, flash_backward(*of, 0.0, True, scale=ctx.scale), strict=True):
                whole[at] = part
        for start, end, first, last in ctx.packed.shared:
            at, seen = (..., slice(start, end), slice(None)), (..., slice(first, last), slice(None))
            of = (grad[at], query[at], key[seen], value[seen], out[at], lse[..., start:end])
            parts = flash_backward(*of, 0.0, False, scale=ctx.scale)
            for whole, part, place in zip(grads, parts, (at, seen, seen), strict=True):
                whole[place] += part
        return *grads, None, None


AttentionInterface.register(NAME, packed_attention)  # no mask of that name: transformers then makes none


@contextmanager
def switched(model: Any) -> Iterator[None]:
    """The model attends by `packed_attention` here; its passes need the argument ``packed``."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
