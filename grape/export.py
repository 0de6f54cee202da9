"""`grape export`: sets to train on, and rows to score again, out of the critique log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grape.decontaminate import without
from grape.errors import ConfigError
from grape.extremes import BY
from grape.judge.prompt import load_prompt
from grape.output import ASKED, MESSAGES, NUMBER, TEXT, TRUTH, check_limit, check_target, is_folder, one_of, write_rows
from grape.records import Record
from grape.resources import digest, names, read_text
from grape.stored import Reader, chat, check_name, human_labels, open_log, reading, run_of
from grape.types import Message

NEAR = 0.25  # a verdict this near to the human label is taken for right
CHUNK = 10_000  # calls that are read at a time
SAME_STEP = "r.run = s.run and r.step is not distinct from s.step"
SAME_RESPONSE = f"{SAME_STEP} and r.response_id = s.response_id"
SAME_QUESTION = "q.run = s.run and q.question_id = s.question_id"
JUDGED = "kind = 'judge' and applicable and outcome = 'ok'"

logger = logging.getLogger("grape")


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written: rows, and of which run; and how many were left out for their questions."""

    run: str
    count: int
    overlapping: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which rows of a run."""

    run: str
    by: str = "weighted"
    min_reward: float | None = None
    item: str | None = None
    judge: str | None = None
    labelled: bool = False


def export(
    what: str,
    log: str | Path,
    out: str | Path,
    *,
    run: str | None = None,
    by: str = "weighted",
    min_reward: float | None = None,
    item: str | None = None,
    judge: str | None = None,
    labelled: bool = False,
    against: str | Path | None = None,
    limit: int | None = None,
    force: bool = False,
) -> Export:
    """Write one of the `SETS` of a run (the last one that has any): a .jsonl or .parquet file, or a folder.

    ``by`` and ``min_reward`` are of sft: the column of `rewards` by which a response is the best one, and what it must
    reach. ``item`` and ``judge`` keep what is by them (not of sft and responses). ``labelled`` keeps judge calls whose
    verdict lies within 0.25 of what people said. Rows stand in the order in which the log got them; those in which a
    question of the file ``against`` is found are left out (`grape.decontaminate`).
    """
    one_of("export", what, list(SETS))
    one_of("--by", by, BY)
    check_limit(limit)
    kind = SETS[what]
    given = {"--min-reward": min_reward, "--by": by if by != "weighted" else None, "--item": item, "--judge": judge,
             "--labelled": labelled or None}  # fmt: skip
    for flag, value in given.items():
        if value is not None and flag not in kind.flags:
            takers = [name for name, other in SETS.items() if flag in other.flags]
            raise ConfigError(f"{flag}: goes with {' and '.join(takers)}, not with {what}")
    check_target(out, log, folders=True, replace=force)
    if what == "responses" and (is_folder(Path(out)) or Path(out).suffix.lower() != ".jsonl"):
        raise ConfigError(f"{out}: responses are written as .jsonl: their metadata has no columns of its own")
    with open_log(log) as opened, reading(opened, log) as store:
        name = run_of(store, run, kind.rows, kind.called).name
        check_name(store, name, "item", item if what != "preference" else None)
        check_name(store, name, "judge", judge if what != "preference" else None)
        wanted = Wanted(run=name, by=by, min_reward=min_reward, item=item, judge=judge, labelled=labelled)
        found = kind.read(store, wanted)
    kept = without(found, against) if against else found
    rows = kept[:limit]
    if not rows:
        raise ConfigError(f"{log}: run {name}: nothing to export as {what}{_because(wanted, against)}{kind.empty}")
    write_rows(out, rows, kind.columns)
    return Export(run=name, count=len(rows), overlapping=len(found) - len(kept))


def _because(wanted: Wanted, against: str | Path | None) -> str:
    """What may have left nothing."""
    said = {"--min-reward": wanted.min_reward, "--item": wanted.item, "--judge": wanted.judge, "--against": against}
    told = [f"{flag} {value}" for flag, value in said.items() if value is not None]
    told += ["--labelled"] * wanted.labelled
    return f" with {' and '.join(told)}" if told else ""


def _sft(log: Reader, wanted: Wanted) -> list[Record]:
    """The best response to each question, of all steps."""
    found = log.query(
        f"select s.question_id, s.category, s.response_id, q.question, r.response, r.route, r.prompt_hash, "
        f"s.{wanted.by} from rewards s join responses r on {SAME_RESPONSE} join questions q on {SAME_QUESTION} "
        f"where s.run = ? and s.{wanted.by} is not null and s.unscorable is null and (? is null or s.{wanted.by} >= ?) "
        f"qualify row_number() over (partition by s.question_id order by s.{wanted.by} desc, s.step, r.rowid) = 1 "
        "order by q.rowid",
        [wanted.run, wanted.min_reward, wanted.min_reward],
    )
    used = {row[6] for row in found if row[5] == "fresh" and row[6]}
    systems, rows = _system_prompts(used), []
    for question_id, category, response_id, question, text, route, hash_, reward in found:
        system = systems.get(hash_) if route == "fresh" else None
        messages = [*_turns(question, system), {"role": "assistant", "content": text or ""}]
        rows.append({"question_id": question_id, "category": category, "response_id": response_id,
                     "messages": messages, "reward": reward})  # fmt: skip
    if lost := used - set(systems):
        logger.warning("system prompts that are in prompts/generate no more are left out: %s", ", ".join(sorted(lost)))
    return rows


def _system_prompts(hashes: set[str]) -> dict[str, str]:
    """The system prompts of these hashes, as far as their files are still there."""
    found: dict[str, str] = {}
    for name, path in names("prompts").items() if hashes else ():
        if name.startswith("generate/") and (hash_ := digest(read_text(path))) in hashes:
            found[hash_] = load_prompt(path, ()).render()["system"]
    return found


def _turns(question: str | None, system: str | None) -> list[Message]:
    """The messages of a question, its own system message after that of the category: what the policy was shown."""
    asked = chat(question or "")
    turns: list[Message] = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    if not system:
        return turns
    if turns[0]["role"] == "system":
        system, turns = f"{system}\n\n{turns[0]['content']}", turns[1:]
    return [{"role": "system", "content": system}, *turns]


def _preference(log: Reader, wanted: Wanted) -> list[Record]:
    """What the table says, the newest of equal ones."""
    columns = list(PREFERENCE)
    found = log.query(
        "select s.question_id, s.category, q.question, r.response, d.response, s.chosen_id, s.rejected_id, s.margin, "
        "s.probability, s.consistent, s.source, s.item, s.judge from preferences s "
        f"join questions q on {SAME_QUESTION} join responses r on {SAME_STEP} and r.response_id = s.chosen_id "
        f"join responses d on {SAME_STEP.replace('r.', 'd.')} and d.response_id = s.rejected_id "
        "where s.run = ? and (? is null or s.item = ?) and (? is null or s.judge = ?) "
        "qualify row_number() over (partition by s.step, s.question_id, least(chosen_id, rejected_id), "
        "greatest(chosen_id, rejected_id), s.source, s.item, s.judge order by s.rowid desc) = 1 order by s.rowid",
        [wanted.run, wanted.item, wanted.item, wanted.judge, wanted.judge],
    )
    return [{**(row := dict(zip(columns, values, strict=True))), "question": chat(row["question"])} for values in found]


def _judge(log: Reader, wanted: Wanted) -> list[Record]:
    """Each answered call behind a verdict, once, in the order of the verdicts."""
    labels = human_labels(log, wanted.run)
    verdicts: dict[str, list[tuple[str, str, str, float, float | None]]] = {}
    for question_id, response_id, item, score, calls in log.query(
        f"select question_id, response_id, item, score, calls from verdicts where run = ? and {JUDGED} "
        "and (? is null or item = ?) and (? is null or judge = ?) order by step, rowid",
        [wanted.run, wanted.item, wanted.item, wanted.judge, wanted.judge],
    ):
        said = labels.get((response_id, item))
        label = sum(said.values()) / len(said) if said else None
        for call in json.loads(calls or "[]"):
            verdicts.setdefault(call, []).append((question_id, response_id, item, score, label))
    keys = [call for call, about in verdicts.items() if not wanted.labelled or _right(about)]
    return [_call(values, verdicts[values[0]]) for values in _answered(log, keys)]


def _right(about: Sequence[tuple[str, str, str, float, float | None]]) -> bool:
    """Whether people labelled any of a call's verdicts, and agree with all of those."""
    labelled = [(score, label) for _, _, _, score, label in about if label is not None]
    return bool(labelled) and all(abs(score - label) <= NEAR + 1e-9 for score, label in labelled)


