"""A judge's file: which model answers, where, under which prompt and sampling, and how its confidence is had."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from grape import resources
from grape.errors import ConfigError, invalid, known
from grape.item import Extensible
from grape.judge.calibration import Calibration, calibration_path, load_calibration
from grape.judge.reply import PARSERS
from grape.judge.request import Budget, Endpoint, Endpoints, PerMinute, Price, Sampling, Seconds, is_url
from grape.judge.spread import Aggregate
from grape.types import Name, Strict

CLIENTS = ("openai", "vllm", "transformers", "replay", "jury")
CONFIDENCES = ("verbal", "logprob", "votes", "agreement", "none")
NEEDS = {
    "openai": ("endpoint", "model"),
    "vllm": ("model",),
    "transformers": ("model",),
    "replay": ("replies",),
    "jury": ("judges",),
}
GOES_ONLY_WITH = {
    "parser": ("replay",),
    "replies": ("replay",),
    "batch": ("transformers", "vllm"),
    "dtype": ("transformers", "vllm"),
    "engine": ("vllm",),
    "budget": ("openai",),
    "endpoint": ("openai",),
    "json_schema": ("openai", "vllm", "replay"),
    "judges": ("jury",),
    "requests_per_minute": ("openai",),
    "tokens_per_minute": ("openai",),
}
NOT_WITH = {"jury": ("api_key", "concurrency", "model", "prompt", "retries", "sampling", "timeout", "price")}
SAMPLING_HERE = {"temperature", "top_p", "max_tokens", "seed"}  # of client transformers
# How a judge is asked, not what: it decides neither what a run is nor whether a calibration still holds.
TRANSPORT = {
    "endpoint", "api_key", "timeout", "retries", "concurrency", "price", "budget", "requests_per_minute",
    "tokens_per_minute",
}  # fmt: skip
VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", re.ASCII)
NO_URL = "is not an address such as http://localhost:8000/v1"


class Judge(Extensible):
    """One judge. ``endpoint``, ``api_key`` and ``model`` may be ``$NAME``, a variable of the environment.

    With clients transformers and vllm ``model`` is a folder (beside this file, or else where the command runs) or a
    name on the hub, and at most ``batch`` calls are decoded together (1, or with vllm 256): with 1, what is asked
    beside a call changes no bit of its reply. ``engine`` holds vLLM's own options, such as
    max_model_len. ``together``: one call asks about all items of a response.
    """

    judge: Name
    client: str = Field("openai", json_schema_extra={"enum": list(CLIENTS)})
    endpoint: Endpoints | None = None
    api_key: str | None = None
    model: str | None = None
    prompt: str = "score"
    sampling: Sampling = Sampling()
    together: bool = False
    json_schema: Literal["auto", "always", "never"] = "auto"
    confidence: str = Field("verbal", json_schema_extra={"enum": list(CONFIDENCES)})
    votes: Annotated[int, Field(ge=2, le=1000)] = 5
    aggregate: Aggregate = "mean"
    judges: Annotated[list[Name], Field(min_length=2)] | None = None
    timeout: Seconds = 60.0
    retries: Annotated[int, Field(ge=0, le=100)] = 3
    fallback: Name | None = None
    price: Price | None = None
    budget: Budget | None = None
    concurrency: Annotated[int, Field(ge=1)] = 64
    requests_per_minute: PerMinute | None = None
    tokens_per_minute: PerMinute | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch: Annotated[int, Field(ge=1)] | None = None
    engine: dict[str, Any] = {}
    replies: str | None = None
    parser: Literal["json", "rating", "label"] = "json"
    _source: str = PrivateAttr("")
    _hash: str = PrivateAttr("")
    _calibration: Calibration | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _default_confidence(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if data.get("client") == "jury":
            return {"confidence": "agreement", **data}
        parser = data.get("parser")
        foreign = isinstance(parser, str) and parser in PARSERS and parser != "json"
        return {"confidence": "none", **data} if foreign else data  # such replies state none

    @field_validator("client")
    @classmethod
    def _client(cls, name: str) -> str:
        return _offered("client", name, CLIENTS)

    @field_validator("confidence")
    @classmethod
    def _confidence(cls, name: str) -> str:
        return _offered("confidence", name, CONFIDENCES)

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, endpoints: list[Endpoint] | None) -> list[Endpoint] | None:
        for endpoint in endpoints or []:
            if not endpoint.url.startswith("$") and not is_url(endpoint.url):
                raise ValueError(f"{endpoint.url!r} {NO_URL}")
        if len({endpoint.url for endpoint in endpoints or []}) < len(endpoints or []):
            raise ValueError("an address stands twice")
        return endpoints

    @model_validator(mode="after")
    def _complete(self) -> Judge:
        if missing := [field for field in NEEDS[self.client] if getattr(self, field) is None]:
            raise ValueError(f".{missing[0]}: client {self.client!r} needs it")
        for field, clients in GOES_ONLY_WITH.items():
            if field in self.model_fields_set and self.client not in clients:
                raise ValueError(f".{field}: goes only with client: {' or '.join(clients)}")
        if extra := sorted(self.model_fields_set.intersection(NOT_WITH.get(self.client, ()))):
            raise ValueError(f".{extra[0]}: does not go with client: {self.client}; each of its judges has its own")
        if self.client in {"transformers", "vllm"} and self.sampling.max_tokens is None:
            raise ValueError(f".sampling.max_tokens: client {self.client!r} needs it")
        if self.client == "transformers" and (unknown := sorted(set(self.sampling.params()) - SAMPLING_HERE)):
            raise ValueError(f".sampling.{unknown[0]}: client {self.client!r} has {', '.join(sorted(SAMPLING_HERE))}")
        if self.budget and self.budget.cost is not None and self.price is None:
            raise ValueError(".budget.cost: needs a price, by which the cost is counted")
        self._sure()
        for name, value in self._outside():
            if value and value.startswith("$") and not VARIABLE.fullmatch(value):
                raise ValueError(f".{name}: {value!r} is not the name of an environment variable")
        return self

    def _sure(self) -> None:
        """See that the confidence that is asked for can be had (ValueError)."""
        if (self.confidence == "agreement") != (self.client == "jury") and self.confidence != "none":
            raise ValueError(f".confidence: {self.confidence!r} does not go with client {self.client!r}")
        if self.confidence == "logprob" and self.client == "replay":
            raise ValueError(".confidence: 'logprob' does not go with client 'replay', which stores no probabilities")
        if self.parser != "json" and self.confidence not in {"none", "votes"}:
            raise ValueError(
                f".confidence: {self.confidence!r} is not available with parser {self.parser!r}; use none or votes"
            )
        if self.together and (self.client in {"replay", "jury"} or self.confidence not in {"verbal", "none"}):
            raise ValueError(".together: goes with confidence verbal or none, and not with clients replay and jury")
        if "votes" in self.model_fields_set and self.confidence != "votes":
            raise ValueError(".votes: goes only with confidence: votes")
        if self.confidence == "votes" and self.client != "replay" and not self.sampling.temperature:
            raise ValueError(
                ".sampling.temperature: votes need one above 0: without, one reply is repeated, and its agreement with "
                "itself is no confidence"
            )
        if "aggregate" in self.model_fields_set and self.confidence not in {"votes", "logprob", "agreement"}:
            raise ValueError(".aggregate: goes only with confidence: votes, logprob or agreement")

    def _outside(self) -> list[tuple[str, str | None]]:
        """The fields that may name a variable of the environment, with their values."""
        endpoints = self.endpoint or []
        own = [("api_key", self.api_key), ("model", self.model)]
        return [("endpoint", one.url) for one in endpoints] + [("api_key", one.api_key) for one in endpoints] + own

    @property
    def source(self) -> str:
        """The file it was read from."""
        return self._source

    @property
    def hash(self) -> str:
        """The content hash of that file."""
        return self._hash

    @property
    def endpoints(self) -> list[Endpoint]:
        """The addresses with all that holds for each, variables filled in (ConfigError where one is not set)."""
        return [self._filled(endpoint) for endpoint in self.endpoint or []]

    def _filled(self, endpoint: Endpoint) -> Endpoint:
        url = self._fill("endpoint", endpoint.url)
        if not is_url(url):
            raise ConfigError(f"{self.source}: endpoint: {url!r} {NO_URL}")
        key = self.api_key if endpoint.api_key is None else endpoint.api_key
        key = None if key is None else self._fill("api_key", key)
        if key and not (key.isascii() and key.isprintable()):
            raise ConfigError(f"{self.source}: api_key: holds characters that no HTTP header can carry")
        limits = {
            name: getattr(self, name) if getattr(endpoint, name) is None else getattr(endpoint, name)
            for name in ("concurrency", "requests_per_minute", "tokens_per_minute", "timeout")
        }
        return Endpoint(url=url, api_key=key, **limits)

    @property
    def model_name(self) -> str:
        """The model, the variable filled in; the judge's own name where a replay judge names none."""
        return self.judge if self.model is None else self._fill("model", self.model)

    @property
    def form(self) -> str:
        """What decides a reply, or how it is read, beside model, sampling and messages."""
        if self.client not in {"transformers", "vllm"}:
            return f"{self.parser}{' logprob' * (self.confidence == 'logprob')}"
        return f"{self.parser} {self.dtype}{' logprob' * (self.confidence == 'logprob')}"

    @property
    def verbal(self) -> bool:
        """Whether the judge is asked to state its confidence."""
        return self.confidence == "verbal"

    @property
    def schemed(self) -> bool:
        """Whether the server is (or was, where its replies are stored) asked to hold its reply to a JSON schema."""
        return self.client in {"openai", "vllm", "replay"} and self.parser == "json" and self.json_schema != "never"

    @property
    def calibration(self) -> Calibration | None:
        """What maps its confidence to how often it is right, where `grape calibrate` has fitted that."""
        return self._calibration

    @property
    def identity(self) -> str:
        """A hash of what decides its verdicts, its prompt's text included, but not how it is reached."""
        text = resources.read_text(resources.find("prompts", self.prompt))
        return hashlib.sha256(f"{self.model_dump_json(exclude=TRANSPORT)}{text}".encode()).hexdigest()

    def _fill(self, field: str, value: str) -> str:
        if not (match := VARIABLE.fullmatch(value)):
            return value
        name = match[1] or match[2]
        filled = os.environ.get(name, "").strip()
        if not filled:
            raise ConfigError(f"{self.source}: {field}: environment variable {name} is not set")
        return filled


def _offered(field: str, name: str, there: tuple[str, ...]) -> str:
    if name not in there:
        raise ValueError(f"no {field} {name!r}; {known(there, name)}")
    return name


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
    calibration = load_calibration(path)
    if calibration is not None and calibration.identity != judge.identity:
        raise ConfigError(
            f"{calibration_path(path)}: was fitted before {path.name} or its prompt was changed: "
            "remove it, score again and run grape calibrate anew"
        )
    judge._calibration = calibration
    return judge
