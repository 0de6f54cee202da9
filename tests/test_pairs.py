"""`grape pairs`: the best against the worst of each group, as rewards, an item or a judge say; stored once."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from critiques import ask, lines, scores, store
from loopback import Answer, JudgeServer, user_text, verdict

from grape.errors import ConfigError
from grape.pairs import pairs
from grape.rows import read

GRAPE = Path(sys.executable).parent / "grape"


def made(folder, **options):
    return asyncio.run(pairs(folder / "log.duckdb", **options))


def counts(report):
    names = ("groups", "ties", "narrow", "unscorable", "failed", "undecided", "inconsistent", "stored")
    return {name: getattr(report, name) for name in names if getattr(report, name)}


def ids(report):
    return [(row["chosen_id"], row["rejected_id"], row["margin"]) for row in report.rows]


def error_of(folder, **options):
    with pytest.raises(ConfigError) as caught:
        made(folder, **options)
    return str(caught.value).replace(f"{folder}/", "")


def test_the_best_response_of_a_group_is_preferred_to_the_worst(tmp_path):
    store(tmp_path / "log.duckdb", {"a": scores(0.5, 1.0, 0.25, 0.75), "b": scores(0.0, 0.5)})
    report = made(tmp_path, out=tmp_path / "pairs.jsonl")
    first = {
        "question_id": "a", "category": "c", "question": "Question a?", "chosen": "answer 1", "rejected": "answer 2",
        "chosen_id": "a/1", "rejected_id": "a/2", "margin": 0.75,
    }  # fmt: skip
    second = {**first, "question_id": "b", "question": "Question b?", "chosen": "answer 1", "rejected": "answer 0",
              "chosen_id": "b/1", "rejected_id": "b/0", "margin": 0.5}  # fmt: skip
    assert lines(tmp_path / "pairs.jsonl") == report.rows == [first, second]
    assert counts(report) == {"groups": 2, "stored": 2}
    stored = "select run, step, question_id, category, chosen_id, rejected_id, source, item, judge, margin, probability"
    assert ask(tmp_path / "log.duckdb", f"{stored} from preferences order by rowid") == [
        ("r1", 0, "a", "c", "a/1", "a/2", "rubric", None, None, 0.75, None),
        ("r1", 0, "b", "c", "b/1", "b/0", "rubric", None, None, 0.5, None),
    ]


def test_ties_small_spreads_and_unscorable_responses_make_no_pair_and_are_counted(tmp_path):
    groups = {
        "tie": scores(0.1 + 0.2, 0.3), "narrow": scores(0.5, 0.6), "just": scores(0.1, 0.3), "one": scores(1.0, None),
        "none": scores(None, None), "some": scores(None, 0.2, 0.9),
    }  # fmt: skip
    store(tmp_path / "log.duckdb", groups)
    report = made(tmp_path, margin=0.2)
    assert [row[:2] for row in ids(report)] == [("just/1", "just/0"), ("some/2", "some/1")]
    assert counts(report) == {"groups": 6, "ties": 1, "narrow": 1, "unscorable": 2, "stored": 2}


def test_a_text_is_not_better_than_itself(tmp_path):
    same = [{"text": "x", "weighted": 1.0}, {"text": "y", "weighted": 0.75}, {"text": "x", "weighted": 0.0}]
    only = [{"text": "x", "weighted": 1.0}, {"text": "x", "weighted": 0.0}]
    store(tmp_path / "log.duckdb", {"a": same, "b": only})
    report = made(tmp_path)
    assert ids(report) == [("a/1", "a/0", 0.25)]  # x is worth 0.5
    assert counts(report) == {"groups": 2, "ties": 1, "stored": 1}


@pytest.mark.slow
def test_a_column_of_rewards_or_an_item_says_what_is_better(tmp_path):
    members = [
        {"text": "p", "weighted": 0.2, "reward": {"reward": 0.9},
         "items": {"kind": {"score": 0.5}, "rude": {"score": 0.0, "polarity": "undesirable"}}},
        {"text": "q", "weighted": 0.8, "reward": {"reward": 0.1},
         "items": {"kind": {"score": None}, "rude": {"score": 1.0, "polarity": "undesirable"}}},
        {"text": "s", "weighted": 0.4, "reward": {"reward": 0.4},
         "items": {"kind": {"score": 0.25}, "rude": {"score": 0.5, "polarity": "undesirable", "applicable": False}}},
    ]  # fmt: skip
    store(tmp_path / "log.duckdb", {"a": members})
    found = {by: ids(made(tmp_path, by=by)) for by in ("reward", "kind", "rude")}
    assert {by: [row[:2] for row in rows] for by, rows in found.items()} == {
        "reward": [("a/0", "a/1")], "kind": [("a/0", "a/2")], "rude": [("a/0", "a/1")],
    }  # fmt: skip
    assert found["rude"][0][2] == 1.0
    assert ask(tmp_path / "log.duckdb", "select item, count(*) from preferences group by item order by item") == [
        ("kind", 1), ("rude", 1), (None, 1),
    ]  # fmt: skip


@pytest.mark.slow
def test_each_step_of_a_training_run_is_a_group_of_its_own(tmp_path):
    for step in (1, 2):
        store(tmp_path / "log.duckdb", {"a": scores(0.1 * step, 0.5)}, kind="train", step=step)
    report = made(tmp_path)
    assert [row[:2] for row in ids(report)] == [("a-1-1", "a-1-0"), ("a-2-1", "a-2-0")]
    assert ask(tmp_path / "log.duckdb", "select step from preferences order by rowid") == [(1,), (2,)]


@pytest.mark.slow
def test_the_last_run_is_the_one_that_began_last_and_no_run_beside_another(tmp_path):
    log = tmp_path / "log.duckdb"
    store(log, {"a": scores(0, 1)}, run="z", day=1)
    store(log, {"b": scores(0, 1)}, run="a", day=2)
    for day, kind in enumerate(("controls", "heldout", "difficulty"), 3):
        store(log, {kind: scores(0, 1)}, run=f"a.{kind}", day=day, kind=kind)
    assert (made(tmp_path).run, made(tmp_path, run="z").run) == ("a", "z")
    assert error_of(tmp_path, run="a.controls") == (
        "log.duckdb: run a.controls is one of controls: nobody learns from its responses"
    )
    assert error_of(tmp_path, run="a.heldout").startswith("log.duckdb: run a.heldout is one of heldout")
    assert ids(made(tmp_path, run="a.difficulty")) == [("difficulty/1", "difficulty/0", 1.0)]


def test_the_same_pairs_are_stored_once_and_others_beside_them(tmp_path):
    store(tmp_path / "log.duckdb", {"a": scores(0.0, 1.0), "b": scores(0.25, 0.5)})
    assert [made(tmp_path).stored, made(tmp_path).stored, made(tmp_path, margin=0.5).stored] == [2, 0, 0]
    assert ask(tmp_path / "log.duckdb", "select count(*) from preferences") == [(2,)]


def kinder(body):
    """Whether the response with the word kind is shown as response A."""
    text = user_text(body)
    return text.index("kind") < text.index("rude")


KIND = [{"text": "so rude", "weighted": 0.9}, {"text": "so kind", "weighted": 0.4}]
BOTH = {"judges": {"j": "j.yaml"}, "criterion": "Which one is warmer?"}


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A function that makes the pairs of these groups with a judge that behaves so."""
    monkeypatch.chdir(tmp_path)

    def run(behave, groups, **options):
        if not Path("log.duckdb").exists():
            store(tmp_path / "log.duckdb", groups)
        with JudgeServer(behave) as server:
            fields = {"judge": "gentle", "endpoint": server.url, "model": "m", "retries": 0}
            Path("j.yaml").write_text(json.dumps(fields))
            return made(tmp_path, **{**BOTH, **options}), server.bodies

    return run


