"""Files of any of the formats: plain data in, plain data out, and the YAML that our own strict reader takes back."""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from grape.errors import ConfigError, one_line
from grape.resources import read_yaml

Form = Literal["lines", "array", "object"]
MAX_DEPTH = 60  # what is kept goes some levels deeper, and the reader of our YAML has a limit
YAML_SUFFIXES = (".yaml", ".yml")


def read(path: Path) -> tuple[Any, Form]:
    """The data of a file of JSON, JSON lines, YAML, TOML or Parquet (each but the last also as ``.gz``)."""
    data, shape = _read(path)
    level, depth = [data], 0
    while level:
        if depth > MAX_DEPTH:
            raise ConfigError(f"{path}: nested more than {MAX_DEPTH} levels deep")
        depth += 1
        level = [
            child
            for node in level
            if isinstance(node, list | dict)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    return data, shape


def _read(path: Path) -> tuple[Any, Form]:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".parquet":
        return _parquet(path), "lines"
    text = _text(path)
    if suffix == ".toml":
        try:
            return tomllib.loads(text), "object"
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not TOML: {one_line(error)}") from error
    if suffix == ".jsonl":
        return _lines(path, text), "lines"
    data: Any
    try:
        data = _json(text) if suffix == ".json" or text.lstrip().startswith(("{", "[")) else read_yaml(path, text)
    except (ValueError, RecursionError) as error:
        if _is_lines(text):
            return _lines(path, text), "lines"
        if suffix not in YAML_SUFFIXES:
            raise ConfigError(f"{path}: not JSON: {one_line(error)}") from error
        data = read_yaml(path, text)
    if isinstance(data, dict) and suffix != ".json" and text.lstrip().startswith("{") and "\n" not in text.strip():
        return data, "lines"
    return data, "array" if isinstance(data, list) else "object"


def form(suffix: str, count: int) -> Form:
    """How ``count`` rows stand in a file, unless they are known to have stood otherwise."""
    if suffix != ".json":
        return "lines"
    return "object" if count == 1 else "array"


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _json(text: str) -> Any:
    """Strict JSON: a key stands once, and every number is finite."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, value in items:
            if key in data:
                raise ValueError(f"duplicate key {key!r}")
            data[key] = value
        return data

    def finite(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"{digits} is not a finite number")
        return value

    return json.loads(text, object_pairs_hook=pairs, parse_float=finite, parse_constant=finite)


def _is_lines(text: str) -> bool:
    """Whether this is one JSON value to a line, going by the first of several."""
    lines = [line for line in text.split("\n") if line.strip()]
    try:
        return len(lines) > 1 and isinstance(json.loads(lines[0]), dict)
    except (ValueError, RecursionError):
        return False


def _lines(path: Path, text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(_json(line))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}: line {number}: not JSON: {one_line(error)}") from error
    return rows


def _parquet(path: Path) -> list[Any]:
    import duckdb

    try:
        with duckdb.connect() as connection:
            cursor = connection.execute("select * from read_parquet(?)", [str(path)])
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, values, strict=True)) for values in cursor.fetchall()]
    except duckdb.Error as error:
        raise ConfigError(f"{path}: {one_line(error)}") from error


def json_text(data: Any, indent: int | None = None) -> str:
    """JSON as people read it: not escaped where it need not be, and keys in their order."""
    try:
        text = json.dumps(data, ensure_ascii=False, indent=indent, allow_nan=False)
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair can stand in JSON only as an escape
        text = json.dumps(data, indent=indent, allow_nan=False)
    return text


PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9 ,.?!()/'%+*^&;$_-]*")
WORDS = {"yes", "no", "on", "off", "y", "n", "true", "false", "null"}  # not text, to one YAML reader or another
UNSAFE = re.compile(r"[^\S\n ]| \n|\A[\n ]|[^\n\x20-\x7e\xa0-\ud7ff]")


class _Representer(SafeRepresenter):
    """Text that any reader of YAML takes for text: plain only where no reader could take it for anything else."""

    def text(self, value: str) -> ScalarNode:
        style: str | None = '"'
        if PLAIN.fullmatch(value) and not value.endswith(" ") and value.casefold() not in WORDS:
            style = None
        elif "\n" in value and not UNSAFE.search(value):
            style = "|"
        node: ScalarNode = self.represent_scalar("tag:yaml.org,2002:str", value, style=style)
        return node

    def ignore_aliases(self, data: Any) -> Any:
        """Write a value wherever it stands, and never a reference to where it stood before."""
        return True

    def real(self, value: float) -> ScalarNode:
        digits = repr(value).replace("nan", ".nan").replace("inf", ".inf")
        if "." not in digits:
            digits = digits.replace("e", ".0e")
        node: ScalarNode = self.represent_scalar("tag:yaml.org,2002:float", digits)
        return node


_Representer.add_representer(str, _Representer.text)
_Representer.add_representer(float, _Representer.real)


def yaml_text(data: Any) -> str:
    """YAML in block style, keys in their order, which `read_yaml` reads back as the same data."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = True
    yaml.width = 1_000_000  # a folded line could end in a space
    yaml.indent(mapping=2, sequence=4, offset=2)
    stream = io.StringIO()
    yaml.dump(data, stream)
    return stream.getvalue()


def write(path: Path, text: str) -> None:
    """The text as a file, or one line saying why it cannot be written."""
    try:
        path.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
