"""A judge whose model runs here, in one thread beside the event loop: by transformers or by vLLM."""

from __future__ import annotations

import asyncio
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from grape.chat import chat_ids
from grape.errors import ConfigError, GrapeError, one_line
from grape.judge.call import Call, CallRecord, now
from grape.judge.config import Judge
from grape.judge.reply import score_span
from grape.types import Message, Outcome

if TYPE_CHECKING:
    from grape.policy import Policy
    from grape.rollout import Rollout

TALK: tuple[Message, ...] = tuple(
    {"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")
)  # the longest kind of chat that a judge is asked
BATCH = {"transformers": 1, "vllm": 256}  # calls that are decoded together where the judge's file does not say
LIKELIEST = 20  # tokens in whose probability one is interested, at every place: as many as servers list
LOADING = Lock()  # transformers reads one model at a time: it changes torch's defaults meanwhile


class Decoder(Protocol):
    """A model that decodes calls: its tokenizer, and how many tokens a prompt and its reply may have."""

    tokenizer: Any
    room: float

    def decode(self, prompts: list[list[int]], calls: Sequence[Call]) -> list[Rollout]:
        """The reply to each prompt, with what is `likeliest` where a call asks for log-probabilities."""

    def close(self) -> None:
        """Let go of the model."""


class LocalClient:
    """A judge's own model, loaded once by `reach` or the first call; `close` lets it go.

    The same call gives the same bits, in a ``batch`` of 1 whatever else is asked. A call cannot be cut off: it ends
    with ``max_tokens``, and ``timeout``, ``retries`` and ``price`` do not count. What the model has no room for is
    outcome `transport`, as with a server.
    """

    shown = True

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grape-judge")
        self._decoder: Decoder | None = None
        self._tickets = itertools.count()
        self._waiting: dict[int, Call] = {}
        self._answers: dict[int, CallRecord] = {}
        assert judge.sampling.max_tokens is not None, "such a judge has a limit"
        self._limit = judge.sampling.max_tokens

    def repairs(self, call: Call) -> bool:
        """Whether the model has room for the repair question."""
        decoder = self._load()
        return len(self._prompt(decoder, call)) + self._limit <= decoder.room

    async def reach(self, known: Collection[str | None]) -> None:
        """Load the model; `ConfigError` where that cannot be, or where its template or context will not do."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._load)

    async def ask(self, call: Call) -> CallRecord:
        """The model's reply."""
        ticket = next(self._tickets)
        self._waiting[ticket] = call
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._serve, ticket)
        finally:
            self._waiting.pop(ticket, None)

    async def close(self) -> None:
        """Let go of the model, once the call that is under way has ended. Closing twice is allowed."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.close()

    def _load(self) -> Decoder:
        if self._decoder is None:
            client = self.judge.client
            need_torch(f"{self.judge.source}: client: {client}")
            where, name = f"{self.judge.source}: model", self.judge.model_name
            beside = Path(self.judge.source).parent / name
            model = str(beside) if beside.is_dir() else name
            with LOADING:
                decoder = OPEN[client](self.judge, model, where)
            chat_ids(decoder.tokenizer, TALK, where)
            if self._limit >= decoder.room:
                raise ConfigError(
                    f"{self.judge.source}: sampling.max_tokens: {self._limit} leave no room for a prompt: "
                    f"the model has {decoder.room} positions"
                )
            self._decoder = decoder
        return self._decoder

    def _serve(self, ticket: int) -> CallRecord:
        """The answer to one call, got with those that wait behind it, as many as ``batch`` allows."""
        if ticket not in self._answers:
            waiting = [(number, call) for number, call in list(self._waiting.items()) if number >= ticket]
            calls = dict(waiting[: self.judge.batch or BATCH[self.judge.client]])
            self._answers.update(zip(calls, self._answer(list(calls.values())), strict=True))
        return self._answers.pop(ticket)

    def _answer(self, calls: Sequence[Call]) -> list[CallRecord]:
        """The records of calls that are decoded together, but for those that the model has no room for."""
        from torch import OutOfMemoryError

        decoder, start = self._load(), perf_counter()
        prompts = [self._prompt(decoder, call) for call in calls]
        replies: dict[int, Rollout | str] = {
            number: f"{self._limit} max_tokens after a prompt of {len(prompt)} exceed {decoder.room} positions"
            for number, prompt in enumerate(prompts)
        }
        fitting = [number for number, prompt in enumerate(prompts) if len(prompt) + self._limit <= decoder.room]
        try:
            said = decoder.decode([prompts[number] for number in fitting], [calls[number] for number in fitting])
            replies.update(zip(fitting, said, strict=True))
        except (GrapeError, OutOfMemoryError) as error:  # a GrapeError: the weights give no numbers
            replies.update(dict.fromkeys(fitting, one_line(error)))
        seconds = (perf_counter() - start) / len(calls)
        return [self._record(decoder, prompts[number], reply, seconds) for number, reply in replies.items()]

    def _prompt(self, decoder: Decoder, call: Call) -> list[int]:
        return chat_ids(decoder.tokenizer, call.messages, f"judge {call.judge!r}")

    def _record(self, decoder: Decoder, prompt: list[int], reply: Rollout | str, seconds: float) -> CallRecord:
        if isinstance(reply, str):
            return CallRecord(outcome=Outcome.TRANSPORT, detail=reply, latency=seconds, created=now())
        return CallRecord(
            reply=reply.text,
            finish_reason=reply.finish,
            latency=seconds,
            input_tokens=len(prompt),
            output_tokens=len(reply.token_ids),
            tokens=score_tokens(decoder.tokenizer, reply) if reply.likeliest else None,
            created=now(),
        )


class Transformers:
    """A `Decoder` by transformers, on a GPU where there is one."""

    def __init__(self, judge: Judge, model: str, where: str) -> None:
        import torch

        from grape.policy import load_policy
        from grape.rollout import positions

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._policy: Policy | None = load_policy(model, dtype=judge.dtype, device=device, where=where)
        self._own = judge.sampling
        self.tokenizer: Any = self._policy.tokenizer
        self.room: float = positions(self._policy) or math.inf

    def decode(self, prompts: list[list[int]], calls: Sequence[Call]) -> list[Rollout]:
        """The replies, each drawn from a generator that its call seeds."""
        import torch

        from grape.rollout import Sampling, sample

        assert self._policy is not None and self._own.max_tokens is not None, "it is open, and has a limit"
        sampling = Sampling(temperature=self._own.temperature or 0.0, top_p=self._own.top_p or 1.0, training=False)
        device = self._policy.model.device
        return sample(
            self._policy, prompts, responses=1, max_tokens=self._own.max_tokens,
            generator=[torch.Generator(device).manual_seed(seed_of(call)) for call in calls], sampling=sampling,
            likeliest=LIKELIEST if any(call.logprobs for call in calls) else 0,
        )  # fmt: skip

    def close(self) -> None:
        """Let go of the model."""
        self._policy = None


def open_vllm(judge: Judge, model: str, where: str) -> Decoder:
    """A `Decoder` by vLLM."""
    from grape.judge.vllm import Vllm

    return Vllm(judge, model, where)


OPEN: dict[str, Callable[[Judge, str, str], Decoder]] = {"transformers": Transformers, "vllm": open_vllm}


def seed_of(call: Call) -> int:
    """The seed of a call's draws, which its key decides."""
    return int(call.key[:15], 16)


