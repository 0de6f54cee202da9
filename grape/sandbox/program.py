"""The program's side: find it in the answer, load it, and return plain data from its functions.

Runs inside the sandbox, in the same process as the program, so nothing here is trusted: whatever a program makes of
this file, all it can do is return other plain data. Standard library only.
"""

from __future__ import annotations

import ast
import atexit
import json
import os
import socket
import sys
import threading
import traceback
import types
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from grape.sandbox.plain import decode, encode, read_frame, write_frame

FILE = "program.py"
TEXT = 500  # characters of an exception's text


def defines(source: str, name: str) -> bool:
    """Whether ``source`` is Python that binds ``name`` at its top level (SyntaxError and the like: it does not)."""
    try:
        return name in _bound(ast.parse(source).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _bound(body: Sequence[ast.stmt]) -> set[str]:
    names: set[str] = set()
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in statement.names}
        else:
            nested = [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)]
            handlers = [child for handler in getattr(statement, "handlers", []) for child in handler.body]
            names |= _bound([*nested, *handlers])
            names |= {
                node.id
                for child in ast.iter_child_nodes(statement)
                if isinstance(child, ast.expr)
                for node in ast.walk(child)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }
    return names  # fmt: skip


def compiles(source: str) -> bool:
    """Whether ``source`` is Python."""
    try:
        compile(source, FILE, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def prompt_code(prompts: Sequence[str], name: str | None) -> str | None:
    """The first text of a prompt that is Python and defines the entry point: a stub to complete, with its helpers."""
    return next((prompt for prompt in prompts if name and defines(prompt, name)), None)


def choose(blocks: Sequence[str], name: str | None, prompt: str | None = None) -> list[str]:
    """The sources to run one after the other, from the blocks of an answer.

    The last block that defines ``name``, after the prompt's own code where there is any. If none does, the last block
    as the body that the prompt's stub lacks. Without a name the last block that is Python at all.
    """
    if name is None:
        return [next((block for block in reversed(blocks) if compiles(block)), blocks[-1])]
    whole = next((block for block in reversed(blocks) if defines(block, name)), None)
    if whole is not None:
        return [prompt, whole] if prompt else [whole]
    completed = [prompt + block for block in reversed(blocks) if prompt and compiles(prompt + block)]
    return completed[:1] or [next((block for block in reversed(blocks) if compiles(block)), blocks[-1])]


def serve_calls(channel: socket.socket) -> None:
    """Load the program at the first call, then answer calls until the conversation ends."""
    order = json.loads(read_frame(channel) or b"")
    namespace: dict[str, Any] = {}
    failure: list[str] | None = None
    while (frame := read_frame(channel)) is not None:
        header, payload = frame.split(b"\n", 1)
        name = header.decode()
        try:
            if not namespace:
                namespace = load(order, name)
        except BaseException as error:  # noqa: BLE001 - whatever a program raises is its answer, to every call
            failure = described(error)
            namespace = {"": None}
        if failure is not None:
            write_frame(channel, encode(["raised", *failure]))
            continue
        try:
            write_frame(channel, answer(namespace, name, payload))
        except BaseException as error:  # noqa: BLE001 - as above
            write_frame(channel, encode(["raised", *described(error)]))


def load(order: dict[str, Any], name: str) -> dict[str, Any]:
    """The namespace of the program that defines ``name``."""
    module = sys.modules["program"] = types.ModuleType("program")
    module.__file__ = FILE
    prompt = prompt_code(order["prompts"], order["entry_point"] or name)
    for source in choose(order["blocks"], name, prompt):
        exec(compile(source, FILE, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def answer(namespace: dict[str, Any], name: str, payload: bytes) -> bytes:
    """What the program's function gives for the encoded arguments."""
    arguments, keywords = decode(payload)
    if name not in namespace:
        raise NameError(f"the program defines no {name!r}")
    return encode(["value", namespace[name](*arguments, **keywords)])


def described(error: BaseException) -> list[str]:
    """An exception's type, text and line in the program, as far as its own code lets them be read."""
    kind = type(error).__name__
    try:
        text = str(error)[:TEXT]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == FILE]
    except BaseException:  # noqa: BLE001 - a hostile __str__
        return [kind, "", ""]
    return [kind, text, f"line {lines[-1]}" if lines else ""]


def run_main(channel: socket.socket) -> None:
    """Run the program as a script; its standard streams are already in place."""
    order = json.loads(read_frame(channel) or b"")
    channel.close()
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__ = FILE
    status: object = None
    try:
        for source in choose(order["blocks"], None):
            exec(compile(source, FILE, "exec", dont_inherit=True), module.__dict__)
    except SystemExit as stop:
        status = stop.code
    except BaseException:  # noqa: BLE001 - a program's crash: its trace goes to stderr, as from Python itself
        traceback.print_exc()
        status = 1
    leave(status, module)


def leave(status: object, module: types.ModuleType) -> NoReturn:
    """End as Python itself would. Without threads that takes no teardown of what was preloaded, which is most of it."""
    if threading.active_count() > 1:
        sys.exit(status)  # type: ignore[arg-type]
    atexit._run_exitfuncs()
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)  # noqa: T201 - what sys.exit does with a text
        status = 1
    del sys.modules["__main__"]
    module.__dict__.clear()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        with suppress(Exception):  # a stream that the program closed or replaced
            stream.flush()  # type: ignore[union-attr]
    os._exit(int(status or 0) & 0xFF)
