"""Losses of a chosen answer y_w and a rejected answer y_l to the same prompt.

Letters as in the papers: s_y = log pi(y | x) (nats, response tokens only), m_y = s_y / |y|, ^r under the reference
model, Delta = (s_w - s_l) - (s_w^r - s_l^r), M pairs. Every loss is averaged over all pairs of the optimiser batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dppo.losses.ranges import check_label_smoothing, check_not_negative, check_positive
from dppo.types import LossContext, LossTerms, ResponseLogps, Role


def reference_of(reference: ResponseLogps | None) -> ResponseLogps:
    """The reference's log-probs, for a loss that declares ``uses_reference``.

    Raises ValueError if the caller left them out.
    """
    if reference is None:
        raise ValueError("this loss declares uses_reference: the reference's log-probs must be given")
    return reference


def log_ratio_margin(policy: ResponseLogps, reference: ResponseLogps | None) -> Tensor:
    """Delta (M,), nats."""
    reference = reference_of(reference)
    return (policy.chosen.sum - policy.rejected.sum) - (reference.chosen.sum - reference.rejected.sum)


def log_ratio_rewards(beta: float, policy: ResponseLogps, reference: ResponseLogps | None) -> dict[str, Tensor]:
    """Implicit rewards beta (s - s^r) of both answers, detached, each (M,)."""
    reference = reference_of(reference)
    return {
        "chosen": (beta * (policy.chosen.sum - reference.chosen.sum)).detach(),
        "rejected": (beta * (policy.rejected.sum - reference.rejected.sum)).detach(),
    }


def generated_after(logps: ResponseLogps, skip: Tensor | None) -> ResponseLogps:
    """The generated answers (M responses) without their first ``skip`` (M,) tokens; None keeps every token."""
    return logps.generated if skip is None else logps.generated.without_prefix(skip)


def nll(policy: ResponseLogps, context: LossContext, reduction: Literal["mean", "sum", "token_mean"]) -> Tensor:
    """Negative log-likelihood (M,) of the chosen answers, in nats, response tokens only.

    ``mean``: -m_w of each pair; ``sum``: -s_w; ``token_mean``: -s_w over the mean number of chosen tokens of the
    optimiser batch, so that the mean over pairs is -(sum_b s_w) / (sum_b |y_w|).
    """
    if reduction == "mean":
        return -policy.chosen.mean
    if reduction == "sum":
        return -policy.chosen.sum
    return -policy.chosen.sum / context.mean_chosen_tokens


@dataclass(frozen=True)
class PairwiseLoss(ABC):
    """A loss of pairs, usable as the base of a penalised loss."""

    name: ClassVar[str]
    uses_reference: ClassVar[bool]
    uses_roles: ClassVar[tuple[Role, ...]] = ("chosen", "rejected")
    uses_statistics: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        """One value and weight 1 per pair."""


@dataclass(frozen=True)
class LogitLoss(PairwiseLoss):
    """-(1 - e) log sigmoid(logit) - e log sigmoid(-logit) (+ an own extra term), e = ``label_smoothing``.

    With e > 0 (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3; TRL's ``sigmoid`` ignores its
    ``label_smoothing``) the gradient turns its sign at logit = log((1 - e) / e). >= 0.
    """

    beta: float
    label_smoothing: float

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)
        check_label_smoothing(self.label_smoothing)

    @property
    def logit_scale(self) -> Literal["sum", "mean"] | None:
        """Whether the logit holds log-probs of whole answers or per token; None: no generated answer fits into it."""
        return None

    @abstractmethod
    def logit(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor:
        """The argument of the sigmoid (M,), beta included."""

    @abstractmethod
    def rewards(self, policy: ResponseLogps, reference: ResponseLogps | None) -> dict[str, Tensor]:
        """Implicit rewards, detached: ``chosen`` and ``rejected``, each (M,)."""

    def extra(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor | None:
        """What is added to the term of the logit: (M,), or None for nothing."""
        return None

    def generated_gap(self, policy: ResponseLogps, reference: ResponseLogps | None, skip: Tensor | None) -> Tensor:
        """The generated answer's log-ratio (M,) on the scale of the logit: s_g - s_g^r or m_g - m_g^r, nats.

        ``skip`` (M,) leaves out that many leading tokens. Only where ``logit_scale`` is not None.
        """
        ours, theirs = generated_after(policy, skip), generated_after(reference_of(reference), skip)
        return ours.mean - theirs.mean if self.logit_scale == "mean" else ours.sum - theirs.sum

    def preference_term(self, logit: Tensor) -> Tensor:
        """The smoothed -log sigmoid of ``logit``, both (M,)."""
        smoothing = self.label_smoothing
        return -(1 - smoothing) * F.logsigmoid(logit) - smoothing * F.logsigmoid(-logit)

    def terms(
        self, logit: Tensor, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext
    ) -> LossTerms:
        """The loss at ``logit`` (M,), which a penalised loss may have shifted."""
        value = self.preference_term(logit)
        extra = self.extra(policy, reference, context)
        if extra is not None:
            value = value + extra
        return LossTerms(value, torch.ones_like(value.detach()), rewards=self.rewards(policy, reference))

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        return self.terms(self.logit(policy, reference, context), policy, reference, context)


@dataclass(frozen=True)
class SftWeighted:
    """Adds ``sft_weight`` times the chosen answer's negative log-likelihood to a pairwise loss.

    ``nll``: ``mean`` is -m_w per pair, ``token_mean`` is -(sum_b s_w) / (sum_b |y_w|) over the optimiser batch.
    """

    sft_weight: float
    nll: Literal["mean", "token_mean"]

    def extra(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor | None:
        """``sft_weight`` * nll (M,), or None at weight 0."""
        return None if self.sft_weight == 0 else self.sft_weight * nll(policy, context, self.nll)


@dataclass(frozen=True)
class DPO(SftWeighted, LogitLoss):
    """Direct preference optimisation: -log sigmoid(beta Delta) (Rafailov 2023, arXiv 2305.18290, eq. 7).

    beta > 0, per nat. At policy = reference: ln 2. Rewards: beta (s - s^r). ``sft_weight`` makes it the DPO + SFT
    baseline of the CPO study (Xu 2024).
    """

    name: ClassVar[str] = "dpo"
    uses_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("sft_weight", self.sft_weight)

    @property
    def logit_scale(self) -> Literal["sum", "mean"] | None:
        return "sum"

    def logit(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor:
        return self.beta * log_ratio_margin(policy, reference)

    def rewards(self, policy: ResponseLogps, reference: ResponseLogps | None) -> dict[str, Tensor]:
        return log_ratio_rewards(self.beta, policy, reference)
