"""Rubrics: every fault is one line with file, path, value and what is known."""

from __future__ import annotations

import json

import jsonschema
import pytest

from grape.errors import ConfigError
from grape.item import Item, applies_to, flatten, weights
from grape.resources import names, read_yaml
from grape.rubric import load_rubric, load_rubrics, parse_rubric
from grape.scale import parse_scale
from grape.schemas import schema
from grape.types import Question

BASE = """
rubric: support
version: 3
category: support
x-team: desk
items:
  - id: content
    criterion: What it says.
    weight: 4
    items:
      - {id: deadline, weight: 3, check: contains, with: {text: 30 days}}
      - {id: edge, weight: 1, check: contains, with: {text: {field: word}}, applies_when: {has: word}}
  - {id: kind, criterion: Is kind., weight: 2, judge: default, x-owner: desk}
cases:
  - {question: q, response: r, expect: {deadline: 0, kind: '>=0.7'}}
"""


def load(text: str):
    return parse_rubric(read_yaml("f.yaml", text), "f.yaml")


def test_a_rubric_is_read_with_its_own_keys_kept():
    rubric = load(BASE)
    assert (rubric.rubric, rubric.version, rubric.formula, rubric.improve) == ("support", 3, "grape", "default")
    assert rubric.extensions == {"x-team": "desk"}
    assert [item.id for item in flatten(rubric.items)] == ["deadline", "edge", "kind"]
    assert rubric.items[1].extensions == {"x-owner": "desk"}
    assert rubric.warnings() == []


