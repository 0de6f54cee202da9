"""`grape report`: score and held-out score beside the KL, by hand from a small log, and from a run."""

from __future__ import annotations

import tiny  # isort: skip (before torch)

import asyncio
import json
import math
from datetime import UTC, datetime
from io import StringIO

import pytest
from apprentice import apprentice, ask
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file

from grape.cli import cli
from grape.drift import Point, drift, drift_lines
from grape.errors import ConfigError
from grape.log import Log
from grape.training import train

assert tiny

DRAWN = {1: (0.0, 0.1), 2: (0.5, 0.4), 3: (1.0, 0.9)}  # step: KL per token, score
HELD = {
    0: {"a": [0.0, 1.0], "b": [0.0, 0.0]},
    2: {"a": [1.0, 1.0], "b": [0.5, 1.0]},
    3: {"a": [1.0, 0.0], "b": [0.5, None]},
}


def run_row(name, kind, judges):
    common = {"started": datetime.now(UTC), "rubrics": "{}", "judges": json.dumps(judges)}
    return {"run": name, "kind": kind, **common}


def earned(run, step, question, name, weighted, trained=None):
    return {
        "run": run, "step": step, "question_id": question, "response_id": name, "weighted": weighted, "trained": trained,
    }  # fmt: skip


@pytest.fixture
def path(tmp_path):
    """Three steps of two responses, of 4 and 8 tokens; the second step trains on the first alone."""
    path = tmp_path / "log.duckdb"
    with Log(path) as log:
        log.append(runs=[run_row("r", "train", {}), run_row("r.heldout", "heldout", {"strict": 1})])
        log.append(
            steps=[
                {"run": "r", "step": step, "metrics": json.dumps({"ref_kl": kl, "weighted/mean": score})}
                for step, (kl, score) in DRAWN.items()
            ],
            responses=[
                {"run": "r", "step": step, "question_id": "q", "response_id": f"{step}-{size}", "num_tokens": size}
                for step in DRAWN
                for size in (4, 8)
            ],
            rewards=[
                *(
                    earned("r", step, "q", f"{step}-{size}", 0.5, (step, size) != (2, 8))
                    for step in DRAWN
                    for size in (4, 8)
                ),
                *(
                    earned("r.heldout", step, question, f"{question}-{step}-{at}", score)
                    for step, some in HELD.items()
                    for question, scores in some.items()
                    for at, score in enumerate(scores)
                ),
            ],
        )
    return path


def shown(found):
    out = StringIO()
    console = Console(file=out, width=200)
    for line in drift_lines(found):
        console.print(line, highlight=False)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_each_held_out_measure_stands_beside_the_steps_nearest_to_it(path):
    found = drift(path)
    assert [(one.step, one.kl, one.training) for one in found.steps] == [
        (0, 0.0, 0.1),
        (1, 0.5 * 4, 0.4),
        (2, 6.0, 0.9),
    ]
    first, second, third = found.points
    # means over questions of (0.5, 0), (1, 0.75), (0.5, 0.5); of KLs (0, 2), (6); the last one has no step nearer to it
    assert first == Point(
        step=0, kl=1.0, training=0.25, heldout=0.25, error=pytest.approx(0.25), pass_at={1: 0.25, 2: 0.5}
    )
    assert second == Point(
        step=2, kl=6.0, training=0.9, heldout=0.875, error=pytest.approx(0.125), pass_at={1: 0.75, 2: 1.0}
    )
    assert third == Point(step=3, kl=6.0, training=0.9, heldout=0.5, error=0.0, pass_at={1: 0.25, 2: 1.0})
    assert found.unscored == 1
    # from the highest to the last: 0.5 and 0.25, of which the standard error is 0.125
    assert found.fall == pytest.approx((0.375, 0.375 - 1.96 * 0.125, 0.375 + 1.96 * 0.125))
    assert drift(path, "r", solved=0.5).points[0].pass_at == {1: 0.25, 2: 0.5}
    assert drift(path, "r", solved=0.5).points[2].pass_at == {1: 0.75, 2: 1.0}


def test_a_sum_of_weights_that_is_a_last_bit_below_one_is_solved(path):
    assert 0.7 + 0.2 + 0.1 < 1
    with Log(path) as log:
        log.append(rewards=[earned("r.heldout", 4, "q", "q-4-0", 0.7 + 0.2 + 0.1)])
    assert drift(path).points[-1].pass_at == {1: 1.0}


def test_a_last_measure_without_any_score_is_the_last_one_all_the_same(path):
    with Log(path) as log:
        log.append(rewards=[earned("r.heldout", 4, "q", "q-4-0", None)])
    found = drift(path)
    assert (found.points[-1].step, found.points[-1].heldout, found.fall) == (4, None, None)
    assert not any(line.startswith("held out: highest") for line in shown(found))


@pytest.mark.parametrize(("held", "said"), [({"a": 1}, "the rubrics and judges of the training"),
                                            ({"a": 2}, "other rubrics"), ({"c": 1}, "other rubrics")])  # fmt: skip
