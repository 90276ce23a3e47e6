"""Modules with one wrong formula each, to prove that a test would notice it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from types import ModuleType

OPPOSITE: dict[type[ast.operator], ast.operator] = {
    ast.Add: ast.Sub(),
    ast.Sub: ast.Add(),
    ast.Mult: ast.Add(),
    ast.Div: ast.Mult(),
}
REVERSED: dict[type[ast.cmpop], ast.cmpop] = {ast.Lt: ast.Gt(), ast.LtE: ast.Gt(), ast.Gt: ast.Lt(), ast.GtE: ast.Lt()}


def is_hyperparameter(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def changes(node: ast.AST) -> Iterator[str]:
    """Change ``node`` in place into one wrong formula after the other; says what was done."""
    if isinstance(node, ast.BinOp):
        whole, operator, left, right = ast.unparse(node), node.op, node.left, node.right
        if type(operator) in OPPOSITE:
            node.op = OPPOSITE[type(operator)]
            yield f"{whole} -> {ast.unparse(node)}"
            node.op = operator
        if is_hyperparameter(left):
            node.left = ast.Constant(1.0)
            yield f"{whole} without {ast.unparse(left)}"
            node.left = left
        if is_hyperparameter(right):
            node.right = ast.Constant(1.0)
            yield f"{whole} without {ast.unparse(right)}"
            node.right = right
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in REVERSED:
        whole, compared = ast.unparse(node), node.ops[0]
        node.ops[0] = REVERSED[type(compared)]
        yield f"{whole} -> {ast.unparse(node)}"
        node.ops[0] = compared
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node.op = ast.UAdd()
        yield f"-{ast.unparse(node.operand)} without its minus"
        node.op = ast.USub()


def mutants(module: ModuleType) -> Iterator[tuple[str, ast.Module]]:
    """Every module that differs from ``module`` in one operator, minus or dropped hyperparameter of a formula."""
    tree = ast.parse(inspect.getsource(module))
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name != "__post_init__":
            for statement in function.body:
                for node in ast.walk(statement):
                    for change in changes(node):
                        yield f"{module.__name__}.{function.name}: {change}", tree
