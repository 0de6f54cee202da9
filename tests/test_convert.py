"""Other people's formats to ours and back: nothing is lost, edits win, and nothing is guessed."""

from __future__ import annotations

import json

import pytest
from foreign import EXAMPLES, FOLDER, POLARITY, back, data, edited, format_of, rows, there, written

from grape.errors import ConfigError
from grape.formats import FORMATS, NAMES, convert
from grape.item import flatten, paths, weights
from grape.plan import plan_rows
from grape.rows import read_rows
from grape.rubric import dump_rubric, load_rubric, load_rubrics, parse_rubric


def test_there_is_an_example_of_every_format():
    assert {format_of(path) for path in EXAMPLES} == set(FORMATS)
    assert set(NAMES) == {"grape", *FORMATS}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_comes_back_with_every_field_in_its_order(path, tmp_path):
    name, ours = format_of(path), tmp_path / "ours"
    convert(path, name, "grape", ours, polarity=POLARITY)
    again = tmp_path / f"back{path.suffix}"
    convert(ours, "grape", name, again)
    assert written(data(again)) == written(data(path))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_what_scoring_reads_is_what_was_converted(path, tmp_path):
    """Rubrics load by the strict reader; rows do, once they have a response, under a rubric of their category."""
    name, ours = format_of(path), tmp_path / "ours.yaml"
    done = convert(path, name, "grape", ours, polarity=POLARITY)
    if not done.questions:
        rubric = load_rubric(ours)
        assert len(flatten(rubric.items)) == done.items
        return
    answered = [{**row, "response": "An answer."} for row in rows(ours)]
    rubrics = load_rubrics(FOLDER / "rubrics") | {"instructions": parse_rubric(BARE, "bare")}
    plans = plan_rows(read_rows(answered), rubrics)
    assert len(plans) == done.questions
    for row in answered:
        assert rubrics[row["category"]].formula == row["metadata"]["x-score"]["formula"]
        assert len(plans[row["question_id"]].applicable) == len(row.get("items", row.get("kwargs")))


BARE = {"rubric": "instructions", "formula": "weighted", "items": []}


def test_both_paperbench_trees_keep_their_leaves_and_weights(tmp_path):
    leaves = {}
    for path in sorted((FOLDER / "paperbench").glob("*.json")):
        convert(path, "paperbench", "grape", tmp_path / "ours.yaml")
        rubric = load_rubric(tmp_path / "ours.yaml")
        leaves[path.stem] = len(flatten(rubric.items))
        (root,) = rubric.items
        assert root.id == data(path)["id"]
        assert [child.weight for child in root.items] == [task["weight"] for task in data(path)["sub_tasks"]]
    assert leaves == {"mechanistic-understanding": 96, "semantic-self-consistency": 77}


def test_unknown_fields_survive_at_every_level(tmp_path):
    source = {"rubric": {"sections": [{"name": "a", "owner": 1, "criteria": [
        {"weight": 1, "requirement": "Is kind.", "note": {"by": ["x", None, 1.0, True]}},
    ]}], "version": 7}, "licence": "MIT"}  # fmt: skip
    ours = there(tmp_path, "autorubric", source)
    rubric = load_rubric(there(tmp_path, "autorubric", source).rename(tmp_path / "r.yaml"))
    assert rubric.items[0].extensions["x-autorubric"]["note"] == {"by": ["x", None, 1.0, True]}
    assert rubric.extensions["x-autorubric"]["document"]["licence"] == "MIT"
    ours = there(tmp_path, "autorubric", source)
    assert written(back(tmp_path, "autorubric", ours)) == written(source)


def test_unknown_fields_of_a_row_are_its_metadata(tmp_path):
    row = {
        "prompt": "Hi?",
        "theme": "greeting",
        "x-odd": 1,
        "rubrics": [{"criterion": "Greets.", "points": 1.5, "by": 3}],
    }
    ours = there(tmp_path, "healthbench", row)
    (made,) = read_rows([{**json.loads(ours.read_text()), "response": "Hi."}]).questions.values()
    assert made.get("theme") == "greeting"
    assert written(back(tmp_path, "healthbench", ours)) == written(row)


