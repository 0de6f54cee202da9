"""The trainers at work, ours and TRL's (tests/parity/peer.py): each arm in a process of its own, step by step in turns.

One makes a step while the others wait, so that what else the machine does falls on all.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from typing import Any

from arms import Arm, Figures, Group, Steps

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin stall the others
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "parity"))

LR = 1e-5
PRELOADED = ["trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer", "grape.optimize"]


def in_turns(arms: Mapping[str, Arm], folder: str, steps: Steps) -> dict[str, Figures | None]:
    """Every arm trained on the steps, in a process each, step by step in turns; None for one that ran out of memory."""
    running = {name: Process(work, arm, folder, steps) for name, arm in arms.items()}
    alive = {name for name, process in running.items() if process.answer() is not None}
    for _ in steps:
        for name, process in running.items():
            if name in alive:
                process.pipe.send("step")
                if process.answer() is None:
                    alive.remove(name)
    figures = {name: process.answer() if name in alive else None for name, process in running.items()}
    for process in running.values():
        process.end()
    return figures


def apart(function: Callable[..., None], *args: Any, device: str = "cpu") -> None:
    """A call in a process of its own."""
    process = Process(_apart, Arm(trainer="grape", device=device), function, args)
    process.answer()
    process.end()


def _apart(pipe: Connection, _: Arm, function: Callable[..., None], args: Sequence[Any]) -> None:
    os.dup2(2, 1)
    function(*args)
    pipe.send("done")


class Process:
    """A function at work in another process, with a pipe to it.

    It begins as a copy that has imported the trainers; with a GPU it begins afresh, since CUDA does not survive a copy.
    """

    def __init__(self, function: Callable[..., None], arm: Arm, *args: Any) -> None:
        context: Any = get_context("forkserver" if arm.device == "cpu" else "spawn")
        if arm.device == "cpu":
            context.set_forkserver_preload(PRELOADED)
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=function, args=(theirs, arm, *args), daemon=True)
        self._process.start()
        theirs.close()

    def answer(self) -> Any:
        """What it says next."""
        try:
            return self.pipe.recv()
        except EOFError:
            raise SystemExit("an arm has failed") from None  # it has told why on stderr

    def end(self) -> None:
        """Wait until it has given back what it had of the GPU."""
        self._process.join()


def work(pipe: Connection, arm: Arm, folder: str, steps: Steps) -> None:
    """An arm's process: ready when loaded, then a step for each word from the pipe, and its figures."""
    os.dup2(2, 1)  # what libraries print is not the result
    try:
        pipe.send((ours if arm.trainer == "grape" else theirs)(pipe, arm, folder, steps))
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "ALLOC_FAILED")):  # torch's, or a library's
            raise
        pipe.send(None)


def ours(pipe: Connection, arm: Arm, folder: str, steps: Steps) -> Figures:
    """`grape.optimize.Optimizer` on the groups; sampled, `grape.rollout.sample` before it."""
    import torch
    from accelerate import Accelerator

    from grape.config import parse_run
    from grape.optimize import Optimizer
    from grape.packing import Packing
    from grape.policy import load_policy

    config = parse_run(
        {
            "policy": {"model": folder, "dtype": arm.dtype, "gradient_checkpointing": arm.checkpointing},
            "questions": {"path": "recorded"},
            "loss": {"aggregate": "token-mean"},
            "optimizer": {"lr": LR, "micro_tokens": arm.micro_tokens, "max_grad_norm": arm.max_grad_norm},
            "steps": len(steps),
        },
        "benchmark",
    )
    policy = load_policy(folder, device=arm.device)
    precision = "bf16" if arm.dtype == "bfloat16" else "no"
    optimizer = Optimizer(policy, config, Accelerator(cpu=arm.device == "cpu", mixed_precision=precision))
    if not arm.share:
        with optimizer.objective.autocast():
            optimizer.packing = Packing(policy.model, policy.pad_id, share=False)
    if not arm.entropy:
        without_entropy()
    generator = torch.Generator(device=arm.device).manual_seed(0)
    figures, memory = Figures(), Memory(arm.device, policy.model)
    pipe.send("ready")
    for number, groups in enumerate(steps, 1):
        pipe.recv()
        if arm.gradient and number == 1:
            keep_gradient(optimizer, arm.gradient)
        began = now(arm.device)
        some = sampled(policy, groups, arm.longest, generator) if arm.sampled else groups
        metrics = optimizer.update(members(some), number).metrics
        ended = now(arm.device)
        figures.seconds.append(ended[0] - began[0])
        figures.cpu_seconds.append(ended[1] - began[1])
        figures.tokens.append(sum(group.tokens for group in some))
        figures.computed.append(metrics["computed"])
        figures.losses.append(metrics["loss"])
        figures.grad_norms.append(metrics["grad_norm"])
        pipe.send("done")
    return replace(figures, peak=memory.peak(), loaded=memory.loaded)


