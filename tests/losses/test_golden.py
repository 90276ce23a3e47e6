"""Every loss against values derived by hand, and proof that the values would notice a wrong formula."""

from __future__ import annotations

import ast
import inspect
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest

from dppo.losses import pairwise, penalised, penalties, sft

from .golden import GOLDEN, Golden, check, classes

pytestmark = pytest.mark.filterwarnings("ignore:loss=|penalty=:UserWarning")


@pytest.mark.parametrize("picked", [(0,), (1,), (0, 1), (1, 0, 1)], ids=["A", "B", "AB", "BAB"])
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.label)
def test_loss_returns_the_value_derived_by_hand(golden: Golden, picked: tuple[int, ...]) -> None:
    check(golden, classes(), picked)


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


def survives(changed: ast.Module, name: str) -> bool:
    """Whether every golden value still holds for the changed module."""
    mutated = ModuleType(name)
    sys.modules[name] = mutated  # dataclasses look their module up
    try:
        exec(compile(ast.fix_missing_locations(changed), name, "exec"), mutated.__dict__)
        namespace = classes(mutated)
        for golden in GOLDEN:
            check(golden, namespace, (0, 1))
    except Exception:  # a mutant that cannot even run is noticed too
        return False
    finally:
        del sys.modules[name]
    return True


@pytest.mark.parametrize(
    ("module", "at_least"),
    [(sft, 1), (pairwise, 20), (penalties, 10), (penalised, 15)],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else "",
)
def test_golden_values_notice_every_changed_operator_and_dropped_hyperparameter(
    module: ModuleType, at_least: int
) -> None:
    tried, survivors = 0, []
    unchanged = ast.parse(inspect.getsource(module))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert survives(unchanged, f"unchanged_{module.__name__}")
        for label, changed in mutants(module):
            tried += 1
            if survives(changed, f"mutated_{module.__name__}"):
                survivors.append(label)
    assert survivors == []
    assert tried >= at_least
