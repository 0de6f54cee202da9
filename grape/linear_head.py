"""Log-probabilities by a head that is a linear layer, and their gradients, in chunks that are made in place.

Shapes: N tokens, H hidden units, V vocabulary, C tokens of one chunk, R rows of its parts, S rows of the weight.
Between the passes only states, labels and numbers per token are kept, and the gradients that could be made ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # of logits: more rows make faster products
PARTS = 8  # of a chunk, for what is not a product
SLICE = 16384  # rows of the weight's gradient that are in low precision at a time
LOWEST = -1e30  # stands for -inf, which times a probability of 0 is no number
Slopes = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def linear_logprobs(
    states_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_N: Tensor,
    *,
    factor: float = 1.0,
    entropy: bool = False,
    slopes: Slopes | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of labels and, if asked for, entropies of softmax(factor (W h + b)), N each.

    In the dtype of the weight or of autocast, sums and all else in float32 at least. ``slopes`` and ``chunk`` are those
    of `token_logprobs`.
    """
    device = states_NH.device.type
    low = weight_VH.dtype
    if torch.is_autocast_enabled(device) and low != torch.float64:
        low = torch.get_autocast_dtype(device)
    high = torch.promote_types(low, torch.float32)
    rows = chunk or chunk_rows(device, len(weight_VH), high)
    how = _How(factor, low, high, rows, entropy, torch.is_grad_enabled(), slopes)
    logprobs_N, entropy_N = _Tokens.apply(states_NH, weight_VH, bias_V, labels_N, how)  # type: ignore[no-untyped-call]
    return logprobs_N, entropy_N


def chunk_rows(device: str, size: int, dtype: torch.dtype) -> int:
    """How many tokens have logits at a time, of a vocabulary of this size."""
    return max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (size * dtype.itemsize))


class _How(NamedTuple):
    """What is not a tensor. Products with the weight are in ``low``, all else in ``high``, float32 at least."""

    factor: float
    low: torch.dtype
    high: torch.dtype
    rows: int
    entropy: bool
    trained: bool
    slopes: Slopes | None


class _Head:
    """Logits factor x (W h + b) of states, C tokens at a time, all in the same room."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, how: _How, count: int) -> None:
        self.how = how
        self.weight_VH = weight_VH.to(how.low)
        lowest = max(LOWEST, torch.finfo(how.low).min)
        self._bias_V = None if bias_V is None else bias_V.to(how.low).clamp(min=lowest)
        rows = min(how.rows, count)
        self._room_CV = weight_VH.new_empty(rows, len(weight_VH), dtype=how.high)
        self._beside_RV = weight_VH.new_empty(-(-rows // PARTS), len(weight_VH), dtype=how.high)

    def logits(self, states_CH: Tensor) -> Tensor:
        """The logits C x V, which stand until the next are asked for."""
        out_CV, states_CH, factor = self._room_CV[: len(states_CH)], states_CH.to(self.how.low), self.how.factor
        if self.how.low != self.how.high:
            out_CV.copy_(linear(states_CH, self.weight_VH, self._bias_V))
            return out_CV if factor == 1 else out_CV.mul_(factor)
        if self._bias_V is None:
            return out_CV.addmm_(states_CH, self.weight_VH.t(), beta=0, alpha=factor)
        return torch.addmm(self._bias_V, states_CH, self.weight_VH.t(), beta=factor, alpha=factor, out=out_CV)

    def parts(self, values_CV: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """A chunk a few rows at a time, so that they stay in the cache, and as much room beside each part."""
        for at in _slices(len(values_CV), max(1, len(self._beside_RV))):
            yield at, values_CV[at], self._beside_RV[: at.stop - at.start]

    def read(self, logits_CV: Tensor, labels_C: Tensor, *, entropy: bool, keep: bool) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (or zeros); to ``keep`` the softmax, it takes the place of the logits."""
        label_C, total_C, sum_C = (logits_CV.new_zeros(len(labels_C)) for _ in range(3))
        for at, z_RV, beside_RV in self.parts(logits_CV):
            z_RV.sub_(z_RV.amax(-1, keepdim=True))
            label_C[at] = z_RV.gather(1, labels_C[at, None]).squeeze(1)
            p_RV = torch.exp(z_RV, out=beside_RV if entropy else z_RV)
            total_C[at] = p_RV.sum(-1)
            if entropy:
                sum_C[at] = z_RV.mul_(p_RV).sum(-1)
            if keep:
                torch.div(p_RV, total_C[at, None], out=z_RV)
        log_C = total_C.log()
        return label_C - log_C, log_C - sum_C / total_C if entropy else sum_C


