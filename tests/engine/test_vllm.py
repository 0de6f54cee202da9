"""vLLM in this process, on a CPU: judges, and rollouts whose weights follow the trainer's."""

from __future__ import annotations

import tiny  # isort: skip (before torch)

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("vllm", reason="needs the environment of tests/engine/requirements.txt")

from apprentice import apprentice
from apprentice import ask as ask_log

import grape
from grape.config import load_run
from grape.errors import ConfigError, GrapeError
from grape.item import Item
from grape.judge.config import load_judge
from grape.judge.critic import Critic
from grape.policy import load_policy
from grape.rollout import Sampling
from grape.served import Served
from grape.types import Outcome, Question, Response

pytestmark = pytest.mark.vllm

QUESTION = Question(question_id="q", category="c", text="Say a word.")
ITEM = Item.model_validate({"id": "i", "criterion": "Is a word.", "judge": "j", "scale": "binary"})
ENGINE = {"max_model_len": 1024}


def judge(folder, **fields):
    settings = {"judge": "j", "model": "sure", "prompt": f"{folder}/short.jinja", "sampling": {"max_tokens": 40}}
    path = folder / "j.yaml"
    path.write_text(json.dumps({**settings, **fields}))
    return load_judge(path)


def ask(config, texts):
    rows = []

    async def main():
        async with Critic(config, secret=b"\1" * 32, record=rows.append) as critic:
            await critic.reach()
            responses = [Response(response_id=str(n), question_id="q", text=text) for n, text in enumerate(texts)]
            return await asyncio.gather(*(critic.verdict(QUESTION, response, ITEM) for response in responses))

    return asyncio.run(main()), rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    tiny.tiny_judge(folder / "sure", head_dim=32)
    (folder / "short.jinja").write_text("{% block user %}{{ response }}{{ criterion }}{% endblock %}")
    return folder


def test_a_judge_in_vllm_agrees_with_transformers(folder):
    texts = ["word", "another word", "a third, which is longer"]
    here, _ = ask(judge(folder, client="transformers", confidence="logprob"), texts)
    there, rows = ask(judge(folder, client="vllm", confidence="logprob", json_schema="never", engine=ENGINE), texts)
    for ours, theirs in zip(here, there, strict=True):
        assert (theirs.outcome, theirs.raw, theirs.reasoning) == (Outcome.OK, ours.raw, ours.reasoning)
        assert theirs.score == pytest.approx(ours.score, abs=1e-4)
        assert theirs.confidence == pytest.approx(ours.confidence, abs=1e-4)
        assert (theirs.input_tokens, theirs.output_tokens) == (ours.input_tokens, ours.output_tokens)
    assert {len(tokens[0][1]) for tokens in (row["tokens"] for row in rows)} == {20}


def test_what_vllm_cannot_be_asked_for_is_one_line_before_anything_is_judged(folder):
    for sampling, said in (
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"extra_body": {"min_q": 0.1}}, "min_q"),
        ({"extra_body": {"top_k": -7}}, "top_k"),
    ):
        with pytest.raises(ConfigError, match=rf"sampling: not for vllm: .*{said}"):
            ask(judge(folder, client="vllm", engine=ENGINE, sampling={"max_tokens": 40, **sampling}), ["word"])


def learner(folder, **sections):
    """A run's file whose policy vLLM can serve on a CPU, with tied embeddings."""
    tiny.tiny_folder(folder / "policy", head_dim=32)
    return apprentice(folder, sampling={"engine": "vllm", "options": {"max_model_len": 256}}, **sections)


def test_rollouts_follow_the_trainer_and_have_its_log_probabilities(tmp_path):
    told = []
    run = learner(tmp_path, steps=3, optimizer={"lr": 0.01})
    done = asyncio.run(grape.train(run, report=told.append))
    assert [step.step for step in told] == [1, 2, 3]
    assert max(step.metrics["engine_gap"] for step in told) < 1e-4
    drawn = ask_log(tmp_path / "log.duckdb", "select step, num_tokens, logprob_sampled, logprob_trained from responses")
    assert len(drawn) == 48
    for _, num_tokens, sampled, trained in drawn:
        assert sampled == pytest.approx(trained, abs=1e-4 * num_tokens)
    moved, begun = (load_file(path / "model.safetensors") for path in (done.folder, tmp_path / "policy"))
    assert max(float((moved[name] - begun[name]).abs().max()) for name in moved) > 1e-2
    ((config,),) = ask_log(tmp_path / "log.duckdb", "select config from runs")
    assert json.loads(config)["loss"]["rollout_cap"] == 2.0


