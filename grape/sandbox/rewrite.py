"""The tests' source made ready to run: what counts as one test, and which statements touch what the program gave.

Runs inside the sandbox. Standard library only.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType

FILE = "tests.py"
ANNOTATIONS = 0x1000000  # the flag of `from __future__ import annotations`


@dataclass
class Plan:
    """The statements of the tests, the lines of their expectations, and the names that give the program's data."""

    source: str
    sources: set[str]
    checks: bool = False  # HumanEval's form: `check(candidate)`
    statements: list[CodeType] = field(default_factory=list)
    sites: list[int] = field(default_factory=list)
    bound: set[str] = field(default_factory=set)  # names that are given a value anywhere in the tests
    fault: str = ""

    def touches(self, lines: set[int]) -> bool:
        """Whether what the program gave can reach any of the lines."""
        return bool(lines & tainted_lines(ast.parse(self.source), set(self.sources)))


def plan(source: str, entry_point: str | None) -> Plan:
    """Read the tests; SyntaxError or ValueError where they are not Python."""
    tree = ast.parse(source, FILE)
    made = Plan(source, {"call", "run", "candidate"} | ({entry_point} if entry_point else set()))
    made.bound = set(_bound(tree))
    made.checks = any(is_check(statement) for statement in tree.body)
    made.sites = sorted(node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and is_expect(node))
    if made.checks and not entry_point:
        made.fault = "the tests define check(candidate), so the row needs an entry_point"
    elif not made.checks and not made.sites:
        made.fault = "the tests have neither expect(...) nor check(candidate)"
    if not made.checks:
        tree = ast.fix_missing_locations(Rewrite().visit(tree))
    flags = 0
    for statement in tree.body:
        code = compile(ast.Module([statement], []), FILE, "exec", flags=flags, dont_inherit=True)
        flags |= code.co_flags & ANNOTATIONS
        made.statements.append(code)
    return made


def is_check(node: ast.stmt) -> bool:
    """Whether a statement defines HumanEval's `check(candidate)`."""
    if not isinstance(node, ast.FunctionDef) or node.name != "check":
        return False
    positional = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    return positional[: len(positional) - len(node.args.defaults)] == ["candidate"]


def is_expect(node: ast.AST) -> bool:
    """Whether a node is a call of `expect`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "expect"


class Rewrite(ast.NodeTransformer):
    """Keep a failure of the program where it happens, so that the tests after it still run.

    `expect(...)` becomes `with __site__(line): expect(...)`; an assignment whose value fails leaves its names without
    a value, so that each expectation that uses them fails. In a `try` with handlers Python's own rules hold.
    """

    def visit_Try(self, node: ast.Try) -> ast.Try:
        for part in (node.orelse, node.finalbody, *([] if node.handlers else [node.body]), *(
            handler.body for handler in node.handlers
        )):  # fmt: skip
            part[:] = [self.visit(statement) for statement in part]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:
        if not is_expect(node.value):
            return node
        scope = ast.Call(ast.Name("__site__", ast.Load()), [ast.Constant(node.lineno)], [])
        return ast.copy_location(ast.With([ast.withitem(scope)], [node]), node)

    def visit_Assign(self, node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> ast.stmt:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        stored = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        names = sorted({part.id for part in stored if isinstance(part.ctx, ast.Store)})
        if node.value is None or not names or len(names) < len(stored):
            return node
        lose = ast.Expr(ast.Call(ast.Name("__lose__", ast.Load()), [ast.Constant(name) for name in names], []))
        unset: list[ast.stmt] = [
            ast.Assign([ast.Name(name, ast.Store()) for name in names], ast.Constant(None)),
            ast.Delete([ast.Name(name, ast.Del()) for name in names]),
        ]
        handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [lose, *unset])
        return ast.copy_location(ast.Try([node], [handler], [], []), node)

    visit_AugAssign = visit_Assign
    visit_AnnAssign = visit_Assign


def tainted_lines(tree: ast.Module, names: set[str]) -> set[int]:
    """The lines whose outcome may depend on what the program gave, from the names that give it.

    All names of a statement that has a tainted one are taken to be tainted, whatever their scope, and so is all that
    stands under a condition or loop over one. Builtins and imported modules are not, but code made from text may be
    anything.
    """
    clean = ((set(dir(builtins)) - names) | {"expect"} | set(_imported(tree))) - set(_bound(tree))
    if {"exec", "eval", "globals", "locals", "vars"} & set(_names(tree)):
        return set(range(1, 1 + max((node.end_lineno or 0 for node in tree.body), default=0)))
    units = list(_units(tree.body, ()))
    size = -1
    while size < len(names):
        size = len(names)
        for own, body, _ in units:
            if own & names or body & names:
                names |= own - clean
    lines: set[int] = set()
    for own, _, span in units:
        if own & names:
            lines |= set(span)
    return lines


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)


def _units(body: list[ast.stmt], above: tuple[str, ...]) -> Iterator[tuple[set[str], set[str], range]]:
    """Each statement's own names with those of the conditions above it, the names in a function's body, its lines."""
    for statement in body:
        blocks = [child for child in ast.iter_child_nodes(statement) if _is_block(child)]
        header = [child for child in ast.iter_child_nodes(statement) if not _is_block(child)]
        if isinstance(statement, ast.Try):
            header += statement.body  # what stands in its handlers depends on what stands in its body
        own = {name for child in header for name in _names(child)} | set(above)
        last = max([statement.lineno, *(child.end_lineno or 0 for child in header if hasattr(child, "end_lineno"))])
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inside = {name for child in blocks for name in _names(child)}
            yield own | {statement.name}, inside, range(statement.lineno, last + 1)
            yield from _units(statement.body, ())
            continue
        yield own, set(), range(statement.lineno, last + 1)
        nested: list[ast.stmt] = []
        for child in blocks:
            nested += [child] if isinstance(child, ast.stmt) else child.body  # type: ignore[attr-defined]
        yield from _units(nested, tuple(own) if blocks else ())


def _is_block(node: ast.AST) -> bool:
    return isinstance(node, (ast.stmt, ast.ExceptHandler)) or type(node).__name__ == "match_case"


def _names(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.arg):
            yield part.arg


def _bound(tree: ast.Module) -> Iterator[str]:
    """Names that get a value anywhere but by an import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)):
            yield node.name or ""
