"""One address of a judge: its connection, its limits, and what it was found not to have."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import Callable, Mapping
from functools import cache
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx2
import orjson
from openai import APIStatusError, AsyncOpenAI, DefaultAioHttpClient

from grape.judge.answer import BROKEN, Fault, broken_fault, read_answer, said, status_fault, words
from grape.judge.call import Call, CallRecord
from grape.judge.config import Judge
from grape.judge.limits import Breaker, Window
from grape.judge.request import Endpoint
from grape.types import Outcome

TOP_LOGPROBS = 20  # alternatives of a token that are asked for
SCHEMA_WORDS = (
    "response_format", "response format", "json_schema", "json schema", "structured output", "structured_output",
    "guided", "grammar",
)  # fmt: skip
NO_WORDS = {401, 408, 429}  # statuses that speak of something else, whatever their words


class Server:
    """One address at work. The state of its limits is kept by the `Line` that sends calls here.

    ``schema`` and ``top`` are what it is asked for: a JSON schema, and so many alternatives of each token. A server
    that refuses one is asked without (or for as many as it gives) at once and from then on.
    """

    def __init__(self, judge: Judge, endpoint: Endpoint, clock: Callable[[], float]) -> None:
        self.url, self.key = endpoint.url, endpoint.api_key
        self.timeout = endpoint.timeout or judge.timeout
        self.room = endpoint.concurrency or judge.concurrency
        self.schema, self.top = True, TOP_LOGPROBS
        self.busy = 0
        self.held = 0.0  # until when it asked to be left alone
        self.breaker = Breaker()
        self.requests = Window(endpoint.requests_per_minute)
        self.tokens = Window(endpoint.tokens_per_minute)
        self._clock = clock
        self._always = judge.json_schema == "always"
        limits = httpx2.Limits(max_connections=self.room)
        outside = not is_loopback(self.url)
        http = DefaultAioHttpClient(limits=limits, trust_env=outside, verify=certificates(outside))
        # The time limit of an attempt is ours. Without a key the library would take the user's OpenAI key.
        self.client = AsyncOpenAI(
            base_url=self.url, api_key=self.key or "none", http_client=http, max_retries=0, timeout=None
        )
        self._outside = outside
        self._session: aiohttp.ClientSession | None = None  # made on the event loop
        parts = urlsplit(self.url)
        self._chat = parts._replace(path=f"{parts.path.rstrip('/')}/chat/completions").geturl()

    def opens(self, now: float, tokens: float) -> float:
        """From when a call of so many tokens may begin here, if there is room."""
        times = self.held, self.breaker.opens(now), self.requests.opens(now, 1), self.tokens.opens(now, tokens)
        return max(now, *times)

    def count(self) -> None:
        """A request is made, beside those that stood in line."""
        self.requests.add(self._clock(), 1)

    async def attempt(self, call: Call) -> CallRecord | Fault:
        """One attempt, within the time limit."""
        try:
            async with asyncio.timeout(self.timeout):
                return await self._ask(call)
        except TimeoutError:
            return Fault(outcome=Outcome.TIMEOUT, detail=f"no answer within {self.timeout:g} s")

    async def _ask(self, call: Call) -> CallRecord | Fault:
        """Ask, and again without what the server says it has not."""
        schema, top = self.schema, self.top
        while True:
            try:
                content = await self.post(request(call, schema=schema, top=top))
            except APIStatusError as error:
                if schema and holds_schema(call) and refuses_schema(error):
                    if self._always:
                        detail = f"the server has no JSON schema, which json_schema: always needs: {said(error)}"
                        return Fault(outcome=Outcome.TRANSPORT, detail=detail, again=False, dead=False)
                    schema = False
                elif call.logprobs and (fewer := smaller_limit(error, top)):
                    top = fewer
                else:
                    return status_fault(error)
                self.count()
            except BROKEN as error:
                return broken_fault(error)
            else:
                result = read_answer(content, logprobs=call.logprobs)
                if isinstance(result, CallRecord):  # it was that, and nothing else in the request
                    self.schema, self.top = self.schema and schema, min(self.top, top)
                return result

    async def post(self, body: dict[str, Any]) -> bytes:
        """The body of the answer to one request; raises `APIStatusError` or one of `BROKEN`.

        By the connection beneath the library's client, which takes a fifth of the time (benchmarks/judge.py).
        """
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self.room, ssl=certificates(self._outside)),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Authorization": f"Bearer {self.client.api_key}", "Content-Type": "application/json"},
                timeout=aiohttp.ClientTimeout(total=None),  # ours is that of an attempt
                trust_env=self._outside,
            )
        async with self._session.post(self._chat, data=orjson.dumps(body)) as answer:
            content = await answer.read()
        if answer.status >= 400:
            raise status_error(self._chat, answer.status, answer.headers, content)
        return content

    async def close(self) -> None:
        """Close the connections. Closing twice is allowed."""
        await self.client.close()
        if self._session is not None:
            await self._session.close()


def status_error(url: str, status: int, headers: Mapping[str, str], content: bytes) -> APIStatusError:
    """An answer of 4xx or 5xx as the library has it."""
    response = httpx2.Response(status, headers=dict(headers), request=httpx2.Request("POST", url))
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        text = content.decode(errors="replace").strip()
        return APIStatusError(text or f"Error code: {status}", response=response, body=text)
    inner = body.get("error", body) if isinstance(body, Mapping) else body
    told = inner.get("message") if isinstance(inner, Mapping) else inner
    return APIStatusError(told if isinstance(told, str) else f"{body}", response=response, body=inner)


def request(call: Call, *, schema: bool = True, top: int = TOP_LOGPROBS) -> dict[str, Any]:
    """The body of a call. What the judge's own ``extra_body`` says stands."""
    sampling = dict(call.sampling)
    body: dict[str, Any] = {"model": call.model, "messages": list(call.messages)}
    if call.schema is not None and schema:
        wanted = {"name": "verdict", "strict": True, "schema": call.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": wanted}
    if call.logprobs:
        body |= {"logprobs": True, "top_logprobs": top}
    return {**body, **sampling.pop("extra_body", {}), **sampling}


def holds_schema(call: Call) -> bool:
    """Whether the schema of a call is sent, and not a form of reply that the judge's file asks for."""
    return call.schema is not None and "response_format" not in call.sampling.get("extra_body", {})


def refuses_schema(error: APIStatusError) -> bool:
    """Whether a server says that it cannot hold a reply to a JSON schema, or not to this one."""
    status = error.status_code
    if not (400 <= status < 500 or status == 501) or status in NO_WORDS:
        return False
    return any(word in words(error) for word in SCHEMA_WORDS)


def smaller_limit(error: APIStatusError, top: int) -> int | None:
    """How many alternatives of a token a server gives at most, where it says that ``top`` are too many."""
    text = words(error)
    if error.status_code not in {400, 422} or "logprobs" not in text:
        return None
    below = {int(number) - 1 for number in re.findall(r"(?:less than|<) (\d{1,2})\b", text)}
    numbers = below or {int(number) for number in re.findall(r"(?<![\w.])\d{1,2}(?![\w.]\d|\w)", text)}
    return max((number for number in numbers if 0 < number < top), default=None)


@cache
def certificates(trust_env: bool) -> ssl.SSLContext:
    """Whom to trust, read once: that takes longer than a call."""
    return httpx2.create_ssl_context(trust_env=trust_env)


def is_loopback(url: str) -> bool:
    """Whether an address is on this machine, where no proxy is asked."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
