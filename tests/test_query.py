from __future__ import annotations

import csv
import io
import json
import os
import pty
import signal
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest

from grape.errors import ConfigError, LogError
from grape.log import Log, spool_folder
from grape.log.query import Result, render, sql

ROOT = Path(__file__).parent.parent
EVIL = "a\x1b[31mred\x1b]0;title\x07 \x9b2J \r\n\u202etxt\x7f"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("query") / "log.duckdb"
    with Log(path) as writer:
        writer.append(
            responses=[{"run": "r", "response_id": "a", "response": EVIL, "metadata": {"model": "m", "n": [1, None]}}],
            rewards=[
                {"run": "r", "response_id": "a", "reward": 0.1 + 0.2, "credit": {"x": 1.0}},
                {"run": "r", "response_id": "b"},
            ],
            steps=[{"run": "r", "step": 1, "started": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)}],
        )
    return path


def written(query: str, log: Path, format: Any) -> str:
    stream = io.StringIO()
    render(sql(query, log), format, stream)
    return stream.getvalue()


def on_a_terminal(query: str | None, log: Path, format: Any, columns: int = 100) -> str:
    """What reaches a real terminal of that width."""
    master, slave = pty.openpty()
    result, before = sql(query, log), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(columns)
    reader = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.PIPE)
    try:
        with open(slave, "w", encoding="utf-8") as stream:  # noqa: PTH123 - a descriptor
            render(result, format, stream)
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
        os.close(master)
    return reader.communicate(timeout=30)[0].decode()


# --- confinement ------------------------------------------------------------------------------------------------------

ATTACKS = [
    "COPY rewards TO '{there}'",
    "COPY (SELECT 1) TO '/dev/stdout'",
    "COPY rewards FROM '/etc/passwd'",
    "EXPORT DATABASE '{there}'",
    "IMPORT DATABASE '{there}'",
    "SELECT * FROM read_csv('{secret}')",
    "SELECT * FROM read_text('{secret}')",
    "SELECT * FROM read_blob('{secret}')",
    "SELECT * FROM read_json('{secret}')",
    "SELECT * FROM read_parquet('{secret}')",
    "SELECT * FROM sniff_csv('{secret}')",
    "SELECT * FROM '{secret}'",
    'SELECT * FROM "{secret}"',
    "SELECT * FROM query_table('{secret}')",
    "SELECT * FROM query('COPY rewards TO ''{there}''')",
    "SELECT * FROM query('SELECT * FROM read_text(''{secret}'')')",
    "SELECT * FROM parquet_metadata('{secret}')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM read_text('http://127.0.0.1:9/')",
    "SELECT * FROM read_text('s3://bucket/key')",
    "SELECT * FROM read_duckdb('{other}')",
    "SELECT * FROM duckdb_secrets()",
    "EXPLAIN ANALYZE COPY rewards TO '{there}'",
    "EXPLAIN ANALYZE DELETE FROM rewards",
    "ATTACH '{other}' AS other",
    "ATTACH ':memory:' AS other",
    "DETACH log",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{there}'",
    "FORCE INSTALL httpfs FROM community",
    "UPDATE EXTENSIONS",
    "SET enable_external_access = true",
    "SET GLOBAL autoload_known_extensions = true",
    "SET allowed_paths = ['{secret}']",
    "SET VARIABLE x = 1",
    "RESET lock_configuration",
    "PRAGMA enable_external_access",
    "PRAGMA threads = 1",
    "PRAGMA profiling_output = '{there}'",
    "CALL enable_logging(storage = 'file', storage_config = {{'path': '{there}'}})",
    "SELECT getenv('HOME')",
    "CREATE TABLE t (a INT)",
    "CREATE TEMP TABLE t AS SELECT 1",
    "CREATE SECRET (TYPE s3)",
    "CREATE MACRO m() AS 1",
    "INSERT INTO rewards (run) VALUES ('x')",
    "UPDATE rewards SET reward = 1",
    "DELETE FROM rewards",
    "DROP VIEW item_health",
    "ALTER TABLE rewards ADD COLUMN a INT",
    "COMMENT ON TABLE rewards IS 'x'",
    "BEGIN",
    "CHECKPOINT",
    "VACUUM",
    "USE temp",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "SELECT 1; DROP TABLE rewards",
    "SELECT 1; SELECT 2",
    "SELECT * FROM variable_of_the_caller",
]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.slow
def test_a_query_cannot_leave_the_log_or_change_anything(attack, log, tmp_path):
    there, secret, other = tmp_path / "there", tmp_path / "secret", tmp_path / "other.duckdb"
    secret.write_text("a,b\nhidden,1\n")
    with duckdb.connect(str(other)) as connection:
        connection.execute("CREATE TABLE hidden (a INT)")
    variable_of_the_caller = pd.DataFrame({"a": [1]})
    before = log.read_bytes()
    with pytest.raises(ConfigError) as caught:
        sql(attack.format(there=there, secret=secret, other=other), log)
    assert str(caught.value).startswith("query: ")
    assert "\n" not in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert not there.exists()
    assert log.read_bytes() == before
    assert len(variable_of_the_caller) == 1


