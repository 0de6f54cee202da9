"""A confined interpreter seen from outside: started, given programs one after the other, killed when it breaks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from grape.errors import SandboxError, one_line
from grape.sandbox.channel import readable
from grape.sandbox.confine import ALLOW, ENVIRONMENT, bootstrap, launch
from grape.sandbox.zygote import usage

START = 60.0  # seconds in which an interpreter must have started
SWEEP = 20.0  # seconds in which it must have cleaned up after a program


class Broken(Exception):
    """The interpreter died or hangs: whatever it was doing must be done again on a fresh one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a program's first process ended: its exit status, or that it was stopped or took too much memory."""

    why: str
    status: int | None = None


class Program(Protocol):
    """One running program. ``fileno`` becomes readable when it has ended."""

    def fileno(self) -> int: ...
    def usage(self) -> tuple[float, float]: ...
    def end(self, patience: float = 0) -> Ended: ...


class Worker(Protocol):
    """Where programs start. ``order`` is what `zygote.start` reads; ``descriptors`` become the program's."""

    closed: bool

    def start(self, order: Mapping[str, Any], descriptors: Sequence[int]) -> Program: ...
    def close(self) -> None: ...


class Confined:
    """A bubblewrap with one interpreter that forks per program."""

    def __init__(self, interpreter: str, folders: Sequence[str]) -> None:
        self.closed = False
        self.process, self.control = launch(interpreter, folders)
        try:
            hello = self.read(START)
        except Broken:
            self.close()
            raise SandboxError(f"programs cannot be confined: {self.complaint()}; {ALLOW}") from None
        if hello["faults"]:
            self.close()
            raise SandboxError(f"programs are not confined: {'; '.join(hello['faults'])}; {ALLOW}")

    def complaint(self) -> str:
        """The last line that bubblewrap or the interpreter wrote before it died."""
        assert self.process.stderr is not None
        lines = self.process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        last = one_line(lines[-1], 1000) if lines else f"bwrap ended with status {self.process.returncode}"
        return last if len(last) <= 110 else f"…{last[-109:]}"

    def read(self, seconds: float) -> dict[str, Any]:
        """The next word of the interpreter; Broken where none comes in time."""
        if not readable(self.control.fileno(), seconds):
            raise Broken("it does not answer")
        try:
            data = self.control.recv(65536)
        except OSError as error:
            raise Broken(one_line(error)) from error
        if not data:
            raise Broken("it died")
        word: dict[str, Any] = json.loads(data)
        return word

    def start(self, order: Mapping[str, Any], descriptors: Sequence[int]) -> ConfinedProgram:
        """Fork a program."""
        try:
            socket.send_fds(self.control, [json.dumps({**order, "folder": "/tmp"}).encode()], list(descriptors))
        except OSError as error:
            raise Broken(one_line(error)) from error
        return ConfinedProgram(self)

    def close(self) -> None:
        """Kill the interpreter and with it all that runs inside; it is dead when this returns."""
        if self.closed:
            return
        self.closed = True
        self.process.kill()
        self.process.wait()
        self.control.settimeout(SWEEP)
        with suppress(OSError):
            while self.control.recv(65536):  # until its last process has let go of the line
                pass
        self.control.close()


class ConfinedProgram:
    """A fork of a confined interpreter."""

    def __init__(self, worker: Confined) -> None:
        self.worker = worker
        self.ended: dict[str, Any] | None = None

    def fileno(self) -> int:
        """The control line: it speaks unasked only of the program's end."""
        return self.worker.control.fileno()

    def usage(self) -> tuple[float, float]:
        """See `zygote.usage`."""
        if self.ended is None:
            self.tell(b"usage")
            word = self.worker.read(SWEEP)
            if "usage" in word:
                waited, used = word["usage"]
                return waited, used
            self.ended = word
        return 0.0, 0.0

    def tell(self, word: bytes) -> None:
        try:
            self.worker.control.send(word)
        except OSError as error:
            raise Broken(one_line(error)) from error

    def end(self, patience: float = 0) -> Ended:
        """Stop the program if after some seconds it still runs; nothing of it is left. Broken where that fails."""
        if self.ended is None and self.worker.closed:
            raise Broken("it was closed")
        if self.ended is None and not readable(self.fileno(), patience):
            self.tell(b"stop")
        while self.ended is None:
            word = self.worker.read(SWEEP)
            self.ended = None if "usage" in word else word
        if not self.ended["clean"]:
            self.worker.close()
        return Ended(why=self.ended["why"], status=self.ended.get("status"))


class Bare:
    """No confinement: each program is an interpreter of its own with limits, as the user who runs this."""

    def __init__(self, interpreter: str) -> None:
        self.closed = False
        self.interpreter = interpreter

    def start(self, order: Mapping[str, Any], descriptors: Sequence[int]) -> BareProgram:
        """Start a program."""
        return BareProgram(self.interpreter, order, descriptors)

    def close(self) -> None:
        """Nothing outlives a program here."""


class BareProgram:
    """An unconfined process group in a folder of its own."""

    def __init__(self, interpreter: str, order: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        self.ended: Ended | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="grape-", ignore_cleanup_errors=True)
        limits = {name: value for name, value in order["limits"].items() if name != "RLIMIT_NPROC"}  # is per user
        order = {**order, "limits": limits, "folder": self.folder.name}
        entry = f"import json\nmodule.start(json.loads({json.dumps(order)!r}), {list(descriptors)!r})"
        try:
            self.process = subprocess.Popen(
                [interpreter, "-s", "-c", bootstrap(entry)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=descriptors,
                env={**ENVIRONMENT, "HOME": self.folder.name},
                start_new_session=True,
            )
        except OSError as error:
            self.folder.cleanup()
            raise SandboxError(f"the interpreter {interpreter!r} does not run: {one_line(error)}") from error
        self.handle = os.pidfd_open(self.process.pid)

    def fileno(self) -> int:
        """A handle of the process."""
        return self.handle

    def usage(self) -> tuple[float, float]:
        """See `zygote.usage`; of its first process."""
        return usage(self.process.pid, [self.process.pid])

    def end(self, patience: float = 0) -> Ended:
        """Kill the process group, if after some seconds it still runs; a daemon of another session lives on."""
        if self.ended is not None:
            return self.ended
        readable(self.handle, patience)
        status = self.process.poll()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.handle)
        self.folder.cleanup()
        self.ended = Ended(why="stopped") if status is None else Ended(why="exit", status=status)
        return self.ended
