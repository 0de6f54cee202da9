"""A policy that processes share out (FSDP2) learns what a whole one learns, and one of them keeps the books."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import signal
import sys
from contextlib import chdir
from pathlib import Path

import pytest
import ranks
import torch
from accelerate import Accelerator
from apprentice import apprentice, ask, fair
from loopback import JudgeServer
from mortal import wait_for
from safetensors.torch import load_file
from test_optimize import policy_of, run_config, some
from tiny import tiny_folder, tiny_model
from torch.distributed.tensor import DTensor

import grape
from grape.adapters import add_lora
from grape.config import Lora
from grape.errors import ConfigError, GrapeError
from grape.learner import Learner
from grape.optimize import Optimizer
from grape.ranks import buckets
from grape.shards import check_shared, full_weights, is_shared, layers, shard

# Two steps of the optimizer, in float64 but for the last two.

FAR = {"lr": 3e-3, "micro_tokens": 30}
K3 = {"loss": {"kl": "k3", "kl_coef": 0.1}, "optimizer": {"epochs": 2}}
CASES = {
    "tied embeddings": K3,
    "untied embeddings": K3,
    "exact KL, checkpointed layers": {
        "loss": {"kl": "full", "kl_coef": 0.1},
        "optimizer": {"epochs": 2},
        "policy": {"model": "m", "dtype": "float32", "gradient_checkpointing": True},
    },
    "eq. 9": {"loss": {"kl": "trpo", "kl_coef": 1.0}, "optimizer": {"epochs": 2}},
    "eq. 12 per sequence": {"loss": {"kl": "reward", "kl_coef": 0.1, "ratio": "sequence-mean"}},
    "value head, clipped": {
        "value": {"lr": 1e-2},
        "advantage": {"baseline": "none"},
        "optimizer": {"max_grad_norm": 0.05},
    },
    "adapters": K3,
    "bfloat16": {"policy": {"model": "m", "dtype": "bfloat16"}},
    "bfloat16 adapters": {"policy": {"model": "m", "dtype": "bfloat16", "gradient_checkpointing": True}},
}


def optimizer_of(case, accelerator, *, shared):
    given = CASES[case]
    config = run_config(**{**given, "optimizer": {**FAR, **given.get("optimizer", {})}})
    small = torch.bfloat16 if config.policy.dtype == "bfloat16" else None

    def model(seed):
        made = tiny_model("stablelm", seed=seed, tied=case != "untied embeddings")  # no norm in float32 of its own
        made = made.double() if small is None else made
        if "adapters" in case:
            made = add_lora(made.to(small or torch.float64), Lora(r=4), seed=3)
            for name, weight in made.named_parameters():
                if "lora_" in name:
                    weight.data = weight.data.to(torch.float64 if small is None else torch.float32)
        if shared:
            shard(made, accelerator.device, accelerator.num_processes)
        return policy_of(made)

    reference = model(1) if config.loss.kl not in ("none", "trpo") and "adapters" not in case else None
    return Optimizer(model(0), config, accelerator, reference=reference)


def shares():
    """What each of two processes trains on in two steps: the second has more to do, then the first has nothing."""
    members = some(12)
    return [members[:4], members[4:]], [[], members]


def plain(state):
    """The optimizer's tensors, in order."""
    return [value for slots in state["adamw"]["state"].values() for value in slots.values()]


def one_rank(folder):
    rank, accelerator = int(os.environ["RANK"]), Accelerator()
    for number, case in enumerate(CASES):
        optimizer = optimizer_of(case, accelerator, shared=True)
        model = optimizer.policy.model
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        updates = [optimizer.update(members[rank], step) for step, members in enumerate(shares(), 1)]
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        state = optimizer.state_dict()
        optimizer.load_state_dict(copy.deepcopy(state))
        assert all(torch.equal(a, b) for a, b in zip(plain(state), plain(optimizer.state_dict()), strict=True))
        slots = optimizer._descent.adamw.state_dict()["state"].values()
        found = {
            "weights": full_weights(model, keep=True),
            "state": state,
            "metrics": [update.metrics for update in updates],
            "logprobs": [update.logprobs for update in updates],
            "held": sum(weight.to_local().numel() for weight in model.parameters()),
            "held_state": sum(slot["exp_avg"].to_local().numel() for slot in slots if type(slot["exp_avg"]) is DTensor),
        }
        torch.save(found, folder / f"{number}-{rank}.pt")


