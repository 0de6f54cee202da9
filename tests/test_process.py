"""`grape reward-model` with labelled steps: where a label counts, what is learned, and what is said of a bad row."""

from __future__ import annotations

import tiny  # isort: skip (before torch)

import asyncio
import json
import math
import random
from contextlib import chdir

import duckdb
import pytest
import torch
import yaml

from grape.agreement import wilson
from grape.chat import chat_ids
from grape.errors import ConfigError
from grape.judge.reward_model import RewardModel, read_classifier
from grape.lessons import read_lessons
from grape.recipes import DataConfig, RewardModelRun, load_recipe
from grape.tuning import tune

ROW = {"question": "1+1?", "steps": ["One.", "Then two.", "So 3."], "labels": [True, True, False]}
SAID = {"Yes.": 1, "Hm.": 0, "No.": -1}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.tiny_folder(tmp_path_factory.mktemp("process") / "policy")


def taught(folder, policy, rows, *overrides, **sections):
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "policy": {"model": str(policy), "dtype": "float32"},
        "data": {"path": "steps.jsonl"},
        "loss": {"kind": "process"},
        "optimizer": {"lr": 3e-3, "batch": 8},
        "checkpoint": {"dir": "checkpoints"},
        "log": "log.duckdb",
        **sections,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    with chdir(folder):
        return tune(load_recipe(RewardModelRun, "run.yaml", overrides))


def refused(folder, policy, rows, *overrides, **sections):
    with pytest.raises(ConfigError) as caught:
        taught(folder, policy, rows, *overrides, **sections)
    return str(caught.value)


def metrics(folder, step):
    with duckdb.connect(str(folder / "log.duckdb"), read_only=True) as log:
        return json.loads(log.execute("select metrics from steps where step = ?", [step]).fetchone()[0])


# What is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [100_000, 1])
def test_a_label_counts_at_the_last_token_of_its_step_and_nowhere_else(tmp_path, policy, tokens):
    """By transformers' own forward pass over prompt and steps, each with its end of line."""
    rows = [ROW, {"question": "Who?", "steps": ["Hm.", "I."], "labels": [0, 1]}]
    rows.append({"question": "Why?", "steps": ["Because."], "labels": [-1]})
    done = taught(tmp_path, policy, rows, optimizer={"lr": 1e-12, "micro_tokens": tokens})
    model, tokenizer = read_steps(tmp_path / done.folder)
    assert model.config.id2label == {0: "wrong", 1: "neutral", 2: "right"}
    total, right = 0.0, 0
    for row in rows:
        ids = chat_ids(tokenizer, [{"role": "user", "content": row["question"]}], "here")
        for step, label in zip(row["steps"], row["labels"], strict=True):
            ids += tokenizer(f"{step}\n")["input_ids"]
            with torch.no_grad():
                logits = model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, -1].double().tolist()
            place = {"True": 2, "False": 0}.get(str(label), int(label) + 1)
            total += math.log(sum(map(math.exp, logits))) - logits[place]
            right += logits.index(max(logits)) == place
    found = metrics(tmp_path, 1)
    assert found["loss"] == pytest.approx(total / 6, rel=1e-5)
    assert found["accuracy"] == pytest.approx(right / 6)
    shares = {name: found[f"labels/{name}"] for name in ("wrong", "neutral", "right")}
    assert shares == pytest.approx({"wrong": 2 / 6, "neutral": 1 / 6, "right": 3 / 6})
    assert found["examples"] == 3