def test_the_settings_that_confine_a_query_are_on(log):
    names = (
        "enable_external_access",
        "autoinstall_known_extensions",
        "autoload_known_extensions",
        "lock_configuration",
    )
    found = sql(f"SELECT name, value FROM duckdb_settings() WHERE name IN {names} ORDER BY name", log).rows
    assert found == [(name, "true" if name == "lock_configuration" else "false") for name in sorted(names)]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "query: one statement is meant, not 0"),
        (" -- nothing\n", "query: one statement is meant, not 0"),
        ("SELECT 1; SELECT 2;", "query: one statement is meant, not 2"),
        ("selec 1", 'query: syntax error at or near "selec"'),
        ("SELECT nope FROM rewards", 'query: Referenced column "nope" not found in FROM clause! '),
        ("SELECT * FROM reward", 'query: Table with name reward does not exist! Did you mean "rewards"?'),
        ("SELECT 'a'::INT", "query: Could not convert string 'a' to INT32"),
        ("DROP TABLE rewards", "query: DROP is not allowed: the log is read-only here, ask with SELECT"),
    ],
)
def test_a_wrong_query_is_one_line(query, message, log):
    with pytest.raises(ConfigError) as caught:
        sql(query, log)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("query", ["FROM rewards", "DESCRIBE rewards", "SUMMARIZE rewards", "EXPLAIN FROM runs",
                                   "SHOW TABLES", "WITH a AS (SELECT 1) FROM a", "PIVOT rewards ON run USING count(*)",
                                   "VALUES (1);", "SELECT 1 -- why; not", "FROM rewards LIMIT 0"])  # fmt: skip
def test_whatever_only_asks_is_answered(query, log):
    result = sql(query, log)
    assert len(result.columns) == len(result.types) > 0
    assert all(len(row) == len(result.columns) for row in result.rows)


def test_a_result_becomes_a_data_frame(log):
    result = sql("SELECT response_id, reward FROM rewards ORDER BY 1", log)
    frame = pd.DataFrame(result.rows, columns=result.columns)
    assert frame["response_id"].tolist() == ["a", "b"]
    assert frame["reward"].iloc[0] == 0.1 + 0.2


def test_times_with_a_zone_come_as_plain_utc(log):
    result = sql(
        "SELECT TIMESTAMPTZ '2026-01-01 01:00:00+01' AS a, [TIMESTAMPTZ '2026-01-01 00:00:00Z'] AS b, 1 AS c -- x", log
    )
    assert (result.columns, result.types) == (("a", "b", "c"), ("TIMESTAMP", "VARCHAR", "INTEGER"))
    assert result.rows == [(datetime(2026, 1, 1), "['2026-01-01 00:00:00+00']", 1)]
    assert sql("SELECT started < now() FROM steps", log).rows == [(True,)] or datetime.now(UTC).year < 2026


# --- the file ---------------------------------------------------------------------------------------------------------


def test_what_is_no_log_is_one_line(tmp_path):
    text = tmp_path / "text"
    text.write_text("no database " * 1000)
    for path, message in {
        tmp_path / "missing": f"{tmp_path / 'missing'}: no such log",
        tmp_path: f"{tmp_path}: a folder, not a log",
        text: f"{text}: not a DuckDB file",
    }.items():
        with pytest.raises(LogError) as caught:
            sql("SELECT 1", path)
        assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == [text]


