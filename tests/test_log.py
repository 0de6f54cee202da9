from __future__ import annotations

import json
import logging
import random
import signal
import subprocess
import sys
import textwrap
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import duckdb
import numpy as np
import pytest

from grape.errors import LogError
from grape.log import Log, database, recover, spool, spool_folder
from grape.log.database import Busy, read
from grape.log.spool import Spool
from grape.log.tables import MIGRATIONS
from grape.log.writer import store, writable

ROOT = Path(__file__).parent.parent


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A child that runs a script with this checkout's grape."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def finished(child: subprocess.Popen[str]) -> str:
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    return out


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.duckdb"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def only(rows: list[tuple[object, ...]]) -> object:
    ((value,),) = rows
    return value


# --- what is appended is what is read ---------------------------------------------------------------------------------


def test_a_query_sees_what_was_appended_before_it(path):
    with Log(path) as log:
        log.append(verdicts=[{"run": "a", "step": 3, "score": 0.1 + 0.2, "applicable": True, "input_tokens": 2**62}])
        found = log.query(
            "SELECT run, step, score, applicable, input_tokens, reasoning FROM verdicts WHERE run = ?", ["a"]
        )
        assert found == [("a", 3, 0.30000000000000004, True, 2**62, None)]


def test_one_append_writes_rows_of_several_tables(path):
    with Log(path) as log:
        log.append(rewards=[{"run": "a", "credit": {"style": -0.25, "tests": 1}}], steps=[{"run": "a"}, {"run": "b"}])
    assert read(path, "SELECT credit FROM rewards") == [({"style": -0.25, "tests": 1.0},)]
    assert read(path, "SELECT run FROM steps ORDER BY run") == [("a",), ("b",)]


def test_rows_keep_their_order(path):
    with Log(path) as log:
        for start in range(0, 3000, 30):
            log.append(verdicts=[{"question_id": str(n)} for n in range(start, start + 30)])
        assert log.query("SELECT question_id::INT FROM verdicts") == [(n,) for n in range(3000)]


@pytest.mark.parametrize(
    "text", ["a\0b", "\x1b[31m\x7f\r\n\t\"\\'", "日本語 \u2028 \ufeff\uffff\U0010ffff", "", "x" * 3_000_000]
)
def test_text_comes_back_as_it_was(path, text):
    with Log(path) as log:
        log.append(responses=[{"response": text}])
        assert only(log.query("SELECT response FROM responses")) == text


def test_a_lone_surrogate_is_replaced_and_its_row_kept(path):
    with Log(path) as log:
        log.append(
            responses=[{"response": "a\ud800b\udfffc \ud83d\ude00"}, {"response": "next"}],
            runs=[{"config": '{"k": "\\ud800"}'}],
        )
        assert log.query("SELECT response FROM responses") == [("a\ufffdb\ufffdc 😀",), ("next",)]
        assert only(log.query("SELECT config ->> 'k' FROM runs")) == "\ufffd"


def test_a_number_that_is_not_finite_is_null(path):
    values = [float("nan"), float("inf"), -float("inf"), np.float64("nan"), np.float32(0.5), 5e-324, -0.0, 1e308, 7]
    with Log(path) as log:
        log.append(rewards=[{"reward": value, "credit": {"a": value}} for value in values])
        found = log.query("SELECT reward, credit['a'] FROM rewards")
    assert found == [(None, None)] * 4 + [(v, v) for v in (0.5, 5e-324, -0.0, 1e308, 7.0)]


def test_every_double_survives_to_the_last_bit(path):
    values = np.frombuffer(random.Random(0).randbytes(8 * 4000))
    values = values[np.isfinite(values)]
    with Log(path) as log:
        log.append(rewards=[{"reward": value} for value in values.tolist()])
        assert [row[0] for row in log.query("SELECT reward FROM rewards")] == values.tolist()


