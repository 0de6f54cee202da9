"""Rows of chats, pairs, rankings and labels: what they teach, what is held out, and what is said of a bad one."""

from __future__ import annotations

import tiny  # isort: skip (before torch)

import gzip
import json
import logging
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grape.course import by_question, named, parted, read_course
from grape.errors import ConfigError
from grape.lessons import Preferred, read_lessons
from grape.recipes import ChatDataConfig, DataConfig, DpoRun, RewardModelRun, SftRun, load_recipe, parse_recipe
from grape.tasks import Reward, Sft

HH = Path(__file__).parents[1] / "examples/hh/hh_harmless_base_test.jsonl.gz"
PAIR = {"question": "q", "chosen": "a", "rejected": "b"}


def said(role):
    return lambda text: {"role": role, "content": text}


user, assistant, system, tool = map(said, ("user", "assistant", "system", "tool"))
ASKED = (user("q"),)


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def taught(rows, kind="pairs", **fields):
    config = (ChatDataConfig if kind == "chats" else DataConfig)(path="rows", **fields)
    return read_lessons(config, kind, rows).lessons


def refused(rows, kind="pairs", **fields):
    with pytest.raises(ConfigError) as caught:
        taught(rows, kind, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pair(chosen, rejected, **fields):
    (lesson,) = taught([{"chosen": chosen, "rejected": rejected, **fields}])
    assert lesson.pairs == (Preferred(better=0, worse=1),)
    return lesson.prompt, *lesson.responses


# What rows teach ---------------------------------------------------------------------------------------------------


def test_a_rejected_response_may_be_empty_and_a_chosen_one_may_not():
    (lesson,) = taught([{**PAIR, "rejected": ""}])
    assert lesson.responses == ("a", "")
    with pytest.raises(ConfigError, match=r"chosen"):
        taught([{**PAIR, "chosen": ""}])


def test_a_question_with_its_response_and_the_messages_of_a_chat_teach_alike():
    asked, chat = taught([{"question": "q", "response": "a"}, {"messages": [user("q"), assistant("a")]}], "chats")
    assert (asked.prompt, asked.responses) == (chat.prompt, chat.responses) == (ASKED, ("a",))
    assert (asked.place, chat.place) == ("rows: row 1", "rows: row 2")
    (turns,) = taught([{"question": [system("s"), user("q")], "response": " a\n"}], "chats")
    assert (turns.prompt, turns.responses, turns.pairs, turns.label) == ((system("s"), user("q")), (" a\n",), (), None)


CHAT = [system("s"), assistant("Hello!"), user("1?"), assistant("one"), tool("t"), assistant("so"), user("2?"), assistant("two")]  # fmt: skip


def test_the_last_turn_of_the_assistant_is_taught_or_every_one_that_answers_somebody():
    (last,) = taught([{"messages": CHAT}], "chats")
    assert (last.prompt, last.responses) == (tuple(CHAT[:7]), ("two",))
    every = taught([{"messages": CHAT}], "chats", turns="all")
    assert [(one.prompt, one.responses) for one in every] == [
        (tuple(CHAT[:3]), ("one",)), (tuple(CHAT[:5]), ("so",)), (tuple(CHAT[:7]), ("two",)),
    ]  # fmt: skip
    assert len({one.group for one in every}) == 1


def test_a_pair_is_two_texts_or_two_dialogues_that_differ_in_their_last_turn():
    one = (ASKED, "a", "b")
    assert pair("a", "b", question="q") == one
    assert pair("a", "b", question=[user("q")]) == one
    assert pair([user("q"), assistant("a")], [user("q"), assistant("b")]) == one
    assert pair([assistant("a")], [assistant("b")], question="q") == one
    assert pair([assistant("a")], "b", question="q") == one
    assert pair("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b") == one
    assert pair("Human: q\n\nAssistant: a", [user("q"), assistant("b")]) == one
    assert pair("\r\n\r\nHuman: q\r\n\r\nAssistant: a", "\n\nHuman:q\n\nAssistant:b\n") == one


def test_a_question_that_the_dialogues_repeat_is_asked_once():
    one = (ASKED, "a", "b")
    assert pair([user("q"), assistant("a")], [user("q"), assistant("b")], question="q") == one
    assert pair([user("q"), assistant("a")], "b", question="q") == one
    assert pair("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b", question="q") == one
    assert pair("\n\nAssistant: a", "\n\nAssistant: b", question="q") == one
    head = [system("s"), user("q")]
    assert pair([*head, assistant("a")], [*head, assistant("b")], question="q") == (tuple(head), "a", "b")
    longer = [user("0?"), assistant("0"), user("q")]
    assert pair([*longer, assistant("a")], [*longer, assistant("b")], question="q")[0] == tuple(longer)
    assert pair([user("q"), assistant("a")], [user("q"), assistant("b")], question=[system("s")])[0] == tuple(head)


def test_turns_that_go_on_after_the_question_stand_after_it():
    rest = [assistant("Which?"), user("That.")]
    prompt, *_ = pair([*rest, assistant("a")], [*rest, assistant("b")], question="q")
    assert prompt == (*ASKED, *rest)


def test_a_question_may_be_the_transcript_up_to_where_the_response_begins():
    turns = (user("1?"), assistant("one"), user("2?"))
    text = "\n\nHuman: 1?\n\nAssistant: one\n\nHuman: 2?"
    assert pair(" a", " b", question=f"{text}\n\nAssistant:") == (turns, " a", " b")
    assert pair("a", "b", question=text) == (turns, "a", "b")
    assert pair("a", "b", question="\n\nHuman: Who is Assistant:")[0] == (user("Who is Assistant:"),)
    assert refused([{**PAIR, "question": f"{text}\n\nAssistant: two"}]) == (
        "rows: row 1: question: ends with a turn of the assistant, where the response begins"
    )


def test_human_inside_a_sentence_begins_no_turn():
    texts = "A Human: so it says\nHuman: no\n\n Human: no", "As\n\nAssistants: b"
    assert pair(*(f"\n\nHuman: q Human: q\n\nAssistant: {text}" for text in texts)) == ((user("q Human: q"),), *texts)
    assert pair("Human: x", "b", question="q") == (ASKED, "Human: x", "b")


def test_rankings_are_responses_best_first_and_labels_are_true_or_false():
    (ranked,) = taught([{"question": "q", "responses": ["a", "b", "c"]}], "rankings")
    assert (ranked.prompt, ranked.responses, ranked.pairs, ranked.label) == (ASKED, ("a", "b", "c"), (), None)
    rows = [{"question": "q", "response": "a", "label": True}, {"question": "q", "response": "b", "label": False}]
    assert [(one.prompt, one.responses, one.label) for one in taught(rows, "labels")] == [
        (ASKED, ("a",), True), (ASKED, ("b",), False),
    ]  # fmt: skip


def test_pairs_are_read_as_rankings_and_as_labels_where_these_are_wanted():
    (ranked,) = taught([PAIR], "rankings")
    assert (ranked.prompt, ranked.responses) == (ASKED, ("a", "b"))
    good, bad = taught([PAIR], "labels")
    assert [(one.prompt, one.responses, one.label, one.pairs) for one in (good, bad)] == [
        (ASKED, ("a",), True, ()), (ASKED, ("b",), False, ()),
    ]  # fmt: skip
    assert good.group == bad.group
    mixed = taught([PAIR, {"question": "q", "responses": ["x", "y", "z"]}], "rankings")
    assert [one.responses for one in mixed] == [("a", "b"), ("x", "y", "z")]


def test_margins_and_soft_labels_go_with_their_pair():
    rows = [{**PAIR, "margin": 2, "probability": 0.75}, {**PAIR, "margin": -0.5, "probability": 0.5}, {**PAIR, "probability": 1}]  # fmt: skip
    assert [one.pairs for one in taught(rows)] == [
        (Preferred(better=0, worse=1, margin=2.0, probability=0.75),),
        (Preferred(better=0, worse=1, margin=-0.5, probability=0.5),),
        (Preferred(better=0, worse=1, margin=0.0, probability=1.0),),
    ]


def test_texts_that_differ_in_blanks_alone_are_two_texts():
    assert pair("    return 1", "return 1", question="q") == (ASKED, "    return 1", "return 1")


def test_a_question_is_named_by_its_id_and_else_by_its_turns():
    rows = [PAIR, {**PAIR, "question": [user("q")]}, {**PAIR, "question_id": 7}, {**PAIR, "question_id": "7"}]
    assert [one.group for one in taught(rows)] == [json.dumps(ASKED)] * 2 + ["7"] * 2


def test_columns_are_mapped_and_the_others_ignored():
    rows = [{"prompt": "q", "answers": {"good": "a"}, "worse": "b", "question": "other", "rejected": 3, "id": None}]
    fields = {"question": "prompt", "chosen": "answers.good", "rejected": "worse"}
    (lesson,) = taught(rows, map=fields)
    assert (lesson.prompt, lesson.responses) == (ASKED, ("a", "b"))
    swapped = taught([PAIR], map={"chosen": "rejected", "rejected": "chosen"})
    assert swapped[0].responses == ("b", "a")


def test_limit_takes_the_first_rows_and_reads_none_after_them():
    rows = [{**PAIR, "question": f"{number}?"} for number in range(4)]
    assert [one.prompt[0]["content"] for one in taught([*rows[:2], "broken"], limit=2)] == ["0?", "1?"]
    assert len(taught(rows, limit=9)) == 4
    assert len(taught(["broken", *rows], limit=3, bad_rows="skip")) == 2


def test_files_folders_and_mappings_teach_alike(tmp_path):
    rows = [{**PAIR, "margin": 0.5}, {**PAIR, "question": "r", "margin": None}]
    path = lines(tmp_path / "d.jsonl", rows)
    (tmp_path / "crlf.jsonl").write_bytes(Path(path).read_bytes().replace(b"\n", b"\r\n"))
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write(Path(path).read_text())
    duckdb.sql(f"copy (from '{path}') to '{tmp_path}/d.parquet'")
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "many")
    plain = read_lessons(DataConfig(path=path), "pairs")
    assert [one.pairs[0].margin for one in plain.lessons] == [0.5, 0.0]
    for name in ("crlf.jsonl", "d.jsonl.gz", "d.parquet", "one", "many"):
        other = read_lessons(DataConfig(path=str(tmp_path / name)), "pairs")
        assert [one.prompt for one in other.lessons] == [ASKED, (user("r"),)], name
        assert other.hash == plain.hash, name


