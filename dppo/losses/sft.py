"""Supervised fine-tuning on chosen answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dppo.types import LossContext, LossTerms, ResponseLogps, Role, Shape


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning on the chosen answers.

    Formula: -(sum_b s_b) / (sum_b |y_b|)
    Length: token mean
    Bounds: >= 0
    Elsewhere: the DPPO poster prints the sum; a mean of row means is another loss.

    value (M,) = -m in nats per token, weight (M,) = |y| in tokens, so that the loop's weighted mean over all
    micro-batches and ranks is one token mean of the optimiser batch. Response tokens only.
    """

    name: ClassVar[str] = "sft"
    uses_reference: ClassVar[bool] = False
    uses_roles: ClassVar[tuple[Role, ...]] = ("chosen",)
    uses_statistics: ClassVar[bool] = False
    trains_on: ClassVar[Shape] = "pairs"

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        chosen = policy.chosen
        return LossTerms(value=-chosen.mean, weight=chosen.lengths.to(chosen.mean.dtype))
