"""Every loss against values derived by hand, and proof that the values would notice a wrong formula."""

from __future__ import annotations

import ast
import inspect
import sys
from types import CodeType, ModuleType

import pytest

from dppo.losses import pairwise, penalised, penalties, ranked, sft, unpaired

from .golden import GOLDEN, MODULES, Golden, check, classes
from .mutants import mutants

pytestmark = pytest.mark.filterwarnings("ignore:loss=|penalty=:UserWarning")


@pytest.mark.parametrize("picked", [(0,), (1,), (0, 1), (1, 0, 1)], ids=["A", "B", "AB", "BAB"])
@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.label)
def test_loss_returns_the_value_derived_by_hand(golden: Golden, picked: tuple[int, ...]) -> None:
    check(golden, classes(), picked)


CODE = {module: compile(inspect.getsource(module), module.__name__, "exec") for module in MODULES}


def holds(changed: ModuleType, code: CodeType) -> bool:
    """Whether every golden value holds when ``changed`` is loaded from ``code``, and what imports it anew."""
    first = MODULES.index(changed)
    loaded = list(MODULES[:first])
    try:
        for module in MODULES[first:]:
            fresh = ModuleType(module.__name__)
            sys.modules[module.__name__] = fresh  # where the next module's imports find it
            exec(code if module is changed else CODE[module], fresh.__dict__)
            loaded.append(fresh)
        namespace = classes(loaded)
        for golden in GOLDEN:
            check(golden, namespace, (0, 1))
    except (AssertionError, ArithmeticError, LookupError, RuntimeError, ValueError):
        return False
    finally:
        sys.modules.update({module.__name__: module for module in MODULES})
    return True


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_golden_values_hold_when_an_unchanged_module_is_loaded_anew(module: ModuleType) -> None:
    assert holds(module, CODE[module])


@pytest.mark.parametrize(
    ("module", "at_least"),
    [(sft, 1), (pairwise, 60), (penalties, 10), (penalised, 25), (ranked, 8), (unpaired, 15)],
    ids=lambda value: value.__name__ if isinstance(value, ModuleType) else "",
)
def test_golden_values_notice_every_changed_operator_and_dropped_hyperparameter(
    module: ModuleType, at_least: int
) -> None:
    tried, survivors = 0, []
    for label, changed in mutants(module):
        tried += 1
        if holds(module, compile(ast.fix_missing_locations(changed), module.__name__, "exec")):
            survivors.append(label)
    assert survivors == []
    assert tried >= at_least
