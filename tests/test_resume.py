"""A run that was killed goes on as if nothing had happened: the same weights to the bit, and the same log."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
from apprentice import apprentice, ask, fair
from loopback import Answer, JudgeServer
from mortal import begin, live, logged, state, wait_for

import grape
from grape.errors import ConfigError
from grape.log import Log

RUN = {
    "questions": 6,
    "steps": 4,
    "sampling": {"questions": 2, "responses": 4, "rounds": 2},
    "optimizer": {"epochs": 2, "micro_tokens": 200},
    "improve": {"share": 0.5, "controls": 0.25},
    "loss": {"kl": "k3", "kl_coef": 0.1, "kl_target": 0.01, "rollout_cap": 2.0},
    "checkpoint": {"keep": 1},
}  # fmt: skip
SMALL = {"steps": 2, "sampling": {"questions": 2, "responses": 2}, "checkpoint": {"every": 1}}


def slow(*death):
    return pytest.param(death, marks=pytest.mark.slow)


def shuffled(body, number):
    """The judge of `fair`, whose replies come in any order."""
    return Answer(text=fair(body, number), delay=random.Random(number).uniform(0, 0.03))


def begun(folder, url=None, **sections):
    """A folder whose run names everything relative to it, and an empty log: copies of it are the same run."""
    folder.mkdir()
    with chdir(folder):
        apprentice(Path(), judge=url, **sections)
        evaluated = {"question_id": "h", "question": "Write h.", "category": "letters"}
        Path("heldout.jsonl").write_text(json.dumps(evaluated))
        Log("log.duckdb").close()
    return folder


def same(folder, other):
    """That two folders hold the same weights, optimizer and log."""
    ours, theirs = state(folder), state(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    tables, others = logged(folder / "log.duckdb"), logged(other / "log.duckdb")
    assert {name: len(rows) for name, rows in tables.items()} == {name: len(rows) for name, rows in others.items()}
    for name, rows in tables.items():
        assert rows == others[name]
    return True


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A run with judges, improve route, two epochs and held-out questions: its folder unbegun, and one that ended."""
    with JudgeServer(shuffled) as server:
        evaluate = {"questions": {"path": "heldout.jsonl"}, "every": 3, "responses": 2}
        start = begun(tmp_path_factory.mktemp("judged") / "start", server.url, evaluate=evaluate, **RUN)
        whole = shutil.copytree(start, start.parent / "whole")
        live(whole)
        yield start, whole


@pytest.fixture
def small(tmp_path):
    """A run without judges, of two small steps, that was never begun."""
    return begun(tmp_path / "small", **SMALL)


def train(folder, *overrides, **options):
    with chdir(folder):
        return asyncio.run(grape.train("run.yaml", overrides=overrides, **options))


def refused(folder, *overrides, **options):
    """The one line by which a run is refused."""
    with pytest.raises(ConfigError) as caught:
        train(folder, *overrides, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_the_uninterrupted_run_has_in_it_all_that_a_resumed_one_might_lose(judged):
    _, whole = judged
    log = whole / "log.duckdb"
    assert ask(log, "select distinct route from responses order by 1") == [("fresh",), ("improve",)]
    assert ask(log, "select step from steps where run like '%.heldout' order by 1") == [(0,), (3,), (4,)]
    assert ask(log, "select count(distinct (metrics->>'kl_coef')) > 1 from steps where run not like '%.%'") == [(True,)]
    assert ask(log, "select count(*) > 20 from judge_calls") == [(True,)]


@pytest.mark.parametrize(
    "death",
    [
        slow("os.rename", "journal/step-000003.json"),  # judged, and nothing of it kept but the calls
        slow("update", "before 5"),  # the journal is written
        slow("update", "before 6"),  # after the first of step 3's two epochs
        slow("reported", "step 3"),  # the log has a step that no checkpoint has
        slow("os.rename", "checkpoints/step-000004"),  # the checkpoint is whole but for its name
        slow("shutil.rmtree", "checkpoints/step-000002"),  # it is there, with the older one and the journal
    ],
)
def test_a_run_killed_at_any_point_ends_with_the_same_bits_and_the_same_log(tmp_path, judged, death):
    start, whole = judged
    folder = shutil.copytree(start, tmp_path / "killed")
    live(folder, death=death)
    live(folder, resume=True)
    assert same(folder, whole)
    assert [path.name for path in folder.glob("checkpoints/*step-*")] == ["step-000004"]
    assert list(folder.glob("checkpoints/journal/*")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {"policy": {"lora": {"r": 4, "dropout": 0.2}}, "loss": {"kl": "k2", "kl_coef": 0.1}},
        {"value": {"lr": 0.01}, "advantage": {"baseline": "none"}},
        {"questions": {"difficulty": {"low": 0.0, "high": 1.0, "responses": 2}, "order": "easy-to-hard"}},
    ],
)
def test_adapters_value_head_and_measured_difficulty_go_on_too(tmp_path, sections):
    start = begun(tmp_path / "start", **SMALL)
    run = json.loads((start / "run.yaml").read_text())
    (start / "run.yaml").write_text(
        json.dumps(run | {name: {**run.get(name, {}), **more} for name, more in sections.items()})
    )
    whole, killed = (shutil.copytree(start, tmp_path / name) for name in ("whole", "killed"))
    live(whole)
    live(killed, death=("reported", "step 1"))
    live(killed, resume=True)
    assert same(killed, whole)


