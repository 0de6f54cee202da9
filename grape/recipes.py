"""The files of `grape sft`, `grape reward-model` and `grape dpo`: one strict model per verb."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from grape.config import CheckpointConfig, OptimizerConfig, PolicyConfig
from grape.errors import invalid
from grape.sections import Count, Names, NonNegative, Overlap, Positive, Whole, fields_at, read_sections
from grape.types import Strict

Place = Annotated[str, Field(min_length=1)]


class DataConfig(Strict):
    """Where the rows come from, and which column is which field.

    ``path`` is a .jsonl or .parquet file, a folder written by `datasets`, or a data set's name on the hub (with
    ``split`` and, where it has several, ``subset``). ``bad_rows`` skip leaves out rows that cannot be used, one longer
    than ``max_tokens`` (default: the model's context) among them, and counts them. ``limit`` takes the first rows.
    """

    path: Place
    split: str = "train"
    subset: str | None = None
    map: dict[str, str] = Field(default_factory=dict)
    bad_rows: Literal["fail", "skip"] = "fail"
    max_tokens: Count | None = None
    limit: Count | None = None


class ChatDataConfig(DataConfig):
    """``turns`` all teaches every turn of the assistant after all that stands before it, last only the last one."""

    turns: Literal["last", "all"] = "last"


class LessonsConfig(OptimizerConfig):
    """AdamW and its schedule: ``epochs`` passes over the rows, ``batch`` of them (of a reward model: questions) a
    step."""

    lr: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1e-5
    epochs: Annotated[int, Field(ge=1)] = 1
    batch: Count = 32


class HeldoutConfig(Strict):
    """What is held out: a ``share`` of the questions, or the rows of the file ``data``. It is measured before the first
    step, ``every`` so many and after the last. ``overlap`` says what becomes of taught questions that are found in
    held-out ones by their 8-grams: warn, drop, fail or allow."""

    share: Annotated[float, Field(gt=0, lt=1)] | None = None
    data: Place | None = None
    every: Count | None = None
    overlap: Overlap = "warn"

    @model_validator(mode="after")
    def _one(self) -> HeldoutConfig:
        if (self.share is None) == (self.data is None):
            raise ValueError(" needs either share or data")
        return self


class Recipe(Strict):
    """What these runs have in common. The result is the last checkpoint in ``checkpoint.dir``."""

    policy: PolicyConfig
    data: DataConfig
    optimizer: LessonsConfig = LessonsConfig()
    heldout: HeldoutConfig | None = None
    checkpoint: CheckpointConfig
    trackers: Names = Field(default_factory=list)
    log: str = "critiques.duckdb"
    seed: Whole = 0

    @model_validator(mode="after")
    def _whole(self) -> Recipe:
        if self.policy.shard:
            raise ValueError(".policy.shard: is for grape train")
        return self


class NllConfig(Strict):
    """Cross-entropy of the responses' tokens, the prompts masked: a mean over tokens, or eq. 2 (a sum for each row)."""

    aggregate: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"] = "token-mean"


class SftRun(Recipe):
    """Supervised fine-tuning on given responses."""

    data: ChatDataConfig
    loss: NllConfig = NllConfig()


class RewardLossConfig(Strict):
    """bradley-terry on pairs (with the rows' margins where ``margin``), ranking on ordered responses (Plackett-Luce),
    outcome on right and wrong responses (at every token), process on right and wrong steps (at the end of each)."""

    kind: Literal["bradley-terry", "ranking", "outcome", "process"] = "bradley-terry"
    margin: bool = False

    @model_validator(mode="after")
    def _pairs(self) -> RewardLossConfig:
        if self.margin and self.kind != "bradley-terry":
            raise ValueError(f".margin: goes with kind bradley-terry, not {self.kind}")
        return self


class RewardModelRun(Recipe):
    """A reward model from preferences: a sequence classifier with one logit, which `reward_model:` items read."""

    loss: RewardLossConfig = RewardLossConfig()

    @model_validator(mode="after")
    def _full(self) -> RewardModelRun:
        if self.policy.lora:
            raise ValueError(".policy.lora: a reward model is trained whole")
        return self


TAKES: dict[str, tuple[str, ...]] = {
    "dpo": ("beta",),
    "cdpo": ("beta", "smoothing"),
    "ipo": ("beta",),
    "simpo": ("beta", "gamma"),
    "orpo": ("beta",),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
}


class PreferenceLossConfig(Strict):
    """The loss of direct alignment (`grape.preference`), and the parameters that its kind has."""

    kind: Literal["dpo", "cdpo", "ipo", "simpo", "orpo", "kto"] = "dpo"
    beta: Positive = 0.1
    smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    gamma: NonNegative = 0.0
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0

    @model_validator(mode="after")
    def _own(self) -> PreferenceLossConfig:
        known = {"kind", *TAKES[self.kind]}
        if strange := sorted(self.model_fields_set - known):
            raise ValueError(f".{strange[0]}: is no parameter of {self.kind}, which has {', '.join(TAKES[self.kind])}")
        return self


class DpoRun(Recipe):
    """Direct alignment: a policy from preferences, without a reward model."""

    loss: PreferenceLossConfig = PreferenceLossConfig()
    optimizer: LessonsConfig = LessonsConfig(lr=1e-6)


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def load_recipe(kind: type[AnyRecipe], path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """The run of a file, with ``section.field=value`` overrides (values are YAML); `ConfigError` of one line."""
    data, source = read_sections(path, overrides)
    return parse_recipe(kind, data, source)


def parse_recipe(kind: type[AnyRecipe], data: Any, source: str) -> AnyRecipe:
    """A run from plain data."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise invalid(source, error, fields_at(error, kind)) from error
