"""IFEval's 25 kinds of instruction as checkers, under the dataset's own names (Zhou et al. 2023, arXiv 2311.07911).

``check: "length_constraints:number_words"`` with ``{relation: at least, num_words: 300}``, and ``form: loose`` for the
loose form. A score is 1 or 0, by the published code's rules; where one of them surprises, the kind's docstring says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from grape.checkers import check_arguments
from grape.checkers.instructions import layout, words
from grape.checkers.instructions.form import CRITERIA, Form
from grape.errors import known

WEIGHT = 4  # an instruction that a program can check counts as much as doing the task, in the shipped rubric


def instruction_items(
    ids: Sequence[str], kwargs: Sequence[Mapping[str, Any] | None], form: str = "strict"
) -> list[dict[str, Any]]:
    """A question's instructions as rubric items of weight 4, in order: id ``<position>-<kind>``, positions from 0.

    An argument that is None is absent: datasets with one column for all arguments fill the rest with it. What is wrong
    raises ValueError with the path in the row, such as ``.kwargs.0.num_words: ...``.
    """
    if form not in get_args(Form):
        raise ValueError(f".instruction_form: {form!r} is no form; {known(get_args(Form), form)}")
    if len(ids) != len(kwargs):
        raise ValueError(f".kwargs: {len(kwargs)} sets of arguments for {len(ids)} instructions in instruction_id_list")
    return [_item(place, *pair, form) for place, pair in enumerate(zip(ids, kwargs, strict=True))]


def _item(place: int, kind: str, given: Mapping[str, Any] | None, form: str) -> dict[str, Any]:
    if kind not in CRITERIA:
        raise ValueError(f".instruction_id_list.{place}: no instruction named {kind!r}; {known(CRITERIA, kind)}")
    arguments = {name: value for name, value in (given or {}).items() if value is not None}
    try:
        check_arguments(kind, arguments)
    except ValueError as error:
        raise ValueError(f".kwargs.{place}{str(error).removeprefix('.with')}") from None
    return {
        "id": f"{place}-{kind.replace(':', '-')}",
        "criterion": CRITERIA[kind].format(**arguments),
        "weight": WEIGHT,
        "check": kind,
        "with": arguments if form == "strict" else {**arguments, "form": form},
    }


__all__ = ["CRITERIA", "instruction_items", "layout", "words"]
