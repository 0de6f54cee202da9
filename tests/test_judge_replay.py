"""Judges that answer from stored replies, and the real ones of LLMBar."""

import asyncio
import gzip
import json
import re
import runpy
import shutil
from collections import Counter
from pathlib import Path

import pytest
from loopback import JudgeServer, verdict

from grape.errors import ConfigError
from grape.item import Item
from grape.judge.config import load_judge
from grape.judge.critic import Critic
from grape.rows import read_rows
from grape.rubric import load_rubric
from grape.types import Outcome, Question, Response

QUESTION = Question(question_id="q", category="c", text="Why?")
LLMBAR = Path("examples/llmbar")


def item(**fields):
    return Item.model_validate({"id": "i", "criterion": "Is right.", "judge": "j", **fields})


def judge_one(tmp_path, lines, of=None, config="", rows=None, response_id="r"):
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "j.yaml").write_text(f"judge: j\nclient: replay\nreplies: replies.jsonl\n{config}")

    async def main():
        record = (rows if rows is not None else []).append
        async with Critic(load_judge(tmp_path / "j.yaml"), secret=b"s", record=record) as critic:
            await critic.reach()
            response = Response(response_id=response_id, question_id="q", text="Because.")
            return await critic.verdict(QUESTION, response, of or item())

    return asyncio.run(main())


def line(reply, **fields):
    return {"response_id": "r", "item": "i", "reply": reply, **fields}


def test_a_stored_reply_in_our_form_is_a_verdict(tmp_path):
    rows = []
    got = judge_one(tmp_path, [line(verdict(0, 1), response_id="s"), line(verdict(0.5, 0.8))], rows=rows)
    assert (got.outcome, got.score, got.confidence, got.judge) == (Outcome.OK, 0.5, 0.8, "j")
    assert (rows[0]["messages"], rows[0]["model"]) == ([], "j")  # what it was shown is not known
    assert rows[0]["endpoint"] == str(tmp_path / "replies.jsonl")


def test_a_reply_that_is_not_stored_is_transport_and_says_which(tmp_path):
    got = judge_one(tmp_path, [line(verdict())], response_id="other")
    assert (got.outcome, got.score) == (Outcome.TRANSPORT, None)
    assert got.detail.endswith("replies.jsonl has no score reply for response 'other', item 'i'")


def test_a_stored_reply_that_cannot_be_read_is_asked_again_only_if_the_answer_is_stored(tmp_path):
    bad = line("0.5, I think")
    got = judge_one(tmp_path, [bad])
    assert (got.outcome, got.attempts, len(got.calls)) == (Outcome.UNPARSABLE, 1, 1)
    got = judge_one(tmp_path, [bad, line(verdict(0.5), purpose="repair")])
    assert (got.outcome, got.score, len(got.calls)) == (Outcome.OK, 0.5, 2)


def test_a_stored_critique_goes_with_its_score(tmp_path):
    got = judge_one(tmp_path, [line("Thin.", purpose="critique"), line(verdict(0.25))], of=item(critique="steps"))
    assert (got.score, got.critique) == (0.25, "Thin.")


def test_equal_responses_keep_their_own_stored_replies(tmp_path):
    lines = [line("1"), line("9", response_id="s")]
    of = item(scale={"numeric": [0, 10]})
    assert judge_one(tmp_path, lines, of=of, config="parser: rating").score == 0.1
    assert judge_one(tmp_path, lines, of=of, config="parser: rating", response_id="s").score == 0.9


def test_a_label_parser_reads_bare_labels(tmp_path):
    got = judge_one(tmp_path, [line(" Met\n")], of=item(scale="binary"), config="parser: label")
    assert (got.score, got.raw, got.confidence) == (1.0, "met", 1.0)