def test_rows_that_a_killed_run_left_are_seen(tmp_path):
    path = tmp_path / "log.duckdb"
    script = """
        import os, signal, sys
        from grape.log import writer as log
        log.FLUSH_EVERY = 1000
        log.Log(sys.argv[1]).append(steps=[{"run": "killed"}])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], cwd=ROOT, timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert spool_folder(path).exists()
    assert sql("SELECT run FROM steps", path).rows == [("killed",)]
    assert not spool_folder(path).exists()


def test_rows_in_the_write_ahead_log_of_a_killed_flush_are_seen(tmp_path):
    path = tmp_path / "log.duckdb"
    Log(path).close()
    script = """
        import os, signal, sys, duckdb
        connection = duckdb.connect(sys.argv[1])
        connection.execute("INSERT INTO steps (run) VALUES ('killed')")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], timeout=60)
    assert path.with_name("log.duckdb.wal").exists()
    assert sql("SELECT run FROM steps", path).rows == [("killed",)]


@pytest.mark.slow
def test_a_query_waits_for_a_writer_of_its_own_process_too(tmp_path):
    with Log(tmp_path / "log.duckdb") as log:
        for number in range(40):
            log.append(steps=[{"step": number}] * 50)
            assert sql("SELECT count(*) FROM steps", log.path).rows[0][0] <= 50 * (number + 1)
        log.flush()
        assert sql("SELECT count(*) FROM steps", log.path).rows == [(2000,)]


# --- formats ----------------------------------------------------------------------------------------------------------

EVERYTHING = """
SELECT 1 AS int, 1180591620717411303424::HUGEINT AS big, 0.1 + 0.2::DOUBLE AS double,
  'nan'::DOUBLE AS nan, '-inf'::DOUBLE AS inf,
  1.50::DECIMAL(5, 2) AS decimal, true AS bool, NULL AS missing, 'é "q", ,\n' AS text, '' AS empty,
  TIMESTAMP '2026-01-02 03:04:05.5' AS time, DATE '2026-01-02' AS date, 'a\\x00'::BLOB AS blob,
  '{"k": [1, null, 1e999]}'::JSON AS json, {'a': [1, 2], 'b': 'nan'::DOUBLE} AS struct, MAP {'x': 0.5} AS map,
  UUID '00000000-0000-0000-0000-000000000001' AS uuid, INTERVAL 90 MINUTE AS span, [NULL, 'z'] AS list
"""
PLAIN = {
    "int": 1, "big": 2**70, "double": 0.30000000000000004, "nan": None, "inf": None, "decimal": 1.5, "bool": True,
    "missing": None, "text": 'é "q", ,\n', "empty": "", "time": "2026-01-02T03:04:05.500000", "date": "2026-01-02",
    "blob": "6100", "json": {"k": [1, None, None]}, "struct": {"a": [1, 2], "b": None}, "map": {"x": 0.5},
    "uuid": "00000000-0000-0000-0000-000000000001", "span": "1:30:00", "list": [None, "z"],
}  # fmt: skip


def test_json_has_real_types(log):
    assert json.loads(written(EVERYTHING, log, "json"), parse_constant=pytest.fail) == [PLAIN]
    assert json.loads(written("FROM rewards LIMIT 0", log, "json")) == []
    (line,) = written(EVERYTHING, log, "jsonl").splitlines()
    assert json.loads(line) == PLAIN
    assert [json.loads(line)["response_id"] for line in written("FROM rewards", log, "jsonl").splitlines()] == [
        "a",
        "b",
    ]


def test_json_tells_columns_of_one_name_apart(log):
    assert json.loads(written("SELECT 1 AS a, 2 AS a, 3 AS a_1", log, "jsonl")) == {"a": 1, "a_1": 2, "a_1_1": 3}


def test_csv_is_quoted_as_it_should_be(log):
    header, row = csv.reader(io.StringIO(written(EVERYTHING, log, "csv"), newline=""))
    assert header == list(PLAIN)
    assert dict(zip(header, row, strict=True)) == {
        "int": "1", "big": str(2**70), "double": "0.30000000000000004", "nan": "nan", "inf": "-inf", "decimal": "1.50",
        "bool": "true", "missing": "", "text": 'é "q", ,\n', "empty": "", "time": "2026-01-02T03:04:05.500000",
        "date": "2026-01-02", "blob": "6100", "json": '{"k": [1, null, 1e999]}', "struct": '{"a": [1, 2], "b": null}',
        "map": '{"x": 0.5}', "uuid": "00000000-0000-0000-0000-000000000001", "span": "1:30:00", "list": '[null, "z"]',
    }  # fmt: skip
    text = written("SELECT response FROM responses", log, "csv")
    assert list(csv.reader(io.StringIO(text, newline=""))) == [["response"], [EVIL]]


