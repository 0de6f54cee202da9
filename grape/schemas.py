"""JSON Schemas of the files that users write."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from grape.config import RunConfig
from grape.judge.config import Judge
from grape.phases import ConstitutionRun
from grape.recipes import DpoRun, RewardModelRun, SftRun
from grape.rubric import Rubric

Kind = Literal["rubric", "judge", "run", "sft", "reward-model", "dpo", "constitution"]
MODELS: dict[str, type[BaseModel]] = {
    "rubric": Rubric, "judge": Judge, "run": RunConfig, "sft": SftRun, "reward-model": RewardModelRun, "dpo": DpoRun,
    "constitution": ConstitutionRun,
}  # fmt: skip


def schema(kind: Kind) -> dict[str, Any]:
    """The JSON Schema of a file, by which editors complete and check it."""
    if kind not in MODELS:
        raise ValueError(f"kind must be {', '.join(MODELS)}, not {kind!r}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"grape {kind}",
        **{key: value for key, value in MODELS[kind].model_json_schema(by_alias=True).items() if key != "title"},
    }
