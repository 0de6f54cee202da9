"""Files of other formats for the tests of `grape convert`: the examples, and ways to and from the grape side."""

from __future__ import annotations

import json
from pathlib import Path

from grape.formats import FORMATS, convert, files

FOLDER = Path(__file__).parent.parent / "examples/formats"
POLARITY = FOLDER / "rar-polarity.yaml"
EXAMPLES = [
    *(path for path in sorted(FOLDER.iterdir()) if path.stem in FORMATS and path.is_file()),
    *sorted((FOLDER / "paperbench").glob("*.json")),
]


def format_of(path: Path) -> str:
    return path.parent.name if path.parent != FOLDER else path.stem


def data(path: Path):
    return files.read(path)[0]


def rows(path: Path) -> list:
    """The rows of a file, be it one of one."""
    content = data(path)
    return content if isinstance(content, list) else [content]


def there(tmp_path: Path, name: str, source, suffix: str = ".json", **more) -> Path:
    """The grape side of data of a format."""
    file = tmp_path / f"source{suffix}"
    file.write_text(source if isinstance(source, str) else json.dumps(source), encoding="utf-8")
    out = tmp_path / "ours"
    convert(file, name, "grape", out, **more)
    return out


def back(tmp_path: Path, name: str, ours: Path, suffix: str = ".json"):
    out = tmp_path / f"back{suffix}"
    convert(ours, "grape", name, out)
    return data(out)


def edited(ours: Path, change) -> Path:
    """A grape file after a change to its data."""
    content = data(ours) if "question" not in rows(ours)[0] else rows(ours)
    change(content)
    text = "\n".join(map(json.dumps, content)) if isinstance(content, list) else files.yaml_text(content)
    ours.write_text(text, encoding="utf-8")
    return ours


def written(value) -> str:
    return json.dumps(value, ensure_ascii=False)
