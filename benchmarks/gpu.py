"""An update of ours beside TRL's on a GPU: Qwen3-0.6B and 4B in bfloat16, at equal and at the largest micro-batches.

    python benchmarks/gpu.py [--model 0.6B 4B] [--prompt 256 1024] [--arm ours TRL ...] [--steps 3] [--largest 256]

Random weights in the shapes of the published models, groups of 8 recorded responses of log-normal lengths up to 2048
tokens. A step is one micro-batch and one update by AdamW. Each arm is a process, alone on the GPU; its micro-batch is
doubled, from one group on, until it runs out of memory or is ``--largest``. At 8 rows the losses of all arms must
agree to 1e-2 and the gradient norms to 2e-2 (relative), or else this exits with 1 when all is printed.

ours                   float32 weights, bfloat16 autocast; rows packed, the prompt of a group once
TRL                    the same precision, which is TRL's own default; padded rows, sdpa
TRL with Liger         with use_liger_kernel: Liger's layers (since 1.16 the loss is TRL's own)
TRL, bfloat16 weights  weights, gradients and AdamW's moments in bfloat16: less than ours keep

Gradient checkpointing is on in all, as TRL has it by default. Tokens are those of prompts and responses, without
padding, the prompt with every response. Peaks are of torch.cuda.max_memory_allocated, reset when the model is loaded.
MFU counts 8 operations for each token and weight that it meets (6 without checkpointing): the prompt of a group once
where it is computed once, and the head at responses only; attention is not counted.

Without a GPU the same plan runs on the CPU in miniature, to show that it runs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from statistics import median

from arms import Arm, Figures, Group, Lengths, Shape, Steps, agreed, make_model, record, spread, table
from trainers import apart, in_turns

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # TRL refuses several in one process

import torch

SIZE = 8  # responses to a prompt
SHAPES = {
    "0.6B": Shape(hidden=1024, layers=28, heads=16, kv_heads=8, head_dim=128, intermediate=3072, vocab=151936),
    "4B": Shape(hidden=2560, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=9728, vocab=151936),
}
SMALL = {
    "0.6B": Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=192, vocab=512),
    "4B": Shape(hidden=96, layers=3, heads=8, kv_heads=2, head_dim=16, intermediate=288, vocab=512),
}
TRL = Arm(trainer="trl", dtype="bfloat16", checkpointing=True)
ARMS = {
    "ours": replace(TRL, trainer="grape"),
    "TRL": TRL,
    "TRL with Liger": replace(TRL, liger=True),
    "TRL, bfloat16 weights": replace(TRL, weights="bfloat16"),
}
PEAKS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}  # bfloat16, dense, per second: NVIDIA's data sheets
HEADER = ("", "rows", "tokens per s", "s per step", "peak GiB", "loaded GiB", "MFU")
GIB = 2**30


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--prompt", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--arm", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--sigma", type=float, default=0.75)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--largest", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.largest = options.largest or (256 if device == "cuda" else 16)
    arms = chosen(options, device)
    print(machine(device), flush=True)
    for name in set(options.arm) - set(arms):
        print(f"{name}: left out: liger-kernel is not installed (pip install liger-kernel; it needs a GPU)")
    wrong = []
    for model in options.model:
        shape = (SHAPES if device == "cuda" else SMALL)[model]
        with tempfile.TemporaryDirectory() as folder:
            apart(make_model, folder, shape, device, "bfloat16", device=device)
            for prompt in options.prompt:
                wrong.append(compared(f"{model}, prompt {prompt}", folder, shape, prompt, arms, options, device))
    if any(wrong):
        raise SystemExit("\n".join(filter(None, wrong)))


def chosen(options: argparse.Namespace, device: str) -> dict[str, Arm]:
    """The arms that can run here."""
    there = device == "cuda" and find_spec("liger_kernel") is not None
    return {
        name: replace(ARMS[name], device=device, checkpointing=not options.no_checkpointing, longest=2048)
        for name in options.arm
        if there or not ARMS[name].liger
    }


def machine(device: str) -> str:
    """What this is measured on."""
    of = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl"))
    if device == "cpu":
        return f"No GPU here: the same plan in miniature on the CPU, and no figure of it is a GPU's; {of}"
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    return f"{torch.cuda.get_device_name(0)}, {total:.0f} GiB; {of}"


def compared(
    title: str, folder: str, shape: Shape, prompt: int, arms: dict[str, Arm], options: argparse.Namespace, device: str
) -> str | None:
    """Every arm with 8 rows and with as many as it can take, printed; and what does not agree, if anything."""
    lengths = Lengths(prompt=prompt, mean=640, sigma=options.sigma, longest=2048)
    if device == "cpu":
        lengths = Lengths(prompt=prompt // 16, mean=40, sigma=options.sigma, longest=128)
        title += ", in miniature"
    equal: dict[str, Figures] = {}
    rows = [(title, *HEADER[1:])]
    for name, arm in arms.items():
        best, size = None, SIZE
        while size <= options.largest:
            steps = record(
                shape, lengths, steps=options.warmup + options.steps, groups=size // SIZE, size=SIZE, seed=options.seed
            )
            found = in_turns({name: replace(arm, rows=size)}, folder, steps)[name]
            if found is None:
                break
            best, size = (size, steps, found), 2 * size
            if len(steps[0]) == 1:
                equal[name] = found
                rows.append(line(name, best, shape, arm, options.warmup))
        if best is None:
            rows.append((name, str(SIZE), "out of memory", *[""] * 4))
        elif best[0] > SIZE:
            end = "" if size > options.largest else ", the most"
            rows.append(line(f"{name}{end}", best, shape, arm, options.warmup))
    print("\n" + table(rows), flush=True)
    try:
        agreed(equal, loss=1e-2, norm=2e-2)
    except SystemExit as error:
        return f"{title}: {error}"
    return None


def line(name: str, best: tuple[int, Steps, Figures], shape: Shape, arm: Arm, warmup: int) -> tuple[str, ...]:
    """A row of the table."""
    size, steps, found = best
    timed = found.after(warmup)
    share = [
        work(shape, groups, arm) / seconds / peak
        for groups, seconds in zip(steps[warmup:], timed.seconds, strict=True)
        if (peak := peak_of(arm.device))
    ]
    return (
        name,
        str(size),
        spread(timed.rates("seconds")),
        spread(timed.seconds, ".2f"),
        f"{(found.peak + found.loaded) / GIB:.2f}",
        f"{found.loaded / GIB:.2f}",
        f"{median(share):.1%}" if share else "-",
    )


def work(shape: Shape, groups: Sequence[Group], arm: Arm) -> float:
    """Floating-point operations of the matrices that the tokens meet, forward and backward."""
    attention = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    body, head = shape.layers * (attention + 3 * shape.hidden * shape.intermediate), shape.hidden * shape.vocab
    responses = sum(len(response) for group in groups for response in group.responses)
    times = 1 if arm.trainer == "grape" else SIZE
    prompts = sum(len(group.prompt) * times for group in groups)
    return (8 if arm.checkpointing else 6) * (body * (prompts + responses) + head * responses)


def peak_of(device: str) -> float | None:
    """Operations per second that the GPU could do, if it is known."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


if __name__ == "__main__":
    main()
