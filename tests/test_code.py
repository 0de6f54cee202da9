"""The checker `code`: right programs score, wrong ones do not, forgeries never, and broken tests are no one's score."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from forgeries import FORGERIES, SLOW

from grape.checkers import check_response, run_checker
from grape.checkers.code import pieces
from grape.errors import ConfigError
from grape.sandbox import Sandbox, broker
from grape.scoring import score as score_rows
from grape.types import Outcome, Question, Response

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are confined on Linux")


def example(name: str) -> Any:
    """A module of examples/coding."""
    spec = importlib.util.spec_from_file_location(f"coding_{name}", ROOT / "examples/coding" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = example("make")
TASKS = {task["task_id"].split("/")[1]: task for task in MAKE.tasks()}
SAMPLE = ("2", "32", "38", "74", "115")


CONFINED = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    with Sandbox(workers=2) as sandbox:
        yield sandbox


def ask(tests: str, text: str = "Write it.", entry_point: str | None = None) -> Question:
    return Question(question_id="q", category="coding", text=text, tests=tests, entry_point=entry_point)


def task_question(task: Mapping[str, Any]) -> Question:
    return ask(task["test"], task["prompt"], task["entry_point"])


def score(question: Question, response: str, sandbox: Sandbox, **arguments: Any) -> float:
    return run_checker("code", arguments, question, answer(response), sandbox).score


def answer(text: str) -> Response:
    return Response(response_id="r", question_id="q", text=text)


def verdict(question: Question, response: str, sandbox: Sandbox) -> Any:
    return check_response("tests", "code", {"timeout": 1}, 1.0, question, answer(response), sandbox)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["canonical", "pretender", "explained", "empty"])
def test_humaneval_scores_its_own_solutions_1_and_everything_else_0(sandbox: Sandbox, kind: str):
    with ThreadPoolExecutor(2) as threads:
        scores = list(
            threads.map(lambda task: score(task_question(task), MAKE.responses(task)[kind], sandbox), TASKS.values())
        )
    assert len(scores) == 164
    assert set(scores) == ({1.0} if kind in ("canonical", "explained") else {0.0})


def forge(source: str, task: Mapping[str, Any]) -> str:
    return source.replace("NAME", task["entry_point"])


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.slow
def test_a_forgery_scores_0(sandbox: Sandbox, name: str):
    for number in SAMPLE:
        found = verdict(task_question(TASKS[number]), forge(FORGERIES[name], TASKS[number]), sandbox)
        assert (found.outcome, found.score) == (Outcome.OK, 0.0), (number, found)
    assert score(task_question(TASKS["53"]), "    return x + y\n", sandbox) == 1.0, "the next program is unharmed"


@pytest.mark.parametrize("name", SLOW)
def test_a_program_that_hangs_scores_0(sandbox: Sandbox, name: str):
    found = run_checker(
        "code", {"timeout": 0.2}, task_question(TASKS["53"]), answer(forge(SLOW[name], TASKS["53"])), sandbox
    )
    assert found.score == 0.0
    assert "timeout: it took more than 0.2 s" in found.reasoning


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORGERIES, *SLOW])
def test_a_forgery_scores_0_on_every_task(sandbox: Sandbox, name: str):
    source = FORGERIES.get(name) or SLOW[name]

    def one(task: Mapping[str, Any]) -> float:
        return score(task_question(task), forge(source, task), sandbox, timeout=3 if name in FORGERIES else 0.1)

    with ThreadPoolExecutor(2) as threads:
        scores = dict(zip(TASKS, threads.map(one, TASKS.values()), strict=True))
    assert {number for number, score in scores.items() if score} == set()


EXPECTING = """
import math
expect(run("2 3") == "5\\n")
out = run("1 1")
expect(out.strip() == "2")
expect(math.isclose(call("add", 0.1, 0.2), 0.3), "near enough")
for n in range(3):
    expect(call("add", n, n) == 2 * n)
"""
ADDER = """
def add(a, b):
    return a + b
if __name__ == "__main__":
    print(add(*map(int, input().split())))