def test_weights_that_are_not_the_policys_are_noticed_and_new_ones_are_taken(tmp_path):
    config = load_run(learner(tmp_path))
    policy = load_policy(config.policy.model)
    served, ended = Served(policy, config), []
    prompt = tuple(range(5, 25))
    served.sample([prompt], [2], 4, 1, Sampling(), ended.append)
    assert served.gap < 1e-4
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(GrapeError, match="vllm gives log-probabilities that differ by"):
        served._compare(served._engine, prompt)
    served.stale = True
    served.sample([prompt], [3], 4, 1, Sampling(), ended.append)
    assert served.gap < 1e-4
    assert [(one.group, one.member) for one in ended] == [(0, 0), (0, 1), (0, 0), (0, 1), (0, 2)]
    for one in ended[2:]:
        ids_BT = torch.tensor([[*prompt, *one.token_ids]])
        with torch.no_grad():
            logprobs_TV = policy.model(ids_BT).logits[0].log_softmax(-1)
        own = [float(logprobs_TV[len(prompt) - 1 + n, token]) for n, token in enumerate(one.token_ids)]
        assert list(one.logprobs) == pytest.approx(own, abs=1e-4)
        assert (one.finish == "stop") == (one.token_ids[-1] in policy.stop_ids)


def test_a_context_that_is_too_short_for_a_response_is_one_line(tmp_path):
    config = load_run(learner(tmp_path), ["sampling.options.max_model_len=24"])
    served = Served(load_policy(config.policy.model), config)
    with pytest.raises(ConfigError, match=r"max_model_len: is 24; the longest prompt and sampling\.max_tokens take 25"):
        served.sample([tuple(range(5, 25))], [1], 5, 1, Sampling(), print)


def test_a_schema_holds_the_judge_to_what_it_would_leave_out(folder):
    """The judge never states a confidence of its own accord."""
    plain, free = (
        ask(judge(folder, client="vllm", json_schema=use, engine=ENGINE, sampling={"max_tokens": 200}), ["word"])[1]
        for use in ("never", "always")
    )
    assert plain[0]["reply"] == '{"reasoning": "ok", "score": 1}'
    assert (plain[0]["outcome"], "lacks confidence" in plain[0]["detail"]) == (Outcome.UNPARSABLE, True)
    assert free[0]["reply"].startswith('{"reasoning": "ok", "score": 1')
    assert '"confidence"' in free[0]["reply"]


def test_one_judge_behind_a_server_agrees_with_the_one_in_this_process(folder):
    """vLLM's own server: JSON schema, log-probabilities, and what it counts."""
    tokens = ["word", "another word"]
    with server(folder / "sure") as url:
        fields = {"endpoint": url, "confidence": "logprob", "json_schema": "never", "model": str(folder / "sure")}
        there, rows = ask(judge(folder, **fields), tokens)
    here, _ = ask(judge(folder, client="transformers", confidence="logprob"), tokens)
    for ours, theirs in zip(here, there, strict=True):
        assert (theirs.outcome, theirs.raw, theirs.reasoning) == (Outcome.OK, ours.raw, ours.reasoning)
        assert theirs.score == pytest.approx(ours.score, abs=1e-4)
        assert theirs.confidence == pytest.approx(ours.confidence, abs=1e-4)
    assert all(row["input_tokens"] > 0 for row in rows)


def test_items_of_a_response_and_responses_to_a_question_share_what_the_server_has_computed(folder):
    """The shipped prompt, 2 questions x 3 responses x 4 items: most of what is sent, vLLM has in its cache."""
    tiny.tiny_judge(folder / "long", head_dim=32, max_position_embeddings=8192)
    items = [{"id": f"i{n}", "criterion": f"Is of kind {n}.", "judge": "j", "scale": "binary"} for n in range(4)]
    (folder / "r.yaml").write_text(json.dumps({"rubric": "r", "items": items}))
    rows = [
        {
            "question_id": f"q{q}",
            "category": "r",
            "question": f"Name a word, {q}. " * 20,
            "response": f"Word {r}. " * 20,
        }
        for q in range(2)
        for r in range(3)
    ]
    with server(folder / "long", length=8192) as url:
        config = judge(
            folder, endpoint=url, model=str(folder / "long"), prompt="score", confidence="none", concurrency=4
        )
        records = asyncio.run(grape.score(rows, rubrics=folder / "r.yaml", judges={"j": config}))
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics") as answer:
            told = dict(re.findall(r"^vllm:prefix_cache_(queries|hits)_total\S* (\S+)$", answer.read().decode(), re.M))
    assert [v["outcome"] for record in records for v in record["items"].values()] == ["ok"] * 24
    print(told)
    assert float(told["hits"]) / float(told["queries"]) > 0.5


@contextmanager
def server(model, length=1024):
    """vLLM's OpenAI-compatible server on a free port, for the length of a `with`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
               "--host", "127.0.0.1", "--max-model-len", str(length), "--dtype", "float32", "--enforce-eager"]  # fmt: skip
    with (model.parent / "server.log").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (model.parent / "server.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield f"{url}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
