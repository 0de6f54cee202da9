"""`grape train`: from a rubric to the optimizer's step, and all of it in the log."""

from __future__ import annotations

import asyncio
import json
import math
import shutil

import pytest
import torch
from apprentice import apprentice, ask, fair
from loopback import JudgeServer
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

import grape
from grape.errors import ConfigError
from grape.step import Step


def train(path, *overrides, **options):
    return asyncio.run(grape.train(path, overrides=overrides, **options))


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_leaves_weights_that_moved_and_a_log_that_tells_why(tmp_path):
    done = train(apprentice(tmp_path))
    assert done.folder == tmp_path / "checkpoints/step-000004"
    assert not same(weights(done.folder), weights(tmp_path / "policy"))
    log = tmp_path / "log.duckdb"
    assert ask(log, "select run, kind from runs") == [(done.run, "train")]
    assert ask(log, "select step, num_questions, num_responses from steps order by step") == [
        (step, 4, 16) for step in (1, 2, 3, 4)
    ]
    assert ask(log, "select count(*), count(distinct (step, response_id)) from responses") == [(64, 64)]
    assert ask(log, "select count(*) from verdicts where outcome = 'ok'") == [(128,)]
    assert ask(log, "select count(*) from questions") == [(8,)]
    assert ask(log, "select count(*) from rewards where trained and in_baseline") == [(64,)]
    (unequal,) = ask(log, "select max(abs(advantage - list_sum(map_values(credit)))) from rewards")
    assert unequal[0] < 1e-12
    # each advantage is the reward less its group's mean, and each step's loss can be followed to its responses
    ((wrong,),) = ask(
        log,
        "select max(abs(advantage - (reward - mean))) from (select *, avg(reward) over (partition by step, question_id)"
        " as mean from rewards)",
    )
    assert wrong < 1e-12
    for (metrics,) in ask(log, "select metrics from steps"):
        found = json.loads(metrics)
        assert {"loss", "entropy", "grad_norm", "lr", "reward/mean", "reward/std", "score/letters/starts", "failed",
                "confidence/letters/short", "length/mean", "truncated", "dead_groups", "off_policy", "clip_high",
                "clip_low", "approx_kl", "refusals", "stock_phrases", "repetition"} <= found.keys()  # fmt: skip
        assert all(math.isfinite(value) for name, value in found.items() if name != "outcomes")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path):
    ends = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        shutil.copytree(tmp_path / "a" / "policy", tmp_path / name / "policy") if ends else None
        ends.append(weights(train(apprentice(tmp_path / name, seed=seed)).folder))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_training_raises_what_the_rubric_asks_for(tmp_path):
    sampling = {"questions": 8, "responses": 8}
    train(apprentice(tmp_path, steps=12, sampling=sampling, optimizer={"lr": 5e-3}, checkpoint=None))
    scores = ask(
        tmp_path / "log.duckdb", "select avg(score) from verdicts where item = 'starts' group by step order by step"
    )
    assert scores[-1][0] > scores[0][0] + 0.3


def test_improved_responses_follow_to_what_they_improve_and_both_log_probabilities_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPE_HOME", str(tmp_path))
    with JudgeServer(fair) as server:
        train(apprentice(tmp_path, judge=server.url, questions=4, improve={"share": 0.5, "controls": 0.25}, steps=3))
    log = tmp_path / "log.duckdb"
    assert ask(log, "select step, route, count(*) from responses group by all order by all") == [
        (1, "fresh", 16), (2, "fresh", 8), (2, "improve", 8), (3, "fresh", 8), (3, "improve", 8),
    ]  # fmt: skip
    parents = ask(
        log,
        "select count(*), bool_and(p.question_id = r.question_id), bool_and(p.step = r.step - 1)"
        " from responses r join responses p on p.response_id = r.parent_id",
    )
    assert parents == [(16, True, True)]
    assert {control for (control,) in ask(log, "select distinct control from responses")} <= {
        None,
        "own",
        "shuffled",
        "none",
    }
    drawn = ask(log, "select route, logprob_sampled, logprob_trained from responses where step > 1")
    for route, sampled, trained in drawn:
        if route == "fresh":
            assert trained == pytest.approx(sampled, abs=1e-3)
        else:  # the same tokens in another context
            assert abs(trained - sampled) > 1e-3
    ((gap,),) = ask(log, "select (metrics->>'off_policy/gap')::double from steps where step = 3")
    means = ask(
        log,
        "select sum(logprob_sampled - logprob_trained) / sum(num_tokens) from responses where step = 3 and route = 'improve'",
    )
    assert gap == pytest.approx(means[0][0], abs=1e-6)


