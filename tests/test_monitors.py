"""The views that watch for rewards that are not earned, over logs made by hand."""

from __future__ import annotations

from typing import Any

import pytest
from test_views import append, log, records, verdict

from grape.checkers.style import plain
from grape.log.monitors import SHORTEST
from grape.phrases import STOCK_PHRASES

__all__ = ["log"]  # the fixture


def response(question: str, name: str, text: str, **more: Any) -> dict[str, Any]:
    key = {"run": "r", "step": 0, "question_id": question, "response_id": name, "category": "math", "route": "given"}
    return {**key, "response": text, **more}


def rows(found: list[dict[str, Any]], *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in found]


def test_score_by_length_tells_what_pays_by_length_from_what_does_not(log):
    sizes = {"a": 10, "b": 20, "c": 30, "d": 40, "e": 50}
    log.append(
        responses=[response(q, f"{q}{n}", "x" * (size + 100 * (q == "p"))) for q in "qp" for n, size in sizes.items()],
        verdicts=[
            *(verdict(q, f"{q}{n}", "long", size / 50) for q in "qp" for n, size in sizes.items()),
            *(verdict(q, f"{q}{n}", "short", size / 50, polarity="undesirable") for q in "qp" for n, size in sizes.items()),
            *(verdict(q, f"{q}{n}", "same", 0.5) for q in "qp" for n in sizes),
            *(verdict(q, f"{q}{n}", "lost", outcome="timeout") for q in "qp" for n in sizes),
        ],
    )  # fmt: skip
    found = {row["item"]: row for row in records(log, "FROM score_by_length")}
    assert sorted(found) == ["long", "same", "short"]
    long, short, same = found["long"], found["short"], found["same"]
    assert (long["run"], long["rubric"], long["category"], long["n"], long["mean_length"]) == (
        "r",
        "math",
        "math",
        10,
        80,
    )
    assert long["correlation_within"] == pytest.approx(1)
    # between the questions length says nothing: cov = 4 of lengths' sd (14.14 within, 50 between) and merits' 0.2828
    assert long["correlation"] == pytest.approx(4 / (0.08**0.5 * (200 + 2500) ** 0.5))
    assert [long[name] for name in ("shortest", "second", "third", "fourth", "longest")] == pytest.approx(
        [0.3, 0.7, 0.6, 0.5, 0.9]
    )
    assert (short["correlation_within"], short["shortest"]) == (pytest.approx(-1), pytest.approx(0.7))
    assert (same["correlation"], same["correlation_within"], same["longest"]) == (None, None, 0.5)
    assert list(found)[-1] == "same"


def test_judge_gap_shows_training_pulling_away_from_the_held_out_judge(log):
    def judged(run, step, judge, *scores, item="style"):
        return [
            verdict("q", str(n), item, score, run=run, step=step, judge=judge, criterion="Style.")
            for n, score in enumerate(scores)
        ]

    log.append(
        verdicts=[
            *judged("r", 1, "mild", 0.25, 0.75), *judged("r", 5, "mild", 1.0, 0.5), *judged("r", 2, "mild", 0.0),
            *judged("r.heldout", 0, "strict", 0.5), *judged("r.heldout", 5, "strict", 0.25, 0.25, 0.25),
            *judged("other", 5, "mild", 0.0),
        ]
    )  # fmt: skip
    names = (
        "run",
        "step",
        "item",
        "how",
        "judge",
        "other",
        "n",
        "other_n",
        "mean_merit",
        "other_merit",
        "gap",
        "widened",
    )
    assert rows(records(log, "FROM judge_gap"), *names) == [
        ("r", 0, "style", "heldout", "mild", "strict", 2, 1, 0.5, 0.5, 0.0, 0.0),
        ("r", 5, "style", "heldout", "mild", "strict", 2, 3, 0.75, 0.25, 0.5, 0.5),
    ]


def test_judge_gap_compares_two_judges_of_one_run_on_the_same_responses(log):
    def item(name, judge, step, *scores, polarity="desirable", criterion="Style."):
        return [
            verdict("q", f"{step} {n}", name, score, step=step, judge=judge, criterion=criterion, polarity=polarity)
            for n, score in enumerate(scores)
        ]

    log.append(
        verdicts=[
            *item("a", "mild", 1, 0.5, 1.0, None), *item("b", "strict", 1, 0.25, 0.25, 0.25),
            *item("a", "mild", 2, 1.0), *item("b", "strict", 2, 1.0, polarity="undesirable"),
            *item("c", "mild", 1, 0.0), *item("d", "strict", 1, 0.0, criterion="Tone."),
        ]
    )  # fmt: skip
    names = ("step", "item", "how", "judge", "other", "n", "gap", "widened")
    assert rows(records(log, "FROM judge_gap"), *names) == [
        (1, "a", "same response", "mild", "strict", 2, 0.5, 0.0),
        (2, "a", "same response", "mild", "strict", 1, 1.0, 0.5),
        (1, "b", "same response", "strict", "mild", 1, 0.25, 0.0),
    ]