@pytest.mark.slow
def test_two_processes_share_the_policy_and_learn_what_one_learns(tmp_path):
    ranks.live(2, one_rank, tmp_path)
    for number, case in enumerate(CASES):
        exact = "bfloat16" not in case
        optimizer = optimizer_of(case, Accelerator(cpu=True), shared=False)
        wanted = [optimizer.update([*ours, *theirs], step) for step, (ours, theirs) in enumerate(shares(), 1)]
        both = [torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        for found in both:
            for one, update in zip(found["metrics"], wanted, strict=True):
                assert one.keys() == update.metrics.keys()
                for name in one.keys() - {"computed"}:
                    near = pytest.approx(update.metrics[name], abs=1e-9 if exact else 1e-2, rel=1e-9 if exact else 1e-2)
                    assert one[name] == near, (case, name)
            if exact:
                named = dict(optimizer.policy.model.named_parameters(remove_duplicate=False))
                for name, weight in found["weights"].items():
                    torch.testing.assert_close(weight, named[name], rtol=0, atol=1e-9, msg=f"{case}: {name}")
                for value, other in zip(plain(found["state"]), plain(optimizer.state_dict()), strict=True):
                    torch.testing.assert_close(value, other, rtol=0, atol=1e-9, msg=case)
        for step, update in enumerate(wanted):
            told = {name: value for found in both for name, value in found["logprobs"][step].items()}
            assert told == pytest.approx(update.logprobs, abs=1e-9 if exact else 0.5)
        whole = sum(weight.numel() for weight in optimizer.policy.model.parameters())
        trained = sum(w.numel() for w in optimizer.policy.model.parameters() if w.requires_grad)
        assert sum(found["held"] for found in both) == whole
        assert sum(found["held_state"] for found in both) == trained
        assert max(found["held"] for found in both) < 0.51 * whole
        assert max(found["held_state"] for found in both) < 0.51 * trained


def wrong_rank(folder):
    rank = int(os.environ["RANK"])
    optimizer = optimizer_of("tied embeddings", Accelerator(), shared=True)
    before = full_weights(optimizer.policy.model, keep=True)
    if rank:  # its loss is no number, in the first of three passes
        optimizer.objective.kl_coef = float("nan")
    try:
        optimizer.update(shares()[0][rank], 1)
    except GrapeError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    after = full_weights(optimizer.policy.model, keep=True)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_all_processes(tmp_path):
    ranks.live(2, wrong_rank, tmp_path)
    assert (tmp_path / "0.txt").read_text() == "step 1: another process has numbers that are not finite"
    assert (tmp_path / "1.txt").read_text().startswith("step 1: the loss is nan with response 'r")


# Whole runs.

RUN = {
    "questions": 6,
    "steps": 4,
    "sampling": {"questions": 4, "responses": 4, "rows": 8},
    "optimizer": {"epochs": 2, "micro_tokens": 300},
    "improve": {"share": 0.25},
    "loss": {"kl": "k3", "kl_coef": 0.1},
    "evaluate": {"questions": {"path": "heldout.jsonl"}, "every": 2},
    "checkpoint": {"every": 1, "keep": 9},
}


def train(folder, overrides, options):
    """One process of a run in a folder. One that does not lead has another log, where there can be none."""
    os.chdir(folder)
    written = []
    if int(os.environ.get("RANK", "0")):
        overrides = (*overrides, "log=nowhere/log.duckdb")
        sys.addaudithook(lambda event, arguments: writing(event, arguments) and written.append(arguments[0]))
    asyncio.run(grape.train("run.yaml", overrides=overrides, **options))
    assert [str(path) for path in written if str(path).startswith((str(folder), "."))] == []
    assert not Path("nowhere").exists()


def writing(event, arguments):
    """Whether an event of Python's audit is of a file that is written, in a folder that is named relative to it."""
    if event in ("os.mkdir", "os.rename"):
        return True
    return event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def begun(folder, url, kind):
    folder.mkdir()
    tiny_folder(folder / "policy", tied=kind != "untied embeddings")
    with chdir(folder):
        apprentice(Path(), judge=url, **RUN, policy={"lora": {"r": 4} if kind == "adapters" else None})
        rows = [{"question_id": f"h{n}", "question": f"Write h{n}.", "category": "letters"} for n in range(3)]
        Path("heldout.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def metrics(folder, run="not like '%.heldout'"):
    found = ask(folder / "log.duckdb", f"select step, metrics from steps where run {run} order by step")
    return {step: json.loads(text) for step, text in found}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "first", "then"), [("tied embeddings", 2, 1), ("untied embeddings", 1, 3), ("adapters", 2, 1)]
)
def test_a_shared_run_is_the_run_of_one_process_and_either_goes_on_as_the_other(tmp_path, kind, first, then):
    with JudgeServer(fair) as server:
        one, two = (begun(tmp_path / name, server.url, kind) for name in ("one", "two"))
        ranks.live(1, train, one, (), {})
        ranks.live(first, train, two, ("steps=3", f"policy.shard={first > 1}"), {})
        ranks.live(then, train, two, (f"policy.shard={then > 1}",), {"resume": True})
    ours, theirs = metrics(one), metrics(two)
    assert ours.keys() == theirs.keys() == {1, 2, 3, 4}
    for step, wanted in ours.items():
        assert wanted.keys() == theirs[step].keys()
        for name in wanted.keys() - {"seconds", "computed"}:
            assert theirs[step][name] == pytest.approx(wanted[name], abs=1e-5, rel=1e-5), (step, name)
        names = [path.name for path in sorted((one / f"checkpoints/step-{step:06d}").iterdir())]
        assert names == [path.name for path in sorted((two / f"checkpoints/step-{step:06d}").iterdir())]
        for name in names:
            ours_, theirs_ = (folder / f"checkpoints/step-{step:06d}" / name for folder in (one, two))
            if name.endswith(".safetensors"):
                weights, others = load_file(ours_), load_file(theirs_)
                assert weights.keys() == others.keys()
                for weight, value in weights.items():
                    torch.testing.assert_close(others[weight], value, rtol=0, atol=1e-5, msg=weight)
            elif name.endswith(".json"):
                told, other = (json.loads(path.read_text()) for path in (ours_, theirs_))
                for settings in (told, other):
                    if "target_modules" in settings:
                        settings["target_modules"].sort()  # PEFT writes a set, in no order
                assert told == other
    heldout = "like '%.heldout'"
    assert metrics(one, heldout).keys() == metrics(two, heldout).keys() - {3} == {0, 2, 4}
    assert metrics(two, heldout)[4]["weighted/mean"] == pytest.approx(metrics(one, heldout)[4]["weighted/mean"])
    texts = "select step, response_id, route, response from responses where run not like '%.heldout' order by all"
    assert ask(one / "log.duckdb", texts) == ask(two / "log.duckdb", texts)
    # The first eight responses of a step are the first process's: its mean is not the one that eq. 15 takes.
    sql = """
        select avg(confidence), avg(confidence) filter (place <= 8), count(*) from (
            select v.confidence, row_number() over (order by r.rowid) as place
            from responses r join verdicts v using (run, step, response_id)
            where v.item = 'pleasant' and r.step = 1 and r.run not like '%.heldout'
        )
    """
    ((mean, of_first, count),) = ask(two / "log.duckdb", sql)
    assert count == 16
    assert theirs[1]["confidence/letters/pleasant"] == pytest.approx(mean, abs=1e-12)
    assert abs(of_first - mean) > 1e-3


