"""Groups of responses sampled: ours, TRL's `generate`, and transformers' continuous batching as TRL runs it.

    python benchmarks/sampling.py [--quick] [--repeats 5] [--seed 0]

Qwen3s of 0.4, 3 and 15 million random weights in float32, 4 prompts x 8 responses, prompts of 16 and of 256 tokens. All
arms are asked for the same: as many tokens for each response, which are recorded (all of one length; or log-normal,
sigma 0.75, cut at four times the mean), drawn at temperature 1 without truncation. A response that has its tokens ends:
in ours by the random number that draws the end, in `generate` by a logits processor, in continuous batching by the
limit of its request. TRL's part is what `GRPOTrainer` does between prompts and lists of tokens: padding, unwrapping,
`generate` or `generate_batch`, and cutting behind the end; but continuous batching gets a cache of the size that it
needs, where TRL lets it fill half of the memory each time, and batches of two tokens a response, the fastest tried.
Ours gives log-probabilities and texts, TRL's does not.

Each arm is a process; they make each sample in turns, a first one unmeasured. Tokens are those of the responses. CPU
seconds are those of the whole process; peaks are of resident memory over what is resident before the sample. Medians,
with the least and the greatest of the ratios, repeat by repeat. Exit status 1 where an arm gives other lengths.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from arms import END, PAD, Arm, Shape, make_model, ratios, spread, table
from train import MIB, machine
from trainers import Memory, Process, apart, now

SHAPES = {
    "0.4 M": Shape(hidden=96, layers=3, heads=4, kv_heads=4, head_dim=24, intermediate=256, vocab=1024),
    "3 M": Shape(hidden=192, layers=6, heads=4, kv_heads=4, head_dim=48, intermediate=512, vocab=1024),
    "15 M": Shape(hidden=384, layers=8, heads=6, kv_heads=3, head_dim=64, intermediate=1152, vocab=2048),
}
ARMS = ("ours", "generate", "continuous")
PROMPTS, SIZE = 4, 8  # and responses to each
PAGE = 32  # tokens, of continuous batching


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is sampled once: a prompt for each group, and how many tokens for each response, the end included."""

    prompts: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What it took, and how long the responses were."""

    seconds: float
    cpu_seconds: float
    peak: int
    lengths: tuple[int, ...]


Sampler = Callable[[Case], list[Sequence[int]]]


def record(rng: random.Random, shape: Shape, prompt: int, mean: int, skewed: bool) -> Case:
    """Random prompts and lengths."""
    drawn = [rng.lognormvariate(-(0.75**2) / 2, 0.75) if skewed else 1.0 for _ in range(PROMPTS * SIZE)]
    return Case(
        prompts=tuple(tuple(rng.choices(range(2, shape.vocab - 1), k=prompt)) for _ in range(PROMPTS)),
        lengths=tuple(min(4 * mean, max(1, round(mean * one))) for one in drawn),
    )


def work(pipe: Connection, arm: Arm, name: str, folder: str) -> None:
    """An arm's process: ready when loaded, then a sample for each case from the pipe, until there is none."""
    os.dup2(2, 1)  # what libraries print is not the result
    model, sampler = ours(folder) if name == "ours" else theirs(folder, continuous=name == "continuous")
    pipe.send("ready")
    while (case := pipe.recv()) is not None:
        memory, began = Memory(arm.device, model), now(arm.device)
        try:
            found = sampler(case)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            pipe.send(f"{type(error).__name__}: {error}")
            continue
        ended = now(arm.device)
        lengths = tuple(len(tokens) for tokens in found)
        pipe.send(
            Sampled(seconds=ended[0] - began[0], cpu_seconds=ended[1] - began[1], peak=memory.peak(), lengths=lengths)
        )


def ours(folder: str) -> tuple[Any, Sampler]:
    """`grape.rollout.sample`."""
    import torch

    from grape import rollout
    from grape.policy import load_policy

    policy = replace(load_policy(folder), stop_ids=(PAD,))  # the first token of all, which is never drawn otherwise
    generator, plain = torch.Generator().manual_seed(0), rollout.uniform
    left: list[int] = []

    def uniform(numbers: Sequence[int], *arguments: Any) -> torch.Tensor:
        """0 lies in the part of the first token, and what is above a half does not."""
        for number in numbers:
            left[number] -= 1
        last_R = torch.tensor([left[number] == 0 for number in numbers])
        return torch.where(last_R, 0.0, 0.5 + plain(numbers, *arguments) / 2)

    def sample(case: Case) -> list[Sequence[int]]:
        left[:] = case.lengths
        longest = max(case.lengths)
        drawn = rollout.sample(policy, case.prompts, responses=SIZE, max_tokens=longest, generator=generator)
        return [one.token_ids for one in drawn]

    rollout.uniform = uniform
    return policy.model, sample


