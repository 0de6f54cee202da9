"""Code blocks of documents, run as a reader would: `python tests/readme.py [FILE]` writes what the commands print.

A ```console block holds commands after `$ ` (continued while quotes are open) and what they print; a line of only
`...` stands for any lines. The blocks run in order in one folder, in which `examples` is the repository's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("README.md", "docs/data.md")  # the documents with such blocks
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Command:
    """One command of a console block with the output that the document shows."""

    text: str
    shown: str


def blocks(text: str, kind: str) -> list[str]:
    """The bodies of all fenced blocks of a kind."""
    return [body for name, body in BLOCK.findall(text) if name == kind]


def commands(block: str) -> Iterator[Command]:
    """The commands of a console block."""
    text, shown = "", []
    for line in block.splitlines(keepends=True):
        if text and text.count('"') % 2:
            text += line
        elif line.startswith("$ "):
            if text:
                yield Command(text.strip(), "".join(shown))
            text, shown = line[2:], []
        else:
            shown.append(line)
    if text:
        yield Command(text.strip(), "".join(shown))


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """One command by bash, with this interpreter's environment first on the path."""
    scripts = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "NO_COLOR": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for name in ("GRAPE_HOME", "COLUMNS", "LINES"):  # a terminal is as wide as it is where there is none
        env.pop(name, None)
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=240)


def prepare(folder: Path) -> Path:
    """The folder in which the blocks run."""
    for name in ("examples", "rubrics", "prompts", "judges", "benchmarks", "docs", "tests"):
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return folder


def tidy(text: str) -> str:
    """Output without trailing spaces."""
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def matches(shown: str, printed: str) -> bool:
    """Whether what was printed is what the document shows, `...` standing for any lines."""
    parts = [re.escape(part) for part in re.split(r"^\.\.\.\n", tidy(shown), flags=re.M)]
    return re.fullmatch("(?:.*\n)*?".join(parts), tidy(printed)) is not None


def rewrite(path: Path) -> None:
    """Put what the commands print now into the document, where it shows anything else."""
    text = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        folder = prepare(Path(name))
        for block in blocks(text, "console"):
            new = ""
            for command in commands(block):
                done = run(command.text, folder)
                printed = tidy(done.stdout)
                if done.returncode not in (0, 1) or (done.returncode and not done.stderr):
                    raise SystemExit(f"{command.text}\n{done.stdout}{done.stderr}")
                printed += tidy(done.stderr) if done.returncode else ""
                new += f"$ {command.text}\n" + (command.shown if matches(command.shown, printed) else printed)
                new += "" if new.endswith("\n\n") or command.shown.endswith("\n\n") is False else "\n"
            text = text.replace(block, new)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:] or SHOWN:
        rewrite(ROOT / name)