"""


@pytest.mark.parametrize(
    ("change", "expected", "reason"),
    [
        (("", ""), 1.0, "6 of 6 tests hold"),
        (("a + b", "a * b"), 2 / 6, "line 3: expect(run(\"2 3\") == \"5\\n\"): does not hold; run('2 3') gave '6\\n'"),
        (("a + b", "a + b if a != 0.1 else 1 / 0"), 5 / 6, "ZeroDivisionError: division by zero (line 3)"),
        (("print(add", "raise KeyError(add"), 4 / 6, "line 5: expect(out.strip() == \"2\"): NameError"),
        (("return a + b", "return [a, b] if a == 2 else a + b"), 4 / 6, "add(2, 2) gave [2, 2]"),
        (("    print", "    import os; os._exit(0)\n    print"), 4 / 6, "run('2 3') gave ''"),
        (("return a + b", "import os; os._exit(0) if a == 1 else None; return a + b"), 4 / 6, "it ended with status 0"),
        (("return a + b", "return a + b if a != 1 else NotImplemented"), 4 / 6, "NotImplementedType is not plain data"),
        (("return a + b", "while a == 1: pass\n    return a + b"), 4 / 6, "timeout: it took more than 0.5 s"),
        (("return a + b", "x = a == 1 and bytearray(10**10)\n    return a + b"), 4 / 6, "MemoryError"),
        (("def add(a, b)", "def sub(a, b)"), 0.0, "NameError: the program defines no 'add'"),
        (("return", "retrun"), 0.0, "SyntaxError: invalid syntax"),
    ],
)  # fmt: skip
def test_the_score_is_the_share_of_expectations_that_hold(
    sandbox: Sandbox, change: tuple[str, str], expected: float, reason: str
):
    found = run_checker("code", {"timeout": 0.5}, ask(EXPECTING), answer(ADDER.replace(*change)), sandbox)
    assert found.score == pytest.approx(expected)
    assert found.raw == f"{round(expected * 6)}/6"
    assert reason in found.reasoning


# Tests, program, share.
HELD = {
    "a failure is no value to compare": ("expect(call('f') != 3)", "def f(): raise ValueError", 0.0),
    "a failure is kept for what uses it": (
        "out = call('f')\nexpect(out is not None)\nexpect(True)", "def f(): 1/0", 0.5),
    "and for what comes of it": (
        "parts = call('f')\nfirst = parts[0]\nexpect(first is None or first != 2)", "def f(): 1/0", 0.0),
    "in a function of the tests too": (
        "def ask(n):\n    out = call('f', n)\n    return out\nfor n in range(4):\n    expect(ask(n) != 9)",
        "def f(n): return 1 / (n % 2)", 0.5),
    "a value of another type": ("expect(call('f')['key'][0] == 1)\nexpect(True)", "def f(): return None", 0.5),
    "a value of another shape": ("expect(len(call('f')) == 2)\nexpect(call('f').x)", "def f(): return [1, 2]", 0.5),
    "a loop pays nothing for its good start": (
        "k = []\nfor n in range(3):\n    k.append(call('f', n))\n    expect(True)\nexpect(k == [0])",
        "def f(n): return 0 // (1 - n)", 0.0),
    "what is not reached does not hold": (
        "expect(True)\nfor x in call('f'):\n    expect(x > 0)\nexpect(True)", "def f(): return None", 1 / 3),
    "nothing to expect is nothing held": ("for x in call('f'):\n    expect(x > 0)", "def f(): return []", 0.0),
    "each turn of a loop counts": ("for x in call('f'):\n    expect(x > 0)", "def f(): return [1, -1, 1, 1]", 0.75),
    "an error that is called for": (
        """
try:
    call("f")
except ProgramError as error:
    expect(error.kind == "ValueError" and "bad" in str(error))
else:
    expect(False)