def test_times_are_stored_in_utc(path):
    east = datetime(2026, 1, 2, 3, 4, 5, 678901, timezone(timedelta(hours=5, minutes=30)))
    with Log(path) as log:
        log.append(steps=[{"started": time} for time in (east, east.astimezone(UTC), east.replace(tzinfo=None))])
        log.append(steps=[{"started": east.isoformat()}])
        utc = datetime(2026, 1, 1, 21, 34, 5, 678901)
        assert [row[0] for row in log.query("SELECT started FROM steps")] == [utc, utc, east.replace(tzinfo=None), utc]


def test_json_columns_take_data_and_text_that_is_json(path):
    given = [
        {"a": [1, None, {"b": "\0"}]},
        '{\n "a": 1.5e300}',
        [1],
        "[NaN, 1e999]",
        {"big": 10**30, 3: {4}},
        None,
        '"x"',
    ]
    with Log(path) as log:
        log.append(runs=[{"config": value} for value in given])
        found = [row[0] for row in log.query("SELECT config::VARCHAR FROM runs")]
    assert found == [
        '{"a":[1,null,{"b":"\\u0000"}]}', '{"a":1.5e300}', "[1]", "[null,null]",
        '{"big":"1000000000000000000000000000000","3":[4]}', None, '"x"',
    ]  # fmt: skip


def test_what_is_no_text_is_json_in_a_text_column(path):
    with Log(path) as log:
        log.append(verdicts=[{"raw": value} for value in (3, 0.5, True, ["k", 1], {"a": "b"})])
        assert [row[0] for row in log.query("SELECT raw FROM verdicts")] == ["3", "0.5", "true", '["k",1]', '{"a":"b"}']


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"verdict": []}, "the log has no table 'verdict'; did you mean 'verdicts'? known: "),
        ({"meta": [{"secret": b""}]}, "the log has no table 'meta'; "),
        ({"steps": [{"run": "a", "stepp": 1}]}, "steps has no column 'stepp'; did you mean 'step'? known: finished, "),
        ({"steps": {"run": "a"}}, "steps: a list of rows is meant, not one row"),
        ({"verdicts": [{"step": 1}, {"step": 1.5}]}, "verdicts.step: 1.5 is no INTEGER: a float"),
        ({"verdicts": [{"step": 2**31}]}, "verdicts.step: 2147483648 is too large for INTEGER"),
        ({"runs": [{"seed": 2**63}]}, "runs.seed: 9223372036854775808 is too large for BIGINT"),
        ({"verdicts": [{"score": "0.5"}]}, "verdicts.score: '0.5' is no DOUBLE: a str"),
        ({"verdicts": [{"score": True}]}, "verdicts.score: True is no DOUBLE: a bool"),
        ({"verdicts": [{"applicable": 1}]}, "verdicts.applicable: 1 is no BOOLEAN: a int"),
        ({"steps": [{"started": 1.5}]}, "steps.started: 1.5 is no TIMESTAMP: a float"),
        ({"runs": [{"config": "{"}]}, "runs.config: '{' is no JSON: "),
        ({"rewards": [{"credit": {"a": "b"}}]}, "rewards.credit: {'a': 'b'} is no MAP(VARCHAR, DOUBLE): a str"),
        ({"runs": [{"config": {"a": object()}}]}, "runs: Type is not JSON serializable: object"),
    ],
)
@pytest.mark.slow
def test_what_does_not_fit_is_refused_whole_with_one_line(path, record, message):
    with Log(path) as log:
        with pytest.raises(LogError) as caught:
            log.append(questions=[{"run": "a"}], **record)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
        assert log.query("SELECT * FROM questions") == []


def test_an_empty_append_adds_nothing_and_an_empty_row_is_all_null(path):
    with Log(path) as log:
        log.append()
        log.append(verdicts=[], rewards=iter(()))
        log.append(steps=[{}])
        assert log.query("SELECT count(*) FROM verdicts") == [(0,)]
        assert log.query("SELECT run, step FROM steps") == [(None, None)]


