"""The trusted middle: carries calls from the tests to the program and plain data back, and keeps the time.

The program and the tests live in two sandboxes. The broker reads nothing of what the program sends but its length: it
goes to the tests as it came, and what it is worth is decided there.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from pydantic import ValidationError

from grape.sandbox.channel import PATIENCE, Channel, Closed, Expired, Timer, TooMuch, readable
from grape.sandbox.confine import limits
from grape.sandbox.job import Failure, Job, Report, Run
from grape.sandbox.plain import LIMIT
from grape.sandbox.worker import Broken, Ended, Program, Worker

RUNS = 5  # a program's runs and calls together may take this many times its time limit
TESTS_SECONDS = 20.0  # that the tests may take for themselves
TESTS_MEMORY = 1024  # MB
LAST_WORDS = 1.0  # seconds between hanging up and ending
STDERR = 4000  # bytes of stderr that are kept

Find = Callable[[str], Worker]  # the worker for "calls", "main" or "tests"


class Process:
    """A program or the tests, running: what it is told and asked goes through ``channel``."""

    def __init__(
        self, worker: Worker, mode: str, *, memory: int, seconds: float, streams: tuple[int, ...] = ()
    ) -> None:
        order = {
            "mode": mode,
            "memory": memory * 2**20,
            "limits": limits(seconds=seconds, memory=memory * 2**20),
        }
        ours, theirs = socket.socketpair()
        try:
            self.program: Program = worker.start(order, (theirs.fileno(), *streams))
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.worker = worker
        self.channel = Channel(ours)

    def end(self, patience: float = 0) -> Ended:
        """How it ended; it is stopped if after some seconds it still runs. Broken where its sandbox cannot say."""
        self.channel.close()
        try:
            return self.program.end(patience)
        except Broken:
            self.worker.close()
            raise

    def stop(self) -> None:
        """Stop it. A sandbox that fails to clean up is closed, and a new one started when needed."""
        with suppress(Broken):
            self.end()


class Candidate:
    """The program: called in a process that lives from call to call, run as a script in a new one each time."""

    def __init__(self, job: Job, find: Find, end: float) -> None:
        self.job, self.find, self.end = job, find, end
        self.left = RUNS * job.timeout
        self.process: Process | None = None

    def call(self, frame: bytes) -> bytes:
        """The program's own reply to a call, or the broker's word on why there is none."""
        if self.left <= 0:
            return raised("timeout", self.late())
        process = self.process or self.begin("calls")
        self.process = process
        timer = Timer(min(self.job.timeout, self.left), self.end, process.program.usage)
        try:
            process.channel.send(frame, timer)
            return process.channel.receive(timer)
        except Expired:
            self.close()
            return raised("timeout", self.late())
        except TooMuch:
            self.close()
            return raised("protocol", f"it sent more than {LIMIT // 2**20} MB")
        except Closed:
            self.process = None
            return raised(*told(process.end(LAST_WORDS), "it hung up", self.job.memory))
        finally:
            self.left -= timer.spent()

    def run(self, stdin: bytes) -> bytes:
        """What the program prints, or the broker's word on why it failed."""
        done = self.script(stdin)
        return raised("run", done.how) if done.how else json.dumps(["value", done.stdout]).encode("ascii")

    def script(self, stdin: bytes) -> Run:
        """Run the program once as a script."""
        if self.left <= 0:
            return Run(stdout="", stderr="", how=f"timeout: {self.late()}")
        with ExitStack() as stack:
            (stdin_r, stdin_w), (stdout_r, stdout_w), (stderr_r, stderr_w) = (os.pipe() for _ in range(3))
            ours, theirs = (stdin_w, stdout_r, stderr_r), (stdin_r, stdout_w, stderr_w)
            for descriptor in ours:
                stack.callback(os.close, descriptor)
                os.set_blocking(descriptor, False)
            try:
                process = self.begin("main", theirs)
            finally:
                for descriptor in theirs:
                    os.close(descriptor)
            timer = Timer(min(self.job.timeout, self.left), self.end, process.program.usage)
            pump = Pump(stdin, *ours)
            how = ""
            try:
                pump.run(process.program, timer)
            except Expired:
                how = f"timeout: {self.late()}"
            except TooMuch:
                how = f"it printed more than {LIMIT // 2**20} MB"
            ended = Ended(why="stopped")
            if how:
                process.stop()
            else:
                ended = process.end()
            self.left -= timer.spent()
            with suppress(TooMuch):
                pump.drain()
        stderr = pump.stderr.decode("utf-8", "replace")
        if not how and (ended.why != "exit" or ended.status != 0):
            how = ": ".join((*told(ended, "it was stopped", self.job.memory), *stderr.strip().splitlines()[-1:]))
        return Run(stdout=pump.stdout.decode("utf-8", "replace"), stderr=stderr, how=how)

    def begin(self, mode: str, streams: tuple[int, ...] = ()) -> Process:
        """Start a process and tell it the program."""
        seconds = RUNS * self.job.timeout
        process = Process(self.find(mode), mode, memory=self.job.memory, seconds=seconds, streams=streams)
        order = {"blocks": self.job.blocks, "prompts": self.job.prompts, "entry_point": self.job.entry_point}
        with suppress(Expired, Closed):  # what it does not read it cannot run; its first call or its end will tell
            timer = Timer(TESTS_SECONDS, self.end, process.program.usage)
            process.channel.send(json.dumps(order).encode("ascii"), timer)
        return process

    def late(self) -> str:
        """Which limit was passed."""
        return f"it took more than {self.job.timeout:g} s, or than {RUNS * self.job.timeout:g} s in all"

    def close(self) -> None:
        """End the process that answers calls."""
        process, self.process = self.process, None
        if process is not None:
            process.stop()


