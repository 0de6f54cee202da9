"""`grape export`: sets to train on, whole or not at all, and rows that can be read again."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from critiques import ask, lines, scores, store
from loopback import Answer, JudgeServer, user_text, verdict

import grape
from grape.errors import ConfigError
from grape.export import export
from grape.lessons import read_lessons
from grape.pairs import pairs
from grape.recipes import DataConfig
from grape.resources import digest
from grape.rows import read, read_rows

GRAPE = Path(sys.executable).parent / "grape"
RUBRIC = """
rubric: support
category: support
items:
  - {id: kind, criterion: Is kind., judge: j, scale: binary}
  - {id: clear, criterion: Is clear., judge: j}
"""
ROWS = [
    {"question_id": "a", "category": "support", "question": "May I?", "response": "Sure thing.", "reference": "Yes."},
    {"question_id": "a", "category": "support", "question": "May I?", "response": "BROKEN", "reference": "Yes."},
    {"question_id": "b", "category": "support", "response": "No way.",
     "question": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Can I?"}]},
]  # fmt: skip


def out_of(folder, what, name="out.jsonl", **options):
    """What is written, read again, without the places."""
    export(what, folder / "log.duckdb", folder / name, **{"force": True, **options})
    return [{name: value for name, value in row.items() if value is not None} for _, row in read(folder / name)]


def error_of(folder, what, name="out.jsonl", **options):
    with pytest.raises(ConfigError) as caught:
        export(what, folder / "log.duckdb", folder / name, **options)
    return str(caught.value).replace(f"{folder}/", "")


def judging(body, number):
    """A judge that cannot be read about one response, and scores the others by their item."""
    text = user_text(body)
    if "BROKEN" in text and "Is kind." in text:
        return "no idea"
    if "Is kind." in text:
        return verdict(1, 0.75, "It is nice.")
    return verdict(0.25 if "BROKEN" in text else 0.5, 0.75, "A part of it.")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """The log of a run that a judge took part in, by HTTP."""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "r.yaml").write_text(RUBRIC)
    with JudgeServer(judging) as server:
        fields = {"judge": "gentle", "endpoint": server.url, "model": "m", "retries": 0}
        (folder / "j.yaml").write_text(json.dumps(fields))
        score(folder, ROWS, folder / "log.duckdb")
    return folder


def score(folder, rows, log):
    return asyncio.run(grape.score(rows, rubrics=folder / "r.yaml", judges={"j": folder / "j.yaml"}, log=log))


def test_the_best_response_to_each_question_of_all_steps_is_taught(tmp_path):
    chat = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}])
    for step in (1, 2):
        groups = {"a": scores(0.1 * step, 0.5), "b": scores(0.75, 0.25 * step), "c": scores(None, None)}
        store(tmp_path / "log.duckdb", groups, kind="train", step=step, questions={"b": {"question": chat}})
    found = out_of(tmp_path, "sft")
    assert found == [
        {"question_id": "a", "category": "c", "response_id": "a-1-1", "reward": 0.5,
         "messages": [{"role": "user", "content": "Question a?"}, {"role": "assistant", "content": "answer 1"}]},
        {"question_id": "b", "category": "c", "response_id": "b-1-0", "reward": 0.75,
         "messages": [*json.loads(chat), {"role": "assistant", "content": "answer 0"}]},
    ]  # fmt: skip
    assert out_of(tmp_path, "sft", min_reward=0.75) == found[1:]
    assert out_of(tmp_path, "sft", limit=1) == found[:1]
    assert error_of(tmp_path, "sft", "none.jsonl", min_reward=0.8) == (
        "log.duckdb: run r1: nothing to export as sft with --min-reward 0.8"
    )


def test_another_reward_may_say_which_response_is_best(tmp_path):
    members = [{"text": "x", "weighted": 0.2, "reward": {"reward": 0.9}}, *scores(0.8)]
    store(tmp_path / "log.duckdb", {"a": members})
    (weighted,), (reward,) = (out_of(tmp_path, "sft", by=by) for by in ("weighted", "reward"))
    assert [(row["response_id"], row["reward"]) for row in (weighted, reward)] == [("a/1", 0.8), ("a/0", 0.9)]


def test_the_system_prompt_stands_there_where_it_was_used(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts/generate").mkdir(parents=True)
    (tmp_path / "prompts/generate/mine.jinja").write_text("You are brave.\n")
    hashes = {
        "fresh": digest("You are brave.\n"),
        "gone": "0" * 16,
        "given": None,
        "improve": digest("You are brave.\n"),
    }
    groups = {name: [{"text": "x", "weighted": 1.0, "response": {"prompt_hash": hash_, "route": "fresh"}}]
              for name, hash_ in hashes.items()}  # fmt: skip
    groups["improve"][0]["response"]["route"] = "improve"
    chat = json.dumps([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}])
    groups["chat"] = groups["fresh"]
    store(tmp_path / "log.duckdb", groups, questions={"chat": {"question": chat}})
    found = {row["question_id"]: row["messages"][:-1] for row in out_of(tmp_path, "sft")}
    assert found.pop("fresh") == [
        {"role": "system", "content": "You are brave."}, {"role": "user", "content": "Question fresh?"}
    ]  # fmt: skip
    assert found.pop("chat")[0] == {"role": "system", "content": "You are brave.\n\nBe brief."}
    assert {name: [turn["role"] for turn in turns] for name, turns in found.items()} == {
        "gone": ["user"], "given": ["user"], "improve": ["user"],
    }  # fmt: skip
    assert "system prompts that are in prompts/generate no more are left out: 0000000000000000" in caplog.text


def test_preferences_are_written_with_their_texts_the_newest_of_each(tmp_path):
    log = tmp_path / "log.duckdb"
    store(log, {"a": scores(0.25, 0.75), "b": scores(1.0, 0.0)})
    assert error_of(tmp_path, "preference") == "log.duckdb: no run in it has preferences: `grape pairs` makes them"
    asyncio.run(pairs(log))
    row = {"run": "r1", "step": 0, "question_id": "a", "category": "c", "chosen_id": "a/1", "rejected_id": "a/0",
           "source": "judge", "item": "kind", "judge": "j"}  # fmt: skip
    turned = {**row, "chosen_id": "a/0", "rejected_id": "a/1", "probability": 0.75, "consistent": True, "margin": -0.5}
    with grape.Log(log) as writer:
        writer.append(preferences=[{**row, "probability": 0.5}])
        writer.append(preferences=[turned])
    found = out_of(tmp_path, "preference")
    assert [(r["chosen_id"], r["margin"], r["source"]) for r in found] == [
        ("a/1", 0.5, "rubric"), ("b/0", 1.0, "rubric"), ("a/0", -0.5, "judge"),
    ]  # fmt: skip
    assert found[2] == {
        "question_id": "a", "category": "c", "question": "Question a?", "chosen": "answer 0", "rejected": "answer 1",
        "chosen_id": "a/0", "rejected_id": "a/1", "margin": -0.5, "probability": 0.75, "consistent": True,
        "source": "judge", "item": "kind", "judge": "j",
    }  # fmt: skip
    assert out_of(tmp_path, "preference", judge="j") == out_of(tmp_path, "preference", item="kind") == found[2:]


@pytest.mark.slow
def test_what_judges_were_asked_and_replied_is_written_where_the_verdict_is_ok(scored):
    found = out_of(scored, "judge")
    assert [(row["response_id"], row["item"], row["score"], row["purpose"]) for row in found] == [
        ("a-0", "kind", 1.0, "score"), ("a-0", "clear", 0.5, "score"), ("a-1", "clear", 0.25, "score"),
        ("b-0", "kind", 1.0, "score"), ("b-0", "clear", 0.5, "score"),
    ]  # fmt: skip
    first = found[0]
    assert (first["judge"], first["model"], first.get("label")) == ("gentle", "m", None)
    assert [turn["role"] for turn in first["messages"]] == ["system", "user", "assistant"]
    assert "Sure thing." in first["messages"][1]["content"] and "Is kind." in first["messages"][1]["content"]
    assert first["messages"][2]["content"] == verdict(1, 0.75, "It is nice.")
    asked = ask(scored / "log.duckdb", "select messages from judge_calls where outcome = 'ok'")
    assert sorted(json.dumps(row["messages"][:-1]) for row in found) == sorted(
        json.dumps(json.loads(messages)) for (messages,) in asked
    )
    assert out_of(scored, "judge", item="kind") == [found[0], found[3]]


@pytest.fixture
def copied(scored, tmp_path):
    """A copy of the log to change."""
    for name in ("log.duckdb", "r.yaml", "j.yaml"):
        (tmp_path / name).write_bytes((scored / name).read_bytes())
    return tmp_path


@pytest.mark.slow
def test_calls_that_people_agree_with_can_be_chosen(copied):
    log = copied / "log.duckdb"
    assert error_of(copied, "judge", labelled=True).startswith(
        "log.duckdb: run " + ask(log, "select run from runs")[0][0] + ": nothing to export as judge with --labelled"
    )
    labels = [("a-0", "kind", "ann", 0.0), ("a-0", "kind", "ann", 0.75), ("a-0", "clear", "ann", 0.24),
              ("a-1", "clear", "ann", 1.0), ("a-1", "clear", "ben", 0.0), ("b-0", "kind", "ann", 0.5)]  # fmt: skip
    names = ("response_id", "item", "labeler", "score")
    ((run,),) = ask(log, "select run from runs")
    with grape.Log(log) as writer:
        writer.append(human_labels=[{"run": run, **dict(zip(names, label, strict=True))} for label in labels])
    found = out_of(copied, "judge", labelled=True)
    assert [(row["response_id"], row["item"], row["label"]) for row in found] == [
        ("a-0", "kind", 0.75), ("a-1", "clear", 0.5),
    ]  # fmt: skip


@pytest.mark.slow
def test_calls_of_an_earlier_run_stand_behind_the_verdicts_of_a_later_one(copied):
    before = out_of(copied, "judge", item="clear")
    with JudgeServer(lambda body, number: Answer(status=500)) as server:  # nobody needs to be asked
        text = (copied / "j.yaml").read_text()
        fields = {**json.loads(text), "endpoint": server.url}
        (copied / "j.yaml").write_text(json.dumps(fields))
        score(copied, ROWS, copied / "log.duckdb")
        assert [body for body in server.bodies if "Is clear." in user_text(body)] == []
    assert len(ask(copied / "log.duckdb", "select run from runs")) == 2
    assert out_of(copied, "judge", item="clear") == before


def test_critiques_are_written_with_what_they_are_about(scored):
    found = out_of(scored, "critique")
    assert [(row["response_id"], row["item"]) for row in found] == [
        ("a-0", "kind"), ("a-0", "clear"), ("a-1", "clear"), ("b-0", "kind"), ("b-0", "clear"),
    ]  # fmt: skip
    assert found[0] == {
        "question_id": "a", "category": "support", "question": "May I?", "response_id": "a-0",
        "response": "Sure thing.", "item": "kind", "criterion": "Is kind.", "reasoning": "It is nice.", "score": 1.0,
        "confidence": 0.75, "judge": "gentle",
    }  # fmt: skip
    assert found[3]["question"] == ROWS[2]["question"]


@pytest.mark.slow
def test_responses_are_scored_again_to_the_same_rewards(copied):
    found = out_of(copied, "responses", "again.jsonl")
    assert found == [{**row, "response_id": id_} for row, id_ in zip(ROWS, ("a-0", "a-1", "b-0"), strict=True)]
    with JudgeServer(judging) as server:
        (copied / "j.yaml").write_text(
            json.dumps({**json.loads((copied / "j.yaml").read_text()), "endpoint": server.url})
        )
        again = score(copied, copied / "again.jsonl", copied / "second.duckdb")
    stored = dict(ask(copied / "log.duckdb", "select response_id, reward from rewards"))
    assert {record["response_id"]: record["reward"] for record in again} == stored


HOSTILE = ["\"quoted\", 'twice'\n\r\n\ttab", "\U0001f347 𝔾 ünïcode", "a\x00b \x1b[2J \u202e", "2024-01-01", "", "{{x}}"]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    groups = {f"q{n}": [{"text": text, "weighted": 1 / 3, "items": {"k": {"score": 0.1, "reasoning": text + "!"}}}]
              for n, text in enumerate(HOSTILE)}  # fmt: skip
    store(folder / "log.duckdb", groups)
    return folder


@pytest.mark.slow
def test_both_kinds_of_file_hold_the_same_rows(hostile):
    for what in ("sft", "critique"):
        rows = out_of(hostile, what)
        assert out_of(hostile, what, "out.parquet") == rows
    assert [row["response"] for row in rows] == HOSTILE
    assert [row["reasoning"] for row in rows] == [f"{text}!" for text in HOSTILE]
    assert {row["score"] for row in rows} == {0.1}


@pytest.mark.slow
def test_a_folder_holds_the_same_rows(hostile, tmp_path):
    import datasets

    for what in ("sft", "critique"):
        export(what, hostile / "log.duckdb", tmp_path / what)
        loaded = datasets.load_from_disk(tmp_path / what)
        full = [{name: value for name, value in row.items() if value is not None} for row in loaded]
        assert full == out_of(hostile, what)


def test_half_a_surrogate_pair_comes_back_or_is_one_line(tmp_path):
    chat = json.dumps([{"role": "user", "content": "half \ud83c"}])
    store(tmp_path / "log.duckdb", {"a": scores(1.0)}, questions={"a": {"question": chat}})
    (row,) = out_of(tmp_path, "sft")
    assert row["messages"][0]["content"] == "half \ud83c"
    assert error_of(tmp_path, "sft", "out.parquet") == (
        "out.parquet: row 1: holds half of a surrogate pair, which is no text there: write .jsonl"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.duckdb", "out.jsonl"]


@pytest.mark.slow
def test_nothing_is_overwritten_without_force(tmp_path):
    store(tmp_path / "log.duckdb", {"a": scores(1.0)})
    for name in ("out.jsonl", "out.parquet", "folder"):
        export("sft", tmp_path / "log.duckdb", tmp_path / name)
        assert error_of(tmp_path, "sft", name) == f"{name}: exists already; --force replaces it"
        assert export("sft", tmp_path / "log.duckdb", tmp_path / name, force=True).count == 1
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert error_of(tmp_path, "sft", "mine", force=True) == (
        "mine: not a folder that datasets wrote: it is not replaced"
    )
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    store(folder / "log.duckdb", {"a": [{"text": "x", "weighted": 1.0, "items": {"kind": {"score": 1.0}}}]})
    return folder


@pytest.mark.parametrize(
    ("what", "name", "options", "message"),
    [
        ("stf", "o.jsonl", {}, "export: no 'stf'; did you mean 'sft'? known: critique, judge, preference, responses, sft"),
        ("sft", "o.csv", {}, "o.csv: rows are written as .jsonl, .parquet, or a folder (no suffix), not .csv"),
        ("sft", "none/o.jsonl", {}, "none/o.jsonl: No such file or directory"),
        ("sft", "none/o", {}, "none/o: No such file or directory"),
        ("sft", "log.duckdb", {}, "log.duckdb: rows are written as"),
        ("sft", "x" * 300 + ".jsonl", {}, "File name too long"),
        ("sft", "o.jsonl", {"run": "r9"}, "log.duckdb: no run 'r9'; known: r1"),
        ("sft", "o.jsonl", {"by": "kind"}, "--by: no 'kind'; known: normalized, reward, weighted"),
        ("sft", "o.jsonl", {"limit": 0}, "--limit: 0 is not 1 or more"),
        ("sft", "o.jsonl", {"item": "kind"}, "--item: goes with preference and judge and critique, not with sft"),
        ("judge", "o.jsonl", {"min_reward": 0.5}, "--min-reward: goes with sft, not with judge"),
        ("critique", "o.jsonl", {"labelled": True}, "--labelled: goes with judge, not with critique"),
        ("critique", "o.jsonl", {"item": "kin"}, "log.duckdb: run r1 has no verdict of a judge with item 'kin'; did you"),
        ("critique", "o.jsonl", {}, "log.duckdb: run r1: nothing to export as critique (verdicts without reasoning are"),
        ("judge", "o.jsonl", {}, "log.duckdb: run r1: nothing to export as judge (of replayed judges the log has no"),
        ("preference", "o.jsonl", {"run": "r1"}, "log.duckdb: run r1 has no preferences: `grape pairs` makes them"),
        ("responses", "o.parquet", {}, "o.parquet: responses are written as .jsonl: their metadata has no columns of"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_nothing_is_written(small, what, name, options, message):
    said = error_of(small, what, name, **options)
    assert "\n" not in said
    assert said.startswith(message) if len(name) < 100 else said.endswith(message)
    assert [path.name for path in small.iterdir()] == ["log.duckdb"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_line(small, tmp_path):
    tmp_path.chmod(0o500)
    assert error_of(small, "sft", tmp_path / "o.jsonl").endswith("o.jsonl: Permission denied")


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """A limit on the size of files stands for the disk."""
    text = "x" * 200_000
    store(tmp_path / "log.duckdb", {"a": [{"text": text, "weighted": 1.0}]})
    for name in ("out.jsonl", "out.parquet"):
        command = f"ulimit -f 100; trap '' XFSZ; {GRAPE} export sft --out {name}"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["log.duckdb"]


@pytest.mark.slow
def test_the_command_says_what_it_wrote(tmp_path):
    store(tmp_path / "critiques.duckdb", {"a": scores(0.25, 0.75)})
    done = subprocess.run([GRAPE, "export", "sft", "--out", "s.jsonl"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        0, "s.jsonl: 1 rows\n", "grape: run r1 of critiques.duckdb\n",
    )  # fmt: skip
    assert len(lines(tmp_path / "s.jsonl")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "folder"])
def test_the_trainers_read_what_is_written(scored, tmp_path, name):
    def taught(what, kind):
        export(what, tmp_path / "log.duckdb", tmp_path / name, force=True)
        return read_lessons(DataConfig(path=str(tmp_path / name)), kind).lessons

    (tmp_path / "log.duckdb").write_bytes((scored / "log.duckdb").read_bytes())
    assert [one.responses for one in taught("sft", "chats")] == [("Sure thing.",), ("No way.",)]
    assert next(one.responses for one in taught("judge", "chats")) == (verdict(1, 0.75, "It is nice."),)
    asyncio.run(pairs(tmp_path / "log.duckdb"))
    (pair,) = taught("preference", "pairs")
    assert (pair.responses, pair.prompt) == (("Sure thing.", "BROKEN"), ({"role": "user", "content": "May I?"},))
    assert pair.pairs[0].margin == pytest.approx(0.125)


def test_preferences_can_be_read_as_responses(tmp_path):
    """What has question and response is what `grape score` reads: either side of a pair is."""
    store(tmp_path / "log.duckdb", {"a": scores(0.25, 0.75)})
    asyncio.run(pairs(tmp_path / "log.duckdb", out=tmp_path / "p.parquet"))
    rows = [
        {**{name: row[name] for name in ("question_id", "category", "question")}, "response": row[side]}
        for _, row in read(tmp_path / "p.parquet")
        for side in ("chosen", "rejected")
    ]
    assert [response.text for response in read_rows(rows).responses] == ["answer 1", "answer 0"]