def command(folder):
    """`grape train` in a process of its own, with a stderr of its own."""
    os.chdir(folder)
    log = os.open(f"stderr-{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    sys.argv = ["grape", "train", "run.yaml", "policy.shard=true", "steps=1000", "evaluate=null"]
    from grape.cli import main

    main()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_run_in_one_line(tmp_path, victim):
    with JudgeServer(fair) as server:
        folder = begun(tmp_path / "run", server.url, "tied embeddings")
        both = ranks.begin(2, command, folder)
        wait_for((folder / "checkpoints/step-000002").exists, 120)
        os.kill(both[victim].pid, signal.SIGKILL)
        both[1 - victim].join(60)
    assert both[1 - victim].exitcode == 1
    told = (folder / f"stderr-{1 - victim}.txt").read_text()
    assert told.splitlines()[-1].startswith("grape: another process of the run has ended: ")
    assert "Traceback" not in told


# Fast.


def test_a_weight_that_is_not_shared_out_is_one_line():
    with pytest.raises(GrapeError) as caught:
        check_shared(tiny_model())
    assert str(caught.value) == "policy.shard: 24 weights are not shared out, such as model.embed_tokens.weight"


def test_a_model_that_does_not_say_what_its_layers_are_is_refused():
    model = tiny_model()
    assert [type(layer).__name__ for layer in layers(model)] == ["Qwen3DecoderLayer"] * 2
    model._no_split_modules = None
    with pytest.raises(ConfigError) as caught:
        layers(model)
    assert str(caught.value) == "policy.shard: Qwen3ForCausalLM does not say what its layers are"


def test_one_process_shares_with_nobody(tmp_path):
    policy = {"model": str(tiny_folder(tmp_path)), "dtype": "float32", "shard": True}
    learner = Learner(run_config(policy=policy), Accelerator(cpu=True), None)
    assert not is_shared(learner.policy.model)
    assert learner.state().weights is None


def test_gradients_are_summed_in_buckets():
    sizes = [3, 5, 1, 9, 8, 0, 2]
    weights = [torch.zeros(size) for size in sizes] + [torch.zeros(1, dtype=torch.float64)]
    found = buckets(weights, 8)
    assert [[weight.numel() for weight in few] for few in found] == [[3, 5], [1], [9], [8, 0], [2], [1]]
    assert [id(weight) for few in found for weight in few] == [id(weight) for weight in weights]
