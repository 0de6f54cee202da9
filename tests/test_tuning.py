"""`grape sft`, `reward-model` and `dpo` on a tiny policy: what they compute, what is learned, and an exact resume."""

from __future__ import annotations

import tiny  # isort: skip (before torch)

import asyncio
import json
import math
import os
import random
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import duckdb
import pytest
import torch
import yaml
from mortal import live, logged, state
from safetensors.torch import load_file

from grape.chat import answer_ids, chat_ids, prompt_ids
from grape.errors import ConfigError
from grape.item import Item
from grape.judge.reward_model import RewardModel, read_classifier
from grape.policy import load_policy
from grape.recipes import DpoRun, RewardModelRun, SftRun, load_recipe
from grape.rollout import Sampling, sample
from grape.tuning import tune
from grape.types import Question, Response

KINDS = ("dpo", "cdpo", "ipo", "simpo", "orpo", "kto")
RUNS = {"sft": SftRun, "reward-model": RewardModelRun, "dpo": DpoRun}
DATA = {"sft": "sft.jsonl", "reward-model": "pairs.jsonl", "dpo": "pairs.jsonl"}


def later(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a random policy and questions whose right answer is the word that they end with."""
    folder = tmp_path_factory.mktemp("tuning")
    tiny.tiny_folder(folder / "policy")
    draw = random.Random(0)
    words = sorted({"".join(draw.choice("abcd") for _ in range(3)) for _ in range(60)})
    draw.shuffle(words)
    rows = {
        "sft": [{"question": f"Say {word}.", "response": word} for word in words],
        "pairs": [{"question": f"Say {w}.", "chosen": w, "rejected": f"{w[::-1]}x"} for w in words],
        "rankings": [{"question": f"Say {w}.", "responses": [w, f"{w}x", f"{w[::-1]}xx"]} for w in words],
        "labels": [
            {"question": f"Say {w}.", "response": w if n % 2 else f"x{w}x", "label": bool(n % 2)}
            for n, w in enumerate(words)
        ],
    }  # fmt: skip
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


@pytest.fixture
def folder(start, tmp_path):
    shutil.copytree(start, tmp_path / "run")
    return tmp_path / "run"


def write(folder, verb, **sections):
    """The run.yaml of a verb."""
    run = {
        "policy": {"model": "policy", "dtype": "float32"},
        "data": {"path": DATA[verb]},
        "optimizer": {"lr": 3e-3, "batch": 8},
        "checkpoint": {"dir": "checkpoints"},
        "log": "log.duckdb",
        **sections,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))


def taught(folder, verb, *overrides, **sections):
    """What a run comes to, in its folder."""
    write(folder, verb, **sections)
    with chdir(folder):
        return tune(load_recipe(RUNS[verb], "run.yaml", overrides))


def refused(folder, verb, *overrides, **sections):
    with pytest.raises(ConfigError) as caught:
        taught(folder, verb, *overrides, **sections)
    return str(caught.value)


def steps(folder):
    """The metrics of each step in the log."""
    with duckdb.connect(str(folder / "log.duckdb"), read_only=True) as log:
        rows = log.execute("select step, metrics from steps order by step").fetchall()
    return {step: json.loads(metrics) for step, metrics in rows}


# What is computed -------------------------------------------------------------------------------------------------


def logprob(policy, question, response):
    """The log-probability of a response's tokens and how many they are, by transformers' own forward pass."""
    prompt = prompt_ids(policy.tokenizer, Question(question_id="q", category="", text=question))
    ids = [*prompt, *answer_ids(policy.tokenizer, response, "here")]
    with torch.no_grad():
        logprobs_TV = policy.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs_TV[at - 1, ids[at]]) for at in range(len(prompt), len(ids))), len(ids) - len(prompt)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("aggregate", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_the_first_loss_of_sft_is_the_likelihood_of_the_responses_alone(folder, aggregate):
    taught(folder, "sft", "data.limit=8", loss={"aggregate": aggregate})
    policy = load_policy(str(folder / "policy"))
    found = [logprob(policy, row["question"], row["response"]) for row in read(folder, "sft")[:8]]
    wanted = {
        "token-mean": -sum(value for value, _ in found) / sum(number for _, number in found),
        "seq-mean-token-sum": -sum(value for value, _ in found) / 8,
        "seq-mean-token-mean": -sum(value / number for value, number in found) / 8,
    }
    (metrics,) = steps(folder).values()
    assert metrics["loss"] == pytest.approx(wanted[aggregate], rel=1e-5)
    assert metrics["nll"] == pytest.approx(wanted["token-mean"], rel=1e-5)
    assert (metrics["examples"], metrics["tokens"]) == (8, sum(number for _, number in found))


def test_the_second_loss_of_dpo_compares_with_the_policy_as_it_began(folder):
    """Both steps see the same four pairs; the checkpoint after the first says what the policy was in the second."""
    options = {"batch": 4, "epochs": 2, "lr": 1e-3}
    taught(folder, "dpo", "data.limit=4", optimizer=options, checkpoint={"dir": "checkpoints", "every": 1})
    first, second = steps(folder).values()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["displacement/chosen"] == pytest.approx(0, abs=1e-5)
    old, new = (load_policy(str(folder / name)) for name in ("policy", "checkpoints/step-000001"))
    ratios = [
        [logprob(new, row["question"], row[side])[0] - logprob(old, row["question"], row[side])[0] for side in SIDES]
        for row in read(folder, "pairs")[:4]
    ]
    margins = [0.1 * (chosen - rejected) for chosen, rejected in ratios]
    assert second["loss"] == pytest.approx(-sum(map(log_sigmoid, margins)) / 4, rel=1e-4)
    assert second["rewards/margin"] == pytest.approx(sum(margins) / 4, rel=1e-3)
    assert second["displacement/chosen"] == pytest.approx(sum(chosen for chosen, _ in ratios) / 4, rel=1e-3)
    assert second["displacement/rejected"] == pytest.approx(sum(rejected for _, rejected in ratios) / 4, rel=1e-3)
    assert second["rewards/accuracy"] == sum(margin > 0 for margin in margins) / 4


SIDES = ("chosen", "rejected")


@pytest.mark.parametrize("pad", [tiny.PAD, tiny.END, None])
def test_the_loss_of_a_reward_model_is_that_of_the_values_that_its_items_give(folder, pad):
    """Trained for no step to speak of: what the judge reads from the result is what the loss was made of."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder / "policy")
    done = taught(folder, "reward-model", "data.limit=6", optimizer={"lr": 1e-12})
    model = RewardModel(str(folder / done.folder))
    item = Item.model_validate({"id": "rm", "criterion": "Good.", "reward_model": "x", "raw": True})
    loss, right = 0.0, 0.0
    for row in read(folder, "pairs")[:6]:
        asked = Question(question_id="q", category="", text=row["question"])
        values = []
        for side in SIDES:
            response = Response(response_id=side, question_id="q", text=row[side])
            values.append(asyncio.run(model.verdict(asked, response, item)).score)
        loss -= log_sigmoid(values[0] - values[1]) / 6
        right += (values[0] > values[1]) / 6
    asyncio.run(model.close())
    (metrics,) = steps(folder).values()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(right)


@pytest.mark.parametrize(
    ("verb", "sections"),
    [
        ("sft", {}),
        ("reward-model", {}),
        ("reward-model", {"data": {"path": "rankings.jsonl"}, "loss": {"kind": "ranking"}}),
        ("reward-model", {"data": {"path": "labels.jsonl"}, "loss": {"kind": "outcome"}}),
        *(("dpo", {"loss": {"kind": kind}}) for kind in KINDS),
    ],
)
@pytest.mark.slow
def test_how_a_batch_is_cut_into_micro_batches_changes_no_step(start, tmp_path, verb, sections):
    weights = []
    for tokens in (100_000, 60, 1):
        folder = tmp_path / str(tokens)
        shutil.copytree(start, folder)
        optimizer = {"lr": 1e-3, "batch": 6, "micro_tokens": tokens}
        done = taught(folder, verb, "data.limit=12", optimizer=optimizer, **sections)
        weights.append(load_file(folder / done.folder / "model.safetensors"))
    for other in weights[1:]:
        for name, weight in weights[0].items():
            assert torch.allclose(weight, other[name], atol=2e-5), name


def test_the_outcome_is_learned_at_every_token_of_the_response_and_no_other(folder):
    taught(
        folder, "reward-model", "data.limit=4", data={"path": "labels.jsonl"}, loss={"kind": "outcome"},
        optimizer={"lr": 1e-12},
    )  # fmt: skip
    model, tokenizer = read_classifier(str(folder / "checkpoints/step-000001"), "here")
    total, number = 0.0, 0
    for row in read(folder, "labels")[:4]:
        question = {"role": "user", "content": row["question"]}
        begin = len(chat_ids(tokenizer, [question], "here"))
        answer = {"role": "assistant", "content": row["response"]}
        ids = chat_ids(tokenizer, [question, answer], "here", complete=True)
        with torch.no_grad():
            values_T = model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, :, 0].double()
        for value in values_T[begin:].tolist():
            total -= log_sigmoid(value if row["label"] else -value)
            number += 1
    (metrics,) = steps(folder).values()
    assert number == sum(len(row["response"]) + 1 for row in read(folder, "labels")[:4])
    assert metrics["loss"] == pytest.approx(total / number, rel=1e-5)