def theirs(folder: str, *, continuous: bool) -> tuple[Any, Sampler]:
    """`GRPOTrainer._generate_single_turn`."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, LogitsProcessorList
    from transformers.generation.continuous_batching import ContinuousBatchingManager
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, model_init_kwargs={"dtype": "float32"}, report_to="none",
        num_generations=SIZE, per_device_train_batch_size=SIZE, gradient_checkpointing=False, temperature=1.0,
        top_p=1.0, top_k=0, use_transformers_continuous_batching=continuous,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=folder,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["w2"]}),
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
    )
    plain, asked = trainer.model.generate, ContinuousBatchingManager.add_request
    lengths: list[int] = []

    def ended(ids_RT: torch.Tensor, scores_RV: torch.Tensor, start: int) -> torch.Tensor:
        """The end alone at the last token, and never before."""
        last_R = torch.tensor(lengths) == ids_RT.shape[1] + 1 - start
        scores_RV[:, END] = torch.where(last_R, 1e9, -torch.inf)
        return scores_RV

    def generate(**options: Any) -> torch.Tensor:
        start = options["input_ids"].shape[1]
        rule = LogitsProcessorList([lambda ids_RT, scores_RV: ended(ids_RT, scores_RV, start)])
        return plain(**options, logits_processor=rule)

    def add_request(
        manager: Any, input_ids: list[int], request_id: str, max_new_tokens: int, **options: Any
    ) -> str | None:
        """As many tokens as this one has; the requests are numbered in the order of the responses."""
        own = lengths[int(request_id.removeprefix("req_"))]
        return asked(manager, input_ids, request_id, own, **{**options, "eos_token_id": -1})

    def sample(case: Case) -> list[Sequence[int]]:
        lengths[:] = case.lengths
        trainer.generation_config.max_new_tokens = longest = max(lengths)
        if continuous:
            config = trainer.continuous_batching_config
            config.page_size, tokens = PAGE, [len(prompt) for prompt in case.prompts for _ in range(SIZE)]
            config.num_blocks = sum(-(-(one + longest) // PAGE) for one in tokens)
            config.max_batch_tokens = 2 * len(tokens)
        prompts = [list(prompt) for prompt in case.prompts for _ in range(SIZE)]
        return trainer._generate_single_turn(prompts, None, {}, SIZE)[0]

    trainer.model.generate = generate
    ContinuousBatchingManager.add_request = add_request
    return trainer.model, sample


def measured(shape: Shape, cases: dict[str, Case], repeats: int) -> dict[str, dict[str, list[Sampled] | str]]:
    """What each arm took for each case, repeat by repeat, or what became of it."""
    found: dict[str, dict[str, list[Sampled] | str]] = {name: {arm: [] for arm in ARMS} for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        apart(make_model, folder, shape)
        running = {name: Process(work, Arm(trainer="trl"), name, folder) for name in ARMS}
        for process in running.values():
            process.answer()
        for name, case in cases.items():
            for repeat in range(1 + repeats):
                for arm, process in running.items():
                    process.pipe.send(case)
                    got = process.answer()
                    if isinstance(got, str):
                        found[name][arm] = got
                    elif got.lengths != case.lengths:
                        sys.exit(f"{arm}, {name}: {got.lengths}, not {case.lengths}")
                    elif repeat and isinstance(some := found[name][arm], list):
                        some.append(got)
        for process in running.values():
            process.pipe.send(None)
            process.end()
    return found


def show(name: str, case: Case, arms: dict[str, list[Sampled] | str]) -> tuple[str, ...]:
    """A line of the table."""
    tokens = sum(case.lengths)
    rate = {arm: [tokens / one.cpu_seconds for one in some] for arm, some in arms.items() if isinstance(some, list)}
    wall = {arm: [tokens / one.seconds for one in some] for arm, some in arms.items() if isinstance(some, list)}
    cells = [f"{median(rate['ours']):,.0f}"]
    for arm in ARMS[1:]:
        failed = arm not in rate
        cells += ["-"] * 2 if failed else [spread(ratios(one["ours"], one[arm]), ".2f") for one in (rate, wall)]
    for some in arms.values():
        cells.append("-" if isinstance(some, str) else f"{median(one.peak for one in some) / MIB:,.0f}")
    return (name, *cells)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest policy, short responses")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if find_spec("trl") is None:
        raise SystemExit('there is nothing to compare with: pip install -c constraints.txt -e ".[parity]"')
    repeats, mean = options.repeats or (2 if options.quick else 5), 12 if options.quick else 32
    rng = random.Random(options.seed)
    print(machine(), flush=True)
    head = ("policy, prompt, lengths", "ours, tokens per CPU-s", "/ generate, CPU", "wall", "/ continuous, CPU", "wall")
    lines, failed = [(*head, "peak MiB: ours", "generate", "continuous")], list[str]()
    for size, shape in list(SHAPES.items())[: 1 if options.quick else None]:
        cases = {
            f"{size}, {prompt}, {'log-normal' if skewed else 'equal'}": record(rng, shape, prompt, mean, skewed)
            for prompt in (16, 256)
            for skewed in (False, True)
        }
        for name, arms in measured(shape, cases, repeats).items():
            lines.append(show(name, cases[name], arms))
            failed += [f"{arm} failed at {name}: {some}" for arm, some in arms.items() if isinstance(some, str)]
    print("\n" + table(lines))
    if failed:
        print("\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
