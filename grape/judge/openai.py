"""Judges behind an OpenAI-compatible server: one long-lived client per endpoint, retries, and typed failures."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from time import perf_counter
from typing import Annotated, Any
from urllib.parse import urlsplit

import aiohttp
import httpx2
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, DefaultAioHttpClient, OpenAIError
from pydantic import BaseModel, Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from grape.errors import ConfigError, one_line
from grape.judge.call import Call, CallRecord, now
from grape.judge.config import Judge
from grape.judge.prompt import well_formed
from grape.types import Outcome

# The library lets some of its transport's own errors through: malformed HTTP, broken headers.
BROKEN = (OpenAIError, httpx2.HTTPError, httpx2.InvalidURL, aiohttp.ClientError, OSError, ValueError)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0  # seconds before the second attempt, and before any
RETRIED = {408, 409, 425, 429}  # and all from 500
PROBE, PROBES = 5.0, 3  # seconds to see whether a server is there, and how often a broken answer is looked at again
FILTERS = ("content_filter", "content_policy", "content policy", "responsibleaipolicy", "content management policy")


Count = Annotated[int, Field(ge=0, lt=2**53)]


class Usage(BaseModel):
    """The tokens of one answer, where the server counts them."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None


class Said(BaseModel):
    """The message of one choice. Content in parts is joined."""

    content: str | None = None
    refusal: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _join(cls, content: Any) -> Any:
        if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
            return "".join(str(part.get("text") or "") for part in content)
        return content


class Choice(BaseModel):
    """One choice of an answer."""

    message: Said
    finish_reason: str | None = None


class Body(BaseModel):
    """What is read of an answer; servers add fields of their own."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None

    @field_validator("usage", mode="wrap")
    @classmethod
    def _odd_counts(cls, usage: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(usage)
        except ValidationError:
            return None  # the reply counts, whatever the counter says


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why an attempt failed, whether another may help, and how long the server asks to wait (seconds)."""

    outcome: Outcome
    detail: str
    again: bool = True
    wait: float = 0.0


