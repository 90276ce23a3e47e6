"""The strength f(r) of the penalty on a generated answer, from how wrongly the policy ranks the pair.

r is the policy's log-prob margin between chosen and rejected answer in nats (``PenalisedLoss.margin`` says which
one): negative where the policy ranks the pair wrongly. Every f is 0 at r = 0.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dppo.losses.ranges import check_inside

# Keeps the slope of the square root finite where r is 0 or positive.
SQRT_EPSILON = 1e-6


@dataclass(frozen=True)
class Penalty(ABC):
    """A penalty strength f(r)."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, r: Tensor, *, differentiable: bool) -> Tensor:
        """f(r), (M,), from the margins ``r`` (M,) in nats.

        ``differentiable`` says that gradients will flow through ``r``; the gate 1{r < 0} never has one.
        """


@dataclass(frozen=True)
class Linear(Penalty):
    """In proportion to how wrongly the pair is ranked.

    Formula: f(r) = 1{r < 0} (-r)
    Bounds: in [0, inf)
    """

    name: ClassVar[str] = "linear"

    def __call__(self, r: Tensor, *, differentiable: bool) -> Tensor:
        return torch.relu(-r)


@dataclass(frozen=True)
class Quadratic(Penalty):
    """With the square of how wrongly the pair is ranked.

    Formula: f(r) = 1{r < 0} r^2
    Bounds: in [0, inf)
    """

    name: ClassVar[str] = "quadratic"

    def __call__(self, r: Tensor, *, differentiable: bool) -> Tensor:
        return torch.relu(-r).square()


@dataclass(frozen=True)
class Sqrt(Penalty):
    """With the square root of how wrongly the pair is ranked.

    Formula:
        f(r) = 1{r < 0} (-r)^0.5                     detach=true
        f(r) = 1{r < 0} (max(-r, 0) + 1e-6)^0.5      detach=false
    Bounds: in [0, inf)

    The slope of the plain root is infinite at 0, which would make the gradient of every pair with r >= 0 NaN.
    """

    name: ClassVar[str] = "sqrt"

    def __call__(self, r: Tensor, *, differentiable: bool) -> Tensor:
        if not differentiable:
            return torch.relu(-r).sqrt()
        return (torch.relu(-r) + SQRT_EPSILON).sqrt() * (r < 0)


@dataclass(frozen=True)
class Constant(Penalty):
    """Every wrongly ranked pair counts alike.

    Formula: f(r) = 1{r < 0}
    Bounds: 0 or 1
    Elsewhere: one of the four of the work that followed the DPPO poster, which does not say which its best runs used.
    """

    name: ClassVar[str] = "constant"

    def __call__(self, r: Tensor, *, differentiable: bool) -> Tensor:
        return (r < 0).to(r.dtype)


@dataclass(frozen=True)
class Expectile(Penalty):
    """The expectile loss, open on both sides of 0.

    Paper: Newey and Powell 1987
    Formula:
        f(r) = |zeta - 1{r < 0}| r^2      form=absolute
        f(r) = (zeta - 1{r < 0}) r^2      form=literal
    Bounds: in [0, inf); ``literal`` unbounded on both sides
    Elsewhere: the DPPO poster prints ``literal``: negative for r < 0, so it rewards the generated answer exactly where
        the policy ranks wrongly; it warns.

    ``zeta`` in (0, 1) weighs r > 0; 1 - zeta weighs r < 0.
    """

    name: ClassVar[str] = "expectile"
    zeta: float
    form: Literal["absolute", "literal"]

    def __post_init__(self) -> None:
        check_inside("zeta", self.zeta, 0, 1)
        if self.form == "literal":
            warnings.warn(
                "penalty=expectile with form=literal: f(r) is negative where the pair is ranked wrongly, so it rewards "
                "the generated answer there; form=absolute penalises it",
                stacklevel=2,
            )

    def __call__(self, r: Tensor, *, differentiable: bool) -> Tensor:
        weight = self.zeta - (r < 0).to(r.dtype)
        if self.form == "absolute":
            weight = weight.abs()
        return weight * r.square()
