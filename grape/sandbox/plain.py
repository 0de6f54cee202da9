"""Plain data as bytes, exactly, and in frames: all that crosses between a program, the broker and the tests.

Runs inside the sandbox too, so it needs nothing but the standard library (Python 3.9 or newer).
"""

from __future__ import annotations

import json
import socket
from typing import Any

LIMIT = 4 * 2**20  # bytes of one frame: what one call may take or return
INT64 = 2**63
CONTAINERS = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: object) -> bytes:
    """``value`` as ASCII; TypeError, ValueError or RecursionError where it is not plain data or too much of it.

    Plain are None, bool, int, float (with inf and nan), complex, str, bytes, list, tuple, set, frozenset and dict.
    A subclass crosses as its base, a numpy array or scalar as what its ``tolist`` gives.
    """
    data = json.dumps(_pack(value), separators=(",", ":")).encode("ascii")
    if len(data) > LIMIT:
        raise ValueError(f"more than {LIMIT // 2**20} MB of data")
    return data


def decode(data: bytes) -> Any:
    """The value that was encoded, of exactly the plain types; any Exception where the bytes are not an encoding."""
    return _unpack(json.loads(data))


def _pack(value: Any) -> Any:
    """JSON for ``value``: what JSON lacks is an object whose only key names the type."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__int__(value)
        return number if -INT64 <= number < INT64 else {"int": hex(number)}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return [_pack(element) for element in value]
    for tag, kind in CONTAINERS.items():
        if isinstance(value, kind):
            return {tag: [_pack(element) for element in value]}
    if isinstance(value, dict):
        return {"dict": [[_pack(key), _pack(element)] for key, element in value.items()]}
    if callable(getattr(value, "tolist", None)) and not hasattr(listed := value.tolist(), "tolist"):
        return _pack(listed)
    raise TypeError(f"a value of type {type(value).__name__} is not plain data")


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(element) for element in value]
    if not isinstance(value, dict):
        return value
    ((tag, body),) = value.items()
    if tag in CONTAINERS:
        return CONTAINERS[tag](_unpack(element) for element in body)
    if tag == "dict":
        return {_unpack(key): _unpack(element) for key, element in body}
    if tag == "int":
        return int(body, 16)
    if tag == "bytes":
        return bytes.fromhex(body)
    if tag == "complex":
        return complex(*body)
    raise ValueError(f"unknown tag {tag!r}")


def read_frame(channel: socket.socket) -> bytes | None:
    """The next frame: four bytes of length, then its bytes. None at the end of the conversation."""
    size = _read(channel, 4)
    return None if size is None else _read(channel, int.from_bytes(size, "big"))


def write_frame(channel: socket.socket, payload: bytes) -> None:
    """Send one frame."""
    channel.sendall(len(payload).to_bytes(4, "big") + payload)


def _read(channel: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        chunk = channel.recv(min(size - len(data), 1 << 20))
        if not chunk:
            return None
        data += chunk
    return bytes(data)
