"""`grape label`: a person judges what a judge was least sure of; each label is in the log the moment it is given."""

from __future__ import annotations

import getpass
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from grape.errors import ConfigError, one_line
from grape.log import Log
from grape.output import check_limit
from grape.screen import Case, card, verdict_lines
from grape.stored import Reader, check_name, human_labels, open_log, reading, run_of

JUDGED = "kind = 'judge' and applicable and outcome not in ('skipped')"
KEYS = {"s": "skip", "b": "back", "m": "more", "q": "quit", "?": "help"}
HELP = (
    "a number from 0 to 1 (how far the criterion is met), y for 1, n for 0, and a note behind it if you like: "
    "0.5 half of it\ns skip   b back: label the one before anew   m more: all of the texts   q quit   ? this help"
)
PROMPT = "0 to 1, y or n (? help) > "
LAST = "that was the last one: b goes back, anything else ends > "
LABEL = re.compile(r"(?P<score>[yn]|\d+(?:\.\d*)?|\.\d+)(?:\s+(?P<note>.*))?", re.A | re.S | re.I)

Key = tuple[int | None, str, str]  # step, response, item


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """What a session of labelling came to: responses x items that got a label, and those that still have none."""

    run: str
    labeler: str
    count: int
    left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One answer of a person: a score with a note, or a key. ``problem`` says why it is neither."""

    score: float | None = None
    note: str | None = None
    key: str | None = None
    problem: str | None = None


def label(
    log: str | Path,
    *,
    ask: Callable[[str], str],
    tell: Callable[[str], None],
    run: str | None = None,
    item: str | None = None,
    judge: str | None = None,
    labeler: str | None = None,
    limit: int | None = None,
) -> Labelled:
    """Have a person judge the responses of a run (the last one that a judge saw), one item at a time.

    The lowest-confidence verdicts come first, those that failed last, and none that this labeler has labelled already.
    The judge's verdict is told after the answer. ``ask`` gets a prompt and gives a line, or raises EOFError or
    KeyboardInterrupt at the end; ``tell`` shows text.
    """
    check_limit(limit)
    labeler = _name(labeler)
    with open_log(log) as store:
        with reading(store, log) as now:
            run = run_of(now, run, f"verdicts where {JUDGED}", "verdicts of a judge").name
            check_name(now, run, "item", item)
            check_name(now, run, "judge", judge)
            waiting = unlabelled(now, run, labeler, item, judge)
        session = _Session(store, run, labeler, waiting[:limit], ask, tell)
        try:
            session.work()
        except (EOFError, KeyboardInterrupt):
            tell("")
        return Labelled(
            run=run, labeler=labeler, count=len(session.labelled), left=len(waiting) - len(session.labelled)
        )


def _name(labeler: str | None) -> str:
    if labeler is None:
        try:
            return getpass.getuser()
        except (OSError, KeyError) as error:
            raise ConfigError("--labeler: who labels? there is no login name here") from error
    if not labeler.strip():
        raise ConfigError("--labeler: is empty")
    return labeler.strip()


def unlabelled(log: Reader, run: str, labeler: str, item: str | None = None, judge: str | None = None) -> list[Key]:
    """What a labeler has not judged yet, the least sure first; failed verdicts after those with a score."""
    done = {key for key, labels in human_labels(log, run).items() if labeler in labels}
    rows = log.query(
        f"select step, response_id, item from verdicts where run = ? and {JUDGED} "
        "and (? is null or item = ?) and (? is null or judge = ?) "
        "order by outcome <> 'ok', confidence nulls last, step, rowid",
        [run, item, item, judge, judge],
    )
    return [(step, response_id, name) for step, response_id, name in rows if (response_id, name) not in done]


def read_answer(line: str) -> Given:
    """What a person typed."""
    text = line.strip()
    if text.lower() in KEYS:
        return Given(key=KEYS[text.lower()])
    if (found := LABEL.fullmatch(text)) is None:
        return Given(problem=f"not understood: {one_line(text, 40)!r}" if text else "nothing was typed")
    word = found["score"].lower()
    score = {"y": 1.0, "n": 0.0}[word] if word in "yn" else float(word)
    if score > 1:
        return Given(problem=f"{word} is not a number from 0 to 1")
    return Given(score=score, note=found["note"] or None)


class _Session:
    """One sitting: a list of what is to be labelled, and a place in it."""

    def __init__(
        self, log: Log, run: str, labeler: str, keys: list[Key], ask: Callable[[str], str], tell: Callable[[str], None]
    ) -> None:
        self.labelled: set[Key] = set()
        self._log = log
        self._run = run
        self._labeler = labeler
        self._keys = keys
        self._ask = ask
        self._tell = tell

    def work(self) -> None:
        """One after the other, to the end of the list or till the person has had enough."""
        place = 0
        while place < len(self._keys):
            place += self._one(place)
            if place == len(self._keys) and read_answer(self._ask(LAST)).key == "back":
                place -= 1

    def _one(self, place: int) -> int:
        """Show one and take an answer; how far to go on."""
        key = self._keys[place]
        case = case_of(self._log, self._run, key)
        head = f"{place + 1} of {len(self._keys)}"
        self._tell(card(case, head))
        while True:
            given = read_answer(self._ask(PROMPT))
            if given.score is not None:
                self._store(case, given)
                self.labelled.add(key)
                self._tell(f"stored: {given.score:g}\n{verdict_lines(case)}")
                return 1
            if given.key == "quit":
                return len(self._keys) + 1
            if given.key == "skip":
                return 1
            if given.key == "back" and place > 0:
                return -1
            if given.key == "more":
                self._tell(card(case, head, whole=True))
            elif given.key == "back":
                self._tell("this is the first one")
            else:
                self._tell(f"{given.problem}\n{HELP}" if given.problem else HELP)

    def _store(self, case: Case, given: Given) -> None:
        row = {
            "run": self._run, "response_id": case.response_id, "question_id": case.question_id, "item": case.item,
            "labeler": self._labeler, "score": given.score, "note": given.note, "created": datetime.now(UTC),
        }  # fmt: skip
        self._log.append(human_labels=[row])


def case_of(log: Log, run: str, key: Key) -> Case:
    """One verdict with the texts that it is about."""
    step, response_id, item = key
    columns = (
        "v.response_id", "v.question_id", "v.item", "v.category", "q.question", "r.response", "q.reference",
        "v.criterion", "v.judge", "v.outcome", "v.score", "v.confidence", "v.reasoning", "v.detail",
    )  # fmt: skip
    found = log.query(
        f"select {', '.join(columns)} from verdicts v join responses r on v.run = r.run "
        "and v.step is not distinct from r.step and v.response_id = r.response_id "
        "join questions q on q.run = v.run and q.question_id = v.question_id "
        "where v.run = ? and v.step is not distinct from ? and v.response_id = ? and v.item = ? "
        f"and v.{JUDGED} limit 1",
        [run, step, response_id, item],
    )
    if not found:
        raise ConfigError(f"{log.path}: run {run} has no texts of response {response_id!r}")
    return Case(**{name.partition(".")[2]: value for name, value in zip(columns, found[0], strict=True)})
