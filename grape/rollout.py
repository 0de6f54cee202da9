"""Groups of responses sampled from the policy, with the log-probability of each token as it was drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from grape.cache import Rows
from grape.errors import ConfigError, GrapeError
from grape.policy import Policy, causal_lm, logits

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn from its distribution; the defaults draw from the policy itself, as training must.

    The log-probability of a token is that of the untruncated policy at temperature 1. Any other setting draws from
    another distribution, so that importance ratios are wrong (with top_p by the mass that was cut off): it is refused
    unless ``training`` is False, for evaluation. Temperature 0 takes the likeliest token. 0 is off for ``top_k``, as 1
    is for ``top_p``, as 0 is for ``min_p``.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    training: bool = True

    def __post_init__(self) -> None:
        for name, value, ok, allowed in (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "finite and at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
        ):
            if not ok:
                raise ConfigError(f"sampling.{name}: must be {allowed} (got {value})")
        for name, value, needed in (
            ("temperature", self.temperature, 1.0),
            ("top_p", self.top_p, 1.0),
            ("top_k", self.top_k, 0),
            ("min_p", self.min_p, 0.0),
        ):
            if self.training and value != needed:
                raise ConfigError(
                    f"sampling.{name}: training needs {needed}, samples of the policy itself (got {value})"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled response: ``group`` is the place of its prompt, ``member`` its own place in the group.

    ``token_ids`` ends with the stop token where ``finish`` is "stop"; ``logprobs`` has one natural logarithm for each.
    ``text`` is without control tokens. ``likeliest`` has for each token those that were likeliest there, with their
    log-probabilities, where it was asked for. Plain immutable data: any thread may keep it.
    """

    group: int
    member: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    text: str
    likeliest: tuple[tuple[tuple[int, float], ...], ...] = ()


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    responses: int | Sequence[int],
    max_tokens: int,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    sampling: Sampling = Sampling(),
    on_response: Callable[[Rollout], None] | None = None,
    likeliest: int = 0,
) -> list[Rollout]:
    """``responses`` responses to each prompt (or one count per prompt), in order of group and member.

    Each prompt is computed once and its cache shared out to its group; a finished row leaves the batch. Draws come from
    ``generator``, on the model's device, or each response's from its own of several; on a CPU the same state gives the
    same bits. The model is in evaluation mode meanwhile (no dropout) and must be left to this call.

    ``on_response`` gets each rollout once, the moment it finishes, while the others are still being sampled. It is
    called in the thread of `sample` and holds it up, so it should hand over and return: ``queue.SimpleQueue.put``, or
    ``loop.call_soon_threadsafe(...)`` when `sample` runs in a thread beside an event loop. What it raises ends the
    sampling and is passed on. ``likeliest`` asks for so many tokens beside each that is drawn.
    """
    counts = [responses] * len(prompts) if isinstance(responses, int) else list(responses)
    check(policy, prompts, counts, max_tokens)
    places = [(group, member) for group, count in enumerate(counts) for member in range(count)]
    done: dict[tuple[int, int], Rollout] = {}
    best: dict[tuple[int, int], list[tuple[tuple[int, float], ...]]] = {place: [] for place in places}

    def finish(place: tuple[int, int], tokens: list[int], logprobs: list[float], reason: Finish) -> None:
        text = policy.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        done[place] = Rollout(
            group=place[0],
            member=place[1],
            token_ids=tuple(tokens),
            logprobs=tuple(logprobs),
            finish=reason,
            text=text,
            likeliest=tuple(best[place]),
        )
        if on_response is not None:
            on_response(done[place])

    def drawn(logits_RV: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor]:
        if likeliest:
            top = logits_RV.log_softmax(-1).topk(min(likeliest, logits_RV.shape[1]))
            for number, tokens, logprobs in zip(numbers, top.indices.tolist(), top.values.tolist(), strict=True):
                best[places[number]].append(tuple(zip(tokens, logprobs, strict=True)))
        greedy = sampling.temperature == 0  # which takes no random number
        uniform_R = logits_RV.new_zeros(0) if greedy else uniform(numbers, logits_RV.device, generator)
        return draw(logits_RV, sampling, uniform_R)

    if places:
        with evaluating(policy.model):
            decode(policy, prompts, places, max_tokens, drawn, finish)
    return [done[place] for place in places]


def check(policy: Policy, prompts: Sequence[Sequence[int]], counts: list[int], max_tokens: int) -> None:
    """Refuse what cannot be sampled: no room, no prompt, prompts that leave no room in the model's context."""
    if max_tokens < 1:
        raise ConfigError(f"sampling.max_tokens: must be at least 1 (got {max_tokens})")
    if len(counts) != len(prompts) or any(count < 0 for count in counts):
        raise ValueError("responses must be one count of at least 0 for each prompt")
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt has no tokens")
    room = positions(policy)
    longest = max(map(len, prompts), default=0)
    if room and longest + max_tokens > room:
        raise ConfigError(
            f"sampling.max_tokens: {max_tokens} after a prompt of {longest} tokens exceed the model's {room} positions"
        )


def positions(policy: Policy) -> int | None:
    """How many tokens the model has room for, prompt and response together; None where its config does not say.

    Where RoPE's frequencies change beyond a length (longrope, dynamic), that length: the longest row of a batch would
    decide for all of it, so that a log-probability told of its neighbours.
    """
    config = causal_lm(policy.model).config.get_text_config()
    room = getattr(config, "max_position_embeddings", None)
    for rope in ropes(getattr(config, "rope_parameters", None) or {}):
        if rope.get("rope_type") in ("longrope", "dynamic"):
            room = rope.get("original_max_position_embeddings") or room
    return int(room) if room else None