""", "def f(): raise ValueError('bad')", 1.0),
    "an error that is missing": (
        "try:\n    call('f')\n    expect(False)\nexcept Exception:\n    expect(True)", "def f(): return 1", 0.0),
    "state lives on, a run is apart": (
        "call('f', 2)\nexpect(run('') == '0\\n')\nexpect(call('f', 3) == 5)",
        "n = 0\ndef f(k):\n    global n\n    n += k\n    return n\nif __name__ == '__main__': print(n)", 1.0),
    "a process that ended begins again": (
        "expect(call('f', 1) == 1)\nexpect(call('f', 2) == 2)",
        "import os\ndef f(k):\n    if k == 1: os._exit(0)\n    return k", 0.5),
    "arguments are copies": (
        "xs = [3, 1]\nexpect(call('f', xs) is None)\nexpect(xs == [3, 1])", "def f(xs): xs.sort()", 1.0),
    "data is exact": (
        "expect(call('f', 1, b=(2, {3})) == [1, (2, {3}), b'x', {1: None}, 2**70])",
        "def f(a, b): return [a, b, b'x', {1: None}, 2**70]", 1.0),
    "numbers without a value": (
        "x = call('f')\nexpect(x[0] == float('inf') and x[1] != x[1])",
        "def f(): return [float('inf'), float('nan')]", 1.0),
    "subclasses cross as their bases": (
        "x = call('f')\nexpect(type(x[0]) is dict and type(x[1]) is tuple and x[1] == (1,))",
        "import collections\ndef f(): return [collections.Counter('a'), collections.namedtuple('P', 'a')(1)]", 1.0),
    "and leave their methods behind": (
        "expect(call('f') == [1])", "class L(list):\n    def __eq__(s, o): return True\ndef f(): return L([2])", 0.0),
    "bytes of input and output": (
        "expect(run('1\\r\\n') == 'ü1\\r\\n')",
        "import sys\nsys.stdout.write('ü' + sys.stdin.buffer.read().decode())", 1.0),
    "what has no value yet": (
        "expect(call('f'))\nexpect(call('g'))\nexpect(call('H'))",
        "async def f(): return 1\ndef g(): yield 1\nclass H: pass", 0.0),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
def test_what_counts_as_held(sandbox: Sandbox, name: str):
    tests, program, expected = HELD[name]
    assert score(ask(tests), program, sandbox) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tests", "entry_point", "fault"),
    [
        ("expect(call('f') == )", None, "the tests are not Python: SyntaxError: invalid syntax"),
        ("import no_such_module\nexpect(True)", None, "failed at line 1: ModuleNotFoundError"),
        ("expect(call('f') == Tru)", None, "failed at line 1: NameError: name 'Tru' is not defined"),
        ("expect(call('f') == 1)\nraise ValueError('broken')", None, "failed at line 2: ValueError: broken"),
        ("expect(call('f') == 1)\nx = 1 / 0", None, "failed at line 2: ZeroDivisionError"),
        ("expect(1 / 0)", None, "failed at line 1: ZeroDivisionError"),
        ("import sys\nexpect(call('f') == 1)\nsys.exit(0)", None, "failed at line 3: SystemExit: 0"),
        ("assert call('f') == 1", None, "neither expect(...) nor check(candidate)"),
        ("", None, "neither expect(...) nor check(candidate)"),
        ("if False:\n    expect(True)", None, "the tests came to no expect(...)"),
        ("expect(call('f', len) == 1)", None, "the arguments of f(<built-in function len>): a value of type"),
        ("expect(run(3))", None, "run needs text for the program's input, not 3"),
        ("def check(candidate):\n    assert candidate() == 1", None, "so the row needs an entry_point"),
        ("def check(candidate):\n    assert candidate() == 1\n    assert 1 == 2", "f", "at line 3: AssertionError"),
        ("def check(candidate):\n    x = candidate()\n    undefined(x)", "f", "failed at line 3: NameError"),
        ("def check(candidate):\n    y = []\n    y[0]\n    assert candidate() == 1", "f", "at line 3: IndexError"),
        ("import os\nos._exit(0)\nexpect(True)", None, "the tests' process is gone: exit: it ended with status 0"),
    ],
)  # fmt: skip
def test_tests_that_are_broken_themselves_say_nothing_about_the_program(
    sandbox: Sandbox, tests: str, entry_point: str | None, fault: str
):
    with pytest.raises(ConfigError) as caught:
        score(ask(tests, entry_point=entry_point), "def f(): return 1", sandbox)
    assert str(caught.value).startswith("question 'q': the tests") and fault in str(caught.value)
    found = verdict(ask(tests, entry_point=entry_point), "def f(): return 1", sandbox)
    assert (found.outcome, found.score) == (Outcome.CHECKER, None)


def test_a_program_cannot_turn_its_failure_into_no_score(sandbox: Sandbox):
    tests = "value = call('f')\nexpect(value[0][0]['a'] == 1)\nfor x in value:\n    y = x / 2\n    expect(y > 0)"
    for program in (
        "def f(): raise NameError(\"name 'value' is not defined\")",
        "def f(): raise SyntaxError('tests')",
        "def f(): return [[[]] * 1000] * 100",
        "class TestsError(Exception): pass\ndef f(): raise TestsError",
        "import os\ndef f(): os.close(3)",
        "import os\ndef f():\n    while True: os.write(3, b'\\xff' * 1000)",
        "import os\ndef f():\n    while True: os.write(3, b'\\0' * 100_000)",
    ):
        found = verdict(ask(tests), program, sandbox)
        assert (found.outcome, found.score) == (Outcome.OK, 0.0), (program, found)


ESCAPES = {
    "an empty list for a loop": ("for x in call('f'):\n    last = x\nexpect(last == 3)", "def f(): return []"),
    "an empty list for a function": (
        "def first(xs):\n    for x in xs:\n        found = x\n    return found\nexpect(first(call('f')) == 1)",
        "def f(): return []"),
    "output that is no literal": (
        "import ast\nexpect(ast.literal_eval(run('')) == [1])", "print('[1')"),
    "output that is no expression": ("expect(eval(run('')) == 4)", "print('undefined')"),
    "no text to pass on": ("expect(run(call('f')) == '')", "def f(): return 1"),
    "no name to pass on": ("expect(call(call('f')) == '')", "def f(): return 'f\\n'"),
    "more than can be passed on": ("x = call('f')\nexpect(call('f', [x, x]) == 1)", "def f(*a): return 'x' * 3_000_000"),
    "deeper than can be passed on": (
        "x = call('f')\nfor _ in range(300): x = [x]\nexpect(call('f', x) == 1)",
        "def f(*a):\n    x = []\n    for _ in range(300): x = [x]\n    return x"),
    "a builtin's name": ("sum = call('f')\nprint(sum)\nsize = sum['size']\nexpect(size == 1)", "def f(): return []"),
    "by way of a method": (
        "class A:\n    kept = []\n    def put(self, x): A.kept.append(x)\n    def half(self): return A.kept[0] / 2\n"
        "a = A()\na.put(call('f'))\nexpect(a.half() == 1)", "def f(): return []"),
    "by way of a global": (
        "state = {}\ndef put(x):\n    state['x'] = x\ndef half():\n    return state['x'] / 2\n"
        "put(call('f'))\nhalved = half()\nexpect(halved == 1)", "def f(): return []"),
    "no end": ("n = call('f')\nwhile n: pass\nexpect(True)", "def f(): return 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_what_a_program_makes_of_the_tests_is_its_own_fault(
    sandbox: Sandbox, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(broker, "TESTS_SECONDS", 0.5)
    found = verdict(ask(ESCAPES[name][0]), ESCAPES[name][1], sandbox)
    assert (found.outcome, found.score) == (Outcome.OK, 0.0), found


def test_where_programs_cannot_be_confined_the_outcome_is_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with Sandbox() as sandbox:
        found = verdict(ask("expect(True)"), "print(1)", sandbox)
    assert (found.outcome, found.score) == (Outcome.SANDBOX, None)
    assert "apt-get install bubblewrap" in found.detail


CHOICES = {
    "the last block that defines the function": (
        "First try:\n```python\ndef f(): return 1\n```\nBetter:\n```python\ndef f(): return 2\n```\n"
        "Use:\n```python\nprint(f())\n```\nPrints:\n```\n2\n```\n", 2),
    "a block in a list": ("1. Do\n   ```py\n   def f():\n       return 3\n   ```\n2. Done", 3),
    "a block without a tag": ("```\ndef f():\n    return 4\n```\nthat is all", 4),
    "a tagged block over one without": ("```\ndef f(): return 0\n```\n```Python\ndef f(): return 5\n```", 5),
    "a block that nothing closes": ("So:\n~~~python title=a.py\ndef f():\n    return 6", 6),
    "no block at all": ("def f():\n    return 7", 7),
    "after the thinking": ("<think>\n```python\ndef f(): return 0\n```\n</think>\ndef f():\n    return 8", 8),
    "a fence inside a docstring": ('def f():\n    """Use:\n    ```python\n    f()\n    ```\n    """\n    return 9', 9),
    "windows line ends": ("```python\r\ndef f():\r\n    return 10\r\n```\r\n", 10),
    "a longer fence": ("````python\ndef f():\n    '''\n```\n'''\n    return 11\n````", 11),
    "a name that is assigned": ("```python\nif True:\n    f = lambda: 12\n```\n```python\nx=1\n```", 12),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_the_program_is_found_in_the_answer(sandbox: Sandbox, name: str):
    text, expected = CHOICES[name]
    assert score(ask(f"expect(call('f') == {expected})"), text, sandbox) == 1.0


def test_a_script_is_the_last_block_that_is_python(sandbox: Sandbox):
    text = (
        "```python\nprint(1)\n```\n```python\nprint(2)\n```\n```python\n>>> 3\n```\n```\n2\n```\n```js\nalert(4)\n```"
    )
    assert score(ask("expect(run('') == '2\\n')"), text, sandbox) == 1.0


def test_text_in_other_languages_is_no_program(sandbox: Sandbox):
    found = run_checker("code", {}, ask("expect(call('f') == 1)"), answer("```js\nf = () => 1\n```"), sandbox)
    assert found.score == 0.0 and "SyntaxError" in found.reasoning


STUB = 'def helper(x):\n    return x + 1\n\n\ndef f(x):\n    """Twice the helper."""\n'
CHECK = "def check(candidate):\n    assert candidate(1) == 2 * helper(1)\n    assert f(2) == 6\n"


@pytest.mark.parametrize(
    "prompt",
    [STUB, f"Complete this:\n```python\n{STUB}```\nThank you."],
    ids=["bare", "in-a-block"],
)
@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("    return 2 * helper(x)\n", 1.0),
        (f"{STUB}    return 2 * helper(x)", 1.0),
        ("```python\ndef f(x):\n    return 2 * helper(x)\n```", 1.0),
        ("```python\n    return 2 * helper(x)\n```", 1.0),
        ("```python\nfrom __future__ import annotations\ndef f(x):\n    return 2 * helper(x)\n```", 1.0),
        ("```python\ndef helper(x): return 0\ndef f(x): return 2 * helper(x)\n```", 0.0),
        ("", 0.0),
        ("    return helper(x)\n", 0.0),
    ],
)
def test_a_body_completes_the_stub_of_the_question(sandbox: Sandbox, prompt: str, response: str, expected: float):
    assert score(ask(CHECK, prompt, "f"), response, sandbox) == expected
    share = "expect(call('f', 1) == 4)"
    assert score(ask(share, prompt), response, sandbox) == expected, "the function that the tests call is known as well"
    chat = Question(
        question_id="q",
        category="coding",
        text=({"role": "system", "content": "Be terse."}, {"role": "user", "content": prompt}),
        tests=CHECK,
        entry_point="f",
    )
    assert score(chat, response, sandbox) == expected


def test_any_text_is_a_response(sandbox: Sandbox):
    texts = ["~" * 300_000 + "`", "`" * 300_000 + "x`", " " * 300_000, "```\n" * 100_000]
    for text in (
        *texts,
        "",
        "\0",
        "\ud800",
        "```",
        "```python\n```",
        "(" * 100_000,
        "x = [" * 5000,
        "é" * 1_000_000,
        "#" * 3_000_000,
    ):
        found = run_checker("code", {"timeout": 1}, ask("expect(call('f') == 1)"), answer(text), sandbox)
        assert found.score == 0.0
        found.reasoning.encode("utf-8")
        assert len(found.reasoning) <= 2000


def test_the_reasoning_is_bounded_and_printable(sandbox: Sandbox):
    program = "def f(n): raise ValueError('\\x1b[31m\\0\\ud800' + 'x' * 10**6)"
    found = run_checker("code", {}, ask("for n in range(99):\n    expect(call('f', n) == 1)"), answer(program), sandbox)
    lines = found.reasoning.split("\n")
    assert lines[0] == "0 of 99 tests hold" and lines[-1].endswith(("more", "…"))
    assert all(line.isprintable() for line in lines) and len(found.reasoning) <= 2000


def test_a_slow_program_costs_no_more_than_its_share(sandbox: Sandbox):
    tests = "for n in range(1000):\n    expect(call('f', n) == n)"
    program = "import time\ndef f(n):\n    if n > 1: time.sleep(60)\n    return n"
    assert score(ask(tests), program, sandbox, timeout=0.1) == 2 / 1000


def test_arguments_choose_the_tests_and_the_limits(sandbox: Sandbox):
    question = Question(
        question_id="q",
        category="coding",
        text="f",
        tests="expect(False)",
        metadata={"edge_tests": "expect(call('f') == 1)"},
    )
    assert score(question, "def f(): return 1", sandbox) == 0.0
    assert score(question, "def f(): return 1", sandbox, tests={"field": "edge_tests"}) == 1.0
    assert (
        score(
            question, "def f(): return len(bytes(300_000_000)) // 300_000_000", sandbox, tests="expect(call('f') == 1)"
        )
        == 1.0
    )
    assert (
        score(
            question,
            "def f(): return len(bytes(300_000_000)) // 300_000_000",
            sandbox,
            tests="expect(call('f') == 1)",
            memory=128,
        )
        == 0.0
    )


PEEK = """
import ctypes, re
def f(known):
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
    hidden = "".join(["hidden", "-", "answer"])
    found = {hidden: 0, known: 0}
    for line in open("/proc/self/maps"):
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        with open("/proc/self/mem", "rb", 0) as memory:
            try:
                memory.seek(start)
                data = memory.read(end - start)
            except (OSError, OverflowError):
                continue
        for text in found:
            found[text] += len(re.findall(text.encode(), data))
    return found[known], found[hidden]