def test_a_wrong_query_is_one_line(path):
    with (
        Log(path) as log,
        pytest.raises(LogError, match=r"log\.duckdb: Table with name nope does not exist!") as caught,
    ):
        log.query("SELECT * FROM nope")
    assert "\n" not in str(caught.value)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_secret_is_made_once_per_log(path, tmp_path):
    with Log(path) as log, Log(path) as same, Log(tmp_path / "other.duckdb") as other:
        assert len(log.secret) == 32
        assert log.secret == same.secret != other.secret
    with Log(path) as again:
        assert again.secret == log.secret


def test_a_log_leaves_one_file_behind(path):
    with Log(path) as log:
        log.append(steps=[{"run": "a"}])
    assert names(path.parent) == ["log.duckdb"]


def test_a_log_may_stand_under_any_name(tmp_path, monkeypatch):
    folder = tmp_path / 'it\'s [1] * "x"'
    folder.mkdir()
    monkeypatch.chdir(folder)
    with Log("we[i]rd 'log'.db") as log:
        monkeypatch.chdir(tmp_path)
        log.append(steps=[{"run": "a"}])
    assert read(folder / "we[i]rd 'log'.db", "SELECT run FROM steps") == [("a",)]


def test_a_new_log_makes_its_folder(tmp_path):
    with Log(tmp_path / "runs" / "first" / "log.duckdb") as log:
        assert log.query("SELECT count(*) FROM runs") == [(0,)]


def test_what_is_no_log_is_refused_in_one_line(tmp_path):
    folder, text, other, nowhere = (
        tmp_path / "folder",
        tmp_path / "text",
        tmp_path / "other.duckdb",
        Path("/proc/log.db"),
    )
    folder.mkdir()
    text.write_text("no database " * 1000)
    with duckdb.connect(str(other)) as connection:
        connection.execute("CREATE TABLE sales (a INT)")
    for path, message in {
        folder: f"{folder}: a folder, not a log",
        text: f"{text}: not a DuckDB file",
        other: f"{other}: not a critique log: a database with tables of its own (sales, ...)",
        nowhere: f"{nowhere}: no such folder",
        tmp_path / "a?b": f"{tmp_path / 'a?b'}: DuckDB cannot write to a path with a question mark",
    }.items():
        with pytest.raises(LogError) as caught:
            Log(path)
        assert str(caught.value) == message
    with pytest.raises(LogError) as caught:
        read(tmp_path / "missing.duckdb", "SELECT 1")
    assert str(caught.value) == f"{tmp_path / 'missing.duckdb'}: no such log"
    assert names(tmp_path) == ["folder", "other.duckdb", "text"]


def test_a_newer_schema_is_refused(path):
    Log(path).close()
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE meta SET schema_version = 99")
    message = f"{path}: its schema is version 99, of a newer grape; this one knows {len(MIGRATIONS)}: upgrade grape-rl"
    for attempt in (lambda: Log(path), lambda: read(path, "SELECT 1")):
        with pytest.raises(LogError) as caught:
            attempt()
        assert str(caught.value) == message


def test_a_log_of_an_older_schema_is_brought_up_to_date_with_its_rows(path, monkeypatch):
    with Log(path) as log:
        log.append(runs=[{"run": "old"}])
    later = (*MIGRATIONS, "ALTER TABLE runs ADD COLUMN note VARCHAR; UPDATE runs SET note = 'migrated'")
    monkeypatch.setattr(database, "MIGRATIONS", later)
    with Log(path) as log:
        log.append(runs=[{"run": "new", "note": "written"}])
        assert log.query("SELECT run, note FROM runs") == [("old", "migrated"), ("new", "written")]
        assert log.query("SELECT schema_version FROM meta") == [(len(later),)]
        assert log.query("SELECT count(*) FROM item_health") == [(0,)]


