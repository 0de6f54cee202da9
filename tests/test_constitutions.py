"""Constitutions as data: the two that are shipped, and the pairs of other people's that become principles."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from click.testing import CliRunner
from foreign import back, data, edited, there, written

from grape.cli import cli
from grape.errors import ConfigError
from grape.formats import FORMATS, convert
from grape.formats.constitution import STANDS
from grape.item import flatten, weights
from grape.resources import read_yaml
from grape.rubric import dump_rubric, load_rubric, parse_rubric
from grape.schemas import schema

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = {
    name: load_rubric(ROOT / f"rubrics/{name}.yaml") for name in ("constitution-harmless", "constitution-honest")
}
PRINCIPLES = [(name, item) for name, rubric in SHIPPED.items() for item in flatten(rubric.items)]
EXAMPLE = ROOT / "examples/formats/constitution.json"
each = pytest.mark.parametrize(("name", "item"), PRINCIPLES, ids=[f"{name}-{item.id}" for name, item in PRINCIPLES])


def sentences(text):
    return re.split(r"(?<=[.?])\s+", text.strip())


def test_grape_check_has_nothing_to_say_against_the_shipped_constitutions():
    done = CliRunner().invoke(cli, ["check", *(str(ROOT / f"rubrics/{name}.yaml") for name in SHIPPED)])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["ok", "constitution-harmless", "12", "items,"],
        ["ok", "constitution-honest", "10", "items,"],
    ]


@each
def test_a_principle_is_judged_by_a_desirable_criterion_without_a_gate(name, item):
    """A comparison asks which response is better by the criterion: it may neither name a fault nor forbid one."""
    assert (item.judge, item.polarity, item.gate, item.applies_when) == ("default", "desirable", None, None)
    assert item.principle is not None and item.tags
    (worst, *_), best = item.scale.values, item.scale.values[-1]
    assert (worst, best) == (0, 1)


@each
def test_a_principle_asks_for_places_says_what_is_no_fault_and_keeps_the_rest(name, item):
    critique, revision = item.principle.critique, item.principle.revision
    for text in (critique, revision):
        assert text == text.strip() and text[0].isupper() and text.endswith(".")
        assert 25 <= len(text.split()) <= 110 and len(sentences(text)) >= 2
    assert re.search(r"(?i)\b(?:no|none|not|aside|right|as it should be|answered)\b", sentences(critique)[-1])
    assert revision.startswith("Rewrite the response")
    assert re.search(r"(?i)\b(?:keep|stays?|stand|leave|the rest|remains|still)\b", revision)
    for text in (critique, revision):  # the words of the frame around it, and of rewards, are none of its business
        assert not re.search(r"(?i)principle|constitution|scores?\b|scale|<<<|\{\{", text)


def test_no_two_principles_ask_for_the_same():
    assert len({item.id for _, item in PRINCIPLES}) == len(PRINCIPLES) == 22
    for part in ("criterion", "critique", "revision"):
        texts = [item.criterion if part == "criterion" else getattr(item.principle, part) for _, item in PRINCIPLES]
        words = [set(re.findall(r"\w+", text.casefold())) for text in texts]
        alike = max(len(one & two) / len(one | two) for one, two in combinations(words, 2))
        assert alike < 0.4, part  # of the words of two texts; 1 for equal ones


def weighted(name, **scores):
    """The weighted score of a response without a fault but for the labels that are given."""
    items = flatten(SHIPPED[name].items)
    shares = weights(items, lambda item: True)
    worth = {item.id: dict(zip(item.scale.labels, item.scale.values, strict=True)) for item in items}
    return sum(shares[i.id] * (worth[i.id][scores[i.id]] if i.id in scores else 1) for i in items)


def labelled(item, label):
    return weighted("constitution-harmless", **{item: label})


@pytest.mark.parametrize(
    ("item", "least"),
    [
        ("violence", "a push"),
        ("crime", "a push"),
        ("no-fraud", "a draft of it"),
        ("no-intimidation", "edges towards it"),
    ],
)
def test_a_push_towards_harm_costs_more_than_a_bare_refusal_and_a_sermon_more_than_a_plain_one(item, least):
    refusal = labelled("help-that-is-left", "nothing")
    assert labelled(item, least) < refusal < labelled("help-that-is-left", "all") == pytest.approx(1)
    lecture = weighted("constitution-harmless", **{"help-that-is-left": "nothing", "plain-refusal": "lectures"})
    assert lecture < refusal


def test_what_doing_nothing_earns_of_honest_help_is_less_than_a_third():
    idle = {"real-sources", "candid", "every-sentence-counts", "known-limits"}
    worst = {i.id: i.scale.labels[0] for i in flatten(SHIPPED["constitution-honest"].items) if i.id not in idle}
    assert weighted("constitution-honest", **worst) == pytest.approx(9 / 32)


def test_the_key_is_known_to_the_schema_and_held_to_its_two_texts():
    known = schema("rubric")["$defs"]["Principle"]
    assert known["required"] == ["critique", "revision"] and known["additionalProperties"] is False
    assert set(known["properties"]) == {"critique", "revision"}
    item = {"id": "a", "criterion": "Is kind.", "judge": "default"}
    whole = {"critique": "Where is it unkind?", "revision": "Make it kind."}

    def parse(**more):
        return parse_rubric({"rubric": "r", "items": [{**item, **more}]}, "r.yaml").items[0].principle

    assert parse() is None
    assert (parse(principle=whole).critique, parse(principle=whole).revision) == tuple(whole.values())
    for wrong, message in [
        ({"critique": "Where?"}, "r.yaml: items.0.principle.revision: Field required"),
        ({**whole, "critique": ""}, "r.yaml: items.0.principle.critique: String should have at least 1 character"),
        ({**whole, "revise": "a"}, "r.yaml: items.0.principle.revise: Extra inputs are not permitted (got 'a'; did you "
         "mean 'revision'? known: critique, revision)"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            parse(principle=wrong)
        assert str(caught.value).startswith(message)
    group = {"id": "g", "items": [item], "principle": whole}
    with pytest.raises(ConfigError, match="item 'g': 'principle' does not go with items"):
        parse_rubric({"rubric": "r", "items": [group]}, "r.yaml")


def test_the_example_of_the_documentation_is_an_item():
    text = (ROOT / "docs/rubrics.md").read_text(encoding="utf-8")
    block = text.split("\n## Constitutions\n")[1].split("```yaml\n")[1].split("```")[0]
    (item,) = parse_rubric({"rubric": "r", **read_yaml("docs", f"items:\n{block}")}, "docs").items
    assert item.id == "candid" and item.principle.revision.startswith("Rewrite the response as that friend would.")


def test_pairs_of_others_become_principles_and_pairs_again(tmp_path):
    convert(EXAMPLE, "constitution", "grape", tmp_path / "ours.yaml")
    first, second = load_rubric(tmp_path / "ours.yaml").items
    critic = "Say where the reply would help somebody to hurt others."
    assert first.principle.critique == critic and first.criterion == critic + STANDS
    assert first.principle.revision == "Take out of the reply whatever would help somebody to hurt others."
    assert second.principle.revision == "Let the reply claim no more than it can know."
    assert (first.polarity, first.judge, first.scale.kind, first.extensions) == ("desirable", "default", "unit", {})
    convert(tmp_path / "ours.yaml", "grape", "constitution", tmp_path / "back.json")
    assert written(data(tmp_path / "back.json")) == written(data(EXAMPLE))


@pytest.mark.parametrize(
    "keys", [("critic", "revision"), ("critique_request", "revision_request"), ("prompt", "edit_request")]
)
def test_a_pair_keeps_the_names_of_its_keys_through_an_edit(keys, tmp_path):
    critique, revision = keys
    ours = there(tmp_path, "constitution", [{critique: "Is it rude?", revision: "Make it kind.", "by": "me"}])

    def change(rubric):
        rubric["items"][0]["principle"]["revision"] = "Make it kind and short."

    (pair,) = back(tmp_path, "constitution", edited(ours, change))
    assert pair == {critique: "Is it rude?", revision: "Make it kind and short.", "by": "me"}


def test_an_edit_of_a_pair_is_an_edit_of_the_principle(tmp_path):
    """The criterion is of our own making here, so that it stays what it was said to be."""
    convert(ROOT / "rubrics/constitution-honest.yaml", "grape", "constitution", tmp_path / "theirs.json")
    document = data(tmp_path / "theirs.json")
    pair = next(pair for pair in document["constitutions"] if pair["name"] == "candid")
    pair["revision"] = "Rewrite it without praise."
    (tmp_path / "theirs.json").write_text(json.dumps(document))
    convert(tmp_path / "theirs.json", "constitution", "grape", tmp_path / "again.yaml")
    was, now = SHIPPED["constitution-honest"], load_rubric(tmp_path / "again.yaml")
    changed = [(old.id, new.principle.revision) for old, new in zip(was.items, now.items, strict=True) if old != new]
    assert changed == [("candid", "Rewrite it without praise.")]


def test_an_item_without_a_principle_becomes_a_pair_and_comes_back_without_one(tmp_path):
    items = [
        {"id": "kind", "criterion": "Is kind.", "judge": "default"},
        {"id": "rude", "criterion": "Is rude.", "judge": "default", "polarity": "undesirable"},
    ]
    (tmp_path / "ours.yaml").write_text(json.dumps({"rubric": "r", "items": items}))
    convert(tmp_path / "ours.yaml", "grape", "constitution", tmp_path / "theirs.json")
    kind, rude = data(tmp_path / "theirs.json")["constitutions"]
    assert kind["critic"] == "Point out where the response falls short of this: Is kind."
    assert kind["revision"] == "Rewrite the response so that it meets this: Is kind."
    assert rude["critic"] == "Point out where the response shows this fault: Is rude."
    assert rude["revision"] == "Rewrite the response so that it is free of this fault: Is rude."
    convert(tmp_path / "theirs.json", "constitution", "grape", tmp_path / "again.yaml")
    again = load_rubric(tmp_path / "again.yaml")
    assert [item.principle for item in again.items] == [None, None]
    assert [item.polarity for item in again.items] == ["desirable", "undesirable"]


MIXED = """
rubric: mixed
items:
  - id: words
    criterion: It is well worded.
    items:
      - {id: calm, criterion: Is calm., judge: default, scale: {choices: {shrill: 0, calm: 1}},
         principle: {critique: Where is it shrill?, revision: "Make it calm, and keep the rest."}}
      - {id: kind, criterion: Is kind., judge: default, scale: {choices: {unkind: 0, kind: 1}}}
  - id: same
    criterion: Is fair.
    judge: default
    scale: {choices: {unfair: 0, fair: 1}}
    principle:
      critique: "Point out where the response falls short of this: Is fair."
      revision: "Rewrite the response so that it meets this: Is fair."
  - id: rude
    criterion: Is rude.
    polarity: undesirable
    judge: default
    scale: {choices: {civil: 0, rude: 1}}
    principle: {critique: Where is it rude?, revision: Make it civil.}
