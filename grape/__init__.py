"""Rubrics in YAML to confidence-weighted, group-relative advantages, with every critique in DuckDB.

The names below are the public API. Each is imported when it is first used, so that ``import grape`` is instant and
loads neither torch nor duckdb. Every command of ``grape`` is a thin shell over the function of the same name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grape.cases import check
    from grape.checkers import Finding, checker, from_row, load_checkers
    from grape.errors import ConfigError, GrapeError, JudgeError, LogError, SandboxError
    from grape.formats import convert
    from grape.judge.config import Judge, load_judge
    from grape.log import Log
    from grape.log.query import sql
    from grape.reward import advantage, item_credit, item_terms, mean_confidence, rubric_reward
    from grape.rubric import Rubric, load_rubric
    from grape.schemas import schema
    from grape.scoring import score
    from grape.starter import init
    from grape.tour import quickstart
    from grape.training import train
    from grape.types import Outcome, Question, Response, Verdict

_HOME = {
    "cases": ("check",),
    "checkers": ("Finding", "checker", "from_row", "load_checkers"),
    "errors": ("ConfigError", "GrapeError", "JudgeError", "LogError", "SandboxError"),
    "formats": ("convert",),
    "judge.config": ("Judge", "load_judge"),
    "log": ("Log",),
    "log.query": ("sql",),
    "reward": ("advantage", "item_credit", "item_terms", "mean_confidence", "rubric_reward"),
    "rubric": ("Rubric", "load_rubric"),
    "schemas": ("schema",),
    "scoring": ("score",),
    "starter": ("init",),
    "tour": ("quickstart",),
    "training": ("train",),
    "types": ("Outcome", "Question", "Response", "Verdict"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ConfigError",
    "Finding",
    "GrapeError",
    "Judge",
    "JudgeError",
    "Log",
    "LogError",
    "Outcome",
    "Question",
    "Response",
    "Rubric",
    "SandboxError",
    "Verdict",
    "advantage",
    "check",
    "checker",
    "convert",
    "from_row",
    "init",
    "item_credit",
    "item_terms",
    "load_checkers",
    "load_judge",
    "load_rubric",
    "mean_confidence",
    "quickstart",
    "rubric_reward",
    "schema",
    "score",
    "sql",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'grape' has no attribute {name!r}")
    value = getattr(import_module(f"grape.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