def test_turns_whose_further_keys_only_fill_a_column_are_read(tmp_path):
    """`datasets` and Parquet give every turn the keys of all: `tool_calls`, say, which is None in most."""
    chats = [{"messages": [user("q"), {**assistant("a"), "name": None}]}, {"messages": [user("q"), {**assistant("a"), "name": "n"}]}]  # fmt: skip
    datasets.Dataset.from_list(chats).save_to_disk(tmp_path / "chats")
    got = read_lessons(ChatDataConfig(path=str(tmp_path / "chats"), bad_rows="skip"), "chats")
    assert [(one.prompt, one.responses) for one in got.lessons] == [(ASKED, ("a",))]
    assert got.skipped == (
        f"{tmp_path}/chats: row 2: messages.1.name: Extra inputs are not permitted (got 'n'; known: content, role)",
    )


def test_the_hash_tells_apart_all_that_decides_a_run():
    base = read_lessons(DataConfig(path="rows"), "pairs", [PAIR]).hash
    assert base == read_lessons(DataConfig(path="other"), "pairs", [{**PAIR, "note": 1}]).hash
    for change in ({"question": "p"}, {"chosen": "c"}, {"rejected": "c"}, {"margin": 1}, {"probability": 0.9}, {"question_id": "x"}):  # fmt: skip
        assert read_lessons(DataConfig(path="rows"), "pairs", [{**PAIR, **change}]).hash != base, change


