"""A run: its name in the log, what the log has of it already, and its one owner."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

from grape.errors import ConfigError
from grape.judge.config import TRANSPORT, Judge
from grape.log import Log, spool_folder
from grape.plan import Plan
from grape.records import Record, dump, item_record, question_rows, response_rows
from grape.resources import digest, read_text
from grape.rows import Rows
from grape.rubric import Rubric

logger = logging.getLogger("grape")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of `grape score`: its name in the log, and what the log has of it already."""

    inputs: str
    rows: Rows
    rubrics: Mapping[str, Rubric]
    judges: Mapping[str, Judge]
    config: Mapping[str, Any]
    name: str = ""
    known: bool = False
    finished: bool = False

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", new_name())

    def resumed(self, log: Log) -> Run:
        """The last run of the same inputs, with the replies it had got; or this new one, if the log has none."""
        found = log.query(
            "select run from runs where kind = 'score' and inputs = ? order by started desc limit 1",
            [self.inputs],
        )
        if not found:
            logger.warning("nothing to resume: no run of these inputs in the log; a new run begins")
            return self
        return replace(self, name=found[0][0], known=True)

    def answered_so_far(self, log: Log) -> Run:
        """The run, and whether the log has all of it, once nobody else is at it."""
        ((finished,),) = log.query("select count(*) > 0 from steps where run = ?", [self.name])
        return replace(self, finished=finished)

    def opening(self) -> dict[str, list[Record]]:
        """The rows that a run begins with."""
        rubrics = {c: {"rubric": r.rubric, "version": r.version, "hash": r.hash} for c, r in self.rubrics.items()}
        judges = {
            name: {"model": judge.model, "hash": judge.hash, "identity": judge.identity}
            for name, judge in self.judges.items()
        }
        run = {
            "run": self.name,
            "kind": "score",
            "started": datetime.now(UTC),
            "version": version("grape-rl"),
            "inputs": self.inputs,
            "config": json.dumps({**self.config, "source": self.rows.source}),
            "rubrics": json.dumps(rubrics),
            "judges": json.dumps(judges),
        }
        questions, responses = question_rows(self.name, self.rows), response_rows(self.name, 0, self.rows)
        return {"runs": [run], "questions": questions, "responses": responses}


def new_name() -> str:
    """A name that no other run in any log has, in the order of time."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid4().hex[:6]}"


@contextmanager
def hold(log: Log, run: str) -> Iterator[None]:
    """Keep a run to one process: a second one that would take it up is told so. Lets go with the process."""
    path = spool_folder(log.path) / f"{run}.run"
    with path.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{log.path}: another process is at run {run}; resume it when that has ended") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def stored_records(log: Log, run: Run) -> list[Record]:
    """The records of a finished run, as the log has them."""
    logger.warning("run %s is finished: these are its stored results", run.name)
    columns = "response_id, item, score, confidence, outcome, reasoning, detail"
    items: dict[str, Record] = {}
    for response_id, item, *values in log.query(
        f"select {columns} from verdicts where run = ? order by rowid", [run.name]
    ):
        items.setdefault(response_id, {})[item] = item_record(*values)
    rewards = log.query("select response_id, reward, advantage from rewards where run = ?", [run.name])
    earned = {response_id: (reward, advantage) for response_id, reward, advantage in rewards}
    return [
        {
            "response_id": response.response_id,
            "question_id": response.question_id,
            "category": run.rows.questions[response.question_id].category,
            "reward": earned[response.response_id][0],
            "advantage": earned[response.response_id][1],
            "items": items.get(response.response_id, {}),
        }
        for response in run.rows.responses
    ]


def fingerprint(
    rows: Rows, plans: Mapping[str, Plan], judges: Mapping[str, Judge], checkers: Sequence[str | Path], options: str
) -> str:
    """A hash of everything that decides the result: rows, rubrics, judges, the user's checkers and the options.

    How a judge is reached does not: a run whose judge timed out may be resumed with a longer timeout elsewhere.
    """
    total = hashlib.sha256(options.encode())
    for question in rows.questions.values():
        own = [dump(item) for item in rows.items[question.question_id]]
        fields = [question.question_id, question.category, question.text, question.reference, question.tests]
        data = [*fields, question.entry_point, question.metadata, own]
        total.update(json.dumps(data, default=str).encode())
    for response in rows.responses:
        ids = [response.response_id, response.question_id]
        total.update(json.dumps([*ids, response.text, response.metadata], default=str).encode())
    parts = [
        *{plan.rubric.hash for plan in plans.values()},
        *(
            f"{name} {judge.model_dump_json(exclude=TRANSPORT)} {judge.calibration or ''}"
            for name, judge in judges.items()
        ),
    ]
    parts += [digest(read_text(file)) for file in checkers]
    total.update(json.dumps(sorted(parts)).encode())
    return total.hexdigest()
