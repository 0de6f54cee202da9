"""Where a judge is asked: what every client offers, and which one a judge's file names."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from grape.judge.call import Call, CallRecord
from grape.judge.config import Judge
from grape.judge.limits import Meter


class Client(Protocol):
    """Where a judge is asked. ``shown``: the prompts are sent (else only response and item identify the call).

    `reach` is told the endpoints that have answered this judge before, which need no question to try them.
    """

    shown: bool

    async def ask(self, call: Call) -> CallRecord: ...

    def repairs(self, call: Call) -> bool: ...

    async def reach(self, known: Collection[str | None]) -> None: ...

    async def close(self) -> None: ...


def open_client(judge: Judge, meter: Meter) -> Client:
    """The client that a judge's file names; it keeps to the budget on ``meter``."""
    if judge.client == "replay":
        from grape.judge.replay import ReplayClient

        return ReplayClient(judge)
    if judge.client in {"transformers", "vllm"}:
        from grape.judge.local import LocalClient

        return LocalClient(judge)
    from grape.judge.openai import OpenAIClient  # loads the openai package, which takes a while

    return OpenAIClient(judge, meter=meter)