@pytest.mark.slow
def test_all_pairs_of_a_question_are_one_example_that_weighs_as_much_as_a_single_pair(folder):
    rows = read(folder, "pairs")[:2]
    more = [{**rows[0], "rejected": text} for text in ("nothing", "no")]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    done = taught(folder, "reward-model", optimizer={"lr": 1e-12})
    model = RewardModel(str(folder / done.folder))
    item = Item.model_validate({"id": "rm", "criterion": "Good.", "reward_model": "x", "raw": True})

    def value(question, text):
        asked = Question(question_id="q", category="", text=question)
        response = Response(response_id="r", question_id="q", text=text)
        return asyncio.run(model.verdict(asked, response, item)).score

    losses = [
        [-log_sigmoid(value(row["question"], row["chosen"]) - value(row["question"], row["rejected"])) for row in some]
        for some in ([rows[0], *more], [rows[1]])
    ]
    asyncio.run(model.close())
    (metrics,) = steps(folder).values()
    assert metrics["loss"] == pytest.approx(sum(sum(some) / len(some) for some in losses) / 2, rel=1e-4)
    assert metrics["examples"] == 2


# What is learned --------------------------------------------------------------------------------------------------


def test_sft_teaches_the_policy_to_answer_questions_that_it_has_not_seen(folder):
    done = taught(folder, "sft", optimizer={"lr": 5e-3, "epochs": 12, "batch": 8}, heldout={"share": 0.2})
    before, after = done.heldout[0], done.heldout[max(done.heldout)]
    assert after["nll"] < 0.25 * before["nll"]
    with duckdb.connect(str(folder / "log.duckdb"), read_only=True) as log:
        assert log.execute("select run, kind from runs").fetchall() == [(done.run, "sft")]
    policy = load_policy(str(folder / done.folder))
    prompt = tuple(prompt_ids(policy.tokenizer, Question(question_id="q", category="", text="Say abc.")))
    said = []
    sample(
        policy, [prompt], responses=[1], max_tokens=5, generator=torch.Generator().manual_seed(0),
        sampling=Sampling(temperature=0.0, training=False), on_response=said.append,
    )  # fmt: skip
    assert set(said[0].text) <= set("abcd")
    assert len(said[0].text) == 3


