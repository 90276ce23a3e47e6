"""An objective that keeps a statistic of the optimiser batch, to test the loop with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dppo.types import LossContext, LossTerms, ResponseLogps, Role, Shape


@dataclass(frozen=True)
class RunningMargin:
    """softplus(M - margin) with margin = m_w - m_l and M its moving average over optimiser batches, updated first.

    State (2,): the number of updates, M. M starts at 0 and moves half of the way at every update.
    """

    name: ClassVar[str] = "running_margin"
    uses_reference: ClassVar[bool] = False
    uses_roles: ClassVar[tuple[Role, ...]] = ("chosen", "rejected")
    uses_statistics: ClassVar[bool] = True
    trains_on: ClassVar[Shape] = "pairs"
    statistics_roles: ClassVar[tuple[Role, ...]] = ("chosen", "rejected")
    statistics_scope: Literal["optimiser_batch", "micro_batch"] = "optimiser_batch"

    def initial_statistics(self) -> Tensor:
        return torch.zeros(2, dtype=torch.float64)

    def partial_statistics(
        self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext
    ) -> Tensor:
        margin = (policy.chosen.mean - policy.rejected.mean).double()
        return torch.stack([margin.sum(), torch.ones_like(margin).sum()])

    def update_statistics(self, state: Tensor, totals: Tensor) -> Tensor:
        return torch.stack([state[0] + 1, 0.5 * state[1] + 0.5 * totals[0] / totals[1]])

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        assert context.statistics is not None
        margin = policy.chosen.mean - policy.rejected.mean
        average = context.statistics[1].to(margin.dtype)
        return LossTerms(
            F.softplus(average - margin),
            torch.ones_like(margin.detach()),
            metrics={
                "updates": context.statistics[0].expand(len(margin)),
                "average": average.expand(len(margin)),
            },
        )