def _answered(log: Reader, keys: Sequence[str]) -> Iterable[tuple[Any, ...]]:
    """The answered calls among these, whichever run made them, in the order of the keys."""
    for start in range(0, len(keys), CHUNK):
        some = list(keys[start : start + CHUNK])
        found = log.query(
            "select call, judge, model, purpose, messages, reply from judge_calls "
            "where call in (select unnest(?::varchar[])) and outcome = 'ok' and reply is not null order by rowid",
            [some],
        )
        last = {row[0]: row for row in found if json.loads(row[4] or "[]")}
        yield from (last[key] for key in some if key in last)


def _call(values: tuple[Any, ...], about: Sequence[tuple[str, str, str, float, float | None]]) -> Record:
    """One call as a chat. Of several verdicts by one call the items stand together, and no score."""
    _, judge, model, purpose, messages, reply = values
    question_id, response_id, item, score, label = about[0]
    alone = len({row[2] for row in about}) == 1
    return {
        "question_id": question_id,
        "response_id": response_id,
        "item": item if alone else ", ".join(dict.fromkeys(row[2] for row in about)),
        "judge": judge,
        "model": model,
        "purpose": purpose,
        "messages": [*json.loads(messages), {"role": "assistant", "content": reply}],
        "score": score if alone else None,
        "label": label if alone else None,
    }


