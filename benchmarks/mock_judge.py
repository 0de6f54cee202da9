"""A judge on loopback with the latencies and faults of a real one: `python benchmarks/mock_judge.py --latency 0.05`.

It prints its port and serves until its input is closed. What it thinks of a response is drawn from the numbers in the
prompt (`Response number 3`, `Criterion number 2`) and the seed, and so is what befalls each attempt: two arms that ask
the same meet the same. `GET /figures` tells what was asked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

ASKED = re.compile(r"Response number (\d+)\b.*?Criterion number (\d+)\b", re.DOTALL)
LISTED = re.compile(r"^- (\w+): Criterion number (\d+)\b", re.MULTILINE)  # as `verifiers` lists criteria
FAULTS = ("500", "429", "prose", "cut off", "hung up")


def truth(seed: int, response: int, item: int) -> float:
    """The score that the judge gives where nothing befalls him: a tenth of 1, so that labels can say it too."""
    return random.Random(f"truth {seed} {response} {item}").randrange(11) / 10


@dataclass(slots=True, kw_only=True)
class Mock:
    """How it behaves, and what it has seen."""

    latency: float
    spread: float
    failures: float
    hangs: float
    seed: int
    attempts: Counter[tuple[int, int]] = field(default_factory=Counter)
    at_once: int = 0
    most_at_once: int = 0
    first: float = 0.0
    last: float = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                length = re.search(r"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                if head.startswith("GET"):
                    self.send(writer, 200, self.figures() if "/figures" in head else {"object": "list", "data": []})
                elif not await self.judge(writer, body):
                    break
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def figures(self) -> dict[str, float]:
        """What was asked: attempts, distinct questions, most at once, seconds from the first to the last answer."""
        return {"attempts": self.attempts.total(), "distinct": len(self.attempts), "most_at_once": self.most_at_once,
                "seconds": self.last - self.first}  # fmt: skip

    async def judge(self, writer: asyncio.StreamWriter, body: bytes) -> bool:
        """Answer, or fail; whether the connection lives on."""
        messages = json.loads(body)["messages"]  # a repair question stands behind the one that it repairs
        prompt = next(message["content"] for message in messages if message["role"] == "user")
        found, listed = ASKED.search(prompt), LISTED.findall(prompt)
        if not found:  # a probe of what the server can do
            self.send(writer, 200, completion('{"reasoning": "A probe.", "score": 1, "confidence": 1}'))
            return True
        asked = (int(found[1]), int(found[2]))
        self.first = self.first or time.monotonic()
        self.attempts[asked] += 1
        lots = random.Random(f"fate {self.seed} {asked} {self.attempts[asked]}")
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            lot, fault = lots.random(), lots.choice(FAULTS)
            if lot < self.hangs:
                await asyncio.sleep(3600)
            await asyncio.sleep(self.latency * math.exp(lots.gauss(0, self.spread)) if self.spread else self.latency)
            return self.answer(writer, asked, fault if lot < self.hangs + self.failures else None, listed)
        finally:
            self.at_once -= 1
            self.last = time.monotonic()

    def answer(
        self, writer: asyncio.StreamWriter, asked: tuple[int, int], fault: str | None, listed: list[tuple[str, str]]
    ) -> bool:
        """A verdict, or what became of it; several in the form of `verifiers` where criteria are listed."""
        reasoning = f"Response {asked[0]} was read, and criterion {asked[1]} was held against it, step by step."
        score = truth(self.seed, *asked)
        text = json.dumps({"reasoning": reasoning, "score": score, "confidence": 0.9})
        if listed:
            scores = {name: truth(self.seed, asked[0], int(number)) for name, number in listed}
            said = [{"name": name, "reason": reasoning, "verdict": f"{one:.1f}"} for name, one in scores.items()]
            text = json.dumps({"verdicts": said})
        if fault == "hung up":
            return False
        if fault in {"500", "429"}:
            self.send(writer, int(fault), {"error": {"message": "told to fail", "type": "fault"}})
        else:
            self.send(
                writer, 200, completion({"prose": "It is rather good.", "cut off": text[:40]}.get(fault or "", text))
            )
        return True

    def send(self, writer: asyncio.StreamWriter, status: int, data: dict[str, object] | dict[str, float]) -> None:
        body = json.dumps(data).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)


def completion(text: str) -> dict[str, object]:
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 700, "completion_tokens": 40, "total_tokens": 740}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


async def main(mock: Mock) -> None:
    server = await asyncio.start_server(mock.serve, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"latency": 0.2, "spread": 0.0, "failures": 0.0, "hangs": 0.0}.items():
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(main(Mock(**vars(parser.parse_args()))))
