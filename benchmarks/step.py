"""What of a training step is the model's own arithmetic: a real run of `grape train`, phase by phase.

    python benchmarks/step.py [--quick] [--steps 5] [--warmup 2] [--threads 2] [--judge replay|loopback]

A Qwen3 of 15 million random weights (384 wide, 8 layers, 2,048 words), 8 questions of 16 to 64 tokens x 8 responses of
at most 64 tokens, a rubric of five checkers and two judged items, float32, the log and the journal on disk. The judge
answers at once: from stored replies, or (loopback) over HTTP from a process of its own.

The model's own arithmetic is what is spent inside these calls, and nothing else:

    the forward pass of the transformer, prompts and single tokens alike, in sampling and in the update
    the head: states to logits in sampling; to log-probabilities and entropies (`token_logprobs`) in the update
    the backward pass
    the step of AdamW

So masks, caches and Python inside a forward pass count as the model's own, as transformers makes them; drawing tokens,
text, verdicts, rewards, rows, files, packing, the loss, and clipping do not. Phases follow one another: `judge` is what
is still to be judged when the last response has been sampled (the rest is judged meanwhile, in `sample`), and the log's
thread stores rows in the background of any phase. Wall seconds, and CPU seconds of all threads; of the own arithmetic,
CPU seconds without what other Python threads spent meanwhile. Medians of the steps after the warmup. The cost of
measuring is what as many empty calls take to measure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall the others
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from arms import Shape, make_model, table

SHAPE = Shape(hidden=384, layers=8, heads=6, kv_heads=3, head_dim=64, intermediate=1152, vocab=2048, ends=16)
SMALL = Shape(hidden=96, layers=3, heads=4, kv_heads=4, head_dim=24, intermediate=256, vocab=1024, ends=8)
PHASES = ("sample", "judge", "settle", "journal", "update", "log", "rest")
OWN = ("forward", "head", "backward", "AdamW")
RUBRIC = """
rubric: words
category: words
items:
  - {id: not-empty, criterion: Has a word., weight: 1, check: regex, with: {pattern: '\\w'}, gate: {at_least: 1}}
  - {id: short, criterion: Has at most 60 words., weight: 1, check: length, with: {max: 60}}
  - {id: seven, criterion: Has a word that ends with 77., weight: 2, check: regex, with: {pattern: 'w\\d*77\\b'}}
  - {id: repetition, criterion: Does not repeat itself., weight: 1, check: repetition}
  - {id: plain, criterion: Has no stock phrases., weight: 1, check: stock_phrases}
  - {id: even, criterion: Is even., weight: 2, judge: default, scale: binary}
  - {id: clear, criterion: Is clear., weight: 2, judge: default, scale: {ordinal: [not at all, in part, mostly, fully]}}
"""
JUDGED = {"even": (0, 1), "clear": ("not at all", "in part", "mostly", "fully")}
QUESTIONS, RESPONSES = 8, 8


@dataclass
class Spent:
    """Wall seconds, CPU seconds, and calls."""

    wall: float = 0.0
    cpu: float = 0.0
    calls: int = 0


@dataclass
class Meter:
    """What is spent inside named calls, since it was last read."""

    spent: dict[str, Spent] = field(default_factory=lambda: defaultdict(Spent))
    phase: str = ""
    own: bool = False

    def read(self) -> dict[str, Spent]:
        """What was spent, and begin anew."""
        spent, self.spent = self.spent, defaultdict(Spent)
        return spent

    def within(self, name: str, call: Callable[..., Any], cpu: Callable[[], float] = time.process_time) -> Any:
        """The call, metered."""

        @wraps(call)
        def metered(*args: Any, **kwargs: Any) -> Any:
            with self.on(name, cpu):
                return call(*args, **kwargs)

        return metered

    def within_async(self, name: str, call: Callable[..., Any]) -> Any:
        """The coroutine function, metered until it has ended."""

        @wraps(call)
        async def metered(*args: Any, **kwargs: Any) -> Any:
            with self.on(name):
                return await call(*args, **kwargs)

        return metered

    @contextmanager
    def on(self, name: str, cpu: Callable[[], float] = time.process_time) -> Iterator[None]:
        """What is spent in this block; if it is the model's own and in no other such block, in its phase, too."""
        if name in OWN and self.own:
            yield
            return
        if name in PHASES:
            self.phase = name
        self.own = name in OWN
        began, began_cpu = time.perf_counter(), cpu()
        try:
            yield
        finally:
            self.own = False
            wall, spent_cpu = time.perf_counter() - began, cpu() - began_cpu
            for one in [self.spent[name]] + [self.spent[f"own in {self.phase}"]] * (name in OWN):
                one.wall += wall
                one.cpu += spent_cpu
                one.calls += 1


