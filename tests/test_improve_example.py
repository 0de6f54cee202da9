"""The example of the improve route: its policy is taught what the run shows it, and its log holds what is compared."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from apprentice import ask
from hypothesis import given
from hypothesis import strategies as st

from grape import Question, Response, load_rubric
from grape.checkers import check_response, load_checkers
from grape.config import load_run
from grape.hidden import Hidden
from grape.improve import Assessed, Previous, improve_messages, improve_prompt
from grape.training import train

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples/improve"


def script(path: Path) -> ModuleType:
    """A file that is no part of a package, as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def asked(word: str) -> Question:
    """A question of the example."""
    return Question(question_id=word, category="backwards", text=f"Spell backwards: {word}")


def found(check: str, said: str) -> Any:
    """The verdict of a checker of the example on a response for `lexipu`."""
    load_checkers(EXAMPLE / "checkers.py")
    return check_response(
        "item", check, {}, 1.0, asked("lexipu"), Response(response_id="r", question_id="q", text=said)
    )


def test_the_assessment_shows_the_letters_that_may_stay():
    verdict = found("letters_in_place", "upexil.")
    assert (verdict.score, verdict.reasoning) == (4 / 6, "up-x-l")
    assert found("letters_in_place", "upixel!").reasoning == "upixel"
    assert found("letters_in_place", "upi").score == 0.5
    assert found("letters_in_place", "upixelupixel").score == 0.5
    assert [found("spelt_backwards", said).score for said in ("upixel!", "upexil", "")] == [1, 0, 0]


@given(said=st.text("lexipu.", max_size=8))
def test_the_assessment_gives_no_letter_away(said):
    shown = found("letters_in_place", said).reasoning
    assert len(shown) == 6
    assert all(letter in ("-", *said[place : place + 1]) for place, letter in enumerate(shown))


def test_the_policy_is_taught_on_just_the_prompt_that_the_run_shows(monkeypatch):
    monkeypatch.setenv("GRAPE_HOME", str(EXAMPLE))
    load_checkers(EXAMPLE / "checkers.py")
    rubric = load_rubric(EXAMPLE / "rubrics/backwards.yaml")
    assert [item.id for item in rubric.items if item.shares_in_improve] == ["places"]
    make, rng, taught = script(EXAMPLE / "make.py"), random.Random(1), 0
    for _ in range(200):
        text, _ = make.demonstration(rng, frozenset())
        lines = text.split("\n")
        if len(lines) == 1:
            continue
        question = asked(lines[0].split()[-1])
        items = tuple(
            Assessed(id="places", criterion="", weight=1, merit=0.5, reasoning=standing) for standing in lines[2:]
        )
        previous = Previous(
            response_id="r", question_id="q", category="backwards", step=1, text=lines[1], weighted=0.5,
            items=items, hidden=Hidden.of([]),
        )  # fmt: skip
        (message,) = improve_messages(question, previous, improve_prompt(rubric), control="own" if items else "none")
        assert message == {"role": "user", "content": text}
        taught += len(lines) == 3
    assert taught > 50


def test_the_shipped_questions_are_those_that_the_policy_is_not_taught():
    make = script(EXAMPLE / "make.py")
    rows = [
        json.loads(line)
        for name in ("questions", "heldout")
        for line in (EXAMPLE / f"{name}.jsonl").read_text().splitlines()
    ]
    assert [row["question_id"] for row in rows] == make.asked_words()
    assert all(row["question"] == f"Spell backwards: {row['question_id']}" for row in rows)
    assert len(rows) == len({row["question_id"] for row in rows}) == 280


@pytest.mark.slow
def test_the_run_pairs_improved_with_fresh_responses(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GRAPE_HOME", str(EXAMPLE))
    monkeypatch.chdir(ROOT)
    make = script(EXAMPLE / "make.py")
    make.make_policy(tmp_path / "policy", steps=20, batch=32)
    few = (EXAMPLE / "questions.jsonl").read_text().splitlines()[:8]
    (tmp_path / "questions.jsonl").write_text("\n".join(few))
    log = tmp_path / "log.duckdb"
    changes = [
        f"policy.model={tmp_path}/policy", f"questions.path={tmp_path}/questions.jsonl", f"log={log}", "steps=9",
        "evaluate.every=3",
    ]  # fmt: skip
    trained = asyncio.run(train(load_run(EXAMPLE / "run.yaml", changes)))

    assert sorted(trained.heldout) == [0, 3, 6, 9]
    effect = {
        name: (n, responses) for name, n, responses in ask(log, "select control, n, responses from improve_effect")
    }
    assert set(effect) == {"own", "shuffled", "none"}
    assert sum(responses for _, responses in effect.values()) == 8 * 8 * 2  # a quarter of 8, but for the first step
    assert all(n <= responses for n, responses in effect.values())
    assert effect["own"][1] > effect["none"][1] > 20 < effect["shuffled"][1]
    ((parents,),) = ask(
        log,
        "select count(*) from responses r join responses p on r.parent_id = p.response_id "
        "where r.route = 'improve' and p.step = r.step - 1 and p.question_id = r.question_id",
    )
    assert parents == 8 * 8 * 2
    for (metrics,) in ask(log, "select metrics::varchar from steps where step > 1 and run not like '%.heldout'"):
        assert {"entropy", "ref_kl", "off_policy/gap"} <= set(json.loads(metrics))

    benchmark = script(ROOT / "benchmarks/improve.py")
    (tmp_path / "runs").mkdir()
    for name in benchmark.RUNS:
        benchmark.place(tmp_path / "runs", name, 0).write_bytes(log.read_bytes())
    benchmark.report(tmp_path / "runs", 1, 9)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("own  ", "shuffled", "none"))] == [
        "own",
        "shuffled",
        "none",
    ]
    assert len([line for line in lines if line.startswith(tuple(benchmark.RUNS))]) == len(benchmark.RUNS) + 2
    before, after, mean = benchmark.figures(log, 9)[:3]
    scores = [trained.heldout[step]["weighted/mean"] for step in (0, 3, 6, 9)]
    assert (before, after, mean) == (scores[0], scores[-1], pytest.approx(sum(scores) / 4))
