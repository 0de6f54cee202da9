"""A rubric's item: what is judged, by which flow, when it applies, and its share of the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from grape.checkers import check_arguments, row_fields
from grape.scale import SCHEMA, Scale, parse_scale
from grape.types import Name, Question, Strict, Turn, Unit

Scalar = str | int | float | bool
ScaleField = Annotated[Scale, BeforeValidator(parse_scale), PlainSerializer(Scale.dump), WithJsonSchema(SCHEMA)]


class Extensible(Strict):
    """A model that keeps the user's own ``x-*`` keys, in ``extensions``."""

    model_config = ConfigDict(json_schema_extra={"patternProperties": {"^x-": {}}})
    extensions: dict[str, Any] = Field(default_factory=dict, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_extensions(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if "extensions" in data:
            raise ValueError("unknown key 'extensions'; keys of your own begin with x-")
        own = {key: value for key, value in data.items() if isinstance(key, str) and key.startswith("x-")}
        rest = {key: value for key, value in data.items() if key not in own}
        return {**rest, "extensions": own} if own else rest


class AppliesWhen(Strict):
    """Clauses on the question that must all hold: `has` and `lacks` name fields, any other key compares one."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Scalar | list[Scalar]]
    has: str | list[str] = []
    lacks: str | list[str] = []

    def holds(self, question: Question) -> bool:
        """Decided on the question's fields alone, so that a group shares one set of items (decision A7)."""
        if any(question.get(field) is None for field in _many(self.has)):
            return False
        if any(question.get(field) is not None for field in _many(self.lacks)):
            return False
        return all(
            any(question.get(field) == value and isinstance(question.get(field), bool) == isinstance(value, bool)
                for value in _many(wanted))
            for field, wanted in self.__pydantic_extra__.items()
        )  # fmt: skip


def _many(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class Gate(Strict):
    """A floor: an item that scores below ``at_least`` (after polarity) sets the whole reward and skips the others."""

    at_least: Unit
    reward: Annotated[float, Field(allow_inf_nan=False)] = 0.0


class Calibrate(Strict):
    """Maps a reward model's value to [0, 1]: sigmoid((value - mean) / std)."""

    mean: float
    std: Annotated[float, Field(gt=0)]


class Principle(Strict):
    """What makes an item a principle of a constitution: how to ask for a critique of a response by it, and for a
    response without the faults that the critique found (Bai et al. 2022, arXiv 2212.08073, section 3)."""

    critique: Annotated[str, Field(min_length=1)]
    revision: Annotated[str, Field(min_length=1)]


LEAF_ONLY = (
    "with", "reference", "critique", "scale", "polarity", "gate", "on_failure", "share_in_improve", "confidence",
    "calibrate", "raw", "principle",
)  # fmt: skip
ONLY_WITH = {
    "judge": ("reference", "critique", "scale"),
    "check": ("with",),
    "reward_model": ("calibrate", "raw"),
}


class Item(Extensible):
    """One thing a response is judged on, or a group of such items that share one weight.

    A leaf has exactly one scoring flow: ``check`` (a checker), ``judge`` (an LLM judge) or ``reward_model``.
    """

    id: Name
    criterion: str = ""
    weight: Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)] = 1.0
    items: Annotated[list[Item], Field(min_length=1)] | None = None
    check: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict, alias="with")
    judge: Name | None = None
    reference: bool = False
    critique: Name | None = None
    scale: ScaleField = Scale()
    reward_model: str | None = None
    calibrate: Calibrate | None = None
    raw: bool = False
    confidence: Unit = 1.0
    polarity: Literal["desirable", "undesirable"] = "desirable"
    gate: Gate | None = None
    on_failure: Literal["impute", "drop", "worst"] = "impute"
    share_in_improve: bool | None = None
    principle: Principle | None = None
    applies_when: AppliesWhen | None = None
    tags: list[str] = []

    @model_validator(mode="after")
    def _one_flow(self) -> Item:
        flows = [flow for flow in ("items", "check", "judge", "reward_model") if getattr(self, flow) is not None]
        if len(flows) != 1:
            raise ValueError(f"item {self.id!r} needs exactly one of items, check, judge, reward_model; it has "
                             f"{' and '.join(flows) or 'none'}")  # fmt: skip
        given = {"with" if name == "arguments" else name for name in self.model_fields_set}
        if flows == ["items"] and (wrong := sorted(given & set(LEAF_ONLY))):
            raise ValueError(
                f"item {self.id!r}: {wrong[0]!r} does not go with items; it belongs to an item without any"
            )
        for flow, keys in ONLY_WITH.items():
            if flow not in flows and (wrong := sorted(given & set(keys))):
                raise ValueError(f"item {self.id!r}: {wrong[0]!r} goes only with {flow}")
        if flows == ["judge"]:
            if not self.criterion.strip():
                raise ValueError(f"item {self.id!r}: a judge needs a criterion")
            if "confidence" in given:
                raise ValueError(f"item {self.id!r}: a judge states its own confidence; 'confidence' goes with check")
        if self.raw and (wrong := sorted(given & {"calibrate", "gate"})):
            raise ValueError(f"item {self.id!r}: {wrong[0]!r} does not go with raw: true, whose scores have no bounds")
        if self.raw and (self.undesirable or self.on_failure == "worst"):
            key = "polarity: undesirable" if self.undesirable else "on_failure: worst"
            raise ValueError(f"item {self.id!r}: {key} does not go with raw: true, whose scores have no bounds")
        if self.check is not None:
            check_arguments(self.check, self.arguments)
        return self

    @property
    def kind(self) -> str:
        """The scoring flow of a leaf: check, judge or reward_model."""
        return "check" if self.check else "judge" if self.judge else "reward_model"

    @property
    def asks_a_model(self) -> bool:
        """Whether a judge or a reward model scores it: such items are left out where no model is to be asked."""
        return self.judge is not None or self.reward_model is not None

    @property
    def undesirable(self) -> bool:
        """Whether the criterion is bad when met; such an item contributes 1 - score."""
        return self.polarity == "undesirable"

    @property
    def row_fields(self) -> dict[str, str]:
        """The fields of the question that the item cannot do without: argument -> field."""
        if self.check:
            return row_fields(self.check, self.arguments)
        return {"reference": "reference"} if self.reference else {}

    @property
    def fields_read(self) -> set[str]:
        """Every field of the question that decides whether the item applies, or that its checker is given."""
        fields = set(self.row_fields.values())
        if self.applies_when is not None:
            fields |= {*_many(self.applies_when.has), *_many(self.applies_when.lacks)}
            fields |= set(self.applies_when.__pydantic_extra__)
        return fields

    @property
    def shares_in_improve(self) -> bool:
        """Whether its reasoning may be shown to the policy: by default not where the ground truth was seen."""
        return not self.row_fields if self.share_in_improve is None else self.share_in_improve