# What a question is ------------------------------------------------------------------------------------------------


def pairs_of(*triples):
    return taught([{"question": q, "chosen": a, "rejected": b} for q, a, b in triples])


def test_all_pairs_of_a_question_are_together_and_each_response_is_in_once():
    mixed = pairs_of(("q", "a", "b"), ("r", "a", "b"), ("q", "c", "b"), ("q", "a", "c"))
    first, second = by_question(mixed)
    assert (first.prompt, first.responses, first.place) == (ASKED, ("a", "b", "c"), "rows: row 1")
    assert [(one.better, one.worse) for one in first.pairs] == [(0, 1), (2, 1), (0, 2)]
    assert (second.prompt, second.responses, len(second.pairs)) == ((user("r"),), ("a", "b"), 1)


def test_circles_duplicates_and_contradictions_stay_what_was_said():
    (circle,) = by_question(pairs_of(("q", "a", "b"), ("q", "b", "c"), ("q", "c", "a"), ("q", "a", "b"), ("q", "b", "a")))  # fmt: skip
    assert circle.responses == ("a", "b", "c")
    assert [(one.better, one.worse) for one in circle.pairs] == [(0, 1), (1, 2), (2, 0), (0, 1), (1, 0)]


def test_margins_and_soft_labels_stay_with_their_pair_when_pairs_are_joined():
    rows = [{**PAIR, "margin": 1}, {**PAIR, "rejected": "c", "probability": 0.6, "margin": 3}]
    (whole,) = by_question(taught(rows))
    assert whole.pairs == (
        Preferred(better=0, worse=1, margin=1.0, probability=1.0),
        Preferred(better=0, worse=2, margin=3.0, probability=0.6),
    )


def test_rows_of_one_prompt_are_one_question_whatever_their_ids():
    rows = [{**PAIR, "question_id": "1"}, {**PAIR, "question_id": "2", "chosen": "c"}, {**PAIR, "chosen": "d"}]
    rows += [{**PAIR, "question_id": "2", "question": "r"}, {**PAIR, "question": "s"}]
    lessons = named(taught(rows))
    assert [one.group for one in lessons] == ["1", "1", "1", "1", json.dumps([user("s")])]
    assert [len(one.pairs) for one in by_question(lessons)] == [3, 1, 1]


def test_chats_that_begin_alike_are_of_one_question():
    chats = [{"messages": [user(text), assistant(f"{n}"), user(f"{n}?"), assistant("b")]} for n, text in enumerate(("q", "q", "r"))]  # fmt: skip
    groups = [one.group for one in named(taught(chats, "chats", turns="all"))]
    assert groups[0] == groups[1] == groups[2] == groups[3] != groups[4] == groups[5]
    assert len({one.group for one in named(taught(chats, "chats"))}) == 3


NAMES = st.sampled_from([None, "1", "2", "3", "4"])
QUESTIONS = st.sampled_from("abcdef")


@given(st.lists(st.tuples(NAMES, QUESTIONS), min_size=2, max_size=14), st.floats(0.01, 0.99), st.integers(0, 3))
def test_no_question_is_on_both_sides_of_the_split(rows, share, seed):
    lessons = named(taught([{**PAIR, "question_id": name, "question": text} for name, text in rows]))
    groups = {one.group for one in lessons}
    if len(groups) == 1:
        with pytest.raises(ConfigError, match="d: has but one question, of which no share can be held out"):
            parted(lessons, share, seed, "d")
        return
    kept, out = parted(lessons, share, seed, "d")
    assert parted(lessons, share, seed, "d") == [kept, out]
    assert sorted(one.place for one in kept + out) == sorted(one.place for one in lessons)
    assert not {one.prompt[0]["content"] for one in kept} & {one.prompt[0]["content"] for one in out}
    ids = [{rows[lessons.index(one)][0] for one in side} - {None} for side in (kept, out)]
    assert not ids[0] & ids[1]
    assert len({one.group for one in out}) == min(len(groups) - 1, max(1, round(share * len(groups))))


def test_the_split_follows_the_seed_and_keeps_the_order():
    lessons = pairs_of(*((f"{n}?", "a", "b") for n in range(40)))
    kept, out = parted(lessons, 0.25, 0, "d")
    assert (len(kept), len(out)) == (30, 10)
    for side in (kept, out):
        assert side == sorted(side, key=lessons.index)
    assert parted(lessons, 0.25, 1, "d")[1] != out
    assert parted(list(lessons), 0.25, 0, "d") == [kept, out]


@pytest.mark.parametrize(("share", "number"), [(1e-9, 1), (0.5, 2), (1 - 1e-9, 4)])
def test_a_share_leaves_at_least_one_question_on_either_side(share, number):
    kept, out = parted(pairs_of(*((q, "a", "b") for q in "pqrst")), share, 0, "d")
    assert (len(kept), len(out)) == (5 - number, number)