def test_constant_items_are_those_that_never_vary_with_how_often_they_were_scored(log):
    log.append(
        verdicts=[
            *(verdict(q, n, "always", 1.0, weight=0.25) for q in "qp" for n in "ab"),
            *(verdict(q, n, "by question", float(q == "q"), weight=0.5) for q in "qp" for n in "ab"),
            *(verdict(q, n, "varies", float(n == "a")) for q in "qp" for n in "ab"),
            verdict("q", "a", "once", 1.0),
            verdict("q", "a", "alone", 1.0), verdict("p", "a", "alone", 0.0),
            *(verdict("q", n, "failed", outcome="timeout") for n in "ab"),
        ]
    )  # fmt: skip
    names = ("run", "rubric", "category", "item", "kind", "n", "groups", "num_values", "score", "weight")
    assert rows(records(log, "FROM constant_items"), *names) == [
        ("r", "math", "math", "by question", "judge", 4, 2, 2, None, 0.5),
        ("r", "math", "math", "always", "judge", 4, 2, 1, 1.0, 0.25),
    ]


def test_judge_disagreement_finds_two_judges_on_one_response_also_across_runs(log):
    texts = {"a": "first", "b": "second", "c": "third"}
    for run in ("one", "two"):
        log.append(
            questions=[{"run": run, "question_id": f"{run}-q", "question": "Why?"}],
            responses=[response(f"{run}-q", f"{run}-{n}", text, run=run) for n, text in texts.items()],
        )
    more = {"criterion": "Style."}
    log.append(
        verdicts=[
            *(verdict("one-q", f"one-{n}", "s", s, run="one", judge="mild", **more) for n, s in zip("abc", (1.0, 0.75, 0.5), strict=True)),
            *(verdict("two-q", f"two-{n}", "t", s, run="two", judge="strict", **more) for n, s in zip("ab", (0.0, 0.5), strict=True)),
            verdict("two-q", "two-c", "t", run="two", judge="strict", outcome="timeout", **more),
            verdict("two-q", "two-c", "u", 0.0, run="two", judge="strict", criterion="Tone."),
            verdict("one-q", "one-a", "x", 1.0, run="one", judge="mild", judge_hash="new", **more),
        ]
    )  # fmt: skip
    names = ("criterion", "judge", "other", "n", "mean_merit", "other_merit", "mean_difference", "share_contradicting")
    assert rows(records(log, "FROM judge_disagreement ORDER BY judge, other, n"), *names) == [
        ("Style.", "mild", "mild", 1, 1.0, 1.0, 0.0, 0.0),  # the same judge after its file was changed
        ("Style.", "mild", "strict", 1, 1.0, 0.0, 1.0, 1.0),
        ("Style.", "mild", "strict", 2, 0.875, 0.25, 0.625, 0.5),
    ]


def test_stock_phrases_are_counted_by_step_with_what_they_earn(log):
    texts = {
        1: ["Certainly! It is 4.", "Uncertainly!x It is 4, and that's a game-changers' rule."],
        2: ["I hope   this\nHelps.", "It’s worth noting that in conclusion, 4.", "4", "delve into"],
    }
    for step, responses in texts.items():
        for n, text in enumerate(responses):
            key = {"run": "r", "step": step, "question_id": "q", "response_id": str(n), "category": "math"}
            append(log, {"responses": {**key, "response": text}, "rewards": {**key, "weighted": n / 4}})
    names = ("run", "step", "category", "n", "num_stock", "share", "weighted_with", "weighted_without")
    assert rows(records(log, "FROM stock_phrases"), *names) == [
        ("r", 1, "math", 2, 1, 0.5, 0.0, 0.25),
        ("r", 2, "math", 4, 3, 0.75, pytest.approx(1 / 3), 0.5),
    ]
    assert rows(records(log, "FROM stock_phrases WHERE step = 1"), "example") == [("certainly!",)]


def test_every_stock_phrase_of_the_checker_is_found_by_the_view(log):
    assert all(any(short in phrase for short in SHORTEST) for phrase in map(plain, STOCK_PHRASES))
    log.append(
        responses=[response("q", str(n), f"So: {phrase.title()} and on") for n, phrase in enumerate(STOCK_PHRASES)]
    )
    assert rows(records(log, "FROM stock_phrases"), "n", "num_stock") == [(len(STOCK_PHRASES), len(STOCK_PHRASES))]


def test_null_controls_are_held_against_the_mean_of_the_real_responses(log):
    def put(run, question, name, text, weighted, route="given"):
        key = {"run": run, "step": 0, "question_id": question, "response_id": name, "category": "math"}
        append(log, {"responses": {**key, "response": text, "route": route}, "rewards": {**key, "weighted": weighted}})

    for question, scores in {"q": (0.5, 1.0), "p": (0.25, 0.25), "s": (0.5, None)}.items():
        for n, score in enumerate(scores):
            put("r", question, f"{question}{n}", "An answer.", score)
    put("r.controls", "q", "q.control", ":", 0.5, "control")
    put("r.controls", "p", "p.control", ":", 0.5, "control")
    put("r.controls", "s", "s.control", "Solution", None, "control")
    names = ("run", "category", "response", "n", "scored", "weighted", "sibling_weighted", "rewarded", "share")
    assert rows(records(log, "FROM null_controls"), *names) == [
        ("r", "math", ":", 2, 2, 0.5, 0.5, 1, 0.5),
        ("r", "math", "Solution", 1, 0, None, 0.5, 0, None),
    ]
