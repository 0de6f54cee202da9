"""Before any work: is the server there, is the key right, has it the model, and can it give what the judge needs?"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
from openai import APIStatusError

from grape.errors import ConfigError, known, one_line
from grape.judge.answer import BROKEN, RETRIED, Body, line, listed, read_body, root, said, words
from grape.judge.call import Call
from grape.judge.config import Judge
from grape.judge.endpoint import Server, holds_schema, refuses_schema, request, smaller_limit

PROBE, PROBES = 5.0, 3  # seconds to see whether a server is there, and how often a broken answer is looked at again
NO_MODEL = re.compile(
    r"model\b.{0,80}\b(not exist|not found|unknown)|(invalid|unknown|no such|not a valid) model|model_not_found"
)
TINY = re.compile(r"max.?(completion.?|output.?|new.?)?tokens|output limit|minimum")  # of a reply of one token
SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "number"}},
    "required": ["score"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One address that is looked at, on behalf of a judge."""

    judge: Judge
    server: Server
    mask: Callable[[str], str]

    @property
    def demanding(self) -> bool:
        """Whether the judge needs what not every server has, and only a call can tell."""
        return self.judge.confidence == "logprob" or (self.judge.schemed and self.judge.json_schema == "always")

    def error(self, what: str) -> ConfigError:
        """What is wrong, in one line."""
        return ConfigError(self.mask(f"judge {self.judge.judge!r}: {what}"))

    def key_error(self, error: APIStatusError) -> ConfigError:
        """The key is wrong, or there should be one."""
        does = "refuses the api_key" if self.server.key else "asks for an api_key"
        return self.error(f"{self.server.url} {does}: {said(error)}")

    def address_error(self, why: str) -> ConfigError:
        """No such server stands at the address."""
        no_server = "does not answer as an OpenAI-compatible server (such addresses usually end in /v1)"
        return self.error(f"{self.server.url} {no_server}: {why}")

    def model_error(self, models: set[str], error: APIStatusError) -> ConfigError:
        """The server has other models."""
        name = self.judge.model_name
        there = one_line(known(models, name), 300) if models else said(error)
        return self.error(f"{self.server.url} has no model {name!r}; {there}")


async def reach(judge: Judge, server: Server, *, trusted: bool, mask: Callable[[str], str]) -> None:
    """`ConfigError` of one line where a judge cannot be asked at an address.

    ``trusted``: it has answered this judge before, so that no call is made to find out.
    """
    probe = Probe(judge=judge, server=server, mask=mask)
    models = await _models(probe)
    if trusted or models is None:
        return
    if (models == set() or judge.model_name in models) and not probe.demanding:
        return
    await _call(probe, models - {""})


async def _models(probe: Probe) -> set[str] | None:
    """The server's models: empty where it lists none, with "" where it gives no such list, None where it is busy."""
    for tries_left in reversed(range(PROBES)):
        try:
            async with asyncio.timeout(2 * PROBE):
                timeout = httpx2.Timeout(None, connect=PROBE)
                answer = await probe.server.client.models.with_raw_response.list(timeout=timeout)
                return _listed(answer.content)
        except TimeoutError:
            return None
        except APIStatusError as error:
            if error.status_code == 401:
                raise probe.key_error(error) from error
            busy = error.status_code in RETRIED or (error.status_code >= 500 and error.status_code != 501)
            return None if busy else {""}
        except BROKEN as error:
            if not tries_left:
                what = f"cannot reach {probe.server.url}: {line(root(error))}"
                raise probe.error(what) from error
        await asyncio.sleep(0.1)
    raise AssertionError("the last try returns or raises")


def _listed(content: bytes) -> set[str]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return {""}
    data = data.get("data") if isinstance(data, Mapping) else data
    if not isinstance(data, list):
        return {""}
    if not data:
        return set()
    return {str(model["id"]) for model in data if isinstance(model, Mapping) and model.get("id")} or {""}


async def _call(probe: Probe, models: set[str]) -> None:
    """Ask for one token; where the server wants to give more, or nothing comes of one, for as many as the judge."""
    own = probe.judge.sampling.params()
    tiny = {name: 1 if name in {"max_tokens", "max_completion_tokens"} else value for name, value in own.items()}
    tries: list[dict[str, Any]] = [tiny, own] if tiny != own else [own]
    for sampling in tries:
        call = Call(
            key="",
            judge=probe.judge.judge,
            model=probe.judge.model_name,
            purpose="score",
            messages=({"role": "user", "content": "Reply with 1."},),
            sampling=sampling,
            response_id="",
            item="",
            schema=SCHEMA if probe.judge.schemed and probe.judge.json_schema == "always" else None,
            logprobs=probe.judge.confidence == "logprob",
        )
        try:
            async with asyncio.timeout(probe.server.timeout if probe.demanding else 2 * PROBE):
                content = await _ask(probe, call)
        except APIStatusError as error:
            _judge_status(probe, call, models, error)
            if not (probe.demanding and TINY.search(words(error))):
                return
        except (TimeoutError, *BROKEN):
            return  # slow or overloaded: nobody's error
        else:
            if _judge_answer(probe, call, content, last=sampling is own):
                return


async def _ask(probe: Probe, call: Call) -> bytes:
    """The answer, with as many alternatives of each token as the server gives."""
    while True:
        probe.server.count()
        try:
            return await probe.server.post(request(call, top=probe.server.top))
        except APIStatusError as error:
            fewer = smaller_limit(error, probe.server.top) if call.logprobs else None
            if fewer is None:
                raise
            probe.server.top = fewer


def _judge_status(probe: Probe, call: Call, models: set[str], error: APIStatusError) -> None:
    """Raise the line for what the user can set right. What speaks of one token, or of a busy server, passes."""
    status, text = error.status_code, words(error)
    url = probe.server.url
    if holds_schema(call) and refuses_schema(error):
        raise probe.error(f"{url} has no JSON schema for replies, which json_schema: always needs: {said(error)}")
    if status in RETRIED or status >= 500:
        return
    if status in {401, 403}:
        raise probe.key_error(error) from error
    why = f"{error.code} {error.type} {said(error)}".casefold()
    page = isinstance(error.body, str) and "<" in error.body  # a page of some website, whatever words it has
    if not page and (NO_MODEL.search(why) or (status == 404 and "model" in why)):
        raise probe.model_error(models, error) from error
    if status in {404, 405}:
        raise probe.address_error(said(error)) from error
    if call.logprobs and "logprob" in text:
        raise _no_logprobs(probe, said(error)) from error
    if not TINY.search(text):
        raise probe.error(f"{url}: {said(error)}") from error


def _judge_answer(probe: Probe, call: Call, content: bytes, *, last: bool) -> bool:
    """Whether an answer with status 200 settles it; a `ConfigError` where it is none, or lacks what was asked for."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, Mapping):
        raise probe.address_error(f"the answer is not JSON: {one_line(content[:60].decode(errors='replace'))}")
    body = read_body(content)
    if not isinstance(body, Body):
        if "error" in data:
            return True  # a server that is in trouble says so with status 200
        raise probe.address_error(body.detail)
    if not call.logprobs or any(one.get("top_logprobs") for one in listed((body.choices or [])[0])):
        return True
    if last:
        raise _no_logprobs(probe, "its answer holds none")
    return False


def _no_logprobs(probe: Probe, why: str) -> ConfigError:
    return probe.error(
        f"{probe.server.url} gives no probabilities of tokens, which confidence: logprob needs ({why}); "
        "verbal and votes need none"
    )
