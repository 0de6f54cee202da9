"""The tests' side: run the tests of a question, ask the program through the broker, and count what holds.

Runs inside the sandbox, in a process that the program never shares. Standard library only.

An exception in the tests is the program's fault where it is the program's own failure, or where the statement works on
what the program gave; any other is the tests' own, and then nothing is said about the program. In doubt it is the
program's: no program may turn a failure of its own into a test that was not held.
"""

from __future__ import annotations

import json
import linecache
import re
import reprlib
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from grape.sandbox.plain import LIMIT, decode, encode, read_frame, write_frame
from grape.sandbox.program import prompt_code
from grape.sandbox.rewrite import FILE, Plan, plan

SHOWN = 20  # failures described in the report


class ProgramError(Exception):
    """The program failed: it raised, ended, ran out of time or memory, or returned what is not plain data."""

    def __init__(self, kind: str, text: str = "", where: str = "") -> None:
        super().__init__(": ".join(part for part in (kind, text) if part) + (f" ({where})" if where else ""))
        self.kind = kind


class TestsError(Exception):
    """The tests pass on what no program gave them: never the program's fault."""


class Session:
    """One run of the tests: what was asked, what was expected, what held."""

    def __init__(self, channel: socket.socket, plan: Plan) -> None:
        self.channel = channel
        self.plan = plan
        self.answers = 0
        self.last = (0, "")
        self.sites: list[int] = []
        self.lost: set[str] = set()
        self.results: list[tuple[int, str]] = []  # line of the expectation, how it failed or ""

    def call(self, name: str, /, *arguments: Any, **keywords: Any) -> Any:
        """What the program's function ``name`` returns; raises ProgramError."""
        shown = ", ".join([*map(short, arguments), *(f"{key}={short(value)}" for key, value in keywords.items())])
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"call needs the name of a function, not {short(name)}")
        try:
            payload = encode([arguments, keywords])
        except TypeError as error:
            raise TestsError(f"the arguments of {name}({shown}): {error}") from None
        return self._ask(b"C" + name.encode("utf-8", "replace") + b"\n" + payload, f"{name}({shown})")

    def run(self, stdin: str = "") -> str:
        """What the program prints when it is run as a script with ``stdin``; raises ProgramError."""
        if not isinstance(stdin, str):
            raise TypeError(f"run needs text for the program's input, not {short(stdin)}")
        data = stdin.encode("utf-8", "surrogateescape")
        if len(data) > LIMIT:
            raise ValueError(f"run takes at most {LIMIT // 2**20} MB of input")
        return str(self._ask(b"R" + data, f"run({short(stdin)})"))

    def _ask(self, frame: bytes, shown: str) -> Any:
        write_frame(self.channel, frame)
        reply = read_frame(self.channel) or b""
        self.answers += 1
        try:
            kind, *rest = decode(reply)
            if kind == "value":
                (value,) = rest
            else:
                error = ProgramError(*(str(part)[:500] for part in rest[:3]))
        except Exception as fault:  # noqa: BLE001 - bytes that the program made up
            kind, error = "raised", ProgramError("not plain data", type(fault).__name__)
        if kind == "value":
            self.last = (self.answers, f"{shown} gave {short(value)}")
            return value
        self.last = (self.answers, f"{shown} failed: {error}")
        raise error

    def expect(self, condition: object, message: object = "") -> None:
        """One test: it holds if ``condition`` is true."""
        line = self.sites[-1] if self.sites else sys._getframe(1).f_lineno
        how = "" if condition else "does not hold"
        self.results.append((line, how and self.told(f"{how}: {message}" if message else how)))

    def told(self, how: str) -> str:
        """How an expectation failed, with the last thing the program gave."""
        return f"{how}; {self.last[1]}" if self.last[1] and self.last[1] not in how else how

    def site(self, line: int) -> Site:
        """The scope of one `expect` statement."""
        return Site(self, line)

    def lose(self, *names: str) -> None:
        """Pass on the exception of an assignment, unless it is the program's: then its names have no value."""
        error = sys.exc_info()[1]
        assert error is not None
        if not self.blames_program(error):
            raise error
        self.lost.update(names)

    def blames_program(self, error: BaseException) -> bool:
        """Whether an exception in the tests comes from the program or its data."""
        if isinstance(error, ProgramError):
            return True
        if not self.answers or isinstance(error, TestsError):
            return False
        frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, NameError) and frames[-1][0] == FILE:
            missing = set(re.findall(r"'(\w+)'", str(error)))
            if missing & self.lost or not missing & self.plan.bound:  # the latter: a slip of the pen
                return bool(missing & self.lost)
        return self.plan.touches({line for file, line in frames if file == FILE})


