"""Losses of any number of ranked answers to one prompt.

Letters as in ``pairwise``; r_i is the score of answer i. A pair is a group of two: chosen above rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dppo.losses.ranges import check_not_negative
from dppo.types import LossContext, LossTerms, ResponseLogps, Role, Shape


@dataclass(frozen=True)
class RRHF:
    """Rank responses to align with human feedback.

    Paper: Yuan 2023, arXiv 2304.05302, eq. 2 to 4
    Formula: sum over i, j with r_i < r_j of max(0, m_i - m_j), plus lambda_ (-s_best)
    Length: mean in the rank term, sum in the likelihood
    Bounds: >= 0
    Elsewhere: the authors' code averages the likelihood term over tokens and adds one group at a time.
    Rewards: m of the best and of the worst answer (nats per token)
    Metrics: ``ranked_accuracy``, the share of the pairs with different scores that m orders alike, equal m counting
        1/2 (absent for a group of ties), and ``n_ranked_pairs``, their number

    A group has K >= 2 answers; best is the largest score, the first of equals. Ties are skipped; the rank term is not
    divided by the number of its pairs. Mean over groups. Scores count by their order only.
    """

    name: ClassVar[str] = "rrhf"
    uses_reference: ClassVar[bool] = False
    uses_roles: ClassVar[tuple[Role, ...]] = ()
    uses_statistics: ClassVar[bool] = False
    trains_on: ClassVar[Shape] = "ranked"
    lambda_: float

    def __post_init__(self) -> None:
        check_not_negative("lambda_", self.lambda_)

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        owner, mean = policy.example, policy.mean
        rank = ranks(policy, context)
        lower, higher = ordered_pairs(owner, rank)
        group = owner[lower]
        zeros = mean.new_zeros(policy.n_examples)
        wrong = zeros.index_add(0, group, torch.relu(mean[lower] - mean[higher]))
        best = first_of_largest(owner, rank, policy.n_examples)
        worst = first_of_largest(owner, -rank, policy.n_examples)
        value = wrong - self.lambda_ * policy.sum[best]
        right = (torch.sign(mean[higher] - mean[lower]).detach() + 1) / 2
        n_pairs = zeros.index_add(0, group, torch.ones_like(right))
        return LossTerms(
            value,
            torch.ones_like(zeros),
            rewards={"chosen": mean[best].detach(), "rejected": mean[worst].detach()},
            metrics={"ranked_accuracy": zeros.index_add(0, group, right) / n_pairs, "n_ranked_pairs": n_pairs},
        )


def ranks(policy: ResponseLogps, context: LossContext) -> Tensor:
    """What each answer is ranked by (R,): its score, or 1 and 0 for the chosen and the rejected answer of a pair.

    Raises ValueError for an answer that has neither.
    """
    by_role = {"chosen": 1.0, "rejected": 0.0}
    known = torch.tensor([by_role.get(role, torch.nan) for role in policy.roles], device=context.scores.device)
    scored = torch.tensor([role == "ranked" for role in policy.roles], device=context.scores.device)
    found = torch.where(scored, context.scores, known)
    if bool(found.isnan().any()):
        raise ValueError("every answer must be ranked by a score, or be the chosen or the rejected one of a pair")
    return found


def ordered_pairs(owner: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (P,) and (P,) of answers of one group of which the first ranks below the second; ties are left out."""
    same = owner[:, None] == owner[None, :]
    lower, higher = torch.nonzero(same & (rank[:, None] < rank[None, :]), as_tuple=True)
    return lower, higher


def first_of_largest(owner: Tensor, rank: Tensor, n_examples: int) -> Tensor:
    """The index (M,) of the answer with the largest rank in each group, the first one of equals."""
    top = rank.new_full((n_examples,), -torch.inf).scatter_reduce(0, owner, rank, "amax")
    places = torch.arange(len(rank), device=rank.device)
    candidates = torch.where(rank == top[owner], places, len(rank))
    return torch.full_like(top, len(rank), dtype=torch.int64).scatter_reduce(0, owner, candidates, "amin")
