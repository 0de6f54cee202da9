"""Criteria with scales of their own: Prometheus, the verifiers' rubric judge and openai/evals' model-graded specs.

Prometheus (prometheus-eval/prometheus-eval) reports the points of its scale, 1 to 5. The rubric judge of verifiers v1
(PrimeIntellect-ai/verifiers) takes the mean by weight of ranks spaced evenly on [0, 1]. A model-graded spec
(openai/evals) reports what the chosen string is worth.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grape.errors import one_line
from grape.formats.criteria import Criteria, Reader, Writer, scale_of, weighs_nothing
from grape.formats.keep import (
    NOTES,
    Data,
    Place,
    block,
    made_by,
    made_fields,
    mapping,
    need,
    notes,
    number,
    sequence,
    text,
)
from grape.formats.sheet import Sheet, Take, listed
from grape.scale import parse_scale

ANCHOR = re.compile(r"score(\d+)_description")
ENDING = "\n\n[Question]\n{input}\n\n[Response]\n{completion}"  # how a criterion of ours becomes a grader's prompt


def load_prometheus(theirs: Data, place: Place, reader: Reader) -> Data:
    anchors = {int(found[1]): text(theirs, key, place) for key in theirs if (found := ANCHOR.fullmatch(key))}
    if len(anchors) < 2:
        raise place.fail(f"score1_description to score5_description are meant; there is: {', '.join(theirs)}")
    made = {"criterion": text(theirs, "criteria", place), "weight": 1, "judge": "default"}
    return {**made, "scale": {"likert": anchors}}


def dump_prometheus(made: Data, writer: Writer) -> Data:
    scale = scale_of(made, writer.place)
    anchors: Mapping[Any, str]
    if scale.kind == "likert":
        anchors = {int(point): words for point, words in made["scale"]["likert"].items()}
    elif scale.kind == "ordinal":
        anchors = dict(enumerate(scale.labels, 1))
    else:
        raise writer.place.fail(
            f"item {made['id']!r} has no anchors (scale: likert or ordinal), which prometheus needs"
        )
    return {"criteria": made["criterion"], **{f"score{point}_description": words for point, words in anchors.items()}}


def load_verifiers(theirs: Data, place: Place, reader: Reader) -> Data:
    choices = sequence(theirs.get("choices", ["no", "yes"]), place.at("choices"))
    weight = number(theirs.get("weight", 1.0), place.at("weight"))
    if weight < 0:
        raise place.at("weight").fail(f"a weight from 0 up is meant (got {weight!r})")
    text(theirs, "name", place)
    made = {"criterion": text(theirs, "text", place), "weight": weight, "judge": "default"}
    return {**made, "scale": {"ordinal": choices}}


def dump_verifiers(made: Data, writer: Writer) -> Data:
    scale = scale_of(made, writer.place)
    labels = list(made["scale"]["ordinal"]) if scale.kind == "ordinal" else ["no", "yes"]
    if made.get("polarity") == "undesirable":
        labels.reverse()  # from worst to best
    return {"text": made["criterion"], "weight": made.get("weight", 1), "choices": labels}


def load_grader(theirs: Data, place: Place, reader: Reader) -> Data:
    prompt = need(theirs, "prompt", place)
    if isinstance(prompt, list):
        prompt = "\n\n".join(text(mapping(turn, place), "content", place) for turn in prompt)
    elif not isinstance(prompt, str) or not prompt.strip():
        raise place.at("prompt").fail(f"text is meant (got {one_line(repr(prompt), 60)})")
    worth, open_ = _worth(theirs, place, reader)
    note: Data = {}
    low, high = min(worth.values(), default=0), max(worth.values(), default=0)
    if low < 0 or high > 1:
        if low == high:
            raise place.at("choice_scores").fail(f"every choice is worth {low!r}")
        note["range"] = [low, high]
        worth = {label: (value - low) / (high - low) for label, value in worth.items()}
    made = {"criterion": prompt.removesuffix(ENDING), "weight": 1, "judge": "default", "scale": {"choices": worth}}
    if note:
        made["x-openai-evals"] = {NOTES: note}
    return made_by(made, "x-openai-evals", scale=made["scale"]) if open_ else made


def _worth(theirs: Data, place: Place, reader: Reader) -> tuple[dict[str, Any], bool]:
    """What each choice is worth, and whether the spec leaves that to the user."""
    strings, scores = need(theirs, "choice_strings", place), theirs.get("choice_scores")
    if isinstance(strings, str) and strings.startswith("from_n"):
        raise place.at("choice_strings").fail(f"{strings!r} compares several responses; a rubric judges one")
    labels = list(strings) if isinstance(strings, str) else sequence(strings, place.at("choice_strings"))
    if not all(isinstance(label, str) for label in labels):
        raise place.at("choice_strings").fail(f"text is meant (got {one_line(repr(strings), 60)})")
    if scores == "from_strings":
        try:
            return {label: float(label) for label in labels}, False
        except ValueError as error:
            raise place.at("choice_strings").fail(one_line(error)) from error
    left_open = scores is None
    if left_open:
        scores = reader.decisions.scores(str(place.path[-1]) if place.path else Path(place.file).stem)
    if scores is None:
        reader.decisions.note(place, f"what {', '.join(labels)} are worth")
        scores = dict.fromkeys(labels, 0)
    given = {str(label): value for label, value in mapping(scores, place.at("choice_scores")).items()}
    at = place.at("choice_scores")
    return {label: number(need(given, label, at), at.at(label)) for label in labels}, left_open


def dump_grader(made: Data, writer: Writer) -> Data:
    scale = scale_of(made, writer.place)
    worth: Mapping[Any, Any]
    if scale.kind == "binary":
        worth = {"Yes": 1, "No": 0}
    elif scale.kind == "choices":
        worth = made["scale"]["choices"]
    elif scale.kind in ("ordinal", "likert"):
        values = [(value - scale.values[0]) / (scale.values[-1] - scale.values[0]) for value in scale.values]
        names = scale.labels if scale.kind == "ordinal" else [f"{value:g}" for value in scale.values]
        worth = dict(zip(names, values, strict=True))
    else:
        raise writer.place.fail(f"item {made['id']!r} has no choices, which openai-evals needs")
    if made.get("polarity") == "undesirable":
        worth = {label: 1 - value for label, value in worth.items()}
    note = notes(block(made, "x-openai-evals", writer.place))
    if isinstance(note.get("range"), list) and len(note["range"]) == 2:
        low, high = (number(bound, writer.place) for bound in note["range"])
        worth = {label: low + value * (high - low) for label, value in worth.items()}
    prompt = made["criterion"] if "{completion}" in made["criterion"] else made["criterion"] + ENDING
    theirs = {"prompt": prompt, "choice_strings": list(worth), "choice_scores": dict(worth)}
    if "scale" in made_fields(made, "x-openai-evals"):
        del theirs["choice_scores"]
    return {**theirs, "input_outputs": {"input": "completion"}}


def _graders(document: Any, take: Take, place: Place) -> Any:
    """Lifts a spec that is the whole file, or each of those that the file names."""
    specs = mapping(document, place, "a model-graded spec")
    if "choice_strings" in specs:
        return take(specs, place, Path(place.file).stem)
    if not specs:
        raise place.fail("no model-graded spec in it")
    return {name: take(spec, place.at(name), str(name)) for name, spec in specs.items()}


def score_grader(items: list[Data]) -> Data:
    ranges = [notes(item.get("x-openai-evals", {})).get("range") for item in items]
    return {"low": ranges[0][0], "high": ranges[0][1]} if len(items) == 1 and ranges[0] else {}


def score_prometheus(items: list[Data]) -> Data:
    scales = [parse_scale(item["scale"]) for item in items if "scale" in item]
    ends = {(scale.low, scale.high) for scale in scales if scale.kind == "likert"}
    return {"low": int(min(ends)[0]), "high": int(min(ends)[1])} if len(ends) == 1 else {}


def _prometheus(document: Any, take: Take, place: Place) -> Any:
    """Lifts one criterion that is the whole file, or a list of them."""
    if isinstance(document, Mapping) and "criteria" in document:
        return take(document, place)
    return listed("rubrics")(document, take, place)


PROMETHEUS = Criteria(
    format="prometheus", load=load_prometheus, dump=dump_prometheus, penalties=False,
    order=("criteria", *(f"score{point}_description" for point in range(1, 6))),
)  # fmt: skip
VERIFIERS = Criteria(
    format="verifiers", load=load_verifiers, dump=dump_verifiers, name="name", named=True,
    skips=weighs_nothing("weight"), order=("name", "text", "weight", "choices"),
)  # fmt: skip
GRADERS = Criteria(
    format="openai-evals", load=load_grader, dump=dump_grader, named=True,
    order=("prompt", "choice_strings", "choice_scores", "input_outputs"),
)  # fmt: skip

PROMETHEUS_SHEET = Sheet(
    criteria=PROMETHEUS, lift=_prometheus, build=lambda objects: {"rubrics": list(objects.values())},
    list_key="rubrics", formula=lambda items: "weighted", score=score_prometheus,
)  # fmt: skip
VERIFIERS_SHEET = Sheet(
    criteria=VERIFIERS, lift=listed("criteria"), build=lambda objects: {"criteria": list(objects.values())},
    list_key="criteria", formula=lambda items: "weighted", strict=True,
)  # fmt: skip
GRADERS_SHEET = Sheet(
    criteria=GRADERS, lift=_graders, build=dict, list_key="specs", formula=lambda items: "weighted",
    score=score_grader, strict=True,
)  # fmt: skip
