r"""Mathematical equivalence: what is read as the answer, what is equal, and that nothing else is."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grape.checkers import Finding, check_response, run_checker
from grape.checkers import math as math_checker
from grape.checkers.workers import Pool
from grape.types import Outcome, Question, Response, Verdict

SOLUTIONS = Path(__file__).parents[1] / "examples" / "gsm8k" / "model_solutions.jsonl.gz"


def ask(response: str, reference: str, **arguments: object) -> Finding:
    question = Question(question_id="q", category="math", text="?", reference=reference)
    return run_checker("math", arguments, question, Response(response_id="r", question_id="q", text=response))


def verdict(response: str, reference: str, **arguments: object) -> Verdict:
    question = Question(question_id="q", category="math", text="?", reference=reference)
    given_response = Response(response_id="r", question_id="q", text=response)
    return check_response("item", "math", arguments, 1.0, question, given_response)


def boxed(answer: str) -> str:
    return f"So it is $\\boxed{{{answer}}}$."


@pytest.mark.slow
def test_it_agrees_with_every_stored_judgement_of_the_gsm8k_solutions():
    disagreements, number = [], 0
    with gzip.open(SOLUTIONS, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            for model, solution in row.items():
                if isinstance(solution, dict):
                    number += 1
                    found = ask(solution["solution"], row["ground_truth"])
                    if (found.score == 1) != solution["is_correct"]:
                        disagreements.append((row["question"], model, found))
    assert disagreements == []
    assert number == 5276


@pytest.mark.parametrize(
    "response",
    [
        "#### 18",
        "She makes 9 * 2 = $<<9*2=18>>18.\n#### 18",
        "A: 18",
        "reasoning\nA: $18.00",
        "\\boxed{18}",
        "\\fbox{18}",
        "$$\\boxed{\\text{18}}$$ dollars",
        "The answer is 18.",
        "the answer is 18, because 9 * 2 = 18",
        "The answer is $18$ dollars per day.",
        "The answer to the question is **18**.",
        "The final answer is: $\\boxed{18}$. I hope it is correct.",
        "The answer is:\n\n\\[ 18 \\]",
        "Answer: 18",
        "**Answer:** 18",
        "**Final Answer**\n\n18",
        "### Final Answer\n\\( 18 \\)",
        "<think>17?</think><answer>18</answer>",
        "<answer>\\boxed{18}</answer>",
        "The answer is 16 + 2 = 18.",
        "The answer is x = 18.",
        "The answer is therefore 18!",
        "18",
        "$18$",
        "18 dollars per day",
        "The answer is 17. No: the answer is 18.",
        "#### 16\n\\boxed{17}\nA: 18",
        "A: 16\nThe answer is 17, so \\boxed{18}",
        "\\boxed{18}, so the answer is clear to everybody",
        "The answer is \u200f١٨\u200e.",
        "The answer is １８",
    ],
)
def test_the_last_marked_answer_is_read_in_any_of_its_formats(response):
    assert ask(response, "18").score == 1
    assert ask(response, "Half of 36.\n#### 18").score == 1
    assert ask(response, "17").score == 0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "She makes 18 dollars.",
        "I think it is 18",
        "the answer is not 18",
        "The answer is at least 18",
        "The answer is about 18",
        "The answer is either 17 or 18",
        "The answer is 17 or 18",
        "The answer is 18 and 20",
        "\\boxed{17, 18}",
        "\\boxed{18",
        "\\boxed{}",
        "The answer is 1 8",
        "The answer is 18 million",
        "The answer is 18 hours and 30 minutes",
        "The answer is 18-20",
        "The answer is <18",
        "#### 18 19",
        "#### Step 18",
        "\\boxed{18x}",
        "\\boxed{18 \\pm 1}",
        "\\boxed{\\approx 18}",
        "\\boxed{18?}",
        "\\boxed{\\infty}",
        "\\boxed{nan}",
        "\\boxed{18/0}",
    ],
)
def test_a_response_that_states_no_single_answer_scores_0(response):
    assert ask(response, "18").score == 0


def test_the_last_number_counts_only_by_request():
    text = "She sells 9 eggs at $2 each and makes $18 a day."
    assert ask(text, "18") == Finding(0.0, "no final answer found; expected 18")
    assert ask(text, "18", extract="last_number") == Finding(1.0, "reads $18, expected 18", "$18")
    assert ask("It is -3/4, I say", "-0.75", extract="last_number").score == 1
    assert ask("5-3", "3", extract="last_number").score == 0
    assert ask("From 5 to 3", "3", extract="last_number").score == 1
    assert ask("The answer is 4. Then 3.", "4", extract="last_number").score == 1


EQUAL = [
    ("1234", "1,234.00"), ("1234.5", "\\$1,234.50"), ("1234", "1{,}234"), ("1234", "1\\,234"), ("-5", "−5"),
    ("-5", "(-5)"), ("-3", "-\\$3"), ("1/2", "\\frac{1}{2}"), ("1/2", "0.5"), ("0.5", "\\dfrac12"), ("0.5", ".5"),
    ("3/2", "1\\frac{1}{2}"), ("3.5", "3½"), ("1/3", "0.\\overline{3}"), ("1000", "1e3"), ("1500", "1.5 \\times 10^3"),
    ("2^{100}", "1267650600228229401496703205376"), ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt2}"),
    ("\\sqrt{2}/2", "sqrt(2)/2"), ("2\\pi", "6\\pi/3"), ("x^2+2x+1", "(x+1)^2"), ("(x+1)^2", "x**2 + 2*x + 1"),
    ("n(n+1)/2", "\\frac{n^2+n}{2}"), ("a^2-b^2", "(a-b)(a+b)"), ("\\sec^2 y", "\\tan^2(y)+1"), ("|x-1|", "|1-x|"),
    ("\\frac{n!}{k!(n-k)!}", "\\binom{n}{k}"), ("\\log_2 8", "3"), ("\\ln 3", "ln(3)"), ("120", "5!"),
    ("\\sqrt[3]{-8}", "-2"), ("-1", "i^2"), ("3+4i", "4i+3"), ("e^2", "\\exp(2)"), ("\\sqrt{3}/3", "\\tan 30^\\circ"),
    ("x=2", "2"), ("2", "x = 2"), ("x=2", "x=2"), ("x=2", "2=x"), ("x^2", "f(x) = x^2"), ("y=2x+1", "y = 1+2x"),
    ("y=2x+1", "2x - y + 1 = 0"), ("2x+4y-3=0", "y = -\\frac{1}{2}x+\\frac34"), ("x>2", "2<x"), ("x>2", "(2,\\infty)"),
    ("[2,5)", "2 \\le x < 5"), ("x \\in [1,2]", "[1,2]"),
    ("(-\\infty,2)\\cup(3,\\infty)", "(3,\\infty)\\cup(-\\infty,2)"),
    ("(-\\infty,-3)\\cup(3,\\infty)", "x<-3 \\text{ or } x>3"), ("\\mathbb{R}", "(-\\infty,\\infty)"),
    ("\\{1,2\\}", "\\{2,1\\}"), ("1,2", "2, 1"), ("1, 2", "x=1 \\text{ or } x=2"), ("\\pm 2", "2, -2"),
    ("x=1,y=2", "y=2,x=1"), ("(1,\\frac{9}{2})", "(1, 4.5)"), ("[1,2)", "\\left[1,2\\right)"),
    ("\\langle 1,2\\rangle", "\\langle 1, 2\\rangle"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 3 & \\frac{8}{2} \\end{pmatrix}"),
    ("50\\%", "50 \\text{ percent}"), ("5 cm", "5\\text{ cm}"), ("5 m", "5 \\mathrm{~meters}"),
    ("2\\sqrt{3}\\text{ cm}", "\\sqrt{12}\\text{ cm}"), ("64 square inches", "64\\text{ in}^2"),
    ("90^\\circ", "90^{\\circ}"), ("\\$18", "18"), ("18 dollars", "18"), ("18", "18\\text{ eggs}"),
    ("5", "5\\text{ meters}"), ("2000000", "2 \\text{ million}"), ("\\infty", "\\infty"), ("12:00", "12:00"),
    ("4:3", "4 : 3"), ("\\text{no solution}", "\\text{No solution}"), ("\\text{Sunday}", "Sunday"),
    ("\\text{(A)}", "\\text{(A)}"), ("1010_2", "1010_{2}"),
]  # fmt: skip
DIFFERENT = [
    ("18", "81"), ("5", "-5"), ("1/3", "0.333333"), ("\\pi", "3.141592653589793"), ("\\sqrt2", "1.4142135623730950488"),
    ("1", "0.999999999999999999999"), ("10^{-20}", "0"), ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("e^{-1000}", "e^{-1001}"), ("e^{\\pi\\sqrt{163}}", "262537412640768744"), ("0.3", "0.1+0.2+10^{-30}"),
    ("x", "x+10^{-20}"), ("\\frac{2^{2005}+1}{3 \\cdot 2^{2006}}", "\\frac{1}{3 \\cdot 2^{2006}}"), ("5", "\\infty"),
    ("\\infty", "5"), ("\\infty", "-\\infty"), ("5 m", "5\\text{ cm}"), ("5 m", "5"), ("5 m^2", "5\\text{ m}"),
    ("5 km/h", "5\\text{ km}"), ("3 hours", "3\\text{ minutes}"), ("5 \\text{ M}", "5\\text{ m}"), ("50", "50\\%"),
    ("50\\%", "50"), ("0.5", "50\\%"), ("50\\%", "0.5"), ("\\$5", "€5"), ("90^\\circ", "90"), ("x=2", "y=2"),
    ("x=2", "2x=4"), ("2", "3y=2"), ("2", "2x"), ("3x-y+13=0", "3x+4y+14=0"), ("x^2/4+y^2/3=1", "x^2/16+y^2/12=1"),
    ("y=2x+1", "y=2x+2"), ("y=x", "y=-x"), ("n=2,3,4", "n=1,2,3"), ("D=(0,1)", "D=(0,1.5)"),
    ("F_n=\\sum_{k=0}^{n-1} k", "F_n=\\sum_{k=0}^{n-2} k"), ("x>2", "x\\ge 2"), ("x>2", "x<2"), ("x>3", "3"),
    ("x\\ne 2", "x=2"), ("[2,5)", "2<x<5"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2)", "1,2"),
    ("\\{1,2\\}", "(1,2)"), ("\\{1,2,3\\}", "\\{1,2\\}"), ("5", "5,6"), ("\\pm 2021", "2021"), ("[0,1]", "[0,2]"),
    ("19, 46, \\text{ and } 82", "21, 36, \\text{ and } 82"), ("1,2,\\ldots,n", "1,3,5,\\ldots,2n-1"),
    ("12:00", "1:00"), ("1:2:3", "1:4:9"), ("A", "a"), ("a+b", "A+B"), ("x", "|x|"), ("x", "\\sqrt{x^2}"),
    ("\\ln x", "\\log x"), ("(x+1)(x-1)", "x^2+1"), ("1010_2", "1010"), ("4", "4\\sqrt(2)"), ("12", "3 x 4"),
    ("10", "5 5"), ("\\text{yes}", "no"), ("1,234", "1, 234"), ("3", "[3]"), ("i", "-i"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"), ("\\text{Monday}", "\\text{Sunday}"),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_equal_answers_are_equal(reference, answer):
    assert ask(boxed(answer), reference).score == 1


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_different_answers_are_not_equal(reference, answer):
    assert ask(boxed(answer), reference).score == 0


@pytest.mark.parametrize(
    "answer", sorted({*(each for pair in EQUAL for each in pair), *(reference for reference, _ in DIFFERENT)})
)
def test_an_answer_is_equal_to_itself(answer):
    assert ask(boxed(answer), answer).score == 1


@pytest.mark.parametrize(
    "reference", ["$18", "18 dollars", "5 km/h", "50%", "x = 18 dollars", "18 apples", "90^\\circ"]
)
def test_a_reference_with_a_unit_is_compared_with_any_answer(reference):
    for answer in ("x+1", "(1,2)", "x>2", "y=2x", "\\sqrt{7}", "\\text{no}", "1:2", "1, 2"):
        assert ask(boxed(answer), reference).score == 0
        assert ask(boxed(reference), answer).score == 0
    assert ask(boxed("\\sqrt{324}"), "$18").score == 1
    assert ask(boxed("18"), "x = 18 dollars").score == 1


def test_the_reasoning_says_what_was_read_and_what_was_expected():
    assert ask("#### 17", "#### 18").reasoning == "reads 17, expected 18"
    assert ask(boxed("5\\text{ cm}"), "5 m").reasoning == "reads 5\\text{ cm} (cm is not m), expected 5 m"
    assert ask(boxed("50"), "50%").reasoning == "reads 50 (no unit is not %), expected 50%"
    assert ask(boxed("(1"), "\\sqrt{2}").reasoning == (
        "reads (1 (not readable: Unreadable: brackets that do not match, or nested too deeply), expected \\sqrt{2}"
    )


def test_a_tolerance_is_absolute_and_leaves_integers_exact():
    assert ask(boxed("3.14"), "\\pi", tolerance=0.01).score == 1
    assert ask(boxed("3.14"), "\\pi", tolerance=0.001).score == 0
    assert ask(boxed("3.14"), "3.1416", tolerance=0.01).score == 1
    assert ask(boxed("0.333"), "1/3", tolerance=0.001).score == 1
    assert ask(boxed("18"), "19", tolerance=5).score == 0
    assert ask(boxed("\\sqrt{324}"), "19", tolerance=5).score == 0
    assert ask(boxed("\\infty"), "19.5", tolerance=5).score == 0


numbers = st.fractions(max_denominator=10**6).filter(lambda value: abs(value) < 10**12)


def written(value: Fraction) -> list[str]:
    minus = "-" if value < 0 else ""
    top, bottom = abs(value.numerator), value.denominator
    forms = [f"{minus}{top}/{bottom}", f"{minus}\\frac{{{top}}}{{{bottom}}}", f"\\frac{{{minus}{top}}}{{{bottom}}}"]
    if bottom == 1:
        forms += [f"{minus}{top}", f"{minus}{top:,}", f"{minus}${top}.00", f"{minus}{top}."]
    elif top > bottom:
        forms += [f"{minus}{top // bottom}\\frac{{{top % bottom}}}{{{bottom}}}"]
    return forms


@given(value=numbers, other=numbers)
@pytest.mark.slow
def test_numbers_are_equal_exactly_when_their_values_are(value, other):
    for one in written(value):
        for two in written(other):
            assert ask(f"The answer is {one}", two).score == float(value == other)
            assert ask(f"The answer is {two}", one).score == float(value == other)
        assert ask(boxed(one), written(value)[0]).score == 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    roots=st.lists(st.integers(-9, 9), min_size=1, max_size=3), off=st.integers(-2, 2), variable=st.sampled_from("xtn")
)
@pytest.mark.slow
def test_a_product_equals_its_expansion_and_nothing_beside_it(roots, off, variable):
    coefficients = [1]
    for root in roots:
        coefficients = [a - root * b for a, b in zip([*coefficients, 0], [0, *coefficients], strict=True)]
    coefficients[-1] += off
    degree = len(roots)
    expanded = "".join(f"{c:+d}{variable}^{{{degree - power}}}" for power, c in enumerate(coefficients))
    product = "".join(f"({variable}{-root:+d})" for root in roots)
    assert ask(boxed(expanded), product).score == float(off == 0)
    assert ask(boxed(product), expanded).score == float(off == 0)


GARBAGE = {
    "ten megabytes": "a" * 10_000_000,
    "ten megabytes of digits": "9" * 10_000_000,
    "a huge integer": boxed("9" * 100_000),
    "a long integer": boxed("9" * 1_900),
    "a huge exponent": boxed("1e999999999"),
    "a tower": boxed("9^{9^{9^{9}}}"),
    "a tower in plain text": "The answer is 9**9**9**9",
    "factorials": boxed("9!!!!!!!"),
    "a large factorial": boxed("(10^9)!"),
    "boxes in boxes": "\\boxed{" * 100_000,
    "brackets": boxed("(" * 1_500),
    "braces": boxed("{" * 900 + "1" + "}" * 900),
    "commas": boxed("," * 1_900),
    "signs": boxed("\\pm" * 100 + "1"),
    "equals": boxed("=" * 1_000),
    "a lone surrogate": boxed("\ud800"),
    "NUL": boxed("1\0"),
    "binary": bytes(range(256)).decode("latin-1") * 1_000,
    "marks without end": "the answer is " * 500_000,
    "lines without end": "A: x\n" * 500_000,
    "direction marks": "\u202e1\u202c8" * 100_000,
    "an import": boxed("__import__('os').system('exit')"),
    "a call": "The answer is __import__('os')._exit(0)",
    "an attribute": boxed("().__class__.__bases__"),
    "a large matrix": boxed("\\operatorname{zeros}(9999,9999)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["18", "\\frac{\\sqrt{2}}{2}", "\\text{no}"])
def test_the_garbage_of_a_response_scores_0(reference):
    outcomes = {name: verdict(text, reference, timeout=1) for name, text in GARBAGE.items()}
    assert {name: (each.outcome, each.score) for name, each in outcomes.items()} == dict.fromkeys(GARBAGE, ("ok", 0.0))
    assert ask(boxed("\\frac{36}{\\sqrt{4}}"), "18").score == 1


@settings(max_examples=60, deadline=None)
@given(answer=st.text(alphabet="0123456789.,-+*/^_(){}[]\\$%=<>!|&' xyzeipsqrtfraclognd\ud800\u0663", max_size=30))
def test_any_answer_is_judged(answer):
    assert verdict(boxed(answer), "\\sqrt{5}", timeout=1).outcome is Outcome.OK
    assert verdict(f"The answer is {answer}", "x+1", timeout=1).outcome is Outcome.OK


def test_an_answer_that_takes_too_long_scores_0():
    found = ask(boxed("\\prod_{k=1}^{10^9} k"), "18", timeout=0.5)
    assert found.score == 0
    assert found.reasoning == (
        "reads \\prod_{k=1}^{10^9} k (given up after more than 0.5 s of processor time), expected 18"
    )


@pytest.mark.parametrize("reference", ["", "nan", "\\frac{1}{0}", "18 19", "(((", "see page 3 there", "9" * 3_000])
def test_a_reference_that_cannot_be_read_is_no_score_whatever_the_response(reference):
    for response in (boxed("18"), "nothing", boxed(reference[:100])):
        found = verdict(response, reference)
        assert (found.outcome, found.score) == (Outcome.CHECKER, None)
        assert "cannot be read as mathematics" in found.detail


def test_a_worker_that_cannot_be_started_is_no_score(monkeypatch):
    monkeypatch.setattr(math_checker, "WORKERS", Pool("grape.checkers.no_such_module"))
    found = verdict(boxed("\\sqrt{16}"), "\\sqrt{9} + 1.5")
    assert found.outcome is Outcome.CHECKER
    assert "a worker could not be started" in found.detail
    assert "No module named grape.checkers.no_such_module" in found.detail


def test_text_of_a_model_never_reaches_sympy_in_the_process_that_scores():
    program = """
import sys
from grape.checkers import run_checker
from grape.types import Question, Response
question = Question(question_id="q", category="c", text="?", reference="x^2-1")
response = Response(response_id="r", question_id="q", text="\\\\boxed{(x-1)(x+1)}")
assert run_checker("math", {}, question, response).score == 1
loaded = {name.split(".")[0] for name in sys.modules}
print(sorted(loaded & {"sympy", "math_verify", "latex2sympy2_extended", "antlr4"}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
