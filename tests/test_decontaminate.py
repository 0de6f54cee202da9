"""Taught questions that are held out too: found by their 8-grams in `grape sft`, `grape train` and `grape export`."""

from __future__ import annotations

import tiny  # isort: skip (before torch)

import json
from datetime import UTC, datetime

import pytest
from apprentice import apprentice
from click.testing import CliRunner

from grape.cli import cli
from grape.config import load_run
from grape.course import read_course
from grape.decontaminate import asked, overlaps, without
from grape.errors import ConfigError
from grape.export import export
from grape.log import Log
from grape.recipes import SftRun, parse_recipe
from grape.tasks import Sft
from grape.training import begin

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]
ALPHABET = list("abcdefghijklmnop")


def words(*some):
    return " ".join(some)


def test_a_question_is_found_where_more_than_half_of_its_words_stand_in_shared_8_grams():
    held = words(*WORDS)  # 16 words
    assert overlaps([words("so", *WORDS[:8], "and", "so")], [held]) == {}  # 8 of 16 are no more than half
    assert overlaps([words("so", *WORDS[3:12], "and")], [held]) == {0: 0}  # 9 are
    assert overlaps([words(*WORDS[:7], "or", *WORDS[7:14])], [held]) == {}  # 14 words, but no 8 in a row
    assert overlaps([words(*WORDS[:8], "or", *WORDS[8:])], [held]) == {0: 0}  # two 8-grams, all words
    assert overlaps(["nothing", held, "else"], ["other", held]) == {1: 1}


def test_case_and_punctuation_do_not_count_and_a_short_question_is_found_only_where_it_is_equal():
    assert overlaps([words(*WORDS).upper().replace(" ", ", ") + "!"], [words(*WORDS)]) == {0: 0}
    short = ["What is 2+2?", "what  IS 2+2?", "What is 2-2?", "What is 2+2? Say it."]
    assert overlaps(short, ["What is 2+2?"]) == {0: 0, 1: 0}


def test_the_longer_question_need_not_be_the_held_out_one_and_the_first_that_is_found_is_named():
    long = words(*ALPHABET, *WORDS, *ALPHABET)
    assert overlaps([long], [words(*WORDS)]) == {0: 0}
    assert overlaps([words(*WORDS)], [long]) == {}  # 16 of 48 words
    assert overlaps([long], ["x", words(*WORDS), words(*ALPHABET), words(*WORDS)]) == {0: 1}


def test_a_wording_that_held_out_questions_share_is_a_form():
    """All ask in the same nine words; what tells them apart does not make up half of them."""
    form = words(*WORDS[:9])
    held = [f"{form} {name}" for name in ("red", "green", "blue")]
    assert overlaps([f"{form} black", f"{form} red"], held) == {1: 0}
    assert overlaps([f"{form} black"], held[:1]) == {0: 0}  # one alone has no form
    tails = [words(*(f"{name}{number}" for number in range(10))) for name in "abc"]
    held = [f"{form} {tail}" for tail in tails]
    assert overlaps([f"{form} new ones", f"{tails[1]} by itself"], held) == {1: 1}


def test_of_a_chat_its_users_are_asking():
    turns = [{"role": role, "content": f"{role}!"} for role in ("system", "user", "assistant", "tool")]
    assert asked(turns) == "user!\ntool!"
    assert asked("text") == "text"


# Where it is asked for ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.tiny_policy(tmp_path_factory.mktemp("decontaminate") / "policy")


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def course(policy, taught, **heldout):
    base = {"policy": {"model": "p"}, "checkpoint": {"dir": "c"}, "data": {"path": taught}, "heldout": heldout}
    config = parse_recipe(SftRun, base, "run.yaml")
    return read_course(config, policy, Sft(policy, config))


def test_a_run_warns_of_taught_questions_that_are_held_out_too_or_leaves_them_out(policy, tmp_path, caplog):
    rows = [{"question": f"{n}?", "response": "a"} for n in range(5)]
    data = lines(tmp_path / "d.jsonl", rows)
    held = lines(tmp_path / "held.jsonl", [{"question": "new?", "response": "a"}, rows[4]])
    told = (
        f"{data}: 1 of 5 taught questions overlap held-out ones by their 8-grams, the first: {data}: line 5 with "
        f"{held}: line 2"
    )
    got = course(policy, data, data=held)
    assert (len(got.examples), len(got.heldout)) == (5, 2)
    assert caplog.messages == [f"{told} (heldout.overlap: drop leaves them out)"]
    caplog.clear()
    got = course(policy, data, data=held, overlap="drop")
    assert [one.lesson.place for one in got.examples] == [f"{data}: line {n}" for n in (1, 2, 3, 4)]
    assert len(got.heldout) == 2
    assert caplog.messages == [f"{told}: left out"]
    with pytest.raises(ConfigError) as caught:
        course(policy, data, data=held, overlap="fail")
    assert str(caught.value) == f"{told} (heldout.overlap: fail)"
    caplog.clear()
    course(policy, data, data=held, overlap="allow")
    assert caplog.messages == []
    with pytest.raises(ConfigError, match=r"5 of 5 taught .* line 1: heldout.overlap: drop leaves none$"):
        course(policy, data, data=data, overlap="drop")