def theirs(pipe: Connection, arm: Arm, folder: str, steps: Steps) -> Figures:
    """TRL's GRPOTrainer on the groups; sampled, with its own `generate` before it."""
    import peer
    from trl import GRPOTrainer
    from trl.trainer import utils

    memory: list[Memory] = []
    peaks: list[int] = []

    if arm.compact:
        utils._use_triton = lambda _: True  # of the choice of positions alone: the kernels ask elsewhere

    def on_load(trainer: Any) -> None:
        if arm.sampled:
            prompts = {
                f"{step}:{at}": list(group.prompt) for step, some in enumerate(steps) for at, group in enumerate(some)
            }
            trainer.rollout_func = None
            trainer._tokenize_prompts = lambda names: ([prompts[name] for name in names], None, {})
            trainer._generate = GRPOTrainer._generate.__get__(trainer)  # in the step, as peer's own is not
        memory.append(Memory(arm.device, trainer.model))
        pipe.send("ready")
        pipe.recv()

    def on_step(number: int) -> None:
        peaks.append(memory[0].peak())
        pipe.send("done")
        if number < len(steps):
            pipe.recv()

    trained = peer.train(
        folder,
        [
            [
                [
                    peer.Rollout(prompt_ids=group.prompt, completion_ids=response, reward=reward)
                    for response, reward in zip(group.responses, group.rewards, strict=True)
                ]
                for group in groups
            ]
            for groups in steps
        ],
        rows=arm.rows,
        device=arm.device,
        dtype=arm.dtype,
        weights=arm.weights,
        gradient_checkpointing=arm.checkpointing,
        liger=arm.liger,
        on_load=on_load,
        on_step=on_step,
        learning_rate=LR,
        loss_type="dapo",
        scale_rewards="none",
        max_completion_length=arm.longest,
        max_grad_norm=arm.max_grad_norm,
    )
    seen = [0, *(round(entry["num_tokens"]) for entry in trained.metrics)]
    tokens = [after - before for before, after in pairwise(seen)]
    padded = [
        sum(len(group.responses) for group in groups)
        * (max(len(group.prompt) for group in groups) + entry["completions/max_length"])
        for groups, entry in zip(steps, trained.metrics, strict=True)
    ]
    return Figures(
        seconds=trained.seconds,
        cpu_seconds=trained.cpu_seconds,
        tokens=tokens,
        computed=[places / one for places, one in zip(padded, tokens, strict=True)],
        losses=trained.losses,
        grad_norms=trained.grad_norms,
        peak=max(peaks),
        loaded=memory[0].loaded,
    )


class Memory:
    """Bytes in use: resident ones of this process, or allocated ones of its GPU. The peak is since this was made.

    VmHWM is what getrusage calls ru_maxrss, but not that of the process it was forked from, and it can be reset.
    """

    def __init__(self, device: str, model: Any) -> None:
        import torch

        for weight in model.parameters():
            weight.detach().sum().item()  # a page of the file is resident when it has been read
        self._cuda = torch.cuda if device != "cpu" else None
        if self._cuda:
            self._cuda.synchronize()
            self._cuda.reset_peak_memory_stats()
            self.loaded = self._cuda.memory_allocated()
        else:
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim:
                trim(0)  # what loading has freed would be used again unseen
            Path("/proc/self/clear_refs").write_text("5")
            self.loaded = self._status("VmRSS")

    def peak(self) -> int:
        """The most that was in use since, over what was in use then."""
        return (self._cuda.max_memory_allocated() if self._cuda else self._status("VmHWM")) - self.loaded

    def _status(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def members(groups: Sequence[Group]) -> list[Any]:
    """Groups as the optimizer takes them: the advantage is the reward less the group's mean."""
    from grape.member import Member

    return [
        Member(
            response_id=f"{at}/{number}",
            group=str(at),
            prompt_ids=group.prompt,
            token_ids=response,
            rollout_logprobs=None,
            advantage=reward - fmean(group.rewards),
            reward=reward,
            trained=True,
            off_policy=False,
        )
        for at, group in enumerate(groups)
        for number, (response, reward) in enumerate(zip(group.responses, group.rewards, strict=True))
    ]


def sampled(policy: Any, groups: Sequence[Group], longest: int, generator: Any) -> list[Group]:
    """The groups with responses of the policy in place of the recorded ones."""
    from grape.rollout import sample

    counts = [len(group.responses) for group in groups]
    prompts = [group.prompt for group in groups]
    drawn = iter(sample(policy, prompts, responses=counts, max_tokens=longest, generator=generator))
    return [replace(group, responses=tuple(next(drawn).token_ids for _ in group.responses)) for group in groups]


def without_entropy() -> None:
    """The objective finds an entropy of 0, at no cost."""
    from grape import objective

    plain = objective.token_logprobs

    def zero(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        logprobs_N, _, kl_N = plain(*args, **{**kwargs, "entropy": False})
        return logprobs_N, logprobs_N.detach() * 0, kl_N

    objective.token_logprobs = zero


def keep_gradient(optimizer: Any, file: str) -> None:
    """Write the gradient of the next update to a file."""
    import torch

    def keep(adamw: Any, *_: Any) -> None:
        handle.remove()
        torch.save([weight.grad for group in adamw.param_groups for weight in group["params"]], file)

    handle = optimizer._descent.adamw.register_step_pre_hook(keep)


def now(device: str) -> tuple[float, float]:
    """Wall and CPU seconds, when the device has done all that it was asked for."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()