def test_improvements_within_a_step_and_out_of_the_baseline(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPE_HOME", str(tmp_path))
    improve = {"share": 0.5, "source": "step", "pick": "best", "baseline": False, "negative": False}
    train(apprentice(tmp_path, improve=improve, steps=2))
    log = tmp_path / "log.duckdb"
    assert ask(
        log, "select count(*) from responses r join responses p on p.response_id = r.parent_id and p.step = r.step"
    ) == [(16,)]
    ((wrong, negative, masked),) = ask(
        log,
        "select max(abs(advantage - (reward - base))), count(*) filter (route = 'improve' and advantage < 0),"
        " count(*) filter (not trained) from (select *, avg(reward) filter (in_baseline)"
        " over (partition by step, question_id) as base from rewards join responses using (run, step, response_id, question_id))"
        " where base is not null",
    )
    assert wrong < 1e-12
    assert negative == masked > 0


def test_a_given_answer_is_a_member_of_its_group(tmp_path):
    path = apprentice(tmp_path, sft={"field": "reference"}, steps=1)
    train(path)
    log = tmp_path / "log.duckdb"
    found = ask(
        log,
        "select response, logprob_sampled, trained from responses join rewards using (run, step, response_id) where route = 'sft' order by response",
    )
    assert len(found) == 4
    assert all(text.startswith("canary-") and sampled is None and trained for text, sampled, trained in found)
    assert ask(log, "select count(*) from responses") == [(16,)]
    train(path, f"checkpoint.dir={tmp_path}/other", "sft.use=baseline", f"log={tmp_path}/other.duckdb")
    assert ask(tmp_path / "other.duckdb", "select count(*) from rewards where in_baseline and not trained") == [(4,)]


@pytest.mark.parametrize(
    ("truncation", "reward"),
    [({"how": "mask"}, None), ({"how": "penalty", "penalty": -0.5}, -0.5), ({"how": "soft", "buffer": 4}, 0.0)],
)
@pytest.mark.slow
def test_a_response_that_was_cut_is_not_judged(tmp_path, truncation, reward):
    train(apprentice(tmp_path, truncation=truncation, steps=1))
    log = tmp_path / "log.duckdb"
    rows = ask(
        log,
        "select r.reward, r.penalty, r.trained, r.unscorable, (select list(distinct outcome) from verdicts v where"
        " v.response_id = r.response_id), a.num_tokens from rewards r join responses a using (run, step, response_id)"
        " where a.finish_reason = 'length'",
    )
    assert rows
    for got, penalty, trained, why, outcomes, tokens in rows:
        assert got == reward
        assert outcomes == ["skipped"]
        assert tokens == 8
        assert trained is (reward is not None)
        assert why == ("cut at 8 tokens" if reward is None else None)
        assert penalty == (-1.0 if truncation["how"] == "soft" else 0.0)
    whole = ask(
        log,
        "select penalty, num_tokens from rewards join responses using (run, step, response_id) where finish_reason = 'stop'",
    )
    for penalty, tokens in whole:  # (8 - 4 - length) / 4, and 0 at the most
        assert penalty == (min(0.0, (4 - tokens) / 4) if truncation["how"] == "soft" else 0.0)


def test_dynamic_sampling_draws_further_questions_for_dead_groups(tmp_path):
    rubric = (
        "rubric: letters\nitems: [{id: starts, criterion: Starts with a., check: regex, with: {pattern: '^[a-d]'}}]"
    )
    path = apprentice(tmp_path, questions=20, steps=2, sampling={"questions": 4, "responses": 2, "rounds": 3})
    (tmp_path / "rubrics/letters.yaml").write_text(rubric)
    train(path)
    log = tmp_path / "log.duckdb"
    for step in (1, 2):
        groups = ask(
            log, f"select question_id, bool_or(trained), max(advantage) from rewards where step = {step} group by 1"
        )
        assert len(groups) > 4
        assert sum(trained for _, trained, _ in groups) == 4
        alive = sum(best != 0 for *_, best in groups)
        assert sum(trained and best != 0 for _, trained, best in groups) == min(4, alive)


@pytest.mark.slow
def test_only_questions_of_middling_difficulty_are_kept(tmp_path):
    path = apprentice(tmp_path, questions=12, steps=2, sampling={"questions": 2, "responses": 4})
    run = json.loads(path.read_text())
    run["questions"] |= {"difficulty": {"low": 0.1, "high": 0.4, "responses": 4}, "order": "easy-to-hard"}
    path.write_text(json.dumps(run))
    done = train(path)
    log = tmp_path / "log.duckdb"
    means = dict(
        ask(log, f"select question_id, avg(weighted) from rewards where run = '{done.run}.difficulty' group by 1")
    )
    assert len(means) == 12
    trained = {name for (name,) in ask(log, f"select distinct question_id from rewards where run = '{done.run}'")}
    assert trained <= {name for name, mean in means.items() if 0.1 <= mean <= 0.4}
    assert {kind for (kind,) in ask(log, "select kind from runs")} == {"difficulty", "train"}


def test_held_out_questions_are_scored_before_and_after_by_a_judge_of_their_own(tmp_path):
    path = apprentice(tmp_path, steps=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letters.yaml").write_text(
        "rubric: strict\ncategory: letters\nitems: [{id: nice, criterion: Nice., judge: default}]"
    )
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"question_id": "h", "question": "Write h."}))
    with JudgeServer(fair) as server:
        settings = {"judge": "default", "client": "openai", "endpoint": server.url, "model": "m"}
        (tmp_path / "held.yaml").write_text(json.dumps(settings))
        evaluate = {"questions": {"path": str(tmp_path / "heldout.jsonl"), "category": "letters"}, "every": 2, "responses": 3,
                    "rubrics": str(tmp_path / "other"), "judges": {"default": str(tmp_path / "held.yaml")}}  # fmt: skip
        done = train(path, f"evaluate={json.dumps(evaluate)}")
    assert list(done.heldout) == [0, 2, 3]
    log = tmp_path / "log.duckdb"
    for step, metrics in done.heldout.items():
        mean = ask(log, f"select avg(score) from verdicts where run = '{done.run}.heldout' and step = {step}")
        assert metrics["score/letters/nice"] == pytest.approx(mean[0][0])
    assert ask(log, "select count(*) from verdicts where item = 'nice'") == [(9,)]


