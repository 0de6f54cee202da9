"""Which items judge a question, and with what share of the weight: decided before any response is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from grape.checkers import bind_arguments
from grape.errors import ConfigError, known
from grape.item import Item, applies_to, flatten, paths, weights
from grape.rows import Rows
from grape.rubric import Rubric
from grape.types import ROW_FIELDS, Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One question's items: the leaves of its rubric and its own, each with its share of a weight of 1 (or 0)."""

    question: Question
    rubric: Rubric
    leaves: tuple[Item, ...]
    weight: Mapping[str, float]
    fields_read: frozenset[str]

    @property
    def applicable(self) -> list[Item]:
        """The leaves that judge this question."""
        return [leaf for leaf in self.leaves if self.weight[leaf.id] > 0]


def plan_rows(rows: Rows, rubrics: Mapping[str, Rubric], *, use_judges: bool = True) -> dict[str, Plan]:
    """A plan per question id. A category without a rubric or a row without a needed field is a `ConfigError`."""
    plans = {id_: plan_question(rows, id_, rubrics, use_judges=use_judges) for id_ in rows.questions}
    for response in rows.responses:
        plan = plans[response.question_id]
        for field in plan.fields_read:
            if response.metadata.get(field) != plan.question.metadata.get(field):
                raise ConfigError(
                    f"{rows.source}: response {response.response_id!r}: metadata.{field}: differs within the group of "
                    f"{response.question_id!r}, whose items depend on it"
                )
    return plans


def plan_question(rows: Rows, question_id: str, rubrics: Mapping[str, Rubric], *, use_judges: bool = True) -> Plan:
    """The plan of one question of the rows. If there can be none, that is a `ConfigError`."""
    question, own, place = rows.questions[question_id], rows.items[question_id], rows.places[question_id]
    rubric = rubrics.get(question.category)
    if rubric is None:
        hint = known(rubrics, question.category)
        raise ConfigError(f"{place}: category: no rubric for {question.category!r}; {hint}")
    taken = {item.id for _, item in paths("items", rubric.items)}
    for path, item in paths("items", own):
        if item.id in taken:
            raise ConfigError(f"{place}: {path}.id: {item.id!r} is an item of rubric {rubric.rubric!r} already")
    holds = applies_to(question)
    tree = [*rubric.items, *own]
    weight = weights(tree, lambda item: holds(item) and (use_judges or not item.asks_a_model))
    read = frozenset(field for _, item in paths("items", tree) for field in item.fields_read)
    plan = Plan(question=question, rubric=rubric, leaves=tuple(flatten(tree)), weight=weight, fields_read=read)
    for item in plan.applicable:
        for field in item.row_fields.values():
            if question.get(field) is None:
                has = [name for name in ROW_FIELDS if question.get(name) is not None] + list(question.metadata)
                raise ConfigError(
                    f"{place}: {field}: item {item.id!r} of rubric {rubric.rubric!r} needs it and the row lacks it; "
                    f"the row has: {', '.join(has)} (or give the item `applies_when: {{has: {field}}}`)"
                )
        if item.check is not None:
            try:
                bind_arguments(item.check, item.arguments, question)
            except ValueError as error:
                raise ConfigError(f"{place}: item {item.id!r} of rubric {rubric.rubric!r}: {error}") from error
    return plan
