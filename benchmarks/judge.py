"""What judging costs: the rate at 64 calls in flight, and the scoring phase of a training step under faults.

    python benchmarks/judge.py rate [--calls 4000] [--latency 0.05] [--profile]
    python benchmarks/judge.py phase [--arms loop gather verifiers ours] [--failures 0 0.02 0.1] [--seeds 1] [--scale 1]

`rate` asks a judge who takes 50 ms: the ideal is 64 / 0.05 = 1,280 calls a second. `phase` is 64 responses x 8 items
under log-normal latency (median 200 ms), with 1 % of all attempts hanging. Each arm meets the same server, in a process
of its own, and the same fate for the same attempt. The arms:

    loop       one call after the other by the openai client; what fails is worth 0
    gather     all calls at once by the same client; what fails is worth 0
    verifiers  the rubric judge of `verifiers`, by its interpreter: --verifiers PYTHON
    ours       `grape.score`, timeout 2 s, retries 3, with a log

The openai client gets the same timeout of 2 s and retries as often as it does by itself; without a timeout it waits ten
minutes for a call that hangs.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import math
import os
import pstats
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import duckdb
from mock_judge import truth

import grape
from grape.judge.call import Call, call_key
from grape.judge.config import parse_judge
from grape.judge.openai import OpenAIClient

RESPONSES, ITEMS = 64, 8
TIMEOUT, RETRIES, IN_FLIGHT = 2.0, 3, 64
MEDIAN, SPREAD, HANGS = 0.2, 0.5, 0.01
HERE = Path(__file__).resolve().parent
T95 = {5: 2.776, 10: 2.262, 20: 2.093}  # Student's t, two-sided, by the number of seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What an arm made of it: its rewards by response (None: none), and what it took."""

    seconds: float
    calls: int
    rewards: dict[int, float | None]
    failed: int | None = None  # verdicts; None where the arm cannot tell
    typed: int | None = None
    again: int | None = None  # calls of a second pass