def test_a_share_that_is_held_out_is_looked_at_too(policy, tmp_path, caplog):
    rows = [{"question": f"{words(*WORDS)} {n}", "response": "a"} for n in range(2)]
    rows += [{"question": f"{n}?", "response": "a"} for n in range(2)]
    data = lines(tmp_path / "d.jsonl", rows[:2])
    got = course(policy, data, share=0.5)
    assert (len(got.examples), len(got.heldout), len(caplog.messages)) == (1, 1, 1)
    caplog.clear()
    course(policy, lines(tmp_path / "e.jsonl", rows[2:]), share=0.5)
    assert caplog.messages == []


def test_grape_train_leaves_out_questions_that_evaluate_asks(tmp_path, caplog):
    path = apprentice(tmp_path)
    held = {"path": str(tmp_path / "heldout.jsonl"), "category": "letters"}
    (tmp_path / "heldout.jsonl").write_text('{"question": "WRITE 3."}\n{"question": "Write 9."}\n')

    def names(*overrides):
        config = load_run(path, [f"evaluate={json.dumps({'questions': held})}", *overrides])
        material = begin(config, resume=False, allow_changes=False, name="r").material
        assert list(material.plans) == list(material.questions.rows.questions)
        return list(material.plans)

    everything = [f"q{n}" for n in range(8)]
    assert names() == everything
    source = f"{tmp_path}/questions.jsonl"
    told = (
        f"{source}: 1 of 8 taught questions overlap held-out ones by their 8-grams, the first: {source}: line 4 with "
    )
    assert caplog.messages == [f"{told}{tmp_path}/heldout.jsonl: line 1 (evaluate.overlap: drop leaves them out)"]
    assert names("evaluate.overlap=drop") == [name for name in everything if name != "q3"]
    with pytest.raises(ConfigError, match=r"evaluate.overlap: fail"):
        names("evaluate.overlap=fail")
    assert names("evaluate.overlap=allow") == everything


@pytest.mark.slow
def test_grape_export_leaves_out_what_overlaps_a_file_and_counts_it(tmp_path):
    with Log(tmp_path / "log.duckdb") as log:
        key = {"run": "r", "category": "c"}
        questions = {"a": words(*WORDS), "b": json.dumps([{"role": "user", "content": words(*ALPHABET)}]), "c": "New?"}
        log.append(
            runs=[{"run": "r", "kind": "score", "started": datetime.now(UTC)}],
            questions=[{**key, "question_id": name, "question": text} for name, text in questions.items()],
            responses=[
                {**key, "step": 0, "question_id": name, "response_id": name, "response": "yes"} for name in questions
            ],
            rewards=[
                {**key, "step": 0, "question_id": name, "response_id": name, "reward": 1.0, "weighted": 1.0}
                for name in questions
            ],
        )
    held = [{"question": f"Say: {words(*WORDS)}"}, {"messages": [{"role": "user", "content": words(*ALPHABET[1:])}]}]
    against = lines(tmp_path / "held.jsonl", held)
    log, out = str(tmp_path / "log.duckdb"), str(tmp_path / "out.jsonl")
    done = CliRunner().invoke(cli, ["export", "sft", "--log", log, "--out", out, "--against", against])
    assert done.stdout == f"{out}: 1 rows, 2 left out, whose questions overlap {against}\n"
    assert json.loads((tmp_path / "out.jsonl").read_text())["question_id"] == "c"
    whole = export("responses", log, tmp_path / "all.jsonl")
    assert (whole.count, whole.overlapping) == (3, 0)
    lines(tmp_path / "held.jsonl", [*held, {"question": "new?"}])
    with pytest.raises(ConfigError, match=rf"run r: nothing to export as sft with --against {against}$"):
        export("sft", log, tmp_path / "none.jsonl", against=against)


@pytest.mark.parametrize("row", ['{"prompt": "x"}', "[1]", '{"messages": ["x"]}', '{"question": 3}'])
def test_a_row_without_a_question_is_one_line(tmp_path, row):
    (tmp_path / "held.jsonl").write_text(f'{{"question": "x"}}\n{row}\n')
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/held.jsonl: line 2: needs a question or messages \(got "):
        without([], tmp_path / "held.jsonl")
    (tmp_path / "held.jsonl").write_text("{")
    with pytest.raises(ConfigError, match=r"held.jsonl: line 1: not JSON"):
        without([], tmp_path / "held.jsonl")