def test_the_turns_of_one_chat_are_never_parted():
    chats = [{"messages": [user(f"{n}?"), assistant("a"), user("more?"), assistant("b")]} for n in range(10)]
    kept, out = parted(named(taught(chats, "chats", turns="all")), 0.3, 0, "d")
    assert (len(kept), len(out)) == (14, 6)
    assert not {one.place for one in kept} & {one.place for one in out}


# What is wrong -----------------------------------------------------------------------------------------------------

BAD_PAIRS = [
    ([1], "a row is a mapping of columns, not list"),
    ("text", "a row is a mapping of columns, not str"),
    (None, "a row is a mapping of columns, not NoneType"),
    ({}, "chosen: Field required; the row has: nothing"),
    ({"prompt": "q", "chosen": "a", "rejected": "b"},
     "question: is missing, and chosen is no dialogue of Human: and Assistant:; the row has: prompt, chosen, rejected"),
    ({**PAIR, "rejected": None}, "rejected: Field required; the row has: question, chosen"),
    ({"question": "q", "response": "a", "label": True}, "chosen: Field required; the row has: question, response, label"),
    ({"a\nb": 1, "chosen": "x"}, "rejected: Field required; the row has: a b, chosen"),
    ({**PAIR, "question": ""}, "question: String should have at least 1 character (got '')"),
    ({**PAIR, "question": " \n"}, "nothing is asked before the response"),
    ({**PAIR, "question": 3}, "question: Input should be a valid string (got 3)"),
    ({**PAIR, "question": [system("s")]}, "nothing is asked before the response"),
    ({**PAIR, "question": [user("q"), assistant("a")]},
     "question: ends with a turn of the assistant, where the response begins"),
    ({**PAIR, "question_id": True}, "question_id: Input should be a valid string (got True)"),
    ({**PAIR, "question_id": 1.5}, "question_id: Input should be a valid string (got 1.5)"),
    ({**PAIR, "question_id": ""}, "question_id: String should have at least 1 character (got '')"),
    ({**PAIR, "chosen": True}, "chosen: Input should be a valid string (got True)"),
    ({**PAIR, "chosen": ["a"]}, "chosen.0: Input should be a valid dictionary or instance of Turn (got 'a')"),
    ({**PAIR, "chosen": "a\ud800"},
     "chosen: Input should be a valid string, unable to parse raw data as a unicode string (got 'a\\ud800')"),
    ({**PAIR, "chosen": " \t\n"}, "chosen: the response has no text"),
    ({**PAIR, "rejected": [assistant("")]}, "rejected: the response has no text"),
    ({**PAIR, "chosen": "b"}, "chosen and rejected are the same text"),
    ({**PAIR, "chosen": [{"role": "bot", "content": "a"}]},
     "chosen.0.role: Input should be 'system', 'user', 'assistant' or 'tool' (got 'bot')"),
    ({**PAIR, "chosen": [{"role": "assistant", "content": None}]}, "chosen.0.content: Field required"),
    ({**PAIR, "chosen": [{**assistant("a"), "nmae": "n"}]},
     "chosen.0.nmae: Extra inputs are not permitted (got 'n'; known: content, role)"),
    ({**PAIR, "chosen": [user("Q"), assistant("a")]}, "chosen: its turns ask something else than question"),
    ({**PAIR, "chosen": [system("s"), user("Q"), assistant("a")]}, "chosen: its turns ask something else than question"),
    ({**PAIR, "rejected": [system("s"), assistant("b")]}, "rejected: its turns ask something else than question"),
    ({**PAIR, "chosen": "\n\nHuman: Q\n\nAssistant: a"}, "chosen: its turns ask something else than question"),
    ({**PAIR, "rejected": [assistant("Which?"), user("That."), assistant("b")]},
     "chosen and rejected answer different questions: their turns before the last differ"),
    ({"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
     "chosen and rejected answer different questions: their turns before the last differ"),
    ({"chosen": [assistant("a")], "rejected": [assistant("b")]},
     "chosen: does not end with a response of the assistant to something asked"),
    ({"chosen": [user("q"), assistant("a"), user("r")], "rejected": "b"},
     "chosen: does not end with a response of the assistant to something asked"),
    ({"chosen": [system("s"), assistant("a")], "rejected": [system("s"), assistant("b")]},
     "nothing is asked before the response"),
    ({"chosen": [user("q"), assistant("x"), assistant("a")], "rejected": [user("q"), assistant("x"), assistant("b")]},
     "chosen: two turns of the assistant follow one another"),
    ({"chosen": "\n\nHuman: q\n\nAssistant: a\n\nAssistant: b", "rejected": "b"},
     "chosen: two turns of the assistant follow one another"),
    ({"chosen": "\n\nHuman: q\n\nAssistant:  \n\nHuman: r\n\nAssistant: b", "rejected": "b"},
     "chosen: a turn of the assistant has no text"),
    ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "Rules.\n\nHuman: q\n\nAssistant: b"},
     "question: is missing, and rejected is no dialogue of Human: and Assistant:; the row has: chosen, rejected"),
    ({"chosen": "\n\nHuman: q\nAssistant: a", "rejected": "b"},
     "chosen: does not end with a response of the assistant to something asked"),
    ({**PAIR, "margin": math.nan}, "margin: Input should be a finite number (got nan)"),
    ({**PAIR, "margin": "1"}, "margin: Input should be a valid number (got '1')"),
    ({**PAIR, "margin": 1e300}, "margin: Input should be less than or equal to 1000000 (got 1e+300)"),
    ({**PAIR, "probability": 0.25}, "probability: Input should be greater than or equal to 0.5 (got 0.25)"),
    ({**PAIR, "probability": 1.5}, "probability: Input should be less than or equal to 1 (got 1.5)"),
    ({**PAIR, "probability": True}, "probability: Input should be a valid number (got True)"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "line"), BAD_PAIRS)