ITEM = "{id: kind, criterion: Is kind., weight: 2, judge: default, x-owner: desk}"
KEYS = ("applies_when, calibrate, check, confidence, criterion, critique, gate, id, items, judge, on_failure, polarity, "
        "principle, raw, reference, reward_model, scale, share_in_improve, tags, weight, with")  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("weight: 4", "wieght: 4",
         f"f.yaml: items.0.wieght: Extra inputs are not permitted (got 4; did you mean 'weight'? known: {KEYS})"),
        ("weight: 4", "weight: true", "f.yaml: items.0.weight: Input should be a valid number (got True)"),
        ("weight: 4", "weight: .nan", "f.yaml: items.0.weight: Input should be a finite number (got nan)"),
        ("weight: 4", "weight: '4'", "f.yaml: items.0.weight: Input should be a valid number (got '4')"),
        ("weight: 4", "weight: 0", "f.yaml: items.0.weight: Input should be greater than 0 (got 0)"),
        ("{text: 30 days}", "{txt: 30 days}", "f.yaml: items.0.items.0.with.txt: no such argument (got '30 days'; "
         "did you mean 'text'? known: "),
        ("{text: 30 days}", "{text: 30}", "f.yaml: items.0.items.0.with.text: Input should be a valid string (got 30)"),
        ("{text: 30 days}", "{}", "f.yaml: items.0.items.0.with.text: the argument is needed; known: "),
        ("check: contains, with: {text: 30", "check: contans, with: {text: 30",
         "f.yaml: items.0.items.0.check: no checker named 'contans'; did you mean 'contains'? known: "),
        ("id: kind", "id: deadline", "f.yaml: items.1.id: duplicate id 'deadline'; it is items.0.items.0's too"),
        ("id: kind", "id: content", "f.yaml: items.1.id: duplicate id 'content'; it is items.0's too"),
        ("judge: default", "judge: defualt",
         "f.yaml: items.1.judge: no judge named 'defualt'; did you mean 'default'? known: "),
        ("judge: default", "judge: default, critique: code-stile",
         "f.yaml: items.1.critique: no prompt named 'code-stile'; did you mean 'code-style'? known: "),
        ("version: 3", "generate: codding",
         "f.yaml: generate: no prompt named 'codding'; did you mean 'coding'? known: "),
        ("version: 3", "formla: x", "f.yaml: formla: Extra inputs are not permitted (got 'x'; did you mean 'formula'? "),
        ("version: 3", "formula: mean",
         "f.yaml: formula: Input should be 'grape', 'normalized', 'weighted' or 'points' (got 'mean')"),
        ("version: 3", "version: 3\nversion: 4", "f.yaml: line 4: duplicate key 'version'"),
        ("judge: default", "judge: default, check: contains",
         "f.yaml: items.1: item 'kind' needs exactly one of items, check, judge, reward_model; it has check and judge"),
        ("judge: default, ", "",
         "f.yaml: items.1: item 'kind' needs exactly one of items, check, judge, reward_model; it has none"),
        ("weight: 4", "weight: 4\n    polarity: undesirable",
         "f.yaml: items.0: item 'content': 'polarity' does not go with items; it belongs to an item without any"),
        ("check: contains, with: {text: 30 days}", "check: contains, with: {text: a}, reference: true",
         "f.yaml: items.0.items.0: item 'deadline': 'reference' goes only with judge"),
        ("criterion: Is kind., ", "", "f.yaml: items.1: item 'kind': a judge needs a criterion"),
        ("judge: default", "judge: default, gate: {at_lest: 0.5}",
         "f.yaml: items.1.gate.at_lest: Extra inputs are not permitted (got 0.5; did you mean 'at_least'? known: "
         "at_least, reward)"),
        ("judge: default", "judge: default, gate: {at_least: 5}",
         "f.yaml: items.1.gate.at_least: Input should be less than or equal to 1 (got 5)"),
        ("judge: default", "judge: default, scale: {ordinal: [a]}",
         "f.yaml: items.1.scale: unknown scale {'ordinal': ['a']}; known: unit, binary, "),
        ("judge: default", "judge: default, on_failure: zero",
         "f.yaml: items.1.on_failure: Input should be 'impute', 'drop' or 'worst' (got 'zero')"),
        ("{deadline: 0,", "{dedline: 0,",
         "f.yaml: cases.0.expect: no item 'dedline'; did you mean 'deadline'? known: deadline, edge, kind"),
        ("'>=0.7'", "'about 1'", "f.yaml: cases.0.expect.kind: 'about 1' is neither a number from 0 to 1, nor >= or <= "),
        ("id: kind", "id: 'a b'", "f.yaml: items.1.id: String should match pattern "),
        ("rubric: support", "rubric: [support]", "f.yaml: rubric: Input should be a valid string (got ['support'])"),
        ("x-owner: desk", "extensions: {}",
         "f.yaml: items.1: unknown key 'extensions'; keys of your own begin with x-"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_says_where_and_what_is_known(old, new, line):
    assert old in BASE
    with pytest.raises(ConfigError) as caught:
        load(BASE.replace(old, new, 1))
    message = str(caught.value)
    assert message.startswith(line)
    assert "\n" not in message


def test_a_weight_sum_that_is_neither_one_nor_whole_is_a_warning():
    assert load(BASE.replace("weight: 4", "weight: 3.5")).warnings() == [
        "f.yaml: items: weights sum to 5.5, which is neither 1 nor a sum of whole numbers"
    ]
    assert load(BASE.replace("weight: 4", "weight: 0.9").replace("weight: 2", "weight: 0.1")).warnings() == []
    assert load(BASE.replace("weight: 3,", "weight: 0.3,")).warnings() == [
        "f.yaml: items.0.items: weights sum to 1.3, which is neither 1 nor a sum of whole numbers"
    ]


def test_a_child_that_does_not_apply_leaves_its_weight_to_its_siblings():
    rubric = load(BASE)

    def share(**metadata):
        question = Question(question_id="q", category="support", text="t", metadata=metadata)
        return weights(rubric.items, applies_to(question))

    assert share(word="x") == pytest.approx({"deadline": 0.5, "edge": 1 / 6, "kind": 1 / 3})
    assert share() == pytest.approx({"deadline": 2 / 3, "edge": 0, "kind": 1 / 3})


def test_a_parent_none_of_whose_children_apply_leaves_its_weight_to_its_siblings():
    rubric = load(BASE)
    assert weights(rubric.items, lambda item: item.id not in {"deadline", "edge"}) == {
        "deadline": 0,
        "edge": 0,
        "kind": 1,
    }
    assert weights(rubric.items, lambda item: item.id not in {"content", "kind"}) == {
        "deadline": 0,
        "edge": 0,
        "kind": 0,
    }


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ({"has": "tests"}, True), ({"has": "edge_tests"}, False), ({"has": ["tests", "language"]}, True),
        ({"lacks": "reference"}, True), ({"lacks": ["reference", "tests"]}, False), ({"language": "python"}, True),
        ({"language": ["c", "python"]}, True), ({"language": "c"}, False), ({"level": 1}, True), ({"level": True}, False),
        ({"flag": True}, True), ({"flag": 1}, False), ({"language": "python", "has": "edge_tests"}, False),
        ({"missing": "x"}, False), ({"category": "coding"}, True),
    ],
)  # fmt: skip
def test_a_condition_looks_in_the_row_and_then_in_its_metadata(condition, holds):
    item = Item.model_validate({"id": "a", "check": "contains", "with": {"text": "x"}, "applies_when": condition})
    question = Question(question_id="q", category="coding", text="t", tests="expect(True)",
                        metadata={"language": "python", "level": 1, "flag": True, "tests": "never seen"})  # fmt: skip
    assert applies_to(question)(item) is holds


