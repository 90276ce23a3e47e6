"""Losses of single answers that are labelled desirable or undesirable; a pair is one of each.

Letters as in ``pairwise``. An example holds one or more labelled answers (rows) to its prompt: its value is the mean
over its rows and its weight their number, so that the optimiser batch's mean is over all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dppo.losses.pairwise import reference_of
from dppo.losses.ranges import check_not_negative, check_positive
from dppo.types import LossContext, LossTerms, ResponseLogps, Role, Shape

DESIRABLE: tuple[Role, ...] = ("chosen", "desirable")
UNDESIRABLE: tuple[Role, ...] = ("rejected", "undesirable")


@dataclass(frozen=True)
class KTO:
    """Kahneman-Tversky optimisation.

    Paper: Ethayarajh 2024, arXiv 2402.01306, eq. 7 and 8
    Formula:
        lambda (1 - sigmoid(x))                value=sigmoid, as in the paper
        -lambda log sigmoid(x)                 value=log_sigmoid
        -lambda x                              value=identity
        x = beta (s - s^r) - z                 a desirable row, lambda = desirable_weight
        x = z - beta (s - s^r)                 an undesirable row, lambda = undesirable_weight
        z = beta max(0, KL)
    Length: sums
    At policy = reference: a row has lambda / 2 (``sigmoid``), lambda ln 2 (``log_sigmoid``) or 0 (``identity``)
    Bounds: in [0, larger weight] for ``sigmoid``, >= 0 for ``log_sigmoid``, unbounded below for ``identity``
    Elsewhere: a widely copied table prints the undesirable row with the other sign, which raises rejected answers.
        ``z_scope: micro_batch`` is for parity with TRL: y' is the answer of the row before in the batch, and z is
        that of each micro-batch.
    Rewards: beta (s - s^r), absent for a kind that the example has no row of
    Metrics: ``kl``, the estimate held at 0 (nats)
    State: (1,), that KL; in evaluations z is the last training batch's

    Mean over the rows of both kinds. KL is the mean of s(y'|x) - s^r(y'|x) over rows of the optimiser batch of all
    processes, without gradient, held at 0 after averaging; y' is an answer to another prompt, drawn once for each row.
    ``z0: zero`` sets z = 0 and needs no such answers. ``one_per_prompt`` trains on one row of each prompt, drawn once,
    as the paper does to show that pairs are not needed.

    With n_w desirable and n_l undesirable rows the paper wants desirable_weight n_w / (undesirable_weight n_l) in
    [1, 4/3].
    """

    name: ClassVar[str] = "kto"
    uses_reference: ClassVar[bool] = True
    uses_roles: ClassVar[tuple[Role, ...]] = ()
    trains_on: ClassVar[Shape] = "labelled"
    beta: float
    desirable_weight: float
    undesirable_weight: float
    value: Literal["sigmoid", "log_sigmoid", "identity"]
    z0: Literal["kl", "zero"]
    z_scope: Literal["optimiser_batch", "micro_batch"]
    one_per_prompt: bool

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_not_negative("desirable_weight", self.desirable_weight)
        check_not_negative("undesirable_weight", self.undesirable_weight)

    @property
    def uses_statistics(self) -> bool:
        return self.z0 == "kl"

    @property
    def statistics_scope(self) -> Literal["optimiser_batch", "micro_batch"]:
        """Over which rows z is taken, and so how often it changes."""
        return self.z_scope

    @property
    def statistics_roles(self) -> tuple[Role, ...]:
        """The answers to other prompts."""
        return ("mismatched",)

    def balance(self, n_desirable: int, n_undesirable: int) -> str | None:
        """A notice if the weights do not make up for unequal numbers of rows; None if they do."""
        desirable, undesirable = self.desirable_weight * n_desirable, self.undesirable_weight * n_undesirable
        if 3 * undesirable <= 3 * desirable <= 4 * undesirable:
            return None
        low = self.undesirable_weight * n_undesirable / max(n_desirable, 1)
        return (
            f"kto: desirable_weight * {n_desirable} rows is not 1 to 4/3 times undesirable_weight * {n_undesirable} "
            f"rows; with undesirable_weight={self.undesirable_weight:g}, desirable_weight from {low:.3g} to "
            f"{low * 4 / 3:.3g} is"
        )

    def initial_statistics(self) -> Tensor:
        return torch.zeros(1, dtype=torch.float64)

    def partial_statistics(
        self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext
    ) -> Tensor:
        """Sum and number of s - s^r of the answers to other prompts: (2,)."""
        rows = _in_roles(policy, ("mismatched",))
        gaps = (policy.sum - reference_of(reference).sum).detach()[rows].double()
        return torch.stack([gaps.sum(), torch.ones_like(gaps).sum()])

    def update_statistics(self, state: Tensor, totals: Tensor) -> Tensor:
        """max(0, KL) of this batch; the state before where it has no rows."""
        total, number = totals.tolist()
        return state if number == 0 else torch.full_like(state, max(0.0, total / number))

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        log_ratio = policy.sum - reference_of(reference).sum
        kl = self._kl(context)
        signs, weights = log_ratio.new_zeros(len(policy.roles)), log_ratio.new_zeros(len(policy.roles))
        desirable, undesirable = _in_roles(policy, DESIRABLE), _in_roles(policy, UNDESIRABLE)
        signs[desirable], weights[desirable] = 1.0, self.desirable_weight
        signs[undesirable], weights[undesirable] = -1.0, self.undesirable_weight
        rows = torch.cat([desirable, undesirable])
        if set(policy.example[rows].tolist()) != set(range(policy.n_examples)):
            raise ValueError("every example needs an answer that is chosen, rejected, desirable or undesirable")
        x = signs * (self.beta * log_ratio - self.beta * kl)
        values = weights * self._value(x)
        owner = policy.example[rows]
        zeros = log_ratio.new_zeros(policy.n_examples)
        number = zeros.index_add(0, owner, torch.ones_like(values[rows])).detach()
        reward = self.beta * log_ratio.detach()
        return LossTerms(
            zeros.index_add(0, owner, values[rows]) / number,
            number,
            rewards={
                "chosen": policy.mean_by_example(reward, DESIRABLE),
                "rejected": policy.mean_by_example(reward, UNDESIRABLE),
            },
            metrics={"kl": torch.full_like(zeros, kl)},
        )

    def _value(self, x: Tensor) -> Tensor:
        if self.value == "sigmoid":
            return torch.sigmoid(-x)  # 1 - sigmoid(x), without the rounding of the difference
        return -F.logsigmoid(x) if self.value == "log_sigmoid" else -x

    def _kl(self, context: LossContext) -> float:
        if self.z0 == "zero":
            return 0.0
        if context.statistics is None:
            raise ValueError("this loss declares uses_statistics: the context must hold them")
        return float(context.statistics)


def _in_roles(logps: ResponseLogps, roles: tuple[Role, ...]) -> Tensor:
    """Indices of the responses in any of ``roles``."""
    places = [place for place, role in enumerate(logps.roles) if role in roles]
    return torch.tensor(places, dtype=torch.int64, device=logps.lengths.device)