def test_signed_weights_become_polarity(tmp_path):
    ours = there(tmp_path, "rubric", [{"weight": 2, "requirement": "a"}, {"weight": -3.5, "requirement": "b"}])
    rubric = parse_rubric(data(ours), "ours", judges={"default"})
    assert [(item.weight, item.polarity) for item in rubric.items] == [(2, "desirable"), (3.5, "undesirable")]
    assert rubric.formula == "points"


def test_penalties_alone_count_down_from_one(tmp_path):
    assert data(there(tmp_path, "rubric", [{"weight": -3, "requirement": "b"}]))["formula"] == "weighted"


def test_what_weighs_nothing_is_kept_where_it_stands_and_out_of_the_score(tmp_path):
    questions = [{"prompt": "Hi?", "prompt_id": "p", "rubrics": [
        {"criterion": "zero", "points": 0, "tags": []},
        {"criterion": "one", "points": 1, "tags": []},
        {"criterion": "none", "points": 0.0, "tags": [], "more": 1},
    ]}]  # fmt: skip
    ours = there(tmp_path, "healthbench", questions)
    (row,) = rows(ours)
    assert [item["criterion"] for item in row["items"]] == ["one"]
    assert written(back(tmp_path, "healthbench", ours)) == written(questions)
    tree = {"id": "r", "requirements": "r", "weight": 1, "sub_tasks": [
        {"id": "a", "requirements": "a", "weight": 0, "sub_tasks": []},
        {"id": "b", "requirements": "b", "weight": 2, "sub_tasks": []},
    ]}  # fmt: skip
    ours = there(tmp_path, "paperbench", tree)
    assert len(flatten(load_rubric(ours.rename(tmp_path / "t.yaml")).items)) == 1
    assert written(back(tmp_path, "paperbench", tmp_path / "t.yaml")) == written(tree)


def test_ids_come_from_names_or_from_the_text_and_are_distinct(tmp_path):
    source = [
        {"weight": 1, "requirement": "a", "name": "Cites a Source!"},
        {"weight": 1, "requirement": "b", "name": "cites, a source"},
        {"weight": 1, "requirement": "c", "name": "kind.v2"},
        {"weight": 1, "requirement": "d", "name": "礼貌"},
        {"weight": 1, "requirement": "Names the city of the treaty."},
        {"weight": 1, "requirement": "Names the city of the treaty."},
        {"weight": 1, "requirement": "说出城市"},
    ]
    ids = [item["id"] for item in data(there(tmp_path, "autorubric", source))["items"]]
    assert ids[:3] == ["cites-a-source", "cites-a-source-2", "kind.v2"]
    assert ids[3].startswith("item-")
    assert ids[4].startswith("names-the-city-of-the-") and ids[5] == ids[4] + "-2"
    assert ids[6].startswith("item-") and len(set(ids)) == len(ids)
    assert ids == [item["id"] for item in data(there(tmp_path, "autorubric", source))["items"]]
    assert written(back(tmp_path, "autorubric", tmp_path / "ours")) == written(source)


def test_an_edit_of_ours_is_an_edit_of_theirs(tmp_path):
    ours = there(tmp_path, "autorubric", (FOLDER / "autorubric.yaml").read_text(), ".yaml")

    def change(rubric):
        dose, double, calm = rubric["items"]
        dose |= {"weight": 7, "id": "first-dose"}
        double |= {"criterion": "Doubles the dose", "weight": 20}
        calm["scale"] = {"choices": {"shrill": 0, "calm": 1}}
        rubric["items"].append({"id": "short", "criterion": "Is short.", "judge": "default", "scale": "binary"})

    document = back(tmp_path, "autorubric", edited(ours, change))
    facts, tone = (section["criteria"] for section in document["sections"])
    assert document["guidelines"].startswith("Judge the note")
    assert facts[0] == {"name": "first-dose", "weight": 7, "requirement": "States the starting dose with its unit"}
    assert facts[1]["weight"] == -20 and facts[1]["requirement"] == "Doubles the dose"
    assert tone[0]["options"] == [{"label": "shrill", "value": 0}, {"label": "calm", "value": 1}]
    assert tone[0]["aggregation"] == "median"
    assert (tone[1]["name"], tone[1]["weight"], tone[1]["requirement"]) == ("short", 1, "Is short.")