def test_a_judge_chooses_between_the_two_in_both_orders(judged, tmp_path):
    behave = lambda body, number: verdict("A" if kinder(body) else "B", 0.9)  # noqa: E731
    report, bodies = judged(behave, {"a": KIND}, out=tmp_path / "p.jsonl")
    (row,) = report.rows
    assert (row["chosen"], row["rejected"], row["margin"]) == ("so kind", "so rude", -0.5)
    assert row["probability"] == pytest.approx(0.9)
    assert row["consistent"] is True
    assert lines(tmp_path / "p.jsonl") == [row]
    assert sorted(kinder(body) for body in bodies) == [False, True]
    assert all("Which one is warmer?" in user_text(body) for body in bodies)
    sql = "select source, item, judge, margin, round(probability, 9), consistent, json_array_length(calls) from preferences"
    ((source, item, *rest),) = ask(tmp_path / "log.duckdb", sql)
    assert (source, rest) == ("judge", ["gentle", -0.5, 0.9, True, 2])
    assert item.startswith("criterion-")
    assert ask(tmp_path / "log.duckdb", "select run, count(*) from judge_calls group by run") == [("r1", 2)]


def test_what_a_judge_cannot_tell_makes_no_pair_and_is_counted(judged, tmp_path):
    def behave(body, number):
        text = user_text(body)
        if "Question broken?" in text:
            return Answer(status=500) if kinder(body) else verdict("A", 0.9)
        if "Question placed?" in text:
            return verdict("A", 0.8)
        if "Question leaning?" in text:
            return verdict("A", 0.9 if kinder(body) else 0.6)
        return verdict("A" if kinder(body) else "B", 1.0)

    report, _ = judged(behave, dict.fromkeys(("broken", "placed", "leaning", "clear"), KIND))
    assert counts(report) == {"groups": 4, "failed": 1, "undecided": 1, "inconsistent": 2, "stored": 2}
    found = {row["question_id"]: (round(row["probability"], 9), row["consistent"]) for row in report.rows}
    assert found == {"leaning": (0.65, False), "clear": (1.0, True)}