def _critique(log: Reader, wanted: Wanted) -> list[Record]:
    """What judges said of responses, where they gave a reason."""
    columns = list(CRITIQUE)
    found = log.query(
        "select s.question_id, s.category, q.question, s.response_id, r.response, s.item, s.criterion, s.critique, "
        "s.reasoning, s.score, s.confidence, s.judge from verdicts s "
        f"join responses r on {SAME_RESPONSE} join questions q on {SAME_QUESTION} where s.run = ? and s.{JUDGED} "
        "and coalesce(critique, reasoning, '') <> '' and (? is null or item = ?) and (? is null or judge = ?) "
        "order by s.step, s.rowid",
        [wanted.run, wanted.item, wanted.item, wanted.judge, wanted.judge],
    )
    return [{**(row := dict(zip(columns, values, strict=True))), "question": chat(row["question"])} for values in found]


def _responses(log: Reader, wanted: Wanted) -> list[Record]:
    """The responses with their questions, as `grape score` reads them."""
    names = ("question_id", "category", "question", "response_id", "response", "reference", "tests", "entry_point",
             "items", "metadata")  # fmt: skip
    found = log.query(
        "select s.question_id, s.category, q.question, s.response_id, s.response, q.reference, q.tests, q.entry_point, "
        f"q.items, coalesce(s.metadata, q.metadata) from responses s join questions q on {SAME_QUESTION} "
        "where s.run = ? order by s.step, s.rowid",
        [wanted.run],
    )
    rows = []
    for values in found:
        row = dict(zip(names, values, strict=True))
        row |= {"question": chat(row["question"]), "items": json.loads(row["items"] or "[]")}
        row["metadata"] = json.loads(row["metadata"] or "{}")
        row["metadata"].pop("instruction_id_list", None)  # its items stand among the question's own
        rows.append({name: value for name, value in row.items() if value not in (None, [], {})})
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One set: the rows of the log that it is made from, and what those are called; its columns; its flags."""

    read: Callable[[Reader, Wanted], list[Record]]
    rows: str
    called: str
    columns: Mapping[str, str]
    flags: Sequence[str] = ()
    empty: str = ""


PREFERENCE = {
    "question_id": TEXT, "category": TEXT, "question": ASKED, "chosen": TEXT, "rejected": TEXT, "chosen_id": TEXT,
    "rejected_id": TEXT, "margin": NUMBER, "probability": NUMBER, "consistent": TRUTH, "source": TEXT, "item": TEXT,
    "judge": TEXT,
}  # fmt: skip
CRITIQUE = {
    "question_id": TEXT, "category": TEXT, "question": ASKED, "response_id": TEXT, "response": TEXT, "item": TEXT,
    "criterion": TEXT, "critique": TEXT, "reasoning": TEXT, "score": NUMBER, "confidence": NUMBER, "judge": TEXT,
}  # fmt: skip
SFT = {"question_id": TEXT, "category": TEXT, "response_id": TEXT, "messages": MESSAGES, "reward": NUMBER}
CALL = {
    "question_id": TEXT, "response_id": TEXT, "item": TEXT, "judge": TEXT, "model": TEXT, "purpose": TEXT,
    "messages": MESSAGES, "score": NUMBER, "label": NUMBER,
}  # fmt: skip
SETS: dict[str, Kind] = {
    "sft": Kind(
        read=_sft, rows="rewards where reward is not null", called="rewards", columns=SFT,
        flags=("--min-reward", "--by"),
    ),
    "preference": Kind(
        read=_preference, rows="preferences", called="preferences: `grape pairs` makes them", columns=PREFERENCE,
        flags=("--item", "--judge"),
    ),
    "judge": Kind(
        read=_judge, rows=f"verdicts where {JUDGED}", called="verdicts of a judge", columns=CALL,
        flags=("--item", "--judge", "--labelled"), empty=" (of replayed judges the log has no messages)",
    ),
    "critique": Kind(
        read=_critique, rows=f"verdicts where {JUDGED}", called="verdicts of a judge", columns=CRITIQUE,
        flags=("--item", "--judge"), empty=" (verdicts without reasoning are no critiques)",
    ),
    "responses": Kind(read=_responses, rows="responses", called="responses", columns={}),
}  # fmt: skip