class Site:
    """The scope of one `expect` statement: an exception that the program caused is an expectation that fails."""

    def __init__(self, session: Session, line: int) -> None:
        self.session, self.line = session, line

    def __enter__(self) -> None:
        self.session.sites.append(self.line)

    def __exit__(self, kind: object, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.session.sites.pop()
        if error is None or not self.session.blames_program(error):
            return False
        self.session.results.append((self.line, self.session.told(shown_error(error))))
        return True


def shown_error(error: BaseException) -> str:
    """An exception in a line."""
    text = " ".join(short(error, str).split())
    return text if isinstance(error, ProgramError) else f"{type(error).__name__}: {text}".removesuffix(": ")


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = SHORT.maxlong = 100


def short(value: object, show: Callable[[Any], str] = SHORT.repr) -> str:
    """A value in at most a few hundred characters."""
    try:
        return show(value)[:300]
    except (ValueError, RecursionError, MemoryError):  # an int of thousands of digits, say
        return f"<{type(value).__name__}>"


def serve_tests(channel: socket.socket) -> None:
    """Read an order, run its tests, send the report."""
    order = json.loads(read_frame(channel) or b"")
    report = run_tests(channel, order)
    write_frame(channel, b"D" + json.dumps(report).encode("ascii"))


def run_tests(channel: socket.socket, order: dict[str, Any]) -> dict[str, Any]:
    """The report: expectations that held, their number, how the others failed, and the tests' own fault if any."""
    source, entry_point = order["tests"], order["entry_point"]
    try:
        made = plan(source, entry_point)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return report(fault=f"the tests are not Python: {shown_error(error)}")
    if made.fault:
        return report(fault=made.fault)
    session = Session(channel, made)
    linecache.cache[FILE] = (len(source), None, source.splitlines(keepends=True), FILE)
    names: dict[str, Any] = {"__name__": "tests"}
    helpers = prompt_code(order["prompts"], entry_point)
    names.update(call=session.call, run=session.run, expect=session.expect, ProgramError=ProgramError)
    names.update(__site__=session.site, __lose__=session.lose)
    try:
        exec(compile(helpers or "", "prompt.py", "exec", dont_inherit=True), names)
    except BaseException as error:  # noqa: BLE001 - the question's own code
        return report(fault=f"the question's own code failed: {shown_error(error)}")
    if entry_point:
        names["candidate"] = names[entry_point] = candidate(session, entry_point)
    return run_all(session, names) if made.checks else run_share(session, names)


def candidate(session: Session, name: str) -> Callable[..., Any]:
    """The entry point as the tests see it."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        return session.call(name, *arguments, **keywords)

    call.__name__ = call.__qualname__ = name
    return call


def run_share(session: Session, names: dict[str, Any]) -> dict[str, Any]:
    """Each expectation is one test. Where the program ends the tests, those that were not reached do not hold."""
    for code in session.plan.statements:
        begun = len(session.results)
        try:
            exec(code, names)
        except BaseException as error:  # noqa: BLE001 - the one place where the tests' exceptions are told apart
            if not session.blames_program(error):
                return report(fault=fault(error))
            how = session.told(f"the tests ended at line {line_of(error)}: {shown_error(error)}")
            session.results[begun:] = [(line, how_before or how) for line, how_before in session.results[begun:]]
            reached = {line for line, _ in session.results}
            session.results += [(line, f"not reached: {how}") for line in session.plan.sites if line not in reached]
            break
    if not session.results:
        if not session.answers:
            return report(fault="the tests came to no expect(...)")
        session.results.append((session.plan.sites[0], session.told("no expectation was reached")))
    return report(session)


def run_all(session: Session, names: dict[str, Any]) -> dict[str, Any]:
    """`check(candidate)`: one test, all or nothing."""
    try:
        for code in session.plan.statements:
            exec(code, names)
        names["check"](names["candidate"])
    except BaseException as error:  # noqa: BLE001 - the one place where the tests' exceptions are told apart
        if not session.blames_program(error):
            return report(fault=fault(error))
        session.results = [(line_of(error), session.told(shown_error(error)))]
    else:
        session.results = [result for result in session.results if result[1]][:1] or [(1, "")]
    return report(session)


def line_of(error: BaseException) -> int:
    """The innermost line of the tests that an exception came through."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == FILE]
    return lines[-1] if lines else 1


def fault(error: BaseException) -> str:
    """The tests' own fault."""
    return f"the tests themselves failed at line {line_of(error)}: {shown_error(error)}"


def report(session: Session | None = None, fault: str = "") -> dict[str, Any]:
    """The outcome as JSON."""
    results: Sequence[tuple[int, str]] = session.results if session else []
    failed = [
        {"line": line, "test": sound(" ".join(linecache.getline(FILE, line).split())[:200]), "how": sound(how[:600])}
        for line, how in results
        if how
    ]
    held = len(results) - len(failed)
    return {"held": held, "total": len(results), "failures": failed[:SHOWN], "fault": sound(fault)}


def sound(text: str) -> str:
    """``text`` without lone surrogates, which no file and no database takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