def test_a_reward_model_tells_held_out_pairs_apart_with_an_interval(folder):
    done = taught(folder, "reward-model", optimizer={"lr": 3e-3, "epochs": 4, "batch": 8}, heldout={"share": 0.3})
    first, last = done.heldout[0], done.heldout[max(done.heldout)]
    assert last["accuracy"] > 0.9 > first["accuracy"]
    assert last["accuracy_low"] < last["accuracy"] <= last["accuracy_high"] <= 1
    assert last["accuracy_low"] > 0.5


@pytest.mark.parametrize("kind", ["dpo", *map(later, KINDS[1:])])
@pytest.mark.slow
def test_every_kind_of_alignment_parts_held_out_pairs(folder, kind):
    options = {"lr": 1e-3, "epochs": 4, "batch": 8}
    loss = {
        "kind": kind,
        **({"smoothing": 0.1} if kind == "cdpo" else {}),
        **({"gamma": 0.5} if kind == "simpo" else {}),
    }
    done = taught(folder, "dpo", optimizer=options, loss=loss, heldout={"share": 0.2})
    first, last = done.heldout[0], done.heldout[max(done.heldout)]
    assert last["loss"] < first["loss"]
    assert last["rewards/margin"] > first["rewards/margin"] + 0.05
    assert ("displacement/chosen" in last) == (kind in ("dpo", "cdpo", "ipo", "kto"))


