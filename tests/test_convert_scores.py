"""Scores by the formulas of the formats are our rewards on what was imported, on random verdicts.

Each test states a format's own published formula on its own data and compares it with the reward of the grape side,
mapped as `x-score` says: low + (high - low) x reward, clipped where the format clips.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from foreign import FOLDER, POLARITY, rows, there

from grape.item import Item, flatten, weights
from grape.plan import plan_rows
from grape.reward import rubric_reward
from grape.rows import read_rows
from grape.rubric import load_rubrics, parse_rubric

SEEDS = range(8)


def reward(leaves: list[Item], share, formula: str, scores: dict[str, float]) -> float:
    """The reward of one response, every confidence alike."""
    weight = np.array([[share[leaf.id] for leaf in leaves]])
    score = np.array([[scores[leaf.id] for leaf in leaves]])
    undesirable = np.array([[leaf.undesirable for leaf in leaves]])
    ones, ids = np.ones_like(weight), (["c"], ["q"])
    valid = ones.astype(bool)
    return float(rubric_reward(score, ones, weight, valid, *ids, formula=formula, undesirable_SJ=undesirable)[0])


def mapped(value: float, score: dict) -> float:
    low, high = score.get("low", 0), score.get("high", 1)
    value = low + (high - low) * value
    return min(1.0, max(0.0, value)) if score.get("clip") == "item" else value


def of_rubric(ours, scores: list[float]) -> float:
    """The score of a rubric for the scores of its leaves in the order of the file."""
    content = rows(ours)[0]
    rubric = parse_rubric(content, "ours", judges={"default"})
    leaves = flatten(rubric.items)
    share = weights(rubric.items, lambda item: True)
    named = dict(zip([leaf.id for leaf in leaves], scores, strict=True))
    return mapped(reward(leaves, share, rubric.formula, named), content.get("x-score", {}))


def of_rows(ours, scores: list[list[float]]) -> list[float]:
    """The scores of rows under the rubrics of their categories, which the examples bring."""
    found = [{**row, "response": "An answer."} for row in rows(ours)]
    rubrics = load_rubrics(FOLDER / "rubrics")
    plans = plan_rows(read_rows(found), rubrics)
    values = []
    for row, given in zip(found, scores, strict=True):
        plan = plans[row["question_id"]]
        named = dict(zip([leaf.id for leaf in plan.leaves], given, strict=True))
        value = reward(list(plan.leaves), plan.weight, plan.rubric.formula, named)
        values.append(mapped(value, row["metadata"]["x-score"]))
    return values


def signed(random, count: int, low: int = -9, high: int = 10) -> list[int]:
    """Weights without 0, one of them positive."""
    found = [int(weight) or 1 for weight in random.integers(low, high, count)]
    return [abs(found[0]), *found[1:]]


@pytest.mark.parametrize("seed", SEEDS)
def test_healthbench_is_points_met_over_points_possible(seed, tmp_path):
    """Each score unclipped, as in simple-evals: only the mean of the set is clipped, which `clip: mean` says."""
    random = np.random.default_rng(seed)
    sets = [signed(random, int(random.integers(2, 7))) for _ in range(4)]
    met = [random.integers(0, 2, len(points)) for points in sets]
    source = [
        {"prompt": f"Q{n}?", "rubrics": [
            {"criterion": f"c{n}{i}", "points": p, "tags": []} for i, p in enumerate(points)
        ]} for n, points in enumerate(sets)
    ]  # fmt: skip
    theirs = [
        sum(p for p, m in zip(points, yes, strict=True) if m) / sum(p for p in points if p > 0)
        for points, yes in zip(sets, met, strict=True)
    ]
    ours = there(tmp_path, "healthbench", source)
    assert of_rows(ours, [list(map(float, yes)) for yes in met]) == pytest.approx(theirs, abs=1e-12)
    assert all(row["metadata"]["x-score"]["clip"] == "mean" for row in rows(ours))


def test_healthbench_has_no_score_without_positive_points(tmp_path):
    source = {"prompt": "Q?", "rubrics": [{"criterion": "c", "points": -5, "tags": []}]}
    assert np.isnan(of_rows(there(tmp_path, "healthbench", source), [[1.0]])[0])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["rubric", "autorubric"])
def test_signed_requirements_clip_each_score(name, seed, tmp_path):
    """With penalties alone the score counts down from 1, in both libraries."""
    random = np.random.default_rng(seed)
    weight = signed(random, 5) if seed % 3 else [-int(w) for w in random.integers(1, 9, 5)]
    met = random.integers(0, 2, 5).astype(float)
    ours = there(tmp_path, name, [{"weight": w, "requirement": f"r{i}"} for i, w in enumerate(weight)])
    total, positive = float(np.dot(weight, met)), sum(w for w in weight if w > 0)
    theirs = total / positive if positive else 1 + total / sum(map(abs, weight))
    assert of_rubric(ours, list(met)) == pytest.approx(min(1, max(0, theirs)), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_autorubric_option_counts_by_its_value(seed, tmp_path):
    random = np.random.default_rng(seed)
    weight, values = signed(random, 4), random.random((4, 3))
    source = [
        {"weight": w, "requirement": f"r{i}", "options": [
            {"label": f"o{j}", "value": float(v)} for j, v in enumerate(values[i])
        ]} for i, w in enumerate(weight)
    ]  # fmt: skip
    picked = random.integers(0, 3, 4)
    ours = there(tmp_path, "autorubric", source)
    leaves = parse_rubric(rows(ours)[0], "ours", judges={"default"}).items
    scores = [leaf.scale.read(f"o{j}")[0] for leaf, j in zip(leaves, picked, strict=True)]
    theirs = sum(w * values[i][picked[i]] for i, w in enumerate(weight)) / sum(w for w in weight if w > 0)
    assert of_rubric(ours, scores) == pytest.approx(min(1, max(0, theirs)), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_rar_divides_by_all_weights(seed, tmp_path):
    """Equation 1 of the paper, where a negative weight is a fault by its sign: what the user says it is."""
    random = np.random.default_rng(seed)
    weight = [5, 3, 2, -int(random.integers(1, 4)), -int(random.integers(1, 4))]
    met = random.integers(0, 2, 5).astype(float)
    rubric = [{"title": f"t{i}", "description": f"d{i}", "weight": w} for i, w in enumerate(weight)]
    ours = there(tmp_path, "rar", {"question": "Q?", "rubric": rubric}, polarity={"t": "undesirable"})
    assert of_rows(ours, [list(met)]) == pytest.approx([float(np.dot(weight, met)) / sum(weight)], abs=1e-12)


def test_a_pitfall_that_is_avoided_counts_for_the_response(tmp_path):
    """Where the sign would train backwards: "Avoids ..." has a negative weight in the data and is good when met."""
    ours = there(tmp_path, "rar", (FOLDER / "rar.jsonl").read_text(), ".jsonl", polarity=POLARITY)
    (_, avoided), (_, not_avoided) = (of_rows(ours, [[1, 0, 0, 0], [1, met]]) for met in (1, 0))
    assert avoided == 1 and not_avoided == pytest.approx(5 / 6)


@pytest.mark.parametrize("seed", SEEDS)
def test_dr_tulu_divides_by_the_positive_weights_but_never_by_less_than_one(seed, tmp_path):
    """The judge says 0, 1 or 2, halved; nothing is clipped."""
    random = np.random.default_rng(seed)
    sets = [[1.0, 1.0, -1.0], [0.3, 0.2, -1.0], [-1.0, -0.5], [1.0, 0.5]]
    said = [random.integers(0, 3, len(weight)) for weight in sets]
    source = []
    for n, weight in enumerate(sets):
        rubrics = [{"description": f"d{n}{i}", "weight": w, "title": f"t{i}"} for i, w in enumerate(weight)]
        truth = json.dumps({"query": f"Q{n}?", "rubrics": rubrics})
        source.append({"messages": [{"role": "user", "content": f"Q{n}?"}], "ground_truth": truth})
    theirs = [
        sum(s / 2 * w for s, w in zip(scores, weight, strict=True)) / max(sum(w for w in weight if w > 0), 1.0)
        for scores, weight in zip(said, sets, strict=True)
    ]
    ours = there(tmp_path, "dr-tulu", source)
    scale = Item.model_validate(rows(ours)[0]["items"][0]).scale
    scores = [[scale.read(int(s))[0] for s in row] for row in said]
    assert of_rows(ours, scores) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tree", ["mechanistic-understanding", "semantic-self-consistency"])
@pytest.mark.slow
def test_paperbench_is_the_weighted_mean_at_every_parent(tree, seed, tmp_path):
    path = FOLDER / f"paperbench/{tree}.json"
    ours = there(tmp_path, "paperbench", path.read_text())
    random = np.random.default_rng(seed)
    met: list[float] = []

    def score(node: dict) -> float:
        tasks = node["sub_tasks"]
        if not tasks:
            met.append(float(random.integers(0, 2)))
            return met[-1]
        return sum(task["weight"] * score(task) for task in tasks) / sum(task["weight"] for task in tasks)

    theirs = score(json.loads(path.read_text()))
    ours.rename(tmp_path / "ours.yaml")
    assert of_rubric(tmp_path / "ours.yaml", met) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_prometheus_is_the_mean_of_its_points(seed, tmp_path):
    random = np.random.default_rng(seed)
    anchors = {f"score{point}_description": f"level {point}" for point in range(1, 6)}
    ours = there(tmp_path, "prometheus", [{"criteria": f"c{i}", **anchors} for i in range(3)])
    said = random.integers(1, 6, 3)
    leaves = parse_rubric(rows(ours)[0], "ours", judges={"default"}).items
    scores = [leaf.scale.read(int(s))[0] for leaf, s in zip(leaves, said, strict=True)]
    assert of_rubric(ours, scores) == pytest.approx(said.mean(), abs=1e-12)


def test_a_row_of_prometheus_is_its_point(tmp_path):
    row = {"orig_instruction": "Q?", "orig_criteria": "c", "orig_score1_description": "bad",
           "orig_score5_description": "good", "orig_response": "R", "orig_reference_answer": "A"}  # fmt: skip
    ours = there(tmp_path, "prometheus", row)
    scale = Item.model_validate(rows(ours)[0]["items"][0]).scale
    assert of_rows(ours, [[scale.read(4)[0]]]) == [pytest.approx(4)]
    assert (rows(ours)[0]["response"], rows(ours)[0]["reference"]) == ("R", "A")


@pytest.mark.parametrize("seed", SEEDS)
def test_verifiers_is_the_weighted_mean_of_ranks(seed, tmp_path):
    random = np.random.default_rng(seed)
    weight = random.random(4)
    choices = [[f"choice {j}" for j in range(count)] for count in random.integers(2, 6, 4)]
    source = [{"name": f"n{i}", "text": "t", "weight": float(weight[i]), "choices": choices[i]} for i in range(4)]
    ours = there(tmp_path, "verifiers", {"criteria": [*source, {"name": "free", "text": "t", "weight": 0}]})
    picked = [int(random.integers(0, len(options))) for options in choices]
    theirs = sum(w * j / (len(c) - 1) for w, j, c in zip(weight, picked, choices, strict=True)) / sum(weight)
    leaves = parse_rubric(rows(ours)[0], "ours", judges={"default"}).items
    scores = [leaf.scale.read(c[j])[0] for leaf, c, j in zip(leaves, choices, picked, strict=True)]
    assert of_rubric(ours, scores) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("scores", ["from_strings", {"1": 0.1, "2": 0.5, "3": 0.4}, {"1": -2, "2": 0.5, "3": 8}])
def test_a_model_graded_choice_is_what_it_is_worth(scores, tmp_path):
    spec = {"prompt": "{completion}", "choice_strings": "123", "choice_scores": scores, "input_outputs": {}}
    ours = there(tmp_path, "openai-evals", spec)
    (leaf,) = parse_rubric(rows(ours)[0], "ours", judges={"default"}).items
    for choice in "123":
        theirs = float(choice) if scores == "from_strings" else scores[choice]
        assert of_rubric(ours, [leaf.scale.read(choice)[0]]) == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_rlcf_is_the_mean_by_importance_over_a_hundred(seed, tmp_path):
    random = np.random.default_rng(seed)
    importance, said = random.integers(1, 101, 4), random.random(4) * 100
    pairs = [[f"q{i}?", int(weight)] for i, weight in enumerate(importance)]
    ours = there(tmp_path, "rlcf", {"prompt": "Q?", "requirements": [*pairs, ["free?", 0]]})
    scale = Item.model_validate(rows(ours)[0]["items"][0]).scale
    theirs = float(np.dot(importance, said) / importance.sum()) / 100
    assert of_rows(ours, [[scale.read(float(s))[0] for s in said]]) == pytest.approx([theirs], abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_promptfoo_is_the_weighted_mean_with_sets_as_one(seed, tmp_path):
    random = np.random.default_rng(seed)
    first, second, inner, whole = (int(w) for w in random.integers(1, 6, 4))
    source = {"defaultTest": {"assert": [{"type": "llm-rubric", "value": "a", "weight": first}]}, "tests": [
        {"assert": [{"type": "not-llm-rubric", "value": "b", "weight": second}]},
        {"assert": [{"type": "assert-set", "weight": whole, "assert": [
            {"type": "llm-rubric", "value": "c"}, {"type": "llm-rubric", "value": "d", "weight": inner}]}]},
    ]}  # fmt: skip
    content = rows(there(tmp_path, "promptfoo", source))[0]
    rubric = parse_rubric(content, "ours", judges={"default"})
    a, b, c, d = random.random(4)
    scores = dict(zip([leaf.id for leaf in flatten(rubric.items)], (a, b, c, d), strict=True))
    theirs = {
        "test-1": (first * a + second * (1 - b)) / (first + second),
        "test-2": (first * a + whole * (c + inner * d) / (1 + inner)) / (first + whole),
    }
    for test, value in theirs.items():
        row = {"question_id": "q", "category": rubric.category, "question": "Q?", "response": "R",
               "metadata": {"promptfoo_test": test}}  # fmt: skip
        plan = plan_rows(read_rows([row]), {rubric.category: rubric})["q"]
        assert reward(list(plan.leaves), plan.weight, rubric.formula, scores) == pytest.approx(value, abs=1e-12)


def test_ifeval_is_the_share_of_instructions_that_are_followed(tmp_path):
    ours = there(tmp_path, "ifeval", (FOLDER / "ifeval.jsonl").read_text(), ".jsonl")
    row = {**rows(ours)[0], "response": "A town, and no more."}
    rubric = parse_rubric({"rubric": "instructions", "formula": "weighted", "items": []}, "bare")
    plan = plan_rows(read_rows([row]), {"instructions": rubric})[row["question_id"]]
    assert row["metadata"]["x-score"] == {"formula": rubric.formula}
    scores = dict(zip([leaf.id for leaf in plan.leaves], (1.0, 0.0), strict=True))
    assert reward(list(plan.leaves), plan.weight, rubric.formula, scores) == 0.5
