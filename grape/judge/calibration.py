"""A judge's calibration: what its confidence is worth, by category and item; a file beside the judge's own."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from grape.errors import ConfigError, invalid
from grape.resources import is_file, read_text
from grape.types import Strict, Unit, Verdict

Kind = Literal["isotonic", "constant", "zero"]


class Map(Strict):
    """What stands for a confidence.

    ``isotonic``: the rising line through the points (x, y), level beyond them. ``constant``: y, since the judge's
    confidence does not order its errors. ``zero``: 0, since the judge is not beyond chance.
    """

    kind: Kind
    x: Annotated[list[Unit], Field(max_length=100_000)] = []
    y: Annotated[list[Unit], Field(max_length=100_000)] = []

    @model_validator(mode="after")
    def _rising(self) -> Map:
        points = {"isotonic": len(self.x), "constant": 1, "zero": 0}[self.kind]
        if len(self.y) != points or (self.kind == "isotonic") != bool(self.x):
            raise ValueError(f"a map of kind {self.kind} has as many x and y as it has points")
        if any(a >= b for a, b in pairwise(self.x)) or any(a > b for a, b in pairwise(self.y)):
            raise ValueError("x must rise, and y must not fall")
        return self

    def __call__(self, confidence: float) -> float:
        """The calibrated confidence."""
        if self.kind == "isotonic":
            return float(np.interp(confidence, self.x, self.y))
        return self.y[0] if self.kind == "constant" else 0.0


class Calibration(Strict):
    """The maps of one judge. A verdict takes that of `category/item`, or else that of the `item`, or else `*`."""

    judge: str
    identity: str
    maps: dict[str, Map]

    def __call__(self, category: str, item: str, confidence: float) -> float:
        """The confidence of a verdict, calibrated; as it was where no map is for it."""
        for name in (f"{category}/{item}", item, "*"):
            if name in self.maps:
                return self.maps[name](confidence)
        return confidence


def calibrated(verdict: Verdict, calibration: Calibration | None, category: str) -> Verdict:
    """The verdict with its confidence as the calibration has it."""
    if calibration is None or verdict.stated is None:
        return verdict
    return replace(verdict, confidence=calibration(category, verdict.item, verdict.stated))


def calibration_path(judge_file: str | Path) -> Path:
    """Where the calibration of a judge's file stands: `gpt.yaml` has `gpt.calibration.json`."""
    return Path(judge_file).with_suffix(".calibration.json")


def load_calibration(judge_file: Path) -> Calibration | None:
    """The calibration beside a judge's file, if there is one."""
    path = calibration_path(judge_file)
    if not is_file(path):
        return None
    try:
        return Calibration.model_validate(json.loads(read_text(path)))
    except ValidationError as error:
        raise invalid(str(path), error, sorted(Calibration.model_fields)) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