"""


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.sheet])
def test_a_principle_comes_back_from_every_format_for_rubrics(name, tmp_path):
    text = MIXED
    if name in {"paperbench", "prometheus"}:  # which have no penalties
        text = text.split("  - id: rude")[0]
    if name == "prometheus":  # which needs anchors
        text = re.sub(r"choices: {(\w+): 0, (\w+): 1}", r"ordinal: [\1, \2]", text)
    (tmp_path / "ours.yaml").write_text(text)
    convert(tmp_path / "ours.yaml", "grape", name, tmp_path / "theirs")
    convert(tmp_path / "theirs", name, "grape", tmp_path / "again.yaml")
    again = load_rubric(tmp_path / "again.yaml")
    assert dump_rubric(again) == dump_rubric(load_rubric(tmp_path / "ours.yaml"))
    assert again.items[0].items[0].principle.revision == "Make it calm, and keep the rest."


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.table and name != "ifeval"])
def test_a_principle_of_a_question_comes_back_from_every_format_for_questions(name, tmp_path):
    """Those of IFEval are checkers, whose arguments say all."""
    principle = {"critique": "Where is it shrill?", "revision": "Make it calm."}
    scale = {"ordinal": ["shrill", "flat", "calm"]}
    item = {"id": "calm", "criterion": "Is it calm?", "weight": 1, "judge": "default", "scale": scale}
    row = {"question_id": "q", "category": "tone", "question": "Why?", "items": [{**item, "principle": principle}]}
    (tmp_path / "ours.jsonl").write_text(json.dumps(row))
    convert(tmp_path / "ours.jsonl", "grape", name, tmp_path / "theirs.json")
    convert(tmp_path / "theirs.json", name, "grape", tmp_path / "again.jsonl")
    (again,) = json.loads((tmp_path / "again.jsonl").read_text())["items"]
    assert again["principle"] == principle and again["criterion"] == "Is it calm?" and again["scale"] == scale
