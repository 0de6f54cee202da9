"""`grape best-of`: what is kept is the best of what the log holds, a second run asks for what is missing, rounds learn."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from apprentice import apprentice, ask, fair
from loopback import JudgeServer

from grape.best_of import best_of, rejection_sampling
from grape.config import load_run
from grape.errors import ConfigError
from grape.lessons import read_lessons
from grape.recipes import ChatDataConfig, SftRun, load_recipe

ROOT = Path(__file__).parents[1]


def select(path, *overrides, **options):
    return asyncio.run(best_of(path, overrides=overrides, **options))


def test_what_is_kept_is_the_best_of_each_question_and_grape_sft_reads_it(tmp_path):
    with JudgeServer(fair) as server:
        run = apprentice(tmp_path, judge=server.url)
        found = select(run, out=tmp_path / "kept.jsonl")
    log = tmp_path / "log.duckdb"
    scored = "from rewards join responses using (run, step, response_id, question_id)"
    greatest = ask(log, f"select question_id, max(weighted) {scored} where trim(response) <> '' group by all")
    assert sorted((row["question_id"], row["reward"]) for row in found.rows) == sorted(greatest)
    ((mean,),) = ask(log, "select avg(weighted) from rewards")
    assert (found.questions, found.mean) == (8, pytest.approx(mean))
    assert found.kept == pytest.approx(sum(reward for _, reward in greatest) / 8)
    assert found.kept > found.mean
    texts = dict(ask(log, "select response_id, response from responses"))
    lessons = read_lessons(ChatDataConfig(path=str(tmp_path / "kept.jsonl")), "chats").lessons
    assert [one.responses[0] for one in lessons] == [texts[row["response_id"]] for row in found.rows]
    assert ask(log, "select kind, count(*) from runs group by all") == [("best-of", 1)]
    assert ask(log, "select count(*) from responses") == [(32,)]


def test_the_best_of_all_the_majority_and_a_floor(tmp_path):
    run = apprentice(tmp_path)
    everything = select(run)
    of_all = select(run, keep="top", number=5, resume=True)
    scored = "from rewards join responses using (run, step, response_id, question_id) where trim(response) <> ''"
    rewards = [reward for (reward,) in ask(tmp_path / "log.duckdb", f"select weighted {scored} order by 1 desc")]
    assert [row["reward"] for row in of_all.rows] == rewards[:5]
    most = select(run, keep="majority", resume=True)
    assert (len(most.rows), most.kl) == (8, None)
    floor = select(run, min_reward=1.0, resume=True)
    assert [row["reward"] for row in floor.rows] == [1.0] * sum(row["reward"] == 1 for row in everything.rows)
    assert everything.run == of_all.run == most.run == floor.run
    right = ask(
        tmp_path / "log.duckdb", "select count(*) filter (weighted >= 1) / 4, max(weighted) >= 1 from rewards group by question_id"
    )  # fmt: skip
    assert everything.pass_at[1] == pytest.approx(sum(share for share, _ in right) / 8)
    assert everything.pass_at[4] == sum(solved for _, solved in right) / 8
    assert list(everything.pass_at) == [1, 2, 4]


def test_a_run_that_was_stopped_asks_for_what_is_missing_and_ends_as_if_it_never_was(tmp_path):
    with JudgeServer(fair) as server:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        whole, cut = (apprentice(tmp_path / name, judge=server.url, questions=12) for name in ("a", "b"))
        wanted = select(whole)

        def stop(step):
            if step.step == 2:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            select(cut, report=stop)
        asked = len(server.bodies)
        found = select(cut, resume=True)
        assert len(server.bodies) - asked < 20  # of the last four questions alone
    assert [row["messages"] for row in found.rows] == [row["messages"] for row in wanted.rows]
    assert ask(tmp_path / "b/log.duckdb", "select step, num_responses from steps order by step") == [
        (1, 16), (2, 16), (3, 16),
    ]  # fmt: skip


def test_other_temperatures_may_be_sampled_at(tmp_path):
    run = apprentice(tmp_path, questions=2)
    greedy = select(run, "sampling.temperature=0")
    texts = ask(tmp_path / "log.duckdb", "select count(distinct response) from responses group by question_id")
    assert (texts, greedy.questions) == ([(1,), (1,)], 2)


def test_what_is_wrong_is_one_line(tmp_path):
    run = apprentice(tmp_path, questions=2)
    for options, said in (
        ({"keep": "top"}, "--number: is how many --keep top keeps, and goes with nothing else"),
        ({"number": 3}, "--number: is how many --keep top keeps, and goes with nothing else"),
        ({"out": tmp_path / "kept.txt"}, f"{tmp_path}/kept.txt: rows are written as .jsonl and .parquet, not .txt"),
    ):
        with pytest.raises(ConfigError) as caught:
            select(run, **options)
        assert str(caught.value) == said
    assert not (tmp_path / "log.duckdb").exists()


def lesson(folder):
    """The file of SFT for rounds."""
    path = folder / "sft.yaml"
    recipe = {
        "policy": {"model": "replaced", "dtype": "float32"},
        "data": {"path": "replaced"},
        "optimizer": {"lr": 3e-3, "epochs": 4, "batch": 8},
        "checkpoint": {"dir": str(folder / "rounds")},
        "log": str(folder / "log.duckdb"),
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.slow
def test_rounds_of_rejection_sampling_raise_what_the_rubric_asks_for_and_resume(tmp_path):
    run = load_run(apprentice(tmp_path, questions=24, sampling={"questions": 24, "responses": 8}))
    recipe = load_recipe(SftRun, lesson(tmp_path))
    done = asyncio.run(rejection_sampling(run, recipe, 3))
    means = [selected.mean for selected, _ in done]
    assert means[2] > means[0] + 0.2
    assert all(selected.kept > selected.mean for selected, _ in done)
    kinds = ask(tmp_path / "log.duckdb", "select kind from runs order by started")
    assert [kind for (kind,) in kinds] == ["best-of", "sft"] * 3
    again = asyncio.run(rejection_sampling(run, recipe, 3, resume=True))
    assert [(one.run, two.run) for one, two in again] == [(one.run, two.run) for one, two in done]
    assert len(ask(tmp_path / "log.duckdb", "select run from runs")) == 6


@pytest.mark.slow
def test_rounds_go_on_with_the_adapters_of_the_first(tmp_path):
    recipe = load_recipe(SftRun, lesson(tmp_path), ["policy.lora={r: 2}"])
    done = asyncio.run(rejection_sampling(load_run(apprentice(tmp_path)), recipe, 2))
    assert [(two.folder / "adapter_model.safetensors").is_file() for _, two in done] == [True, True]


@pytest.mark.slow
def test_the_rounds_of_the_quickstart_learn_on_its_words_and_on_held_out_ones(tmp_path, monkeypatch):
    """A part of its words, without the judge."""
    monkeypatch.chdir(ROOT)
    rows = (ROOT / "examples/quickstart/questions.jsonl").read_text().splitlines()[:240]
    (tmp_path / "questions.jsonl").write_text("\n".join(rows))
    (tmp_path / "rubrics").mkdir()
    for path in (ROOT / "examples/quickstart/rubrics").glob("*.yaml"):
        rubric = yaml.safe_load(path.read_text())
        rubric["items"] = [item for item in rubric["items"] if "judge" not in item]
        (tmp_path / "rubrics" / path.name).write_text(yaml.safe_dump(rubric))
    own = [f"rubrics={tmp_path}/rubrics", "judges={}", f"log={tmp_path}/log.duckdb", "sampling.responses=4"]
    taught = [f"checkpoint.dir={tmp_path}/rounds", f"log={tmp_path}/log.duckdb"]
    recipe = load_recipe(SftRun, "examples/quickstart/sft.yaml", taught)
    run = load_run("examples/quickstart/run.yaml", [*own, f"questions.path={tmp_path}/questions.jsonl"])
    done = asyncio.run(rejection_sampling(run, recipe, 2))
    assert done[1][0].mean > done[0][0].mean + 0.1
    held = [*own, "questions.path=examples/quickstart/heldout.jsonl"]
    before = select("examples/quickstart/run.yaml", *held)
    after = select("examples/quickstart/run.yaml", *held, f"policy.model={done[1][1].folder}")
    assert after.mean > before.mean + 0.1
    assert after.pass_at[1] > before.pass_at[1]


@pytest.mark.slow
def test_the_command_prints_a_line_a_round(tmp_path):
    run = apprentice(tmp_path, questions=8)
    grape = str(Path(sys.executable).with_name("grape"))

    def command(*arguments):
        return subprocess.run([grape, "best-of", str(run), *arguments], capture_output=True, text=True, timeout=200)

    done = command("--rounds", "2", "--sft", str(lesson(tmp_path)))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "round",
        "questions",
        "kept",
        "reward",
        "of",
        "all",
        "of",
        "kept",
        "KL",
        "at",
        "most",
        "pass@1",
        "pass@2",
        "pass@4",
    ]
    assert [line.split()[:3] for line in lines[1:]] == [["1", "8", "8"], ["2", "8", "8"]]
    assert f"policy: {tmp_path}/rounds/round-2/policy/step-" in done.stderr
    assert command("--rounds", "2").returncode == 2
    one = json.loads(command("--json", "--keep", "top", "--number", "3").stdout)
    assert (one["rows"], one["questions"], list(one["pass_at"])) == (3, 8, ["1", "2", "4"])
