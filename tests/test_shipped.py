"""The rubrics that come with the package: sound by themselves, by their cases and in the documentation."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
from loopback import JudgeServer, user_text, verdict

import grape
from grape.checkers import check_response, registry
from grape.item import applies_to, flatten, paths, weights
from grape.resources import names
from grape.rubric import bounds, load_rubric
from grape.types import Outcome, Question, Response

ROOT = Path(__file__).resolve().parent.parent
DOCS = (ROOT / "docs/rubrics.md").read_text(encoding="utf-8")
CATEGORIES = ["coding", "harmlessness", "helpfulness", "instructions", "math", "writing"]
CONSTITUTIONS = {"constitution-harmless": "harmlessness", "constitution-honest": "helpfulness"}  # and their prompts
SHIPPED = sorted([*CATEGORIES, *CONSTITUTIONS])
registry()
RUBRICS = {name: load_rubric(ROOT / f"rubrics/{name}.yaml") for name in SHIPPED}
LEAVES = [(name, item) for name, rubric in RUBRICS.items() for item in flatten(rubric.items)]
JUDGED = [(name, item) for name, item in LEAVES if item.judge]


def each(pairs):
    return pytest.mark.parametrize(("name", "item"), pairs, ids=[f"{name}-{item.id}" for name, item in pairs])


def first_sentence(item):
    return re.split(r"(?<=[.?])\s", item.criterion.strip(), maxsplit=1)[0]


def question_of(case, category):
    return Question(
        question_id="case", category=category, text=case.question, reference=case.reference, tests=case.tests,
        entry_point=case.entry_point, metadata=case.metadata,
    )  # fmt: skip


def test_six_categories_and_two_constitutions_are_shipped_and_nothing_else():
    assert sorted(names("rubrics", [ROOT / "rubrics"])) == SHIPPED
    assert sorted(names("prompts", [ROOT / "prompts/generate"])) == CATEGORIES


@pytest.mark.parametrize("name", SHIPPED)
def test_a_rubric_loads_without_a_warning_under_the_name_of_its_file(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rubric = load_rubric(ROOT / f"rubrics/{name}.yaml")
    assert (rubric.rubric, rubric.category, rubric.formula) == (name, name, "grape")
    assert rubric.generate == CONSTITUTIONS.get(name, name)


def test_weights_are_whole_numbers_and_groups_say_what_they_are_for():
    for rubric in RUBRICS.values():
        for _, item in paths("items", rubric.items):
            assert item.weight == int(item.weight) and item.criterion, item.id


def test_every_judge_critic_and_prompt_that_is_named_exists():
    critics = names("prompts", [ROOT / "prompts/critique"])
    judges = names("judges", [ROOT / "judges"])
    improvers = names("prompts", [ROOT / "prompts/improve"])
    assert {item.judge for _, item in JUDGED} <= set(judges)
    assert {item.critique for _, item in JUDGED if item.critique} == set(critics)
    assert {rubric.improve for rubric in RUBRICS.values()} == set(improvers)


@each(LEAVES)
def test_a_criterion_asks_for_one_thing(name, item):
    sentence = first_sentence(item)
    assert len(sentence.split()) <= 26
    assert not re.search(r"\band\b|;", sentence), sentence


@each(LEAVES)
def test_polarity_is_in_the_item_and_not_in_the_wording(name, item):
    """A desirable criterion is no ban, an undesirable one names the fault, and `ordinal` runs from worst to best."""
    assert not re.search(r"\b(?:avoids?|never|fails? to|no more errors)\b", first_sentence(item))
    if item.undesirable:
        assert item.scale.kind in {"unit", "binary", "choices"}
        assert list(item.scale.values) == sorted(item.scale.values)


@each(JUDGED)
def test_a_scale_has_two_to_four_labels_that_cannot_be_taken_for_an_abstention(name, item):
    assert item.scale.kind in {"binary", "ordinal", "choices"}
    assert 2 <= len(item.scale.labels) <= 4
    assert not {label.casefold() for label in item.scale.labels} & {"none", "null", "n/a", "na", "unknown", "1", "0"}
    for label, value in zip(item.scale.labels, item.scale.values, strict=True):
        assert item.scale.read(label) == (value, label)


@each([(name, item) for name, item in JUDGED if item.scale.kind != "binary"])
def test_labels_quoted_in_a_criterion_are_labels_of_its_scale(name, item):
    quoted = {text.casefold() for text in re.findall(r'"([^"]+)":', item.criterion)}
    assert quoted <= {label.casefold() for label in item.scale.labels}


def test_what_sees_the_ground_truth_applies_only_where_there_is_one_and_is_not_shared():
    for _, item in LEAVES:
        for field in item.row_fields.values():
            assert item.applies_when is not None and field in item.applies_when.has, item.id
            assert not item.shares_in_improve


def test_gates_are_few_and_harm_is_worse_than_silence():
    gates = {(name, item.id): item.gate.reward for name, item in LEAVES if item.gate}
    silent = {(name, "not-empty"): 0.1 if name == "harmlessness" else 0.0 for name in CATEGORIES if name != "math"}
    assert gates == {**silent, ("harmlessness", "actionable-harm"): 0.0}


@pytest.mark.parametrize("name", [name for name in CATEGORIES if name != "harmlessness"])
@pytest.mark.parametrize("known", [{}, {"reference": "r"}])
def test_doing_nothing_earns_at_most_three_tenths(name, known):
    """Weight that a response gets for not doing something; what forbids nothing has to be earned."""
    question = Question(question_id="q", category=name, text="?", **known)
    shares = weights(RUBRICS[name].items, applies_to(question))
    idle = [i for n, i in LEAVES if n == name and (i.undesirable or i.gate or i.id in {"repetition", "stock-phrases"})]
    assert sum(shares[item.id] for item in idle) <= 0.3 + 1e-9


def weighted(name, scores, **metadata):
    """The weighted score, after polarity, of a response without any fault but for the ``scores`` that are given."""
    leaves = flatten(RUBRICS[name].items)
    shares = weights(RUBRICS[name].items, applies_to(Question(question_id="q", category=name, text="?", **metadata)))
    raw = {item.id: scores.get(item.id, float(not item.undesirable)) for item in leaves}
    return sum(shares[item.id] * (1 - raw[item.id] if item.undesirable else raw[item.id]) for item in leaves)


@pytest.mark.parametrize(
    ("harmful", "stance", "limited"),
    [({}, {"over-refusal": 1}, {}), ({"metadata": {"harmful": True}}, {}, {"declines-harmful": 0})],
)
def test_help_beats_refusal_and_refusal_beats_the_slightest_harm(harmful, stance, limited):
    refusing = weighted("harmlessness", {"serves-safe-part": 0}, **harmful)
    harming = weighted("harmlessness", {"actionable-harm": 0.7, **limited}, **harmful)
    assert weighted("harmlessness", {}, **harmful) == pytest.approx(1)
    assert 0.1 < harming < refusing < 0.9
    if stance:  # where the request was harmless
        assert weighted("harmlessness", {"serves-safe-part": 0, **stance}) < 0.7


def test_a_right_answer_alone_beats_a_wrong_one_with_everything_else():
    rest = {i.id: float(i.undesirable) for n, i in LEAVES if n == "math" and i.id != "correct"}
    assert weighted("math", rest, reference="4") > weighted("math", {"correct": 0}, reference="4")


CASES = [(name, number) for name, rubric in RUBRICS.items() for number in range(len(rubric.cases))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_the_checkers_score_a_case_as_it_says(name, number):
    case = RUBRICS[name].cases[number]
    question = question_of(case, name)
    shares = weights(RUBRICS[name].items, applies_to(question))
    response = Response(response_id="r", question_id="case", text=case.response)
    for item in flatten(RUBRICS[name].items):
        expected = bounds(case.expect[item.id]) if item.id in case.expect else None
        if expected is None:
            continue
        assert (expected is Outcome.NOT_APPLICABLE) == (shares[item.id] == 0), item.id
        if item.check and shares[item.id]:
            got = check_response(item.id, item.check, item.arguments, item.confidence, question, response)
            if item.check == "code" and shutil.which("bwrap") is None:
                assert got.outcome is Outcome.SANDBOX
                continue
            assert got.outcome is Outcome.OK, got.detail
            assert expected[0] <= got.score <= expected[1], f"{item.id}: {got.reasoning}"


@each(LEAVES)
def test_the_cases_show_an_item_at_its_best_and_at_its_worst(name, item):
    """Both for checkers; a judge item is expected on at least one side."""
    expected = [bounds(case.expect[item.id]) for case in RUBRICS[name].cases if item.id in case.expect]
    ranges = [pair for pair in expected if isinstance(pair, tuple)]
    high, low = any(least >= 0.5 for least, _ in ranges), any(most <= 0.9 for _, most in ranges)
    assert (high and low) if item.check else (high or low)


def run(rows, **settings):
    return asyncio.run(grape.score(rows, rubrics=ROOT / "rubrics", **settings))


@pytest.mark.parametrize("name", CATEGORIES)
def test_without_judges_an_answer_beats_a_refusal_and_silence_earns_next_to_nothing(name):
    """On a harmless question with a known answer."""
    fields = {"question_id": "q", "category": name, "question": "In Python, what is 2 + 2?", "reference": "4"}
    answer = "```python\nprint(2 + 2)\n```\nIt prints 4, so the answer is 4."
    refusal = "I'm sorry, but as an AI language model I can't help with that."
    texts = [answer, refusal, "", "\u200b \n"]
    got = run([{**fields, "metadata": {"harmful": False}, "response": text} for text in texts], use_judges=False)
    rewards = [record["reward"] for record in got]
    assert rewards[0] == pytest.approx(1)
    assert rewards[1] <= 0.8
    assert max(rewards[2:]) <= 0.1


def test_of_two_maths_answers_the_right_one_wins_however_it_looks():
    fields = {"question_id": "q", "category": "math", "question": "2 + 2?", "reference": "4"}
    bare, dressed = run([{**fields, "response": text} for text in ("4", "2 + 2 = 5\n\\boxed{5}")], use_judges=False)
    assert bare["items"]["correct"]["score"] == 1 and dressed["items"]["correct"]["score"] == 0
    assert bare["reward"] > 0.8 and dressed["reward"] < 0.2


@pytest.mark.parametrize("name", SHIPPED)
def test_a_judge_is_asked_each_item_in_its_own_scale_and_shown_a_reference_only_where_it_may(name, tmp_path):
    secret = "42 is what the reference says"
    items = [item for item in flatten(RUBRICS[name].items) if item.judge]
    of_criterion = {item.criterion.strip(): item for item in items}
    assert len(of_criterion) == len(items)
    best = {item.id: max(item.scale.values) if not item.undesirable else 0.0 for item in items}
    shown = []

    def answer(body, number):
        text = user_text(body)
        item = next(item for criterion, item in of_criterion.items() if criterion in text)
        scored = "The scale of the score" in text
        shown.append((item.id, scored, secret in text))
        if not scored:
            return "A critique in prose."
        label = item.scale.labels[item.scale.values.index(best[item.id])]
        return verdict(1 if label == "met" else 0 if label == "not met" else label)

    response = "```\nprint(1)\n```"
    case = {"question_id": "q", "category": name, "question": "Print 1.", "response": response, "reference": secret}
    with JudgeServer(answer) as server:
        judge = {"judge": "default", "client": "openai", "endpoint": server.url, "model": "m", "timeout": 10}
        (tmp_path / "judge.yaml").write_text(json.dumps(judge))
        (record,) = run([{**case, "metadata": {"crisis": True}}], judges={"default": tmp_path / "judge.yaml"})
    shares = weights(RUBRICS[name].items, applies_to(Question(
        question_id="q", category=name, text="", reference=secret, metadata={"crisis": True}
    )))  # fmt: skip
    applying = [item for item in items if shares[item.id]]
    assert sorted(shown) == sorted(
        (item.id, scored, item.reference) for item in applying for scored in {True, not item.critique}
    )
    for item in applying:
        assert record["items"][item.id]["outcome"] == "ok"
        assert record["items"][item.id]["score"] == best[item.id]


def how(item):
    if item.items:
        return f"its {len(item.items)} children"
    if item.check:
        return f"checker `{item.check}`"
    return (
        "judge"
        + ", sees the reference" * item.reference
        + (f" after critic `{item.critique}`" if item.critique else "")
    )


def scale(item):
    if item.items:
        return "-"
    if item.check:
        return {"repetition": "by degrees", "stock_phrases": "by degrees", "code": "share of tests"}.get(
            item.check, "0 or 1"
        )
    return "binary" if item.scale.kind == "binary" else f"{item.scale.kind}, {len(item.scale.labels)}"


def table(rubric):
    """The table of a rubric's items as the documentation has it."""
    lines = []
    for path, item in paths("items", rubric.items):
        inside = path.count("items") > 1
        weight = (
            f"{item.weight:g}"
            + " in its group" * inside
            + ", undesirable" * item.undesirable
            + ", gate" * bool(item.gate)
        )
        when = item.applies_when.model_dump(exclude_defaults=True) if item.applies_when else {}
        names = {k: ", ".join(v) if isinstance(v, list) else v for k, v in when.items()}
        clauses = [f"{k} {v}" if k in {"has", "lacks"} else f"{k}: {str(v).lower()}" for k, v in names.items()]
        lines.append(f"| `{item.id}` | {weight} | {how(item)} | {scale(item)} | {', '.join(clauses) or 'always'} |")
    return lines


@pytest.mark.parametrize("name", SHIPPED)
def test_the_documentation_defends_every_item_as_it_is(name):
    section = DOCS.split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == table(RUBRICS[name])
    shared = DOCS.split("\n## Items that several rubrics share\n")[1].split("\n## ")[0]
    defended = set(re.findall(r"`([^`]+)`", "".join(re.findall(r"^(?:\* )?\*\*(.+?)\*\*", section + shared, re.M))))
    assert {item.id for _, item in paths("items", RUBRICS[name].items)} <= defended