"""


@CONFINED
def test_the_text_of_the_tests_is_not_in_the_programs_memory():
    tests = (
        "known, hidden = call('f', 'well' + '-known')\nexpect(known)\nexpect(hidden < 10)\n" + "# hidden-answer\n" * 50
    )
    with Sandbox(workers=1) as sandbox:  # the same processes again and again, and the tests among them
        for _ in range(3):
            assert score(ask(tests), PEEK, sandbox) == 1.0


def test_the_shipped_service_serves_the_checker(sandbox: Sandbox):
    service = example("service")
    with service.serve(sandbox, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with Sandbox(url=f"http://127.0.0.1:{server.server_port}") as remote:
            assert score(task_question(TASKS["0"]), TASKS["0"]["canonical_solution"], remote) == 1.0
            assert score(task_question(TASKS["0"]), "    return True\n", remote) == 0.0
            with pytest.raises(ConfigError, match="neither expect"):
                score(ask("1"), "1", remote)
        server.shutdown()


RUBRIC = """
rubric: coding
version: 1
category: coding
items:
  - id: tests
    criterion: Passes the question's tests.
    weight: 3
    check: code
    with: {timeout: 3}
    applies_when: {has: tests}
"""


@CONFINED
def test_rows_with_programs_are_scored_end_to_end(tmp_path: Path):
    (tmp_path / "coding.yaml").write_text(RUBRIC)
    rows = [row for row in MAKE.rows() if row["question_id"] in ("HumanEval/0", "HumanEval/38")]
    records = asyncio.run(score_rows(rows, rubrics=tmp_path, use_judges=False))
    assert [record["reward"] for record in records] == [1.0, 1.0, 0.0, 0.0] * 2
    assert [record["advantage"] for record in records] == [0.5, 0.5, -0.5, -0.5] * 2


def test_pieces_of_an_answer():
    assert pieces("a\n```python\nb\n```\nc") == ("a\n```python\nb\n```\nc", "b\n")
    assert pieces("no fence") == ("no fence",)
