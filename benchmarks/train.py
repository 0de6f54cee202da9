"""An update of ours beside TRL's: the same model, responses, loss and AdamW; then whole steps, and the shared prompt.

    python benchmarks/train.py [--quick] [--steps 5] [--warmup 2] [--sigma 0.75] [--vocab 65536] [--seed 0]

Each arm is a process; they make their steps in turns (benchmarks/arms.py). Tokens are those of prompts and responses,
without padding, and CPU seconds those of the whole process. An update is everything between rewards and moved weights;
a whole step samples its responses too, with random lengths since any of many tokens ends them. Peaks are of resident
memory over the loaded model, so gradients and AdamW's moments (three times the weights) are in all of them. Medians of
the steps after the warmup, with the least and the greatest; ratios are step by step.

TRL computes the entropy, and so do we, but for one arm. On a CPU, TRL makes logits for prompts and padding too; with
Triton it does not, and one arm has that here. Losses and gradient norms of all arms must agree to 1e-5, or else this
exits with 1. In the first epoch the ratio is 1, so a loss tells of lengths and advantages alone; the norms tell of the
log-probabilities.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from arms import Arm, Figures, Group, Lengths, Shape, agreed, make_model, ratios, record, spread, table
from trainers import apart, in_turns

SHAPE = Shape(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate=768, vocab=65536, ends=400)
SMALL = Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=192, vocab=2048, ends=64)
SIZE = 8  # responses to a prompt
TRL, OURS = Arm(trainer="trl"), Arm(trainer="grape")
UPDATE = {
    "TRL, 8 rows": TRL,
    "TRL, 8 rows, logits as with Triton": replace(TRL, compact=True),
    "TRL, 1 row x 8": replace(TRL, rows=1),
    "TRL, 1 row x 8, checkpointing": replace(TRL, rows=1, checkpointing=True),
    "ours, 8 rows": OURS,
    "ours, 8 rows, no entropy": replace(OURS, entropy=False),
    "ours, 1 row x 8": replace(OURS, micro_tokens=1),
    "ours, 1 row x 8, checkpointing": replace(OURS, micro_tokens=1, checkpointing=True),
}
WHOLE = {"TRL": replace(TRL, sampled=True), "ours": replace(OURS, sampled=True)}
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured."""

    shape: Shape
    lengths: Lengths
    short: Lengths  # responses of the comparison by prompt
    times: Sequence[int]  # prompts, in mean responses
    steps: int
    warmup: int
    seed: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, a minute")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--sigma", type=float, default=0.75)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if find_spec("trl") is None:
        raise SystemExit('there is nothing to compare with: pip install -c constraints.txt -e ".[parity]"')
    quick = options.quick
    shape = SMALL if quick else SHAPE
    scale = Scale(
        shape=replace(shape, vocab=options.vocab) if options.vocab else shape,
        lengths=Lengths(
            prompt=16 if quick else 64, mean=32 if quick else 160, sigma=options.sigma, longest=96 if quick else 512
        ),
        short=Lengths(prompt=0, mean=16 if quick else 64, sigma=options.sigma, longest=48 if quick else 256),
        times=(1, 4) if quick else (1, 4, 16),
        steps=options.steps or (2 if quick else 5),
        warmup=1 if quick else 2,
        seed=options.seed,
    )
    if options.warmup is not None:
        scale = replace(scale, warmup=options.warmup)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        apart(make_model, folder, scale.shape)
        lines = [("ratio", "measured", "aim"), *updates(folder, scale), *whole(folder, scale), *prompts(folder, scale)]
    print("\n" + table(lines))


def machine() -> str:
    """What this is measured on."""
    names = ("torch", "transformers", "trl")
    return (
        f"{os.cpu_count()} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} threads, load average "
        f"{os.getloadavg()[0]:.1f}; {', '.join(f'{name} {version(name)}' for name in names)}"
    )


def measured(
    title: str, folder: str, scale: Scale, arms: dict[str, Arm], steps: Sequence[Sequence[Group]]
) -> dict[str, Figures]:
    """The arms' figures after the warmup, printed."""
    longest = scale.lengths.longest
    found = in_turns({name: replace(arm, longest=longest) for name, arm in arms.items()}, folder, steps)
    figures = {name: one.after(scale.warmup) for name, one in found.items() if one is not None}
    rows = [(title, "tokens per CPU-s", "s per step", "tokens per step", "computed", "peak MiB", "loaded MiB")]
    for name, one in figures.items():
        rates, tokens = one.rates("cpu_seconds"), f"{median(one.tokens):,.0f}"
        memory = (f"{one.peak / MIB:,.0f}", f"{one.loaded / MIB:,.0f}")
        rows.append((name, spread(rates), spread(one.seconds, ".2f"), tokens, f"x {median(one.computed):.2f}", *memory))
    print("\n" + table(rows), flush=True)
    return figures


