"""The improve route: what is shown again, what never is, and how often."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grape.batch import Judged, Settled, settle
from grape.checkers.text import exact
from grape.config import ImproveConfig
from grape.errors import ConfigError
from grape.hidden import Hidden, hidden
from grape.improve import (
    Previous,
    improve_messages,
    improve_prompt,
    pick,
    pick_other,
    previous_groups,
    previous_of,
    routes,
)
from grape.log import Log
from grape.plan import Plan, plan_rows
from grape.records import reward_row, verdict_rows
from grape.rows import read_rows
from grape.rubric import Rubric, parse_rubric
from grape.types import Outcome, Response, Verdict

NOW = datetime(2026, 1, 1, tzinfo=UTC)
JUDGED = {"criterion": "Is kind.", "judge": "default"}


def rubric(*items: dict, **more) -> Rubric:
    return parse_rubric({"rubric": "r", "items": list(items), **more}, "f.yaml")


def plans(rubric: Rubric, *rows: dict) -> dict[str, Plan]:
    given = [{"question_id": "q", "category": "r", "question": "Why?", "response": "", **row} for row in rows or ({},)]
    return plan_rows(read_rows(given), {"r": rubric})


def judged(plan: Plan, text: str = "Because.", name: str = "a", **verdicts: dict | Outcome) -> Judged:
    """A response with verdicts by item (dashes as underscores); those not named score 0.5."""
    found = {}
    for item in plan.leaves:
        said = verdicts.get(item.id.replace("-", "_"), {})
        if isinstance(said, Outcome):
            found[item.id] = Verdict(item=item.id, outcome=said, detail="broke", reasoning="half a word")
        else:
            found[item.id] = Verdict(item=item.id, outcome=Outcome.OK, **{"score": 0.5, "confidence": 1.0, **said})
    response = Response(response_id=name, question_id=plan.question.question_id, text=text)
    return Judged(response=response, plan=plan, verdicts=found)


def previous(plan: Plan, *arguments: str, also: tuple[str, ...] = (), **verdicts: dict | Outcome) -> Previous:
    one = judged(plan, *arguments, **verdicts)
    return previous_of(one, settle([one])[0], 3, also=also)


def shown(plan: Plan, one: Previous, **options) -> str:
    """The whole prompt that asks for a better response."""
    messages = improve_messages(plan.question, one, improve_prompt(plan.rubric), **options)
    assert [message["role"] for message in messages] == ["system", "user"]
    return "\n\n".join(message["content"] for message in messages)


def assessment(text: str) -> str:
    return text.partition("# Assessment\n")[2].partition("\n# Your task")[0]


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_costliest_items_come_first_with_what_was_said_of_them():
    items = [
        {"id": "small", **JUDGED, "weight": 1},
        {"id": "done", "criterion": "Is done.", "judge": "default", "weight": 6},
        {"id": "rude", "criterion": "Is rude.", "judge": "default", "weight": 3, "polarity": "undesirable"},
    ]
    plan = plans(rubric(*items))["q"]
    one = previous(
        plan,
        small={"score": 0.0, "reasoning": "Cold."},
        done={"score": 0.9, "reasoning": "Nearly.", "critique": "A page of praise."},
        rude={"score": 1.0, "reasoning": "It shouts."},
    )
    assert [(item.id, item.weight, round(item.merit, 9)) for item in one.items] == [
        ("small", 0.1, 0.0), ("done", 0.6, 0.9), ("rude", 0.3, 0.0)
    ]  # fmt: skip
    text = shown(plan, one)
    assert text.count("Because.") == text.count("Why?") == 1
    expected = """
        ## rude: 0.00 What is asked of a response: Is rude. Reason for the score: It shouts.
        ## small: 0.00 What is asked of a response: Is kind. Reason for the score: Cold.
        ## done: 0.90 What is asked of a response: Is done. Critique: A page of praise. Reason for the score: Nearly.
        """
    assert assessment(text).split() == expected.split()


def test_only_items_with_a_score_that_share_theirs_are_shown():
    items = [
        {"id": "open", **JUDGED},
        {"id": "closed", **JUDGED, "share_in_improve": False},
        {"id": "truth", **JUDGED, "reference": True},
        {"id": "answer", "check": "exact"},
        {"id": "broken", **JUDGED},
        {"id": "other", **JUDGED, "applies_when": {"has": "picture"}},
    ]
    one = previous(plans(rubric(*items), {"reference": "Hm"})["q"], broken=Outcome.TIMEOUT, other=Outcome.SKIPPED)
    assert [item.id for item in one.items] == ["open"]


def test_template_syntax_in_a_response_or_critique_is_shown_as_it_stands():
    plan = plans(rubric({"id": "a", **JUDGED}))["q"]
    text = shown(plan, previous(plan, "{{ items }}", a={"reasoning": "{% for x in y %} {{ question }}"}))
    assert "# Earlier response\n{{ items }}\n" in text
    assert "{% for x in y %} {{ question }}" in text


def test_the_assessment_is_cut_to_its_characters_from_the_end():
    plan = plans(rubric({"id": "a", **JUDGED, "weight": 2}, {"id": "b", **JUDGED}))["q"]
    one = previous(plan, a={"reasoning": "x" * 500, "score": 0.0}, b={"reasoning": "y" * 500, "score": 0.0})
    whole, cut, short, none = (shown(plan, one, max_chars=n) for n in (1018, 1017, 100, 8))
    assert (whole.count("x"), whole.count("y")) == (cut.count("x"), cut.count("y") + 2)
    assert cut.count("…") == 1
    assert "x" * 90 + "…" in short
    assert "x" * 91 not in short
    assert "## b" not in short
    assert assessment(none).strip().startswith("No item-by-item assessment is available.")


def test_the_controls_show_another_questions_assessment_or_none():
    both = plans(rubric({"id": "a", **JUDGED}), {}, {"question_id": "p", "question": "How?", "reference": "Slowly."})
    own = previous(both["q"], a={"reasoning": "Mine."})
    other = previous(both["p"], "Thus.", "b", a={"reasoning": "Theirs."})
    text = {
        control: shown(both["q"], own, control=control, other=other if control == "shuffled" else None)
        for control in ("own", "shuffled", "none")
    }
    assert {control: ("Mine." in said, "Theirs." in said) for control, said in text.items()} == {
        "own": (True, False), "shuffled": (False, True), "none": (False, False)
    }  # fmt: skip
    for said in text.values():
        assert "# Question\nWhy?" in said
        assert "# Earlier response\nBecause." in said
        assert "Thus." not in said


def test_a_prompt_that_asks_for_what_is_hidden_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "prompts" / "improve"
    folder.mkdir(parents=True)
    (folder / "leaky.jinja").write_text("{{ question }} {{ response }} {{ items }} {{ reference }}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"leaky\.jinja: no variable 'reference'; known: items, question, response"):
        improve_prompt(rubric({"id": "a", **JUDGED}, improve="leaky"))


# --- what never is ----------------------------------------------------------------------------------------------------

CANARIES = {
    "reference": "canary-REFERENCE",
    "tests": "assert canary_tests(2) == 7",
    "entry_point": "canary_entry",
    "edge": ["canary-EDGE", "canary 2"],
    "number": 987654.25,
    "sft": "canary-SFT",
    "notes": "a long remark that no checker is given: canary-NOTES",
}
FOUND = ("canary", "987654")
ITEMS = [
    {"id": "kind", **JUDGED},
    {"id": "truth", **JUDGED, "reference": True, "critique": "prose", "share_in_improve": True},
    {"id": "answer", "check": "exact", "share_in_improve": True},
    {"id": "edge", "check": "contains", "with": {"text": {"field": "edge"}}, "share_in_improve": True},
    {"id": "number", "check": "numeric", "with": {"reference": {"field": "number"}}, "share_in_improve": True},
    {"id": "literal", "check": "exact", "with": {"reference": "canary-LITERAL"}},
    {"id": "code", "check": "code", "share_in_improve": True},
]


def leaky() -> tuple[Plan, str]:
    """A plan full of canaries, and a text that quotes every one in a sentence of its own."""
    own = {name: CANARIES[name] for name in ("reference", "tests", "entry_point")}
    row = {**own, "metadata": {name: value for name, value in CANARIES.items() if name not in own}}
    quotes = [*CANARIES.values(), *CANARIES["edge"], "canary-LITERAL"]
    text = " ".join(f"It should have said {quote}, no?" for quote in quotes if not isinstance(quote, list))
    return plans(rubric(*ITEMS), row)["q"], text


def test_no_improvement_prompt_holds_the_reference_the_tests_or_what_checkers_are_given():
    plan, quotes = leaky()
    said = {"reasoning": f"Fair. {quotes} Warm.", "critique": f"{quotes}\nBe brief."}
    names = [item.id for item in plan.leaves]
    own = previous(plan, **dict.fromkeys(names, said), also=("sft",))
    assert [item.id for item in own.items] == names
    text = shown(plan, own)
    assert [mark for mark in FOUND if mark in text.casefold()] == []
    assert "Fair. Warm." in text
    assert "Be brief." in text
    assert (text.count("Fair."), text.count("Be brief.")) == (1, 1)  # who saw the truth shows a score without a word
    assert "## truth: 0.50" in text


def test_the_same_holds_of_responses_from_the_log_and_of_the_shuffled_control(tmp_path):
    plan, quotes = leaky()
    bare = plans(rubric({"id": "kind", **JUDGED}))["q"]
    said = {"kind": {"reasoning": f"Fair. {quotes}", "critique": quotes}}
    with Log(tmp_path / "log.duckdb") as log:
        store(log, 1, [judged(plan, **said)])
        (own,) = previous_groups(log, "r", {"q": plan}, before=2, also=("sft",))["q"]
        assert [mark for mark in FOUND if mark in shown(plan, own).casefold()] == []
    other = previous(bare, **said)
    assert "canary" in shown(bare, other)  # of another question, to which it is no secret
    text = shown(plan, own, control="shuffled", other=other)
    assert [mark for mark in FOUND if mark in text.casefold()] == []
    assert "Fair." in text


@pytest.mark.parametrize(
    ("reference", "said", "rest"),
    [
        ("42", "Nearly. The answer is 42. Look again.", "Nearly. Look again."),
        ("4", "It scores 0.4 of 14, x4. Not 4!", "It scores 0.4 of 14, x4."),
        ("A", "A fair try, a good one. The answer is A", ""),
        ("A", "But a fair try. The answer is (A).", "But a fair try."),
        ("Paris", "Good.\nIt is PARIS\nin fact", "Good.\nin fact"),
        ("1,250 dollars", "It is 1250\ndollars here. Yes.", ""),
        ("x.\nShe sold 48 + 24.\n#### 72", "She sold 48 (+24). So it is $72. Fine.", "Fine."),
        ("東京", "答えは東京です。\nTry again.", "Try again."),
        ("++", "The operator is ++. Think.", "Think."),
        ("one two three four five six seven eight nine ten", "Say three, four, five six seven eight nine TEN.", ""),
        ("one two three four five six seven eight nine ten", "Say four five six seven eight nine ten.", None),
        ("swordfish-77", "See preswordfish-77post.", ""),
        ("else:\n  return 0", "What else: nothing.", None),
        ("yes", "Yes is right. Think.", "Think."),
        ("caf\u00e9 42", "Think. It is cafe\u0301 \uff14\uff12.", "Think."),
    ],
)
def test_sentences_that_quote_the_reference_are_left_out_whole(reference, said, rest):
    plan = plans(rubric({"id": "a", **JUDGED}), {"reference": reference})["q"]
    (item,) = previous(plan, a={"reasoning": said}).items
    assert item.reasoning == (said if rest is None else rest)


def test_what_the_question_itself_gives_away_is_no_secret_but_the_reference_always_is():
    row = {
        "question": "Write add(a, b), so that add(1, 2) == 3. Is it A or B?", "reference": "B", "entry_point": "add",
        "tests": "assert add(1, 2) == 3\nassert add(5, 6) == 11",
    }  # fmt: skip
    secret = hidden(plans(rubric({"id": "a", **JUDGED}), row)["q"])
    assert secret.without("Define add. add(1, 2) == 3 holds.") == "Define add. add(1, 2) == 3 holds."
    assert secret.without("Define add. assert add(5, 6) == 11 fails. It is B.") == "Define add."


WORDS = st.lists(st.sampled_from(["a", "A", "is", "Long", "words", "7", "0.5", "x_y", "été", "+", "so."]), max_size=12)


@given(WORDS.filter(any), WORDS, WORDS)
def test_what_is_left_of_a_text_never_quotes_and_a_quotation_is_always_seen(secret, before, after):
    what = Hidden.of([" ".join(secret)])
    text = " ".join([*before, *secret, *after])
    assert what.quoted_in(text)
    assert not what.quoted_in(what.without(text))


def test_the_shipped_exact_checker_takes_its_reference_from_the_row():
    assert exact.__kwdefaults__["reference"].field == "reference"  # what `literal` above relies on


# --- from the log and within the step ---------------------------------------------------------------------------------


def store(log: Log, step: int, batch: list[Judged], route: str = "fresh", run: str = "r") -> list[Settled]:
    settled = settle(batch)
    log.append(
        responses=[
            {"run": run, "step": step, "question_id": one.plan.question.question_id, "route": route,
             "response_id": one.response.response_id, "response": one.response.text}
            for one in batch
        ],
        verdicts=[row for one, got in zip(batch, settled, strict=True)
                  for row in verdict_rows(run, step, one, got, {}, NOW)],
        rewards=[reward_row(run, step, one, got, "group_mean", "none", NOW)
                 for one, got in zip(batch, settled, strict=True)],
    )  # fmt: skip
    return settled


@pytest.fixture
def log(tmp_path: Path):
    with Log(tmp_path / "log.duckdb") as log:
        yield log


def test_a_response_is_the_same_from_the_log_as_within_its_step(log):
    items = [
        {"id": "a", **JUDGED, "weight": 3}, {"id": "b", **JUDGED, "polarity": "undesirable"},
        {"id": "c", "check": "exact", "share_in_improve": True}, {"id": "d", **JUDGED, "reference": True},
    ]  # fmt: skip
    both = plans(rubric(*items), {"reference": "forty-two"}, {"question_id": "p", "reference": "7"})
    batch = [
        judged(
            both["q"], "Lone \ud800 and 日本\u2028.", "1", a={"score": 0.1 + 0.2, "reasoning": "Not forty-two! \udfff"}
        ),
        judged(both["q"], "", "2", a=Outcome.REFUSED, b={"critique": "", "score": 1 / 3}),
        judged(both["p"], "7", "1", **dict.fromkeys("abcd", Outcome.TIMEOUT)),
    ]
    settled = store(log, 4, batch)
    found = previous_groups(log, "r", both, before=5)
    within = [previous_of(one, got, 4) for one, got in zip(batch, settled, strict=True)]
    assert found == {"q": tuple(within[:2]), "p": tuple(within[2:])}
    assert within[0].text == "Lone \ufffd and 日本\u2028."
    assert within[0].items[0].reasoning == "\ufffd"
    assert (within[0].weighted is None, within[2].weighted, within[2].items) == (False, None, ())


def test_the_last_step_before_this_one_counts_and_only_what_the_policy_wrote(log):
    both = plans(rubric({"id": "a", **JUDGED}), {}, {"question_id": "p"}, {"question_id": "new"})
    for step in (1, 2, 5):
        store(log, step, [judged(both["q"], f"fresh {step}", f"f{step}")])
        store(log, step, [judged(both["q"], f"better {step}", f"i{step}")], "improve")
        store(log, step, [judged(both["q"], "by hand", f"s{step}")], "sft")
    store(log, 1, [judged(both["p"], "old", "p1")])
    store(log, 3, [judged(both["p"], "by hand", "p3")], "given")
    store(log, 4, [judged(both["p"], "elsewhere", "p4")], run="r.heldout")
    groups = previous_groups(log, "r", both, before=5)
    assert {name: [(one.step, one.text) for one in group] for name, group in groups.items()} == {
        "q": [(2, "fresh 2"), (2, "better 2")],
        "p": [(1, "old")],
    }
    assert [len(one.items) for one in groups["q"]] == [1, 1]
    assert previous_groups(log, "r", {"p": both["p"]}, before=1) == {}


def test_verdicts_by_another_version_of_the_rubric_are_not_shown(log):
    (old,), (new,) = (plans(rubric({"id": "a", **JUDGED})).values() for _ in range(2))
    new.rubric._hash = "edited"
    store(log, 1, [judged(old)])
    assert previous_groups(log, "r", {"q": new}, before=2)["q"][0].items == ()
    assert len(previous_groups(log, "r", {"q": old}, before=2)["q"][0].items) == 1


# --- which, and how often ---------------------------------------------------------------------------------------------


def scored(*weighted: float | None) -> list[Previous]:
    nothing = Hidden(runs=frozenset(), strings=frozenset())
    return [
        Previous(response_id=str(n), question_id="q", category="r", step=1, text="", weighted=value, items=(),
                 hidden=nothing)
        for n, value in enumerate(weighted)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("how", "weighted", "expected"),
    [
        ("best", (None, 0.2, 0.7, 0.7, 0.1), "2"),
        ("worst", (None, 0.2, 0.7, 0.1, 0.1), "3"),
        ("last", (0.9, 0.2, None), "2"),
        ("best", (None, None), "0"),
        ("worst", (None, 0.0), "1"),
        ("best", (None, 0.0), "1"),
    ],
)
def test_the_pick_goes_by_the_fixed_weight_score_and_takes_unscored_ones_last(how, weighted, expected):
    assert pick(scored(*weighted), how, Random(0)).response_id == expected


def test_a_random_pick_is_its_generators_and_reaches_everyone():
    group = scored(0.1, 0.2, None)
    draws = [pick(group, "random", Random(seed)).response_id for seed in range(60)]
    assert draws == [pick(group, "random", Random(seed)).response_id for seed in range(60)]
    assert set(draws) == {"0", "1", "2"}


def test_the_other_assessment_is_of_another_question_of_the_same_category():
    both = plans(rubric({"id": "a", **JUDGED}), {}, {"question_id": "p"})
    q, p = previous(both["q"]), previous(both["p"])
    assert {pick_other(q, [q, p, q], Random(seed)) for seed in range(9)} == {p}
    assert pick_other(q, [q, q], Random(0)) is None
    (stranger,) = scored(0.5)
    assert pick_other(p, [q, stranger], Random(0)) in (q, stranger)


@pytest.mark.parametrize(
    ("config", "fresh"),
    [
        ({"share": 0.25}, 6),
        ({"share": 0.3}, 6),
        ({"share": 0.3125}, 5),
        ({"share": 0.0}, 8),
        ({"share": 1.0}, 0),
        ({"share": 1.0, "source": "step"}, 1),
        ({"probability": 1.0}, 0),
        ({"probability": 1.0, "source": "step"}, 1),
    ],
)
def test_a_share_is_rounded_and_within_a_step_one_stays_fresh(config, fresh):
    assert routes(ImproveConfig(**config), 8, Random(0)) == [None] * fresh + ["own"] * (8 - fresh)


def test_a_group_without_a_member_of_the_policy_has_no_route():
    assert routes(ImproveConfig(share=1.0, source="step"), 0, Random(0)) == []


def test_a_question_that_was_never_asked_gets_fresh_responses_unless_the_step_itself_has_them():
    log, step = ImproveConfig(share=0.5), ImproveConfig(share=0.5, source="step")
    assert routes(log, 4, Random(0), asked_before=False) == [None] * 4
    assert routes(step, 4, Random(0), asked_before=False) == [None, None, "own", "own"]


def test_probability_and_controls_hold_in_the_mean():
    config = ImproveConfig(probability=0.3, controls=0.25)
    drawn = [routes(config, 8, Random(seed)) for seed in range(2000)]
    assert drawn == [routes(config, 8, Random(seed)) for seed in range(2000)]
    count = Counter(way for group in drawn for way in group)
    total = 16000
    improved = total - count[None]
    assert improved / total == pytest.approx(0.3, abs=0.015)
    assert count["shuffled"] / improved == pytest.approx(0.25, abs=0.02)
    assert count["none"] / improved == pytest.approx(0.25, abs=0.02)


@given(st.integers(1, 20), st.floats(0, 0.5), st.integers(0, 99))
def test_controls_differ_from_their_share_by_less_than_one_in_every_group(members, share, seed):
    drawn = Counter(routes(ImproveConfig(share=1.0, controls=share), members, Random(seed)))
    for control in ("shuffled", "none"):
        assert abs(drawn[control] - share * members) < 1 + 1e-9
