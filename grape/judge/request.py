"""How a judge is asked: sampling, addresses with their limits, price and budget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from grape.types import Strict

RESERVED = {"model", "messages", "stream", "n"}  # what the client itself decides

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
PerMinute = Annotated[int, Field(ge=1)]
ONE_OR_MANY = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})


def many(value: Any) -> Any:
    """One as a list of one."""
    return [value] if isinstance(value, str) else value


def addresses(value: Any) -> Any:
    """An address, or several, each as the mapping of an `Endpoint`."""
    value = [value] if isinstance(value, str | Mapping) else value
    return [{"url": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


class Sampling(Strict):
    """What is sent beside the messages, in the server's own words; null leaves a field out of the request."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = 1024
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(many), ONE_OR_MANY] | None = None
    reasoning_effort: str | None = None
    extra_body: dict[str, Any] = {}

    @field_validator("extra_body")
    @classmethod
    def _plain(cls, body: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(RESERVED & set(body)):
            raise ValueError(f"{taken[0]!r} is set by the judge itself")
        try:
            json.dumps(body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"not plain data: {error}") from None
        return body

    def params(self) -> dict[str, Any]:
        """The request's fields, without those that are left out."""
        params = {key: value for key, value in self.model_dump().items() if value is not None and value != {}}
        if "max_completion_tokens" in params and "max_tokens" not in self.model_fields_set:
            params.pop("max_tokens", None)  # two names for one limit: the one that was asked for
        return params


class Price(Strict):
    """What a million tokens cost."""

    input: Amount = 0.0
    output: Amount = 0.0


class Budget(Strict):
    """What a run may spend on a judge: tokens read and written, and money by its price."""

    tokens: Annotated[int, Field(ge=1)] | None = None
    cost: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Budget:
        if self.tokens is None and self.cost is None:
            raise ValueError("needs tokens or cost")
        return self


class Endpoint(Strict):
    """One address of a judge; what is left out here is as the judge has it."""

    url: str
    api_key: str | None = None
    concurrency: Annotated[int, Field(ge=1)] | None = None
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    timeout: Seconds | None = None


def is_url(text: str) -> bool:
    """Whether ``text`` is an address of HTTP."""
    try:
        parts = urlsplit(text)
        return (
            parts.scheme in {"http", "https"}
            and bool(parts.hostname)
            and parts.port != 0
            and text.isprintable()
            and " " not in text
        )
    except ValueError:  # a port that is no number, a broken IPv6 address
        return False


_ONE = {"anyOf": [{"type": "string"}, Endpoint.model_json_schema()]}
# The addresses of a judge, as a file may give them.
Endpoints = Annotated[
    list[Endpoint],
    Field(min_length=1),
    BeforeValidator(addresses),
    WithJsonSchema({"anyOf": [*_ONE["anyOf"], {"type": "array", "items": _ONE, "minItems": 1}]}),
]
