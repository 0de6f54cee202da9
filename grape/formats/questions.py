"""Data sets of questions that bring their own criteria: HealthBench, RaR, DR-Tulu, Prometheus, RLCF and IFEval.

Each becomes rows of ours with `items`; the formula that a set is scored by belongs in the rubric of its category and
is named in each row's metadata, under `x-score`, with what the set's own score does beyond our reward.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from grape.errors import one_line
from grape.formats.keep import NOTES, Data, Place, mapping, need
from grape.formats.scaled import ANCHOR, PROMETHEUS
from grape.formats.signed import DR_TULU, HEALTHBENCH, RAR, signed
from grape.formats.table import Items, Objects, Table, noted, question, question_id, rest, spread, turns


def load_healthbench(theirs: Data, place: Place, items: Items) -> Data:
    asked = question(theirs, "prompt", place)
    found = items(need(theirs, "rubrics", place), place.at("rubrics"))
    return {
        **_row("healthbench", _id(theirs, "prompt_id", asked, found), asked),
        **_optional(theirs, response="response"),
        "items": found,
        "metadata": rest(theirs, "prompt", "rubrics", "prompt_id", "response"),
    }


def dump_healthbench(row: Data, objects: Objects, place: Place) -> Data:
    return {
        **spread(row),
        "prompt": turns(row["question"]),
        "prompt_id": row["question_id"],
        "rubrics": objects(row.get("items", [])),
        **_optional(row, response="response"),
    }


def load_rar(theirs: Data, place: Place, items: Items) -> Data:
    asked = question(theirs, "question", place)
    found = items(need(theirs, "rubric", place), place.at("rubric"))
    return {
        **_row("rar", question_id(asked, *_gist(found)), asked),
        **_optional(theirs, response="response", reference="reference_answer"),
        "items": found,
        "metadata": rest(theirs, "question", "rubric", "rubric_count", "reference_answer", "response"),
    }


def dump_rar(row: Data, objects: Objects, place: Place) -> Data:
    rubric = objects(row.get("items", []))
    return {
        **spread(row),
        "question": row["question"],
        **_optional(row, reference_answer="reference", response="response"),
        "rubric": rubric,
        "rubric_count": len(rubric),
    }


def score_rar(row: Data) -> Data:
    """Equation 1 of the paper divides by the sum of all weights, the negative ones included."""
    weights = [signed(item) for item in row.get("items", [])]
    plain = not any("weight" in item.get("x-rar", {}) for item in row.get("items", []))
    positive, total = math.fsum(weight for weight in weights if weight > 0), math.fsum(weights)
    return {"formula": "points", **({"high": positive / total} if plain and 0 < total < positive else {})}


def load_dr_tulu(theirs: Data, place: Place, items: Items) -> Data:
    """A row of the trainer, whose ``ground_truth`` is JSON in a string, or the question and its rubrics as they are."""
    if "ground_truth" not in theirs:
        key = next((key for key in ("query", "question", "prompt", "messages") if key in theirs), "query")
        asked = question(theirs, key, place)
        found = items(need(theirs, "rubrics", place), place.at("rubrics"))
        metadata = {**rest(theirs, key, "rubrics", "response"), "x-dr-tulu": {NOTES: {"question": key}}}
    else:
        at = place.at("ground_truth")
        truth, style = _truth(theirs["ground_truth"], at)
        found = items(need(truth, "rubrics", at), at.at("rubrics"))
        asked = question(theirs, "messages", place) if "messages" in theirs else question(truth, "query", at)
        more = {key: value for key, value in truth.items() if key not in ("query", "rubrics")}
        metadata = rest(theirs, "ground_truth", "messages", "response")
        if "messages" in theirs and "query" in truth and truth["query"] != _last(asked):
            more = {"query": truth["query"], **more}
        if more:
            metadata["ground_truth"] = more
        note = {**({"style": style} if style != "text" else {}), **({} if "messages" in theirs else {"question": None})}
        if note:
            metadata["x-dr-tulu"] = {NOTES: note}
    category = "dr-tulu" if any(signed(item) > 0 for item in found) else "dr-tulu-weighted"
    row = _row(category, question_id(asked, *_gist(found)), asked)
    return {**row, **_optional(theirs, response="response"), "items": found, "metadata": metadata}


def dump_dr_tulu(row: Data, objects: Objects, place: Place) -> Data:
    fields, note = spread(row), noted(row, "x-dr-tulu")
    rubrics = objects(row.get("items", []))
    response = _optional(row, response="response")
    if isinstance(note.get("question"), str):
        return {**fields, note["question"]: row["question"], "rubrics": rubrics, **response}
    more = mapping(fields.pop("ground_truth", {}), place.at("metadata", "ground_truth"))
    truth: Any = {"query": more.pop("query", _last(row["question"])), "rubrics": rubrics, **more}
    if note.get("style") != "object":
        truth = json.dumps(truth)
    if note.get("style") == "list":
        truth = [truth]
    asked = {} if "question" in note else {"messages": turns(row["question"])}
    return {**fields, **asked, "ground_truth": truth, **response}


def _truth(value: Any, place: Place) -> tuple[Data, str]:
    style = "list" if isinstance(value, list) else "text" if isinstance(value, str) else "object"
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise place.fail(f"not JSON: {one_line(error)}") from error
    return mapping(value, place), style


def score_dr_tulu(row: Data) -> Data:
    """DR-Tulu divides by the sum of the positive weights, but never by less than 1."""
    weights = [signed(item) for item in row.get("items", [])]
    positive, negative = (math.fsum(w for w in weights if w * sign > 0) for sign in (1, -1))
    if not positive:
        return {"formula": "weighted", "low": negative, "high": 0}
    return {"formula": "points", **({"high": positive} if positive < 1 else {})}


def load_prometheus(theirs: Data, place: Place, items: Items) -> Data:
    asked = question(theirs, "orig_instruction", place)
    criterion = {
        key.removeprefix("orig_"): value
        for key, value in theirs.items()
        if key == "orig_criteria" or ANCHOR.fullmatch(key.removeprefix("orig_"))
    }
    hidden = theirs.get("x-grape-items")
    found = items(unhide([criterion], hidden), place)
    return {
        **_row("prometheus", question_id(asked, *_gist(found)), asked),
        **_optional(theirs, response="orig_response", reference="orig_reference_answer"),
        "items": found,
        "metadata": rest(theirs, "orig_instruction", "orig_response", "orig_reference_answer",
                         *(f"orig_{key}" for key in criterion)),
    }  # fmt: skip


def dump_prometheus(row: Data, objects: Objects, place: Place) -> Data:
    found = objects(row.get("items", []))
    if len(found) != 1:
        raise place.fail(f"items: prometheus has one criterion to a question (got {len(found)})")
    hidden = hide(found)
    return {
        **spread(row),
        "orig_instruction": row["question"],
        **_optional(row, orig_response="response", orig_reference_answer="reference"),
        **{f"orig_{key}": value for key, value in found[0].items()},
        **hidden,
    }


def load_ifeval(theirs: Data, place: Place, items: Items) -> Data:
    asked = question(theirs, "prompt", place)
    kinds = need(theirs, "instruction_id_list", place)
    key = theirs.get("key")
    own = question_id(asked, kinds) if key is None else str(key)
    return {
        **_row("instructions", own, asked),
        **_optional(theirs, response="response", kwargs="kwargs"),
        "instruction_id_list": kinds,
        "metadata": rest(theirs, "key", "prompt", "instruction_id_list", "kwargs", "response"),
    }


def dump_ifeval(row: Data, objects: Objects, place: Place) -> Data:
    if "instruction_id_list" not in row:
        raise place.fail("instruction_id_list: missing; ifeval has nothing else to score by")
    key = row["question_id"]
    return {
        **spread(row),
        "key": int(key) if key.isdecimal() and str(int(key)) == key else key,
        "prompt": row["question"],
        "instruction_id_list": row["instruction_id_list"],
        **_optional(row, kwargs="kwargs", response="response"),
    }


def hide(objects: list[Data]) -> Data:
    """What is kept of items whose format has no room for it, for the object of the row."""
    kept = [value.pop("x-grape", None) for value in objects]
    return {"x-grape-items": kept} if any(kept) else {}


def unhide(objects: list[Data], kept: Any) -> list[Data]:
    """Objects with what was hidden of them."""
    if not isinstance(kept, list) or len(kept) != len(objects):
        return objects
    return [{**value, "x-grape": more} if more else value for value, more in zip(objects, kept, strict=True)]


def _row(category: str, question_id: str, question: Any) -> Data:
    return {"question_id": question_id, "category": category, "question": question}


def _optional(data: Data, **names: str) -> Data:
    """Fields under other names, those that are there."""
    return {name: data[key] for name, key in names.items() if data.get(key) is not None}


def _id(theirs: Data, key: str, asked: Any, found: list[Data]) -> str:
    own = theirs.get(key)
    return own if isinstance(own, str) and own else question_id(asked, *_gist(found))


def _gist(items: Iterable[Data]) -> list[Any]:
    return [(item["criterion"], signed(item)) for item in items]


def _last(asked: Any) -> str:
    """The last thing that the user says."""
    said = [turn["content"] for turn in turns(asked) if turn["role"] == "user"]
    return str(said[-1]) if said else ""


TABLES = {
    "healthbench": Table(
        format="healthbench", criteria=HEALTHBENCH, known=lambda data: "prompt" in data,
        load=load_healthbench, dump=dump_healthbench, score=lambda row: {"formula": "points", "clip": "mean"},
        order=("example_tags", "ideal_completions_data", "prompt", "prompt_id", "rubrics", "canary"),
    ),
    "rar": Table(
        format="rar", criteria=RAR, known=lambda data: "question" in data,
        load=load_rar, dump=dump_rar, score=score_rar,
        order=("question", "reference_answer", "question_source", "rubric", "rubric_list", "rubric_count"),
    ),
    "dr-tulu": Table(
        format="dr-tulu", criteria=DR_TULU,
        known=lambda data: any(key in data for key in ("ground_truth", "query", "question", "prompt", "messages")),
        load=load_dr_tulu, dump=dump_dr_tulu, score=score_dr_tulu,
        order=("source", "question_type", "messages", "query", "question", "prompt", "ground_truth", "rubrics"),
    ),
    "prometheus": Table(
        format="prometheus", criteria=PROMETHEUS, known=lambda data: "orig_instruction" in data,
        load=load_prometheus, dump=dump_prometheus, score=lambda row: {"formula": "weighted", "low": 1, "high": 5},
        order=("orig_instruction", "orig_response", "orig_reference_answer", "orig_criteria"),
    ),
    "ifeval": Table(
        format="ifeval", criteria=None, known=lambda data: True,
        load=load_ifeval, dump=dump_ifeval, score=lambda row: {"formula": "weighted"},
        order=("key", "prompt", "instruction_id_list", "kwargs"),
    ),
}  # fmt: skip