def test_a_bad_pair_is_one_line(row, line):
    assert refused([PAIR, row]) == f"rows: row 2: {line}"


BAD_OTHERS = [
    ("chats", {"prompt": "q", "completion": "a"},
     "needs either question and response, or messages; the row has: prompt, completion"),
    ("chats", {"question": "q"}, "needs either question and response, or messages; the row has: question"),
    ("chats", {"response": "a"}, "question: is missing; the row has: response"),
    ("chats", {"question": "q", "messages": [user("q"), assistant("a")]},
     "needs either question and response, or messages; the row has: question, messages"),
    ("chats", {"messages": []}, "messages: List should have at least 2 items after validation, not 0 (got [])"),
    ("chats", {"messages": "q"}, "messages: Input should be a valid list (got 'q')"),
    ("chats", {"messages": [user("q"), tool("t")]}, "messages: end with a turn of the tool: there is nothing to learn"),
    ("chats", {"messages": [system("s"), assistant("a")]}, "messages: no turn of the assistant follows one of the user"),
    ("chats", {"messages": [user(" "), assistant("a")]}, "nothing is asked before the response"),
    ("chats", {"messages": [user("q"), assistant(" ")]}, "messages.1: the response has no text"),
    ("chats", {"messages": [user("q"), assistant("a"), assistant("b")]},
     "messages.2: two turns of the assistant follow one another"),
    ("chats", {"question": "q", "response": "\n"}, "response: the response has no text"),
    ("rankings", {"question": "q", "responses": ["a"]},
     "responses: List should have at least 2 items after validation, not 1 (got ['a'])"),
    ("rankings", {"question": "q", "responses": ["a", "b", "a"]}, "responses: one stands twice"),
    ("rankings", {"question": "q", "responses": ["a", " "]}, "responses.1: the response has no text"),
    ("rankings", {"question": "q", "responses": ["a", 1]}, "responses.1: Input should be a valid string (got 1)"),
    ("rankings", {"responses": ["a", "b"]}, "question: is missing; the row has: responses"),
    ("rankings", {"question": "q", "response": "a"}, "responses: Field required; the row has: question, response"),
    ("labels", {"question": "q", "response": "a"}, "label: Field required; the row has: question, response"),
    ("labels", {"question": "q", "response": "a", "label": 1}, "label: Input should be a valid boolean (got 1)"),
    ("labels", {"question": "q", "response": "a", "label": "yes"}, "label: Input should be a valid boolean (got 'yes')"),
    ("labels", {"response": "a", "label": True}, "question: is missing; the row has: response, label"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "line"), BAD_OTHERS)
def test_a_bad_row_is_one_line(kind, row, line):
    assert refused([row], kind) == f"rows: row 1: {line}"


def test_a_chat_with_one_bad_turn_teaches_nothing(caplog):
    """Its first turns too are left out, or the count of rows that are left out would not be true."""
    bad = {"messages": [user("q"), assistant("a"), user("r"), assistant(" "), user("s"), assistant("b")]}
    good = {"messages": [user("q"), assistant("a"), user("r"), assistant("b")]}
    config = ChatDataConfig(path="rows", turns="all", bad_rows="skip")
    got = read_lessons(config, "chats", [bad, good])
    assert [one.responses for one in got.lessons] == [("a",), ("b",)]
    assert got.skipped == ("rows: row 1: messages.3: the response has no text",)
    assert caplog.messages == [
        "skipped: rows: row 1: messages.3: the response has no text",
        "rows: skipped rows: 1 of 2",
    ]


def test_a_map_to_what_is_no_field_is_an_error_whatever_becomes_of_bad_rows():
    assert refused([PAIR], map={"prompt": "question"}, bad_rows="skip") == (
        "rows: map: 'prompt' is no field of pairs; known: chosen, margin, probability, question, question_id, rejected"
    )
    assert refused([], "chats", map={"respnse": "answer"}) == (
        "rows: map: 'respnse' is no field of chats; did you mean 'response'? known: messages, question, question_id, "
        "response"
    )
    assert refused([PAIR], map={"chosen": "best"}) == (
        "rows: row 1: best: map takes chosen from it and the row lacks it; the row has: question, chosen, rejected"
    )


def test_skipped_rows_are_counted_and_named(tmp_path, caplog):
    rows = ["{", PAIR, "[]", {**PAIR, "chosen": "b"}, {**PAIR, "question": None}, '{"chosen": NaN}', '{"a": 1, "a": 2}']
    path = lines(tmp_path / "d.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        got = read_lessons(DataConfig(path=path, bad_rows="skip"), "labels")
    assert [(one.responses, one.place) for one in got.lessons] == [(("a",), f"{path}: line 2"), (("b",), f"{path}: line 2")]  # fmt: skip
    assert got.skipped[0].startswith(f"{path}: line 1: not JSON: ")
    assert got.skipped[1:] == (
        f"{path}: line 3: a row is a mapping of columns, not list",
        f"{path}: line 4: chosen and rejected are the same text",
        f"{path}: line 5: question: is missing, and chosen is no dialogue of Human: and Assistant:; the row has: "
        "chosen, rejected",
        f"{path}: line 6: not JSON: NaN is not JSON",
        f"{path}: line 7: not JSON: duplicate key 'a'",
    )
    assert caplog.messages == [
        *(f"skipped: {line}" for line in got.skipped[:3]), f"{path}: skipped rows: 6 of 7, of which 3 are named here",
    ]  # fmt: skip


def test_nothing_but_bad_rows_is_an_error():
    assert refused([{}, 3], bad_rows="skip") == (
        "rows: none of 2 rows can be used; the first: rows: row 1: chosen: Field required; the row has: nothing"
    )
    assert refused([]) == "rows: no rows"


TEXTS = st.sampled_from(["", " ", "q", "a", "b\n", "c", "\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b"])
TURNS = st.lists(st.builds(lambda say, text: say(text), st.sampled_from([system, user, user, assistant, assistant, tool, said("bot")]), TEXTS), max_size=4)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | TEXTS | TURNS
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)
COLUMNS = st.sampled_from(["question", "question_id", "response", "messages", "chosen", "rejected", "responses", "label", "margin", "probability", "a\nb"])  # fmt: skip
KINDS = {"chats": ["question", "response"], "pairs": ["question", "chosen", "rejected"], "rankings": ["question", "responses"], "labels": ["question", "response", "label"]}  # fmt: skip
LIKELY = {"responses": st.lists(TEXTS, max_size=3), "label": st.booleans(), "messages": TURNS}