def ropes(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameters of RoPE, which a config may give for each kind of layer."""
    return [parameters, *(each for each in parameters.values() if isinstance(each, dict))]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()  # not inference_mode: tensors made there cannot enter the trainer's graph
def decode(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    places: list[tuple[int, int]],
    max_tokens: int,
    draw: Callable[[Tensor, list[int]], tuple[Tensor, Tensor]],
    finish: Callable[[tuple[int, int], list[int], list[float], Finish], None],
) -> None:
    """The loop over tokens: R rows are alive; Q prompts are computed first and shared out."""
    groups = sorted({group for group, _ in places})  # a prompt without responses is not computed
    prompt = {group: number for number, group in enumerate(groups)}
    rows = Rows(policy, [prompts[group] for group in groups], [prompt[group] for group, _ in places], max_tokens)
    said = [(list[int](), list[float]()) for _ in places]
    alive = list(range(len(places)))  # the place of each row
    while alive:
        tokens_R, logprobs_R = draw(logits(policy.model, rows.state_RH), alive)
        going = []
        for row, (number, token, logprob) in enumerate(zip(alive, *on_host(tokens_R, logprobs_R), strict=True)):
            tokens, logprobs = said[number]
            tokens.append(int(token))
            logprobs.append(logprob)
            if token in policy.stop_ids or len(tokens) == max_tokens:
                finish(places[number], tokens, logprobs, "stop" if token in policy.stop_ids else "length")
            else:
                going.append(row)
        if 0 < len(going) < len(alive):
            going, going_R = rows.keep(going)
            tokens_R = tokens_R[going_R]
        alive = [alive[row] for row in going]
        if alive:
            rows.step(tokens_R)


def uniform(
    numbers: Sequence[int], device: Any, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    """A number in [0, 1) for each of these responses, from its own generator where there are several.

    In float64: in float32 a large vocabulary has tokens that no number would ever meet.
    """
    if isinstance(generator, Sequence):
        return torch.cat([uniform([number], device, generator[number]) for number in numbers])
    return torch.rand(len(numbers), dtype=torch.float64, device=device, generator=generator)


def draw(logits_RV: Tensor, sampling: Sampling, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each row, and its log-probability under the untruncated policy at temperature 1.

    A row's token is the one in whose part of its cumulative distribution its uniform number lies: one random number a
    row, where `torch.multinomial` takes one for every token of the vocabulary.
    """
    if sampling.temperature == 1:
        probs_RV = logits_RV.softmax(-1)
        tokens_R1 = located(truncate(probs_RV, sampling), uniform_R)
        return tokens_R1.squeeze(1), probs_RV.gather(1, tokens_R1).squeeze(1).log()
    if sampling.temperature == 0:
        tokens_R1 = logits_RV.argmax(-1, keepdim=True)
    else:
        highest_RV = logits_RV - logits_RV.amax(-1, keepdim=True)  # 0 at the top, however cold
        probs_RV = (highest_RV / max(sampling.temperature, 1e-30)).softmax(-1)
        tokens_R1 = located(truncate(probs_RV, sampling), uniform_R)
    return tokens_R1.squeeze(1), (logits_RV.gather(1, tokens_R1) - logits_RV.logsumexp(-1, keepdim=True)).squeeze(1)


def located(weights_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Where a row's number from 0 to 1 lies among its weights, R x 1; never at a weight of 0."""
    below_RV = weights_RV.cumsum(-1, dtype=torch.float64)
    sum_R1 = below_RV[:, -1:] * (1 - 2**-52)  # so that whatever is rounded, no number comes to lie behind all
    found_R1 = torch.searchsorted(below_RV, uniform_R[:, None] * sum_R1, right=True)
    return found_R1.clamp(max=weights_RV.shape[1] - 1)  # a row that is NaN


def on_host(tokens_R: Tensor, logprobs_R: Tensor) -> list[list[float]]:
    """Tokens and log-probabilities as lists, in one transfer: numbers of float64 hold both exactly."""
    tokens, logprobs = torch.stack([tokens_R.double(), logprobs_R.double()]).tolist()
    if not all(map(math.isfinite, logprobs)):
        raise GrapeError("the policy gives no numbers: its weights or activations are not finite")
    return [tokens, logprobs]


def truncate(probs_RV: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities with the tail at zero, not normalised: top_k first, then top_p, then min_p."""
    if 0 < sampling.top_k < probs_RV.shape[1]:
        least_R1 = probs_RV.topk(sampling.top_k).values[:, -1:]
        probs_RV = probs_RV.where(probs_RV >= least_R1, 0.0)
    if sampling.top_p < 1:
        sorted_RV, order_RV = probs_RV.sort(descending=True)
        before_RV = sorted_RV.cumsum(-1) - sorted_RV
        kept_RV = sorted_RV.where(before_RV < sampling.top_p * sorted_RV.sum(-1, keepdim=True), 0.0)
        probs_RV = torch.zeros_like(probs_RV).scatter(1, order_RV, kept_RV)
    if sampling.min_p > 0:
        probs_RV = probs_RV.where(probs_RV >= sampling.min_p * probs_RV.amax(-1, keepdim=True), 0.0)
    return probs_RV