# What goes on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "sections"),
    [
        ("sft", {"policy": {"model": "policy", "dtype": "float32", "lora": {"r": 4, "dropout": 0.1}}}),
        ("reward-model", {}),
        ("dpo", {"loss": {"kind": "kto"}}),
    ],
)
@pytest.mark.parametrize("death", [("reported", "step 3"), ("update", "before 4"), ("os.rename", ".step-000004")])
@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_is_the_run_that_was_not(start, tmp_path, verb, sections, death):
    options = {"checkpoint": {"dir": "checkpoints", "every": 2}, "heldout": {"share": 0.2, "every": 3}, "seed": 3}
    for name in ("whole", "killed"):
        shutil.copytree(start, tmp_path / name)
        write(tmp_path / name, verb, optimizer={"lr": 1e-3, "batch": 8, "epochs": 2}, **options, **sections)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    live(whole, verb=verb)
    live(killed, verb=verb, death=death)
    live(killed, verb=verb, resume=True)
    assert state(killed) == state(whole)
    ours, theirs = logged(killed / "log.duckdb"), logged(whole / "log.duckdb")
    assert (ours["steps"], ours["runs"]) == (theirs["steps"], theirs["runs"])


@pytest.mark.parametrize("verb", RUNS)
@pytest.mark.slow
def test_two_processes_teach_what_one_does(start, tmp_path, verb):
    weights = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        shutil.copytree(start, folder)
        write(folder, verb, optimizer={"lr": 1e-3, "batch": 5, "epochs": 2}, heldout={"share": 0.2, "every": 4})
        grape = str(Path(sys.executable).with_name("grape"))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*(torchrun if processes > 1 else []), grape, verb, "run.yaml"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(load_file(sorted(folder.glob("checkpoints/step-*"))[-1] / "model.safetensors"))
    assert all(torch.allclose(weight, weights[1][name], atol=1e-5, rtol=0) for name, weight in weights[0].items())
    one, two = (steps(tmp_path / name) for name in ("1", "2"))
    assert one.keys() == two.keys()
    for step, metrics in one.items():
        told = {name: value for name, value in metrics.items() if step > 1 or "accuracy" not in name}
        assert told == pytest.approx({name: two[step][name] for name in told}, abs=1e-4)  # till then all pairs tie


@pytest.mark.slow
def test_the_result_of_one_stage_begins_the_next(folder):
    first = taught(folder, "sft", "data.limit=16")
    policy = {"model": "checkpoints", "dtype": "float32"}  # the last one of them
    assert first.folder == Path("checkpoints/step-000002")
    other = {"dir": "aligned"}
    second = taught(folder, "dpo", "data.limit=16", policy=policy, checkpoint=other, optimizer={"lr": 1e-3, "batch": 8})
    assert second.folder == Path("aligned/step-000002")
    assert second.run != first.run


# What is wrong ----------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_one_line(folder):
    write(folder, "sft")
    assert refused(folder, "sft", "data.max_tokens=20").startswith("sft.jsonl: line 1: ")
    assert refused(folder, "sft", "data.max_tokens=20").endswith("tokens; there is room for 20")
    assert refused(folder, "sft", "data.max_tokens=20", "data.bad_rows=skip").startswith(
        "sft.jsonl: none of 40 rows can be used; the first: sft.jsonl: line 1: "
    )
    assert refused(folder, "reward-model", "policy.model=./nowhere") == "policy.model: ./nowhere: no such folder"
    assert refused(folder, "sft", "data.path=pairs.jsonl") == (
        "pairs.jsonl: line 1: needs either question and response, or messages; the row has: question, chosen, rejected"
    )
    taught(folder, "sft", "data.limit=8")
    assert refused(folder, "sft", "data.limit=8").startswith("checkpoints: holds run ")
    assert not (folder / "log.duckdb.spool").exists() or not list((folder / "log.duckdb.spool").glob("*.jsonl"))


