"""The worker's side of `workers`: a confined process that answers requests until the one that asks is gone."""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

MEMORY = 1 << 30  # bytes of address space of one worker
OUT_OF_MEMORY = 3  # exit code
LENGTH = struct.Struct(">I")  # of the message that follows


def serve(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The worker's side: answer requests until the other side is gone. Runs in a process of its own."""
    _confine(int(sys.argv[1]))
    source, sink, nowhere = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    _send(sink, {"ready": True})
    while (message := _receive(source)) is not None:
        limit = float(message["limit"])
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + limit) + 2)  # should the timer be undone
        signal.setitimer(signal.ITIMER_PROF, limit)  # its signal ends the process, whatever it is doing
        try:
            reply = handle(message["request"])
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(sink, reply)
    os._exit(0)


def _confine(parent: int) -> None:
    """Little memory, no core dump, no file written; and an end together with the parent, even if that is killed."""
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    if sys.platform == "linux":
        death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(death_signal, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(0)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _send(sink: int, message: Mapping[str, Any]) -> None:
    data = json.dumps(message).encode()
    data = LENGTH.pack(len(data)) + data
    while data:
        data = data[os.write(sink, data) :]


def _receive(source: int) -> dict[str, Any] | None:
    header = _read_all(source, LENGTH.size)
    data = _read_all(source, LENGTH.unpack(header)[0]) if header else b""
    message: dict[str, Any] | None = json.loads(data) if data else None
    return message


def _read_all(source: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.read(source, count - len(data))
        if not part:
            return b""
        data += part
    return data