def score_tokens(tokenizer: Any, reply: Rollout) -> list[tuple[int, list[tuple[str, float]]]] | None:
    """The tokens that share a character with the score's JSON value, as `CallRecord.tokens` has them; None where the
    reply states no score."""
    if (span := score_span(reply.text)) is None:
        return None

    def written(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def length(count: int) -> int:
        """How many characters the first ``count`` tokens are; half a character is one."""
        return len(written(reply.token_ids[:count]))

    counts = range(len(reply.token_ids) + 1)
    first = bisect_right(counts, span[0], key=length) - 1
    last = bisect_left(counts, span[1], key=length)
    found = []
    for at in range(first, last):
        start = length(at)
        before, own = reply.token_ids[:at], reply.token_ids[at]
        others = [
            (written((*before, token))[start:], logprob) for token, logprob in reply.likeliest[at] if token != own
        ]
        found.append((start, [(reply.text[start : length(at + 1)], reply.logprobs[at]), *others]))
    return found


def need_torch(where: str) -> None:
    """`ConfigError` of one line where the libraries for local models are missing."""
    if missing := [name for name in ("torch", "transformers", "peft") if find_spec(name) is None]:
        raise ConfigError(f"{where}: {missing[0]} is not installed: pip install 'grape-rl[train]'")