def test_a_log_of_the_first_schema_keeps_its_rows_and_gets_every_column_with_its_comment(path, tmp_path, monkeypatch):
    monkeypatch.setattr(database, "MIGRATIONS", MIGRATIONS[:1])
    monkeypatch.setattr(database, "VIEWS", "")
    with Log(path) as log:
        log.append(
            responses=[{"run": "old", "response_id": "a", "route": "given"}],
            rewards=[{"run": "old", "response_id": "a", "reward": 0.5, "credit": {"x": 0.25}}],
            judge_calls=[{"run": "old", "call": "k"}],
        )
        assert log.query("SELECT schema_version FROM meta") == [(1,)]
        with pytest.raises(LogError, match="responses has no column 'control'"):
            log.append(responses=[{"control": "own"}])
    monkeypatch.undo()
    with Log(path) as log:
        log.append(
            responses=[{"run": "new", "control": "own", "logprob_sampled": -3.5, "logprob_trained": -4.25}],
            rewards=[{"run": "new", "penalty": -0.5, "in_baseline": False, "trained": True}],
            judge_calls=[{"run": "new", "tokens": [[3, [["1", -0.5]]]], "sample": 2}],
            verdicts=[{"run": "new", "stated": 0.75}],
        )
        columns = "run, response_id, route, control, logprob_sampled, logprob_trained"
        assert log.query(f"SELECT {columns} FROM responses ORDER BY run DESC") == [
            ("old", "a", "given", None, None, None),
            ("new", None, None, "own", -3.5, -4.25),
        ]
        assert log.query("SELECT reward, credit, penalty, in_baseline, trained FROM rewards ORDER BY run DESC") == [
            (0.5, {"x": 0.25}, None, None, None),
            (None, None, -0.5, False, True),
        ]
        assert log.query("SELECT call, tokens, sample FROM judge_calls ORDER BY run DESC") == [
            ("k", None, None),
            (None, '[[3,[["1",-0.5]]]]', 2),
        ]
        assert log.query("SELECT stated FROM verdicts") == [(0.75,)]
        dictionary = 'SELECT name, "column", type, comment FROM dictionary ORDER BY ALL'
        migrated = log.query(dictionary)
        assert log.query("SELECT schema_version FROM meta") == [(len(MIGRATIONS),)]
    with Log(tmp_path / "fresh.duckdb") as log:
        assert log.query(dictionary) == migrated


def test_a_migration_that_fails_changes_nothing(path, monkeypatch):
    Log(path).close()
    monkeypatch.setattr(
        database, "MIGRATIONS", (*MIGRATIONS, "DROP VIEW item_credit; ALTER TABLE nope ADD COLUMN a INT")
    )
    with pytest.raises(LogError, match="nope"):
        Log(path)
    monkeypatch.undo()
    with Log(path) as log:
        assert log.query("SELECT count(*) FROM item_credit") == [(0,)]


# --- the spool: kills, torn lines, damage -----------------------------------------------------------------------------