class _Chunk(NamedTuple):
    """Tokens with p = softmax(z) of their logits z."""

    at: slice | Tensor
    states_CH: Tensor
    labels_C: Tensor
    p_CV: Tensor
    entropy_C: Tensor

    def some(self, rows_K: Tensor) -> _Chunk:
        """These rows alone."""
        assert isinstance(self.at, slice)
        return _Chunk(self.at.start + rows_K, *(value[rows_K] for value in self[1:]))

    def differentiate(self, head: _Head, slope_C: Tensor, entropy_slope_C: Tensor | None) -> Tensor:
        """Make of p the gradient by z for these slopes, but for a factor C, which is returned.

        d log p_y / dz = [y] - p,    dH / dz = -p (log p + H)
        """
        label = (torch.arange(len(self.labels_C), device=self.labels_C.device), self.labels_C)
        if entropy_slope_C is None:
            self.p_CV[label] -= 1
            return -slope_C
        rest_C = slope_C + entropy_slope_C * self.entropy_C
        for at, p_RV, beside_RV in head.parts(self.p_CV):
            log_RV = torch.log(p_RV, out=beside_RV).clamp_(min=LOWEST)  # 0 x -inf is no number
            p_RV.mul_(log_RV.mul_(entropy_slope_C[at, None]).add_(rest_C[at, None]))
        self.p_CV[label] -= slope_C
        return -torch.ones_like(slope_C)


class _Gradients:
    """The loss's gradients by states, weight and bias, of the tokens that were added; None where it is not needed."""

    def __init__(self, states_NH: Tensor, weight_VH: Tensor, needed: Sequence[bool], dtype: torch.dtype) -> None:
        pairs = zip((states_NH.shape, weight_VH.shape, weight_VH.shape[:1]), needed, strict=True)
        self.by = [states_NH.new_zeros(shape, dtype=dtype) if need else None for shape, need in pairs]

    def add(self, head: _Head, chunk: _Chunk, slope_C: Tensor, entropy_slope_C: Tensor | None) -> None:
        """Add those of tokens by whose log-probabilities and entropies the loss has these slopes."""
        by_states_NH, by_weight_VH, by_bias_V = self.by
        low, high = head.how.low, head.how.high
        scale_C1 = head.how.factor * chunk.differentiate(head, slope_C, entropy_slope_C)[:, None]
        low_CV = chunk.p_CV.to(low)
        if by_states_NH is not None:
            by_states_NH[chunk.at] += torch.mm(low_CV, head.weight_VH).to(high) * scale_C1
        if by_bias_V is not None:
            by_bias_V.addmv_(chunk.p_CV.t(), scale_C1[:, 0])
        if by_weight_VH is None:
            return
        scaled_CH = (chunk.states_CH.to(high) * scale_C1).to(low)
        if low == high:
            by_weight_VH.addmm_(low_CV.t(), scaled_CH)
            return
        for start in range(0, len(by_weight_VH), SLICE):
            part = slice(start, start + SLICE)
            by_weight_VH[part] += torch.mm(low_CV[:, part].t(), scaled_CH)  # in low precision for one chunk only