class OpenAIClient:
    """A judge's endpoints, used in turn. At most ``concurrency`` requests are under way; `close` it at the end."""

    shown = True

    def __init__(self, judge: Judge, rng: random.Random | None = None) -> None:
        self.judge = judge
        self._key = judge.key
        self._rng = rng or random.Random()
        self._gate = asyncio.Semaphore(judge.concurrency)
        self._clients = {url: self._connect(url) for url in judge.endpoints}
        self._turn = itertools.cycle(self._clients)

    def _connect(self, url: str) -> AsyncOpenAI:
        limits = httpx2.Limits(max_connections=self.judge.concurrency)
        http = DefaultAioHttpClient(limits=limits, trust_env=not _is_loopback(url))
        # The time limit of an attempt is ours. Without a key the library would take the user's OpenAI key.
        return AsyncOpenAI(base_url=url, api_key=self._key or "none", http_client=http, max_retries=0, timeout=None)

    def repairs(self, call: Call) -> bool:
        """A live judge can always be asked again."""
        return True

    async def ask(self, call: Call) -> CallRecord:
        """The judge's reply, or after ``retries`` more attempts the typed outcome of the last one."""
        attempt, spent = 0, 0.0
        while True:
            url = next(self._turn)
            async with self._gate:
                start = perf_counter()
                result = await self._attempt(url, call)
                spent += perf_counter() - start
            attempt += 1
            if isinstance(result, CallRecord):
                return replace(result, endpoint=url, attempts=attempt, latency=spent)
            if attempt > self.judge.retries or not result.again:
                return CallRecord(
                    outcome=result.outcome,
                    detail=self._mask(result.detail),
                    endpoint=url,
                    attempts=attempt,
                    latency=spent,
                    created=now(),
                )
            await asyncio.sleep(self._pause(attempt, result.wait))

    async def _attempt(self, url: str, call: Call) -> CallRecord | Fault:
        sampling = dict(call.sampling)
        body = {"model": call.model, "messages": list(call.messages), **sampling.pop("extra_body", {}), **sampling}
        try:
            async with asyncio.timeout(self.judge.timeout):
                # The typed method walks every message through its type hints, which takes longer than the request.
                answer = await self._clients[url].post("/chat/completions", body=body, cast_to=httpx2.Response)
        except TimeoutError:
            return Fault(outcome=Outcome.TIMEOUT, detail=f"no answer within {self.judge.timeout:g} s")
        except APIStatusError as error:
            return _status_fault(error)
        except BROKEN as error:
            root = _root(error)
            outcome = Outcome.TIMEOUT if isinstance(root, TimeoutError) else Outcome.TRANSPORT
            return Fault(outcome=outcome, detail=_line(root))
        return self._read(answer.content)

    def _read(self, content: bytes) -> CallRecord | Fault:
        """The body of an answer with status 200."""
        try:
            body = Body.model_validate(json.loads(content))
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "not an object"
            return Fault(outcome=Outcome.TRANSPORT, detail=f"the answer is no chat completion: {where}")
        except (ValueError, RecursionError):
            return Fault(outcome=Outcome.TRANSPORT, detail=f"the answer's body is not JSON ({len(content)} bytes)")
        if not body.choices:
            detail = f"error in the answer: {body.error}" if body.error else "the answer has no choices"
            return Fault(outcome=Outcome.TRANSPORT, detail=one_line(detail))
        said, usage = body.choices[0].message, body.usage or Usage()
        return CallRecord(
            reply=well_formed(said.content or said.refusal or ""),
            finish_reason="refusal" if said.refusal else body.choices[0].finish_reason,
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            cost=self._cost(usage),
            created=now(),
        )

    def _cost(self, usage: Usage) -> float | None:
        price = self.judge.price
        if price is None or usage.prompt_tokens is None or usage.completion_tokens is None:
            return None
        return (usage.prompt_tokens * price.input + usage.completion_tokens * price.output) / 1e6

    def _pause(self, attempt: int, asked: float) -> float:
        """Seconds before the next attempt: what the server asked for, at most the timeout, or full jitter on 2^n."""
        longest = min(FIRST_PAUSE * 2 ** min(attempt - 1, 16), LONGEST_PAUSE, self.judge.timeout)
        jitter = self._rng.uniform(0, longest)
        return min(asked, self.judge.timeout) + jitter if asked else jitter

    def _mask(self, detail: str) -> str:
        return detail.replace(self._key, "***") if self._key else detail

    async def reach(self) -> None:
        """See that each endpoint is there: any HTTP answer will do, and so will a server that is slow to give one."""
        for url, client in self._clients.items():
            for tries_left in reversed(range(PROBES)):
                error = await _probe(client)
                if error is None:
                    break
                if not tries_left:
                    raise ConfigError(f"judge {self.judge.judge!r}: cannot reach {url}: {_line(error)}") from error
                await asyncio.sleep(0.1)

    async def close(self) -> None:
        """Close the connections. Closing twice is allowed."""
        for client in self._clients.values():
            await client.close()


async def _probe(client: AsyncOpenAI) -> BaseException | None:
    """What keeps a server from answering at all."""
    try:
        async with asyncio.timeout(2 * PROBE):
            await client.models.with_raw_response.list(timeout=httpx2.Timeout(None, connect=PROBE))
    except (APIStatusError, TimeoutError):
        return None
    except BROKEN as error:
        return _root(error)
    return None


def _status_fault(error: APIStatusError) -> Fault:
    """What a status of 4xx or 5xx means."""
    status = error.status_code
    said = error.message.removeprefix(f"Error code: {status}").lstrip(" -")
    text = one_line(f"status {status}: {said or 'no more said'}")
    words = f"{error.code} {error.type} {error.message}".casefold()
    if status in {400, 403, 422} and any(word in words for word in FILTERS):
        return Fault(outcome=Outcome.REFUSED, detail=text, again=False)
    if status in {401, 403}:
        return Fault(outcome=Outcome.TRANSPORT, detail=f"the server refuses the api_key: {text}", again=False)
    again = status in RETRIED or status >= 500
    return Fault(outcome=Outcome.TRANSPORT, detail=text, again=again, wait=_retry_after(error.response.headers))


def _retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that a server asks to wait (Retry-After as a number or a date); 0 where it does not, or oddly."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _root(error: BaseException) -> BaseException:
    """The innermost cause of a transport error: the library calls a refused connection a timeout."""
    while isinstance(error, APIConnectionError | httpx2.HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return one_line(error.os_error.strerror or error.os_error)
    return one_line(str(error) or type(error).__name__)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
