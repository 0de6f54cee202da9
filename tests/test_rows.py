"""Rows: strict, grouped, and every fault named with its line."""

from __future__ import annotations

import gzip
import json

import duckdb
import pytest

from grape.errors import ConfigError
from grape.plan import plan_rows
from grape.resources import read_yaml
from grape.rows import read_rows
from grape.rubric import parse_rubric

ROW = {"question_id": "q", "category": "support", "question": "May I?", "response": "Yes."}


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_are_grouped_and_numbered(tmp_path):
    rows = read_rows(lines(tmp_path / "r.jsonl", ROW, {**ROW, "response": "No."}, "", {**ROW, "question_id": "p"}))
    assert [(r.response_id, r.question_id, r.text) for r in rows.responses] == [
        ("q-0", "q", "Yes."), ("q-1", "q", "No."), ("p-0", "p", "Yes."),
    ]  # fmt: skip
    assert list(rows.questions) == ["q", "p"]


def test_a_chat_is_a_question_and_numbers_are_references():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    question = read_rows([{**ROW, "question": chat, "reference": 4}]).questions["q"]
    assert question.prompt == "system: Be brief.\n\nuser: 2+2?"
    assert question.reference == "4"


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{**ROW, "respnse": "x"}], "{path}: line 1: respnse: Extra inputs are not permitted (got 'x'; did you mean "
         "'response'? known: category, "),
        ([{k: v for k, v in ROW.items() if k != "response"}],
         "{path}: line 1: response: Field required; the row has: question_id, category, question"),
        ([ROW, {**ROW, "response": 3}], "{path}: line 2: response: Input should be a valid string (got 3)"),
        ([ROW, "{"], "{path}: line 2: not JSON: "),
        (["[1]"], "{path}: line 1: Input should be a valid dictionary or instance of Row"),
        (['{"question_id": "q", "question_id": "p"}'], "{path}: line 1: not JSON: duplicate key 'question_id'"),
        (['{"a": NaN}'], "{path}: line 1: not JSON: NaN is not JSON"),
        ([{**ROW, "response_id": "a"}, {**ROW, "response_id": "a"}],
         "{path}: line 2: response_id: 'a' stands already in {path}: line 1"),
        ([ROW, {**ROW, "question": "Other?"}],
         "{path}: line 2: question: question_id 'q' has another question in {path}: line 1"),
        ([ROW, {**ROW, "reference": "x"}], "{path}: line 2: reference: question_id 'q' has another reference in "),
        ([{**ROW, "items": [{"id": "a", "check": "contains", "with": {"text": 1}}]}],
         "{path}: line 1: items.0.with.text: Input should be a valid string (got 1)"),
        ([{**ROW, "items": [{"id": "a", "check": "exact"}, {"id": "a", "check": "exact"}]}],
         "{path}: line 1: items.1.id: duplicate id 'a'"),
        ([], "{path}: no rows"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_one_line_with_its_number(tmp_path, rows, line):
    path = lines(tmp_path / "r.jsonl", *rows)
    with pytest.raises(ConfigError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(line.format(path=path))
    assert "\n" not in str(caught.value)


def test_parquet_gzip_and_mappings_read_alike(tmp_path):
    rows = [
        {**ROW, "metadata": {"model": "m"}},
        {**ROW, "question_id": "p", "reference": "r", "metadata": {"model": "n"}},
    ]
    plain = read_rows(lines(tmp_path / "r.jsonl", *rows))
    with gzip.open(tmp_path / "r.jsonl.gz", "wt") as file:
        file.write((tmp_path / "r.jsonl").read_text())
    duckdb.sql(f"copy (from '{tmp_path}/r.jsonl') to '{tmp_path}/r.parquet'")
    for other in (tmp_path / "r.jsonl.gz", tmp_path / "r.parquet", rows):
        again = read_rows(other)
        assert again.questions == plain.questions
        assert again.responses == plain.responses
    (tmp_path / "bad.parquet").write_text("no")
    (tmp_path / "bad.jsonl.gz").write_text("no")
    for bad in ("bad.parquet", "bad.jsonl.gz", "missing.jsonl"):
        with pytest.raises(ConfigError, match=bad.replace(".", r"\.")):
            read_rows(tmp_path / bad)


RUBRIC = {
    "rubric": "support", "items": [
        {"id": "has-word", "check": "contains", "with": {"text": {"field": "word"}}, "weight": 3},
        {"id": "kind", "criterion": "Is kind.", "judge": "default"},
    ],
}  # fmt: skip


def plan(rows, rubric=RUBRIC, **options):
    return plan_rows(read_rows(rows), {"support": parse_rubric(rubric, "f.yaml")}, **options)


def test_a_plan_weighs_the_items_that_apply():
    row = {**ROW, "metadata": {"word": "yes"}, "items": [{"id": "own", "check": "contains", "with": {"text": "a"}}]}
    assert plan([row])["q"].weight == pytest.approx({"has-word": 0.6, "kind": 0.2, "own": 0.2})
    assert plan([row], use_judges=False)["q"].weight == pytest.approx({"has-word": 0.75, "kind": 0, "own": 0.25})


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({**ROW, "category": "suport"}, "row 1: category: no rubric for 'suport'; did you mean 'support'? known: support"),
        (ROW, "row 1: word: item 'has-word' of rubric 'support' needs it and the row lacks it; the row has: question_id, "
         "category, question (or give the item `applies_when: {has: word}`)"),
        ({**ROW, "metadata": {"word": "x"}, "items": [{"id": "kind", "check": "contains", "with": {"text": "a"}}]},
         "row 1: items.0.id: 'kind' is an item of rubric 'support' already"),
    ],
)  # fmt: skip
def test_a_row_that_its_rubric_cannot_judge_is_one_line(row, line):
    with pytest.raises(ConfigError) as caught:
        plan([row])
    assert str(caught.value) == line


def test_metadata_may_tell_responses_apart_unless_items_depend_on_it():
    one, two = {**ROW, "metadata": {"word": "x", "model": "a"}}, {**ROW, "metadata": {"word": "x", "model": "b"}}
    assert set(plan([one, two])) == {"q"}
    with pytest.raises(ConfigError) as caught:
        plan([one, {**two, "metadata": {"word": "y"}}])
    assert str(caught.value) == (
        "rows: response 'q-1': metadata.word: differs within the group of 'q', whose items depend on it"
    )


def test_a_rubric_of_the_format_page_is_read():
    text = """
    rubric: coding
    items:
      - {id: answers-all, criterion: Addresses every part., weight: 2, judge: default, reference: false, scale: unit}
      - {id: invented, criterion: Imports what does not exist., weight: 2, polarity: undesirable, judge: default,
         scale: binary, gate: {at_least: 0.5, reward: 0}, on_failure: impute, share_in_improve: true, tags: [safety],
         x-owner: platform-team}
    """
    rubric = parse_rubric(read_yaml("f.yaml", text), "f.yaml")
    assert rubric.items[1].gate is not None
    assert rubric.category == "coding"
