"""A judge's file: which model answers, where, under which prompt and sampling, and how its confidence is had."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from grape import resources
from grape.errors import ConfigError, invalid, known
from grape.item import Extensible
from grape.judge.reply import PARSERS
from grape.types import Name, Strict

CLIENTS = ("openai", "transformers", "replay")
CLIENTS_TO_COME = ("vllm",)
CONFIDENCES = ("verbal", "logprob", "none")
CONFIDENCES_TO_COME = ("votes", "agreement")
NEEDS = {"openai": ("endpoint", "model"), "transformers": ("model",), "replay": ("replies",)}
GOES_ONLY_WITH = {"replay": ("parser", "replies"), "transformers": ("batch", "dtype")}
SAMPLING_HERE = {"temperature", "top_p", "max_tokens", "seed"}  # of client transformers
VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", re.ASCII)
RESERVED = {"model", "messages", "stream", "n"}  # what the client itself decides

NO_URL = "is not an address such as http://localhost:8000/v1"

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


ONE_OR_MANY = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})


def _many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Sampling(Strict):
    """What is sent beside the messages, in the server's own words; null leaves a field out of the request."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = 1024
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_many), ONE_OR_MANY] | None = None
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


class Judge(Extensible):
    """One judge. ``endpoint``, ``api_key`` and ``model`` may be ``$NAME``, a variable of the environment.

    With client transformers ``model`` is a folder (beside this file, or else where the command runs) or a name on the
    hub, and ``batch`` calls are decoded together: with 1, what is asked beside a call changes no bit of its reply.
    """

    judge: Name
    client: str = Field("openai", json_schema_extra={"enum": list(CLIENTS)})
    endpoint: Annotated[list[str], Field(min_length=1), BeforeValidator(_many), ONE_OR_MANY] | None = None
    api_key: str | None = None
    model: str | None = None
    prompt: str = "score"
    sampling: Sampling = Sampling()
    confidence: str = Field("verbal", json_schema_extra={"enum": list(CONFIDENCES)})
    timeout: Seconds = 60.0
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    fallback: Name | None = None
    price: Price | None = None
    concurrency: Annotated[int, Field(ge=1)] = 64
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch: Annotated[int, Field(ge=1)] = 1
    replies: str | None = None
    parser: Literal["json", "rating", "label"] = "json"
    _source: str = PrivateAttr("")
    _hash: str = PrivateAttr("")

    @model_validator(mode="before")
    @classmethod
    def _default_confidence(cls, data: Any) -> Any:
        parser = data.get("parser") if isinstance(data, Mapping) else None
        foreign = isinstance(parser, str) and parser in PARSERS and parser != "json"
        return {"confidence": "none", **data} if foreign else data  # such replies state none

    @field_validator("client")
    @classmethod
    def _client(cls, name: str) -> str:
        return _offered("client", name, CLIENTS, CLIENTS_TO_COME)

    @field_validator("confidence")
    @classmethod
    def _confidence(cls, name: str) -> str:
        return _offered("confidence", name, CONFIDENCES, CONFIDENCES_TO_COME)

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, urls: list[str] | None) -> list[str] | None:
        for url in urls or []:
            if not url.startswith("$") and not _is_url(url):
                raise ValueError(f"{url!r} {NO_URL}")
        return urls

    @model_validator(mode="after")
    def _complete(self) -> Judge:
        if missing := [field for field in NEEDS[self.client] if getattr(self, field) is None]:
            raise ValueError(f".{missing[0]}: client {self.client!r} needs it")
        for client, fields in GOES_ONLY_WITH.items():
            if self.client != client and (extra := sorted(self.model_fields_set.intersection(fields))):
                raise ValueError(f".{extra[0]}: goes only with client: {client}")
        if self.client == "transformers":
            if unknown := sorted(set(self.sampling.params()) - SAMPLING_HERE):
                raise ValueError(
                    f".sampling.{unknown[0]}: client {self.client!r} has {', '.join(sorted(SAMPLING_HERE))}"
                )
            if self.sampling.max_tokens is None:
                raise ValueError(f".sampling.max_tokens: client {self.client!r} needs it")
        elif self.confidence == "logprob":
            raise ValueError(".confidence: 'logprob' goes only with client: transformers")
        if self.parser != "json" and self.confidence != "none":
            raise ValueError(f".confidence: {self.confidence!r} is not available with parser {self.parser!r}; use none")
        for field, values in {"endpoint": self.endpoint, "api_key": [self.api_key], "model": [self.model]}.items():
            for value in values or []:
                if value and value.startswith("$") and not VARIABLE.fullmatch(value):
                    raise ValueError(f".{field}: {value!r} is not the name of an environment variable")
        return self

    @property
    def source(self) -> str:
        """The file it was read from."""
        return self._source

    @property
    def hash(self) -> str:
        """The content hash of that file."""
        return self._hash

    @property
    def endpoints(self) -> list[str]:
        """The addresses, variables filled in (ConfigError where one is not set)."""
        urls = [self._fill("endpoint", url) for url in self.endpoint or []]
        for url in urls:
            if not _is_url(url):
                raise ConfigError(f"{self.source}: endpoint: {url!r} {NO_URL}")
        return urls

    @property
    def key(self) -> str | None:
        """The API key, the variable filled in (ConfigError where it is not set). Never logged."""
        key = None if self.api_key is None else self._fill("api_key", self.api_key)
        if key and not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{self.source}: api_key: holds characters that no HTTP header can carry")
        return key

    @property
    def model_name(self) -> str:
        """The model, the variable filled in; the judge's own name where a replay judge names none."""
        return self.judge if self.model is None else self._fill("model", self.model)

    @property
    def form(self) -> str:
        """What decides a reply, or how it is read, beside model, sampling and messages."""
        if self.client != "transformers":
            return self.parser
        return f"{self.parser} {self.dtype}{' logprob' * (self.confidence == 'logprob')}"

    @property
    def verbal(self) -> bool:
        """Whether the judge is asked to state its confidence."""
        return self.confidence == "verbal"

    def _fill(self, field: str, value: str) -> str:
        if not (match := VARIABLE.fullmatch(value)):
            return value
        name = match[1] or match[2]
        filled = os.environ.get(name, "").strip()
        if not filled:
            raise ConfigError(f"{self.source}: {field}: environment variable {name} is not set")
        return filled