def flatten(items: Iterable[Item]) -> list[Item]:
    """The leaves of the tree, in the order of the file."""
    return [leaf for item in items for leaf in (flatten(item.items) if item.items else [item])]


def paths(where: str, items: list[Item]) -> Iterator[tuple[str, Item]]:
    """Every item of the tree, groups before their children, with its place in the file."""
    for number, item in enumerate(items):
        yield f"{where}.{number}", item
        yield from paths(f"{where}.{number}.items", item.items or [])


def distinct_ids(items: list[Item]) -> None:
    """Refuse an id that stands twice anywhere in the tree (ValueError)."""
    first: dict[str, str] = {}
    for path, item in paths("items", items):
        if item.id in first:
            raise ValueError(f".{path}.id: duplicate id {item.id!r}; it is {first[item.id]}'s too")
        first[item.id] = path


def weights(items: Iterable[Item], applies: Callable[[Item], bool]) -> dict[str, float]:
    """Each leaf's share of a weight of 1, by id; 0 for a leaf that does not apply.

    Children share their parent's weight by their own; one that does not apply leaves its share to its siblings, and
    a parent none of whose children applies leaves its own to its siblings (decisions A7, A22).
    """
    items = list(items)
    shares = {leaf.id: 0.0 for leaf in flatten(items)}

    def lives(item: Item) -> bool:
        return applies(item) and (not item.items or any(lives(child) for child in item.items))

    def divide(items: Iterable[Item], whole: float) -> None:
        living = [item for item in items if lives(item)]
        total = math.fsum(item.weight for item in living)
        for item in living:
            part = whole * item.weight / total
            if item.items:
                divide(item.items, part)
            else:
                shares[item.id] = part

    divide(items, 1.0)
    return shares


def applies_to(question: Question) -> Callable[[Item], bool]:
    """Whether an item's own condition holds for a question."""
    return lambda item: item.applies_when is None or item.applies_when.holds(question)


def keys_at(error: ValidationError, root: type[BaseModel], **nested: type[BaseModel]) -> list[str]:
    """The keys that are known at the place of an error's unknown key, in a file of ``root``."""
    faults = error.errors(include_url=False)
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    inside = dict[str, type[BaseModel]](
        items=Item, gate=Gate, calibrate=Calibrate, principle=Principle, question=Turn, **nested
    )
    groups = [part for part in fault["loc"][:-1] if part in inside]
    model = inside[str(groups[-1])] if groups else root
    return sorted(field.alias or name for name, field in model.model_fields.items() if name != "extensions")
