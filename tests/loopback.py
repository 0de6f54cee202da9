"""An OpenAI-compatible server on loopback whose behaviour is a function: what tests of judges talk to."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the server does with one request: a chat completion with ``text``, or one of the faults."""

    text: str | None = ""
    finish_reason: str = "stop"
    refusal: str | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None  # instead of a chat completion
    cut: bool = False  # promise the whole body, send half, and hang up
    hang: bool = False  # say nothing until the server is closed
    raw: bytes | None = None  # these bytes instead of HTTP
    delay: float = 0.0
    logprobs: Any = None  # of the completion's tokens: `spelt`
    usage: Mapping[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 20})


Behaviour = Callable[[dict[str, Any], int], Answer | str]


def verdict(score: Any = 1.0, confidence: Any = 0.9, reasoning: Any = "because") -> str:
    """The text of a judge's reply in our form."""
    return json.dumps({"reasoning": reasoning, "score": score, "confidence": confidence})


def spelt(*tokens: Any) -> dict[str, Any]:
    """The log-probabilities of tokens: each is a text (certain), or the text that was written with all that might have
    been and their probabilities."""
    return {"content": [_token(*(one if isinstance(one, tuple) else (one, {one: 1.0}))) for one in tokens]}


def _token(text: str, shares: Mapping[str, float]) -> dict[str, Any]:
    def one(text: str) -> dict[str, Any]:
        return {"token": text, "logprob": math.log(shares[text]), "bytes": list(text.encode())}

    return {**one(text), "top_logprobs": [one(other) for other in shares]}


def user_text(body: Mapping[str, Any]) -> str:
    """What the request asks: the text of its first user message."""
    return next(message["content"] for message in body["messages"] if message["role"] == "user")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 512


class JudgeServer:
    """A server for the length of a `with`. ``bodies`` and ``headers`` (names in lower case) hold what was asked.

    ``behaviour(body, number)`` gets each request's JSON and its number, from 0, and says what comes back. ``models``
    are those that it lists, or what it does where it is asked for them.
    """

    def __init__(self, behaviour: Behaviour | None = None, models: Sequence[str] | Answer = ()) -> None:
        self.models = models
        self.behaviour: Behaviour = behaviour or (lambda body, number: verdict())
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def url(self) -> str:
        """The endpoint that goes into a judge's file."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(headers)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            answer = self.behaviour(body, number)
            answer = Answer(text=answer) if isinstance(answer, str) else answer
            if answer.hang:
                self._closing.wait(60)
            time.sleep(answer.delay)
            return answer
        finally:
            with self._lock:
                self._at_once -= 1

    def _handler(outer) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                models = outer.models
                if not isinstance(models, Answer):
                    data = [{"id": name, "object": "model"} for name in models]
                    models = Answer(body=json.dumps({"object": "list", "data": data}).encode())
                if models.hang:
                    outer._closing.wait(60)
                self.send(models)

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                self.send(
                    outer._answer(
                        json.loads(self.rfile.read(length)),
                        {name.lower(): value for name, value in self.headers.items()},
                    )
                )

            def send(self, answer: Answer) -> None:
                content = completion(answer) if answer.body is None else answer.body
                try:
                    if answer.raw is not None or answer.hang:
                        self.wfile.write(answer.raw or b"")
                        self.close_connection = True
                        return
                    self.send_response(answer.status)
                    for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2] if answer.cut else content)
                    self.close_connection = self.close_connection or answer.cut
                except OSError:  # the client did not wait
                    self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


def completion(answer: Answer) -> bytes:
    """The body of a chat completion."""
    if answer.status != 200:
        return json.dumps({"error": {"message": "told to fail", "type": "fault", "code": None}}).encode()
    message = {"role": "assistant", "content": answer.text, "refusal": answer.refusal}
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": answer.logprobs}
    whole = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    whole |= {"usage": answer.usage} if answer.usage else {}
    return json.dumps(whole).encode()