def test_reasoning_is_not_shared_where_the_ground_truth_was_seen():
    def shares(**keys):
        return Item.model_validate({"id": "a", "criterion": "c", **keys}).shares_in_improve

    assert shares(judge="default")
    assert not shares(judge="default", reference=True)
    assert shares(judge="default", reference=True, share_in_improve=True)
    assert not shares(check="exact")
    assert shares(check="contains", **{"with": {"text": "x"}})
    assert not shares(check="contains", **{"with": {"text": {"field": "word"}}})


@pytest.mark.parametrize(
    ("scale", "raw", "score", "label"),
    [
        ("unit", 0.25, 0.25, "0.25"), ("binary", 1, 1, "met"), ("binary", 0, 0, "not met"), ("binary", "Met", 1, "met"),
        ("binary", 1.0, 1, "met"), ({"ordinal": ["none", "some", "all"]}, "some", 0.5, "some"),
        ({"ordinal": ["none", "some", "all"]}, " ALL ", 1, "all"), ({"ordinal": [1, 2, 3]}, 2, 0.5, "2"),
        ({"choices": {"none": 0, "partly": 0.4, "fully": 1}}, "partly", 0.4, "partly"),
        ({"likert": {1: "bad", 3: "fair", 5: "good"}}, 2, 0.25, "2"), ({"numeric": [0, 100]}, 97, 0.97, "97"),
        ({"numeric": [-1, 1]}, 0, 0.5, "0"),
    ],
)  # fmt: skip
def test_a_scale_maps_an_answer_once(scale, raw, score, label):
    assert parse_scale(scale).read(raw) == (score, label)
    assert parse_scale(parse_scale(scale).dump()) == parse_scale(scale)


@pytest.mark.parametrize(
    ("scale", "raw", "error"),
    [
        ("unit", 97, ValueError), ("unit", -0.1, ValueError), ("unit", float("nan"), ValueError), ("unit", True, TypeError),
        ("unit", "0.5", TypeError), ("unit", None, TypeError), ("binary", 0.7, ValueError), ("binary", True, TypeError),
        ({"ordinal": ["none", "all"]}, "most", ValueError), ({"ordinal": ["none", "all"]}, 0, ValueError),
        ({"likert": {1: "bad", 5: "good"}}, 6, ValueError), ({"numeric": [0, 100]}, 101, ValueError),
        ({"numeric": [0, 100]}, float("inf"), ValueError), ("unit", [1], TypeError),
    ],
)  # fmt: skip
def test_what_a_scale_does_not_have_is_no_score(scale, raw, error):
    with pytest.raises(error):
        parse_scale(scale).read(raw)


@pytest.mark.parametrize(
    "scale",
    ["percent", {"ordinal": ["a", "A"]}, {"ordinal": [True, False]}, {"choices": {"a": 2, "b": 0}}, {"numeric": [1, 1]},
     {"numeric": [0, float("inf")]}, {"likert": {1: "one"}}, {"likert": {"x": "a", "y": "b"}}, {"ordinal": ["a", "b"], "x": 1},
     {"choices": {"a": True, "b": 0}}],
)  # fmt: skip
def test_a_scale_that_cannot_be_meant_is_refused(scale):
    with pytest.raises(ValueError):
        parse_scale(scale)


def test_the_json_schema_accepts_what_is_read_and_refuses_what_is_not():
    validator = jsonschema.Draft202012Validator(schema("rubric"))
    data = read_yaml("f.yaml", BASE)
    assert list(validator.iter_errors(data)) == []
    for rubric in load_rubrics().values():
        assert list(validator.iter_errors(read_yaml(rubric.source))) == []
    for path, key, value in [("items", "wieght", 1), ("items", "weight", "1"), ("items", "scale", "percent")]:
        broken = json.loads(json.dumps(data))
        broken[path][1][key] = value
        assert list(validator.iter_errors(broken))
    judges = jsonschema.Draft202012Validator(schema("judge"))
    for file in names("judges").values():
        assert list(judges.iter_errors(read_yaml(file))) == []
    jsonschema.Draft202012Validator.check_schema(schema("judge"))
    jsonschema.Draft202012Validator.check_schema(schema("run"))


def test_two_rubrics_of_one_category_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(BASE)
    with pytest.raises(ConfigError, match=r"b\.yaml: category 'support' has a rubric already: .*a\.yaml"):
        load_rubrics(tmp_path)
    with pytest.raises(ConfigError, match="no such file or folder"):
        load_rubrics(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no rubrics \(\*\.yaml\) in it"):
        load_rubrics(tmp_path / "empty")


def test_the_hash_is_that_of_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text(BASE)
    first = load_rubric(tmp_path / "a.yaml").hash
    (tmp_path / "a.yaml").write_text(BASE.replace("weight: 4", "weight: 5"))
    assert len(first) == 16
    assert load_rubric(tmp_path / "a.yaml").hash != first