class _Ahead:
    """Gradients made in the forward pass, for the slopes foretold: 1 for all log-probabilities if nobody foretells."""

    def __init__(self, grads: _Gradients, slopes: Slopes | None, logprobs_N: Tensor) -> None:
        self.grads, self._slopes = grads, slopes
        self._told_N, self._entropy_told_N = torch.zeros_like(logprobs_N), torch.zeros_like(logprobs_N)

    def add(self, head: _Head, chunk: _Chunk, logprobs_N: Tensor, entropy_N: Tensor) -> None:
        """Add a chunk, whose tokens are the last ones known."""
        told_N, entropy_told_N = (
            self._slopes(logprobs_N, entropy_N) if self._slopes else (torch.ones_like(logprobs_N), None)
        )
        slope_C = self._told_N[chunk.at] = told_N[chunk.at].nan_to_num(0, 0, 0)  # what is no number could not be undone
        if entropy_told_N is not None:
            entropy_slope_C = self._entropy_told_N[chunk.at] = entropy_told_N[chunk.at].nan_to_num(0, 0, 0)
            self.grads.add(head, chunk, slope_C, entropy_slope_C)
            return
        rows_K = slope_C.nonzero().squeeze(1)
        if 2 * len(rows_K) <= len(slope_C):  # responses of no advantage
            chunk, slope_C = chunk.some(rows_K), slope_C[rows_K]
        if len(rows_K):
            self.grads.add(head, chunk, slope_C, None)

    def rest(self, slope_N: Tensor, entropy_slope_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The slopes less those foretold: what is to be added to the gradients, 0 where they differ by rounding."""
        told_N, entropy_told_N = self._told_N, self._entropy_told_N
        by_states_NH, *others = self.grads.by
        alone = entropy_slope_N is None and not entropy_told_N.any()
        if alone and by_states_NH is not None and others == [None, None]:  # of a constant weight: any slope will do
            ratio_N = torch.where(told_N == 0, 0.0, slope_N / told_N)
            by_states_NH.mul_(ratio_N[:, None])
            told_N = told_N * ratio_N
        rest_N = _less(slope_N, told_N)
        if alone:
            return rest_N, None
        return rest_N, _less(torch.zeros_like(told_N) if entropy_slope_N is None else entropy_slope_N, entropy_told_N)


def _moved(slope_N: Tensor, entropy_slope_N: Tensor | None) -> Tensor:
    return slope_N != 0 if entropy_slope_N is None else (slope_N != 0) | (entropy_slope_N != 0)


def _less(now_N: Tensor, told_N: Tensor) -> Tensor:
    rest_N = now_N - told_N
    return rest_N.masked_fill(rest_N.abs() <= 8 * torch.finfo(rest_N.dtype).eps * now_N.abs(), 0.0)


class _Tokens(torch.autograd.Function):
    """Log-probabilities and entropies of labels by a plain head: states, weight, bias, labels, how -> N, N or 0."""

    @staticmethod
    def forward(
        ctx: Any, states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor, how: _How
    ) -> tuple[Tensor, Tensor]:
        needed = [how.trained and need for need in ctx.needs_input_grad[:3]]
        logprobs_N, entropy_N = (states_NH.new_zeros(len(labels_N), dtype=how.high) for _ in range(2))
        ahead = None
        with torch.autocast(states_NH.device.type, enabled=False):
            head = _Head(weight_VH, bias_V, how, len(labels_N))
            if any(needed) and (how.slopes or not any(needed[1:])):
                ahead = _Ahead(_Gradients(states_NH, weight_VH, needed, how.high), how.slopes, logprobs_N)
            for at in _slices(len(labels_N), how.rows):
                states_CH, labels_C = states_NH[at], labels_N[at]
                logits_CV = head.logits(states_CH)
                values = head.read(logits_CV, labels_C, entropy=how.entropy, keep=ahead is not None)
                logprobs_N[at], entropy_N[at] = values
                if ahead:
                    ahead.add(head, _Chunk(at, states_CH, labels_C, logits_CV, entropy_N[at]), logprobs_N, entropy_N)
            if bias_V is not None:
                logprobs_N.masked_fill_(bias_V[labels_N] == -torch.inf, -torch.inf)
        ctx.save_for_backward(states_NH, weight_VH, bias_V, labels_N, entropy_N)
        ctx.set_materialize_grads(False)
        ctx.how, ctx.ahead = how, ahead
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_N: Tensor | None, entropy_slope_N: Tensor | None) -> tuple[Tensor | None, ...]:
        states_NH, weight_VH, bias_V, labels_N, entropy_N = ctx.saved_tensors
        ahead, ctx.ahead = ctx.ahead, None  # its tensors become the gradients, once
        slopes = (torch.zeros_like(entropy_N) if slope_N is None else slope_N, entropy_slope_N)
        if entropy_slope_N is not None and not entropy_slope_N.any():
            slopes = (slopes[0], None)
        rest = ahead.rest(*slopes) if ahead else slopes
        if ahead and _moved(*rest).sum() < _moved(*slopes).sum():
            grads, slopes = ahead.grads, rest
        else:  # nothing was foretold, or so wrongly that to begin anew is no more work
            grads = _Gradients(states_NH, weight_VH, ctx.needs_input_grad[:3], ctx.how.high)
        places_K = _moved(*slopes).nonzero().squeeze(1)
        if len(places_K):
            with torch.autocast(states_NH.device.type, enabled=False):
                head = _Head(weight_VH, bias_V, ctx.how, len(places_K))
                for some in _slices(len(places_K), ctx.how.rows):
                    at = some if len(places_K) == len(labels_N) else places_K[some]
                    states_CH, labels_C = states_NH[at], labels_N[at]
                    p_CV = head.logits(states_CH)
                    head.read(p_CV, labels_C, entropy=False, keep=True)
                    chunk = _Chunk(at, states_CH, labels_C, p_CV, entropy_N[at])
                    grads.add(head, chunk, slopes[0][at], None if slopes[1] is None else slopes[1][at])
        inputs = (states_NH, weight_VH, bias_V)
        by = (None if grad is None else grad.to(given.dtype) for grad, given in zip(grads.by, inputs, strict=True))
        return *by, None, None


def _slices(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))
