"""Worker processes that can be killed: for work on a model's text that may hang, eat memory or crash.

A worker is asked over pipes in frames of a length and JSON; nothing is unpickled, no secret of the environment is
inherited. Each request has its own limit of processor time, kept by the kernel, so that a busy machine fails nobody.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grape.checkers.serving import LENGTH, MEMORY, OUT_OF_MEMORY
from grape.errors import GrapeError, one_line

START = 120.0  # seconds until a worker must have started
PATIENCE = 30.0  # further seconds, on a busy machine, before a worker that has used none of its time is given up
RECYCLE = 2_000  # requests that one worker answers
FRAME = 1 << 20  # bytes of one message


class WorkerError(GrapeError):
    """No worker could be started, or the machine gave it no time: ours, so an outcome and not a score."""


class OverLimit(Exception):
    """The request used up its time or memory, or crashed the worker: the fault of what was asked."""


def _environment() -> dict[str, str]:
    """What a worker needs to import the package, and nothing else of ours."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [str(Path(path).resolve()) for path in sys.path if path]
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    paths = paths if root in paths else [*paths, root]
    return {
        "PATH": os.defpath,
        "LC_ALL": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONHASHSEED": "0",
        **kept,
    }


class _Died(Exception):
    """The worker ended, with this exit code and these last words."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"exit code {code}: {one_line(said[-300:])}")
        self.code = code


class _Worker:
    """One process. Belongs to one thread at a time."""

    def __init__(self, module: str) -> None:
        command = [sys.executable, "-P", "-B", "-m", module, str(os.getpid())]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env=_environment(),
            start_new_session=True,
        )
        self.asked = 0

    def exchange(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request and read its reply. Raises _Died, and TimeoutError with the worker still running."""
        assert self.process.stdin is not None
        data = json.dumps(request).encode()
        try:
            self.process.stdin.write(LENGTH.pack(len(data)) + data)
        except BrokenPipeError:
            raise self._died() from None
        return self.read(seconds)

    def read(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        (length,) = LENGTH.unpack(self._bytes(LENGTH.size, deadline))
        if length > FRAME:
            self.kill()
            raise self._died()
        reply: dict[str, Any] = json.loads(self._bytes(length, deadline))
        self.asked += 1
        return reply

    def _bytes(self, count: int, deadline: float) -> bytes:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        data = b""
        while len(data) < count:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError
            part = os.read(descriptor, count - len(data))
            if not part:
                raise self._died()
            data += part
        return data

    def _died(self) -> _Died:
        self._end()
        assert self.process.stderr is not None and self.process.returncode is not None
        said = self.process.stderr.read().decode(errors="replace")
        self.kill()
        return _Died(self.process.returncode, said)

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def kill(self) -> None:
        """End the process and take it off the process table."""
        self._end()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


class Pool:
    """At most ``size`` workers that run ``module``: started when first asked, replaced when killed, ended at exit.

    Safe to ask from many threads. Workers are started by one thread that lives as long as the pool, because the
    kernel ends a worker with the thread that started it (so that none is left when this process is killed).
    """

    def __init__(self, module: str, size: int | None = None) -> None:
        self.module = module
        self.size = size or max(2, min(8, os.cpu_count() or 2))
        self._reset()
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """A pool without workers: those of the process that this one was forked from are not ours to ask."""
        self._slots = threading.BoundedSemaphore(self.size)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._starter: ThreadPoolExecutor | None = None
        self._closed = False

    def ask(self, request: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """The worker's reply within ``limit`` seconds of processor time.

        Raises OverLimit where the request itself used up its time or memory, or crashed two workers; WorkerError where
        no worker could be started or the machine gave it no time.
        """
        message = {"limit": limit, "request": request}
        with self._slots:
            for _ in range(2):
                worker = self._take()
                try:
                    reply = worker.exchange(message, 4 * limit + PATIENCE)
                except _Died as death:
                    self._drop(worker)
                    if death.code in {-signal.SIGPROF, -signal.SIGXCPU}:
                        raise OverLimit(f"more than {limit:g} s of processor time") from None
                    if death.code == OUT_OF_MEMORY:
                        raise OverLimit(f"more than {MEMORY >> 20} MiB of memory") from None
                    last = death
                except TimeoutError:
                    self._drop(worker)
                    raise WorkerError(
                        f"a worker got less than {limit:g} s of processor time; is the machine full?"
                    ) from None
                except BaseException:
                    self._drop(worker)
                    raise
                else:
                    self._give_back(worker)
                    return reply
        raise OverLimit(f"two workers crashed on it ({last})")

    def _take(self) -> _Worker:
        """A worker that is alive: an idle one, or else a new one."""
        with self._lock:
            if self._closed:
                raise WorkerError("the workers have been ended")
            while self._idle:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    self._busy.add(worker)
                    return worker
                worker.kill()
            if self._starter is None:
                self._starter = ThreadPoolExecutor(1, thread_name_prefix="grape-workers")
                atexit.register(self.close)
            starter = self._starter
        try:
            worker = starter.submit(self._start).result()
            worker.read(START)
        except (OSError, RuntimeError, _Died, TimeoutError) as error:
            raise WorkerError(f"a worker could not be started: {type(error).__name__}: {one_line(error)}") from error
        return worker

    def _start(self) -> _Worker:
        worker = _Worker(self.module)
        with self._lock:
            self._busy.add(worker)
        return worker

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
            keep = worker.asked < RECYCLE and not self._closed
            if keep:
                self._idle.append(worker)
        if not keep:
            worker.kill()

    def _drop(self, worker: _Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
        worker.kill()

    def close(self) -> None:
        """End all workers; who asks afterwards gets a WorkerError. Called at exit."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for worker in idle:
            worker.kill()
        for worker in busy:
            worker.process.kill()  # who is waiting for it takes it off the process table
        if self._starter is not None:
            self._starter.shutdown()