@st.composite
def cases(draw):
    """A kind and a row: anything at all, or one with the columns of its kind."""
    kind = draw(st.sampled_from(list(KINDS)))
    names = KINDS[kind] if kind != "chats" or draw(st.booleans()) else ["messages"]
    wild = st.dictionaries(COLUMNS, VALUES, max_size=4)
    likely = st.fixed_dictionaries({name: LIKELY.get(name, TEXTS | TURNS if name != "response" else TEXTS) for name in names})  # fmt: skip
    return kind, draw(wild | likely | likely)


@given(cases(), st.sampled_from(["last", "all"]))
def test_whatever_a_row_says_it_teaches_something_whole_or_is_one_line(case, turns):
    kind, row = case
    config = ChatDataConfig(path="rows", turns=turns)
    try:
        lessons = read_lessons(config, kind, [row]).lessons
    except ConfigError as error:
        assert str(error).startswith("rows: row 1: ")
        assert len(str(error).splitlines()) == 1
        return
    assert lessons
    for lesson in lessons:
        assert all(text.strip() or text == row.get("rejected") for text in lesson.responses)
        assert lesson.prompt[-1]["role"] != "assistant"
        assert any(turn["role"] in ("user", "tool") and turn["content"].strip() for turn in lesson.prompt)
        assert len(set(lesson.responses)) == len(lesson.responses) == {"rankings": len(lesson.responses), "pairs": 2}.get(kind, 1)  # fmt: skip


