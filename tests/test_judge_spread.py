"""One score and one confidence from several: votes, a jury, the tokens of one reply."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grape.judge.calibration import Calibration, Map
from grape.judge.spread import combined
from grape.judge.tokens import read_beginning, score_shares, tokens_of_score
from grape.judge.trail import voted
from grape.scale import parse_scale
from grape.types import Outcome, Verdict

BINARY = parse_scale("binary")
UNIT = parse_scale("unit")


@pytest.mark.parametrize(
    ("scores", "shares", "mean", "median", "majority", "confidence"),
    [
        ([1, 1, 0], [1, 1, 1], 2 / 3, 1, 1, 2 / 3),
        ([1, 0], [1, 1], 0.5, 0.5, 0, 0.5),
        ([0.5], [3], 0.5, 0.5, 0.5, 1),
        ([0, 1], [0.1, 0.9], 0.9, 1, 1, 0.9),
        ([0, 0.5, 1], [1, 1, 1], 0.5, 0.5, 0, 1 - 1 / 3),
        ([0.2, 0.4, 0.4, 1.0], [1, 1, 1, 1], 0.5, 0.4, 0.4, 1 - (0.2 + 0.6) / 4),
    ],
)
def test_score_and_confidence_of_several(scores, shares, mean, median, majority, confidence):
    for aggregate, score in (("mean", mean), ("median", median), ("majority", majority)):
        assert combined(scores, shares, aggregate) == (pytest.approx(score), pytest.approx(confidence))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 1)), min_size=1, max_size=12), st.randoms())
def test_what_is_combined_lies_among_its_scores_whatever_their_order(pairs, random):
    mixed = random.sample(pairs, len(pairs))
    for aggregate in ("mean", "median", "majority"):
        score, confidence = combined(*zip(*pairs, strict=True), aggregate)
        assert min(score for score, _ in pairs) - 1e-12 <= score <= max(score for score, _ in pairs) + 1e-12
        assert 0.5 - 1e-9 <= confidence <= 1 + 1e-12
        other, same = combined(*zip(*mixed, strict=True), aggregate)
        assert same == pytest.approx(confidence, abs=1e-9)
        if aggregate == "mean":
            assert other == pytest.approx(score, abs=1e-9)


def reply(score):
    return '{"reasoning": "so", "score": ' + score + ', "confidence": 1}'


def tokens(text, *alternatives):
    """One token of each character; the alternatives of some, by their place."""
    at = dict(alternatives)
    return tokens_of_score(text, [[(sign, -0.1), *at.get(n, [])] for n, sign in enumerate(text)])


def log(probability):
    return math.log(probability)


def test_the_tokens_of_a_score_are_those_that_share_a_character_with_it():
    text = reply('"met"')
    start = text.index('"met"')
    whole = [[(text[: start - 1], 0.0)], [(' "', -1.0)], [("met", -2.0)], [('",', -3.0)], [(text[start + 6 :], 0.0)]]
    found = tokens_of_score(text, whole)
    assert found == [(start - 1, whole[1]), (start + 1, whole[2]), (start + 4, whole[3])]
    assert tokens_of_score("no verdict", [[("no verdict", 0.0)]]) is None


def test_a_score_of_one_token_has_the_shares_of_its_alternatives():
    text = reply("1")
    place = text.index("1")
    got = score_shares(text, [(place, [("1", log(0.6)), ("0", log(0.2)), ("null", log(0.1)), ("2", log(0.1))])], BINARY)
    assert got == {1.0: pytest.approx(0.75), 0.0: pytest.approx(0.25)}


def test_a_score_of_several_tokens_has_those_that_differ_in_one():
    scale = parse_scale({"numeric": [0, 100]})
    text = reply("85")
    place = text.index("85")
    got = score_shares(
        text, [(place, [("8", log(0.5)), ("9", log(0.3))]), (place + 1, [("5", log(0.8)), ("0", log(0.1))])], scale
    )
    total = 0.5 * 0.8 + 0.3 + 0.5 * 0.1
    assert got == {0.85: pytest.approx(0.4 / total), 0.09: pytest.approx(0.3 / total), 0.8: pytest.approx(0.05 / total)}


def test_labels_are_known_by_their_beginnings():
    scale = parse_scale({"ordinal": ["none", "some", "all"]})
    text = reply('"some"')
    place = text.index('"some"') + 1
    got = score_shares(text, [(place, [("some", log(0.5)), ("al", log(0.25)), ("no", log(0.25)), ("x", -1)])], scale)
    assert got == {0.5: pytest.approx(0.5), 1.0: pytest.approx(0.25), 0.0: pytest.approx(0.25)}
    both = parse_scale({"choices": {"partly": 0.5, "part": 0.2}})
    assert read_beginning('"par', both) is None
    assert read_beginning('"partl', both) == 0.5


@pytest.mark.parametrize(
    ("text", "scale", "score"),
    [
        ("1", "binary", 1), ("0}", "binary", 0), (" 1, ", "binary", 1), ("2", "binary", None), ("null", "binary", None),
        ("1 2", "binary", None), ("true", "binary", None), ('"yes"', "binary", 1), ("0", "unit", 0.5), ("0}", "unit", 0),
        ("0.25", "unit", 0.25), ("1.5", "unit", None), ("-1", "unit", None), ("{", "unit", None), ("", "unit", None),
        ('"', "binary", None), ("4", {"likert": {1: "bad", 5: "good"}}, 0.75), ('"go', {"likert": {1: "a", 5: "go"}}, None),
        ("[" * 5000, "unit", None),
    ],
)  # fmt: skip
def test_what_a_reply_has_begun_to_say(text, scale, score):
    assert read_beginning(text, parse_scale(scale)) == score


@given(st.floats(-30, 0), st.lists(st.tuples(st.text(max_size=3), st.floats(-30, 0)), max_size=6))
def test_the_shares_of_any_alternatives_are_those_of_scores_and_sum_to_one(written, others):
    got = score_shares(reply("0.5"), [(reply("0.5").index("0.5"), [("0.5", written), *others])], UNIT)
    assert sum(got.values()) == pytest.approx(1)
    assert all(0 <= score <= 1 for score in got)
    assert 0.5 in got


def vote(score=None, **fields):
    outcome = Outcome.OK if score is not None else fields.pop("outcome", Outcome.TIMEOUT)
    defaults = {"raw": str(score), "reasoning": f"r{score}", "calls": (f"c{score}",), "latency": 1.0, "input_tokens": 5}
    return Verdict(item="i", outcome=outcome, score=score, **{**defaults, **fields})


def test_votes_become_one_verdict_that_says_what_they_took():
    got = voted([vote(1.0), vote(0.0), vote(1.0)], "mean", judge="j")
    assert (got.score, got.confidence, got.stated) == (pytest.approx(2 / 3),) * 3
    assert (got.raw, got.reasoning, got.judge) == ("1.0, 0.0, 1.0", "r1.0", "j")
    assert (got.calls, got.attempts, got.latency, got.input_tokens) == (("c1.0", "c0.0"), 3, 3.0, 15)
    assert got.detail is None


def test_failed_votes_have_no_vote_and_half_of_them_is_a_failure():
    got = voted([vote(1.0), vote(0.5), vote(detail="slow")], "median", judge="j")
    assert (got.score, got.confidence) == (0.75, 0.75)
    assert got.detail == "1 of 3 votes failed: timeout: slow"
    got = voted([vote(1.0), vote(detail="slow")], "median", judge="j")
    assert (got.outcome, got.score, got.confidence) == (Outcome.TIMEOUT, None, None)
    assert (got.detail, got.judge, got.attempts) == ("1 of 2 votes failed: timeout: slow", "j", 2)


def test_a_map_is_isotonic_constant_or_zero():
    rising = Map(kind="isotonic", x=[0.5, 0.9], y=[0.4, 0.8])
    assert [rising(c) for c in (0.0, 0.5, 0.7, 0.9, 1.0)] == pytest.approx([0.4, 0.4, 0.6, 0.8, 0.8])
    assert (Map(kind="constant", y=[0.7])(0.1), Map(kind="zero")(0.9)) == (0.7, 0.0)
    maps = {"math/i": Map(kind="zero"), "i": Map(kind="constant", y=[0.5]), "*": Map(kind="constant", y=[0.25])}
    calibration = Calibration(judge="j", identity="x", maps=maps)
    assert [calibration(*of, 0.9) for of in (("math", "i"), ("art", "i"), ("art", "other"))] == [0.0, 0.5, 0.25]
    assert Calibration(judge="j", identity="x", maps={})("art", "i", 0.9) == 0.9


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "isotonic", "x": [0.5, 0.4], "y": [0.1, 0.2]}, {"kind": "isotonic", "x": [0.1, 0.4], "y": [0.3, 0.2]},
        {"kind": "isotonic"}, {"kind": "constant"}, {"kind": "zero", "y": [0.5]}, {"kind": "constant", "y": [2.0]},
    ],
)  # fmt: skip
def test_a_map_that_is_none_is_refused(fields):
    with pytest.raises(ValueError, match=r"x must rise|has as many|less than or equal"):
        Map(**fields)
