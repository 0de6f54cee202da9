"""The files of `grape convert`: any way to write them is read, any fault is one line, whatever they hold survives."""

from __future__ import annotations

import gzip
import json

import duckdb
import pytest
from foreign import FOLDER, back, data, edited, there, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from grape.errors import ConfigError
from grape.formats import convert, files
from grape.resources import read_yaml

ROW = {"prompt": "Hi?", "prompt_id": "p", "rubrics": [{"criterion": "Greets.", "points": 2, "tags": []}]}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".yaml"])
@pytest.mark.parametrize("rows", [ROW, [ROW], [ROW, {**ROW, "prompt_id": "q"}]], ids=["object", "one", "two"])
def test_rows_come_back_in_the_form_in_which_they_stood(rows, suffix, tmp_path):
    lines = "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows]))
    source = lines if suffix == ".jsonl" else files.yaml_text(rows) if suffix == ".yaml" else json.dumps(rows)
    ours = there(tmp_path, "healthbench", source, suffix)
    convert(ours, "grape", "healthbench", tmp_path / f"back{suffix}")
    assert written(data(tmp_path / f"back{suffix}")) == written(data(tmp_path / f"source{suffix}"))


def test_other_ways_to_hold_a_file_are_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode()))
    assert convert(tmp_path / "a.jsonl.gz", "healthbench", "grape", tmp_path / "ours") == (1, 1)
    (tmp_path / "a.toml").write_text('[[criteria]]\nname = "kind"\ntext = "Is it kind?"\n')
    assert convert(tmp_path / "a.toml", "verifiers", "grape", tmp_path / "ours") == (0, 1)
    assert back(tmp_path, "verifiers", tmp_path / "ours") == {"criteria": [{"name": "kind", "text": "Is it kind?"}]}
    with duckdb.connect() as connection:
        connection.execute("copy (select 'Hi?' as prompt, 'p' as prompt_id, [{criterion: 'Greets.', points: 2, "
                           f"tags: ['a']}}] as rubrics) to '{tmp_path}/a.parquet'")  # fmt: skip
    assert convert(tmp_path / "a.parquet", "healthbench", "grape", tmp_path / "ours") == (1, 1)
    assert data(tmp_path / "ours")["items"][0]["tags"] == ["a"]
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(ROW))
    assert convert(tmp_path / "a.json", "healthbench", "grape", tmp_path / "ours") == (1, 1)


@pytest.mark.parametrize(
    "odd", ["\ud800", "\x00\x85\u2028", "a\r\nb\n", " \n ", "😀 \\ud83d", "\ufeff", "\"'`", "#: -"]
)
@pytest.mark.parametrize("deep", [0, 50])
def test_odd_text_and_deep_values_survive(odd, deep, tmp_path):
    value = json.loads("[" * deep + json.dumps(odd) + "]" * deep)
    source = [{"weight": 1, "requirement": f"a{odd}", "note": value, odd: 1}]
    ours = there(tmp_path, "rubric", source)
    assert json.dumps(back(tmp_path, "rubric", ours)) == json.dumps(source)
    row = {**ROW, "note": value, odd: [odd]}
    assert json.dumps(back(tmp_path, "healthbench", there(tmp_path, "healthbench", row))) == json.dumps(row)