def updates(folder: str, scale: Scale) -> list[tuple[str, str, str]]:
    """The update phase: speed, and memory at equal and at the smallest micro-batches."""
    steps = record(scale.shape, scale.lengths, steps=scale.warmup + scale.steps, groups=1, size=SIZE, seed=scale.seed)
    found = measured("update", folder, scale, UPDATE, steps)
    agreed(found, loss=1e-5, norm=1e-5)
    rate = {name: one.rates("cpu_seconds") for name, one in found.items()}
    peak = {name: one.peak for name, one in found.items()}
    peers = [name for name in UPDATE if UPDATE[name].trainer == "trl"]
    fastest = max((name for name in peers if not UPDATE[name].compact), key=lambda name: median(rate[name]))
    least = {
        trainer: min(peak[name] for name, arm in UPDATE.items() if arm.trainer == trainer and not arm.compact)
        for trainer in ("trl", "grape")
    }
    entropy = ratios(rate["ours, 8 rows, no entropy"], rate["ours, 8 rows"])
    return [
        *((f"update, tokens per CPU-s: ours, 8 rows / {name}", spread(ratios(rate["ours, 8 rows"], rate[name]), ".2f"),
           "1.5" if name == fastest else "") for name in peers),
        ("update, tokens per CPU-s: without entropy / with", spread(entropy, ".2f"), ""),
        *((f"update, peak memory: ours, 8 rows / {name}", f"{peak['ours, 8 rows'] / peak[name]:.2f}",
           "0.2" if UPDATE[name] == TRL else "") for name in peers if UPDATE[name].rows == SIZE),
        ("update, peak memory: least of ours / least of TRL", f"{least['grape'] / least['trl']:.2f}", "0.75"),
    ]  # fmt: skip


def whole(folder: str, scale: Scale) -> list[tuple[str, str, str]]:
    """Sampling and update. The arms draw their own responses, so the steps do not pair."""
    scale = replace(scale, warmup=1, steps=min(3, scale.steps))  # the longest
    steps = record(scale.shape, scale.lengths, steps=scale.warmup + scale.steps, groups=1, size=SIZE, seed=scale.seed)
    found = measured("whole step", folder, scale, WHOLE, steps)
    rate = {name: sum(one.tokens) / sum(one.cpu_seconds) for name, one in found.items()}
    return [("whole step, tokens per CPU-s, all steps: ours / TRL", f"{rate['ours'] / rate['TRL']:.2f}", "")]


def prompts(folder: str, scale: Scale) -> list[tuple[str, str, str]]:
    """The prompt of a group computed once, against once for each row."""
    import torch

    lines = []
    for times in scale.times:
        lengths = replace(scale.short, prompt=round(times * scale.short.mean))
        steps = record(scale.shape, lengths, steps=1 + min(3, scale.steps), groups=1, size=SIZE, seed=scale.seed)
        with tempfile.TemporaryDirectory() as kept:
            files = {name: str(Path(kept, name)) for name in ("once", "each")}
            arms = {
                f"prompt {name}": replace(OURS, share=name == "once", max_grad_norm=1e9, gradient=files[name])
                for name in files
            }
            found = measured(f"prompt {times} x response", folder, replace(scale, warmup=1), arms, steps)
            agreed(found, loss=1e-5, norm=1e-5)
            once, each = (torch.load(file) for file in files.values())
        apart = max((a - b).abs().max().item() for a, b in zip(once, each, strict=True))
        highest = max(a.abs().max().item() for a in each)
        rate = {name: one.rates("cpu_seconds") for name, one in found.items()}
        gain = spread(ratios(rate["prompt once"], rate["prompt each"]), ".2f")
        lines.append((f"prompt {times} x response, tokens per CPU-s: once / for each row", gain, ""))
        lines.append(
            (
                f"prompt {times} x response, greatest difference of gradients / greatest gradient",
                f"{apart / highest:.0e}",
                "1e-5",
            )
        )
        if apart > 1e-5 * highest:
            sys.exit("the gradients differ")
    return lines


if __name__ == "__main__":
    main()