@pytest.mark.slow
def test_a_judge_is_asked_once_about_a_pair_whatever_is_run_again(judged, tmp_path):
    behave = lambda body, number: verdict("A" if kinder(body) else "B", 0.9)  # noqa: E731
    first, bodies = judged(behave, {"a": KIND})
    again, more = judged(behave, {})
    other, others = judged(behave, {}, criterion="Which one is shorter?")
    assert (len(bodies), len(more), len(others)) == (2, 0, 2)
    assert (first.stored, again.stored, other.stored) == (1, 0, 1)
    assert again.rows == first.rows


@pytest.mark.slow
def test_the_id_of_an_item_stands_for_its_criterion(judged, tmp_path):
    members = [{**one, "items": {"warm": {"score": 0.5}}} for one in KIND]
    behave = lambda body, number: verdict("A" if kinder(body) else "B", 0.9)  # noqa: E731
    _, bodies = judged(behave, {"a": members}, criterion="warm")
    assert all("Is warm." in user_text(body) for body in bodies)
    _, none = judged(behave, {}, criterion="Is warm.")
    assert none == []
    assert ask(tmp_path / "log.duckdb", "select item, count(*) from preferences group by item") == [("warm", 1)]


def test_a_chat_is_shown_and_written_as_its_messages(judged, tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    store(tmp_path / "log.duckdb", {"a": KIND, "b": KIND}, questions={"a": {"question": json.dumps(chat)}})
    report, bodies = judged(lambda body, number: verdict("A", 0.9 if kinder(body) else 0.6), {})
    assert [row["question"] for row in report.rows] == [chat, "Question b?"]
    assert sum("user: Hello?" in user_text(body) for body in bodies) == 2
    made(tmp_path, out=tmp_path / "p.parquet")
    rows = [row for _, row in read(tmp_path / "p.parquet")]
    assert [row["question"] for row in rows] == [chat, [{"role": "user", "content": "Question b?"}]]


def test_parquet_holds_what_json_lines_hold(tmp_path):
    texts = ["\"quoted\", 'twice'\n\r\n\ttab", "\U0001f347 𝔾 ünïcode", "a\x00b \x1b[2J \u202e", "2024-01-01"]
    groups = {
        f"q{n}": [{"text": text, "weighted": 1 / 3}, {"text": "", "weighted": 0.1}] for n, text in enumerate(texts)
    }
    store(tmp_path / "log.duckdb", groups)
    for name in ("p.jsonl", "p.parquet"):
        report = made(tmp_path, out=tmp_path / name)
        assert [row for _, row in read(tmp_path / name)] == report.rows
    assert [row["chosen"] for row in report.rows] == texts
    assert {row["margin"] for row in report.rows} == {1 / 3 - 0.1}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    store(folder / "log.duckdb", {"a": [{"text": "x", "weighted": 0.5, "items": {"kind": {"score": 1.0}}}]})
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "r2"}, "log.duckdb: no run 'r2'; known: r1"),
        ({"by": "kindd"}, "--by: 'kindd' is neither a reward nor an item of run r1; did you mean 'kind'? known: kind, "
         "normalized, reward, weighted"),
        ({"margin": -0.1}, "--margin: -0.1 is not 0 or more"),
        ({"margin": float("nan")}, "--margin: nan is not 0 or more"),
        ({"judges": {"j": "j.yaml"}}, "--judge: needs --criterion: what the responses are to be compared by"),
        ({"judges": {"j": "j.yaml"}, "criterion": " "}, "--judge: needs --criterion: what the responses are to be"),
        ({"criterion": "x"}, "--criterion: needs --judge NAME=FILE, who compares by it"),
        ({"judges": {"j": "j.yaml"}, "criterion": "x"}, "j.yaml: no such file"),
        ({"out": "p.csv"}, "p.csv: rows are written as .jsonl and .parquet, not .csv"),
        ({"out": "p"}, "p: rows are written as .jsonl and .parquet, not a folder"),
        ({"out": "none/p.jsonl"}, "none/p.jsonl: No such file or directory"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_before_any_work(small, monkeypatch, options, message):
    monkeypatch.chdir(small)
    assert error_of(small, **options).startswith(message)
    assert [path.name for path in small.iterdir()] == ["log.duckdb"]


def test_a_log_that_is_not_there_or_empty_is_one_line(tmp_path):
    assert error_of(tmp_path) == "log.duckdb: no such log"
    assert not (tmp_path / "log.duckdb").exists()
    ask(tmp_path / "log.duckdb", "select 1")
    assert error_of(tmp_path) == "log.duckdb: no runs in it"


@pytest.mark.slow
def test_a_killed_comparison_goes_on_with_what_is_missing(tmp_path):
    groups = {f"q{number}": KIND for number in range(4)}
    store(tmp_path / "log.duckdb", groups)
    answer = lambda body: verdict("A" if kinder(body) else "B", 0.9)  # noqa: E731
    command = [GRAPE, "pairs", "--log", "log.duckdb", "--out", "p.jsonl", "--judge", "j=j.yaml", "--criterion", "Kind?"]

    def begin(server):
        fields = {"judge": "j", "endpoint": server.url, "model": "m", "concurrency": 1}
        (tmp_path / "j.yaml").write_text(json.dumps(fields))
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    with JudgeServer(lambda body, number: answer(body) if number < 5 else Answer(hang=True)) as server:
        process = begin(server)
        while len(server.bodies) < 6 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert not (tmp_path / "p.jsonl").exists()
    with JudgeServer(lambda body, number: answer(body)) as server:
        out, error = begin(server).communicate(timeout=60)
    assert (len(server.bodies), len(lines(tmp_path / "p.jsonl"))) == (3, 4), error
    assert out == (
        "4 pairs of 4 groups; 0 ties, 0 below the margin, 0 with fewer than two scores\n"
        "0 comparisons failed, 0 were undecided, 0 preferred another response in the other order\n"
    )