@pytest.mark.slow
def test_a_finished_run_says_so_and_stays_as_it_is_and_more_steps_make_it_longer(small, tmp_path, caplog):
    longer = shutil.copytree(small, tmp_path / "longer")
    first = train(small)
    weights, tables = state(small), logged(small / "log.duckdb")
    again = train(small, resume=True)
    assert again == first
    assert f"run {first.run} is finished: it ended with step 2" in caplog.text
    assert (state(small), logged(small / "log.duckdb")) == (weights, tables)
    train(small, "steps=3", resume=True)
    train(longer, "steps=3")
    ours, theirs = logged(small / "log.duckdb"), logged(longer / "log.duckdb")
    ours.pop("runs"), theirs.pop("runs")  # how many steps were asked for at first
    assert ours == theirs
    assert state(small) == state(longer)


def test_as_many_checkpoints_are_kept_as_asked_for(small):
    train(small, "steps=4", "checkpoint.keep=2")
    assert sorted(path.name for path in small.glob("checkpoints/*")) == [
        "journal",
        "run.json",
        "step-000003",
        "step-000004",
    ]


@pytest.mark.parametrize("death", [slow("open", "step-000002/state.json"), slow("shutil.rmtree", "step-000001")])
def test_a_kill_while_a_checkpoint_is_written_leaves_one_that_is_whole(tmp_path, small, death):
    whole = shutil.copytree(small, tmp_path / "whole")
    live(small, "checkpoint.keep=1", death=death)
    names = sorted(path.name for path in small.glob("checkpoints/*step-*"))
    assert names == ([".step-000002", "step-000001"] if death[0] == "open" else ["step-000001", "step-000002"])
    live(small, "checkpoint.keep=1", resume=True)
    train(whole)
    assert state(small) == state(whole)
    assert [path.name for path in small.glob("checkpoints/*step-*")] == ["step-000002"]


def changed(folder, what):
    """The folder with one thing changed; overrides that go with it."""
    if what == "rubric letters":
        rubric = folder / "rubrics/letters.yaml"
        rubric.write_text(rubric.read_text().replace("weight: 2", "weight: 3"))
    elif what == "prompt improve/default":
        prompt = folder / "prompts/improve/default.jinja"
        prompt.write_text(prompt.read_text().replace("Not", "No"))
    elif what == "judge default":
        judge = json.loads((folder / "judge.yaml").read_text())
        (folder / "judge.yaml").write_text(json.dumps(judge | {"sampling": {"temperature": 0.5}}))
    elif what == "questions' rows":
        rows = (folder / "questions.jsonl").read_text()
        (folder / "questions.jsonl").write_text(rows.replace("Write 5", "Write five"))
    elif what == "loss":
        return ["loss.clip_high=0.3"]
    return []


@pytest.mark.parametrize(
    "what", ["rubric letters", "prompt improve/default", "judge default", "questions' rows", "loss"]
)
@pytest.mark.slow
def test_what_changed_is_named_in_one_line_and_allowed_if_asked_for(tmp_path, judged, what):
    _, whole = judged
    folder = shutil.copytree(whole, tmp_path / "run")
    overrides = changed(folder, what)
    line = refused(folder, *overrides, resume=True)
    assert re.fullmatch(
        rf"checkpoints: changed since run \S+ began: {what}; --allow-changes goes on all the same", line
    )
    weights = state(folder)
    train(folder, *overrides, resume=True, allow_changes=True)
    assert state(folder) == weights  # it was finished
    train(folder, *overrides, resume=True)  # what was allowed is what the run is from then on


@pytest.mark.slow
def test_how_a_judge_is_reached_and_where_the_log_is_shown_are_no_changes(tmp_path, judged):
    _, whole = judged
    folder = shutil.copytree(whole, tmp_path / "run")
    judge = json.loads((folder / "judge.yaml").read_text())
    (folder / "judge.yaml").write_text(json.dumps(judge | {"timeout": 30, "retries": 3}))
    train(folder, "checkpoint.every=1", "trackers=[]", resume=True)


