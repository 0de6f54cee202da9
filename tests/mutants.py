"""A small mutation run: break one operator, number or word of a module at a time, and see that some check fails."""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


def sites(tree: ast.Module) -> Iterator[tuple[ast.AST, Callable[[ast.AST], None], str]]:
    """Every place that can be broken, how, and what that is called. Docstrings and annotations are left alone."""
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        for node in (inner for statement in function.body for inner in ast.walk(statement)):
            line = getattr(node, "lineno", 0)
            if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
                yield node, lambda n: setattr(n, "op", SWAPS[type(n.op)]()), f"{line}: {type(node.op).__name__}"
            if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
                yield (
                    node,
                    lambda n: setattr(n, "ops", [SWAPS[type(n.ops[0])]()]),
                    f"{line}: {type(node.ops[0]).__name__}",
                )
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert):
                yield node, lambda n: setattr(n, "op", ast.UAdd() if isinstance(n.op, ast.USub) else ast.Invert()), ""
            if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
                if isinstance(node.value, bool):
                    yield node, lambda n: setattr(n, "value", not n.value), f"{line}: {node.value}"
                else:
                    yield node, lambda n: setattr(n, "value", n.value + 1), f"{line}: {node.value}"
            if isinstance(node, ast.Call) and len(node.args) == 3 and getattr(node.func, "attr", "") == "where":
                yield node, _swap_branches, f"{line}: where"


def _swap_branches(node: ast.AST) -> None:
    assert isinstance(node, ast.Call)
    node.args[1], node.args[2] = node.args[2], node.args[1]


def survivors(module: ModuleType, checks: Sequence[Callable[[ModuleType], None]]) -> tuple[list[str], int]:
    """The mutants that no check notices, and how many were made."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    original = ast.parse(source)
    number = sum(1 for _ in sites(original))
    alive, made = [], 0
    for place in range(number):
        tree = copy.deepcopy(original)
        node, change, name = list(sites(tree))[place]
        if not name:  # ~x becomes x: the operator goes, the operand stays
            name = f"{getattr(node, 'lineno', 0)}: unary"
            assert isinstance(node, ast.UnaryOp)
            node.op = ast.UAdd() if isinstance(node.op, ast.USub) else ast.Not()
            if isinstance(node.op, ast.Not):
                node.op, node.operand = ast.Invert(), ast.UnaryOp(op=ast.Invert(), operand=node.operand)
        else:
            change(node)
        if ast.dump(tree) == ast.dump(original):
            continue
        made += 1
        mutant = ModuleType(module.__name__)
        exec(compile(ast.fix_missing_locations(tree), f"<mutant {name}>", "exec"), mutant.__dict__)
        if not _caught(mutant, checks):
            alive.append(f"{name}: {source.splitlines()[getattr(node, 'lineno', 1) - 1].strip()}")
    return alive, made


def _caught(mutant: ModuleType, checks: Sequence[Callable[[ModuleType], None]]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for check in checks:
            try:
                check(mutant)
            except Exception:
                return True
    return False