TREE = {"id": "r", "requirements": "r", "weight": 1, "sub_tasks": []}
FAULTS = [
    ("healthbench", {**ROW, "rubrics": [{"criterion": "a", "points": "7"}]},
     "{file}: rubrics.0.points: a finite number is meant (got '7')"),
    ("healthbench", {**ROW, "rubrics": [{"criterion": "a", "points": True}]},
     "{file}: rubrics.0.points: a finite number is meant (got True)"),
    ("healthbench", {**ROW, "rubrics": [{"points": 1, "tags": []}]},
     "{file}: rubrics.0: criterion: missing; there is: points, tags"),
    ("healthbench", [ROW, {**ROW, "rubrics": [3]}], "{file}: row 2: rubrics.0: a mapping is meant (got 3)"),
    ("healthbench", [ROW, 3], "{file}: row 2: a mapping is meant (got 3)"),
    ("healthbench", {**ROW, "prompt": [{"role": "poet", "content": "a"}]},
     "{file}: prompt.0.role: no such role: 'poet'; known: assistant, developer, system, tool, user"),
    ("healthbench", {**ROW, "prompt": []},
     "{file}: prompt: text or messages are meant (got [])"),
    ("healthbench", {**ROW, "rubrics": None}, "{file}: rubrics: a list is meant (got None)"),
    ("healthbench", [], "{file}: no criterion in it that healthbench would score"),
    ("rlcf", [], "{file}: no rows"),
    ("rlcf", {"prompt": "a", "requirements": ["Is it kind?"]},
     "{file}: requirements.0: an importance in brackets is missing (got 'Is it kind?')"),
    ("rlcf", {"prompt": "a", "requirements": [["Is it kind?", -1]]},
     "{file}: requirements.0.importance: a number from 0 to 100 is meant (got -1)"),
    ("rlcf", {"prompt": "a", "requirements": "1) Is it kind? (importance: 100/100)\nand so on"},
     "{file}: requirements: a question and its importance in brackets are meant (got '1) Is it kind? (importance: "
     "100/100) and so on')"),
    ("ifeval", {"prompt": "a"}, "{file}: instruction_id_list: missing; there is: prompt"),
    ("dr-tulu", {"ground_truth": "{"}, "{file}: ground_truth: not JSON: Expecting property name enclosed in double "
     "quotes: line 1 column 2 (char 1)"),
    ("paperbench", {**TREE, "weight": -1}, "{file}: weight: a weight from 0 up is meant (got -1)"),
    ("paperbench", {**TREE, "sub_tasks": [{**TREE, "id": "a", "requirements": " "}]},
     "{file}: sub_tasks.0.requirements: text is meant (got ' ')"),
    ("paperbench", {**TREE, "sub_tasks": [{**TREE, "weight": 0}]},
     "{file}: sub_tasks: all of them weigh 0, so nothing is scored here"),
    ("prometheus", {"criteria": "a", "score1_description": "b"},
     "{file}: score1_description to score5_description are meant; there is: criteria, score1_description"),
    ("autorubric", {"criterions": []},
     "{file}: no list of criteria; it would stand under rubric, sections or criteria"),
    ("autorubric", [{"requirement": "a", "options": [{"label": "b", "value": 1}]}],
     "{file}: 0: item 'a-ca97': unknown scale {{'choices': {{'b': 1}}}}; known: "),
    ("autorubric", [{"requirement": "a", "options": [{"label": "b"}]}],
     "{file}: 0.options.0: value: missing; there is: label"),
    ("verifiers", [{"name": "a", "text": "b", "weight": -1}],
     "{file}: 0.weight: a weight from 0 up is meant (got -1)"),
    ("openai-evals", {"a": {"prompt": "b", "choice_strings": "from_n"}},
     "{file}: a.choice_strings: 'from_n' compares several responses; a rubric judges one"),
    ("openai-evals", {"a": {"prompt": "b", "choice_strings": "AB", "choice_scores": {"A": 1}}},
     "{file}: a.choice_scores: B: missing; there is: A"),
    ("promptfoo", [{"type": "llm-rubric", "value": "file://a.txt"}],
     "{file}: 0.value: stands in another file: file://a.txt; put its text here"),
    ("promptfoo", [{"type": "contains", "value": "a"}], "{file}: no criterion in it that promptfoo would score"),
    ("constitution", [{"critic": "a"}], "{file}: 0: revision: missing; there is: critic"),
    ("constitution", {"a": 1}, "{file}: no pairs; they would stand under constitutions"),
    ("rubric", 3, "{file}: a list of criteria is meant (got 3)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "source", "message"), FAULTS)
def test_a_fault_is_one_line_with_file_place_value_and_what_is_known(name, source, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        there(tmp_path, name, source)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(message.format(file=tmp_path / "source.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "prompt": "b"}', "{file}: not JSON: duplicate key 'prompt'"),
        ('{"prompt": NaN}', "{file}: not JSON: NaN is not a finite number"),
        ('{"prompt": 1e999}', "{file}: not JSON: 1e999 is not a finite number"),
        ('{"prompt": ', "{file}: not JSON: Expecting value: line 1 column 12 (char 11)"),
        ('{"a": 1}\n{"a": }', "{file}: line 2: not JSON: Expecting value: line 1 column 7 (char 6)"),
        ("[" * 100_000, "{file}: not JSON: maximum recursion depth exceeded"),
        ("", "{file}: not JSON: Expecting value: line 1 column 1 (char 0)"),
        ('{"prompt": "a", "more": ' + "[" * 70 + "]" * 70 + "}", "{file}: nested more than 60 levels deep"),
    ],
)
def test_broken_json_is_one_line(text, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        there(tmp_path, "healthbench", text)
    assert str(caught.value).startswith(message.format(file=tmp_path / "source.json"))


def test_files_and_names_that_are_not_there_are_one_line(tmp_path):
    source, rows, out = FOLDER / "rubric.json", FOLDER / "rlcf.jsonl", tmp_path / "out"
    for arguments, message in [
        ((tmp_path / "none", "rubric", "grape", out), f"{tmp_path}/none: No such file or directory"),
        ((source, "rubrik", "grape", out), "no format named 'rubrik'; did you mean 'rubric'? known: autorubric, "),
        ((source, "rubric", "Grape", out), "no format named 'Grape'; did you mean 'grape'?"),
        ((source, "rubric", "grape", out / "none"), f"{out}/none: No such file or directory"),
        ((source, "rubric", "rlcf", out), f"{source}: a rubric, and rlcf holds questions with their items"),
        ((rows, "rlcf", "rubric", out), f"{rows}: rows, and rubric holds one rubric without questions"),
    ]:
        with pytest.raises(ConfigError) as caught:
            convert(*arguments)
        assert str(caught.value).startswith(message)


def test_a_file_that_is_not_ours_is_one_line(tmp_path):
    for text, message in [
        ("rubric: a\nitems: [{id: b}]\n", "items.0: item 'b' needs exactly one of items, check, judge, reward_model"),
        ("rubric: a\nitms: []\n", "rubric: Extra inputs are not permitted (got 'a'; known: "),
        ("3\n", "a mapping is meant (got 3)"),
        ('{"question": "a"}\n', "line 1: question_id: Field required"),
    ]:
        (tmp_path / "ours").write_text(text)
        with pytest.raises(ConfigError) as caught:
            convert(tmp_path / "ours", "grape", "rubric", tmp_path / "theirs")
        assert str(caught.value).startswith(f"{tmp_path}/ours: {message}")


def test_a_broken_note_of_ours_is_one_line(tmp_path):
    ours = there(tmp_path, "rubric", [{"weight": 1, "requirement": "a"}])
    edited(ours, lambda rubric: rubric["items"][0].update({"x-rubric": 3}))
    with pytest.raises(ConfigError) as caught:
        convert(ours, "grape", "rubric", tmp_path / "theirs")
    assert str(caught.value) == f"{ours}: x-rubric: a mapping is meant (got 3)"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(["yes", "No", "null", "1_0", "2024-01-01", "0o7", "1:30", ".5", "<<", "a: b", "a\nb ", "- a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=12,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(PLAIN)
def test_yaml_reads_back_as_the_same_data_by_this_and_by_older_readers(value):
    text = files.yaml_text({"a": value})
    assert repr(read_yaml("a", text)) == repr({"a": value})
    older = YAML(typ="safe", pure=True)
    older.version = (1, 1)
    if "<<" not in text:
        assert older.load(text) == {"a": value}


WORDS = st.text(min_size=1, max_size=20).filter(str.strip)
FREE = st.dictionaries(st.sampled_from(["note", "x-y", "", "ä", "id", "items", "criterion "]), PLAIN, max_size=2)
NUMBER = st.integers(-9, 9) | st.floats(-9, 9, allow_nan=False)


@st.composite
def objects(draw, needed, optional):
    """An object with its fields and others in any order."""
    entry = {key: draw(value) for key, value in needed.items()}
    entry |= {key: draw(value) for key, value in optional.items() if draw(st.booleans())}
    entry |= {key: value for key, value in draw(FREE).items() if key not in entry}
    keys = draw(st.permutations(list(entry)))
    return {key: entry[key] for key in keys}


POINTS = objects({"criterion": WORDS, "points": NUMBER}, {"tags": PLAIN})
PITFALL = objects({"description": WORDS, "weight": NUMBER}, {"title": PLAIN})
REQUIREMENT = objects({"requirement": WORDS, "weight": NUMBER.map(lambda number: number or 1)}, {"name": PLAIN})
JUDGED = objects({"type": st.sampled_from(["llm-rubric", "not-llm-rubric"]), "value": WORDS}, {"metric": PLAIN})
EQUALS = objects({"type": st.just("equals"), "value": PLAIN}, {})
ANY = {
    "healthbench": objects(
        {"prompt": WORDS, "rubrics": st.lists(POINTS, max_size=3)}, {"prompt_id": PLAIN, "canary": PLAIN}
    ),
    "rar": objects(
        {"question": WORDS, "rubric": st.lists(PITFALL, max_size=3)},
        {"reference_answer": st.none() | WORDS, "rubric_count": PLAIN},
    ),
    "autorubric": st.lists(REQUIREMENT, min_size=1, max_size=3),
    "promptfoo": st.tuples(JUDGED, st.lists(JUDGED | EQUALS, max_size=2)).flatmap(
        lambda made: objects({"assert": st.permutations([made[0], *made[1]])}, {"threshold": PLAIN})
    ),
}


@pytest.mark.parametrize("name", ANY)
@pytest.mark.slow
def test_whatever_a_file_holds_comes_back(name, tmp_path):
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(ANY[name])
    def check(source):
        ours = there(tmp_path, name, source, polarity={"": "undesirable"} if name == "rar" else None)
        assert written(back(tmp_path, name, ours)) == written(source)

    check()