def test_calls_of_a_live_judge_replay_by_their_keys(tmp_path):
    rows = []

    async def live(url):
        (tmp_path / "live.yaml").write_text(f"judge: live\nendpoint: {url}\nmodel: m\n")
        async with Critic(load_judge(tmp_path / "live.yaml"), secret=b"s", record=rows.append) as critic:
            return await critic.verdict(QUESTION, Response(response_id="x", question_id="q", text="Because."), item())

    with JudgeServer(lambda *_: verdict(0.4)) as server:
        before = asyncio.run(live(server.url))
    after = judge_one(tmp_path, [{"call": rows[0]["call"], "reply": rows[0]["reply"]}], config="model: m")
    assert (after.score, after.calls) == (before.score, before.calls) == (0.4, (rows[0]["call"],))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"response_id": "r", "reply": "x"}', "line 1: a reply needs response_id and item, or call"),
        ('{"response_id": "r", "item": "i"}', "line 1: reply: Field required"),
        (
            '\n{"response_id": 5, "item": "i", "reply": "x"}',
            "line 2: response_id: Input should be a valid string (got 5)",
        ),
        (
            '{"response_id": "r", "item": "i", "repy": "x"}',
            "line 1: repy: Extra inputs are not permitted (got 'x'; did ",
        ),
        (
            '{"response_id": "r", "item": "i", "reply": "x"}\n{"response_id": "r", "item": "i", "reply": "y"}',
            "line 2: another reply for r, i, score stands above",
        ),
    ],
)
def test_a_faulty_line_is_named(tmp_path, text, message):
    (tmp_path / "replies.jsonl").write_text(text)
    (tmp_path / "j.yaml").write_text("judge: j\nclient: replay\nreplies: replies.jsonl")
    with pytest.raises(ConfigError) as caught:
        Critic(load_judge(tmp_path / "j.yaml"), secret=b"s", record=print)
    assert str(caught.value).startswith(f"{tmp_path}/replies.jsonl: {message}")


def test_a_file_of_replies_that_is_not_there_is_the_users_error(tmp_path):
    (tmp_path / "j.yaml").write_text("judge: j\nclient: replay\nreplies: gone.jsonl")
    with pytest.raises(ConfigError, match=r"gone\.jsonl: No such file or directory"):
        Critic(load_judge(tmp_path / "j.yaml"), secret=b"s", record=print)


@pytest.fixture(scope="module")
def llmbar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llmbar")
    for part in ("judges", "rubrics"):
        shutil.copytree(LLMBAR / part, folder / part)
    runpy.run_path(str(LLMBAR / "make.py"))["main"](folder)
    return folder


def counted(judge, protocol):
    """The outcomes in the stored file itself, over both orders in which each pair was shown."""
    counts = Counter()
    with gzip.open(LLMBAR / "llmbar_ratings.jsonl.gz", "rt", encoding="utf-8") as file:
        for vote in map(json.loads, file):
            if (vote.get("judge"), vote.get("protocol")) == (judge, protocol):
                for text in (vote["score_1"], vote["score_2"]):
                    if not re.fullmatch(r"\d+", text):
                        counts[Outcome.UNPARSABLE] += 1
                    else:
                        counts[Outcome.OK if int(text) <= 9 else Outcome.OUT_OF_RANGE] += 1
    return {outcome: count // 2 for outcome, count in counts.items()}


@pytest.mark.parametrize(
    ("name", "judge", "protocol", "failed"),
    [
        ("gpt-4", "GPT-4", "Rating", {Outcome.UNPARSABLE: 1}),
        ("gpt-4-norules", "GPT-4", "Rating_NoRules", {Outcome.UNPARSABLE: 1}),
        ("chatgpt", "ChatGPT", "Rating", {Outcome.OUT_OF_RANGE: 2}),
        ("chatgpt-norules", "ChatGPT", "Rating_NoRules", {Outcome.OUT_OF_RANGE: 1}),
    ],
)
def test_stored_ratings_of_llmbar_replay_with_the_outcomes_that_the_file_holds(llmbar, name, judge, protocol, failed):
    rows = read_rows(llmbar / "responses.jsonl")
    (rating,) = load_rubric(llmbar / "rubrics/llmbar.yaml", judges=["rater"]).items
    recorded = []

    async def main():
        config = load_judge(llmbar / "judges" / f"{name}.yaml")
        async with Critic(config, secret=b"s", record=recorded.append) as critic:
            ask = (critic.verdict(rows.questions[r.question_id], r, rating) for r in rows.responses)
            return await asyncio.gather(*ask)

    verdicts = asyncio.run(main())
    counts = Counter(verdict_.outcome for verdict_ in verdicts)
    assert counts == counted(judge, protocol) == {Outcome.OK: 468 - sum(failed.values()), **failed}
    assert len(recorded) == 468
    for given, got in zip(recorded, verdicts, strict=True):
        assert got.score == (int(given["reply"]) / 9 if got.outcome is Outcome.OK else None)