def _offered(field: str, name: str, there: tuple[str, ...], to_come: tuple[str, ...]) -> str:
    if name in there:
        return name
    if name in to_come:
        raise ValueError(f"{name!r} is not available in this version; available: {', '.join(there)}")
    raise ValueError(f"no {field} {name!r}; {known(there, name)}")


def _is_url(text: str) -> bool:
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


def parse_judge(data: Any, source: str) -> Judge:
    """A judge from plain data. What is wrong is a `ConfigError` of one line."""
    try:
        judge = Judge.model_validate(data)
    except ValidationError as error:
        inner = error.errors(include_url=False)[0]["loc"]
        part: dict[object, type[Strict]] = {"sampling": Sampling, "price": Price} if len(inner) > 1 else {}
        fields = sorted(
            name for name in part.get(inner[0] if inner else "", Judge).model_fields if name != "extensions"
        )
        raise invalid(source, error, fields) from error
    judge._source = source
    return judge


def load_judge(name: str | Path) -> Judge:
    """The judge of a name or a file, with its source and content hash.

    A ``prompt`` that names a file may stand beside the judge's own.
    """
    path = resources.find("judges", name)
    text = resources.read_text(path)
    data = resources.read_yaml(path, text)
    prompt = data.get("prompt") if isinstance(data, dict) else None
    if isinstance(prompt, str) and prompt.endswith(".jinja") and resources.is_file(path.parent / prompt):
        data["prompt"] = str(path.parent / prompt)
    judge = parse_judge(data, str(path))
    judge._hash = resources.digest(text)
    return judge