@pytest.mark.slow
def test_held_out_questions_need_not_ask_the_judges_of_the_training(tmp_path):
    with JudgeServer(fair) as server:
        path = apprentice(tmp_path, judge=server.url, steps=1)
        (tmp_path / "rubrics/plain.yaml").write_text(
            "rubric: plain\ncategory: plain\nitems: [{id: a, criterion: A., check: regex, with: {pattern: a}}]"
        )
        (tmp_path / "heldout.jsonl").write_text(json.dumps({"question_id": "h", "question": "Write h."}))
        questions = {"path": str(tmp_path / "heldout.jsonl"), "category": "plain"}
        done = train(path, f"evaluate={json.dumps({'questions': questions})}")
    assert list(done.heldout) == [0, 1]


def test_a_step_of_which_nothing_can_be_learned_leaves_the_weights_alone(tmp_path, caplog):
    path = apprentice(
        tmp_path, truncation={"how": "mask"}, sampling={"questions": 2, "responses": 2, "max_tokens": 1}, steps=2
    )
    done = train(path)
    assert same(weights(done.folder), weights(tmp_path / "policy"))
    assert "step 1: no response could be trained on; the weights stay as they are" in caplog.text


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sampling.temperature=0.7", "sampling.temperature: training needs 1.0, samples of the policy itself (got 0.7)"),
        ("sampling.top_p=0.9", "sampling.top_p: training needs 1.0, samples of the policy itself (got 0.9)"),
        ("sampling.max_tokens=9000", "sampling.max_tokens 9000 exceed the policy's context"),
        ("sampling.questions=9", "sampling.questions: 9 a step, but {folder}/questions.jsonl has only 8 that can be used"),
        ("policy.model=nowhere/at/all", "policy.model: nowhere/at/all: no such folder"),
        ("loss.aggregate=seq-mean-token-sum-norm", "loss.norm_length: aggregate seq-mean-token-sum-norm needs it"),
        ("loss.kl=reward", "loss.kl_coef: loss.kl reward needs one above 0"),
        ("trackers=nobody", "trackers: 'nobody' is not installed; known:"),
        ("rubrics=nowhere", "nowhere: no such file or folder"),
        ("loss={dual_clip: 3, ratio: none}", "loss.dual_clip: needs a clip, which ratio tapered, ratio none and kl trpo"),
        ("truncation={how: soft, buffer: 9}", "truncation.buffer: how: soft needs it, and it is at most sampling.max_tok"),
        ("truncation.penalty=-1e300", "truncation.penalty: Input should be greater than or equal to -1000000"),
        ("seed=9223372036854775808", "seed: Input should be less than 9223372036854775808"),
        ("sft.field=solution", "sft.field: 'solution': no question of {folder}/questions.jsonl has it"),
        ("optimizer.lr=1e300", "optimizer.lr: Input should be less than or equal to 1 (got 1e+300)"),
        ("questions.difficulty={low: 0.9, high: 0.1}", "questions.difficulty.low: is above high"),
        ("evaluate={questions: {path: x, order: given}}", "evaluate.questions: held-out questions are all asked, each"),
        ("loss.clip_hihg=0.3", "loss.clip_hihg: Extra inputs are not permitted (got 0.3; did you mean 'clip_high'?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_before_any_work(tmp_path, override, line):
    path = apprentice(tmp_path)
    with pytest.raises(ConfigError) as caught:
        train(path, override)
    assert line.format(folder=tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_prompt_that_leaves_no_room_is_a_bad_row(tmp_path, caplog):
    path = apprentice(tmp_path, steps=1)
    with (tmp_path / "questions.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"question_id": "long", "question": "x" * 600}))
    with pytest.raises(ConfigError, match=r"line 9: its prompt of 6\d\d tokens and sampling.max_tokens 8 exceed"):
        train(path)
    train(path, "questions.bad_rows=skip")
    assert "skipped rows: 1 of 9" in caplog.text


def test_a_given_answer_that_leaves_no_room_is_a_bad_row(tmp_path, caplog):
    path = apprentice(tmp_path, steps=1, sft={"field": "solution"})
    rows = [{"question_id": "long", "question": "x", "solution": "abc " * 150}, {"question_id": "no", "question": "x"},
            {"question_id": "odd", "question": "x", "solution": 5}]  # fmt: skip
    rows += [{"question_id": f"q{number}", "question": "x", "solution": "abc"} for number in range(4)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ConfigError, match=r"line 1: its prompt of 1\d tokens and its solution of 601 exceed the policy's"
    ):
        train(path)
    train(path, "questions.bad_rows=skip")
    assert "skipped rows: 2 of 7" in caplog.text
    assert "question 'odd': solution: not a text" in caplog.text


def test_a_given_answer_may_be_the_whole_group(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPE_HOME", str(tmp_path))
    improve = {"share": 1.0, "source": "step"}
    train(apprentice(tmp_path, steps=1, sft={"field": "reference"}, sampling={"responses": 1}, improve=improve))
    assert ask(tmp_path / "log.duckdb", "select route, count(*) from responses group by all") == [("sft", 4)]


def test_the_difficulty_filter_keeps_the_given_order(tmp_path):
    path = apprentice(tmp_path, questions=12, steps=3, sampling={"questions": 4, "responses": 2, "max_tokens": 2})
    run = json.loads(path.read_text())
    run["questions"] |= {"difficulty": {"low": 0.0, "high": 1.0, "responses": 1}, "order": "given"}
    path.write_text(json.dumps(run))
    done = train(path)
    asked = ask(
        tmp_path / "log.duckdb", f"select step, question_id from rewards where run = '{done.run}' order by rowid"
    )
    steps = [list(dict.fromkeys(name for number, name in asked if number == step)) for step in (1, 2, 3)]
    assert steps == [[f"q{number}" for number in range(start, start + 4)] for start in (0, 4, 8)]


def test_improvements_that_share_a_baseline_share_the_prompt_that_they_are_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPE_HOME", str(tmp_path))
    improve = {"share": 1.0, "context": "behaviour", "controls": 0.5}
    sampling = {"questions": 4, "responses": 8, "max_tokens": 2}
    path = apprentice(tmp_path, questions=4, steps=3, sampling=sampling, improve=improve, checkpoint={"every": 9})
    (tmp_path / "prompts/improve/default.jinja").write_text(
        "{% block user %}{{ response }}{% for item in items %} {{ item.reasoning }}{% endfor %}{% endblock %}"
    )
    prompts = {}

    def look(report):
        if report.step == 2:
            for member in Step.read((tmp_path / "checkpoints/journal/step-000002.json").read_bytes()).members:
                prompts.setdefault(member.group, []).append(member.prompt_ids)

    train(path, report=look)
    assert {len(group) for group in prompts.values()} == {4}
    assert sum("(shuffled)" in name for name in prompts) == 4
    assert all(len(set(group)) == 1 for group in prompts.values())


def test_a_response_is_judged_while_others_are_still_sampled(tmp_path):
    forwards = asked_at = 0

    def count(*_):
        nonlocal forwards
        forwards += 1

    def judge(body, number):
        nonlocal asked_at
        asked_at = asked_at or forwards
        return fair(body, number)

    with JudgeServer(judge) as server:
        path = apprentice(tmp_path, judge=server.url, steps=1, sampling={"max_tokens": 400}, truncation={"how": "mask"})
        hook = register_module_forward_hook(count)
        try:
            train(path)
        finally:
            hook.remove()
    assert 0 < asked_at < forwards / 2


def test_what_a_step_logs_goes_to_the_trackers_too(tmp_path):
    train(apprentice(tmp_path, steps=2, trackers=["tensorboard"]))
    text = b"".join(file.read_bytes() for file in (tmp_path / "checkpoints").rglob("events.out.tfevents*"))
    for name in (b"reward/mean", b"entropy", b"score/letters/starts", b"grad_norm"):
        assert text.count(name) >= 2
