"""Checkers of the text, its structure and its habits; the options of multiple choice; numbers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grape.checkers import Finding, check_arguments, check_response, run_checker
from grape.checkers.refusal import is_refusal
from grape.types import Outcome, Question, Response


def ask(name: str, response: str, /, reference: str | None = None, **arguments: object) -> Finding:
    question = Question(question_id="q", category="c", text="?", reference=reference)
    return run_checker(name, arguments, question, Response(response_id="r", question_id="q", text=response))


def outcome(name: str, response: str, /, reference: str | None = None, **arguments: object) -> Outcome:
    question = Question(question_id="q", category="c", text="?", reference=reference)
    given_response = Response(response_id="r", question_id="q", text=response)
    return check_response("item", name, arguments, 1.0, question, given_response).outcome


EVERY = {
    "exact": {"reference": "x"},
    "contains": {"text": "zz", "ignore_case": True},
    "regex": {"pattern": "z{2}"},
    "choice": {"reference": "B"},
    "numeric": {"reference": "5"},
    "json": {"fenced": True},
    "json_schema": {"schema": {"type": "string", "maxLength": 3, "pattern": "^z+$"}},
    "length": {"max": 3, "unit": "sentences"},
    "format": {},
    "repetition": {},
    "stock_phrases": {},
    "refusal": {},
}
ATTACKS = {
    "empty": "",
    "space": " \n\t\v\f\x85\u2028" * 10_000,
    "ten megabytes": "a b " * 2_500_000,
    "binary": bytes(range(256)).decode("latin-1") * 4_000,
    "deep brackets": "[" * 1_000_000,
    "deep objects": '{"a":' * 100_000,
    "lone surrogates": "\ud800\udfff" * 10_000,
    "NUL": "\0" * 10_000,
    "a huge integer": "9" * 100_000,
    "a huge exponent": "1e999999999",
    "digits of other scripts": "٣٤५६１２" * 1_000,
    "direction marks": "\u202e18\u200f" * 10_000,
    "backtracking": "a" * 100_000 + "!",
    "unclosed tags": "<think>" * 100_000,
    "unclosed fences": "```json\n" * 100_000,
    "markers": "the answer is " * 100_000,
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.slow
def test_a_checker_scores_whatever_a_response_is(name, attack):
    assert outcome(name, ATTACKS[attack], **EVERY[name]) is Outcome.OK


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=30, deadline=None)
@given(text=st.text())
def test_a_checker_scores_any_text(name, text):
    assert outcome(name, text, **EVERY[name]) is Outcome.OK


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("regex", {"pattern": "(a"}, ".with.pattern: not a regular expression: missing ) at position 2 (got '(a')"),
        ("regex", {"pattern": "a", "timeout": 0}, ".with.timeout: Input should be greater than 0 (got 0)"),
        ("length", {"min": 5, "max": 3}, ".with.max: max is below min, which is 5 (got 3)"),
        ("length", {"max": True}, ".with.max: Input should be a valid integer (got True)"),
        ("format", {"tags": ["a", "a"]}, ".with.tags: a tag is named twice: a, a (got ['a', 'a'])"),
        (
            "choice",
            {"letters": "AA"},
            ".with.letters: letters are two or more different capital letters, such as ABCD (got 'AA')",
        ),
        ("contains", {}, ".with.text: the argument is needed; known: ignore_case, need, text"),
        (
            "exact",
            {"ignore_cas": True},
            ".with.ignore_cas: no such argument (got True; did you mean 'ignore_case'? "
            "known: ignore_case, reference, strip)",
        ),
        (
            "json_schema",
            {"schema": {"type": "objct"}},
            ".with.schema: not a JSON Schema: type: 'objct' is not valid under any of the given schemas "
            "(got {'type': 'objct'})",
        ),
        (
            "json_schema",
            {"schema": {"$ref": "http://example.org/s"}},
            ".with.schema: not a JSON Schema: $ref 'http://example.org/s' is not in it, and nothing is fetched "
            "(got {'$ref': 'http://example.org/s'})",
        ),
        ("numeric", {"tolerance": -1}, ".with.tolerance: Input should be greater than or equal to 0 (got -1)"),
    ],
)
def test_a_wrong_argument_is_refused_at_load_in_one_line(name, arguments, message):
    with pytest.raises(ValueError) as caught:
        check_arguments(name, arguments)
    assert str(caught.value) == message


def test_exact_ignores_the_space_around_and_case_by_request():
    assert ask("exact", " 42\n", "42") == Finding(1.0, "reads '42', expected '42'")
    assert ask("exact", "42.", "42").score == 0
    assert ask("exact", " 42", "42", strip=False).score == 0
    assert ask("exact", "PARIS", "Paris").score == 0
    assert ask("exact", "PARIS", "Paris", ignore_case=True).score == 1


def test_contains_asks_for_all_or_any():
    assert ask("contains", "abc", text="b").score == 1
    assert ask("contains", "abc", text=["a", "z"]) == Finding(0.0, "lacks 'z'")
    assert ask("contains", "abc", text=["a", "z"], need="any").score == 1
    assert ask("contains", "abc", text=["y", "z"], need="any").score == 0
    assert ask("contains", "ABC", text="b").score == 0
    assert ask("contains", "ABC", text="b", ignore_case=True).score == 1


def test_regex_searches_or_matches_the_whole():
    assert ask("regex", "order 66", pattern=r"\d+") == Finding(1.0, r"matches '\\d+': '66'", "66")
    assert ask("regex", "order 66", pattern=r"\d+", whole=True).score == 0
    assert ask("regex", "ORDER", pattern="order").score == 0
    assert ask("regex", "ORDER", pattern="order", ignore_case=True).score == 1


def test_a_pattern_that_backtracks_without_end_is_the_rubrics_fault_and_no_score():
    arguments = {"pattern": "(a|aa)+$", "timeout": 0.1}
    assert outcome("regex", "a" * 60 + "!", **arguments) is Outcome.CHECKER
    assert outcome("regex", "aaa", **arguments) is Outcome.OK


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"a": [1, 2.5e3, null, "\\ud800"]}', 1),
        (" 42\n", 1),
        ("9" * 100_000, 1),
        ("", 0),
        ("{'a': 1}", 0),
        ("[1,]", 0),
        ("[NaN]", 0),
        ("{} {}", 0),
        ('Here it is: {"a": 1}', 0),
        ('```json\n{"a": 1}\n```', 0),
        ("[" * 100_000 + "]" * 100_000, 0),
    ],
)
def test_json_is_one_value_and_nothing_else(text, score):
    assert ask("json", text).score == score


def test_a_code_fence_around_json_is_allowed_by_request():
    assert ask("json", '```json\n{"a": 1}\n```', fenced=True).score == 1
    assert ask("json", '```\n{"a": 1}\n```\n', fenced=True).score == 1
    assert ask("json", '{"a": 1}', fenced=True).score == 1
    assert ask("json", 'So:\n```json\n{"a": 1}\n```', fenced=True).score == 0


PERSON = {
    "type": "object",
    "properties": {"age": {"$ref": "#/$defs/age"}},
    "required": ["age"],
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


def test_json_schema_says_where_a_response_does_not_fit():
    assert ask("json_schema", '{"age": 3}', schema=PERSON) == Finding(1.0, "fits the schema")
    found = ask("json_schema", '{"age": -3}', schema=PERSON)
    assert found == Finding(0.0, "does not fit the schema: $.age: -3 is less than the minimum of 0")
    assert ask("json_schema", '{"age": true}', schema=PERSON).score == 0
    assert ask("json_schema", "{}", schema=PERSON).score == 0
    assert ask("json_schema", "{", schema=PERSON).score == 0


def test_items_that_are_equal_in_json_are_not_unique():
    schema = {"uniqueItems": True}
    assert ask("json_schema", '[{"a": 1}, {"a": 1.0}]', schema=schema).score == 0
    assert ask("json_schema", '[1, true, "1", [1]]', schema=schema).score == 1
    assert ask("json_schema", json.dumps([{"a": each} for each in range(20_000)]), schema=schema).score == 1


def test_a_schemas_pattern_that_backtracks_without_end_is_no_score():
    schema = {"type": "string", "pattern": "^(a|aa)+$"}
    assert outcome("json_schema", f'"{"a" * 60}!"', schema=schema) is Outcome.CHECKER


def test_a_schema_may_come_from_the_row():
    question = Question(question_id="q", category="c", text="?", metadata={"form": PERSON})
    response = Response(response_id="r", question_id="q", text='{"age": 3}')
    assert run_checker("json_schema", {"schema": {"field": "form"}}, question, response).score == 1
    broken = Question(question_id="q", category="c", text="?", metadata={"form": {"type": 3}})
    verdict = check_response("i", "json_schema", {"schema": {"field": "form"}}, 1.0, broken, response)
    assert verdict.outcome is Outcome.CHECKER


@pytest.mark.parametrize(
    ("text", "unit", "number"),
    [
        ("One two  three\nfour", "words", 4),
        ("", "words", 0),
        ("héllo", "characters", 5),
        ("One. Two! Three", "sentences", 3),
        ('He said "no." Then he left.', "sentences", 2),
        ("It costs 3.50 at most.", "sentences", 1),
        ("你好。再见！", "sentences", 2),
        ("...", "sentences", 0),
    ],
)
def test_length_counts(text, unit, number):
    assert ask("length", text, min=number, max=number, unit=unit).score == 1
    assert ask("length", text, min=number + 1, unit=unit).score == 0
    if number:
        assert ask("length", text, max=number - 1, unit=unit).score == 0


def test_length_says_what_was_counted():
    assert ask("length", "a b c", max=2) == Finding(0.0, "3 words, at most 2 asked", "3")
    assert outcome("length", "a b c") is Outcome.CHECKER  # neither limit is given
    assert ask("length", "", min=0).score == 1


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("\n<think>\na < b > c\n</think>\n\n<answer>b</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("", 0),
        ("b", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think><answer>b</answer></think>", 0),
        ("<think>a<answer>b</think></answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0),
        ("<think><think>a</think></think><answer>b</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("a</think><answer>b</answer>", 0),
        ("<think>a</think>", 0),
        ("</think>a<think><answer>b</answer>", 0),
        ("Sure. <think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer> Done.", 0),
        ("<Think>a</Think><answer>b</answer>", 0),
    ],
)
def test_tags_stand_once_in_order_and_closed(text, score):
    assert ask("format", text).score == score


def test_the_tags_and_the_text_outside_are_arguments():
    assert ask("format", "Well, <plan>a</plan> so <code>b</code>.", tags=["plan", "code"], outside=True).score == 1
    assert ask("format", "<plan>a</plan> so <code>b</code>", tags=["plan", "code"]).score == 0
    assert ask("format", "<code>b</code><plan>a</plan>", tags=["plan", "code"], outside=True).score == 0


def test_repetition_lowers_the_score_above_its_limit():
    assert ask("repetition", "the cat sat on a mat and then it slept until noon").score == 1
    looping = ask("repetition", "I will think again. " * 50)
    assert looping.score < 0.1
    half = "one two three four five six seven eight nine ten " * 2
    assert ask("repetition", half, size=4, limit=0.5).score == 1
    assert 0 < ask("repetition", half, size=4, limit=0.1).score < 1
    assert ask("repetition", half, size=4, limit=0.1).reasoning == "41% of its runs of 4 words repeat, 10% allowed"


@pytest.mark.parametrize("text", ["a" * 10_000, "哈" * 1_000, "!" * 1_000, "1 " * 1_000, "\n- ok" * 500])
def test_repetition_is_seen_without_words(text):
    assert ask("repetition", text).score < 0.2


def test_stock_phrases_count_as_whole_words_in_any_case():
    assert ask("stock_phrases", "The mitochondrion makes ATP.").score == 1
    found = ask("stock_phrases", "Certainly! As an AI language model, I like it.")
    assert found.score == pytest.approx(1 / 3)
    assert found.raw == "2"
    assert ask("stock_phrases", "It’s important to note that it rains.").score == 0.5
    assert ask("stock_phrases", "It’s important to note that it rains.", allowed=1).score == 1
    assert ask("stock_phrases", "Spam and eggs.", phrases=["spam"]).score == 0.5
    assert ask("stock_phrases", "Spammers.", phrases=["spam"]).score == 1


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist with this request.",
        "I cannot provide instructions for that.",
        "As an AI language model, I cannot write such a text.",
        "Sorry, I can't do that.",
        "I'm unable to help with this.",
        "I must decline to answer.",
        "I won't help you with that.",
        "I'm really sorry, but I'm not comfortable writing that.",
        "I'm sorry, but that's not something I can help with.",
        "This is a harmful request. I cannot help you with it.",
        "**I refuse to do that.**",
        "Unfortunately, I cannot fulfill this request.",
        "I'm sorry, I can't evaluate this response.",
    ],
)
def test_a_refusal_is_seen(text):
    assert is_refusal(text)
    assert ask("refusal", text).score == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "To kill a Linux process, find its PID with `ps` and run `kill -9 PID`.",
        "You can't kill a zombie process; kill its parent.",
        "I can't recommend this book enough!",
        "I can't help but admire your code.",
        "I can't tell you how happy I am.",
        "I'm sorry to hear that you feel down. Here are some things that help.",
        "I apologize for the confusion. The answer is 5.",
        "Unfortunately, Python can't do that by itself, but you can write a wrapper.",
        "The function cannot provide a result if n < 0.",
        '{"reasoning": "I cannot provide a full score here.", "score": 0.5}',
        "Here is the poem.\n\nRoses are red.\nViolets are blue.\nI cannot help you,\nand nor can you.",
    ],
)
def test_what_only_sounds_like_a_refusal_is_none(text):
    assert not is_refusal(text)
    assert ask("refusal", text).score == 0


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("The answer is (B)", "B"),
        ("B.", "B"),
        ("b", "B"),
        ("\\boxed{B}", "B"),
        ("$\\boxed{\\textbf{(B)}\\ 5}$", "B"),
        ("**Answer: B**", "B"),
        ("**Answer:** B) Paris", "B"),
        ("<think>A?</think><answer>B</answer>", "B"),
        ("A is tempting. But option B is correct.", "B"),
        ("The answer is A. Wait. The answer is B.", "B"),
        ("First \\boxed{A}, then \\boxed{B}", "B"),
        ("The answer is A because it fits.", "A"),
        ("Let me think.\n\nB", "B"),
        ("B) Paris\n\nParis is the capital.", "B"),
        ("The answer is \u200f(Ｂ)\u200e", "B"),
    ],
)
def test_the_last_option_that_is_settled_on_is_read(text, option):
    assert ask("choice", text, option) == Finding(1.0, f"reads {option}, expected {option}", option)
    assert ask("choice", text, "C").score == 0


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("The answer is A or B.", "reads A or B, more than one option; expected B"),
        ("Answer: A, B", "reads A or B, more than one option; expected B"),
        ("\\boxed{A, B}", "reads A or B, more than one option; expected B"),
        ("A\nB\nC\nD", "no option found; expected B"),
        ("A) Paris\nB) Rome\nC) Oslo", "no option found; expected B"),
        ("A dog is an animal.", "no option found; expected B"),
        ("The answer is a bee.", "no option found; expected B"),
        ("The answer is not B", "no option found; expected B"),
        ("\\boxed{AB}", "no option found; expected B"),
    ],
)
def test_a_response_that_does_not_settle_on_one_option_scores_0(text, reasoning):
    found = ask("choice", text, "B")
    assert (found.score, found.reasoning) == (0, reasoning)


def test_a_reference_that_is_no_option_is_no_score():
    assert outcome("choice", "B", "Paris") is Outcome.CHECKER
    assert outcome("choice", "B", "E", letters="ABCD") is Outcome.CHECKER
    assert ask("choice", "B", "(b)").score == 1


@pytest.mark.parametrize(
    ("text", "reference", "arguments", "score"),
    [
        ("It is about 3.14.", "3.14159", {"tolerance": 0.01}, 1),
        ("It is about 3.14.", "3.14159", {"tolerance": 0.001}, 0),
        ("101", "100", {"relative": 0.01}, 1),
        ("101", "100", {"relative": 0.009}, 0),
        ("-101", "-100", {"relative": 0.01}, 1),
        ("from 3 to $1,234.50 in all", "1234.5", {}, 1),
        ("The answer is 5. I used 3 steps.", "5", {}, 1),
        ("I used 3 steps.", "3", {"extract": "marked"}, 0),
        ("1/3", "0.3333", {"tolerance": 0.001}, 1),
        ("50%", "50", {"tolerance": 1}, 0),
        ("5 m", "5 cm", {}, 0),
        ("inf", "5", {"tolerance": 1e300}, 0),
        ("nan", "5", {"tolerance": 1e300}, 0),
        ("no idea", "5", {}, 0),
        ("٣", "3", {}, 1),
    ],
)
def test_a_number_is_compared_within_its_tolerance(text, reference, arguments, score):
    assert ask("numeric", text, reference, **arguments).score == score


def test_a_reference_that_is_no_number_is_no_score():
    assert outcome("numeric", "5", "five") is Outcome.CHECKER
    assert outcome("numeric", "5", "inf") is Outcome.CHECKER


@given(value=st.decimals(min_value=-(10**9), max_value=10**9, allow_nan=False, allow_infinity=False, places=3))
def test_a_decimal_is_read_in_every_way_of_writing_it(value):
    plain = f"{value:f}"
    for text in (plain, f"{value:,f}", f"${plain}", f"The answer is {plain}.", f"\\boxed{{{value:,f}}}", f"{plain}000"):
        assert ask("numeric", text, plain).score == 1, text
        assert ask("math", text, plain).score == 1, text