def test_an_edit_of_a_row_is_an_edit_of_theirs(tmp_path):
    ours = there(tmp_path, "rar", (FOLDER / "rar.jsonl").read_text(), ".jsonl", polarity=POLARITY)

    def change(rows):
        names, reason, pregnancy, pitfall = rows[0]["items"]
        names["weight"], reason["criterion"], pitfall["weight"] = 9, "Says why.", 4
        rows[0]["items"].remove(pregnancy)
        rows[0]["metadata"]["question_source"] = "edited"

    first, second = back(tmp_path, "rar", edited(ours, change), ".jsonl")
    assert [entry["weight"] for entry in first["rubric"]] == [9, 3, -4]
    assert first["rubric"][1]["description"] == "Says why." and first["rubric"][1]["title"] == "Gives the reason"
    assert (first["rubric_count"], first["question_source"]) == (3, "edited")
    assert written(second) == written(data(FOLDER / "rar.jsonl")[1])


def test_pitfalls_that_nobody_decided_are_listed_and_never_guessed(tmp_path):
    source = FOLDER / "rar.jsonl"
    with pytest.raises(ConfigError) as caught:
        convert(source, "rar", "grape", tmp_path / "ours")
    first, *listed = str(caught.value).splitlines()
    assert first.startswith(f"{source}: 2 undecided; the source does not say whether they are good or bad when met")
    assert listed == [
        "  line 1: rubric.3: Ignores radiation | Pitfall Criteria: Does not mention radiation at all.",
        "  line 2: rubric.1: Avoids the air bubble story | "
        "Pitfall Criteria: Avoids the claim that ice is lighter because it holds air.",
    ]
    assert not (tmp_path / "ours").exists()
    with pytest.raises(ConfigError, match="1 undecided"):
        convert(source, "rar", "grape", tmp_path / "ours", polarity={"Ignores radiation": "undesirable"})
    with pytest.raises(ConfigError, match="2 undecided"):
        convert(
            source, "rar", "grape", tmp_path / "ours", polarity={"radiation": "undesirable", "Criteria": "desirable"}
        )


def test_the_longest_title_or_prefix_decides(tmp_path):
    answers = {"pitfall": "undesirable", "Pitfall Criteria: Avoids": "desirable"}
    convert(FOLDER / "rar.jsonl", "rar", "grape", tmp_path / "ours", polarity=answers)
    pitfalls = [row["items"][-1] for row in data(tmp_path / "ours")]
    assert [item.get("polarity", "desirable") for item in pitfalls] == ["undesirable", "desirable"]
    assert [item["weight"] for item in pitfalls] == [2, 1]


def test_a_positive_weight_is_decided_unless_it_is_a_pitfall(tmp_path):
    row = {"question": "Why?", "rubric": [{"title": "Pitfall: rambles", "description": "Rambles.", "weight": 1}]}
    with pytest.raises(ConfigError, match="1 undecided"):
        there(tmp_path, "rar", row)
    ours = there(tmp_path, "rar", row, polarity={"Pitfall": "undesirable"})
    assert data(ours)["items"][0]["polarity"] == "undesirable"
    assert written(back(tmp_path, "rar", ours)) == written(row)


def test_answers_are_read_strictly(tmp_path):
    answers = tmp_path / "answers.yaml"
    answers.write_text("Pitfall: bad\n")
    with pytest.raises(ConfigError) as caught:
        convert(FOLDER / "rar.jsonl", "rar", "grape", tmp_path / "ours", polarity=answers)
    assert str(caught.value) == f"{answers}: Pitfall: 'bad' is no polarity; known: desirable, undesirable"


GRADER = {"prompt": "{completion} is ...", "choice_strings": "ABC", "input_outputs": {"input": "completion"}}


def test_choices_without_scores_are_listed_and_never_guessed(tmp_path):
    with pytest.raises(ConfigError, match=r"1 undecided(.|\n)*  fact: what A, B, C are worth$"):
        there(tmp_path, "openai-evals", {"fact": GRADER})
    ours = there(tmp_path, "openai-evals", {"fact": GRADER}, polarity={"fact": {"A": 1, "B": 0.25, "C": 0}})
    assert data(ours)["items"][0]["scale"] == {"choices": {"A": 1, "B": 0.25, "C": 0}}
    assert written(back(tmp_path, "openai-evals", ours)) == written({"fact": GRADER})
    edited(ours, lambda rubric: rubric["items"][0].update(scale={"choices": {"A": 1, "B": 0, "C": 0}}))
    assert back(tmp_path, "openai-evals", ours)["fact"]["choice_scores"] == {"A": 1, "B": 0, "C": 0}


