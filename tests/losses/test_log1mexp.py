"""log(1 - e^u) in single precision, where the naive formula loses its digits or its gradient."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from dppo.losses import log1mexp

from .mutants import mutants

U = [-1e-6, -1e-5, -1e-3, -0.1, -0.5, -math.log(2), -0.7, -1.0, -5.0, -20.0, -80.0, -1e4]


def check_precision(function: Callable[[Tensor], Tensor]) -> None:
    """Single precision agrees with the exact value, here from whichever form is exact in double precision."""
    exact = [math.log(-math.expm1(u)) if u > -1 else math.log1p(-math.exp(u)) for u in U]
    found = function(torch.tensor(U, dtype=torch.float32))
    torch.testing.assert_close(found, torch.tensor(exact, dtype=torch.float32), rtol=1e-6, atol=0)


def check_clamp(function: Callable[[Tensor], Tensor]) -> None:
    """From -1e-6 up to 0 (and above, where rounding put a log-prob) it is log(1e-6) without a gradient."""
    u = torch.tensor([-5e-7, 0.0, 1e-7], requires_grad=True)
    value = function(u)
    value.sum().backward()
    torch.testing.assert_close(value, torch.full((3,), -13.8155))
    assert u.grad is not None and u.grad.tolist() == [0.0, 0.0, 0.0]


def test_single_precision_is_exact() -> None:
    check_precision(log1mexp.log1mexp)


def test_certain_tokens_are_a_constant() -> None:
    check_clamp(log1mexp.log1mexp)
    assert log1mexp.is_clamped(torch.tensor([-1e-3, -1e-6, -5e-7, 0.0])).tolist() == [False, False, True, True]


def test_gradient_is_finite_everywhere() -> None:
    u = torch.tensor([*U, 0.0], dtype=torch.float32, requires_grad=True)
    log1mexp.log1mexp(u).sum().backward()
    assert u.grad is not None and bool(torch.isfinite(u.grad).all())
    assert bool((u.grad <= 0).all())


def test_gradient_is_the_derivative() -> None:
    u = torch.tensor([-0.01, -0.3, -0.69, -0.7, -2.0, -10.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log1mexp.log1mexp, u)


@pytest.mark.parametrize(("label", "source"), [(label, ast.unparse(tree)) for label, tree in mutants(log1mexp)])
def test_a_wrong_formula_is_noticed(label: str, source: str) -> None:
    changed = ModuleType("changed")
    exec(source, changed.__dict__)
    if label.startswith("dppo.losses.log1mexp.is_clamped"):
        assert changed.is_clamped(torch.tensor([-1e-3, 0.0])).tolist() != [False, True]
        return
    with pytest.raises(AssertionError):
        check_precision(changed.log1mexp)
        check_clamp(changed.log1mexp)
