"""Questions of a run: every source reads alike, bad rows are named, and the order is a function of the position."""

from __future__ import annotations

import gzip
import json
import logging
import random
from collections import Counter

import datasets
import duckdb
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from grape.config import DifficultyConfig, QuestionsConfig
from grape.errors import ConfigError
from grape.order import Order, keep_by_difficulty
from grape.questions import plan_questions, read_questions
from grape.rubric import parse_rubric

ROW = {"question_id": "q", "category": "support", "question": "May I?"}
PROMPTS = [
    {"prompt": "1+1?", "answer": 2, "level": 1, "extra": {"solution": "two"}},
    {"prompt": "2+2?", "answer": 4, "level": 3, "extra": {"solution": "four"}},
]
MAP = {"question": "prompt", "reference": "answer"}


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def config(path="rows", **fields):
    return QuestionsConfig(path=str(path), **fields)


def order_of(count, how="shuffled", *, seed=0, each=1, steps=1, difficulty=None):
    rows = [{**ROW, "question_id": f"q{number}"} for number in range(count)]
    asked = read_questions(config(), rows)
    ids = list(asked.rows.questions)
    settings = config(order=how, difficulty=DifficultyConfig() if difficulty else None)
    return Order.of(asked, ids, settings, seed=seed, count=each, steps=steps, difficulty=difficulty)


def test_columns_become_fields_and_the_others_metadata():
    asked = read_questions(config(map=MAP, category="math"), PROMPTS)
    first, second = asked.rows.questions.values()
    assert (first.question_id, first.category, first.text, first.reference) == ("q-1", "math", "1+1?", "2")
    assert first.metadata == {"level": 1, "extra": {"solution": "two"}}
    assert (second.question_id, second.reference, second.get("level")) == ("q-2", "4", 3)
    assert asked.rows.responses == []
    assert asked.skipped == ()


def test_a_source_may_lie_inside_a_column_and_a_target_may_be_a_further_field():
    fields = {"question": "prompt", "reference": "extra.solution", "difficulty": "level"}
    question = read_questions(config(map=fields, category="math"), PROMPTS).rows.questions["q-2"]
    assert question.reference == "four"
    assert question.metadata == {"answer": 4, "extra": {"solution": "four"}, "difficulty": 3}


def test_a_column_with_a_dot_in_its_name_comes_before_a_field_inside_another():
    row = {"a.b": "whole", "a": {"b": "part"}}
    question = read_questions(config(map={"question": "a.b"}, category="c"), [row]).rows.questions["q-1"]
    assert question.text == "whole"
    assert question.metadata == {"a": {"b": "part"}}


def test_what_a_row_says_of_itself_stands_and_what_is_mapped_comes_before_it():
    row = {**ROW, "question_id": 7, "prompt": "Really?", "metadata": {"level": 2}, "source": "s", "response": "old"}
    question = read_questions(config(map={"question": "prompt"}, category="other"), [row]).rows.questions["7"]
    assert (question.category, question.text) == ("support", "Really?")
    assert question.metadata == {"level": 2, "source": "s", "response": "old"}


def test_the_category_of_the_run_stands_where_a_row_has_none():
    rows = [{"question": "a?", "subject": "algebra"}, {"question": "b?", "subject": None}, {"question": "c?"}]
    asked = read_questions(config(map={"category": "subject"}, category="math"), rows).rows.questions.values()
    assert [question.category for question in asked] == ["algebra", "math", "math"]


def test_chats_and_items_of_their_own_are_read():
    chat = [{"role": "user", "content": "Hello?"}]
    item = {"id": "own", "check": "contains", "with": {"text": "a"}, "weight": None}
    rows = read_questions(config(map={"items": "checks"}), [{**ROW, "question": chat, "checks": [item]}]).rows
    assert rows.questions["q"].prompt == "user: Hello?"
    assert [item.id for item in rows.items["q"]] == ["own"]


