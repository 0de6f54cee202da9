"""The sandbox as the rest of the package sees it: a few confined interpreters, lent to the threads that need them."""

from __future__ import annotations

import atexit
import os
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import TracebackType
from typing import TypeVar

from grape.errors import SandboxError, one_line
from grape.sandbox.broker import Candidate, Find, evaluate
from grape.sandbox.confine import DEFAULT_INTERPRETER, needs
from grape.sandbox.job import Job, Report, Run
from grape.sandbox.remote import ask
from grape.sandbox.worker import Bare, Broken, Confined, Worker

Result = TypeVar("Result")


class Sandbox:
    """Runs untrusted programs. Nothing starts before the first one; safe to use from several threads.

    ``interpreter`` is the Python that runs programs and tests. ``url`` names a sandbox service, which is asked instead
    (`grape.sandbox.remote`). ``unsafe`` runs programs as this user with no confinement but resource limits. At most
    ``workers`` programs run at a time (default: one per CPU). Every method raises SandboxError where the confinement
    is missing or broken, and never blames the program for it.
    """

    def __init__(
        self,
        *,
        interpreter: str = DEFAULT_INTERPRETER,
        unsafe: bool = False,
        url: str | None = None,
        workers: int | None = None,
    ) -> None:
        self.interpreter, self.unsafe, self.url = interpreter, unsafe, url
        self._slots: queue.LifoQueue[dict[str, Worker]] = queue.LifoQueue()
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        for _ in range(workers or cpus or 1):
            self._slots.put({})
        self._folders: list[str] | None = None
        # A confined interpreter dies with the thread that starts it, so one thread starts them all and stays.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox")
        self._closed = False

    def evaluate(self, job: Job) -> Report:
        """Run a program's tests."""
        if self.url is not None:
            return ask(self.url, job)
        return self._with(lambda find: evaluate(job, find))

    def run(self, source: str, stdin: str = "", *, timeout: float = 3.0, memory: int = 512) -> Run:
        """Run one script: what it prints and how it ends."""
        if self.url is not None:
            raise SandboxError("a sandbox service runs tests, not single scripts")
        job = Job(blocks=(source,), tests="", timeout=timeout, memory=memory)
        data = stdin.encode("utf-8", "surrogateescape")
        return self._with(lambda find: Candidate(job, find, float("inf")).script(data))

    def _with(self, action: Callable[[Find], Result]) -> Result:
        """The result of ``action`` with a set of workers of its own; once more on new ones where one of them broke."""
        slot = self._slots.get()

        def find(role: str) -> Worker:
            worker = slot.get(role)
            if worker is None or worker.closed:
                worker = slot[role] = self._starter.submit(self._start).result()
            return worker

        try:
            for last in (False, True):
                try:
                    return action(find)
                except Broken as error:
                    _close(slot)
                    if last:
                        raise SandboxError(f"the sandbox broke twice: {one_line(error)}") from error
        except BaseException:
            _close(slot)
            raise
        finally:
            if self._closed:
                _close(slot)
            self._slots.put(slot)
        raise AssertionError("one of the two turns returns or raises")

    def _start(self) -> Worker:
        if not hasattr(os, "pidfd_open"):
            raise SandboxError("programs are run on Linux only; elsewhere name a sandbox service")
        if self.unsafe:
            return Bare(self.interpreter)
        if self._folders is None:
            self._folders = needs(self.interpreter)
        return Confined(self.interpreter, self._folders)

    def close(self) -> None:
        """Kill the interpreters. One that is in use is killed when its program ends."""
        self._closed = True
        for _ in range(self._slots.qsize()):
            slot = self._slots.get()
            _close(slot)
            self._slots.put(slot)
        self._starter.shutdown()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def local() -> Sandbox:
    """This process's own sandbox, for callers that bring none: confined, with everything at its default."""
    return _local(os.getpid())  # a fork must not talk to its parent's interpreters


@cache
def _local(_: int) -> Sandbox:
    sandbox = Sandbox()
    atexit.register(sandbox.close)
    return sandbox


def _close(slot: dict[str, Worker]) -> None:
    for worker in slot.values():
        if not worker.closed:
            worker.close()
    slot.clear()