def test_other_rubrics_are_those_that_differ_and_not_those_of_other_categories(tmp_path, held, said):
    rows = [run_row("r", "train", {}), run_row("r.heldout", "heldout", {})]
    rows[0]["rubrics"], rows[1]["rubrics"] = json.dumps({"a": 1, "b": 1}), json.dumps(held)
    with Log(tmp_path / "log.duckdb") as log:
        log.append(runs=rows, steps=[{"run": "r", "step": 1, "metrics": "{}"}])
    assert drift(tmp_path / "log.duckdb").judged == f"held out by {said}"


def test_the_table_says_where_the_held_out_score_was_highest(path):
    lines = shown(drift(path))
    assert lines[0] == "run r; held out by other judges"
    assert lines[2].split() == ["updates", "KL", "sqrt", "KL", "training", "held", "out", "+-", "pass@1", "pass@2"]
    assert lines[4].split() == ["2", "6.00", "2.45", "0.900", "0.875", "0.125", "0.750", "1.000"]
    assert lines[7:] == [
        "held out: highest after 2 updates, lower by 0.375 [0.130 0.620] at the end; training since then +0.000",
        "1 held-out responses have no score and are left out",
        "KL, in nats a response from where the run began, and training: means of the steps nearest to each row",
    ]


def test_a_run_without_a_kl_or_held_out_questions_says_what_would_tell(tmp_path):
    with Log(tmp_path / "log.duckdb") as log:
        log.append(runs=[run_row("r", "train", {})])
        log.append(
            steps=[{"run": "r", "step": step, "metrics": json.dumps({"weighted/mean": 0.01 * step})}
                   for step in range(1, 101)]
        )  # fmt: skip
    lines = shown(drift(tmp_path / "log.duckdb"))
    assert lines[0] == (
        "run r; nothing is held out: evaluate.questions asks what no step has seen, evaluate.judges has others judge it"
    )
    assert lines[2].split() == ["updates", "KL", "sqrt", "KL", "training"]
    assert (lines[3].split(), lines[22].split()) == (["0", "-", "-", "0.020"], ["99", "-", "-", "0.990"])
    assert lines[23:] == ["", "no KL was logged: loss.kl=k3 loss.kl_coef=0 measures it, and changes no update"]


@pytest.mark.slow
def test_a_kl_that_is_only_measured_is_logged_and_moves_no_weight(tmp_path):
    """And the report of the run has it, with what was held out."""
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"question_id": "h", "question": "Write h."}))
    held = {"questions": {"path": str(tmp_path / "heldout.jsonl"), "category": "letters"}, "every": 2, "responses": 2}
    plain = apprentice(tmp_path, evaluate=held)
    without = asyncio.run(train(plain))
    path = apprentice(tmp_path, evaluate=held, checkpoint={"dir": str(tmp_path / "measured")})
    measured = asyncio.run(train(path, overrides=["loss.kl=k3", "loss.kl_coef=0"]))
    weights = [load_file(done.folder / "model.safetensors") for done in (without, measured)]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])
    found = drift(tmp_path / "log.duckdb", measured.run)
    ((text,),) = ask(tmp_path / "log.duckdb", f"select metrics from steps where run = '{measured.run}' and step = 3")
    tokens = ask(
        tmp_path / "log.duckdb", f"select avg(num_tokens) from responses where run = '{measured.run}' and step = 3"
    )
    assert found.steps[0].kl == pytest.approx(0, abs=1e-6)
    assert found.steps[2].kl == pytest.approx(json.loads(text)["ref_kl"] * tokens[0][0])
    assert found.steps[2].kl > 1e-3
    assert [one.step for one in found.points] == [0, 2, 4]
    assert [one.heldout for one in found.points] == [measured.heldout[at]["weighted/mean"] for at in (0, 2, 4)]
    assert found.points[1].kl == pytest.approx((found.steps[2].kl + found.steps[3].kl) / 2)  # the nearest to 2
    assert drift(tmp_path / "log.duckdb", without.run).steps[2].kl is None


@pytest.mark.slow
def test_the_command_draws_and_gives_json(path, tmp_path):
    pytest.importorskip("matplotlib")  # the extra `plot`
    plot = tmp_path / "plot.png"
    done = CliRunner().invoke(cli, ["report", "--log", str(path), "--plot", str(plot), "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.output)
    assert (record["run"], record["points"][1]["heldout"], record["points"][1]["pass_at"]) == (
        "r",
        0.875,
        {"1": 0.75, "2": 1.0},
    )
    assert plot.read_bytes()[:4] == b"\x89PNG"
    table = CliRunner().invoke(cli, ["report", "--log", str(path)])
    assert "held out: highest after 2 updates" in table.output


def test_what_is_wrong_is_one_line(path, tmp_path):
    for log, run, said in (
        (tmp_path / "no.duckdb", None, f"{tmp_path}/no.duckdb: no such log"),
        (path, "s", f"{path}: no run 's'; known: r, r.heldout"),
        (path, "r.heldout", f"{path}: run r.heldout has no steps of grape train"),
    ):
        with pytest.raises(ConfigError) as caught:
            drift(log, run)
        assert str(caught.value) == said
    assert math.isclose(drift(path).points[0].heldout, 0.25)
