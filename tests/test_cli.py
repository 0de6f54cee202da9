"""The command line as a user meets it: real processes, their output and exit status."""

from __future__ import annotations

import itertools
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loopback import Answer, JudgeServer

from grape.schemas import schema

GRAPE = Path(sys.executable).parent / "grape"


def grape(*arguments, cwd, check=True):
    done = subprocess.run([GRAPE, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120)
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A project as `grape init` writes it, checked and scored."""
    folder = tmp_path_factory.mktemp("started")
    grape("init", cwd=folder)
    return folder, grape(
        "score", "responses.jsonl", "--rubrics", "rubrics", "--no-judges", "--out", "out.jsonl", cwd=folder
    )


def test_init_check_and_score_make_a_first_project(started):
    folder, scored = started
    assert grape("check", "rubrics", cwd=folder).stdout == (
        "ok    support  3 items, 4 of 5 expectations hold, 1 wait for a judge (--live)\n"
    )
    assert "4 responses to 2 questions; mean reward 0.625; 0 unscorable" in scored.stdout
    assert "no judges: left out as not applicable: support/kind" in scored.stderr
    records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [record["advantage"] for record in records] == [0.375, -0.375, 0.375, -0.375]
    again = grape("init", cwd=folder, check=False)
    assert (again.returncode, again.stderr) == (
        1,
        "grape: rubrics/support.yaml: exists already; grape init overwrites nothing\n",
    )


def test_json_lines_go_to_stdout_and_nothing_else(started):
    folder, _ = started
    done = grape(
        "score", "responses.jsonl", "--rubrics", "rubrics", "--no-judges", "--json", "--log", "j.duckdb", cwd=folder
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()
    ]


def test_sql_answers_and_lists(started):
    folder, _ = started
    done = grape("sql", "select item, sum(score) as s from verdicts where applicable group by item order by item", "--format",
                 "csv", cwd=folder)  # fmt: skip
    assert done.stdout.splitlines() == ["item,s", "names-deadline,2.0", "short,4.0"]
    listing = grape("sql", cwd=folder).stdout
    for name in ("runs", "questions", "responses", "verdicts", "judge_calls", "rewards", "steps", "item_health",
                 "response_scores", "failures", "judge_cost", "item_credit"):  # fmt: skip
        assert name in listing
    refused = grape("sql", "copy verdicts to 'stolen.csv'", cwd=folder, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("grape: ")
    assert refused.stderr.count("\n") == 1
    assert not (folder / "stolen.csv").exists()


def test_a_failing_case_is_named_and_exits_with_one(started):
    folder, _ = started
    text = (folder / "rubrics/support.yaml").read_text().replace("{names-deadline: 0, short: 1}", "{names-deadline: 1}")
    (folder / "broken.yaml").write_text(text)
    done = grape("check", "broken.yaml", cwd=folder, check=False)
    assert done.returncode == 1
    assert (
        done.stdout.splitlines()[0] == "FAIL  support  3 items, 2 of 4 expectations hold, 1 wait for a judge (--live)"
    )
    assert "broken.yaml: cases.1.expect.names-deadline: expected 1.0, got 0 (" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["score", "none.jsonl"], 1, "grape: none.jsonl: No such file or directory"),
        (["score", "responses.jsonl", "--rubrics", "none"], 1, "grape: none: no such file or folder"),
        (["score", "responses.jsonl"], 1, "grape: judge 'default': cannot reach http://localhost:8000/v1: "),
        (["score", "responses.jsonl", "--judge", "default=none.yaml"], 1, "grape: none.yaml: no such file"),
        (["score", "responses.jsonl", "--no-judges", "--checkers", "none.py"], 1, "grape: none.py: no such Python file"),
        (["score", "responses.jsonl", "--no-judges", "--log", "."], 1, "grape: "),
        (["score", "responses.jsonl", "--no-judges", "--out", "none/out.jsonl"], 1, "grape: none/out.jsonl: No such file"),
        (["check", "mth"], 1, "grape: no rubric named 'mth'; did you mean 'math'? known: "),
        (["sql", "select", "--log", "none.duckdb"], 1, "grape: none.duckdb: no such log"),
        (["sql", "selec 1"], 1, "grape: "),
        (["schema", "rubrik"], 2, "Usage: grape schema [OPTIONS] {rubric|judge|run|sft|reward-model|dpo}"),
        (["score", "responses.jsonl", "--judge", "x"], 2, "Usage: grape score [OPTIONS] RESPONSES"),
        (["scoer"], 2, "Usage: grape [OPTIONS] COMMAND [ARGS]..."),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_a_status(started, arguments, status, line):
    folder, _ = started
    done = grape(*arguments, cwd=folder, check=False)
    assert done.returncode == status
    lines = [text for text in done.stderr.splitlines() if not text.startswith("grape: no judges:")]
    assert lines[0].startswith(line)
    if status == 1:
        assert len(lines) == 1
        assert done.stdout == ""


def test_a_failed_out_file_leaves_no_run_behind(started, tmp_path):
    folder, _ = started
    grape("score", folder / "responses.jsonl", "--rubrics", folder / "rubrics", "--no-judges", "--out", "none/o.jsonl",
          cwd=tmp_path, check=False)  # fmt: skip
    assert not (tmp_path / "critiques.duckdb").exists()


@pytest.mark.slow
def test_real_responses_rank_their_models(tmp_path):
    make = runpy.run_path("examples/gsm8k/make.py")
    rows = itertools.islice(make["rows"](), 200)
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = grape("score", "responses.jsonl", "--no-judges", cwd=tmp_path)
    assert "200 responses to 50 questions; mean reward 0.440; 0 unscorable" in done.stdout
    query = """select metadata->>'model' as model, avg(score) as correct
        from verdicts join responses using (run, step, response_id)
        where item = 'correct' group by model order by correct desc"""
    ranking = json.loads(grape("sql", query, "--format", "json", cwd=tmp_path).stdout)
    assert [(row["model"], row["correct"]) for row in ranking] == [
        ("175b_verification", 0.54),
        ("175b_finetuning", 0.32),
        ("6b_verification", 0.28),
        ("6b_finetuning", 0.18),
    ]


def test_a_dead_judge_says_why(started, tmp_path):
    folder, _ = started
    with JudgeServer(lambda body, number: Answer(status=401)) as server:
        (tmp_path / "j.yaml").write_text(json.dumps({"judge": "d", "endpoint": server.url, "model": "m", "retries": 0}))
        (tmp_path / "r.yaml").write_text("rubric: support\nitems: [{id: kind, criterion: Is kind., judge: default}]\n")
        arguments = ["score", folder / "responses.jsonl", "--rubrics", "r.yaml", "--judge", "default=j.yaml"]
        done = grape(*arguments, cwd=tmp_path)
    assert "failed: 4 x kind: transport: " in done.stdout
    assert done.stderr.splitlines()[-1].startswith("grape: no response could be scored")
    typo = grape(*arguments[:-1], "defualt=j.yaml", cwd=tmp_path, check=False)
    assert typo.stderr.splitlines()[-1].startswith("grape: judge 'defualt': no item asks it; did you mean 'default'?")


def test_checkers_are_listed_and_explained(tmp_path):
    listing = grape("checkers", cwd=tmp_path).stdout
    for name in ("exact", "math", "code", "json_schema", "length_constraints:number_words"):
        assert f"\n{name} " in listing
    assert "pattern=needed" in grape("checkers", "regex", cwd=tmp_path).stdout
    assert grape("checkers", "regx", cwd=tmp_path, check=False).stderr.startswith(
        "grape: no checker named 'regx'; did you mean 'regex'? known: "
    )


def test_schema_prints_json_schema(tmp_path):
    for kind in ("rubric", "judge", "run", "sft", "reward-model", "dpo"):
        assert schema(kind)["title"] == f"grape {kind}"
    assert json.loads(grape("schema", "dpo", cwd=tmp_path).stdout) == schema("dpo")


def test_help_names_every_command(tmp_path):
    text = grape("--help", cwd=tmp_path).stdout
    for command in (
        "init",
        "check",
        "schema",
        "score",
        "sql",
        "quickstart",
        "convert",
        "checkers",
        "sft",
        "reward-model",
        "dpo",
    ):
        assert f"\n  {command} " in text


PROGRAMS = [
    {
        "question_id": "a",
        "category": "coding",
        "question": "Write f.",
        "tests": "expect(call('f', 2) == 4)",
        "response": r,
    }
    for r in ("```python\ndef f(x):\n    return 2 * x\n```", "```python\ndef f(x):\n    return x\n```")
]


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
@pytest.mark.parametrize(
    ("flags", "outcomes"),
    [
        ([], ["ok", "ok"]),
        (["--python", "/usr/bin/python3"], ["ok", "ok"]),
        (["--unsafe-code"], ["ok", "ok"]),
        (["--sandbox", "http://127.0.0.1:9/"], ["sandbox", "sandbox"]),
    ],
)
@pytest.mark.slow
def test_programs_run_where_the_flags_say(tmp_path, flags, outcomes):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, PROGRAMS)))
    (tmp_path / "r.yaml").write_text("rubric: coding\nitems: [{id: tests, check: code}]\n")
    arguments = ["score", "rows.jsonl", "--rubrics", "r.yaml", "--out", "out.jsonl"]
    done = grape(*arguments, *flags, cwd=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["items"]["tests"]["outcome"] for record in records] == outcomes
    if outcomes[0] == "ok":
        assert [record["advantage"] for record in records] == [0.5, -0.5]
    else:
        assert [record["reward"] for record in records] == [None, None]
        assert "no response could be scored" in done.stderr


def test_a_service_runs_programs_alone(tmp_path):
    done = grape("score", "x.jsonl", "--sandbox", "http://127.0.0.1:9/", "--unsafe-code", cwd=tmp_path, check=False)
    assert done.returncode == 2