@pytest.mark.parametrize(
    ("scores", "worth", "ends"),
    [
        ("from_strings", {"1": 0, "2": 0.5, "3": 1}, {"low": 1, "high": 3}),
        ({"1": -1, "2": 0, "3": 1}, {"1": 0, "2": 0.5, "3": 1}, {"low": -1, "high": 1}),
        ({"1": 0, "2": 0.2, "3": 1}, {"1": 0, "2": 0.2, "3": 1}, None),
    ],
)
def test_scores_beyond_the_unit_are_mapped_to_it_and_back(scores, worth, ends, tmp_path):
    spec = {**GRADER, "choice_strings": "123", "choice_scores": scores}
    ours = there(tmp_path, "openai-evals", spec)
    assert data(ours)["items"][0]["scale"] == {"choices": worth}
    assert data(ours).get("x-score") == ends
    assert written(back(tmp_path, "openai-evals", ours)) == written(spec)


OWN = """
rubric: note
version: 3
category: medicine
description: How a note is written.
formula: normalized
x-owner: {team: red}
items:
  - id: right
    criterion: It is right.
    weight: 4
    applies_when: {has: reference}
    x-reviewed: true
    items:
      - {id: dose, criterion: The dose is right., judge: default, reference: true, scale: {ordinal: [no, yes]}}
      - id: unit
        criterion: The unit is right.
        weight: 2
        judge: default
        scale: {choices: {n: 0, y: 1}}
        gate: {at_least: 0.5}
  - {id: calm, criterion: Is calm., judge: default, scale: {likert: {1: shrill, 3: flat, 5: calm}}}
  - {id: short, criterion: Is short., weight: 3, check: length, with: {max: 10}, tags: [form], x-note: n}
  - {id: invented, criterion: Names no real drug., weight: 2, polarity: undesirable, judge: default, scale: binary}
cases:
  - {question: Q, response: R, expect: {short: 1}, x-from: ward 3}
"""
REFUSED = {
    "paperbench": "item 'invented' is undesirable, and paperbench has no penalties",
    "prometheus": "item 'unit' has no anchors (scale: likert or ordinal), which prometheus needs",
    "openai-evals": "item 'short' has no choices, which openai-evals needs",
}


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.sheet])
def test_a_rubric_of_ours_comes_back_from_every_format(name, tmp_path):
    """Groups, gates, checks, scales, cases and keys of our own included; what cannot be said at all is refused."""
    ours = tmp_path / "own.yaml"
    ours.write_text(OWN)
    if name in REFUSED:
        with pytest.raises(ConfigError) as caught:
            convert(ours, "grape", name, tmp_path / "theirs")
        assert str(caught.value) == f"{ours}: {REFUSED[name]}"
        return
    convert(ours, "grape", name, tmp_path / "theirs")
    convert(tmp_path / "theirs", name, "grape", tmp_path / "again.yaml")
    assert dump_rubric(load_rubric(tmp_path / "again.yaml")) == dump_rubric(load_rubric(ours))


