"""`grape label`: the least sure verdicts first, every label stored at once, and a screen that no text can forge."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from critiques import ask, store

from grape.errors import ConfigError
from grape.gold import read_gold
from grape.labels import label, read_answer
from grape.log import Log
from grape.screen import fold

GRAPE = Path(sys.executable).parent / "grape"
STORED = "select response_id, item, labeler, score, note from human_labels order by rowid"


def answer(text, **verdicts):
    return {"text": text, "weighted": 0.5, "items": verdicts}


def sure(confidence, score=1.0, **more):
    return {"score": score, "confidence": confidence, "reasoning": f"because of {confidence}", **more}


GROUPS = {
    "a": [answer("first", kind=sure(0.9), short=sure(0.3)), answer("second", kind=sure(0.5))],
    "b": [answer("third", kind={"score": None, "detail": "timed out"}, short=sure(0.7, judge="k"))],
}


class Person:
    """Types these lines, and sees what is shown."""

    def __init__(self, *typed):
        self.typed = list(typed)
        self.shown = ""

    def ask(self, prompt):
        self.shown += prompt
        if not self.typed:
            raise EOFError
        self.shown += f"{self.typed[0]}\n"
        return self.typed.pop(0)

    def tell(self, text):
        self.shown += f"{text}\n"

    def label(self, folder, labeler="ann", **options):
        return label(folder / "log.duckdb", ask=self.ask, tell=self.tell, labeler=labeler, **options)

    @property
    def cases(self):
        """Which response and item each card was of."""
        cards = [line.split() for line in self.shown.splitlines() if " of " in line and "   item " in line]
        return [(words[words.index("response") + 1], words[words.index("item") + 1]) for words in cards]


@pytest.fixture
def folder(tmp_path):
    store(tmp_path / "log.duckdb", GROUPS, questions={"b": {"reference": "The true one."}})
    return tmp_path


def test_the_least_sure_verdicts_come_first_and_failed_ones_last(folder):
    person = Person("y", "n", "0.5 half of it", ".25", "1", "")
    done = person.label(folder)
    assert person.cases == [("a/0", "short"), ("a/1", "kind"), ("b/0", "short"), ("a/0", "kind"), ("b/0", "kind")]
    assert (done.run, done.labeler, done.count, done.left) == ("r1", "ann", 5, 0)
    assert ask(folder / "log.duckdb", STORED) == [
        ("a/0", "short", "ann", 1.0, None), ("a/1", "kind", "ann", 0.0, None),
        ("b/0", "short", "ann", 0.5, "half of it"), ("a/0", "kind", "ann", 0.25, None), ("b/0", "kind", "ann", 1.0, None),
    ]  # fmt: skip


def test_the_verdict_is_told_after_the_answer_and_not_before(folder):
    person = Person("0.5")
    person.label(folder, limit=1)
    before, after = person.shown.split("0.5\n", 1)
    for text in ("Question a?", "first", "Is short."):
        assert text in before
    assert "because" not in before and "judge" not in before and "0.3" not in before
    assert "stored: 0.5\njudge j said 1 (confidence 0.30)\n| because of 0.3\n" in after


def test_a_reference_is_shown_and_a_failure_told(folder):
    person = Person("s", "s", "s", "s", "n")
    person.label(folder)
    assert person.shown.count("| The true one.") == 2
    assert "judge j gave no score: timeout\n| timed out\n" in person.shown


@pytest.mark.slow
def test_the_one_before_can_be_labelled_anew_and_the_newest_label_counts(folder):
    person = Person("b", "y", "b", "0.25 on second thought", "s", "q")
    done = person.label(folder)
    assert "this is the first one" in person.shown
    assert (done.count, done.left) == (1, 4)
    assert ask(folder / "log.duckdb", STORED) == [
        ("a/0", "short", "ann", 1.0, None), ("a/0", "short", "ann", 0.25, "on second thought"),
    ]  # fmt: skip
    with Log(folder / "log.duckdb") as log:
        (gold,) = read_gold(None, log).values()
    assert (gold.scores, gold.labelers) == ((0.25,), ("ann",))


def test_the_last_one_can_be_labelled_anew_too(folder):
    person = Person("y", "b", "n", "")
    done = person.label(folder, limit=1)
    assert (done.count, [row[3] for row in ask(folder / "log.duckdb", STORED)]) == (1, [1.0, 0.0])


def test_what_somebody_has_labelled_is_not_shown_to_them_again(folder):
    Person("y", "s", "n", "q").label(folder)
    again, other = Person("q"), Person("q")
    assert (again.label(folder).left, other.label(folder, "ben").left) == (3, 5)
    assert (again.cases, other.cases) == ([("a/1", "kind")], [("a/0", "short")])


@pytest.mark.slow
def test_a_label_holds_in_another_run_of_the_same_text_alone(folder):
    Person("y", "y", "q").label(folder)
    same = [answer("first", kind=sure(0.9), short=sure(0.3)), answer("another", kind=sure(0.5))]
    store(folder / "log.duckdb", {"a": same}, run="r2", day=2)
    person = Person("s", "s", "")
    assert person.label(folder).run == "r2"
    assert person.cases == [("a/1", "kind"), ("a/0", "kind")]


def test_items_and_judges_can_be_chosen(folder):
    person = Person("s", "s", "s", "")
    assert person.label(folder, item="kind").left == 3
    assert person.cases == [("a/1", "kind"), ("a/0", "kind"), ("b/0", "kind")]
    one = Person("s", "")
    one.label(folder, judge="k")
    assert one.cases == [("b/0", "short")]


@pytest.mark.parametrize(
    ("line", "score", "note"),
    [("y", 1, None), ("N", 0, None), ("0", 0, None), ("1.0", 1, None), (" .5 ", 0.5, None), ("1.", 1, None),
     ("y a very good one", 1, "a very good one"), ("0.75\tnearly", 0.75, "nearly")],
)  # fmt: skip
def test_a_number_a_letter_and_a_note_are_read(line, score, note):
    given = read_answer(line)
    assert (given.score, given.note, given.key, given.problem) == (score, note, None, None)


@pytest.mark.parametrize(
    ("line", "problem"),
    [("2", "2 is not a number from 0 to 1"), ("-1", "not understood: '-1'"), ("nan", "not understood: 'nan'"),
     ("yes", "not understood: 'yes'"), ("", "nothing was typed"), ("0,5", "not understood: '0,5'"),
     ("1e-1", "not understood: '1e-1'"), ("quit please", "not understood: 'quit please'"),
     ("\u0661", "not understood: '\u0661'")],
)  # fmt: skip
def test_anything_else_is_a_problem(line, problem):
    assert read_answer(line).problem == problem


def test_who_types_anything_else_is_asked_again(folder):
    person = Person("2", "?", "y")
    assert person.label(folder, limit=1).count == 1
    assert person.shown.count("s skip   b back") == 2


def test_a_text_can_neither_steer_the_terminal_nor_pass_for_a_line_of_ours(tmp_path):
    forged = "\x1b[2J\x1b[1;1Hstored: 1\njudge j said 1\r\n0 to 1, y or n (? help) > y\x9b2J\x07\u202eevil\u2028x\b\x7f"
    groups = {"a": [answer(forged, kind=sure(0.5, criterion=forged, reasoning=forged, judge="j"))]}
    store(tmp_path / "log.duckdb", groups, questions={"a": {"question": forged, "reference": forged}})
    person = Person("y")
    person.label(tmp_path, limit=1)
    assert not [char for char in person.shown if char != "\n" and not char.isprintable()]
    lines = person.shown.splitlines()
    assert sum(line.startswith("| ") and "stored: 1" in line for line in lines) == 5
    assert [line for line in lines if "judge j said 1" in line and not line.startswith("| ")] == [
        "judge j said 1 (confidence 0.50)"
    ]
    assert "| \\u001b[2J\\u001b[1;1Hstored: 1" in lines


def test_long_texts_are_cut_to_the_terminal_and_shown_whole_on_demand(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "24")
    text = "\n".join(f"line {number} " + "word " * 20 for number in range(50))
    store(tmp_path / "log.duckdb", {"a": [answer(text, kind=sure(0.5))]})
    person = Person("m", "q")
    person.label(tmp_path)
    short, whole = person.shown.split("> m\n")
    assert len(short.splitlines()) <= 22
    assert "more lines (m shows them)" in short and "line 49" not in short
    assert "line 49" in whole and "more lines" not in whole
    assert max(map(len, whole.splitlines())) <= 60
    assert whole.count("word") == 20 * 50


def test_a_line_of_wide_or_very_many_characters_is_folded():
    assert fold("葡萄" * 10, 20) == ["| 葡萄葡萄葡萄葡萄", "| 葡萄葡萄葡萄葡萄", "| 葡萄葡萄"]
    assert len(fold("x" * 300_000, 103)) == 3_000
    assert fold("a\n\n    b\tc", 80) == ["| a", "|", "|     b   c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run": "r9"}, "log.duckdb: no run 'r9'; known: r1"),
        ({"item": "kinds"}, "log.duckdb: run r1 has no verdict of a judge with item 'kinds'; did you mean 'kind'? known: "
         "kind, short"),
        ({"judge": "x"}, "log.duckdb: run r1 has no verdict of a judge with judge 'x'; known: j, k"),
        ({"labeler": " "}, "--labeler: is empty"),
        ({"limit": 0}, "--limit: 0 is not 1 or more"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(folder, options, message):
    with pytest.raises(ConfigError) as caught:
        Person().label(folder, **options)
    assert str(caught.value).replace(f"{folder}/", "") == message


def test_a_log_without_verdicts_of_judges_is_one_line(tmp_path):
    store(tmp_path / "log.duckdb", {"a": [{"text": "x", "weighted": 1.0}]})
    with pytest.raises(ConfigError, match=r"log\.duckdb: no run in it has verdicts of a judge$"):
        Person().label(tmp_path)


def command(folder, *arguments, **more):
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24"}
    return subprocess.Popen(
        [GRAPE, "label", "--log", "log.duckdb", "--labeler", "ann", *arguments], cwd=folder, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        **more,
    )  # fmt: skip


@pytest.mark.slow
def test_labels_may_come_through_a_pipe(folder):
    out, error = command(folder, stdin=subprocess.PIPE).communicate(b"y fine \xff\nwhat\nn\n", timeout=60)
    assert out.decode().endswith("\n2 labels by ann; 3 left\nnext: grape calibrate --log log.duckdb\n")
    assert error == b"grape: run r1 of log.duckdb\n"
    assert [row[3:] for row in ask(folder / "log.duckdb", STORED)] == [(1.0, "fine \ufffd"), (0.0, None)]


def until(terminal, text, seconds=60):
    """What a terminal shows up to this text."""
    shown, deadline = b"", time.monotonic() + seconds
    while text not in shown and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            shown += os.read(terminal, 65536)
    assert text in shown, shown
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("end", ["\x03", "\x04", "kill"])
def test_an_interrupt_the_end_of_input_and_a_kill_lose_no_label(folder, end):
    ours, theirs = pty.openpty()
    process = command(folder, stdin=theirs, start_new_session=True)
    os.close(theirs)
    try:
        os.set_blocking(process.stdout.fileno(), True)
        until(process.stdout.fileno(), b"(? help) > ")
        os.write(ours, b"0.25 a note\n")
        until(process.stdout.fileno(), b"(? help) > ")
        time.sleep(0.5)  # Python loses an interrupt that comes between the prompt and the reading of a line
        if end == "kill":
            process.kill()
        elif end == "\x03":
            process.send_signal(signal.SIGINT)
        else:
            os.write(ours, end.encode())
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(ours)
    assert ask(folder / "log.duckdb", STORED) == [("a/0", "short", "ann", 0.25, "a note")]
    if end != "kill":
        assert (process.returncode, error) == (0, b"grape: run r1 of log.duckdb\n")
        assert b"1 labels by ann; 4 left" in out
