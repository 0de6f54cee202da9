"""YAML 1.2 read by its core schema, and files found by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from grape import resources
from grape.errors import ConfigError
from grape.resources import find, names, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"), ("no", "no"), ("On", "On"), ("true", True), ("False", False), ("null", None), ("~", None),
        ("", None), ("0o17", 15), ("0x1F", 31), ("010", 10), ("-7", -7), ("1_000", "1_000"), ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"), ("1e3", 1000.0), (".5", 0.5), ("1.", 1.0), ("-.inf", -math.inf), ("'12'", "12"),
        ("!!str 12", "12"), ("=", "="), ("1e", "1e"), ("0b1", "0b1"),
    ],
)  # fmt: skip
def test_plain_scalars_mean_what_the_core_schema_says(text, value):
    got = read_yaml("f.yaml", f"a: {text}")["a"]
    assert got == value
    assert type(got) is type(value)


def test_not_a_number_is_read_and_a_merge_key_is_a_key():
    assert math.isnan(read_yaml("f.yaml", "a: .NaN")["a"])
    assert read_yaml("f.yaml", "<<: {a: 1}") == {"<<": {"a": 1}}


def test_aliases_are_values():
    assert read_yaml("f.yaml", "a: &x [1, 2]\nb: [*x, *x]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3", "f.yaml: line 3: duplicate key 'a'"),
        ("a: !!python/object/apply:os.system [x]", "f.yaml: line 1: tag tag:yaml.org,2002:python/object/apply:os.system"
         " is not allowed"),
        ("- !mine x", "f.yaml: line 1: tag !mine is not allowed"),
        ("a: !!binary aGk=", "f.yaml: line 1: tag tag:yaml.org,2002:binary is not allowed"),
        ("? [1]\n: 2", "f.yaml: line 1: a key must be text or a number"),
        ("a: &x [*x]", "f.yaml: line 1: aliases expand to more than 1000000 values or 100 levels"),
        ("a: [1", "f.yaml: line 1: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("# nothing", "f.yaml: empty file"),
    ],
)  # fmt: skip
def test_what_is_not_plain_data_is_one_line(text, line):
    with pytest.raises(ConfigError) as caught:
        read_yaml("f.yaml", text)
    assert str(caught.value) == line


@pytest.mark.slow
def test_a_bomb_of_aliases_is_refused():
    levels = "\n".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(ConfigError, match="aliases expand"):
        read_yaml("f.yaml", f"a: &a [1]\n{levels}")


def test_the_first_folder_that_has_a_name_wins_file_by_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAPE_HOME", str(tmp_path / "home"))
    shipped = find("rubrics", "math")
    Path("rubrics").mkdir()
    Path("rubrics/math.yaml").write_text("here")
    assert find("rubrics", "math") == Path("rubrics/math.yaml")
    (tmp_path / "home/rubrics").mkdir(parents=True)
    (tmp_path / "home/rubrics/math.yaml").write_text("home")
    assert find("rubrics", "math") == tmp_path / "home/rubrics/math.yaml"
    assert names("rubrics")["coding"].parent == shipped.parent


def test_an_unknown_name_says_what_is_known():
    with pytest.raises(ConfigError) as caught:
        find("rubrics", "mth")
    assert str(caught.value).startswith("no rubric named 'mth'; did you mean 'math'? known: coding, ")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    for path, line in [(tmp_path / "no.yaml", "no such file"), (tmp_path, "Is a directory")]:
        with pytest.raises(ConfigError, match=line):
            resources.read_text(path) if path == tmp_path else find("rubrics", path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        resources.read_text(tmp_path / "latin.yaml")
