"""Worker processes: they are killed at their limit, replaced, share no secret and leave no orphan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grape.checkers import workers
from grape.checkers.workers import OverLimit, Pool, WorkerError

PROGRAM = """
import os, time
from grape.checkers.serving import serve

def answer(request):
    todo = request["do"]
    if todo == "spin":
        while True:
            pass
    if todo == "power":
        return {"digits": len(str(9 ** 9 ** 9))}
    if todo == "sleep":
        time.sleep(60)
    if todo == "eat":
        return {"eaten": len(bytearray(1 << 32))}
    if todo == "crash":
        os.abort()
    if todo == "crash once":
        try:
            os.close(os.open(request["mark"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return {"again": True}
        os.abort()
    if todo == "print":
        print("noise" * 1000)
    if todo == "write":
        with open(request["path"], "w") as file:
            file.write("x")
    if todo == "environment":
        return {"environment": dict(os.environ)}
    return {"pid": os.getpid(), "said": request.get("say")}

if __name__ == "__main__":
    serve(answer)
"""


@pytest.fixture
def pool(tmp_path, monkeypatch):
    (tmp_path / "grape_worker_program.py").write_text(PROGRAM)
    monkeypatch.syspath_prepend(tmp_path)
    pool = Pool("grape_worker_program", size=2)
    yield pool
    pool.close()


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds; one that only waits to be taken off the table has ended."""
    for _ in range(500):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_one_worker_answers_one_request_after_another(pool):
    first = pool.ask({"do": "say", "say": "\ud800\0é" * 1000}, 5)
    assert first["said"] == "\ud800\0é" * 1000
    assert pool.ask({"do": "say"}, 5)["pid"] == first["pid"]


@pytest.mark.parametrize("todo", ["spin", "power"])
def test_a_worker_over_its_limit_is_killed_and_replaced(pool, todo):
    first = pool.ask({"do": "say"}, 5)["pid"]
    with pytest.raises(OverLimit, match=r"^more than 0\.3 s of processor time$"):
        pool.ask({"do": todo}, 0.3)
    assert gone(first)
    assert pool.ask({"do": "say"}, 5)["pid"] != first


def test_a_worker_has_little_memory_and_writes_no_file(pool, tmp_path):
    with pytest.raises(OverLimit, match=r"^more than 1024 MiB of memory$"):
        pool.ask({"do": "eat"}, 5)
    with pytest.raises(OverLimit, match=r"^two workers crashed on it"):
        pool.ask({"do": "write", "path": str(tmp_path / "written")}, 5)
    assert (tmp_path / "written").read_text() == ""


def test_a_request_is_at_fault_only_when_two_workers_crash_on_it(pool, tmp_path):
    assert pool.ask({"do": "crash once", "mark": str(tmp_path / "mark")}, 5) == {"again": True}
    with pytest.raises(OverLimit, match=r"^two workers crashed on it"):
        pool.ask({"do": "crash"}, 5)


def test_a_worker_killed_from_outside_costs_no_verdict(pool):
    first = pool.ask({"do": "say"}, 5)["pid"]
    os.kill(first, signal.SIGKILL)
    assert pool.ask({"do": "say", "say": 1}, 5)["said"] == 1


def test_a_worker_without_processor_time_is_our_fault(pool, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.1)
    with pytest.raises(WorkerError, match=r"^a worker got less than 0\.1 s of processor time"):
        pool.ask({"do": "sleep"}, 0.1)
    assert pool.ask({"do": "say", "say": 1}, 5)["said"] == 1


def test_what_a_worker_prints_does_not_disturb_its_replies(pool):
    assert pool.ask({"do": "print", "say": 1}, 5)["said"] == 1


def test_a_worker_inherits_no_secret(pool, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("HOME", "/home/somebody")
    environment = pool.ask({"do": "environment"}, 5)["environment"]
    assert set(environment) - {"LD_LIBRARY_PATH", "LC_CTYPE"} == {"PATH", "LC_ALL", "PYTHONPATH", "PYTHONHASHSEED"}


def test_many_threads_get_their_own_answers_and_may_end_before_the_workers(pool):
    got: dict[int, int] = {}
    pids = set()

    def work(number: int) -> None:
        for each in range(number * 10, number * 10 + 10):
            reply = pool.ask({"do": "say", "say": each}, 5)
            got[each] = reply["said"]
            pids.add(reply["pid"])

    for _ in range(2):  # the second round finds the workers that threads of the first have started
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert got == {each: each for each in range(80)}
    assert len(pids) <= 2


def test_a_closed_pool_has_no_workers_and_starts_none(pool):
    pid = pool.ask({"do": "say"}, 5)["pid"]
    pool.close()
    assert gone(pid)
    with pytest.raises(WorkerError, match="the workers have been ended"):
        pool.ask({"do": "say"}, 5)


HOST = """
import os, sys, threading, time
from grape.checkers.workers import Pool
pool = Pool("grape_worker_program", size=2)
print(pool.ask({"do": "say"}, 5)["pid"], flush=True)
if sys.argv[1] == "busy":
    threading.Thread(target=pool.ask, args=({"do": "spin"}, 600), daemon=True).start()
if sys.argv[1] == "fork":
    if (child := os.fork()) == 0:
        print(pool.ask({"do": "say"}, 5)["pid"], flush=True)
        pool.close()
        os._exit(0)
    os.waitpid(child, 0)
    print(pool.ask({"do": "say"}, 5)["pid"], flush=True)
if sys.argv[1] != "exit":
    time.sleep(0.3)
    print("ready", flush=True)
    time.sleep(60)
"""


def start_host(pool, how):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", HOST, how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("how", ["idle", "busy"])
def test_no_worker_outlives_a_process_that_is_killed(pool, how):
    with start_host(pool, how) as host:
        pid = int(host.stdout.readline())
        assert host.stdout.readline() == "ready\n"
        host.kill()
    assert gone(pid)


def test_no_worker_outlives_a_process_that_ends(pool):
    with start_host(pool, "exit") as host:
        pid = int(host.stdout.readline())
        assert host.wait(30) == 0
    assert gone(pid)


def test_a_forked_process_starts_workers_of_its_own(pool):
    with start_host(pool, "fork") as host:
        first, forked, after = (int(host.stdout.readline()) for _ in range(3))
        host.kill()
    assert forked != first
    assert after == first
    assert gone(forked)