def test_a_folder_that_holds_a_run_and_one_that_cannot_be_resumed_are_refused(small, caplog):
    assert (
        refused(small, "checkpoint=null", resume=True) == "checkpoint: is not set, so there is nothing to resume from"
    )
    done = train(small, resume=True)  # killed before it had begun, or never started: it begins
    assert "checkpoints: nothing to resume: no run has begun there; a new one begins" in caplog.text
    assert refused(small) == (
        f"checkpoints: holds run {done.run} already: --resume goes on with it, another checkpoint.dir begins anew"
    )
    assert refused(small, "log=other.duckdb", resume=True) == (
        f"other.duckdb: has nothing of run {done.run}, which checkpoints holds: a run is resumed with its own log"
    )


@pytest.mark.slow
def test_a_second_process_at_the_same_run_is_refused(small):
    first = begin(small, "steps=500")
    wait_for(lambda: list(small.glob("checkpoints/step-*")))
    assert re.fullmatch(
        r"\S+/log.duckdb: another process is at run \S+; resume it when that has ended",
        refused(small, "steps=500", resume=True),
    )
    first.kill()
    first.join()
    reached = int(max(small.glob("checkpoints/step-*")).name.removeprefix("step-"))
    assert train(small, f"steps={reached + 2}", resume=True).folder == Path(f"checkpoints/step-{reached + 2:06d}")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["log", "step"])
def test_fifteen_kills_at_random_moments_leave_no_trace(tmp_path, judged, source):
    """Whatever a kill hits: loading, sampling, judging, updates, log, checkpoints. Two times fifteen in all."""
    more = ["steps=12", "checkpoint.every=3", "checkpoint.keep=2", f"improve.source={source}"]
    whole = shutil.copytree(judged[0], tmp_path / "whole")
    live(whole, *more)
    rng, kills = random.Random(source), 0
    while kills < 15:  # one run may end before it was killed so often: then another begins
        folder = shutil.copytree(judged[0], tmp_path / f"killed-{kills}")
        moments: list[str] = []
        while kills < 15 and (moment := killed(folder, begin(folder, *more, resume=True), rng)):
            moments.append(moment)
            kills += 1
        live(folder, *more, resume=True, timeout=300)
        print(f"{source}: killed {', '.join(moments)}")  # shown if the next line fails
        assert same(folder, whole)


def killed(folder, process, rng):
    """When a run was killed: in its first second, or within a second of a step's entry in the journal. None: it ended."""
    known = set(folder.glob("checkpoints/journal/step-*"))
    new: set[Path] = set()
    if rng.random() < 0.8:
        wait_for(lambda: set(folder.glob("checkpoints/journal/step-*")) - known or process.exitcode is not None)
        new = set(folder.glob("checkpoints/journal/step-*")) - known
    delay = rng.uniform(0, 1)
    process.join(delay)
    if process.exitcode is not None:
        assert process.exitcode == 0
        return None
    process.kill()
    process.join()
    return f"{delay:.3f} s after {max(new).stem if new else 'the start'}"


def test_questions_that_are_gone_since_a_step_was_judged_are_no_hindrance_where_changes_are_allowed(tmp_path):
    path = apprentice(tmp_path, **{**SMALL, "checkpoint": {"every": 9}})

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(grape.train(path, report=stop))
    (tmp_path / "log.duckdb").unlink()  # what it had of the step, so that it is stored once more
    questions = tmp_path / "questions.jsonl"
    questions.write_text(questions.read_text().replace('"q', '"other-').replace('"other-uestion', '"question'))
    with pytest.raises(ConfigError, match=r"changed since run .* began: questions' rows;"):
        asyncio.run(grape.train(path, resume=True))
    asyncio.run(grape.train(path, resume=True, allow_changes=True))
    log = tmp_path / "log.duckdb"
    assert ask(log, "select step, count(*) from responses where question_id like 'q%' group by 1") == [(1, 4)]
    assert ask(log, "select count(*) > 0, bool_and(question_id like 'other-%') from questions") == [(True, True)]


@pytest.mark.parametrize("name", ["run.json", "step-000001/state.json", "step-000001/optimizer.pt"])
@pytest.mark.slow
def test_a_damaged_checkpoint_is_one_line(tmp_path, name):
    path = apprentice(tmp_path, **{**SMALL, "steps": 1})
    asyncio.run(grape.train(path))
    damaged = tmp_path / "checkpoints" / name
    damaged.write_bytes(b"{")
    with pytest.raises(ConfigError) as caught:
        asyncio.run(grape.train(path, overrides=["steps=2"], resume=True))
    assert str(caught.value).startswith(f"{damaged}: ")
    assert "\n" not in str(caught.value)
