"""The loss of a reward model: which of two answers people prefer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from dppo.types import LossContext, LossTerms, ResponseLogps, Role, Shape


@dataclass(frozen=True)
class PreferenceLikelihood:
    """The negative log-likelihood of a preference under the model of Bradley and Terry (1952).

    Formula: -log sigmoid(r_w - r_l - margin (s_w - s_l)) + centring (r_w + r_l)^2
    Length: each answer has one reward, whatever its length
    Bounds: >= 0
    Elsewhere: Ouyang 2022, eq. 1 with K = 2; the margin is that of Touvron 2023, eq. 2, with the difference of the
    scores s in the data as m(r); the second term is the reward centring of Eisenstein 2023.

    r = ``policy.sum`` are rewards (``ResponseRewards``), not log-probs. value (M,), weight (M,) = 1 a pair. Where
    ``margin`` is not 0 every answer needs a score; the value of a pair without them is NaN.
    """

    margin: float
    centring: float

    name: ClassVar[str] = "bradley_terry"
    uses_reference: ClassVar[bool] = False
    uses_roles: ClassVar[tuple[Role, ...]] = ("chosen", "rejected")
    uses_statistics: ClassVar[bool] = False
    trains_on: ClassVar[Shape] = "pairs"

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        chosen, rejected = policy.chosen.sum, policy.rejected.sum
        gap = chosen - rejected
        if self.margin:
            wanted = (
                policy.mean_by_example(context.scores, roles=(role,)).to(gap.dtype) for role in ("chosen", "rejected")
            )
            better, worse = wanted
            gap = gap - self.margin * (better - worse)
        value = -F.logsigmoid(gap)
        if self.centring:
            value = value + self.centring * (chosen + rejected).square()
        return LossTerms(
            value=value,
            weight=gap.new_ones(len(gap)),
            rewards={"chosen": chosen.detach(), "rejected": rejected.detach()},
        )