def left_behind(path: Path, *records: dict[str, list[dict[str, object]]]) -> list[Path]:
    """What a writer leaves that is killed between `append` and the flush."""
    child = python(
        """
        import os, signal, sys, json
        from grape.log import writer as log
        log.FLUSH_EVERY = 1000
        writer = log.Log(sys.argv[1])
        for record in json.loads(sys.stdin.readline()):
            writer.append(**record)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
    )
    child.communicate(json.dumps(records) + "\n", timeout=60)
    assert child.returncode == -signal.SIGKILL
    return sorted(spool_folder(path).glob("*.jsonl"))


def test_what_a_killed_writer_had_appended_is_stored_at_the_next_opening(path):
    assert len(left_behind(path, {"steps": [{"run": "a"}], "runs": [{"run": "a"}]}, {"steps": [{"run": "b"}]})) == 1
    assert read(path, "SELECT count(*) FROM steps") == [(0,)]
    with Log(path) as log:
        assert log.query("SELECT run FROM steps") == [("a",), ("b",)]
        assert log.query("SELECT run FROM runs") == [("a",)]
    assert names(path.parent) == ["log.duckdb"]
    Log(path).close()
    assert read(path, "SELECT count(*) FROM steps") == [(2,)]


@pytest.mark.parametrize("cut", [1, 2, 13, 56])
@pytest.mark.slow
def test_a_record_that_the_kill_cut_short_is_left_out_whole(path, cut):
    (segment,) = left_behind(path, {"steps": [{"run": "a"}]}, {"steps": [{"run": "b"}, {"run": "c"}], "runs": [{}]})
    segment.write_bytes(segment.read_bytes()[:-cut])
    with Log(path) as log:
        assert log.query("SELECT run FROM steps") == [("a",)]
        assert log.query("SELECT count(*) FROM runs") == [(0,)]


def test_a_kill_between_storing_and_forgetting_stores_nothing_twice(path):
    Log(path).close()
    owner = Spool(spool_folder(path))
    owner.write([b'{"steps":{"run":"a"}}\n'], {"steps"})
    (segment,) = owner.seal()
    with database.connect(path) as connection:
        store(connection, writable(connection), segment)
    owner.close()
    assert segment.path.exists()
    with Log(path) as log:
        assert log.query("SELECT run FROM steps") == [("a",)]
    assert not segment.path.exists()


def test_a_segment_that_is_damaged_is_set_aside_and_the_rest_stored(path, caplog):
    (segment,) = left_behind(path, {"steps": [{"run": "a"}]})
    segment.write_bytes(b'{"steps":{"run":\xff\x00}}\n\n')
    with caplog.at_level(logging.WARNING), Log(path) as log:
        log.append(steps=[{"run": "b"}])
        assert log.query("SELECT run FROM steps") == [("b",)]
    kept = segment.with_suffix(".unreadable")
    assert kept.read_bytes() == b'{"steps":{"run":\xff\x00}}\n\n'
    assert f"{kept}: cannot be stored and is kept: " in caplog.text


WRITER = """
    import sys
    from grape.log import Log, writer
    writer.FLUSH_EVERY = 0.2  # so that kills fall into flushes, too
    path, start = sys.argv[1], int(sys.argv[2])
    with Log(path) as log:
        for number in range(start, start + 10**6):
            row = {"run": "kill", "question_id": str(number)}
            log.append(verdicts=[{**row, "item": str(i), "reasoning": "x" * 200} for i in range(3)], rewards=[row])
            print(number, flush=True)
"""


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_double_nothing(path):
    rng, said, start = random.Random(1), set(), 0
    for _ in range(4):
        child = python(WRITER, path, start)
        threading.Event().wait(rng.uniform(0.3, 1.2))
        child.kill()
        lines = child.communicate(timeout=60)[0].splitlines(keepends=True)
        said |= {int(line) for line in lines if line.endswith("\n")}
        start += 10**6
    with Log(path) as log:
        stored = dict(log.query("SELECT question_id::INT, count(*) FROM verdicts GROUP BY ALL"))
        rewarded = dict(log.query("SELECT question_id::INT, count(*) FROM rewards GROUP BY ALL"))
    assert len(said) > 100
    assert said <= stored.keys()
    assert len(stored.keys() - said) <= 4  # appended, and killed before it could say so
    assert set(stored.values()) == {3}
    assert rewarded == dict.fromkeys(stored, 1)


def test_a_spool_that_cannot_be_written_refuses_the_record_and_no_other(tmp_path):
    child = python(
        """
        import resource, signal, sys
        from pathlib import Path
        from grape.log.spool import Spool
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        spool = Spool(Path(sys.argv[1]))
        line = b'{"steps":{"run":"%d"}}\\n'
        spool.write([line % 1], {"steps"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        try:
            spool.write([line % 2] * 100, {"steps"})
        except OSError as error:
            print(error.strerror)
        spool.write([line % 3], {"steps"})
        """,
        tmp_path / "log.duckdb.spool",
    )
    assert finished(child) == "File too large\n"
    with Log(tmp_path / "log.duckdb") as log:
        assert log.query("SELECT run FROM steps") == [("1",), ("3",)]


def test_what_a_living_writer_has_queued_is_left_to_it(path):
    with Log(path) as living:
        living.append(steps=[{"run": "a"}])
        recover(path)
        with Log(path) as other:
            other.append(steps=[{"run": "b"}])
        assert living.query("SELECT run FROM steps ORDER BY run") == [("a",), ("b",)]


def test_large_records_go_through_several_segments(path, monkeypatch):
    monkeypatch.setattr(spool, "SEGMENT_BYTES", 20_000)
    with Log(path) as log:
        for number in range(50):
            log.append(responses=[{"response_id": str(number), "response": str(number) * 2000}])
        assert log.query("SELECT response_id::INT, length(response) FROM responses") == [
            (number, 2000 * len(str(number))) for number in range(50)
        ]


# --- several at once --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_that_open_a_fresh_log_at_once_all_work(path):
    script = """
        import sys
        from grape.log import Log
        print("ready", flush=True)
        sys.stdin.readline()
        with Log(sys.argv[1]) as log:
            log.append(runs=[{"run": sys.argv[2]}])
            print(log.secret.hex())
    """
    children = [python(script, path, number) for number in range(4)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    secrets = {finished(child) for child in children}
    assert len(secrets) == 1
    assert read(path, "SELECT run FROM runs ORDER BY run") == [(str(number),) for number in range(4)]


@pytest.mark.slow
def test_two_writers_and_a_polling_reader_get_along(path):
    Log(path).close()
    writer = """
        import sys, time
        from grape.log import Log
        with Log(sys.argv[1]) as log:
            for number in range(120):
                row = {"run": sys.argv[2], "question_id": str(number)}
                log.append(verdicts=[{**row, "item": str(i)} for i in range(64)])
                time.sleep(0.01)
    """
    reader = """
        import sys, time
        from grape.log.database import read
        seen = []
        while not seen or seen[-1] < 2 * 120 * 64:
            seen.append(read(sys.argv[1], "SELECT count(*) FROM verdicts")[0][0])
            time.sleep(0.1)
        print(seen == sorted(seen))
    """
    children = [python(writer, path, "one"), python(writer, path, "two"), python(reader, path)]
    assert [finished(child) for child in children] == ["", "", "True\n"]
    assert read(path, "SELECT run, count(*), count(DISTINCT question_id) FROM verdicts GROUP BY run ORDER BY run") == [
        ("one", 7680, 120),
        ("two", 7680, 120),
    ]


HOLDER = """
    import sys, duckdb
    connection = duckdb.connect(sys.argv[1], read_only=True)
    print("holding", flush=True)
    sys.stdin.readline()
    print(connection.execute("SELECT count(*) FROM verdicts").fetchone()[0])
"""


def holding(path: Path) -> subprocess.Popen[str]:
    """A process that reads the log until it is sent a line, and then says how many verdicts it has seen all along."""
    child = python(HOLDER, path)
    assert child.stdout is not None
    assert child.stdout.readline() == "holding\n"
    return child


def test_a_long_reader_delays_the_flush_and_never_append(path):
    with Log(path) as log:
        reader = holding(path)
        for number in range(300):
            log.append(verdicts=[{"question_id": str(number)}] * 10)
        with pytest.raises(Busy, match=r"log\.duckdb: in use by process \d+, and was not free within 0.2 s"):
            log.flush(timeout=0.2)
        assert reader.communicate("go\n", timeout=60)[0] == "0\n"
        assert log.query("SELECT count(*), count(DISTINCT question_id) FROM verdicts") == [(3000, 300)]


def test_what_a_closing_log_cannot_store_waits_for_the_next_opening(path, monkeypatch, caplog):
    monkeypatch.setattr("grape.log.writer.CLOSING", 0.1)
    with Log(path) as log:
        reader = holding(path)
        log.append(verdicts=[{"run": "a"}])
    assert f"what waits in {spool_folder(path)} is stored when it is next opened" in caplog.text
    assert reader.communicate("go\n", timeout=60)[0] == "0\n"
    with Log(path) as log:
        assert log.query("SELECT run FROM verdicts") == [("a",)]


def test_a_flush_comes_of_itself(path):
    with Log(path) as log:
        log.append(steps=[{"run": "a"}])
        while read(path, "SELECT run FROM steps") != [("a",)]:
            threading.Event().wait(0.05)


@pytest.mark.slow
def test_threads_share_a_log(path):
    with Log(path) as log:

        def work(name: str) -> None:
            for number in range(100):
                log.append(verdicts=[{"run": name, "question_id": str(number)}], rewards=[{"run": name}])
                if number % 40 == 0:
                    assert only(log.query("SELECT count(*) FROM rewards WHERE run = ?", [name])) == number + 1

        threads = [threading.Thread(target=work, args=(str(name),)) for name in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert log.query("SELECT run, count(*) FROM verdicts GROUP BY run ORDER BY run") == [
            (str(n), 100) for n in range(8)
        ]


def test_a_closed_log_refuses_and_closing_twice_is_nothing(path):
    log = Log(path)
    log.close()
    log.close()
    for use in (lambda: log.append(steps=[{}]), log.flush, lambda: log.query("SELECT 1")):
        with pytest.raises(LogError, match=r"log\.duckdb: the log is closed"):
            use()


def test_a_log_that_nobody_closes_is_stored_at_exit(path):
    child = python('import sys; from grape.log import Log; Log(sys.argv[1]).append(steps=[{"run": "a"}])', path)
    finished(child)
    assert read(path, "SELECT run FROM steps") == [("a",)]
    assert names(path.parent) == ["log.duckdb"]


def test_a_forked_child_cannot_use_its_parents_log_nor_keep_its_spool_alive(path):
    script = """
        import os, signal, sys, time
        from grape.errors import LogError
        from grape.log import writer as log
        log.FLUSH_EVERY = 1000
        writer = log.Log(sys.argv[1])
        writer.append(steps=[{"run": "a"}])
        child = os.fork()
        if child == 0:
            try:
                writer.append(steps=[{"run": "b"}])
            except LogError as error:
                print(error, flush=True)
            writer.close()
            os.kill(os.getppid(), signal.SIGKILL)
            sys.stdin.readline()
            os._exit(0)
        os.waitpid(child, 0)
    """
    parent = python(script, path)
    assert parent.wait(timeout=60) == -signal.SIGKILL
    with Log(path) as log:  # the grandchild lives
        assert log.query("SELECT run FROM steps") == [("a",)]
    out, _ = parent.communicate("go\n", timeout=60)
    assert out == f"{path}: opened by another process; a forked one opens its own\n"


def test_a_fault_in_the_background_is_reported_and_nothing_is_lost(path, caplog, monkeypatch):
    monkeypatch.setattr("grape.log.writer.FLUSH_EVERY", 0.05)
    monkeypatch.setattr("grape.log.writer.RETRY_EVERY", 0.05)
    with Log(path) as log:
        with duckdb.connect(str(path)) as connection:
            connection.execute("ALTER TABLE spools RENAME TO hidden")
        log.append(steps=[{"run": "a"}])
        while "what is appended waits in" not in caplog.text:
            threading.Event().wait(0.01)
        with database.connect(path) as connection:
            connection.execute("ALTER TABLE hidden RENAME TO spools")
        assert log.query("SELECT run FROM steps") == [("a",)]