def test_files_folders_and_mappings_read_alike(tmp_path):
    settings = {"map": MAP, "category": "math"}
    plain = read_questions(config(lines(tmp_path / "q.jsonl", PROMPTS), **settings))
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.write((tmp_path / "q.jsonl").read_text())
    duckdb.sql(f"copy (from '{tmp_path}/q.jsonl') to '{tmp_path}/q.parquet'")
    data = datasets.Dataset.from_list(PROMPTS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "many")
    for name in ("q.jsonl.gz", "q.parquet", "one", "many"):
        asked = read_questions(config(tmp_path / name, **settings))
        assert asked.rows.questions == plain.rows.questions, name
        assert list(asked.rows.places.values())[1].startswith(str(tmp_path / name)), name
    for source in (PROMPTS, iter(PROMPTS), data, datasets.DatasetDict({"train": data})):
        assert read_questions(config(**settings), source).rows.questions == plain.rows.questions
    held_out = read_questions(config(tmp_path / "many", split="test", **settings)).rows.questions
    assert [question.text for question in held_out.values()] == ["2+2?"]


def test_a_null_is_as_if_absent_in_every_source(tmp_path):
    rows = [{**ROW, "tests": None, "note": None, "reference": "r"}, {**ROW, "question_id": "p", "reference": None}]
    for source in (None, rows, datasets.Dataset.from_list(rows)):
        asked = read_questions(config(lines(tmp_path / "q.jsonl", rows)), source).rows.questions
        assert (asked["q"].tests, asked["q"].metadata, asked["p"].reference) == (None, {}, None)


