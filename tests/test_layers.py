"""Who may import whom: arrows point one way, and the text half never loads torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import grape

PACKAGE = Path(grape.__file__).parent
# A module may import those of the lines above its own, and its siblings in the same folder.
LAYERS = [
    {"errors", "types", "reward", "phrases", "agreement", "selection", "crew"},
    {"resources", "scale", "sandbox"},
    {"sections"},
    {"config", "chat", "kl"},
    {"adapters", "linear_head", "loss", "recipes", "lesson_rows", "transcript"},
    {"policy", "value", "attention", "preference", "phases"},
    {"cache", "head", "classifier"},
    {"rollout", "logprobs", "shards"},
    {"member", "modes", "engine"},
    {"reference", "ranks", "packing", "served"},
    {"objective", "sampler", "descent"},
    {"optimize"},
    {"checkers", "log"},
    {"item"},
    {"rubric", "rows", "judge"},
    {"plan", "formats", "gold", "stored"},
    {"batch", "hidden"},
    {"improve", "panel", "records"},
    {"run", "controls", "extremes", "screen"},
    {"scoring", "schemas", "report", "drift", "decontaminate", "reliability", "starter", "questions", "progress"},
    {"collect", "order", "fitting", "repeat", "output", "lessons"},
    {"metrics", "calibrate", "pairs", "labels", "export", "examples"},
    {"step", "tasks"},
    {"groups", "material", "checkpoint", "teacher", "course"},
    {"heldout", "learner", "principles"},
    {"training", "tuning", "revision", "feedback"},
    {"sft_phase", "rl_phase"},
    {"best_of", "constitution"},
    {"cases", "tour"},
    {"cli"},
]
# the half that needs torch
TENSOR = {"adapters", "cache", "kl", "logprobs", "loss", "member", "modes", "objective", "preference"}
TENSOR |= {"head", "linear_head", "optimize", "policy", "reference", "rollout", "value"}
TENSOR |= {"collect", "metrics", "step", "groups", "material", "checkpoint", "heldout", "training"}
TENSOR |= {"best_of", "classifier", "examples", "tasks", "teacher", "course", "tuning"}
TENSOR |= {"principles", "revision", "feedback", "sft_phase", "rl_phase", "constitution"}
TENSOR |= {"descent", "engine", "served", "ranks", "sampler", "learner", "attention", "packing", "shards"}
RANK = {name: number for number, layer in enumerate(LAYERS) for name in layer}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every room of grape that a file imports, wherever in the file, but for what only type checkers read."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "grape":
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("grape.")}
    return names


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def test_imports_point_one_way():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in files()
        for name in imported(path)
        if name != room(path) and RANK[name] >= RANK[room(path)]
    ]
    assert wrong == []


def test_every_room_has_its_place():
    assert {room(path) for path in files()} == set(RANK)


def test_only_the_edge_starts_an_event_loop():
    assert {room(path) for path in files() if "asyncio.run(" in path.read_text(encoding="utf-8")} == {"cli"}


def loaded(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in out.stdout.split()}


def test_importing_grape_loads_next_to_nothing():
    assert not loaded("import grape") & {"torch", "duckdb", "numpy", "pydantic", "openai", "sympy", "transformers"}


def test_the_text_half_never_loads_torch():
    modules = ", ".join(
        f"grape.{path.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')}"
        for path in files()
        if room(path) not in TENSOR
    )
    modules = modules.replace(".__init__", "")
    assert not loaded(f"import {modules}") & {"torch", "transformers", "vllm"}


def test_every_public_name_is_there():
    for name in grape.__all__:
        assert getattr(grape, name) is not None
    assert sorted(grape.__all__) == sorted(grape._MODULE)
