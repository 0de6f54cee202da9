"""Every command and block of code in the README does what it shows."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from readme import ROOT, SHOWN, blocks, commands, matches, prepare, run, tidy

from grape.cli import VERBS
from grape.config import (
    CheckpointConfig,
    EvaluateConfig,
    PolicyConfig,
    QuestionsConfig,
    RunConfig,
    SftConfig,
    ValueConfig,
    parse_run,
)
from grape.judge.config import Judge
from grape.recipes import TAKES, DpoRun, HeldoutConfig, RewardModelRun, SftRun, parse_recipe
from grape.resources import read_yaml
from grape.rubric import parse_rubric

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETUP = [
    'pip install -c constraints.txt -e ".[train]" && grape quickstart',
    'pip install -c constraints.txt -e ".[test]" && pytest',
]


def confined(block):
    """Whether a block runs programs, which needs bubblewrap."""
    return "examples/coding" in block


@pytest.mark.slow
@pytest.mark.parametrize("document", SHOWN)
def test_console_blocks_print_what_they_show(tmp_path, document):
    folder = prepare(tmp_path)
    wrong = []
    for block in blocks((ROOT / document).read_text(encoding="utf-8"), "console"):
        if confined(block) and shutil.which("bwrap") is None:
            continue  # the README says what to install; .ci/run does, so there the block is held to its word
        for command in commands(block):
            done = run(command.text, folder)
            printed = done.stdout + (done.stderr if done.returncode else "")
            if not matches(command.shown, printed):
                wrong.append(
                    f"$ {command.text}\n--- shown\n{tidy(command.shown)}--- printed\n{tidy(printed)}{done.stderr}"
                )
    assert not wrong, "\n".join(wrong)


def test_python_blocks_run(tmp_path):
    folder = prepare(tmp_path)
    found = blocks(README, "python")
    assert found
    for block in found:
        ast.parse(block)
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, env={**os.environ}
        )
        assert done.returncode == 0, done.stderr


def test_yaml_blocks_are_rubrics_judges_or_runs():
    found = blocks(README, "yaml")
    assert found
    for block in found:
        data = read_yaml("README.md", block)
        if "rubric" in data:
            parse_rubric(data, "README.md")
        elif "data" in data:
            parse_recipe(DpoRun, data, "README.md")
        elif "policy" in data:
            parse_run(data, "README.md")
        else:
            Judge.model_validate(data)


def test_the_set_up_is_two_commands_and_ci_runs_the_second():
    shell = "\n".join(blocks(README, "bash"))
    for command in SETUP:
        assert command in shell
    ci = (ROOT / ".ci/run").read_text()
    assert 'pip install -q -c constraints.txt -e ".[test]" && pytest' in ci


def test_the_file_tree_is_the_files():
    """Each line of the tree in the README names a file or a folder that exists; every module of grape has its line."""
    (tree,) = [block for block in blocks(README, "text") if block.startswith("grape/")]
    shown, stack = set(), []
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        assert "  " in line.strip(), f"no comment: {line}"
        stack = [*stack[:depth], name]
        path = Path("".join(stack))
        assert (ROOT / path).exists(), path
        shown.add(str(path))
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "grape").glob("*.py") if p.name != "__init__.py"}
    assert modules <= shown, modules - shown
    packages = {str(p.relative_to(ROOT)) for p in (ROOT / "grape").iterdir() if (p / "__init__.py").exists()}
    assert packages <= shown, packages - shown


def test_links_in_documents_lead_somewhere():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("word", [f"/{folder}/" for folder in ("work", "root", "tmp")])
def test_documents_speak_of_the_project_alone(word):
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        assert word not in document.read_text(encoding="utf-8")


def test_the_page_on_training_shows_every_field_with_its_default():
    block = (ROOT / "docs/training.md").read_text().split("```yaml\n")[1].split("```")[0]
    off = {line.split(":")[0].strip() for line in block.splitlines() if "# off" in line}

    def compare(model: type[BaseModel], shown: dict[str, Any], path: str) -> None:
        assert sorted(shown) == sorted(model.model_fields), path
        for name, field in model.model_fields.items():
            default = field.get_default(call_default_factory=True)
            if isinstance(default, BaseModel):
                compare(type(default), shown[name], f"{path}.{name}")
            elif not (field.is_required() or name in off):
                assert shown[name] == default, f"{path}.{name}"

    shown = read_yaml("training.md", block)
    compare(RunConfig, {**shown, "policy": None, "questions": None}, "run")
    compare(PolicyConfig, shown["policy"], "policy")
    compare(QuestionsConfig, shown["questions"], "questions")
    for name, model in (
        ("evaluate", EvaluateConfig),
        ("value", ValueConfig),
        ("sft", SftConfig),
        ("checkpoint", CheckpointConfig),
    ):
        assert sorted(shown[name]) == sorted(model.model_fields)
    parse_run({**shown, "advantage": {"baseline": "none"}}, "docs/training.md")


def test_the_page_on_tuning_shows_every_field_with_its_default():
    block = (ROOT / "docs/tuning.md").read_text().split("```yaml\n")[1].split("```")[0]
    off = {line.split(":")[0].strip() for line in block.splitlines() if "# off" in line}
    shown = read_yaml("docs/tuning.md", block)
    for kind in (SftRun, RewardModelRun, DpoRun):
        assert sorted(shown) == sorted(kind.model_fields)
        for part in ("policy", "data", "optimizer", "checkpoint"):
            model = kind.model_fields[part].annotation
            extra = {"turns"} if part == "data" and kind is not SftRun else set()
            assert set(shown[part]) - extra == set(model.model_fields), (kind, part)
            for name, field in model.model_fields.items():
                known = shown[part][name]
                if not field.is_required() and name not in off and (kind, part, name) != (DpoRun, "optimizer", "lr"):
                    assert known == field.get_default(call_default_factory=True), (kind, part, name)
        assert set(shown["heldout"]) == set(HeldoutConfig.model_fields)
    assert DpoRun.model_fields["optimizer"].default.lr == 1e-6
    told = (ROOT / "docs/tuning.md").read_text()
    for kind, parameters in TAKES.items():
        for name in (kind, *parameters):
            assert f"`{name}`" in told or f"`kind: {name}`" in told, name


def test_the_page_on_coverage_has_a_row_for_every_item_and_names_what_is_there():
    rows = re.findall(r"^\| (\d[\d-]*) \| (.+?) \| (.+?) \| (.*?) ?\|$", (ROOT / "docs/coverage.md").read_text(), re.M)
    numbers = [number for span, *_ in rows for number in range(int(span.split("-")[0]), int(span.split("-")[-1]) + 1)]
    assert numbers == list(range(1, 157))
    for number, _, by, tested in rows:
        files = re.findall(r"`((?:tests|grape|docs|examples|rubrics)/[\w./-]+?)`", by + tested)
        assert [name for name in files if not (ROOT / name).exists()] == [], number
        assert tested or by.startswith(("left out", "not yet", "`docs", "`README")), number
        for verb in re.findall(r"`grape ([a-z-]+)", by):
            assert verb in {command.name for command in VERBS}, (number, verb)
