"""Losses of a chosen answer y_w and a rejected answer y_l to the same prompt.

Letters as in the papers: s_y = log pi(y | x) (nats, response tokens only), m_y = s_y / |y|, ^r under the reference
model, Delta = (s_w - s_l) - (s_w^r - s_l^r), M pairs. Every loss is averaged over all pairs of the optimiser batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dppo.errors import UserError
from dppo.losses.log1mexp import log1mexp
from dppo.losses.ranges import check_fraction, check_label_smoothing, check_not_negative, check_positive
from dppo.types import LossContext, LossTerms, ResponseLogps, Role, Shape


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
    trains_on: ClassVar[Shape] = "pairs"

    @abstractmethod
    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        """One value and weight 1 per pair."""

    def extra(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor | None:
        """What is added to the preference term: (M,), or None for nothing."""
        return None

    def plus_extra(
        self, value: Tensor, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext
    ) -> Tensor:
        """``value`` (M,) plus the extra term, bit for bit ``value`` where there is none."""
        extra = self.extra(policy, reference, context)
        return value if extra is None else value + extra

    @property
    def statistics_scope(self) -> Literal["optimiser_batch", "micro_batch"]:
        """Over which examples the statistics are taken, and so how often they are updated."""
        return "optimiser_batch"

    @property
    def statistics_roles(self) -> tuple[Role, ...]:
        """The responses that the statistics are taken of."""
        return self.uses_roles

    def initial_statistics(self) -> Tensor:
        """The state before the first step; empty for a loss without statistics."""
        return torch.zeros(0, dtype=torch.float64)

    def partial_statistics(
        self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext
    ) -> Tensor:
        """Sums over a micro-batch; empty for a loss without statistics."""
        return torch.zeros(0, dtype=torch.float64)

    def update_statistics(self, state: Tensor, totals: Tensor) -> Tensor:
        """The state after a batch with these totals; unchanged for a loss without statistics."""
        return state


@dataclass(frozen=True)
class LogitLoss(PairwiseLoss):
    """-(1 - e) log sigmoid(logit) - e log sigmoid(-logit) (+ an own extra term), e = ``label_smoothing``.

    With e > 0 (Mitchell 2023, "A note on DPO with noisy preferences"; TRL's ``sigmoid`` ignores its
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

    def own_metrics(
        self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext
    ) -> dict[str, Tensor]:
        """Metrics of this loss alone, each (M,), detached."""
        return {}

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
        value = self.plus_extra(self.preference_term(logit), policy, reference, context)
        return LossTerms(
            value,
            torch.ones_like(value.detach()),
            rewards=self.rewards(policy, reference),
            metrics=self.own_metrics(policy, reference, context),
        )

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        return self.terms(self.logit(policy, reference, context), policy, reference, context)


@dataclass(frozen=True)
class SftWeighted(PairwiseLoss):
    """Adds ``sft_weight`` times the chosen answer's negative log-likelihood to a pairwise loss.

    ``nll``: ``mean`` is -m_w per pair, ``token_mean`` is -(sum_b s_w) / (sum_b |y_w|) over the optimiser batch.
    """

    sft_weight: float
    nll: Literal["mean", "token_mean"]

    def __post_init__(self) -> None:
        check_not_negative("sft_weight", self.sft_weight)

    def extra(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor | None:
        """``sft_weight`` * nll (M,), or None at weight 0."""
        return None if self.sft_weight == 0 else self.sft_weight * nll(policy, context, self.nll)


@dataclass(frozen=True)
class SftWeightedLogitLoss(SftWeighted, LogitLoss):
    """A loss of a logit that has no negative log-likelihood of its own."""

    def __post_init__(self) -> None:
        LogitLoss.__post_init__(self)
        SftWeighted.__post_init__(self)


@dataclass(frozen=True)
class DPO(SftWeightedLogitLoss):
    """Direct preference optimisation.

    Paper: Rafailov 2023, arXiv 2305.18290, eq. 7
    Formula: -log sigmoid(beta Delta)
    Length: sums
    At policy = reference: ln 2
    Bounds: >= 0
    Rewards: beta (s - s^r)

    ``sft_weight`` makes it the DPO + SFT baseline of the CPO study (Xu 2024).
    """

    name: ClassVar[str] = "dpo"
    uses_reference: ClassVar[bool] = True

    @property
    def logit_scale(self) -> Literal["sum", "mean"] | None:
        return "sum"

    def logit(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor:
        return self.beta * log_ratio_margin(policy, reference)

    def rewards(self, policy: ResponseLogps, reference: ResponseLogps | None) -> dict[str, Tensor]:
        return log_ratio_rewards(self.beta, policy, reference)


@dataclass(frozen=True)
class DPONorm(SftWeightedLogitLoss):
    """DPO on per-token log-ratios: longer answers weigh no more.

    Paper: Lambert 2024, "Tulu 3", arXiv 2411.15124, section 5
    Formula: -log sigmoid(beta ((m_w - m_w^r) - (m_l - m_l^r)))
    Length: mean
    At policy = reference: ln 2
    Bounds: >= 0
    Elsewhere: TRL calls it ``sigmoid_norm``.
    Rewards: beta (m - m^r)
    """

    name: ClassVar[str] = "dpo_norm"
    uses_reference: ClassVar[bool] = True

    @property
    def logit_scale(self) -> Literal["sum", "mean"] | None:
        return "mean"

    def logit(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor:
        reference = reference_of(reference)
        ours = policy.chosen.mean - policy.rejected.mean
        return self.beta * (ours - (reference.chosen.mean - reference.rejected.mean))

    def rewards(self, policy: ResponseLogps, reference: ResponseLogps | None) -> dict[str, Tensor]:
        reference = reference_of(reference)
        return {
            "chosen": (self.beta * (policy.chosen.mean - reference.chosen.mean)).detach(),
            "rejected": (self.beta * (policy.rejected.mean - reference.rejected.mean)).detach(),
        }


@dataclass(frozen=True)
class RDPO(DPO):
    """DPO with length regularisation.

    Paper: Park 2024, arXiv 2403.19159
    Formula: -log sigmoid(beta Delta + alpha_len (|y_w| - |y_l|))
    Length: sums, and the lengths themselves
    At policy = reference: ln 2 with equal lengths, else -log sigmoid(alpha_len (|y_w| - |y_l|))
    Bounds: >= 0
    Elsewhere: a public copy has a minus sign before alpha_len, another passes batch sizes as lengths; both are wrong.
    Rewards: beta (s - s^r)

    The plus sign follows from the reward r = beta log-ratio + alpha_len |y|: a longer chosen answer needs less
    log-ratio.
    """

    name: ClassVar[str] = "r_dpo"
    alpha_len: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("alpha_len", self.alpha_len)

    def logit(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor:
        logit = super().logit(policy, reference, context)
        longer = (policy.chosen.lengths - policy.rejected.lengths).to(logit.dtype)
        return logit + self.alpha_len * longer


@dataclass(frozen=True)
class DpoPositive(DPO):
    """DPO-Positive: keeps the chosen answer at least as likely as under the reference.

    Paper: Pal 2024, "Smaug", arXiv 2402.13228
    Formula:
        -log sigmoid(beta (Delta - lambda_ max(0, s_w^r - s_w)))      placement=inside, as in the paper
        -log sigmoid(beta Delta) + lambda_ max(0, s_w^r - s_w)        placement=outside, without label smoothing
    Length: sums
    At policy = reference: ln 2, with DPO's gradient
    Bounds: >= 0
    Elsewhere: the printed gradient has the sign of lambda turned on one side.
    Rewards: beta (s - s^r)
    Metrics: ``chosen_below_reference``, where s_w < s_w^r
    """

    name: ClassVar[str] = "dpo_positive"
    lambda_: float
    placement: Literal["inside", "outside"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("lambda_", self.lambda_)
        if self.placement == "outside" and self.label_smoothing > 0:
            raise UserError(
                f"label_smoothing={self.label_smoothing:g}: placement=outside takes none; "
                "set label_smoothing=0 or placement=inside"
            )

    @property
    def logit_scale(self) -> Literal["sum", "mean"] | None:
        return "sum" if self.placement == "inside" else None

    def shortfall(self, policy: ResponseLogps, reference: ResponseLogps | None) -> Tensor:
        """max(0, s_w^r - s_w) (M,), nats; derivative 0 at 0, where every pair starts."""
        return torch.relu(reference_of(reference).chosen.sum - policy.chosen.sum)

    def logit(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor:
        logit = super().logit(policy, reference, context)
        if self.placement == "outside":
            return logit
        return logit - self.beta * self.lambda_ * self.shortfall(policy, reference)

    def extra(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor | None:
        sft = super().extra(policy, reference, context)
        if self.placement == "inside":
            return sft
        kept = self.lambda_ * self.shortfall(policy, reference)
        return kept if sft is None else kept + sft

    def own_metrics(
        self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext
    ) -> dict[str, Tensor]:
        shortfall = self.shortfall(policy, reference).detach()
        return {"chosen_below_reference": (shortfall > 0).to(shortfall.dtype)}


@dataclass(frozen=True)
class IPO(SftWeighted):
    """Identity preference optimisation.

    Paper: Azar 2023, arXiv 2310.12036, eq. 17
    Formula:
        (d - 1 / (2 tau))^2
        d = (m_w - m_w^r) - (m_l - m_l^r)      reduction=mean
        d = Delta                              reduction=sum, as printed
    Length: mean, or sums
    At policy = reference: 1 / (4 tau^2)
    Bounds: >= 0; past d = 1 / (2 tau), where it is 0, the gradient turns its sign
    Elsewhere: ``mean`` is what the authors confirmed and most tools (TRL as well) run. Lengths count response tokens,
        never non-zero log-ratios (0/0 at step 0).
    Rewards: as in TRL, tau times the log-ratio, reduced like d
    """

    name: ClassVar[str] = "ipo"
    uses_reference: ClassVar[bool] = True
    tau: float
    reduction: Literal["mean", "sum"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tau", self.tau)

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        reference = reference_of(reference)
        if self.reduction == "mean":
            chosen = policy.chosen.mean - reference.chosen.mean
            rejected = policy.rejected.mean - reference.rejected.mean
        else:
            chosen = policy.chosen.sum - reference.chosen.sum
            rejected = policy.rejected.sum - reference.rejected.sum
        distance = (chosen - rejected) - 1 / (2 * self.tau)
        return LossTerms(
            self.plus_extra(distance.square(), policy, reference, context),
            torch.ones_like(distance.detach()),
            rewards={"chosen": (self.tau * chosen).detach(), "rejected": (self.tau * rejected).detach()},
        )


@dataclass(frozen=True)
class SLiC(PairwiseLoss):
    """Sequence likelihood calibration.

    Paper: Zhao 2023, arXiv 2305.10425
    Formula: max(0, delta - s_w + s_l) - lambda_ s_w
    Length: sums
    Bounds: >= 0
    Elsewhere: the regulariser is on the chosen answer, one number per pair; a public copy adds a (B,) to a (B, T)
        tensor.
    Rewards: the log-probs s
    """

    name: ClassVar[str] = "slic"
    uses_reference: ClassVar[bool] = False
    delta: float
    lambda_: float

    def __post_init__(self) -> None:
        check_not_negative("delta", self.delta)
        check_not_negative("lambda_", self.lambda_)

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        chosen, rejected = policy.chosen.sum, policy.rejected.sum
        value = torch.relu(self.delta - chosen + rejected) + self.lambda_ * nll(policy, context, "sum")
        return LossTerms(
            value,
            torch.ones_like(value.detach()),
            rewards={"chosen": chosen.detach(), "rejected": rejected.detach()},
        )


@dataclass(frozen=True)
class CPO(LogitLoss):
    """Contrastive preference optimisation.

    Paper: Xu 2024, arXiv 2401.08417
    Formula:
        -log sigmoid(beta (s_w - s_l)) + lambda_ nll
        nll = -m_w                               nll=mean
        nll = -s_w                               nll=sum, as in the paper
        nll = -(sum_b s_w) / (sum_b |y_w|)       nll=token_mean, over the optimiser batch
    Length: sums; nll: mean, sum or token mean
    Bounds: >= 0
    Elsewhere: TRL has ``nll: token_mean``.
    Rewards: beta s
    """

    name: ClassVar[str] = "cpo"
    uses_reference: ClassVar[bool] = False
    lambda_: float
    nll: Literal["mean", "sum", "token_mean"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("lambda_", self.lambda_)

    def logit(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor:
        return self.beta * (policy.chosen.sum - policy.rejected.sum)

    def extra(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor | None:
        return self.lambda_ * nll(policy, context, self.nll)

    def rewards(self, policy: ResponseLogps, reference: ResponseLogps | None) -> dict[str, Tensor]:
        return {
            "chosen": (self.beta * policy.chosen.sum).detach(),
            "rejected": (self.beta * policy.rejected.sum).detach(),
        }


@dataclass(frozen=True)
class ORPO(PairwiseLoss):
    """Odds ratio preference optimisation.

    Paper: Hong 2024, arXiv 2403.07691, eq. 6
    Formula: -m_w - lambda_ log sigmoid(o(m_w) - o(m_l)), log-odds o(u) = u - log(1 - e^u)
    Length: mean
    Bounds: >= 0
    Elsewhere: both terms count response tokens only; TRL's negative log-likelihood counts the prompt too.
    Rewards: as in TRL, lambda_ m
    Metrics: ``log_odds_ratio``

    In log(1 - e^u) alone u is held at -1e-6.
    """

    name: ClassVar[str] = "orpo"
    uses_reference: ClassVar[bool] = False
    lambda_: float

    def __post_init__(self) -> None:
        check_not_negative("lambda_", self.lambda_)

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        chosen, rejected = policy.chosen.mean, policy.rejected.mean
        log_odds_ratio = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
        value = nll(policy, context, "mean") - self.lambda_ * F.logsigmoid(log_odds_ratio)
        return LossTerms(
            value,
            torch.ones_like(value.detach()),
            rewards={
                "chosen": (self.lambda_ * chosen).detach(),
                "rejected": (self.lambda_ * rejected).detach(),
            },
            metrics={"log_odds_ratio": log_odds_ratio.detach()},
        )


@dataclass(frozen=True)
class SimPO(SftWeightedLogitLoss):
    """Simple preference optimisation.

    Paper: Meng 2024, arXiv 2405.14734, eq. 6
    Formula: -log sigmoid(beta m_w - beta m_l - gamma)
    Length: mean, or sums
    Bounds: >= 0
    Elsewhere: the authors' code takes ``gamma_beta_ratio``: gamma = beta * ratio.
    Rewards: beta m (or beta s)

    Exactly one of ``gamma`` and ``gamma_beta_ratio`` is given. ``normalise_by_length: false`` takes s for m, the
    study's ablation.
    """

    name: ClassVar[str] = "simpo"
    uses_reference: ClassVar[bool] = False
    gamma: float | None
    gamma_beta_ratio: float | None
    normalise_by_length: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise UserError(
                f"gamma_beta_ratio={self.gamma_beta_ratio:g}: gamma={self.gamma:g} is given too; "
                "keep one and set the other to null"
            )
        if self.gamma is not None:
            check_not_negative("gamma", self.gamma)
        elif self.gamma_beta_ratio is not None:
            check_not_negative("gamma_beta_ratio", self.gamma_beta_ratio)
        else:
            raise UserError("gamma=null: gamma_beta_ratio is null too; give one of them a number")

    @property
    def target_margin(self) -> float:
        """Gamma: how far beta m_w should be above beta m_l."""
        if self.gamma is not None:
            return self.gamma
        assert self.gamma_beta_ratio is not None
        return self.beta * self.gamma_beta_ratio

    @property
    def logit_scale(self) -> Literal["sum", "mean"] | None:
        return "mean" if self.normalise_by_length else "sum"

    def rewards(self, policy: ResponseLogps, reference: ResponseLogps | None) -> dict[str, Tensor]:
        chosen, rejected = self._scaled(policy)
        return {"chosen": chosen.detach(), "rejected": rejected.detach()}

    def logit(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor:
        chosen, rejected = self._scaled(policy)
        return chosen - rejected - self.target_margin

    def _scaled(self, policy: ResponseLogps) -> tuple[Tensor, Tensor]:
        if self.normalise_by_length:
            return self.beta * policy.chosen.mean, self.beta * policy.rejected.mean
        return self.beta * policy.chosen.sum, self.beta * policy.rejected.sum


@dataclass(frozen=True)
class AlphaDPO(SftWeightedLogitLoss):
    """AlphaDPO: SimPO with a target margin that follows the reference.

    Paper: Wu 2024, arXiv 2410.10148
    Formula:
        -log sigmoid(beta (m_w - m_l) - stopgrad(beta (gamma_ratio + alpha_ref z)))
        z = (u - M) / max(S, 1e-6)
        u = (m_w - m_l) - (m_w^r - m_l^r)
    Length: mean
    At policy = reference: -log sigmoid(beta (m_w^r - m_l^r - gamma_ratio)) in the first step, where u = M = 0
    Bounds: >= 0
    Elsewhere: the authors' averages start at 0 (``bias_correction: false``; here they are divided by 1 - decay^t) and
        run over micro-batches (``stats_scope: micro_batch``).
    Rewards: as in the authors' code, beta (m - alpha_ref (m - m^r))
    Metrics: ``target_margin``
    State: (3,), t and the two averages before correction

    M and S are moving averages, with weight ``decay`` on the past, of mean and n-1 standard deviation (0 for one
    pair) of u over the optimiser batch of all processes; updated before use, frozen in evaluation. z = 0 before any
    update.
    """

    name: ClassVar[str] = "alpha_dpo"
    uses_reference: ClassVar[bool] = True
    uses_statistics: ClassVar[bool] = True
    gamma_ratio: float
    alpha_ref: float
    decay: float
    bias_correction: bool
    stats_scope: Literal["optimiser_batch", "micro_batch"]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("gamma_ratio", self.gamma_ratio)
        check_not_negative("alpha_ref", self.alpha_ref)
        check_fraction("decay", self.decay)

    @property
    def logit_scale(self) -> Literal["sum", "mean"] | None:
        return "mean"

    @property
    def statistics_scope(self) -> Literal["optimiser_batch", "micro_batch"]:
        return self.stats_scope

    def reference_gap(self, policy: ResponseLogps, reference: ResponseLogps | None) -> Tensor:
        """The policy's margin over the reference's, u (M,), nats per token, detached."""
        reference = reference_of(reference)
        ours = policy.chosen.mean - policy.rejected.mean
        theirs = reference.chosen.mean - reference.rejected.mean
        return (ours - theirs).detach()

    def initial_statistics(self) -> Tensor:
        return torch.zeros(3, dtype=torch.float64)

    def partial_statistics(
        self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext
    ) -> Tensor:
        """Number, sum and sum of squares of u: (3,)."""
        u = self.reference_gap(policy, reference).double()
        return torch.stack([torch.ones_like(u).sum(), u.sum(), u.square().sum()])

    def update_statistics(self, state: Tensor, totals: Tensor) -> Tensor:
        number, total, squares = totals.tolist()
        if number == 0:
            return state
        mean = total / number
        variance = max(0.0, squares - total * mean) / (number - 1) if number > 1 else 0.0
        found = torch.tensor([mean, math.sqrt(variance)], dtype=state.dtype, device=state.device)
        return torch.cat([state[:1] + 1, self.decay * state[1:] + (1 - self.decay) * found])

    def target(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor:
        """The target margin beta (gamma_ratio + alpha_ref z), (M,), detached."""
        if context.statistics is None:
            raise ValueError("this loss declares uses_statistics: the context must hold them")
        u = self.reference_gap(policy, reference)
        updates, mean, deviation = context.statistics.tolist()
        if updates == 0:
            return torch.full_like(u, self.beta * self.gamma_ratio)
        correction = 1 - self.decay**updates if self.bias_correction else 1.0
        z = (u - mean / correction) / max(deviation / correction, 1e-6)
        target: Tensor = self.beta * (self.gamma_ratio + self.alpha_ref * z)
        return target

    def logit(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor:
        margin = policy.chosen.mean - policy.rejected.mean
        return self.beta * margin - self.target(policy, reference, context)

    def rewards(self, policy: ResponseLogps, reference: ResponseLogps | None) -> dict[str, Tensor]:
        reference = reference_of(reference)
        return {
            role: (self.beta * (ours.mean - self.alpha_ref * (ours.mean - theirs.mean))).detach()
            for role, ours, theirs in (
                ("chosen", policy.chosen, reference.chosen),
                ("rejected", policy.rejected, reference.rejected),
            )
        }

    def own_metrics(
        self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext
    ) -> dict[str, Tensor]:
        return {"target_margin": self.target(policy, reference, context)}
