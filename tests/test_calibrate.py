"""From gold labels to the confidence that a reward is made with: logs, files and judges as a user has them."""

from __future__ import annotations

import asyncio
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from loopback import JudgeServer, user_text, verdict

import grape
from grape.agreement import calibration_error
from grape.calibrate import Report, assess, calibrate
from grape.errors import ConfigError
from grape.fitting import Sample, decide, held_out
from grape.gold import Case, read_gold
from grape.judge.config import load_judge
from grape.log import Log
from grape.reliability import calibration_table, report_lines, report_record
from grape.report import show

LLMBAR = Path("examples/llmbar")
QUESTIONS = 30
# Of each category: how sure the judge says it is of its verdicts, in turn, and how many of 10 of those it gets right.
CATEGORIES = {"sharp": {0.9: 10, 0.6: 6}, "flat": {0.9: 8, 0.6: 8}, "guess": {0.9: 5, 0.6: 5}}


def gold_of(place):
    return (place // 2) % 2


def rows():
    """Two responses to each question; the second shows the same in the other order."""
    return [
        {
            "question_id": f"{category}{q}", "category": category, "question": "Which?", "response": f"{category} {q} {r}",
            "response_id": f"{category}{q}/{r}",
            "metadata": {"length": "long" if q % 2 else "short", "swapped_with": f"{category}{q}/{1 - r}"},
        }
        for category in CATEGORIES
        for q in range(QUESTIONS)
        for r in range(2)
    ]  # fmt: skip


def gold():
    return [
        {"response_id": f"{category}{q}/{r}", "item": "first", "score": (gold_of(q) + r) % 2}
        for category in CATEGORIES
        for q in range(QUESTIONS)
        for r in range(2)
    ]


def replies():
    lines = []
    for category, right in CATEGORIES.items():
        for number, label in enumerate(line for line in gold() if line["response_id"].startswith(category)):
            confidence = list(right)[number % 2]
            held = number // 2 * 7 % 10 < right[confidence]
            score = label["score"] if held else 1 - label["score"]
            reply = verdict(score, confidence)
            lines.append({"response_id": label["response_id"], "item": "first", "reply": reply})
    return lines


def lines_to(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A judge and rubrics, with the log of one run; what `score` and `calibrate` need."""
    tmp_path = tmp_path_factory.mktemp("scored")
    (tmp_path / "rubrics").mkdir()
    for category in CATEGORIES:
        (tmp_path / f"rubrics/{category}.yaml").write_text(
            f"rubric: {category}\nitems:\n  - {{id: first, criterion: The first., judge: rater, scale: binary}}\n"
        )
    lines_to(tmp_path / "replies.jsonl", replies())
    (tmp_path / "j.yaml").write_text("judge: j\nclient: replay\nreplies: replies.jsonl\n")
    lines_to(tmp_path / "gold.jsonl", gold())
    score(tmp_path)
    return tmp_path


@pytest.fixture
def project(scored, tmp_path):
    """A copy of it to change."""
    shutil.copytree(scored, tmp_path / "p", ignore=shutil.ignore_patterns("*.spool"))
    return tmp_path / "p"


def score(folder, **more):
    return asyncio.run(
        grape.score(
            rows(), rubrics=folder / "rubrics", judges={"rater": folder / "j.yaml"}, log=folder / "log.duckdb", **more
        )
    )


def fitted(folder, gold="gold.jsonl", **more):
    judges = more.pop("judges", {"j": folder / "j.yaml"})
    source = None if gold is None else folder / gold
    return asyncio.run(calibrate(folder / "log.duckdb", source, judges=judges, **{"draws": 200, **more}))


def ask(folder, sql):
    with Log(folder / "log.duckdb") as log:
        return log.query(sql)


def maps(folder):
    return json.loads((folder / "j.calibration.json").read_text())["maps"]


def error_of(folder, *arguments, **more):
    with pytest.raises(ConfigError) as caught:
        fitted(folder, *arguments, **more)
    return str(caught.value).replace(f"{folder}/", "")


def test_each_category_gets_what_its_verdicts_are_worth(project):
    report = fitted(project)
    found = maps(project)
    assert found["sharp/first"] == {"kind": "isotonic", "x": [0.6, 0.9], "y": [0.6, 1.0]}
    assert found["flat/first"] == {"kind": "constant", "x": [], "y": [0.8]}
    assert found["guess/first"] == {"kind": "zero", "x": [], "y": []}
    assert found["first"]["kind"] == "isotonic"  # of any other category
    lines = {line.group: line for line in report.lines}
    assert [lines[name].accuracy.value for name in CATEGORIES] == pytest.approx([0.8, 0.8, 0.5])
    assert [lines[name].kappa.value for name in CATEGORIES] == pytest.approx([0.6, 0.6, 0.0])
    assert lines["guess"].kappa.low < 0 < lines["sharp"].kappa.low
    assert lines["flat"].rank.value == pytest.approx(0, abs=1e-9)
    assert lines["flat"].why == "confidence does not order its errors"
    assert lines["sharp"].before.value == pytest.approx(0.05)  # of 0.9 all are right, of 0.6 six of ten
    assert lines["flat"].before.value == pytest.approx(0.15)
    assert lines["guess"].after.value == pytest.approx(0.5)  # a confidence of 0 is no estimate


def test_the_calibration_is_applied_from_then_on_and_the_raw_value_kept(project):
    assert ask(project, "select distinct confidence, stated from verdicts order by 1") == [(0.6, 0.6), (0.9, 0.9)]
    before = score(project)
    fitted(project)
    with pytest.warns(UserWarning, match="every mean confidence of guess"):
        after = score(project)
    found = ask(
        project,
        "select distinct category, stated, round(confidence, 9) from verdicts "
        "where run = (select run from runs order by started desc limit 1) order by 1, 2",
    )
    assert found == [
        ("flat", 0.6, 0.8), ("flat", 0.9, 0.8), ("guess", 0.6, 0.0), ("guess", 0.9, 0.0), ("sharp", 0.6, 0.6),
        ("sharp", 0.9, 1.0),
    ]  # fmt: skip
    assert all(record["reward"] is not None for record in before)
    unscorable = {record["category"] for record in after if record["reward"] is None}
    assert unscorable == {"guess"}  # a category left with nothing is skipped, not punished
    reasons = ask(project, "select distinct category, unscorable, advantage from rewards where reward is null")
    assert reasons == [("guess", "every mean confidence is 0", 0.0)]


def test_rescoring_applies_a_new_calibration_without_a_call(project):
    calls = ask(project, "select count(*) from judge_calls")
    fitted(project)
    (project / "replies.jsonl").write_text("")  # there is nobody to ask
    with pytest.warns(UserWarning, match="guess"):
        records = score(project, rescore=True)
    assert ask(project, "select count(*) from judge_calls") == calls == [(6 * QUESTIONS,)]
    assert {record["items"]["first"]["confidence"] for record in records} == {0.8, 0.0, 0.6, 1.0}


@pytest.mark.slow
def test_a_second_calibration_starts_from_what_was_stated_and_says_that_nothing_changes(project):
    fitted(project)
    before = (project / "j.calibration.json").read_bytes()
    with pytest.warns(UserWarning, match="guess"):
        score(project)
    report = fitted(project)
    assert (project / "j.calibration.json").read_bytes() == before
    assert report.changes == [f"{project}/j.calibration.json: nothing changes"]


def test_a_dry_run_writes_nothing_and_says_what_it_would(project):
    report = fitted(project, dry_run=True)
    assert not (project / "j.calibration.json").exists()
    assert report.changes[0] == f"{project}/j.calibration.json: would change"
    assert "  flat/first: 0.80 (before: as stated)" in report.changes
    assert "  guess/first: 0 (before: as stated)" in report.changes
    assert list(project.glob(".*")) == []


@pytest.mark.slow
def test_maps_of_other_items_and_categories_stay(project):
    identity = load_judge(project / "j.yaml").identity
    other = {"old/first": {"kind": "zero"}, "second": {"kind": "constant", "y": [0.5]}}
    stored = {"judge": "j", "identity": identity, "maps": other}
    (project / "j.calibration.json").write_text(json.dumps(stored))
    fitted(project)
    assert sorted(maps(project)) == ["first", "flat/first", "guess/first", "old/first", "second", "sharp/first"]


@pytest.mark.slow
def test_by_another_field_the_item_gets_one_map(project):
    fitted(project)
    report = fitted(project, by="length")
    assert [line.group for line in report.lines] == ["long", "short", "together"]
    assert sorted(maps(project)) == ["first"]
    assert "length" in error_of(project, by="lenght") and "known: category, length" in error_of(project, by="lenght")


def test_a_judge_that_was_changed_is_not_held_to_its_old_verdicts(project):
    fitted(project)
    (project / "j.yaml").write_text("judge: j\nclient: replay\nreplies: replies.jsonl\nsampling: {temperature: 1}\n")
    stale = error_of(project)
    assert stale.startswith("j.calibration.json: was fitted before j.yaml or its prompt was changed")
    (project / "j.calibration.json").unlink()
    assert error_of(project) == "j.yaml: the verdicts of judge 'j' in log.duckdb are of another version: score again"
    score(project)
    fitted(project)
    assert maps(project)["guess/first"]["kind"] == "zero"


@pytest.mark.slow
def test_how_a_judge_is_reached_does_not_make_its_verdicts_another_version(project):
    (project / "j.yaml").write_text("judge: j\nclient: replay\nreplies: replies.jsonl\ntimeout: 5\n")
    fitted(project)
    assert maps(project)["guess/first"]["kind"] == "zero"


@pytest.mark.slow
def test_verdicts_that_contradict_each_other_in_the_other_order_are_counted(project):
    report = fitted(project, dry_run=True)
    lines = {line.group: line for line in report.lines}
    assert [lines[name].num_ordered for name in CATEGORIES] == [QUESTIONS] * 3
    # Of its surer verdicts on `sharp`, those on first responses, 10 of 10 are right, of the others 6 of 10.
    assert [lines[name].order.value for name in CATEGORIES] == pytest.approx([0.4, 0, 0])
    assert lines["together"].order.value == pytest.approx(0.4 / 3)


def test_several_labelers_make_one_gold_and_their_agreement_is_told(project):
    labels = []
    for number, line in enumerate(gold()):
        for labeler in ("ann", "ben", "cem"):
            odd = labeler == "cem" and number % 4 == 0
            labels.append({**line, "labeler": labeler, "score": 1 - line["score"] if odd else line["score"]})
    lines_to(project / "three.jsonl", labels)
    one, three = fitted(project, dry_run=True), fitted(project, "three.jsonl", dry_run=True)
    assert [line.accuracy for line in three.lines] == [line.accuracy for line in one.lines]  # the majority is the gold
    (humans,) = three.humans
    assert (humans.num_labelers, humans.num_responses, humans.num_tied, humans.level) == (
        3,
        6 * QUESTIONS,
        0,
        "nominal",
    )
    assert humans.alpha.low < humans.alpha.value < humans.alpha.high < 1
    observed = 1 / 4 * 2 / 3  # in a quarter of the units two of the three pairs disagree
    assert humans.alpha.value == pytest.approx(1 - observed / 0.5, abs=0.01)
    assert one.humans == []


def test_labels_of_the_log_serve_as_gold_and_ties_are_left_out(project):
    with Log(project / "log.duckdb") as log:
        run = log.query("select run from runs order by started desc limit 1")[0][0]
        log.append(
            human_labels=[
                {"run": run, **line, "labeler": labeler, "score": 1 - line["score"] if tied else line["score"]}
                for number, line in enumerate(gold())
                for labeler, tied in (("ann", False), ("ben", number == 7))
            ]
        )
    report = fitted(project, None)
    assert report.humans[0].num_tied == 1
    assert report.lines[-1].group == "together"
    assert len(report.lines[-1].sample.score) == 6 * QUESTIONS - 1


def test_few_questions_decide_nothing(project):
    lines_to(
        project / "few.jsonl", [line for line in gold() if int(line["response_id"][4:-2].strip("ptsh") or 99) < 6][:24]
    )
    report = fitted(project, "few.jsonl")
    assert {line.gets for line in report.lines if line.group != "together"} == {"as stated: 6 questions, 20 are needed"}
    assert not any("/" in name for name in (maps(project) if (project / "j.calibration.json").exists() else {}))


@pytest.mark.slow
def test_golds_that_are_all_alike_decide_nothing(project):
    lines_to(project / "ones.jsonl", [line for line in gold() if line["score"] == 1])
    report = fitted(project, "ones.jsonl", dry_run=True)
    assert {line.why for line in report.lines} == {"every gold label is the same"}
    assert {line.gets for line in report.lines} == {"as stated: every gold label is the same"}


def test_graded_gold_has_a_tolerance(project):
    lines_to(project / "graded.jsonl", [{**line, "score": 0.2 + 0.6 * line["score"]} for line in gold()])
    wide, narrow = (fitted(project, "graded.jsonl", tolerance=t, dry_run=True).lines[-1] for t in (0.3, 0.1))
    assert wide.accuracy.value == pytest.approx(0.7) and narrow.accuracy.value == 0


def test_a_verdict_that_failed_is_counted_and_not_held_wrong(project):
    kept = [line for line in replies() if line["response_id"] != "flat0/0"]
    lines_to(project / "replies.jsonl", kept)
    (project / "log.duckdb").unlink()
    score(project)
    line = next(line for line in fitted(project, dry_run=True).lines if line.group == "flat")
    assert (len(line.sample.score), line.num_failed) == (2 * QUESTIONS - 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "gold.jsonl: line 1: not JSON"),
        ('{"response_id": "a", "item": "first", "score": 2}', "gold.jsonl: line 1: score: Input should be less than"),
        ('{"response_id": "a", "item": "first", "scor": 1}', "gold.jsonl: line 1: scor: Extra inputs are not permitted"),
        ('{"response_id": "a", "item": "first", "score": 1}\n' * 2,
         "gold.jsonl: line 2: 'a', 'first' has a label in gold.jsonl: line 1: name each labeler"),
        ("", "gold.jsonl: no gold labels"),
    ],
)  # fmt: skip
def test_faulty_gold_is_one_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("gold.jsonl").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_gold("gold.jsonl", log=None)
    assert str(caught.value).startswith(message)


def test_gold_that_fits_no_verdict_is_one_line(project):
    lines_to(project / "gold.jsonl", [{"response_id": "a", "item": "furst", "score": 1}])
    assert error_of(project) == (
        "gold.jsonl: line 1: response_id 'a', item 'furst': no verdict in log.duckdb has this label, nor any other; "
        "items: did you mean 'first'? known: first"
    )


def test_wrong_arguments_are_one_line(project):
    assert error_of(project, None).endswith("log.duckdb: no human labels in it: give them with --gold FILE")
    assert "judge 'j': no judge named 'j'" in error_of(project, judges={})
    assert "(give its file: --judge j=FILE, or --dry-run)" in error_of(project, judges={})
    assert error_of(project, run="x").startswith("log.duckdb: no run 'x'; known: 2")
    assert error_of(project, repeat=1) == "--repeat: 1 is not 2 or more: one score has no variance"
    assert error_of(project, tolerance=0) == "--tolerance: 0 is not above 0 and at most 1"
    (project / "log.duckdb").rename(project / "gone.duckdb")
    assert error_of(project) == "log.duckdb: no such log"
    assert not (project / "log.duckdb").exists()


@pytest.mark.slow
def test_one_id_for_two_texts_asks_for_a_run(project):
    changed = [{**row, "response": row["response"] + "!"} for row in rows()]
    options = {"rubrics": project / "rubrics", "judges": {"rater": project / "j.yaml"}, "log": project / "log.duckdb"}
    asyncio.run(grape.score(changed, **options))
    assert "log.duckdb: response_id 'flat0/0' names different texts in runs" in error_of(project)
    run = ask(project, "select run from runs order by started desc limit 1")[0][0]
    assert len(fitted(project, run=run, dry_run=True).lines) == 4


def test_the_report_can_be_read_and_is_plain_json(project, capsys):
    report = fitted(project)
    show(*report_lines(report))
    shown = capsys.readouterr().out
    head, first = shown.splitlines()[:2]
    assert head.split()[:4] == ["judge", "item", "group", "n"]
    assert first.split()[:5] == ["j", "first", "flat", str(2 * QUESTIONS), ".80"]
    assert "0.80: confidence does not order its errors" in shown
    assert "0: not beyond chance" in shown
    data = json.loads(json.dumps(report_record(report), allow_nan=False))
    assert [line["group"] for line in data["lines"]] == ["flat", "guess", "sharp", "together"]
    assert data["lines"][0]["map"] == {"kind": "constant", "x": [], "y": [0.8]}
    assert data["lines"][0]["accuracy"]["value"] == pytest.approx(0.8)
    assert set(data["lines"][0]) >= {"ece_stated", "ece_calibrated", "ece_change", "rank_correlation", "contradicts"}


def test_the_command_prints_what_the_function_finds_or_one_line(project):
    command = [Path(sys.executable).parent / "grape", "calibrate", "--log", "log.duckdb", "--judge", "any=j.yaml"]
    more = ["--gold", "gold.jsonl", "--seed", "3", "--dry-run", "--json"]
    done = subprocess.run([*command, *more], cwd=project, capture_output=True, text=True, check=True)
    assert not (project / "j.calibration.json").exists()
    found = {line["group"]: line["map"] and line["map"]["kind"] for line in json.loads(done.stdout)["lines"]}
    assert found == {"flat": "constant", "guess": "zero", "sharp": "isotonic", "together": "isotonic"}
    done = subprocess.run([*command, "--gold", "no.jsonl"], cwd=project, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "grape: no.jsonl: No such file or directory\n")


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_judge_that_nearly_always_failed_is_reported_all_the_same(number):
    cases = [
        Case(judge="j", item="i", category="c", response_id=str(n), cluster=str(n), score=1.0 if n < number else None,
             stated=0.9 if n < number else None, gold=1.0)
        for n in range(4)
    ]  # fmt: skip
    (line,) = assess(cases, "category", draws=50)
    assert (len(line.sample.score), line.num_failed, line.map) == (number, 4 - number, None)
    assert line.why == f"{number} questions, 20 are needed"
    json.dumps(report_record(Report(lines=[line])), allow_nan=False)
    assert str(number) in calibration_table([line]).columns[3]._cells[0]


@pytest.mark.slow
def test_the_reliability_plot_is_a_png(project):
    pytest.importorskip("matplotlib")
    fitted(project, plot=project / "plot.png", dry_run=True)
    assert (project / "plot.png").read_bytes().startswith(b"\x89PNG\r\n")
    with pytest.raises(ConfigError, match=r"log\.duckdb: is read or logged to by this run"):
        fitted(project, plot=project / "log.duckdb")


def test_a_plot_without_matplotlib_is_one_line(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert error_of(project, plot=project / "p.png") == (
        "--plot needs the package matplotlib: pip install 'grape-rl[plot]'"
    )


def sample(stated, right, questions=None):
    """A sample of verdicts on golds that alternate."""
    gold = np.arange(len(right)) % 2
    score = np.where(np.asarray(right, bool), gold, 1 - gold).astype(float)
    cluster = np.arange(len(right)) if questions is None else questions
    return Sample(
        score=score, stated=np.asarray(stated, float), gold=gold.astype(float), cluster=cluster.astype(str)
    )  # fmt: skip


def test_a_map_that_is_no_better_than_a_constant_where_it_was_not_fitted_is_not_used():
    """Confidences that are all different can be fitted to noise: rank and isotonic fit rise, and the constant holds."""
    outcomes = []
    for seed in range(12):
        generator = np.random.default_rng(seed)
        stated = generator.random(60)
        decision = decide(sample(stated, generator.random(60) < 0.8), draws=300)
        outcomes.append("none" if decision.map is None else decision.map.kind)
    assert outcomes.count("isotonic") <= 1  # its confidence says nothing


def test_a_question_is_held_out_whole_and_never_from_itself():
    generator = np.random.default_rng(0)
    stated, right = np.repeat(generator.random(60), 2), generator.random(120) < 0.8
    data = sample(stated, right, np.repeat(generator.permutation(60), 2))
    held = held_out(data, seed=5)
    assert (held.half[:, ::2] == held.half[:, 1::2]).all()
    assert set(held.half.sum(axis=1).tolist()) == {60}
    assert len(np.unique(held.half, axis=0)) == len(held.half)
    for mapped, half in zip(held.mapped, held.half, strict=True):
        for side in (0, 1):
            other = decide(data[half != side], seed=5, draws=200, fewest=2)
            assert mapped[half == side].tolist() == other(data.stated[half == side]).tolist()


def test_what_a_true_map_calibrates_has_less_error_left_where_it_was_not_fitted():
    generator = np.random.default_rng(3)
    stated = generator.choice([0.6, 0.7, 0.8, 0.9, 1.0], 600)
    data = sample(stated, generator.random(600) < 0.5 + 0.9 * (stated - 0.6))
    held, once = held_out(data, draws=300), np.ones((1, 600))
    before, after = (float(held.error(data.right, once, x)[0]) for x in (data.stated, None))
    assert before == pytest.approx(calibration_error(data.stated, data.right)[0], abs=0.03)
    assert before > 0.08 and after < 0.7 * before


def test_what_is_calibrated_already_is_not_said_to_improve():
    generator = np.random.default_rng(4)
    stated = generator.choice([0.6, 0.8, 1.0], 400)
    data = sample(stated, generator.random(400) < stated)
    held = held_out(data, draws=300)
    once = np.ones((1, 400))
    assert float(held.error(data.right, once)[0]) > float(held.error(data.right, once, data.stated)[0]) - 0.01


def wavering(body, number):
    """Sure of what is plain, where its score never moves; unsure of what is vague, where it does."""
    text, seed = user_text(body), body["seed"]
    return verdict(0.8, 0.9) if "plain" in text else verdict((seed * 7 % 5) / 4, 0.3)


def lemma(tmp_path, behaviour, **judge):
    with JudgeServer(behaviour) as server:
        settings = {
            "judge": "j",
            "endpoint": server.url,
            "model": "m",
            "sampling": {"temperature": 1, "seed": 0},
            **judge,
        }
        (tmp_path / "j.yaml").write_text(json.dumps(settings))
        (tmp_path / "rubrics").mkdir(exist_ok=True)
        (tmp_path / "rubrics/c.yaml").write_text("rubric: c\nitems: [{id: i, criterion: Is so., judge: rater}]\n")
        given = [
            {"question_id": f"q{n}", "category": "c", "question": [{"role": "user", "content": f"Q{n}"}],
             "response": f"{'plain' if n % 2 else 'vague'} {n}"}
            for n in range(30)
        ]  # fmt: skip
        options = {"rubrics": tmp_path / "rubrics", "judges": {"rater": tmp_path / "j.yaml"}}
        asyncio.run(grape.score(given, log=tmp_path / "log.duckdb", **options))
        reports = [fitted(tmp_path, None, repeat=4, rubrics=tmp_path / "rubrics").repeated for _ in range(2)]
        assert reports[0] == reports[1]
        return reports[0], server.bodies[30:]


@pytest.mark.slow
def test_repeated_judging_shows_whether_confidence_falls_where_scores_vary(tmp_path):
    (found,), bodies = lemma(tmp_path, wavering)
    assert (found.num_responses, found.num_samples, found.num_failed) == (30, 120, 0)
    assert found.rank.value == pytest.approx(-1)
    assert found.mean_variance == pytest.approx(np.var(np.array([7, 14, 21, 28]) % 5 / 4, ddof=1) / 2)
    assert found.says == "j on i: the assumption of Lemma 8.1 holds: its confidence falls where its scores vary."
    assert len(bodies) == 120  # what was repeated once is not asked again
    assert {body["seed"] for body in bodies} == {1, 2, 3, 4}
    assert ask(tmp_path, "select sample, count(*) from judge_calls group by 1 order by 1") == [
        (n, 30) for n in range(5)
    ]  # fmt: skip
    shown = "\n".join(map(str, report_lines(Report(repeated=[found]))))
    assert "Spearman of stated confidence with variance: -1.00 [-1.00 -1.00], 30 responses, 120 samples" in shown
    assert report_record(Report(repeated=[found]))["repeated"][0]["says"] == found.says


@pytest.mark.slow
def test_a_judge_that_is_surest_where_its_scores_vary_contradicts_the_lemma(tmp_path):
    def upside_down(body, number):
        return verdict(0.8, 0.3) if "plain" in user_text(body) else verdict((body["seed"] * 7 % 5) / 4, 0.9)

    (found,), _ = lemma(tmp_path, upside_down)
    assert found.says.startswith("j on i: the assumption of Lemma 8.1 is contradicted")


@pytest.mark.slow
def test_a_judge_without_samples_cannot_be_repeated(project, tmp_path):
    rubrics = project / "rubrics"
    assert error_of(project, None, repeat=3, rubrics=rubrics).startswith(
        "j.yaml: repeat: no sample 1 to 3 could be had: replies.jsonl has no score reply"
    )
    with pytest.raises(ConfigError, match=r"j\.yaml: sampling\.temperature: 0\.0: repeat needs one above 0"):
        lemma(tmp_path, wavering, sampling={"temperature": 0, "seed": 0})


@pytest.fixture(scope="module")
def votes(tmp_path_factory):
    """LLMBar's votes scored by each judge, and calibrated, as its README says."""
    folder = tmp_path_factory.mktemp("votes")
    shutil.copytree(LLMBAR / "votes", folder / "votes", ignore=shutil.ignore_patterns("*.calibration.json"))
    runpy.run_path(str(LLMBAR / "make.py"))["main"](folder)
    files = {name: folder / f"votes/judges/{name}.yaml" for name in ("gpt-4", "chatgpt", "llama2")}
    for file in files.values():
        options = {"rubrics": folder / "votes/rubrics", "log": folder / "votes.duckdb", "judges": {"rater": file}}
        asyncio.run(grape.score(folder / "votes/responses.jsonl", **options))
    report = asyncio.run(calibrate(folder / "votes.duckdb", folder / "votes/gold.jsonl", judges=files))
    return folder, {(line.judge, line.group): line for line in report.lines}


@pytest.mark.slow
def test_single_votes_of_llmbar_have_the_published_accuracy(votes):
    folder, _ = votes
    with Log(folder / "votes.duckdb") as log:
        stored = log.query("select judge, response_id, unnest(string_split(raw, ', ')) from verdicts")
    label = {row["response_id"]: row["score"] for row in map(json.loads, (folder / "votes/gold.jsonl").open())}
    right: dict[tuple[str, str], list[bool]] = {}
    for judge, response_id, vote in stored:
        right.setdefault((judge, response_id.split("-")[0]), []).append((vote == "met") == label[response_id])
    assert sum(map(len, right.values())) == 8892 - 6  # six replies named no winner
    assert {key: round(float(np.mean(held)), 2) for key, held in right.items()} == {
        ("gpt-4", "Natural"): 0.93, ("gpt-4", "Neighbor"): 0.75,
        ("chatgpt", "Natural"): 0.76, ("chatgpt", "Neighbor"): 0.26,
        ("llama2", "Natural"): 0.77, ("llama2", "Neighbor"): 0.25,
    }  # fmt: skip


@pytest.mark.slow
def test_the_three_judges_of_llmbar_are_told_apart(votes):
    folder, lines = votes
    assert {key: (len(line.sample.score), round(line.accuracy.value, 3)) for key, line in lines.items()} == {
        ("gpt-4", "Natural"): (200, 0.94), ("gpt-4", "Neighbor"): (268, 0.772), ("gpt-4", "together"): (468, 0.844),
        ("chatgpt", "Natural"): (200, 0.845), ("chatgpt", "Neighbor"): (268, 0.172),
        ("chatgpt", "together"): (468, 0.459),
        ("llama2", "Natural"): (200, 0.8), ("llama2", "Neighbor"): (268, 0.231), ("llama2", "together"): (468, 0.474),
    }  # fmt: skip
    kinds = {}
    for judge in ("gpt-4", "chatgpt", "llama2"):
        stored = json.loads((folder / f"votes/judges/{judge}.calibration.json").read_text())
        kinds[judge] = {name: map_["kind"] for name, map_ in stored["maps"].items()}
        assert stored["identity"] == load_judge(folder / f"votes/judges/{judge}.yaml").identity
    worthless = {"Natural/first": "isotonic", "Neighbor/first": "zero", "first": "zero"}
    assert kinds == {
        "gpt-4": {"Natural/first": "isotonic", "Neighbor/first": "isotonic", "first": "isotonic"},
        "chatgpt": worthless,
        "llama2": worthless,
    }


@pytest.mark.slow
def test_the_cross_validated_calibration_error_of_each_judge_of_llmbar_falls(votes):
    _, lines = votes
    for judge in ("gpt-4", "chatgpt", "llama2"):
        assert lines[judge, "together"].after.value < lines[judge, "together"].before.value
        assert lines[judge, "together"].change.value < 0
    for judge in ("chatgpt", "llama2"):
        assert lines[judge, "together"].change.high < -0.1
    # What GPT-4 says of itself on Natural is calibrated already: a map from half of the data can only add noise.
    assert lines["gpt-4", "Natural"].before.value < 0.03 < lines["gpt-4", "Natural"].after.value


@pytest.mark.slow
def test_gpt_4_contradicts_itself_least_when_the_order_is_turned(votes):
    _, lines = votes
    order = {judge: lines[judge, "together"].order for judge in ("gpt-4", "chatgpt", "llama2")}
    assert all(lines[judge, "together"].num_ordered == 234 for judge in order)
    assert order["gpt-4"].high < min(order["chatgpt"].low, order["llama2"].low)