def read_steps(folder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


# What is learned --------------------------------------------------------------------------------------------------


def test_each_step_is_told_by_its_own_label_and_the_interval_is_of_the_steps(tmp_path, policy):
    draw = random.Random(0)
    rows = []
    for number in range(40):
        said = draw.choices(list(SAID), k=3)
        rows.append({"question": f"Number {number}?", "steps": said, "labels": [SAID[one] for one in said]})
    done = taught(tmp_path, policy, rows, optimizer={"lr": 3e-3, "batch": 8, "epochs": 4}, heldout={"share": 0.25})
    first, last = done.heldout[0], done.heldout[max(done.heldout)]
    assert first["accuracy"] < 0.6
    assert last["accuracy"] > 0.9
    assert (last["accuracy_low"], last["accuracy_high"]) == wilson(last["accuracy"], 30)
    assert (last["examples"], last["accuracy_low"] > 0.7) == (10, True)


@pytest.mark.slow
def test_sums_of_small_numbers_are_told_from_mistakes(tmp_path, policy):
    draw = random.Random(0)
    rows = []
    for number in range(400):
        steps, labels = [], []
        for _ in range(3):
            a, b, right = draw.randint(1, 2), draw.randint(1, 2), draw.random() < 0.5
            said = a + b if right else draw.choice([other for other in (2, 3, 4) if other != a + b])
            steps.append(f"{a}+{b}={said}")
            labels.append(right)
        rows.append({"question": str(number), "steps": steps, "labels": labels})
    done = taught(tmp_path, policy, rows, optimizer={"lr": 3e-3, "batch": 16, "epochs": 8}, heldout={"share": 0.2})
    last = done.heldout[max(done.heldout)]
    assert last["accuracy_low"] > 0.85 > 0.65 > last["labels/right"] > 0.35


# What is wrong ----------------------------------------------------------------------------------------------------


def test_false_and_true_are_the_numbers_minus_one_and_one():
    rows = [{"question": "q", "steps": ["a", "b"], "labels": labels} for labels in ([True, False], [1, -1], [1.0, -1])]
    lessons = read_lessons(DataConfig(path="rows"), "steps", rows).lessons
    assert {one.labels for one in lessons} == {(1, -1)}
    assert {(one.steps, one.responses) for one in lessons} == {(("a\n", "b\n"), ("a\nb\n",))}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"labels": [True]}, "labels: there are 1 for 3 steps"),
        ({"labels": [True, 2, False]}, "labels.1: a step is true or false, or 1 (right), 0 (neutral) or -1 (wrong), not 2"),
        ({"labels": [True, "no", 1]}, "labels.1: a step is true or false, or 1 (right), 0 (neutral) or -1 (wrong), not 'no'"),
        ({"labels": []}, "labels: List should have at least 1 item after validation, not 0 (got [])"),
        ({"steps": ["a", " ", "b"]}, "steps.1: the response has no text"),
        ({"steps": "a. b. c."}, "steps: Input should be a valid list (got 'a. b. c.')"),
        ({"question": None}, "question: is missing; the row has: steps, labels"),
        ({"steps": None}, "steps: Field required; the row has: question, labels"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_line(row, said):
    with pytest.raises(ConfigError) as caught:
        read_lessons(DataConfig(path="rows"), "steps", [{**ROW, **row}])
    assert str(caught.value) == f"rows: row 1: {said}"


def test_what_cannot_be_meant_is_one_line(tmp_path, policy):
    rows = [{**ROW, "labels": labels} for labels in ([1, 1, 0], [0, 1, 1])]
    assert refused(tmp_path, policy, rows) == (
        "steps.jsonl: labels: are 0 and 1, none is -1, and 0 is neutral: wrong and right are false and true, or -1 and 1"
    )
    assert refused(tmp_path, policy, [ROW], loss={"kind": "process", "margin": True}).endswith(
        "loss.margin: goes with kind bradley-terry, not process"
    )
    assert refused(tmp_path, policy, [ROW], loss={"kind": "outcome"}) == (
        "steps.jsonl: line 1: response: Field required; the row has: question, steps, labels"
    )


def test_an_item_refuses_a_process_reward_model_and_so_does_a_run_of_another_kind(tmp_path, policy):
    done = taught(tmp_path, policy, [ROW], optimizer={"lr": 1e-12})
    folder = tmp_path / done.folder
    with pytest.raises(ConfigError, match=r"^reward_model: .*: has 3 labels; a reward model has one$"):
        asyncio.run(RewardModel(str(folder)).reach())
    with pytest.raises(ConfigError, match=r"has 3 labels"):
        read_classifier(str(folder), "reward_model: here")
    pairs = [{"question": "q", "chosen": "a", "rejected": "b"}]
    said = refused(tmp_path, folder, pairs, loss={"kind": "bradley-terry"}, checkpoint={"dir": "other"})
    assert said == f"policy.model: {folder}: a classifier, but not one of one label"
    again = taught(tmp_path, folder, [ROW], checkpoint={"dir": "again"})
    assert again.folder.is_relative_to("again")