def test_parquet_holds_the_rows_in_their_types(log, tmp_path):
    file = tmp_path / "out.parquet"
    with file.open("wb") as stream:
        render(sql(EVERYTHING, log), "parquet", stream)
    with duckdb.connect() as connection:
        found = connection.execute("SELECT * FROM read_parquet(?)", [str(file)])
        kinds = {name: str(kind) for name, kind, *_ in found.description}
        (row,) = found.fetchall()
    values = dict(zip(kinds, row, strict=True))
    expected = {
        "int": 1, "double": 0.30000000000000004, "inf": float("-inf"), "text": 'é "q", ,\n', "bool": True, "empty": "",
        "time": datetime(2026, 1, 2, 3, 4, 5, 500000), "blob": b"a\0", "map": {"x": 0.5}, "list": [None, "z"],
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    assert (kinds["decimal"], kinds["time"], kinds["bool"]) == ("DECIMAL(5,2)", "TIMESTAMP", "BOOLEAN")
    stream = io.BytesIO()
    render(sql("FROM rewards LIMIT 0", log), "parquet", stream)
    assert stream.getvalue()[:4] == b"PAR1"


def test_a_piped_table_is_aligned_plain_text(log):
    rows = "('日本', 1.0, 10), ('b', 0.123456789, NULL), (repeat('x', 150), 2e9, 3)"
    query = f"SELECT * FROM (VALUES {rows}) AS t(name, share, n)"
    assert written(query, log, "table").splitlines() == [
        "name" + 98 * " " + "     share     n",
        100 * "-" + "  ----------  ----",
        "日本" + 107 * " " + "1    10",
        "b" + 101 * " " + "  0.123457  NULL",
        99 * "x" + "…  2000000000     3",
    ]


def test_without_a_query_tables_and_views_are_listed_with_their_comments(log):
    result = sql(None, log)
    assert result.columns == ("name", "kind", "rows", "comment")
    assert ("rewards", "table", 2) in [row[:3] for row in result.rows]
    assert [row[0] for row in result.rows if row[1] == "view"] == [
        "constant_items", "dictionary", "failure_siblings", "failures", "improve_effect", "item_credit", "item_health",
        "judge_cost", "judge_disagreement", "judge_gap", "moved_most", "null_controls", "response_scores",
        "score_by_length", "stock_phrases", "training_curve",
    ]  # fmt: skip
    assert all(comment for *_, comment in result.rows)
    assert not {"meta", "spools"} & {row[0] for row in result.rows}


# --- a terminal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["table", "csv", "json", "jsonl"])
@pytest.mark.parametrize("columns", [20, 100])
def test_nothing_stored_can_steer_the_terminal(format, columns, log):
    query = f"SELECT response, [response] AS l, {{'k': response}} AS s, 1 AS \"{EVIL}\" FROM responses"
    shown = on_a_terminal(query, log, format, columns).replace("\r\n", "\n")
    assert not set(shown) & set("\x07\x1b\x7f\x9b\u202e\r")
    assert "u001b" in shown.replace("\n", "").replace(" ", "")


def test_a_terminal_gets_a_table_and_rows_below_each_other_where_it_is_too_narrow(log):
    wide = on_a_terminal("SELECT response_id, reward FROM rewards ORDER BY 1", log, "table")
    assert [line.split() for line in wide.splitlines() if line.split()[:1] in (["a"], ["b"])] == [
        ["a", "0.3"],
        ["b", "NULL"],
    ]
    narrow = on_a_terminal("SELECT response_id, reward, run, step FROM rewards ORDER BY 1", log, "table", columns=30)
    assert narrow.splitlines() == [
        "response_id  a", "     reward  0.3", "        run  r", "       step  NULL", "",
        "response_id  b", "     reward  NULL", "        run  r", "       step  NULL", "",
    ]  # fmt: skip


def test_a_terminal_is_told_of_rows_that_it_is_not_shown(log):
    shown = on_a_terminal("FROM range(700)", log, "table").splitlines()
    assert shown[-1] == "... and 200 more rows; --format csv, json, jsonl or parquet gives all"
    assert "499" in shown[-2]


def test_parquet_is_refused_on_a_terminal(log):
    with pytest.raises(ConfigError, match=r"^parquet is bytes, not for a terminal: redirect it"):
        on_a_terminal("FROM rewards", log, "parquet")


def test_a_stream_of_another_encoding_spells_out_what_it_lacks():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    render(Result(columns=("a",), types=("VARCHAR",), rows=[("é日",)]), "csv", stream)
    stream.flush()
    assert stream.buffer.getvalue() == b"a\n\\xe9\\u65e5\n"
