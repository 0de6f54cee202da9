"""Frames between the broker and a process that may send anything, or nothing at all, within a time limit."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable

from grape.sandbox.plain import LIMIT

PATIENCE = 10  # times its limit that a program may take by the clock, on a busy machine


class Expired(Exception):
    """The time limit passed."""


class Closed(Exception):
    """The other side hung up."""


class TooMuch(Exception):
    """The other side sends more than it may."""


class Timer:
    """Seconds that a program is charged for: the clock's, less those in which others had the CPU that it wanted.

    So a busy machine fails no program. ``usage`` gives the seconds for which the program had to wait and those of CPU
    time that it and its processes used, and is asked only when the limit seems to have passed. ``end`` on the monotonic
    clock, and `PATIENCE` times the limit, hold in any case.
    """

    def __init__(self, limit: float, end: float, usage: Callable[[], tuple[float, float]]) -> None:
        self.start = time.monotonic()
        self.limit, self.usage = limit, usage
        self.end = min(end, self.start + PATIENCE * limit)
        self.credit = 0.0

    def spent(self) -> float:
        """Seconds charged so far."""
        return max(0.0, time.monotonic() - self.start - self.credit)

    def left(self) -> float:
        """Seconds until the limit, as far as is known; Expired once it has passed."""
        for asked in (False, True):
            left = min(self.limit - self.spent(), self.end - time.monotonic())
            if left > 0:
                return left
            if not asked and time.monotonic() < self.end:
                waited, used = self.usage()
                self.credit = max(0.0, min(waited, time.monotonic() - self.start - used))
        raise Expired


def readable(descriptor: int, seconds: float) -> bool:
    """Whether there is something to read, now or before the time is over."""
    poll = select.poll()  # select itself takes no descriptor above 1023
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class Channel:
    """One side of a conversation in frames of four bytes of length and a payload."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.buffer = bytearray()
        self.poll = select.poll()

    def send(self, payload: bytes, timer: Timer) -> None:
        """Send a frame; Expired, or Closed."""
        data = memoryview(len(payload).to_bytes(4, "big") + payload)
        while data:
            try:
                data = data[self.sock.send(data, socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                self._wait(select.POLLOUT, timer)
            except OSError as error:
                raise Closed from error

    def receive(self, timer: Timer) -> bytes:
        """The payload of the next frame; Expired, Closed or TooMuch."""
        while True:
            size = int.from_bytes(self.buffer[:4], "big") if len(self.buffer) >= 4 else 0
            if size > LIMIT + 4096:
                raise TooMuch
            if len(self.buffer) >= 4 + size:
                frame = bytes(self.buffer[4 : 4 + size])
                del self.buffer[: 4 + size]
                return frame
            try:
                chunk = self.sock.recv(1 << 20)
            except BlockingIOError:
                self._wait(select.POLLIN, timer)
                continue
            except OSError as error:
                raise Closed from error
            if not chunk:
                raise Closed
            self.buffer += chunk

    def _wait(self, events: int, timer: Timer) -> None:
        self.poll.register(self.sock, events)
        self.poll.poll(max(1.0, timer.left() * 1000))

    def close(self) -> None:
        """Hang up."""
        self.sock.close()
