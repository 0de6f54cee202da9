"""The first process inside the sandbox: forks one process per program, and kills, reaps and wipes after each.

Runs inside the sandbox, as its process 1. It never reads a program or its tests: those go straight to the fork, so
that no program can find another's text in the memory that it inherits. Standard library only.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import itertools
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from grape.sandbox import program, tester

MODES = {"calls": program.serve_calls, "main": program.run_main, "tests": tester.serve_tests}
PRELOADED = (  # what many programs import; more would make each fork slower
    "abc", "ast", "bisect", "collections", "contextlib", "copy", "dataclasses", "functools", "heapq", "itertools",
    "json", "math", "operator", "random", "re", "string", "time", "traceback", "typing",
)  # fmt: skip
TICK = 50  # milliseconds between two looks at the memory in use
FILES = 10_000  # that a program may make in /tmp
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
PAGE = resource.getpagesize()
VISIBLE = {"bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin", "tmp", "usr"}


def serve(control: socket.socket, allowed: list[str]) -> NoReturn:
    """Answer the broker's orders until it goes away."""
    for name in PRELOADED:
        importlib.import_module(name)
    for number in (signal.SIGINT, signal.SIGPIPE):  # a handler would let a program's signals reach process 1
        signal.signal(number, signal.SIG_DFL)
    Path("/proc/self/oom_score_adj").write_text("500")
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # which closes /proc/1 to the programs
    before = names("/tmp")
    found = [*faults(allowed), *(["its memory is open"] if libc.prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) else [])]
    control.send(json.dumps({"python": sys.version.split()[0], "faults": found}).encode())
    gc.collect()
    gc.freeze()
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 4096, 8)
        if not data:
            os._exit(0)
        if not data.startswith(b"{"):
            continue  # a word about a program that has ended meanwhile
        order = json.loads(data)
        ready, done = os.pipe()
        child = os.fork()
        if not child:
            control.close()
            os.setsid()
            start(order, descriptors, done)
        for descriptor in (*descriptors, done):
            os.close(descriptor)
        if not os.read(ready, 1):
            os._exit(1)  # it failed before the program began: a fault of the sandbox
        os.close(ready)
        ended = watch(control, child, order["memory"])
        clean = sweep(before)
        control.send(json.dumps({**ended, "clean": clean}).encode())
        if not clean:
            os._exit(1)  # with it goes all that a program could leave; a new one is started


def faults(allowed: list[str]) -> Iterator[str]:
    """What is not as confined as it must be."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if os.getpid() != 1:
        yield "its processes are not in a namespace of their own"
    if int(status["CapEff"], 16) or status["NoNewPrivs"] != "1" or status["Seccomp"] != "2":
        yield "its privileges are not dropped"
    if os.getuid() == 0:
        yield "it runs as root"
    if {line.split(":")[0].strip() for line in Path("/proc/net/dev").read_text().splitlines()[2:]} - {"lo"}:
        yield "it has a network"
    if extra := names("/") - VISIBLE - {path.split("/")[1] for path in allowed}:
        yield f"it sees /{min(extra)}"
    for path in ("/", "/usr", "/dev", *allowed):
        if not os.statvfs(path).f_flag & os.ST_RDONLY:
            yield f"it can write to {path}"


def start(order: dict[str, Any], descriptors: list[int], done: int | None = None) -> NoReturn:
    """Become the program of an order, with its limits, its streams and nothing else that is open.

    ``descriptors`` are its channel and, for a script, its standard streams; ``done`` is told when all is in place.
    """
    os.chdir(order["folder"])
    if done is not None:
        done = os.dup2(done, 100)  # out of the way of those to come
    channel, *streams = (*descriptors, *[os.open(os.devnull, os.O_RDWR)] * 3)  # all above 2, which is always open
    for target, descriptor in enumerate((*streams[:3], channel)):
        os.dup2(descriptor, target)
    sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False), "utf-8", "surrogateescape")  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), "utf-8", "surrogateescape")  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(open(2, "wb", closefd=False), "utf-8", "backslashreplace")  # noqa: SIM115
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # so that `proportional` may look at it
    for name, value in order["limits"].items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (least, least))
    sys.setrecursionlimit(sys.getrecursionlimit() + 20)  # for the calls that lead here
    if done is not None:
        os.write(done, b"1")
    os.closerange(4, 65536)
    MODES[order["mode"]](socket.socket(fileno=3))
    os._exit(0)


def watch(control: socket.socket, child: int, memory: int) -> dict[str, Any]:
    """Wait for the program's end, the broker's word to stop it, or more memory in use than it may have (bytes)."""
    handle = os.pidfd_open(child)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(handle, select.POLLIN)
    own = anonymous(os.getpid())
    try:
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(TICK)}
            if control.fileno() in ready:
                word = control.recv(4096)
                if word == b"usage":
                    control.send(json.dumps({"usage": usage(child, processes())}).encode())
                else:
                    if not word:
                        os._exit(0)
                    return {"why": "stopped"}
            elif handle in ready:
                return {"why": "exit", "status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}
            elif files() > FILES or excess(memory, own):
                return {"why": "memory"}
    finally:
        os.close(handle)


def processes() -> list[int]:
    """All processes of the sandbox but this one."""
    return [int(name) for name in names("/proc") if name.isdigit() and int(name) != os.getpid()]


def files() -> int:
    """Files in /tmp: each costs memory outside the size that /tmp may have."""
    status = os.statvfs("/tmp")
    return status.f_files - status.f_ffree


def excess(memory: int, own: int) -> bool:
    """Whether the programs hold more than they may. Pages that forks share count once, which is slow to find out."""
    pids = processes()
    if sum(max(0, anonymous(pid) - own) for pid in pids) <= memory:
        return False
    return sum(proportional(pid) for pid in pids) > memory


def anonymous(pid: int) -> int:
    """Bytes that a process holds and shares with no file; 0 for one that is gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(fields[1]) - int(fields[2])) * PAGE


def proportional(pid: int) -> int:
    """The same with each page divided by the number of its holders, unless the process hides it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))
    except (OSError, StopIteration):
        return anonymous(pid)


def usage(leader: int, pids: list[int]) -> tuple[float, float]:
    """Seconds for which a program could have run while others had the CPU, and CPU seconds that it has used in all."""
    waited, ticks = 0.0, 0
    try:
        waited = int(Path(f"/proc/{leader}/schedstat").read_text().split()[1]) / 1e9
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(field) for field in fields[11:15])
    except (OSError, IndexError):  # one of them is gone, or this kernel keeps no such account
        pass
    return waited, ticks / os.sysconf("SC_CLK_TCK")


def sweep(before: set[str]) -> bool:
    """Kill and reap every other process and empty /tmp; whether both are seen to be done.

    Folders, which can be of any depth, and very many files are left to the end of the whole sandbox.
    """
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
            os.waitpid(-1, 0)
        except (ProcessLookupError, ChildProcessError):
            break
    with os.scandir("/tmp") as entries:
        for entry in itertools.islice(entries, 1000):
            if entry.name not in before and not entry.is_dir(follow_symlinks=False):
                Path(entry).unlink()
    return not processes() and names("/tmp") == before


def names(folder: str) -> set[str]:
    """What a folder holds."""
    return {path.name for path in Path(folder).iterdir()}