@pytest.mark.parametrize("name", ["rubric", "promptfoo"])
@pytest.mark.parametrize("path", sorted((FOLDER.parent.parent / "rubrics").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.slow
def test_a_shipped_rubric_comes_back(path, name, tmp_path):
    convert(path, "grape", name, tmp_path / "theirs")
    convert(tmp_path / "theirs", name, "grape", tmp_path / "again.yaml")
    assert dump_rubric(load_rubric(tmp_path / "again.yaml")) == dump_rubric(load_rubric(path))


def test_what_is_added_to_an_imported_rubric_comes_back_too(tmp_path):
    """A description and a group; the list of criteria becomes a mapping that has room for them."""
    ours = there(tmp_path, "rubric", (FOLDER / "rubric.json").read_text())

    def change(rubric):
        rubric["description"] = "A treaty."
        rubric["items"] = [{"id": "facts", "weight": 3, "items": rubric["items"]}]

    edited(ours, change)
    theirs = back(tmp_path, "rubric", ours)
    assert list(theirs) == ["rubric", "x-grape"] and len(theirs["rubric"]) == 3
    convert(tmp_path / "back.json", "rubric", "grape", tmp_path / "again.yaml")
    again = load_rubric(tmp_path / "again.yaml")
    assert (again.description, again.formula, [item.id for item in again.items]) == ("A treaty.", "points", ["facts"])
    assert [leaf.weight for leaf in again.items[0].items] == [10, 4, 6]


def test_groups_flatten_to_the_weights_that_their_leaves_have(tmp_path):
    ours = tmp_path / "own.yaml"
    ours.write_text(OWN)
    convert(ours, "grape", "rubric", tmp_path / "theirs")
    flat = {entry["name"]: entry["weight"] for entry in data(tmp_path / "theirs")["rubric"]}
    whole = sum(map(abs, flat.values()))
    shares = weights(load_rubric(ours).items, lambda item: True)
    assert {name: abs(weight) / whole for name, weight in flat.items()} == pytest.approx(shares)
    assert flat["invented"] == -2 and flat["dose"] == pytest.approx(4 / 3)


def test_an_edit_of_theirs_is_an_edit_of_ours(tmp_path):
    ours, theirs = tmp_path / "own.yaml", tmp_path / "theirs.json"
    ours.write_text(OWN)
    convert(ours, "grape", "autorubric", theirs)
    document = data(theirs)
    document["rubric"][3]["weight"] = 6
    document["rubric"][2]["requirement"] = "Keeps calm."
    document["rubric"].append({"name": "new", "weight": -2, "requirement": "Shouts."})
    theirs.write_text(json.dumps(document))
    convert(theirs, "autorubric", "grape", tmp_path / "again.yaml")
    items = {item.id: item for _, item in paths("items", load_rubric(tmp_path / "again.yaml").items)}
    assert items["short"].weight == 6 and items["short"].check == "length"
    assert items["calm"].criterion == "Keeps calm." and items["calm"].scale.kind == "likert"
    assert (items["new"].weight, items["new"].undesirable) == (2, True)
    assert [child.id for child in items["right"].items] == ["dose", "unit"]


@pytest.mark.parametrize(
    ("name", "through"),
    [("healthbench", ["rar"]), ("healthbench", ["dr-tulu", "rar"]), ("dr-tulu", ["healthbench"]), ("rlcf", ["rar"]),
     ("ifeval", ["healthbench", "rlcf"]), ("rubric", ["promptfoo", "healthbench"]), ("paperbench", ["verifiers"]),
     ("autorubric", ["constitution"]), ("prometheus", ["openai-evals"]), ("verifiers", ["paperbench", "dr-tulu"])],
)  # fmt: skip
def test_what_went_through_other_formats_is_what_it_was(name, through, tmp_path):
    path = next(path for path in EXAMPLES if format_of(path) == name)
    at, kind = path, name
    for number, step in enumerate([*through, "grape"]):
        convert(at, kind, step, tmp_path / str(number), polarity=POLARITY)
        at, kind = tmp_path / str(number), step
    convert(at, "grape", name, tmp_path / f"back{path.suffix}")
    assert written(data(tmp_path / f"back{path.suffix}")) == written(data(path))


def test_a_grape_rubric_takes_its_normal_form(tmp_path):
    (tmp_path / "own.yaml").write_text(OWN)
    convert(tmp_path / "own.yaml", "grape", "grape", tmp_path / "normal.yaml")
    normal, rubric = data(tmp_path / "normal.yaml"), load_rubric(tmp_path / "own.yaml")
    assert normal == dump_rubric(rubric) == dump_rubric(load_rubric(tmp_path / "normal.yaml"))
    assert normal["x-owner"] == {"team": "red"} and normal["cases"][0]["x-from"] == "ward 3"
    assert normal["items"][0]["x-reviewed"] is True and normal["items"][0]["items"][1]["gate"] == {"at_least": 0.5}
    assert written(normal["items"][0]["weight"]) == "4"
