"""Log-probabilities of tokens from the last hidden states, without ever making all logits.

Shapes: N tokens, H hidden units, V vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from grape.kl import full_kl
from grape.linear_head import Slopes, chunk_rows, linear_logprobs
from grape.policy import causal_lm, logit_scaling, logits

CHUNK = 256  # tokens at most by any other head, whose chunks make several tensors of their size


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    """Another model at the same N tokens, a constant: its states, and what makes logits of them.

    The exact KL is KL(policy || other), or KL(other || policy) with ``first``.
    """

    states_NH: Tensor
    logits: Callable[[Tensor], Tensor]
    first: bool = False


def token_logprobs(
    head: Callable[[Tensor], Tensor],
    states_NH: Tensor,
    labels_N: Tensor,
    *,
    entropy: bool = False,
    other: Other | None = None,
    slopes: Slopes | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens' log-probabilities, the entropies and the exact KLs to ``other``: N each, or empty if not asked for.

    ``head`` makes logits of states. Only ``chunk`` tokens have logits at a time, in the backward pass too, where they
    are computed anew: the largest tensor is chunk x V, never N x V.

    ``slopes`` spares a quarter of the work. It foretells the gradient of the loss by the log-probabilities and by the
    entropies (None: by these there is none) from both, which are 0 for tokens that come later: N, of which those of
    the last tokens known are used. Tokens for which it is wrong are computed anew, at a loss; no result depends on it.
    """
    plain = None if other is not None else plain_head(head)
    if plain is None:
        return _by_checkpoints(head, states_NH, labels_N, entropy, other, chunk)
    weight_VH, bias_V, factor = plain
    logprobs_N, entropy_N = linear_logprobs(
        states_NH, weight_VH, bias_V, labels_N, factor=factor, entropy=entropy, slopes=slopes, chunk=chunk
    )
    nothing = logprobs_N.new_zeros(0)
    return logprobs_N, entropy_N if entropy else nothing, nothing


def plain_head(head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None, float] | None:
    """Weight, bias and factor of a head that is a linear layer and nothing more, else None."""
    if not isinstance(head, partial) or head.func is not logits:
        return None
    model = causal_lm(head.args[0])
    module = head.keywords.get("head") or model.get_output_embeddings()
    factor, cap = logit_scaling(model)
    own = getattr(module.forward, "__func__", None) is torch.nn.Linear.forward  # subclasses may do more
    if cap or not own or module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module.weight) is not torch.nn.Parameter:  # a DTensor, or made of others
        return None
    return module.weight, module.bias, factor


def _by_checkpoints(
    head: Callable[[Tensor], Tensor],
    states_NH: Tensor,
    labels_N: Tensor,
    entropy: bool,
    other: Other | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_logprobs` with any head, by autograd."""

    def piece(states_CH: Tensor, labels_C: Tensor, other_CH: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        logits_CV = head(states_CH)
        norm_C = logits_CV.logsumexp(-1)
        logprobs_C = logits_CV.gather(-1, labels_C[:, None]).squeeze(-1) - norm_C
        entropy_C = kl_C = logprobs_C.new_zeros(0)
        if entropy:
            finite_CV = logits_CV.clamp(min=torch.finfo(logits_CV.dtype).min)  # 0 x -inf is no number
            entropy_C = norm_C - ((logits_CV - norm_C[:, None]).exp() * finite_CV).sum(-1)
        if other is not None and other_CH is not None:
            with torch.no_grad():
                other_CV = other.logits(other_CH).log_softmax(-1)
            pair = (logits_CV - norm_C[:, None], other_CV)
            kl_C = full_kl(*reversed(pair)) if other.first else full_kl(*pair)
        return logprobs_C, entropy_C, kl_C

    if chunk is None:
        with torch.no_grad():
            empty_0V = head(states_NH[:0])
        chunk = min(CHUNK, chunk_rows(states_NH.device.type, empty_0V.shape[1], empty_0V.dtype))
    pieces = []
    for start in range(0, max(1, len(labels_N)), chunk):  # one empty piece where nothing counts
        at = slice(start, start + chunk)
        other_CH = None if other is None else other.states_NH[at]
        pieces.append(checkpoint(piece, states_NH[at], labels_N[at], other_CH, use_reentrant=False))
    logprobs_N, entropy_N, kl_N = (torch.cat(values) for values in zip(*pieces, strict=True))
    return logprobs_N, entropy_N, kl_N