@contextmanager
def judge(**options: float) -> Iterator[str]:
    """The address of a mock judge in a process of its own."""
    flags = [f"--{name}={value}" for name, value in options.items()]
    process = subprocess.Popen(
        [sys.executable, str(HERE / "mock_judge.py"), *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.kill()
        process.wait()


def figures(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/figures") as answer:
        return json.load(answer)  # type: ignore[no-any-return]


def rows(responses: int) -> list[dict[str, str]]:
    return [
        {"question_id": f"q{n // 8}", "category": "bench", "question": f"Question {n // 8}?", "response_id": str(n),
         "response": f"Response number {n}. " + "It goes on for a while, as responses do. " * 8}
        for n in range(responses)
    ]  # fmt: skip


def project(folder: Path, url: str, **settings: Any) -> dict[str, Any]:
    """The files of a run, and the arguments of `grape.score`."""
    items = [{"id": f"i{n}", "criterion": f"Criterion number {n} holds.", "judge": "j"} for n in range(ITEMS)]
    (folder / "bench.yaml").write_text(json.dumps({"rubric": "bench", "formula": "weighted", "items": items}))
    fields = {
        "judge": "j",
        "endpoint": url,
        "model": "m",
        "timeout": TIMEOUT,
        "retries": RETRIES,
        "concurrency": IN_FLIGHT,
    }
    (folder / "j.yaml").write_text(json.dumps({**fields, **settings}))
    return {"rubrics": folder / "bench.yaml", "judges": {"j": folder / "j.yaml"}, "log": folder / "log.duckdb"}


def rate(calls: int, latency: float, profile: bool) -> None:
    """Calls per second with 64 in flight, by the bare client and by all of `grape.score`."""
    ideal = IN_FLIGHT / latency
    print(f"{calls} calls of {1e3 * latency:.0f} ms, {IN_FLIGHT} in flight: ideal {ideal:,.0f} calls/s")
    for name, run in {"the bare client": bare, "grape.score with a log": full}.items():
        with judge(latency=latency) as url, tempfile.TemporaryDirectory() as folder:
            profiler = cProfile.Profile() if profile else None
            cpu, begun = time.process_time(), time.perf_counter()
            if profiler:
                profiler.enable()
            run(Path(folder), url, calls)
            if profiler:
                profiler.disable()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - begun
            found = figures(url)
            assert found["distinct"] == calls, found
        speed = calls / found["seconds"]
        print(f"  {name}: {speed:,.0f} calls/s, {speed / ideal:.1%} of the ideal; "
              f"in all {wall:.2f} s, {1e3 * cpu / calls:.2f} ms of CPU a call; {found['most_at_once']} at once; "
              f"load average {os.getloadavg()[0]:.1f}")  # fmt: skip
        if profiler:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def bare(folder: Path, url: str, calls: int) -> None:
    """The client alone: no prompt to fill, no reply to read, no log."""
    config = parse_judge({"judge": "j", "endpoint": url, "model": "m", "concurrency": IN_FLIGHT}, "j.yaml")

    async def main() -> None:
        client = OpenAIClient(config)
        work = iter(range(calls))

        async def worker() -> None:
            for n in work:
                text = f"Response number {n // ITEMS}.\nCriterion number {n % ITEMS} holds. " + "As prompts do. " * 200
                messages = ({"role": "user", "content": text},)
                key = call_key("m", {}, messages, form="json")
                call = Call(key=key, judge="j", model="m", purpose="score", messages=messages, sampling={},
                            response_id=str(n // ITEMS), item=f"i{n % ITEMS}")  # fmt: skip
                assert (await client.ask(call)).reply

        await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
        await client.close()

    asyncio.run(main())


def full(folder: Path, url: str, calls: int) -> None:
    asyncio.run(grape.score(rows(calls // ITEMS), **project(folder, url)))


# --- the scoring phase --------------------------------------------------------------------------------------------


def prompt(response: int, item: int) -> str:
    text = rows(response + 1)[response]["response"]
    return f"{text}\n\nCriterion number {item} holds.\n\nReply in JSON: reasoning, score from 0 to 1, confidence."


def loop(url: str, scale: float) -> dict[int, float | None]:
    """One after the other; what fails is worth 0."""
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none", timeout=TIMEOUT * scale)

    def scored(response: int, item: int) -> float:
        try:
            messages = [{"role": "user", "content": prompt(response, item)}]
            said = client.chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
            return float(json.loads(said.choices[0].message.content or "")["score"])
        except Exception:  # noqa: BLE001 - as such a loop does it
            return 0.0

    return {r: fmean(scored(r, i) for i in range(ITEMS)) for r in range(RESPONSES)}


def gather(url: str, scale: float) -> dict[int, float | None]:
    """All at once; what fails is worth 0."""
    from openai import AsyncOpenAI

    async def main() -> dict[int, float | None]:
        client = AsyncOpenAI(base_url=url, api_key="none", timeout=TIMEOUT * scale)

        async def scored(response: int, item: int) -> float:
            try:
                messages = [{"role": "user", "content": prompt(response, item)}]
                said = await client.chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
                return float(json.loads(said.choices[0].message.content or "")["score"])
            except Exception:  # noqa: BLE001 - as such a loop does it
                return 0.0

        pairs = [(r, i) for r in range(RESPONSES) for i in range(ITEMS)]
        async with client:
            scores = dict(zip(pairs, await asyncio.gather(*(scored(*pair) for pair in pairs)), strict=True))
        return {r: fmean(scores[r, i] for i in range(ITEMS)) for r in range(RESPONSES)}

    return asyncio.run(main())


def ours(url: str, scale: float) -> Done:
    """`grape.score`, twice: the second pass is a run of its own on the same log."""
    with tempfile.TemporaryDirectory() as name:
        options = project(Path(name), url, timeout=TIMEOUT * scale)
        begun = time.perf_counter()
        records = asyncio.run(grape.score(rows(RESPONSES), **options))
        seconds, calls = time.perf_counter() - begun, figures(url)["attempts"]
        with duckdb.connect(str(options["log"]), read_only=True) as log:
            outcomes = log.sql("select outcome, count(*) from verdicts where score is null group by 1").fetchall()
        asyncio.run(grape.score(rows(RESPONSES), resume=True, **options))
        return Done(
            seconds=seconds, calls=calls, rewards={int(r["response_id"]): r["reward"] for r in records},
            failed=sum(n for _, n in outcomes), typed=sum(n for outcome, n in outcomes if outcome != "ok"),
            again=figures(url)["attempts"] - calls,
        )  # fmt: skip


def verifiers(url: str, scale: float, interpreter: str) -> Done:
    """The rubric judge of `verifiers`, in its own environment; loading it, which takes long, is not counted."""
    arm = [interpreter, str(HERE / "verifiers_arm.py"), url, str(TIMEOUT * scale), str(ITEMS)]
    asked = json.dumps([row["response"] for row in rows(RESPONSES)])
    done = subprocess.run(arm, input=asked, capture_output=True, text=True, check=True)
    seconds, rewards = json.loads(done.stdout.splitlines()[-1])
    return Done(seconds=seconds, calls=figures(url)["attempts"], rewards=dict(enumerate(rewards)))


def phase(arm: str, failures: float, seed: int, scale: float, interpreter: str) -> Done:
    """One arm against a judge of its own."""
    with judge(latency=MEDIAN * scale, spread=SPREAD, failures=failures, hangs=HANGS, seed=seed) as url:
        if arm == "ours":
            return ours(url, scale)
        if arm == "verifiers":
            return verifiers(url, scale, interpreter)
        begun = time.perf_counter()
        rewards = {"loop": loop, "gather": gather}[arm](url, scale)
        return Done(seconds=time.perf_counter() - begun, calls=figures(url)["attempts"], rewards=rewards)


def errors(done: Done, seed: int) -> list[float]:
    """What each reward is off by."""
    right = {r: fmean(truth(seed, r, i) for i in range(ITEMS)) for r in range(RESPONSES)}
    return [reward - right[r] for r, reward in done.rewards.items() if reward is not None]


def interval(values: list[float]) -> str:
    """The mean over seeds, with its 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:+.4f}"
    half = T95.get(len(values), 1.96) * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):+.4f} ({fmean(values) - half:+.4f} to {fmean(values) + half:+.4f})"


def table(arms: list[str], failures: list[float], seeds: int, scale: float, interpreter: str) -> None:
    print(f"{RESPONSES} x {ITEMS}, log-normal latency (median {MEDIAN * scale:g} s), {HANGS:.0%} of attempts hang, "
          f"timeout {TIMEOUT * scale:g} s, {seeds} seeds")  # fmt: skip
    print(f"{'failures':>8}  {'arm':<9}  {'seconds':>14}  {'calls':>6}  {'bias':<28}  {'mean |off|':>10}  "
          f"{'exact':>6}  {'usable':>6}  {'failed, typed':>13}  second pass")  # fmt: skip
    for share in failures:
        for arm in arms:
            runs = [phase(arm, share, seed, scale, interpreter) for seed in range(seeds)]
            off = [errors(done, seed) for seed, done in enumerate(runs)]
            everything = [value for one in off for value in one]
            seconds = [done.seconds for done in runs]
            failed = sum(done.failed for done in runs if done.failed is not None)
            typed = sum(done.typed for done in runs if done.typed is not None)
            told = f"{failed}, {typed}" if runs[0].failed is not None else "cannot tell"
            again = sum(done.again for done in runs if done.again is not None) if runs[0].again is not None else "all"
            print(f"{share:>8.0%}  {arm:<9}  {fmean(seconds):>6.1f} (<= {max(seconds):.1f})  "
                  f"{fmean(done.calls for done in runs):>6.0f}  {interval([fmean(one) for one in off]):<28}  "
                  f"{fmean(map(abs, everything)):>10.4f}  {fmean(abs(v) < 1e-9 for v in everything):>6.1%}  "
                  f"{len(everything) / (RESPONSES * seeds):>6.1%}  {told:>13}  {again}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["rate", "phase"])
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--arms", nargs="+", default=["loop", "gather", "ours"])
    parser.add_argument("--failures", nargs="+", type=float, default=[0.0, 0.02, 0.1])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--verifiers", default=sys.executable, metavar="PYTHON")
    given = parser.parse_args()
    if "rate" in given.what:
        rate(given.calls, given.latency, given.profile)
    if "phase" in given.what:
        table(given.arms, given.failures, given.seeds, given.scale, given.verifiers)


if __name__ == "__main__":
    main()