@pytest.mark.parametrize(
    ("rows", "settings", "line"),
    [
        ([{"prompt": "Hm?"}], {"map": MAP}, "{path}: line 1: answer: map takes reference from it and the row lacks it; "
         "the row has: prompt"),
        ([{"prompt": "Hm?", "answer": None}], {"map": MAP},
         "{path}: line 1: answer: map takes reference from it and the row lacks it; the row has: prompt"),
        ([{"prompt": "Hm?"}], {"map": {"question": "prompt"}}, "{path}: line 1: category: Field required; the row has: prompt"),
        ([{"prompt": 3}], {"map": {"question": "prompt"}, "category": "c"},
         "{path}: line 1: question: Input should be a valid string (got 3)"),
        ([ROW, "{"], {}, "{path}: line 2: not JSON: "),
        (["[1]"], {}, "{path}: line 1: Input should be a valid dictionary or instance of QuestionRow (got [1])"),
        ([ROW, ROW], {}, "{path}: line 2: question_id: 'q' stands already in {path}: line 1"),
        ([{**ROW, "question_id": "q-2"}, {k: v for k, v in ROW.items() if k != "question_id"}], {},
         "{path}: line 2: question_id: 'q-2' stands already in {path}: line 1"),
        ([{**ROW, "metadata": "text"}], {}, "{path}: line 1: metadata: Input should be a valid dictionary (got 'text')"),
        ([{**ROW, "metadata": "text", "more": 1}], {},
         "{path}: line 1: metadata: Input should be a valid dictionary (got 'text')"),
        ([{**ROW, "items": [{"id": "a", "check": "exact"}, {"id": "a", "check": "exact"}]}], {},
         "{path}: line 1: items.1.id: duplicate id 'a'"),
        ([ROW], {"order": "easy-to-hard"}, "{path}: line 1: difficulty: order easy-to-hard goes by this number (got None); "
         "or set questions.difficulty, which measures it"),
        ([{**ROW, "difficulty": "hard"}], {"order": "easy-to-hard", "difficulty": DifficultyConfig()},
         "{path}: line 1: difficulty: order easy-to-hard goes by this number (got 'hard'); "),
        ([], {}, "{path}: no rows"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_line_with_its_number(tmp_path, rows, settings, line):
    path = lines(tmp_path / "q.jsonl", rows)
    with pytest.raises(ConfigError) as caught:
        read_questions(config(path, **settings))
    assert str(caught.value).startswith(line.format(path=path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "3"])
def test_a_difficulty_is_a_number(value):
    with pytest.raises(ConfigError, match="row 1: difficulty: order easy-to-hard goes by this number"):
        read_questions(config(order="easy-to-hard"), [{**ROW, "difficulty": value}])


def test_an_id_that_is_no_text_is_a_bad_row(tmp_path):
    path = lines(tmp_path / "q.jsonl", ['{"question_id": "a\\ud800", "question": "May I?", "category": "support"}'])
    with pytest.raises(ConfigError) as caught:
        read_questions(config(path))
    assert str(caught.value) == f"{path}: line 1: question_id: 'a\\ud800' is no Unicode text"


def test_skipped_rows_are_counted_and_named_and_move_no_other_rows_id(tmp_path, caplog):
    rows = [
        "{",
        {"prompt": "a?"},
        {"prompt": 1},
        "[]",
        {"no": 1},
        {"prompt": "b?"},
        {"prompt": "c?", "question_id": "q-2"},
    ]
    path = lines(tmp_path / "q.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        asked = read_questions(config(path, map={"question": "prompt"}, category="c", bad_rows="skip"))
    assert {name: question.text for name, question in asked.rows.questions.items()} == {"q-2": "a?", "q-6": "b?"}
    assert [line.split(": ")[1] for line in asked.skipped] == ["line 1", "line 3", "line 4", "line 5", "line 7"]
    assert (
        asked.skipped[3] == f"{path}: line 5: prompt: map takes question from it and the row lacks it; the row has: no"
    )
    assert caplog.messages == [
        *(f"skipped: {line}" for line in asked.skipped[:3]), f"{path}: skipped rows: 5 of 7, of which 3 are named here",
    ]  # fmt: skip


def test_nothing_but_bad_rows_is_an_error(tmp_path):
    path = lines(tmp_path / "q.jsonl", ["{", {"no": 1}])
    with pytest.raises(ConfigError) as caught:
        read_questions(config(path, bad_rows="skip"))
    assert str(caught.value).startswith(f"{path}: none of 2 rows can be used; the first: {path}: line 1: not JSON: ")


def test_a_broken_file_is_an_error_even_where_bad_rows_are_skipped(tmp_path):
    whole = gzip.compress("".join(json.dumps({**ROW, "question_id": n}) + "\n" for n in range(999)).encode())
    (tmp_path / "q.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(ConfigError, match=r"q\.jsonl\.gz: Compressed file ended"):
        read_questions(config(tmp_path / "q.jsonl.gz", bad_rows="skip"))


@pytest.mark.parametrize("path", ["missing.jsonl", "missing.parquet", "./missing", "a/b/c"])
def test_a_missing_file_is_not_looked_for_elsewhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"No such file|No files found"):
        read_questions(config(path))


def test_what_datasets_cannot_load_is_one_line(tmp_path, monkeypatch):
    for settings in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(settings, True)
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict({"train": datasets.Dataset.from_list(PROMPTS)}).save_to_disk(tmp_path / "many")
    for path, split, line in [
        ("no-one/nothing", "train", "no-one/nothing: no file here, and not loaded from the hub: Couldn't reach"),
        (tmp_path / "empty", "train", f"{tmp_path}/empty: no folder of `datasets`: "),
        (tmp_path / "many", "tran", f"{tmp_path}/many: no split 'tran'; did you mean 'train'? known: train"),
    ]:
        with pytest.raises(ConfigError) as caught:
            read_questions(config(path, split=split))
        assert str(caught.value).startswith(line)
        assert "\n" not in str(caught.value)


RUBRIC = {
    "rubric": "support", "items": [
        {"id": "has-word", "check": "contains", "with": {"text": {"field": "word"}}, "weight": 3},
        {"id": "kind", "criterion": "Is kind.", "judge": "default"},
    ],
}  # fmt: skip


def test_questions_that_no_rubric_can_judge_are_bad_rows():
    rubrics = {"support": parse_rubric(RUBRIC, "f.yaml")}
    rows = [{**ROW, "word": "yes"}, {**ROW, "question_id": "p"}, {**ROW, "question_id": "r", "category": "maths"}]
    asked = read_questions(config(), rows)
    with pytest.raises(ConfigError, match="rows: row 2: word: item 'has-word' of rubric 'support' needs it"):
        plan_questions(asked, rubrics, config())
    kept, plans = plan_questions(asked, rubrics, config(bad_rows="skip"))
    assert list(kept.rows.questions) == list(kept.rows.items) == list(kept.rows.places) == list(plans) == ["q"]
    assert plans["q"].weight == {"has-word": 0.75, "kind": 0.25}
    assert [line.split(";")[0] for line in kept.skipped] == [
        "rows: row 2: word: item 'has-word' of rubric 'support' needs it and the row lacks it",
        "rows: row 3: category: no rubric for 'maths'",
    ]
    with pytest.raises(ConfigError, match="rows: none of 3 rows can be used; the first: rows: row 1: category"):
        plan_questions(asked, {"other": rubrics["support"]}, config(bad_rows="skip"))


def test_the_difficulty_filter_keeps_what_is_neither_too_easy_nor_too_hard():
    scores = {"easy": [1, 1, 0.5], "fair": [0.7, 0.9], "low": [0.1] * 6 + [0.4] * 3, "hard": [0, 0.1], "none": []}
    kept, difficulty = keep_by_difficulty(scores, DifficultyConfig(low=0.2, high=0.8))
    assert kept == ["fair", "low"]
    assert difficulty == pytest.approx({"easy": 1 / 6, "fair": 0.2, "low": 0.8, "hard": 0.95})
    with pytest.raises(ConfigError) as caught:
        keep_by_difficulty({"a": [1.0], "b": [0.875]}, DifficultyConfig())
    assert str(caught.value) == (
        "questions.difficulty: none of 2 questions has a mean score from 0.2 to 0.8; the means are from 0.875 to 1"
    )


ORDERS = st.sampled_from(["shuffled", "given", "easy-to-hard"])
HARD = {f"q{number}": number / 100 for number in range(100)}


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 9), st.sampled_from(["shuffled", "given"]))
def test_every_epoch_covers_every_question_once_whatever_a_step_takes(number, each, seed, how):
    assume(each <= number)
    order = order_of(number, how, seed=seed, each=each)
    position, drawn = 0, []
    while position < 4 * number:
        step, position = order.draw(position, each)
        assert len(set(step)) == len(step) == each
        drawn += step
    assert position == len(drawn)
    for epoch in range(4):
        assert sorted(drawn[epoch * number : (epoch + 1) * number]) == sorted(order.ids)


@given(st.integers(1, 20), st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 99), ORDERS)
def test_no_step_takes_a_question_twice_and_none_falls_short(number, counts, position, how):
    order = order_of(number, how, each=1, steps=50, difficulty=HARD)
    taken = []
    for count in counts:
        drawn, position = order.draw(position, count, set(taken))
        assert len(drawn) == min(count, number - len(taken))
        taken += drawn
    assert max(Counter(taken).values()) == 1


@given(
    st.integers(1, 12), st.integers(0, 60), st.integers(1, 12), st.sets(st.integers(0, 11)), st.integers(0, 3), ORDERS
)
def test_a_draw_is_a_function_of_the_position_alone(number, position, count, taken, seed, how):
    options = {"seed": seed, "each": min(3, number), "steps": 9, "difficulty": HARD}
    used, fresh = order_of(number, how, **options), order_of(number, how, **options)
    for before in random.Random(position).sample(range(80), 5):
        used.draw(before, 2)
    out = {f"q{n}" for n in taken if n < number}
    assert used.draw(position, count, out) == fresh.draw(position, count, out)


def test_the_given_order_is_the_order_given():
    order = order_of(3, "given", each=2)
    assert order.draw(0, 2) == (["q0", "q1"], 2)
    assert order.draw(2, 2) == (["q2", "q0"], 4)
    assert order.draw(2, 2, {"q2"}) == (["q0", "q1"], 5)


def test_epochs_and_seeds_differ_and_stay_what_they_were():
    order = order_of(6, seed=0, each=2)
    epochs = [order.draw(start, 6)[0] for start in (0, 6, 12)]
    assert epochs[0] == ["q2", "q1", "q5", "q0", "q4", "q3"]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order_of(6, seed=1, each=2).draw(0, 6)[0] != epochs[0]


def test_an_epoch_begins_with_none_that_ended_the_last_so_all_pairs_across_the_border_are_possible():
    firsts = Counter()
    for seed in range(200):
        order = order_of(4, seed=seed, each=2)
        last = order.draw(3, 1)[0][0]
        first = order.draw(4, 1)[0][0]
        assert first != last
        firsts[first] += 1
    assert min(firsts.values()) > 30  # of 50


def test_the_curriculum_goes_from_easy_to_hard():
    steps, each = 100, 4
    order = order_of(100, "easy-to-hard", each=each, steps=steps, difficulty=HARD)
    ranks = []
    position = 0
    for _ in range(steps):
        drawn, position = order.draw(position, each)
        ranks.append([HARD[name] for name in drawn])
    means = [sum(map(sum, ranks[start : start + 20])) / 80 for start in range(0, 100, 20)]
    assert means == pytest.approx([0.2, 0.32, 0.5, 0.68, 0.8], abs=0.06)  # at the ends half the bell is cut off
    assert max(max(step) for step in ranks[:10]) < 0.8
    assert min(min(step) for step in ranks[-10:]) > 0.2


def test_the_curriculum_goes_by_the_steps_whatever_further_questions_they_draw():
    steps, each = 100, 4
    order = order_of(100, "easy-to-hard", each=each, steps=steps, difficulty=HARD)
    ranks, position = [], 0
    for step in range(steps):
        first, position = order.draw(position, each, due=step * each)
        further, position = order.draw(position, each, first, due=step * each)
        ranks.append([HARD[name] for name in first + further])
    means = [sum(map(sum, ranks[start : start + 20])) / 160 for start in range(0, 100, 20)]
    assert means == pytest.approx([0.2, 0.32, 0.5, 0.68, 0.8], abs=0.06)
    assert order.draw(7, each, due=7) == order.draw(7, each)


def test_the_rows_own_difficulty_comes_first_if_all_state_it():
    rows = [{**ROW, "question_id": str(n), "difficulty": -n} for n in range(3)]
    measured = {"0": 0.5, "1": 0.1, "2": 0.9}
    settings = config(order="easy-to-hard", difficulty=DifficultyConfig())
    options = {"seed": 0, "count": 1, "steps": 9, "difficulty": measured}
    assert Order.of(read_questions(settings, rows), list(measured), settings, **options).ids == ("2", "1", "0")
    del rows[1]["difficulty"]
    assert Order.of(read_questions(settings, rows), list(measured), settings, **options).ids == ("1", "0", "2")
    assert Order.of(read_questions(settings, rows), ["0", "2"], settings, **options).ids == ("2", "0")


def test_ties_go_by_id():
    rows = [{**ROW, "question_id": name, "difficulty": 1} for name in "bca"]
    settings = config(order="easy-to-hard")
    order = Order.of(read_questions(settings, rows), list("bca"), settings, seed=0, count=1, steps=9)
    assert order.ids == ("a", "b", "c")


def test_a_step_that_takes_more_questions_than_there_are_is_an_error():
    with pytest.raises(ConfigError) as caught:
        order_of(3, each=4)
    assert str(caught.value) == "sampling.questions: 4 a step, but rows has only 3 that can be used"