@pytest.mark.parametrize("depth", [90, 700, 100_000])
def test_deep_nesting_is_one_line(tmp_path, depth):
    path = lines(
        tmp_path / "d.jsonl", ['{"chosen": "a", "rejected": "b", "question": ' + "[" * depth + "]" * depth + "}"]
    )
    with pytest.raises(
        ConfigError, match=r"d.jsonl: line 1: (question.0: Input should be a valid dict|not JSON: maximum)"
    ):
        read_lessons(DataConfig(path=path), "pairs")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.jsonl").mkdir()
    Path("empty.jsonl").write_text("")
    Path("blank.jsonl").write_text("\n \r\n")
    Path("list.json").write_text('[{"question": "q"}]')
    Path("bad.jsonl.gz").write_bytes(b"x")
    Path("wide.jsonl").write_bytes('{"question": "q"}'.encode("utf-16"))
    none = "no folder of `datasets`: Directory folder.jsonl is neither a `Dataset` directory nor a `DatasetDict` directory."
    for path, line in [
        ("empty.jsonl", "empty.jsonl: no rows"),
        ("blank.jsonl", "blank.jsonl: no rows"),
        ("missing.jsonl", "missing.jsonl: No such file or directory"),
        ("folder.jsonl", f"folder.jsonl: {none}"),
        ("list.json", "list.json: line 1: a row is a mapping of columns, not list"),
        ("bad.jsonl.gz", "bad.jsonl.gz: Not a gzipped file (b'x')"),
        ("wide.jsonl", "wide.jsonl: line 1: not JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("a\0b.jsonl", "a\0b.jsonl: embedded null byte"),
        (f"{'x' * 300}.jsonl", f"{'x' * 99}…: File name too long"),
    ]:  # fmt: skip
        for bad_rows in ("fail", "skip") if path != "list.json" and path != "wide.jsonl" else ("fail",):
            with pytest.raises(ConfigError) as caught:
                read_lessons(DataConfig(path=path, bad_rows=bad_rows), "pairs")
            assert str(caught.value) == line


# The course of a run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return tiny.tiny_policy(tmp_path_factory.mktemp("lessons") / "policy")


def recipe(kind, data, **fields):
    base = {"policy": {"model": "p"}, "checkpoint": {"dir": "c"}}
    return parse_recipe(kind, {**base, "data": data, **fields}, "run.yaml")


def course(policy, kind, data, **fields):
    config = recipe(kind, data, **fields)
    return read_course(config, policy, (Reward if kind is RewardModelRun else Sft)(policy, config))


def test_a_reward_model_holds_out_whole_questions_with_all_their_pairs(policy, tmp_path):
    rows = [{"question": f"{n % 5}?", "chosen": f"a{n}", "rejected": "b"} for n in range(15)]
    got = course(policy, RewardModelRun, {"path": lines(tmp_path / "d.jsonl", rows)}, heldout={"share": 0.4})
    assert (len(got.examples), len(got.heldout)) == (3, 2)
    assert {len(one.lesson.pairs) for one in [*got.examples, *got.heldout]} == {3}
    assert {len(one.members) for one in [*got.examples, *got.heldout]} == {4}


def test_margins_that_a_loss_goes_by_are_there_and_not_below_0(policy, tmp_path):
    rows = [{**PAIR, "margin": 0.5}, {**PAIR, "question": "r", "margin": -0.25}]
    path = lines(tmp_path / "d.jsonl", rows)
    course(policy, RewardModelRun, {"path": path})
    with pytest.raises(ConfigError) as caught:
        course(policy, RewardModelRun, {"path": path}, loss={"margin": True})
    assert str(caught.value) == f"{path}: line 2: margin: -0.25 is below 0, and loss.margin goes by it"
    got = course(policy, RewardModelRun, {"path": path, "bad_rows": "skip"}, loss={"margin": True})
    assert [one.lesson.pairs[0].margin for one in got.examples] == [0.5]
    bare = lines(tmp_path / "bare.jsonl", [PAIR])
    with pytest.raises(ConfigError) as caught:
        course(policy, RewardModelRun, {"path": bare}, loss={"margin": True})
    assert str(caught.value) == f"{bare}: none of the rows has a margin, which loss.margin goes by"


def test_rows_without_room_are_named_and_counted(policy, tmp_path, caplog):
    rows = [{"question": "q", "response": "a" * size} for size in (5, 50, 6)]
    path = lines(tmp_path / "d.jsonl", rows)
    with pytest.raises(ConfigError, match=re.escape(f"{path}: line 2: ") + r"\d+ tokens; there is room for 40"):
        course(policy, SftRun, {"path": path, "max_tokens": 40})
    got = course(policy, SftRun, {"path": path, "max_tokens": 40, "bad_rows": "skip"})
    assert [one.lesson.responses for one in got.examples] == [("a" * 5,), ("a" * 6,)]
    assert caplog.messages[-1] == f"{path}: skipped rows: 1 of 3"


def test_the_same_file_holds_out_the_same_and_another_order_of_ids_is_another_run(policy, tmp_path):
    rows = [{"question": f"{n}?", "response": "a"} for n in range(20)]
    data = {"path": lines(tmp_path / "d.jsonl", rows)}
    one, two = (course(policy, SftRun, data, heldout={"share": 0.3}, seed=4) for _ in range(2))
    assert one.identity == two.identity
    assert [e.lesson for e in one.heldout] == [e.lesson for e in two.heldout]
    lines(tmp_path / "d.jsonl", [{**row, "question_id": number // 2} for number, row in enumerate(rows)])
    assert course(policy, SftRun, data, heldout={"share": 0.3}, seed=4).identity["data's rows"] != one.identity["data's rows"]  # fmt: skip


# The real data -----------------------------------------------------------------------------------------------------


def test_the_real_hh_file_is_read_but_for_thirteen_broken_rows():
    twice, empty, unlike = set(), set(), set()
    sides = Counter()
    for number, line in enumerate(gzip.decompress(HH.read_bytes()).splitlines(), 1):
        row = json.loads(line)
        dialogues = []
        for side in ("chosen", "rejected"):
            turns = ("\n\n" + row[side].lstrip("\n")).replace("\n\nHuman:", "\0H").replace("\n\nAssistant:", "\0A")
            dialogues.append([(turn[0], turn[1:].strip()) for turn in turns.split("\0")[1:]])
            if any(one[0] == other[0] for one, other in pairwise(dialogues[-1])):
                twice.add(number)
                sides["twice"] += 1
            if not all(text for _, text in dialogues[-1]):
                empty.add(number)
                sides["empty"] += 1
        if dialogues[0][:-1] != dialogues[1][:-1]:
            unlike.add(number)
    assert number == 2312
    assert (len(twice), len(empty), len(unlike), sides) == (9, 4, 5, {"twice": 13, "empty": 4})
    assert (len(twice | empty | unlike), len(twice & empty), unlike - twice) == (13, 0, set())

    got = read_lessons(DataConfig(path=str(HH), bad_rows="skip"), "pairs")
    assert len(got.lessons) == 2312 - 13
    why = {int(line.split(": ")[1].removeprefix("line ")): line.split(": ", 3)[3] for line in got.skipped}
    assert {number for number, line in why.items() if line == "two turns of the assistant follow one another"} == twice
    assert {number for number, line in why.items() if line == "a turn of the assistant has no text"} == empty
    assert len(why) == len(got.skipped) == 13
    assert {one.prompt[-1]["role"] for one in got.lessons} == {"user"}
    assert sorted(Counter(len(one.pairs) for one in by_question(named(got.lessons))).items()) == [(1, 2295), (2, 2)]


# The files of the three verbs --------------------------------------------------------------------------------------

FIELDS = "known: checkpoint, data, heldout, log, loss, optimizer, policy, seed, trackers"
BAD_RUNS = [
    (SftRun, {"los": {}}, f"los: Extra inputs are not permitted (got {{}}; did you mean 'loss'? {FIELDS})"),
    (SftRun, {"questions": {}}, f"questions: Extra inputs are not permitted (got {{}}; {FIELDS})"),
    (SftRun, {"loss": {"kind": "dpo"}}, "loss.kind: Extra inputs are not permitted (got 'dpo'; known: aggregate)"),
    (SftRun, {"data": {"path": "d", "turns": "first"}}, "data.turns: Input should be 'last' or 'all' (got 'first')"),
    (SftRun, {"data": {"path": "d", "turn": "all"}},
     "data.turn: Extra inputs are not permitted (got 'all'; did you mean 'turns'? known: bad_rows, limit, map, "
     "max_tokens, path, split, subset, turns)"),
    (DpoRun, {"data": {"path": "d", "turns": "all"}},
     "data.turns: Extra inputs are not permitted (got 'all'; known: bad_rows, limit, map, max_tokens, path, split, subset)"),
    (SftRun, {"data": {}}, "data.path: Field required"),
    (SftRun, {"data": {"path": ""}}, "data.path: String should have at least 1 character (got '')"),
    (SftRun, {"data": {"path": "d", "limit": 0}}, "data.limit: Input should be greater than or equal to 1 (got 0)"),
    (SftRun, {"data": {"path": "d", "bad_rows": "drop"}}, "data.bad_rows: Input should be 'fail' or 'skip' (got 'drop')"),
    (SftRun, {"optimizer": {"epoch": 2}},
     "optimizer.epoch: Extra inputs are not permitted (got 2; did you mean 'epochs'? known: batch, epochs, lr, "
     "max_grad_norm, micro_tokens, schedule, warmup, weight_decay)"),
    (SftRun, {"optimizer": {"lr": math.nan}}, "optimizer.lr: Input should be a finite number (got nan)"),
    (SftRun, {"optimizer": {"batch": 1.5}}, "optimizer.batch: Input should be a valid integer (got 1.5)"),
    (SftRun, {"policy": {"model": "p", "shard": True}}, "policy.shard: is for grape train"),
    (RewardModelRun, {"policy": {"model": "p", "lora": {}}}, "policy.lora: a reward model is trained whole"),
    (RewardModelRun, {"loss": {"kind": "ranking", "margin": True}},
     "loss.margin: goes with kind bradley-terry, not ranking"),
    (RewardModelRun, {"loss": {"kind": "dpo"}},
     "loss.kind: Input should be 'bradley-terry', 'ranking', 'outcome' or 'process' (got 'dpo')"),
    (DpoRun, {"loss": {"gamma": 0.5}}, "loss.gamma: is no parameter of dpo, which has beta"),
    (DpoRun, {"loss": {"kind": "kto", "smoothing": 0.1}},
     "loss.smoothing: is no parameter of kto, which has beta, desirable_weight, undesirable_weight"),
    (DpoRun, {"loss": {"kind": "cdpo", "smoothing": 0.5}}, "loss.smoothing: Input should be less than 0.5 (got 0.5)"),
    (DpoRun, {"loss": {"kind": "dop"}},
     "loss.kind: Input should be 'dpo', 'cdpo', 'ipo', 'simpo', 'orpo' or 'kto' (got 'dop')"),
    (DpoRun, {"loss": {"beta": 0}}, "loss.beta: Input should be greater than 0 (got 0)"),
    (DpoRun, {"loss": {"beta": True}}, "loss.beta: Input should be a valid number (got True)"),
    (DpoRun, {"heldout": {}}, "heldout: needs either share or data"),
    (DpoRun, {"heldout": {"share": 0.1, "data": "d"}}, "heldout: needs either share or data"),
    (DpoRun, {"heldout": {"data": ""}}, "heldout.data: String should have at least 1 character (got '')"),
    (DpoRun, {"heldout": {"share": 0}}, "heldout.share: Input should be greater than 0 (got 0)"),
    (DpoRun, {"heldout": {"share": 1}}, "heldout.share: Input should be less than 1 (got 1)"),
    (DpoRun, {"heldout": {"share": 0.1, "every": 0}}, "heldout.every: Input should be greater than or equal to 1 (got 0)"),
    (DpoRun, {"seed": -1}, "seed: Input should be greater than or equal to 0 (got -1)"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "line"), BAD_RUNS)
def test_a_wrong_file_is_one_line(kind, fields, line):
    with pytest.raises(ConfigError) as caught:
        recipe(kind, **{"data": {"path": "d"}, **fields})
    assert str(caught.value) == f"run.yaml: {line}"


def test_overrides_are_fields_of_the_file(tmp_path):
    path = tmp_path / "dpo.yaml"
    path.write_text("policy: {model: p}\ndata: {path: d.jsonl}\ncheckpoint: {dir: c}\n")
    plain = load_recipe(DpoRun, path)
    assert (plain.loss.kind, plain.loss.beta, plain.optimizer.lr, plain.heldout) == ("dpo", 0.1, 1e-6, None)
    overrides = [
        "loss.kind=simpo",
        "loss.gamma=.5",
        "optimizer.lr=1e-4",
        "data.map.question=prompt",
        "heldout.share=.25",
    ]
    got = load_recipe(DpoRun, path, overrides)
    assert (got.loss.kind, got.loss.gamma, got.optimizer.lr) == ("simpo", 0.5, 1e-4)
    assert got.heldout is not None
    assert (got.data.map, got.heldout.share) == ({"question": "prompt"}, 0.25)
    for override, line in [
        ("loss.gamma=1", f"{path} with loss.gamma=1: loss.gamma: is no parameter of dpo, which has beta"),
        ("loss", "'loss' is not FIELD=VALUE, such as loss.clip_high=0.28"),
        ("policy.model.x=1", "'policy.model.x=1': model has no fields"),
        ("loss=null", f"{path} with loss=null: loss: Input should be a valid dictionary or instance of PreferenceLossConfig (got None)"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            load_recipe(DpoRun, path, [override])
        assert str(caught.value) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "empty file"),
        ("- a\n", "a run is a mapping of sections, not list"),
        ("data: {path: a}\ndata: {path: b}\n", "line 2: duplicate key 'data'"),
        ("1: 2\npolicy: {model: p}\ndata: {path: d}\ncheckpoint: {dir: c}\n", "1: Keys should be strings (got 1)"),
        ("data: {path: d}\ncheckpoint: {dir: c}\n", "policy: Field required"),
    ],
)
def test_a_file_that_is_no_run_is_one_line(tmp_path, text, line):
    path = tmp_path / "sft.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(SftRun, path)
    assert str(caught.value) == f"{path}: {line}"
