"""Pairwise losses plus alpha f(r) on y_g, the reference model's own greedy answer to the same prompt.

Letters as in ``pairwise``; r is the margin that the penalty strength f looks at. A pair whose generated answer
equals the chosen one, or has no token left behind the shared prefix, has f(r) = 0. Where alpha f(r) is 0 the value
is the base's, bit for bit.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dppo.errors import UserError
from dppo.losses.log1mexp import is_clamped, log1mexp
from dppo.losses.pairwise import LogitLoss, PairwiseLoss, generated_after, log_ratio_margin, reference_of
from dppo.losses.penalties import Penalty
from dppo.losses.ranges import check_not_negative, check_positive
from dppo.types import LossContext, LossTerms, ResponseLogps, Role, Shape


@dataclass(frozen=True)
class PenalisedLoss(ABC):
    """What the penalised losses share: the base, the strength f(r), and which pairs are skipped.

    ``alpha`` >= 0 weighs the penalty. ``margin`` chooses r: ``sum`` s_w - s_l, ``mean`` m_w - m_l, ``implicit``
    Delta (needs the reference; 0 or rounding noise in the first steps). ``detach`` stops gradients through r: with
    them the model can be paid for ranking wrongly, so false warns. ``mask_shared_prefix`` leaves the tokens that
    y_g shares with y_w at its start out of s_g, s_g^r, m_g and |y_g|.
    """

    name: ClassVar[str]
    uses_roles: ClassVar[tuple[Role, ...]] = ("chosen", "rejected", "generated")
    trains_on: ClassVar[Shape] = "pairs"
    alpha: float
    penalty: Penalty
    base: PairwiseLoss
    margin: Literal["sum", "mean", "implicit"]
    detach: bool
    mask_shared_prefix: bool

    def __post_init__(self) -> None:
        check_not_negative("alpha", self.alpha)
        if not self.detach:
            warnings.warn(
                f"loss={self.name} with detach=false: gradients flow through r, which can pay the model for ranking "
                "pairs wrongly, without a lower bound for some penalties; detach=true prevents it",
                stacklevel=2,
            )

    @property
    def uses_reference(self) -> bool:
        return self.base.uses_reference or self.margin == "implicit"

    @property
    def uses_statistics(self) -> bool:
        return self.base.uses_statistics

    @property
    def statistics_scope(self) -> Literal["optimiser_batch", "micro_batch"]:
        return self.base.statistics_scope

    @property
    def statistics_roles(self) -> tuple[Role, ...]:
        return self.base.statistics_roles

    def initial_statistics(self) -> Tensor:
        return self.base.initial_statistics()

    def partial_statistics(
        self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext
    ) -> Tensor:
        return self.base.partial_statistics(policy, reference, context)

    def update_statistics(self, state: Tensor, totals: Tensor) -> Tensor:
        return self.base.update_statistics(state, totals)

    @abstractmethod
    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        """One value and weight 1 per pair."""

    def ranking_margin(self, policy: ResponseLogps, reference: ResponseLogps | None) -> Tensor:
        """The margin r (M,), nats: negative where the pair is ranked wrongly."""
        if self.margin == "implicit":
            return log_ratio_margin(policy, reference)
        if self.margin == "mean":
            return policy.chosen.mean - policy.rejected.mean
        return policy.chosen.sum - policy.rejected.sum

    def strength(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> Tensor:
        """f(r) (M,), before alpha; 0 for pairs that the penalty skips."""
        r = self.ranking_margin(policy, reference)
        f = self.penalty(r.detach() if self.detach else r, differentiable=not self.detach)
        skipped = context.equal_to_chosen
        if self.mask_shared_prefix:
            skipped = skipped | (policy.generated.lengths <= context.shared_prefix)
        return f.masked_fill(skipped, 0.0)

    def skipped_tokens(self, context: LossContext) -> Tensor | None:
        """How many leading tokens (M,) of y_g are left out; None for none."""
        return context.shared_prefix if self.mask_shared_prefix else None

    def finish(
        self,
        base: LossTerms,
        value: Tensor,
        strength: Tensor,
        context: LossContext,
        metrics: dict[str, Tensor] | None = None,
    ) -> LossTerms:
        """The terms of the penalised loss ``value`` (M,), with what is logged of every penalised loss.

        Metrics: ``gate_open`` 1 where f(r) is not 0; ``penalty_share`` |penalty| / (|base| + |penalty|), 0 for 0/0;
        ``generated_equals_chosen``. Distributions: f(r) before and after alpha.
        """
        strength = strength.detach()
        base_size = base.value.detach().abs()
        penalty_size = (value - base.value).detach().abs()
        total = base_size + penalty_size
        logged = {
            "gate_open": (strength != 0).to(strength.dtype),
            "penalty_share": torch.where(total > 0, penalty_size / total, torch.zeros_like(total)),
            "generated_equals_chosen": context.equal_to_chosen.to(strength.dtype),
        }
        return LossTerms(
            value,
            base.weight,
            rewards=base.rewards,
            metrics={**base.metrics, **logged, **(metrics or {})},
            distributions={
                **base.distributions,
                "penalty_strength": strength,
                "weighted_penalty_strength": self.alpha * strength,
            },
        )


@dataclass(frozen=True)
class AdditivePenalty(PenalisedLoss):
    """base + alpha f(r) u, where u is a measure of how likely y_g is."""

    @abstractmethod
    def undesirability(self, policy: ResponseLogps, reference: ResponseLogps | None, skip: Tensor | None) -> Tensor:
        """The factor u (M,): what alpha f(r) multiplies."""

    def own_metrics(self, policy: ResponseLogps, skip: Tensor | None) -> dict[str, Tensor]:
        """Metrics of this loss alone, each (M,), detached."""
        return {}

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        base = self.base(policy, reference, context)
        strength = self.strength(policy, reference, context)
        weighted = self.alpha * strength
        skip = self.skipped_tokens(context)
        penalised = base.value + weighted * self.undesirability(policy, reference, skip)
        value = torch.where(weighted != 0, penalised, base.value)
        return self.finish(base, value, strength, context, self.own_metrics(policy, skip))


@dataclass(frozen=True)
class MinLL(AdditivePenalty):
    """Minimum log-likelihood of the generated answer.

    Paper: the DPPO poster
    Formula: base + alpha f(r) max(m_g, floor)
    Length: y_g: mean, or times |y_g|
    At policy = reference: the base's value + alpha f(r) max(m_g^r, floor)
    Bounds: at most alpha f(r) |floor| below the base (times |y_g| with ``sum``); unbounded below with ``floor`` null
    Elsewhere: the poster prints ``reduction: sum`` and has no floor.
    Metrics: ``held_at_floor``, where m_g is held

    m_g (nats per token) is held below ``floor`` < 0, without gradient.
    """

    name: ClassVar[str] = "minll"
    reduction: Literal["mean", "sum"]
    floor: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor is not None and not self.floor < 0:
            raise UserError(f"floor={self.floor:g}: must be < 0 nats per token, or null for none")

    def undesirability(self, policy: ResponseLogps, reference: ResponseLogps | None, skip: Tensor | None) -> Tensor:
        generated = generated_after(policy, skip)
        mean = generated.mean
        if self.floor is not None:
            mean = torch.where(mean > self.floor, mean, torch.full_like(mean, self.floor))
        return mean * generated.lengths if self.reduction == "sum" else mean

    def own_metrics(self, policy: ResponseLogps, skip: Tensor | None) -> dict[str, Tensor]:
        if self.floor is None:
            return {}
        mean = generated_after(policy, skip).mean.detach()
        return {"held_at_floor": (mean <= self.floor).to(mean.dtype)}


@dataclass(frozen=True)
class UnLL(AdditivePenalty):
    """Unlikelihood of the generated answer.

    Paper: the DPPO poster; unlikelihood is Welleck 2020, arXiv 1908.04319
    Formula:
        base + alpha f(r) u
        u = -(1 / |y_g|) sum_t log(1 - pi(y_g,t))      level=token_mean
        u = -sum_t log(1 - pi(y_g,t))                  level=token_sum
        u = -log(1 - e^{s_g})                          level=sequence, as printed
    Length: y_g: token mean, or sums
    At policy = reference: the base's value + alpha f(r) u, u near its largest: greedy tokens have p near 1
    Bounds: >= 0 where base and f are
    Elsewhere: the poster prints ``sequence``, which dies out with the answer's length and warns.
    Metrics: ``clamped_token_share`` (at ``sequence``: whether the answer's sum is clamped)

    A token (or, at ``sequence``, an answer) with log p above -1e-6 counts as the constant 13.8155 without gradient.
    """

    name: ClassVar[str] = "unll"
    level: Literal["token_mean", "token_sum", "sequence"]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level == "sequence":
            warnings.warn(
                "loss=unll with level=sequence: -log(1 - pi(y_g)) falls exponentially with the answer's length "
                "(0.06 at s_g = -2.8 nats, 2e-9 at -20), so there is no penalty on answers of ordinary length; "
                "level=token_mean keeps one",
                stacklevel=2,
            )

    def undesirability(self, policy: ResponseLogps, reference: ResponseLogps | None, skip: Tensor | None) -> Tensor:
        generated = generated_after(policy, skip)
        if self.level == "sequence":
            return -log1mexp(generated.sum)
        total = -generated.reduce(log1mexp)
        return total if self.level == "token_sum" else total / generated.lengths.clamp(min=1)

    def own_metrics(self, policy: ResponseLogps, skip: Tensor | None) -> dict[str, Tensor]:
        generated = generated_after(policy, skip)
        dtype = generated.tokens.dtype
        if self.level == "sequence":
            return {"clamped_token_share": is_clamped(generated.sum).detach().to(dtype)}
        clamped = generated.reduce(lambda tokens: is_clamped(tokens).to(dtype))
        return {"clamped_token_share": (clamped / generated.lengths.clamp(min=1)).detach()}


@dataclass(frozen=True)
class NPO(AdditivePenalty):
    """Negative preference optimisation of the generated answer.

    Paper: Zhang 2024, arXiv 2404.05868, eq. 3
    Formula: base - alpha f(r) (2 / beta_p) log sigmoid(-beta_p (s_g - s_g^r))
    Length: y_g: sums
    At policy = reference: the base's value + alpha f(r) (2 / beta_p) ln 2
    Bounds: >= 0 where base and f are

    As beta_p goes to 0 the penalty's gradient becomes that of alpha f(r) s_g: minll's with ``sum`` and no floor.
    """

    name: ClassVar[str] = "npo"
    beta_p: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta_p", self.beta_p)

    @property
    def uses_reference(self) -> bool:
        return True

    def undesirability(self, policy: ResponseLogps, reference: ResponseLogps | None, skip: Tensor | None) -> Tensor:
        log_ratio = generated_after(policy, skip).sum - generated_after(reference_of(reference), skip).sum
        return -(2 / self.beta_p) * F.logsigmoid(-self.beta_p * log_ratio)


@dataclass(frozen=True)
class SimNPO(AdditivePenalty):
    """Simple negative preference optimisation of the generated answer: NPO per token, no reference.

    Paper: Fan 2024, arXiv 2410.07163
    Formula: base - alpha f(r) (2 / beta_p) log sigmoid(-beta_p m_g - gamma_p)
    Length: y_g: mean
    At policy = reference: the base's value - alpha f(r) (2 / beta_p) log sigmoid(-beta_p m_g^r - gamma_p)
    Bounds: >= 0 where base and f are
    Elsewhere: the authors' TOFU code has gamma inside, so that gamma_p = beta_p * theirs.
    """

    name: ClassVar[str] = "simnpo"
    beta_p: float
    gamma_p: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta_p", self.beta_p)
        check_not_negative("gamma_p", self.gamma_p)

    def undesirability(self, policy: ResponseLogps, reference: ResponseLogps | None, skip: Tensor | None) -> Tensor:
        mean = generated_after(policy, skip).mean
        return -(2 / self.beta_p) * F.logsigmoid(-self.beta_p * mean - self.gamma_p)


@dataclass(frozen=True)
class ConLL(PenalisedLoss):
    """The penalty inside the sigmoid.

    Paper: the DPPO poster, which prints it for dpo as base
    Formula:
        -log sigmoid(logit_base - alpha beta f(r) g)
        g = s_g - s_g^r      base dpo, r_dpo, dpo_positive inside
        g = m_g - m_g^r      base dpo_norm, simpo, alpha_dpo
    Length: as the base's logit
    At policy = reference: the base's value, because g = 0: ln 2 with dpo
    Bounds: >= 0

    beta is the base's; so are label smoothing and NLL term. g is y_g's log-ratio on the scale of the base's logit.
    """

    name: ClassVar[str] = "conll"

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.logit_base

    @property
    def uses_reference(self) -> bool:
        return True

    @property
    def logit_base(self) -> LogitLoss:
        """The base, known to have a logit that y_g's log-ratio fits into.

        Raises ``UserError`` for any other base.
        """
        if not isinstance(self.base, LogitLoss) or self.base.logit_scale is None:
            raise UserError(
                f"base={self.base.name}: loss=conll moves a generated answer's log-ratio into the base's sigmoid, "
                "which only dpo, dpo_norm, r_dpo, simpo, alpha_dpo and dpo_positive with placement=inside have; "
                "choose loss/base=dpo or another of them"
            )
        return self.base

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        base = self.logit_base
        logit = base.logit(policy, reference, context)
        strength = self.strength(policy, reference, context)
        weighted = self.alpha * base.beta * strength
        gap = base.generated_gap(policy, reference, self.skipped_tokens(context))
        shifted = torch.where(weighted != 0, logit - weighted * gap, logit)
        value = base.terms(shifted, policy, reference, context).value
        return self.finish(base.terms(logit, policy, reference, context), value, strength, context)
