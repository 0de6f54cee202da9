"""The quickstart: what it ships, and that it learns."""

from __future__ import annotations

import asyncio
import json
import random
import re
import runpy
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import grape
from grape.checkers import REGISTRY
from grape.log.query import sql
from grape.resources import packaged
from grape.tour import CRITIQUES, QUESTIONS, settings
from grape.types import Question, Response

FOLDER = packaged("quickstart")
MADE = runpy.run_path(str(FOLDER / "make.py"))


def rows(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def test_the_weights_that_ship_are_small():
    sizes = {path.parent.name: path.stat().st_size for path in FOLDER.glob("*/model.safetensors")}
    assert set(sizes) == {"policy", "judge"}
    assert sum(sizes.values()) < 1_000_000
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 2_000_000


def test_no_held_out_word_is_trained_on():
    trained, held = ({row["question"].rpartition(" ")[2] for row in rows(name)} for name in ("questions", "heldout"))
    assert (len(trained), len(held)) == (480, 120)
    assert not trained & held
    taken, rng = frozenset(trained | held), random.Random(5)
    shown = [MADE["demonstration"](rng, taken)[0] for _ in range(2000)]
    assert not {question.rpartition(" ")[2] for question in shown} & taken


def test_the_references_are_right():
    for row in rows("questions") + rows("heldout"):
        asked, _, word = row["question"].rpartition(" ")
        right = {"Spell backwards:": "".join(reversed(word)), "Sort the letters:": "".join(sorted(word))}[asked]
        assert row["reference"] == right


@pytest.mark.parametrize(
    ("text", "correct", "letters"),
    [
        ("It is kamot.", 1, 1),
        ("Sure! It is kamot. You are welcome!", 1, 1),
        ("kamot", 1, 1),
        ("Maybe it is kamto", 0, 0.6),
        ("It is kamotx.", 0, 5 / 6),
        ("It is tomak. It is kamot.", 0, 0),
        ("Ugh. I give up. Whatever.", 0, 0),
        ("", 0, 0),
    ],
)
def test_the_checkers_read_the_one_word_that_is_no_talk(text, correct, letters):
    grape.load_checkers(FOLDER / "checkers.py")
    question = Question(question_id="q", category="backwards", text="Spell backwards: tomak", reference="kamot")
    response = Response(response_id="r", question_id="q", text=text)
    assert REGISTRY["word_is"].function(question, response, reference="kamot").score == correct
    assert REGISTRY["letters_right"].function(question, response, reference="kamot").score == letters


@pytest.mark.slow
def test_the_judge_is_right_and_unsure_where_its_labels_were_noisy(tmp_path):
    rng = random.Random(7)
    texts = sorted({MADE["utterance"](rng) for _ in range(60)})
    given = [{"question_id": "q", "question": "Spell backwards: tomak", "reference": "kamot", "category": "backwards",
              "response_id": str(number), "response": text} for number, text in enumerate(texts)]  # fmt: skip
    grape.load_checkers(FOLDER / "checkers.py")
    records = asyncio.run(
        grape.score(given, rubrics=FOLDER / "rubrics", judges={"reader": FOLDER / "reader.yaml"},
                    log=tmp_path / "log.duckdb")
    )  # fmt: skip
    confidences = defaultdict(list)
    for record, text in zip(records, texts, strict=True):
        for item in ("sure", "kind"):
            verdict = record["items"][item]
            reason, score = MADE["labelled"](item, text)
            assert (verdict["outcome"], verdict["score"], verdict["reasoning"]) == ("ok", score, reason), text
            confidences[item].append(verdict["confidence"])
    assert min(confidences["sure"]) > 0.95
    assert 0.6 < sum(confidences["kind"]) / len(texts) < 0.85


def test_the_judge_was_taught_on_the_prompt_that_it_is_asked():
    from grape.judge.prompt import fence, load_prompt

    (message,) = load_prompt(FOLDER / "judge.jinja").messages(
        response=fence("response", "It is kamot.", b"secret"), criterion="It is friendly."
    )
    asked = re.sub("[0-9a-f]{32}", "CODE", message["content"])
    rng, taught = random.Random(3), set[str]()
    while len(taught) < 300:
        taught.add(re.sub("[0-9a-f]{32}", "CODE", MADE["judgement"](rng, frozenset())[0]))
    shape = re.compile(r"<<<response CODE>>>\n.*\n<<<end response CODE>>>\n(.*)")
    assert all(shape.fullmatch(text) for text in [asked, *taught])
    assert {shape.fullmatch(text)[1] for text in taught} == set(MADE["CRITERIA"].values())


@pytest.mark.slow
def test_two_steps_run_in_any_folder_and_the_log_answers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings(seed=1)
    short = config.model_copy(
        update={"steps": 2, "evaluate": None, "sampling": config.sampling.model_copy(update={"questions": 4})}
    )
    reports = []
    asyncio.run(grape.train(short, report=reports.append))
    assert [report.step for report in reports] == [1, 2]
    assert reports[-1].metrics["confidence/sorted/sure"] > reports[-1].metrics["confidence/sorted/kind"]
    answers = {title: sql(query, "quickstart.duckdb").rows for title, query in QUESTIONS.items()}
    assert {row[0] for row in answers["Which item moved the policy most?"]} == {
        "correct", "letters", "plain", "sure", "kind"
    }  # fmt: skip
    assert [row[0] for row in answers["How sure is the judge of its scores?"]] == ["sure", "kind"]
    assert all(answers.values())
    assert len(sql(CRITIQUES, "quickstart.duckdb").rows) == 3


@pytest.mark.slow
def test_the_command_learns_and_shows_how(tmp_path):
    done = subprocess.run(
        [Path(sys.executable).parent / "grape", "quickstart"], cwd=tmp_path, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = {line.split()[0]: line.split() for line in done.stdout.splitlines() if re.search(r"[+-]0\.\d{3}", line)}
    rises = [float(table[f"{category}/correct"][3]) for category in ("backwards", "sorted")]
    assert sum(rises) / 2 >= 0.2, done.stdout
    assert float(table["sum"][-2]) >= 0.2, done.stdout
    for title in QUESTIONS:
        assert f"\n{title}\n" in done.stdout
    assert "log: quickstart.duckdb" in done.stdout