def apart() -> float:
    """CPU seconds of the process without those of other Python threads: of this one, and of the pool of its kernels."""
    here = threading.get_ident()
    others = [thread.ident for thread in threading.enumerate() if thread.ident not in (None, here)]
    return time.process_time() - sum(time.clock_gettime(time.pthread_getcpuclockid(one)) for one in others)


def metered(meter: Meter) -> None:
    """Meter the phases of every run in this process, and the model's own arithmetic in them."""
    import torch

    from grape import objective, training
    from grape.checkpoint import Checkpoints
    from grape.collect import Collector
    from grape.learner import Learner
    from grape.sampler import Sampler

    Sampler.draw = meter.within("sample", Sampler.draw)
    Collector.answers = meter.within_async("answers", Collector.answers)
    training.settled_groups = meter.within("settle", training.settled_groups)
    training.make_step = meter.within("settle", training.make_step)
    Checkpoints.keep = meter.within("journal", Checkpoints.keep)
    training.Loop._update = meter.within_async("update", training.Loop._update)
    training.Loop._append = meter.within("log", training.Loop._append)
    objective.token_logprobs = meter.within("head", objective.token_logprobs, apart)
    torch.Tensor.backward = meter.within("backward", torch.Tensor.backward, apart)
    torch.optim.AdamW.step = meter.within("AdamW", torch.optim.AdamW.step, apart)
    begin = Learner.__init__

    def begun(learner: Learner, *args: Any) -> None:
        begin(learner, *args)
        model = learner.policy.model
        for name, module in (("forward", model.base_model), ("head", model.get_output_embeddings())):
            module.forward = meter.within(name, module.forward, apart)

    Learner.__init__ = begun


