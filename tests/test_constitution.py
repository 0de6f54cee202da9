"""`grape constitution`: chains of revisions by principles, preferences by the same ones, and what is trained on them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from apprentice import apprentice, ask
from loopback import Answer, JudgeServer, user_text, verdict
from mortal import live, logged
from safetensors.torch import load_file

from grape.constitution import constitution
from grape.errors import ConfigError, GrapeError
from grape.item import Item
from grape.judge.pair import worded
from grape.phases import load_phases
from grape.principles import drawn, folded, frames, request
from grape.rubric import parse_rubric

CREED = """
rubric: letters
category: letters
items:
  - {id: short, criterion: Is short., weight: 1, check: regex, with: {pattern: '^.{0,6}$'}}
  - id: pleasant
    criterion: Is pleasant to read.
    weight: 2
    judge: default
    principle: {critique: "What is unpleasant?", revision: Make it pleasant.}
  - id: shrill
    criterion: Shouts.
    weight: 3
    polarity: undesirable
    judge: default
    principle: {critique: "What shouts?", revision: Lower its voice.}
"""
PLAIN = """
rubric: plain
category: plain
items: [{id: brief, criterion: Is short., check: regex, with: {pattern: '^.{0,4}$'}}]
"""
FRAMES = {
    "critique": "{% block user %}{{ question }} {{ response }} {{ request }}{% endblock %}",
    "revision": "{% block user %}{{ question }} {{ response }} {{ critique }} {{ request }}{% endblock %}",
}
BOTH = re.compile(r"<<<response_A \w+>>>\n(.*?)\n<<<end.*<<<response_B \w+>>>\n(.*?)\n<<<end", re.DOTALL)


def believer(folder: Path, url: str, creed: str = CREED, **sections: object) -> Path:
    """A run of `grape constitution` small enough for tests: two of eight questions are of a category without any."""
    small = {
        "sampling": {"questions": 4, "responses": 2, "max_tokens": 6},
        "supervised": {"rounds": 2, "responses": 2, "optimizer": {"lr": 1e-3, "batch": 4}},
        "feedback": {"reward": "preferences", "pairs": 2, "optimizer": {"lr": 1e-3}, "heldout": {"share": 0.3}},
        "steps": 2,
    }
    path = apprentice(folder, judge=url, **{**small, **sections})
    (folder / "rubrics/letters.yaml").write_text(creed)
    (folder / "rubrics/plain.yaml").write_text(PLAIN)
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    for row in rows[6:]:
        row["category"] = "plain"
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prompts/principle").mkdir(exist_ok=True)
    for name, text in FRAMES.items():
        (folder / f"prompts/principle/{name}.jinja").write_text(text)
    return path


def just(body: dict, number: int) -> Answer | str:
    """A judge whose verdicts, preferences, critiques and revisions are functions of the texts, marks apart."""
    text = re.sub(r"[0-9a-f]{32}", "", user_text(body))
    digits = hashlib.sha256(text.encode()).digest()
    if "What " in text and "Score" not in text and "scale" not in text:
        return f"critique {digits[0]}"
    if "Make it pleasant." in text or "Lower its voice." in text:
        return f"r{digits[1]}"
    if found := BOTH.search(user_text(body)):
        first, second = (hashlib.sha256(one.encode()).digest() for one in found.groups())
        return json.dumps({"reasoning": "as it is", "score": "A" if first > second else "B", "confidence": 0.9})
    return verdict(digits[0] / 255, 0.5 + digits[1] / 510, f"it reads like {digits[2]}")


def run(path: Path, *overrides: str, **options: object):
    return asyncio.run(constitution(path, overrides=overrides, **options))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def preferred(tmp_path_factory):
    """A whole run by way of a preference model."""
    folder = tmp_path_factory.mktemp("preferred")
    with pytest.MonkeyPatch.context() as patch, JudgeServer(just) as server:
        patch.setenv("GRAPE_HOME", str(folder))
        evaluate = {"questions": {"path": str(folder / "questions.jsonl"), "category": "letters"}}
        supervised = {"rounds": 2, "responses": 2, "score": True, "optimizer": {"lr": 1e-3, "batch": 4}}
        path = believer(folder, server.url, evaluate=evaluate, supervised=supervised)
        return folder, run(path)


@pytest.mark.slow
def test_the_whole_chain_is_in_the_log_and_its_last_revisions_are_what_is_taught(preferred):
    folder, done = preferred
    log = folder / "log.duckdb"
    rows = ask(
        log,
        "select v.round, p.step = v.round - 1, c.step = v.round, c.response = v.revision, c.parent_id = v.parent_id, "
        "c.route, p.question_id = v.question_id, v.critique <> '' from revisions v "
        "join responses p on p.run = v.run and p.response_id = v.parent_id "
        "join responses c on c.run = v.run and c.response_id = v.response_id",
    )
    assert sorted(row[0] for row in rows) == [1] * 12 + [2] * 12
    assert {row[1:] for row in rows} == {(True, True, True, True, "improve", True, True)}
    assert (done.chains, done.revised) == (12, 12)
    last = dict(ask(log, "select response_id, revision from revisions where round = 2"))
    own = dict(ask(log, f"select response_id, response from responses where run = '{done.run}' and category = 'plain'"))
    taught = [json.loads(line) for line in (folder / "checkpoints/revised.jsonl").read_text().splitlines()]
    assert {row["response_id"]: row["messages"][-1]["content"] for row in taught} == last | own
    assert len(own) == 2  # where no principle holds, the policy's own response
    assert {item for (item,) in ask(log, "select distinct item from revisions")} == {"pleasant", "shrill"}
    scored = ask(log, f"select step, count(*) from rewards where run = '{done.run}' group by all order by all")
    assert scored == [(0, 14), (1, 12), (2, 12)]


@pytest.mark.slow
def test_preferences_are_soft_labels_in_both_orders_and_the_model_of_them_is_the_item_of_the_rl_phase(preferred):
    folder, done = preferred
    log = folder / "log.duckdb"
    rows = ask(log, "select run, source, item, probability, consistent, json_array_length(calls) from preferences")
    assert {row[0] for row in rows} == {f"{done.run}.feedback"}
    assert {(row[1], round(row[3], 9), row[4], row[5]) for row in rows} == {("judge", 0.9, True, 2)}
    assert len(rows) == done.preferences == 12
    assert {row[2] for row in rows} == {"pleasant", "shrill"}
    taught = [json.loads(line) for line in (folder / "checkpoints/preferences.jsonl").read_text().splitlines()]
    texts = dict(ask(log, f"select response_id, response from responses where run = '{done.run}.feedback'"))
    pairs = ask(log, "select chosen_id, rejected_id from preferences order by step, rowid")
    assert [(row["chosen"], row["rejected"]) for row in taught] == [(texts[a], texts[b]) for a, b in pairs]
    sha = {text: hashlib.sha256(text.encode()).digest() for text in texts.values()}
    assert all(sha[row["chosen"]] > sha[row["rejected"]] for row in taught)  # as the judge prefers
    rubric = yaml.safe_load((folder / "checkpoints/rubrics/letters.yaml").read_text())
    assert [(item["id"], item["weight"]) for item in rubric["items"]] == [("short", 1), ("constitution", 5)]
    assert rubric["items"][1]["reward_model"] == str(done.model.folder)
    items = ask(log, f"select distinct category, item from verdicts where run = '{done.run}.policy'")
    assert sorted(items) == [("letters", "constitution"), ("letters", "short"), ("plain", "brief")]
    values = ask(log, f"select score from verdicts where run = '{done.run}.policy' and item = 'constitution'")
    assert all(0 < score < 1 for (score,) in values)  # calibrated by the spread of what it learned from


@pytest.mark.slow
def test_every_phase_has_its_name_in_the_log_and_held_out_results(preferred):
    folder, done = preferred
    kinds = dict(ask(folder / "log.duckdb", "select run, kind from runs"))
    assert {name.removeprefix(done.run): kind for name, kind in kinds.items()} == {
        "": "constitution", ".heldout": "heldout", ".feedback": "feedback", ".supervised": "sft",
        ".preference-model": "reward-model", ".policy": "train",
    }  # fmt: skip
    assert list(done.heldout) == [0, 1, 2]
    means = ask(
        folder / "log.duckdb",
        f"select step, avg(score) from verdicts where run = '{done.run}.heldout' and item = 'pleasant' group by all "
        "order by all",
    )
    assert [mean for _, mean in means] == pytest.approx(
        [one["score/letters/pleasant"] for one in done.heldout.values()]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "items"),
    [("principles", {"short", "pleasant", "shrill", "brief"}), ("judge", {"short", "constitution", "brief"})],
)
def test_the_judge_may_be_the_reward_by_one_item_or_by_each_principle(home, reward, items):
    with JudgeServer(just) as server:
        done = run(believer(home, server.url), "supervised=null", f"feedback={{reward: {reward}}}")
        asked = [user_text(body) for body in server.bodies]
    log = home / "log.duckdb"
    assert {item for (item,) in ask(log, f"select item from verdicts where run = '{done.run}.policy'")} == items
    assert (done.chains, done.supervised, done.model) == (0, None, None)
    if reward == "judge":
        assert all("- Is pleasant to read.\n- The response with less of this fault is better: Shouts." in text
                   for text in asked)  # fmt: skip
        ((weight,),) = ask(log, f"select distinct weight from verdicts where run = '{done.run}.policy' "
                                "and item = 'constitution'")  # fmt: skip
        assert weight == pytest.approx(5 / 6)


@pytest.mark.slow
def test_a_judge_may_criticise_and_revise_between_marks_and_its_failures_leave_a_response_as_it_was(home, caplog):
    def strict(body, number):
        text = user_text(body)
        if "Write 3." in text and "What " in text:
            return Answer(status=400, body=b"{}")
        if "Write 4." in text and ("Make it" in text or "Lower its" in text):
            return re.search(r"<<<response \w+>>>", text)[0]
        if "Write 5." in text and ("Make it" in text or "Lower its" in text):
            return "I'm sorry, but I can't help with that."
        return just(body, number)

    supervised = {"rounds": 1, "critic": "default", "reviser": "default", "optimizer": {"lr": 1e-3}}
    with JudgeServer(strict) as server, caplog.at_level(logging.WARNING, "grape"):
        done = run(believer(home, server.url, supervised=supervised), "feedback=null")
        asked = [user_text(body) for body in server.bodies]
    log = home / "log.duckdb"
    revised = dict(ask(log, "select question_id, revision from revisions where revision is not null"))
    failed = ask(
        log, "select question_id, critique is null, response_id from revisions where revision is null order by 1"
    )
    assert failed == [("q3", True, None), ("q4", False, None)]
    assert revised.keys() == {"q0", "q1", "q2", "q5"}
    assert revised["q5"] == "I'm sorry, but I can't help with that."  # to decline is a response too
    assert (done.chains, done.revised) == (6, 4)
    assert "2 of 6 responses stay as they were: 1 critique: transport, 1 revision: unparsable" in caplog.text
    assert all("<<<question " in text and "<<<response " in text for text in asked)
    assert dict(ask(log, "select purpose, count(*) from judge_calls group by all")) == {"critique": 6, "revision": 5}
    for critique, revision in ask(log, "select critique, revision from revisions where revision is not null"):
        assert critique.startswith("critique ")
        assert revision.startswith(("r", "I'm"))
    taught = [json.loads(line) for line in (home / "checkpoints/revised.jsonl").read_text().splitlines()]
    assert {row["question_id"] for row in taught} == {"q0", "q1", "q2", "q5", "q6", "q7"}


@pytest.mark.slow
def test_a_spent_budget_stops_in_one_line_and_a_larger_one_goes_on(home):
    supervised = {"rounds": 1, "critic": "default", "reviser": "default", "optimizer": {"lr": 1e-3}}
    with JudgeServer(just) as server:
        path = believer(home, server.url, supervised=supervised)
        judge = json.loads((home / "judge.yaml").read_text())
        (home / "judge.yaml").write_text(json.dumps({**judge, "budget": {"tokens": 600}}))
        with pytest.raises(GrapeError, match="budget"):
            run(path, "feedback=null")
        asked = len(server.bodies)
        assert 5 <= asked < 12
        (home / "judge.yaml").write_text(json.dumps(judge))
        done = run(path, "feedback=null", resume=True)
        assert len(server.bodies) == 12  # what was answered is not asked again
    assert (done.chains, done.revised) == (6, 6)


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_ends_as_one_that_never_was(tmp_path, monkeypatch):
    deaths = [
        ("reported", "revision 2"), ("reported", "revision 5"), ("reported", "supervised 2"), ("reported", "feedback 1"),
        ("reported", "preference-model 1"), ("reported", "training 1"),
    ]  # fmt: skip
    ends = {}
    with JudgeServer(just) as server:
        for name in ("whole", "killed"):
            (tmp_path / name).mkdir()
            monkeypatch.setenv("GRAPE_HOME", str(tmp_path / name))
            path = believer(tmp_path / name, server.url, checkpoint={"every": 1, "keep": 9})
            text = path.read_text().replace(f"{tmp_path / name}/", "")
            path.write_text(text)
            if name == "killed":
                live(tmp_path / name, verb="constitution", death=deaths[0])
                for death in deaths[1:]:
                    live(tmp_path / name, verb="constitution", death=death, resume=True)
            live(tmp_path / name, verb="constitution", resume=name == "killed")
            ends[name] = tmp_path / name
    for phase in ("supervised", "preference-model", "policy"):
        last = [sorted((end / f"checkpoints/{phase}").glob("step-*"))[-1] for end in ends.values()]
        one, other = (load_file(folder / "model.safetensors") for folder in last)
        assert all(one[key].equal(other[key]) for key in one), phase
    rows = [logged(end / "log.duckdb") for end in ends.values()]
    for table in ("revisions", "preferences", "rewards"):
        assert len(rows[0][table]) == len(rows[1][table]) > 0
    assert (ends["whole"] / "checkpoints/revised.jsonl").read_text() == (
        ends["killed"] / "checkpoints/revised.jsonl"
    ).read_text()
    answers = [ask(end / "log.duckdb", "select step, response_id, response from responses where run not like '%.%' "
                   "order by all") for end in ends.values()]  # fmt: skip
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_adapters_of_the_supervised_phase_are_those_that_the_rl_phase_goes_on_with(home):
    with JudgeServer(just) as server:
        done = run(believer(home, server.url, policy={"lora": {"r": 2}}, feedback={"reward": "principles"}))
    first, last = (
        load_file(Path(folder) / "adapter_model.safetensors") for folder in (done.supervised.folder, done.policy)
    )
    assert first.keys() == last.keys()
    assert any(not first[name].equal(last[name]) for name in first)


@pytest.mark.slow
def test_what_changed_since_is_told_and_another_run_needs_a_folder_of_its_own(home):
    with JudgeServer(just) as server:
        path = believer(home, server.url)
        run(path, "feedback=null")
        with pytest.raises(ConfigError, match=r"holds run .* already: --resume goes on with it"):
            run(path, "feedback=null")
        with pytest.raises(ConfigError, match=r"changed since run .* began: supervised; --allow-changes"):
            run(path, "feedback=null", "supervised.rounds=3", resume=True)
        (home / "prompts/principle/critique.jinja").write_text(FRAMES["revision"].replace("{{ critique }}", ""))
        with pytest.raises(ConfigError, match="began: prompt principle/critique; --allow-changes"):
            run(path, "feedback=null", resume=True)


@pytest.mark.slow
def test_a_principle_may_have_a_judge_of_its_own_and_a_question_items_of_its_own(home):
    with JudgeServer(just) as server:
        path = believer(home, server.url, CREED.replace("weight: 3", "weight: 3\n    judge: other", 1).replace(
            "polarity: undesirable\n    judge: default", "polarity: undesirable"), steps=2,
            supervised={"rounds": 1, "critic": "wise", "reviser": "wise", "optimizer": {"lr": 1e-3}})  # fmt: skip
        rows = [json.loads(line) for line in (home / "questions.jsonl").read_text().splitlines()]
        rows[0]["items"] = [{"id": "own", "criterion": "Is odd.", "judge": "mine"}]
        (home / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        names = ("default", "other", "wise", "mine")
        for name in names:
            judge = json.loads((home / "judge.yaml").read_text())
            (home / f"{name}.yaml").write_text(json.dumps({**judge, "judge": name}))
        judges = "judges={" + ", ".join(f"{name}: {home / name}.yaml" for name in names) + "}"
        run(path, judges, "feedback={reward: preferences, optimizer: {lr: 0.001}}")
        asked = dict(ask(home / "log.duckdb", "select judge, count(*) from judge_calls group by all"))
        run(path, judges, "feedback={reward: principles}", f"checkpoint.dir={home}/second")
    assert asked.keys() == set(names)
    with_own = "select distinct run[-7:], item from verdicts where run like '%.policy' and item = 'own'"
    assert ask(home / "log.duckdb", with_own) == [(".policy", "own")]


@pytest.mark.slow
def test_where_a_critic_cannot_be_read_its_fallback_criticises(home):
    def mute(body, number):
        return "" if body["model"] == "mute" else just(body, number)

    supervised = {"rounds": 1, "critic": "first", "reviser": "default", "optimizer": {"lr": 1e-3}}
    with JudgeServer(mute) as server:
        path = believer(home, server.url, supervised=supervised)
        judge = json.loads((home / "judge.yaml").read_text())
        (home / "first.yaml").write_text(json.dumps({**judge, "judge": "first", "model": "mute", "fallback": "second"}))
        (home / "second.yaml").write_text(json.dumps({**judge, "judge": "second"}))
        files = {"default": "judge", "first": "first", "second": "second"}
        judges = ", ".join(f"{name}: {home / file}.yaml" for name, file in files.items())
        done = run(path, "feedback=null", f"judges={{{judges}}}")
    assert done.revised == 6
    calls = "select judge, purpose, count(*) from judge_calls group by all order by all"
    assert ask(home / "log.duckdb", calls) == [
        ("default", "revision", 6), ("first", "critique", 6), ("second", "critique", 6),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_revision_too_long_for_the_policy_is_left_out_of_what_is_taught(home, caplog):
    def long(body, number):
        text = user_text(body)
        return (
            "word " * 2000 if "Write 3." in text and ("Make it" in text or "Lower its" in text) else just(body, number)
        )

    supervised = {"rounds": 1, "critic": "default", "reviser": "default", "optimizer": {"lr": 1e-3}}
    with JudgeServer(long) as server, caplog.at_level(logging.WARNING):
        done = run(believer(home, server.url, supervised=supervised), "feedback=null")
    assert done.revised == 6
    assert "tokens; there is room for 512" in caplog.text


@pytest.mark.slow
def test_responses_are_taught_under_the_prompt_that_they_were_drawn_under_and_none_that_was_cut(home):
    generate = home / "prompts/generate/calm.jinja"
    generate.parent.mkdir(parents=True)
    generate.write_text("Be calm.")
    with JudgeServer(just) as server:
        supervised = {"rounds": 1, "critic": "default", "reviser": "default", "helpful": 1, "optimizer": {"lr": 1e-3}}
        path = believer(home, server.url, supervised=supervised, truncation={"how": "mask"})
        (home / "rubrics/letters.yaml").write_text(
            CREED.replace("category: letters", "category: letters\ngenerate: calm")
        )
        run(path, "feedback=null")
    rows = [json.loads(line) for line in (home / "checkpoints/revised.jsonl").read_text().splitlines()]
    cut = {
        name for (name,) in ask(home / "log.duckdb", "select response_id from responses where finish_reason = 'length'")
    }
    assert {row["messages"][0]["content"] for row in rows if row["category"] == "letters"} == {"Be calm."}
    assert not cut & {row["response_id"] for row in rows}
    assert any(name.startswith(("q6", "q7")) for name in cut)  # a random policy seldom stops of itself


def rubric(**item: object):
    items = yaml.safe_load(CREED)["items"]
    return parse_rubric(
        {"rubric": "letters", "items": [*items, item] if item else items}, "creed.yaml", judges=["default"]
    )


def test_principles_are_folded_into_one_item_with_their_weight_and_their_conditions():
    when = {"applies_when": {"harmful": True}}
    more = {"id": "calm", "criterion": "Is calm.", "weight": 4, "judge": "default", **when}
    made = folded(rubric(**more, principle={"critique": "a", "revision": "b"}), {"judge": "wise", "scale": "unit"})
    assert [(item["id"], item["weight"], item.get("applies_when")) for item in made["items"]] == [
        ("short", 1, None), ("constitution", 5, None), ("constitution-2", 4, {"harmful": True}),
    ]  # fmt: skip
    assert made["items"][1]["criterion"].splitlines()[1:] == [
        "- Is pleasant to read.", "- The response with less of this fault is better: Shouts.",
    ]  # fmt: skip
    parse_rubric(made, "folded", judges=["wise"])
    taken = folded(rubric(id="constitution", criterion="Is there.", check="regex", **{"with": {"pattern": "."}}),
                   {"judge": "wise"})  # fmt: skip
    assert [item["id"] for item in taken["items"]] == ["short", "constitution", "constitution-2"]


def test_a_principle_within_a_group_cannot_be_folded():
    inner = {"id": "calm", "criterion": "Is calm.", "judge": "default", "principle": {"critique": "a", "revision": "b"}}
    with pytest.raises(ConfigError, match=r"creed.yaml: item 'manner' has principles within it"):
        folded(rubric(id="manner", items=[inner]), {"judge": "default"})


def test_a_principle_with_a_gate_cannot_be_folded_and_ids_within_groups_are_taken():
    gated = {"id": "calm", "criterion": "Is calm.", "judge": "default", "gate": {"at_least": 0.5}}
    with pytest.raises(ConfigError, match=r"creed.yaml: item 'calm' is a principle with a gate"):
        folded(rubric(**gated, principle={"critique": "a", "revision": "b"}), {"judge": "default"})
    inner = {"id": "constitution", "criterion": "Is calm.", "judge": "default"}
    made = folded(rubric(id="manner", items=[inner]), {"judge": "default"}, ["constitution-2"])
    assert [item["id"] for item in made["items"]] == ["short", "manner", "constitution-3"]


def test_a_principle_belongs_to_a_leaf_and_has_both_texts():
    with pytest.raises(ConfigError, match=r"creed.yaml: items.3.principle.revision: Field required"):
        rubric(id="calm", criterion="Is calm.", judge="default", principle={"critique": "a"})
    with pytest.raises(ConfigError, match="'principle' does not go with items"):
        rubric(id="manner", items=[{"id": "calm", "check": "exact"}], principle={"critique": "a", "revision": "b"})


def test_an_undesirable_principle_is_compared_by_having_less_of_it():
    assert worded("Shouts.", undesirable=True) == "The response with less of this fault is better: Shouts."
    assert worded("Is calm.", undesirable=False) == "Is calm."


def test_the_shipped_frames_hold_every_text_and_name_the_marks_only_where_there_are_any():
    item = Item.model_validate({"id": "calm", "criterion": "Is calm.", "judge": "j",
                                "principle": {"critique": "Find noise.", "revision": "Calm it."}})  # fmt: skip
    texts = {"question": "Q?", "response": "R {{ 7 * 7 }}", "critique": "C!"}
    for step, wanted in (("critique", "Find noise."), ("revision", "Calm it.")):
        shown = {name: text for name, text in texts.items() if step == "revision" or name != "critique"}
        for mark in (None, lambda name, text: f"<<<{name}>>>{text}"):
            system, user = (message["content"] for message in request(frames()[step], item, step, shown, mark))
            assert wanted in user
            assert all((mark(name, text) if mark else text) in user for name, text in shown.items())
            assert ("<<<response CODE>>>" in system) == (mark is not None)


def test_which_principle_is_drawn_depends_on_the_seed_alone_and_each_is_as_likely(tmp_path):
    from grape.plan import plan_question
    from grape.rows import read_rows

    rows = read_rows([{"question_id": "q", "category": "letters", "question": "Write.", "response": "a"}])
    plan = plan_question(rows, "q", {"letters": rubric()})
    names = [drawn(plan, 0, "principle", 1, f"q-0-{number}").id for number in range(400)]
    assert names == [drawn(plan, 0, "principle", 1, f"q-0-{number}").id for number in range(400)]
    assert set(names) == {"pleasant", "shrill"}
    assert 160 <= names.count("shrill") <= 240


@pytest.mark.parametrize(
    ("sections", "message"),
    [({"feedback": {"reward": "judge", "pairs": 2}}, "feedback.pairs: does not go with reward: judge"),
     ({"feedback": {"reward": "principles", "judge": "default"}}, "feedback.judge: does not go with reward: principles"),
     ({"feedback": {"clamp": 0.4}}, "feedback.clamp: "),
     
     ({"checkpoint": None}, "checkpoint: Field required"),
     ({"policy": {"lora": {}}}, "feedback.policy: with policy.lora it is needed"),
     ({"feedback": {"policy": {"model": "m", "shard": True}}}, "feedback.policy.shard: is for grape train"),
     ({"supervised": {"round": 2}}, "supervised.round: Extra inputs are not permitted")],
)  # fmt: skip
def test_what_the_file_cannot_say_is_one_line(tmp_path, sections, message):
    with pytest.raises(ConfigError) as error:
        load_phases(believer(tmp_path, "http://127.0.0.1:9/v1", **sections))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_without_any_phase_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"feedback: neither supervised nor feedback is there"):
        load_phases(believer(tmp_path, "http://127.0.0.1:9/v1"), ["supervised=null", "feedback=null"])


@pytest.mark.parametrize(
    ("creed", "sections", "message"),
    [(PLAIN.replace("plain", "letters"), {}, "no item has a principle that holds for a question of"),
     (CREED.replace("weight: 2\n    judge: default", "check: exact"), {}, "no judge is asked about the principle 'pleasant'"),
     (CREED, {"supervised": {"critic": "nobody"}}, "the run: no judge named 'nobody'"),
     (CREED, {"supervised": {"mix": {"path": "nothing.jsonl"}}}, "nothing.jsonl: No such file"),
     (CREED, {"feedback": {"policy": {"model": "./nothing"}}}, "feedback.policy.model: ./nothing: no such folder"),
     (CREED, {"sampling": {"questions": 9}}, "sampling.questions"),
     (CREED.replace("weight: 3", "applies_when: {has: nothing}").replace("weight: 2\n    judge: default", "check: exact"),
      {"feedback": {"reward": "judge"}}, "feedback.judge: is needed: the principles have None")],
)  # fmt: skip
def test_what_the_phases_cannot_work_with_is_one_line_before_any_work(home, creed, sections, message):
    with pytest.raises(ConfigError) as error:
        run(believer(home, "http://127.0.0.1:9/v1", creed, **sections))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (home / "checkpoints").exists()
    assert not (home / "log.duckdb").exists()


def test_the_help_says_what_a_newcomer_needs():
    command = [str(Path(sys.executable).with_name("grape")), "constitution", "--help"]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    for word in ("docs/constitution.md", "supervised", "feedback", "--resume", "principle: {critique, revision}"):
        assert word in " ".join(out.stdout.split())