def test_a_changed_setting_is_named_and_a_finished_run_stays_as_it_is(folder, caplog):
    done = taught(folder, "sft", "data.limit=8")
    before = state(folder)
    with chdir(folder):
        config = load_recipe(SftRun, "run.yaml", ["data.limit=8", "optimizer.lr=1e-3"])
        with pytest.raises(ConfigError, match=r"changed since run .* began: optimizer; --allow-changes goes on"):
            tune(config, resume=True)
        again = tune(load_recipe(SftRun, "run.yaml", ["data.limit=8"]), resume=True)
    assert (again.run, again.folder) == (done.run, done.folder)
    assert state(folder) == before


def test_a_run_goes_on_as_what_it_was_and_compares_with_its_own_rows(folder):
    taught(folder, "dpo", "data.limit=8")
    with chdir(folder):
        again = {"resume": True, "allow_changes": True}
        for verb, overrides, said in (
            ("dpo", ["data.limit=6"], "checkpoints/reference.pt: is of other rows: another checkpoint.dir begins anew"),
            ("dpo", ["data.limit=8", "policy.lora.r=2"], r"policy.lora: run \S+ began without fresh adapters, and"),
            ("sft", ["data.path=sft.jsonl"], "checkpoints: holds a run of grape dpo, not of sft"),
        ):
            with pytest.raises(ConfigError, match=said):
                tune(load_recipe(RUNS[verb], "run.yaml", overrides), **again)
        Path("checkpoints/reference.pt").write_bytes(b"nothing")
        with pytest.raises(ConfigError, match=r"checkpoints/reference.pt: damaged"):
            tune(load_recipe(DpoRun, "run.yaml", ["data.limit=8"]), **again)


@pytest.mark.slow
def test_soft_labels_are_a_label_of_dpo_and_named_where_a_kind_takes_none(folder, caplog):
    rows = [{**row, "probability": 0.75} for row in read(folder, "pairs")[:4]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"lr": 0.01, "batch": 4, "epochs": 2}
    taught(folder, "dpo", optimizer=options)
    assert caplog.messages == []
    last = steps(folder)[2]
    losses = [0.75, 0.25]
    assert last["loss"] > -sum(p * math.log(p) for p in losses) > 0.5  # the entropy of the labels is the least there is
    taught(folder, "dpo", optimizer=options, loss={"kind": "ipo"}, checkpoint={"dir": "other"})
    assert caplog.messages == [
        "pairs.jsonl: 4 pairs have a probability, which ipo does not take: their chosen one counts as surely better"
    ]


def test_a_loss_that_is_no_number_moves_nothing(folder):
    policy = load_policy(str(folder / "policy"))
    with torch.no_grad():
        policy.model.lm_head.weight[5] = float("nan")
    policy.model.save_pretrained(folder / "policy")
    with pytest.raises(Exception, match=r"step 1: the loss is nan with sft.jsonl: line \d+ or one beside it"):
        taught(folder, "sft", "data.limit=8")
    assert not list(folder.glob("checkpoints/step-*"))


def test_the_chat_of_a_reward_model_is_the_one_that_its_items_read(folder):
    """Prompt and response are cut where the two chats part, and together are the whole chat with its end."""
    from grape.lessons import read_lessons
    from grape.tasks import Reward

    config = load_recipe(RewardModelRun, _file(folder))
    with chdir(folder):
        lesson = read_lessons(config.data, "pairs").lessons[0]
        policy = load_policy("policy")
    rows = Reward(policy, config).rows(lesson)
    for (prompt, rest), text in zip(rows, lesson.responses, strict=True):
        whole = chat_ids(
            policy.tokenizer, [*lesson.prompt, {"role": "assistant", "content": text}], "here", complete=True
        )
        assert [*prompt, *rest[:-1]] == whole
    assert rows[0][0] == rows[1][0]
    assert len(rows[0][0]) > 10


def _file(folder):
    write(folder, "reward-model")
    return folder / "run.yaml"
