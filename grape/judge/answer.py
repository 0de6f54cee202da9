"""What a server's answer means: the reply in it with its tokens, or the fault that stands for its absence."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any

import aiohttp
import httpx2
from openai import APIConnectionError, APIStatusError, OpenAIError
from pydantic import BaseModel, Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from grape.errors import one_line
from grape.judge.call import CallRecord, now
from grape.judge.prompt import well_formed
from grape.judge.reply import score_span
from grape.judge.tokens import Token, tokens_of_score
from grape.types import Outcome

# The library lets some of its transport's own errors through: malformed HTTP, broken headers.
BROKEN = (OpenAIError, httpx2.HTTPError, httpx2.InvalidURL, aiohttp.ClientError, OSError, ValueError)
RETRIED = {408, 409, 425, 429}  # and all from 500
FILTERS = ("content_filter", "content_policy", "content policy", "responsibleaipolicy", "content management policy")
END_MARK = re.compile(r"\s*(<[^<>\s]*>)?\s*")  # servers list <|im_end|> and its like among the tokens

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
    """One choice of an answer. ``logprobs`` is looked at where it was asked for."""

    message: Said
    finish_reason: str | None = None
    logprobs: Any = None


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


class Alternative(BaseModel):
    """A token that might have been written."""

    token: str
    logprob: Annotated[float, Field(le=0.01)]  # NaN is not
    bytes: list[Annotated[int, Field(ge=0, le=255)]] | None = None

    @property
    def raw(self) -> Sequence[int]:
        """Its bytes; half a character's are not in its text."""
        return self.token.encode(errors="replace") if self.bytes is None else self.bytes


class Written(Alternative):
    """A token that was written, with its alternatives."""

    top_logprobs: list[Alternative] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why an attempt failed, whether another may help, and how long the server asks to wait (seconds).

    ``dead`` faults speak of the server, and not of what it was asked; a server that is too busy is not dead.
    """

    outcome: Outcome
    detail: str
    again: bool = True
    dead: bool = True
    wait: float = 0.0


def read_body(content: bytes) -> Body | Fault:
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
    return body


def read_answer(content: bytes, *, logprobs: bool = False) -> CallRecord | Fault:
    """The record of an answer with status 200."""
    body = read_body(content)
    if isinstance(body, Fault):
        return body
    choice, usage = (body.choices or [])[0], body.usage or Usage()
    reply = well_formed(choice.message.content or choice.message.refusal or "")
    return CallRecord(
        reply=reply,
        finish_reason="refusal" if choice.message.refusal else choice.finish_reason,
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        tokens=score_tokens(reply, listed(choice)) if logprobs else None,
        created=now(),
    )


def listed(choice: Choice) -> list[Any]:
    """The tokens that came with a choice; none where the server gives none."""
    content = choice.logprobs.get("content") if isinstance(choice.logprobs, Mapping) else None
    return content if isinstance(content, list) else []


def score_tokens(reply: str, content: list[Any]) -> list[tuple[int, Token]] | None:
    """The tokens of the score in a reply, as `tokens_of_score` has them; None where they cannot be told.

    From the key "score" on, the tokens must make up the reply. What stands before may differ: servers keep a model's
    thinking from the reply and list its tokens all the same; and so may an end mark behind.
    """
    if (span := score_span(reply)) is None or not content:
        return None
    key = reply.rfind('"score"', 0, span[0])
    if (texts := _texts(content)) is None or key < 0:
        return None
    whole = "".join(text for text, _ in texts)
    at = whole.rfind(reply[key:])
    if at < 0 or not END_MARK.fullmatch(whole[at + len(reply) - key :]):
        return None
    tokens: list[Token] = []
    start = key - at  # where in the reply a token begins
    for (text, pending), entry in zip(texts, content, strict=True):
        if start + len(text) > key:
            try:
                written = Written.model_validate(entry)
            except ValidationError:
                return None
            if start < 0:
                return None
            tokens = tokens or [((reply[:start], 0.0),)]  # all before as one
            tokens.append(((text, min(written.logprob, 0.0)), *_others(written, pending)))
        start += len(text)
    return tokens_of_score(reply, tokens)


def _texts(content: list[Any]) -> list[tuple[str, bytes]] | None:
    """Each token's text, with the bytes before it of a character that ends in it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = []
    for entry in content:
        try:
            token, raw = entry["token"], entry.get("bytes")
            pending = decoder.getstate()[0]
            texts.append((decoder.decode(token.encode(errors="replace") if raw is None else bytes(raw)), pending))
        except (TypeError, KeyError, AttributeError, ValueError):
            return None
    return texts


def _others(written: Written, pending: bytes) -> list[tuple[str, float]]:
    """The alternatives of a token, without itself."""
    others = list(written.top_logprobs)
    same = next((one for one in others if (one.token, one.bytes) == (written.token, written.bytes)), None)
    if same is not None:
        others.remove(same)
    return [((pending + bytes(one.raw)).decode(errors="ignore"), min(one.logprob, 0.0)) for one in others]


def status_fault(error: APIStatusError) -> Fault:
    """What a status of 4xx or 5xx means."""
    status, text = error.status_code, said(error)
    why = f"{error.code} {error.type} {error.message}".casefold()  # not all that is said, which may repeat the prompt
    if status in {400, 403, 422} and any(word in why for word in FILTERS):
        return Fault(outcome=Outcome.REFUSED, detail=text, again=False, dead=False)
    if status in {401, 403}:
        return Fault(
            outcome=Outcome.TRANSPORT, detail=f"the server refuses the api_key: {text}", again=False, dead=False
        )
    again = status in RETRIED or status >= 500
    wait = retry_after(error.response.headers) if again else 0.0
    return Fault(outcome=Outcome.TRANSPORT, detail=text, again=again, dead=status >= 500, wait=wait)


def broken_fault(error: BaseException) -> Fault:
    """What it means that an answer did not come whole."""
    inner = root(error)
    outcome = Outcome.TIMEOUT if isinstance(inner, TimeoutError) else Outcome.TRANSPORT
    return Fault(outcome=outcome, detail=line(inner))


def said(error: APIStatusError) -> str:
    """A status and what the server says to it, in one line."""
    text = error.message.removeprefix(f"Error code: {error.status_code}").lstrip(" -") or error.body
    return one_line(f"status {error.status_code}: {text or 'no more said'}")


def words(error: APIStatusError) -> str:
    """All that a server says to a status, for looking up words in lower case."""
    return f"{error.code} {error.type} {error.param} {error.message} {str(error.body)[:2000]}".casefold()


def retry_after(headers: Mapping[str, str]) -> float:
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


def root(error: BaseException) -> BaseException:
    """The innermost cause of a transport error: the library calls a refused connection a timeout."""
    while isinstance(error, APIConnectionError | httpx2.HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def line(error: BaseException) -> str:
    """A transport error in one line."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return one_line(error.os_error.strerror or error.os_error)
    return one_line(str(error) or type(error).__name__)
