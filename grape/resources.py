"""Where rubrics, prompts and judges are found, how their YAML is read, and the hash that names what was used."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from grape.errors import ConfigError, known, one_line

Kind = Literal["rubrics", "prompts", "judges"]
SUFFIX = {"rubrics": ".yaml", "prompts": ".jinja", "judges": ".yaml"}
PACKAGE = Path(__file__).resolve().parent


def packaged(kind: str) -> Path:
    """The folder shipped with the package: inside the wheel, or beside it in a checkout."""
    inside = PACKAGE / "_data" / kind
    if inside.is_dir():
        return inside
    return PACKAGE.parent / ("examples/quickstart" if kind == "quickstart" else kind)


def search_path(kind: Kind) -> list[Path]:
    """Folders in the order in which a name is looked up: $GRAPE_HOME, the working folder, the package."""
    home = os.environ.get("GRAPE_HOME")
    folders = [Path(home) / kind] if home else []
    return [*folders, Path(kind), packaged(kind)]


def names(kind: Kind, folders: Iterable[Path] | None = None) -> dict[str, Path]:
    """Every known name with the file it stands for; the first folder that has a name wins, file by file."""
    found: dict[str, Path] = {}
    for folder in search_path(kind) if folders is None else folders:
        for file in sorted(folder.rglob(f"*{SUFFIX[kind]}")):
            found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
    return found


def find(kind: Kind, name: str | Path) -> Path:
    """The file of a name, or of a path (which ends in the kind's suffix)."""
    if str(name).endswith(SUFFIX[kind]):
        if not is_file(name):
            raise ConfigError(f"{name}: no such file")
        return Path(name)
    for folder in search_path(kind):
        file = folder / f"{name}{SUFFIX[kind]}"
        if is_file(file):
            return file
    raise ConfigError(f"no {kind.removesuffix('s')} named {str(name)!r}; {known(names(kind), str(name))}")


def is_file(path: str | Path) -> bool:
    """Whether there is such a file; one line where that cannot even be asked."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{one_line(path, 100)}: {getattr(error, 'strerror', None) or error}") from error


def read_text(path: str | Path) -> str:
    """The text of a user's file, or one line saying why it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except ValueError as error:
        raise ConfigError(f"{path!r}: {error}") from error


def digest(text: str) -> str:
    """The content hash that goes into the log: 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# YAML 1.2, section 10.3.2 (core schema): what a plain scalar means. `yes`, dates and `1_000` are text.
CORE_NULL = re.compile(r"(?:null|Null|NULL|~|)")
CORE_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)")
CORE_INT = re.compile(r"[-+]?[0-9]{1,4000}|0o[0-7]+|0x[0-9a-fA-F]+")
CORE_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
CORE_SPECIAL = re.compile(r"(?P<inf>[-+]?\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)")
TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {TAG + tag for tag in ("null", "bool", "int", "float", "str", "timestamp", "merge", "value")}
MAX_NODES = 1_000_000
MAX_DEPTH = 100


def read_yaml(path: str | Path, text: str | None = None) -> Any:
    """Plain data from one YAML 1.2 document (core schema): mappings with text or number keys, lists and scalars.

    Duplicate keys, tags, alias bombs and broken syntax raise a `ConfigError` of one line with the file and the line.
    """
    if text is None:
        text = read_text(path)
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except (YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}: {where}not YAML: {one_line(problem)}") from error
    if node is None:
        raise ConfigError(f"{path}: empty file")
    budget = [MAX_NODES]

    def fail(node: Node, problem: str) -> ConfigError:
        return ConfigError(f"{path}: line {node.start_mark.line + 1}: {problem}")

    def build(node: Node, depth: int) -> Any:
        budget[0] -= 1
        if budget[0] < 0 or depth > MAX_DEPTH:
            raise fail(node, f"aliases expand to more than {MAX_NODES} values or {MAX_DEPTH} levels")
        if isinstance(node, SequenceNode) and str(node.tag) == TAG + "seq":
            return [build(child, depth + 1) for child in node.value]
        if isinstance(node, MappingNode) and str(node.tag) == TAG + "map":
            mapping: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = build(key_node, depth + 1)
                if isinstance(key, list | dict):
                    raise fail(key_node, "a key must be text or a number")
                if key in mapping:
                    raise fail(key_node, f"duplicate key {key!r}")
                mapping[key] = build(value_node, depth + 1)
            return mapping
        if isinstance(node, ScalarNode) and str(node.tag) in PLAIN_TAGS:
            return node.value if node.style else scalar(node.value, str(node.tag))
        raise fail(node, f"tag {node.tag} is not allowed")

    return build(node, 0)


def scalar(text: str, tag: str = "") -> str | int | float | bool | None:
    """What a plain (unquoted) scalar stands for. What was tagged as text in spite of its shape (`!!str 1`) is text."""
    if CORE_NULL.fullmatch(text):
        return None
    if tag == TAG + "str" and CORE_INT.fullmatch(text):
        return text
    if CORE_BOOL.fullmatch(text):
        return text.lower() == "true"
    if CORE_INT.fullmatch(text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if CORE_FLOAT.fullmatch(text):
        return float(text)
    if special := CORE_SPECIAL.fullmatch(text):
        return float(text.replace(".", "", 1)) if special["inf"] else math.nan
    return text
