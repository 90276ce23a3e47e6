"""Supervised fine-tuning on chosen answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dppo.types import LossContext, LossTerms, ResponseLogps, Role, Shape


@dataclass(frozen=True)
class SFT:
    """Negative log-likelihood: -(sum_b s_b) / (sum_b |y_b|), one token mean over the optimiser batch.

    value (M,) = -m in nats per token, weight (M,) = |y| in tokens, so that the loop's weighted mean over all
    micro-batches and ranks is the token mean, not a mean of row means. Response tokens only. >= 0.
    """

    name: ClassVar[str] = "sft"
    uses_reference: ClassVar[bool] = False
    uses_roles: ClassVar[tuple[Role, ...]] = ("chosen",)
    uses_statistics: ClassVar[bool] = False
    trains_on: ClassVar[Shape] = "pairs"

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        chosen = policy.chosen
        return LossTerms(value=-chosen.mean, weight=chosen.lengths.to(chosen.mean.dtype))