class Pump:
    """A script's standard streams: feeds stdin, keeps stdout and the end of stderr."""

    def __init__(self, stdin: bytes, stdin_fd: int, stdout_fd: int, stderr_fd: int) -> None:
        self.stdin = memoryview(stdin)
        self.stdin_fd, self.stdout_fd, self.stderr_fd = stdin_fd, stdout_fd, stderr_fd
        self.stdout, self.stderr = bytearray(), bytearray()

    def run(self, program: Program, timer: Timer) -> None:
        """Until the program ends; Expired, or TooMuch when it prints more than may be."""
        poll = select.poll()
        for descriptor in (program.fileno(), self.stdout_fd, self.stderr_fd):
            poll.register(descriptor, select.POLLIN)
        poll.register(self.stdin_fd, select.POLLOUT)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(max(1.0, timer.left() * 1000))}
            if self.stdin_fd in ready and not self.feed():
                poll.unregister(self.stdin_fd)
            for descriptor in ready & {self.stdout_fd, self.stderr_fd}:
                if not self.read(descriptor):
                    poll.unregister(descriptor)
            if program.fileno() in ready:
                return

    def feed(self) -> bool:
        """Write what the pipe takes; whether there is more to come. The end of the input is told by its closing."""
        try:
            self.stdin = self.stdin[os.write(self.stdin_fd, self.stdin[:65536]) :]
        except BlockingIOError:
            return True
        except BrokenPipeError:
            self.stdin = self.stdin[:0]
        if not self.stdin:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stdin_fd, inheritable=False)
            os.close(null)
        return bool(self.stdin)

    def read(self, descriptor: int) -> bool:
        """Take what a stream has; whether it is still open."""
        try:
            chunk = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return True
        if descriptor == self.stderr_fd:
            self.stderr = (self.stderr + chunk)[-STDERR:]
        else:
            self.stdout += chunk
            if len(self.stdout) > LIMIT:
                raise TooMuch
        return bool(chunk)

    def drain(self) -> None:
        """What is left in the pipes of a program that has ended."""
        for descriptor in (self.stdout_fd, self.stderr_fd):
            while readable(descriptor, 0) and self.read(descriptor):
                pass


def told(ended: Ended, stopped: str, memory: int) -> tuple[str, str]:
    """How a process ended, as a kind and a text."""
    if ended.why == "memory":
        return "memory", f"it and its processes took more than {memory} MB or too many files"
    if ended.status is None:
        return "protocol", stopped
    if ended.status < 0:
        return "exit", f"it was killed by {signal.Signals(-ended.status).name}"
    return "exit", f"it ended with status {ended.status}"


def raised(kind: str, text: str) -> bytes:
    """A failure in the words that a program itself would use."""
    return json.dumps(["raised", kind, text, ""]).encode("ascii")


def evaluate(job: Job, find: Find) -> Report:
    """The tests' report on the program. Raises Broken where a sandbox died meanwhile."""
    end = time.monotonic() + PATIENCE * (job.timeout + TESTS_SECONDS)
    candidate = Candidate(job, find, end)
    tests = Process(find("tests"), "tests", memory=TESTS_MEMORY, seconds=TESTS_SECONDS)
    left = TESTS_SECONDS
    order: dict[str, Any] = {"tests": job.tests, "prompts": job.prompts, "entry_point": job.entry_point}
    answered = False
    try:
        reply = json.dumps(order).encode("ascii")
        while True:
            timer = Timer(left, end, tests.program.usage)
            tests.channel.send(reply, timer)
            frame = tests.channel.receive(timer)
            left -= timer.spent()
            if frame[:1] == b"D":
                return Report.model_validate_json(frame[1:])
            reply = candidate.call(frame[1:]) if frame[:1] == b"C" else candidate.run(frame[1:])
            answered = True
    except Expired:
        how = f"the tests took more than {TESTS_SECONDS:g} s for themselves"
    except (TooMuch, ValidationError):
        how = "the tests sent what is no report"
    except Closed:
        how = "the tests' process is gone: " + ": ".join(told(tests.end(LAST_WORDS), "it hung up", TESTS_MEMORY))
    finally:
        candidate.close()
        tests.stop()
    if answered:  # what the program gave may have done it, and must not save it
        return Report(held=0, total=1, failures=(Failure(line=1, test="", how=how),))
    return Report(fault=how)