def write(folder: Path, shape: Shape, steps: int, tokens: int, judge: str | None) -> Path:
    """Everything that a run needs: policy, questions, rubric, judge with its replies (or at this URL), and its file."""
    make_model(str(folder / "policy"), shape)
    rng = random.Random(0)
    rows = [
        {"question_id": f"q{number}", "question": " ".join(f"w{rng.randrange(shape.vocab)}" for _ in range(length))}
        for number, length in enumerate(rng.choices(range(16, 65), k=4 * QUESTIONS))
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rubrics").mkdir()
    (folder / "rubrics/words.yaml").write_text(RUBRIC)
    if judge:
        settings = {"judge": "default", "client": "openai", "endpoint": judge, "model": "m"}
    else:
        settings = {"judge": "default", "client": "replay", "replies": "replies.jsonl"}
        replies = (
            {"response_id": f"{row['question_id']}-{step}-{member}", "item": item, "reply": reply(rng.choice(scores))}
            for row in rows
            for step in range(1, steps + 1)
            for member in range(RESPONSES)
            for item, scores in JUDGED.items()
        )
        (folder / "replies.jsonl").write_text("\n".join(map(json.dumps, replies)))
    (folder / "judge.yaml").write_text(json.dumps(settings))
    run = {
        "policy": {"model": str(folder / "policy"), "dtype": "float32"},
        "questions": {"path": str(folder / "questions.jsonl"), "category": "words"},
        "rubrics": str(folder / "rubrics"),
        "judges": {"default": str(folder / "judge.yaml")},
        "sampling": {"questions": QUESTIONS, "responses": RESPONSES, "max_tokens": tokens},
        "truncation": {"how": "keep"},
        "checkpoint": {"dir": str(folder / "checkpoints"), "every": 10**6},
        "steps": steps,
        "log": str(folder / "log.duckdb"),
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    return folder / "run.yaml"


def reply(score: object) -> str:
    """A judge's, with 300 characters of reasoning."""
    return json.dumps({"reasoning": "It is so. " * 30, "score": score, "confidence": 0.8})


def serve(pipe: Connection) -> None:
    """The judge of loopback, until the pipe is closed."""
    from loopback import JudgeServer, user_text

    def said(body: dict[str, Any], number: int) -> str:
        scores = JUDGED["even" if "Is even." in user_text(body) else "clear"]
        return reply(scores[number % len(scores)])

    with JudgeServer(said) as server:
        pipe.send(server.url)
        pipe.poll(None)


def measured(folder: Path, shape: Shape, steps: int, tokens: int, judge: str | None) -> list[dict[str, Spent]]:
    """What each step spent, by phase and by part of the own arithmetic; `step` is the whole."""
    import grape

    meter, found = Meter(), list[dict[str, Spent]]()
    metered(meter)
    last = [time.perf_counter(), time.process_time()]

    def report(_: object) -> None:
        now = [time.perf_counter(), time.process_time()]
        spent = meter.read()
        spent["step"] = Spent(now[0] - last[0], now[1] - last[1], 1)
        spent["judge"] = minus(spent["answers"], spent["sample"])
        spent["rest"] = minus(spent["step"], *(spent[name] for name in PHASES[:-1]))
        found.append(spent)
        last[:] = [time.perf_counter(), time.process_time()]

    asyncio.run(grape.train(write(folder, shape, steps, tokens, judge), report=report))
    return found


def minus(whole: Spent, *parts: Spent) -> Spent:
    """What is left of it."""
    return Spent(whole.wall - sum(part.wall for part in parts), whole.cpu - sum(part.cpu for part in parts))


def show(found: list[dict[str, Spent]]) -> None:
    """The tables of phases and of the own arithmetic, and the cost of measuring."""

    def line(name: str, all_of: list[Spent], own: list[Spent]) -> tuple[str, ...]:
        pairs = list(zip(all_of, own, strict=True))
        other = [one.wall - mine.wall for one, mine in pairs]
        shares = [100 * one / spent["step"].wall for one, spent in zip(other, found, strict=True)]
        cells = ([one.wall for one in all_of], [one.wall for one in own], other)
        cpu = ([one.cpu for one in all_of], [one.cpu - mine.cpu for one, mine in pairs])
        walls, cpus = ([f"{1e3 * median(cell):,.1f}" for cell in some] for some in (cells, cpu))
        return (name, *walls, f"{median(shares):.2f} %", *cpus)

    head = ("phase", "wall ms", "own ms", "other ms", "other, of step", "CPU ms", "other CPU ms")
    own = [Spent(sum(one[name].wall for name in OWN), sum(one[name].cpu for name in OWN)) for one in found]
    rows = [line(name, [one[name] for one in found], [one[f"own in {name}"] for one in found]) for name in PHASES]
    print(table([head, *rows, line("step", [one["step"] for one in found], own)]) + "\n")
    print("own: " + ", ".join(f"{name} {1e3 * median(one[name].wall for one in found):,.1f} ms" for name in OWN))
    for what in ("wall", "cpu"):
        shares = [
            100 * (1 - getattr(mine, what) / getattr(one["step"], what)) for mine, one in zip(own, found, strict=True)
        ]
        print(f"other, share of {what}: {median(shares):.2f} % ({min(shares):.2f} to {max(shares):.2f})")
    calls = median(sum(spent[name].calls for name in OWN) for spent in found)
    cost = calls * empty() / median(spent["step"].wall for spent in found)
    print(f"the cost of measuring: {100 * cost:.3f} % of a step ({calls:.0f} calls)")


def empty() -> float:
    """Wall seconds that it takes to meter a call in which nothing happens."""
    call = Meter().within("nothing", lambda: None, apart)
    began = time.perf_counter()
    for _ in range(1000):
        call()
    return (time.perf_counter() - began) / 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a policy of 0.4 million weights")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--judge", choices=("replay", "loopback"), default="replay")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    shape, steps = SMALL if options.quick else SHAPE, options.warmup + options.steps
    context, server, url = get_context("spawn"), None, None
    if options.judge == "loopback":
        pipe, theirs = context.Pipe()
        server = context.Process(target=serve, args=(theirs,), daemon=True)
        server.start()
        url = pipe.recv()
    with tempfile.TemporaryDirectory() as name:
        found = measured(Path(name), shape, steps, 64, url)
    if server:
        server.terminate()
    print(f"{options.threads} threads, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; "
          f"{QUESTIONS} questions x {RESPONSES} responses, judge: {options.judge}\n")  # fmt: skip
    show(found[options.warmup :])


if __name__ == "__main__":
    main()
