"""Golden values: every loss on pairs A and B, derived by hand from the formulas of the papers.

With the numbers of ``pairs``, for A and B:
s_w -1.5, -0.1; s_l -1, -3; s_g -1, -0.3; under the reference s_w -1.7, -0.05; s_l -1.5, -2.5; s_g -0.3, -0.6;
m_w -3/4, -0.1; m_l -1/3, -1.5; m_g -0.5, -0.1; under the reference m_w -0.85, -0.05; m_l -0.5, -1.25; m_g -0.15, -0.2.
r = s_w - s_l is -0.5, 2.9; Delta is -0.3, 0.45; m_w - m_l is -5/12, 1.4; the same over the reference is -1/15, 0.2.
-log sigmoid(x) = log(1 + e^-x). The closed forms below hold only such numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from dppo.losses import log1mexp, pairwise, penalised, penalties, ranges, ranked, sft, unpaired
from dppo.types import LossTerms, ResponseLogps

from .pairs import (
    A_OTHERS,
    A_OTHERS_REFERENCE,
    A_REFERENCE,
    B_OTHERS,
    B_OTHERS_REFERENCE,
    B_REFERENCE,
    A,
    Answers,
    B,
    C,
    D,
    Group,
    context,
    listed,
    logps,
)

# In the order of their imports.
MODULES = (ranges, log1mexp, sft, pairwise, penalties, penalised, ranked, unpaired)


def classes(modules: Iterable[ModuleType] = MODULES) -> SimpleNamespace:
    """Every loss and penalty class by name."""
    return SimpleNamespace(
        **{name: value for module in modules for name, value in vars(module).items() if isinstance(value, type)}
    )


@dataclass(frozen=True)
class Golden:
    """A loss (built from the namespace of ``classes``) and what it must return for pairs A and B, or two others."""

    label: str
    build: Callable[[Any], Any]
    values: tuple[float, float]
    weights: tuple[float, float] = (1.0, 1.0)
    chosen_rewards: tuple[float, float] | None = None
    rejected_rewards: tuple[float, float] | None = None
    metrics: dict[str, tuple[float, float]] | None = None
    distributions: dict[str, tuple[float, float]] | None = None
    shared_prefix: tuple[int, int] = (0, 0)
    equal_to_chosen: tuple[bool, bool] = (False, False)
    statistics: tuple[float, ...] | None = None
    also: Callable[[Any], None] | None = None  # what else must hold of the loss, such as of its statistics
    policy: tuple[Answers | Group, Answers | Group] = (A, B)
    reference: tuple[Answers | Group, Answers | Group] = (A_REFERENCE, B_REFERENCE)
    scores: tuple[tuple[float, ...], tuple[float, ...]] | None = None


def nls(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log(1 + math.exp(-x))


def unlikelihood(*tokens: float) -> float:
    """-sum_t log(1 - e^u_t)."""
    return -sum(math.log(1 - math.exp(token)) for token in tokens)


NO_SFT = {"sft_weight": 0.0, "nll": "mean"}


def dpo(m: Any, **changed: Any) -> Any:
    return m.DPO(**{"beta": 0.1, "label_smoothing": 0.0, **NO_SFT, **changed})


def dpo_norm(m: Any, **changed: Any) -> Any:
    return m.DPONorm(**{"beta": 3.0, "label_smoothing": 0.0, **NO_SFT, **changed})


def rdpo(m: Any, **changed: Any) -> Any:
    return m.RDPO(**{"beta": 0.1, "alpha_len": 0.05, "label_smoothing": 0.0, **NO_SFT, **changed})


def dpo_positive(m: Any, **changed: Any) -> Any:
    own = {"beta": 0.1, "lambda_": 5.0, "placement": "inside", "label_smoothing": 0.0}
    return m.DpoPositive(**{**own, **NO_SFT, **changed})


def ipo(m: Any, **changed: Any) -> Any:
    return m.IPO(**{"tau": 0.25, "reduction": "mean", **NO_SFT, **changed})


def cpo(m: Any, **changed: Any) -> Any:
    return m.CPO(**{"beta": 0.1, "lambda_": 0.5, "nll": "mean", "label_smoothing": 0.0, **changed})


def simpo(m: Any, **changed: Any) -> Any:
    own = {"beta": 2.0, "gamma": 0.5, "gamma_beta_ratio": None, "normalise_by_length": True, "label_smoothing": 0.0}
    return m.SimPO(**{**own, **NO_SFT, **changed})


def alpha_dpo(m: Any, **changed: Any) -> Any:
    own = {"beta": 2.0, "gamma_ratio": 0.3, "alpha_ref": 0.2, "decay": 0.9, "bias_correction": True}
    return m.AlphaDPO(**{**own, "stats_scope": "optimiser_batch", "label_smoothing": 0.0, **NO_SFT, **changed})


PENALISED = {"alpha": 0.2, "margin": "sum", "detach": True, "mask_shared_prefix": False}


def minll(m: Any, penalty: Any = None, base: Any = None, **changed: Any) -> Any:
    own = {"reduction": "mean", "floor": -5.0}
    return m.MinLL(penalty=penalty or m.Quadratic(), base=base or dpo(m), **{**PENALISED, **own, **changed})


def unll(m: Any, penalty: Any = None, base: Any = None, **changed: Any) -> Any:
    own = {"level": "token_mean"}
    return m.UnLL(penalty=penalty or m.Quadratic(), base=base or dpo(m), **{**PENALISED, **own, **changed})


def conll(m: Any, penalty: Any = None, base: Any = None, **changed: Any) -> Any:
    return m.ConLL(penalty=penalty or m.Quadratic(), base=base or dpo(m), **{**PENALISED, **changed})


def npo(m: Any, **changed: Any) -> Any:
    return m.NPO(penalty=m.Quadratic(), base=dpo(m), **{**PENALISED, "beta_p": 0.5, **changed})


def simnpo(m: Any, **changed: Any) -> Any:
    return m.SimNPO(penalty=m.Quadratic(), base=dpo(m), **{**PENALISED, "beta_p": 0.5, "gamma_p": 0.3, **changed})


def log_odds(u: float) -> float:
    return u - math.log(1 - math.exp(u))


# Moments of AlphaDPO that give M = 0.1 and S = 0.5 after two updates: divided by 1 - 0.9^2 = 0.19.
MOMENTS = (2.0, 0.019, 0.095)
# -log sigmoid(0.1 * -0.3) and -log sigmoid(0.1 * 0.45)
DPO_A, DPO_B = nls(-0.03), nls(0.045)
# (1/2) * -(log(1 - e^-0.4) + log(1 - e^-0.6))
UNLL_A = unlikelihood(-0.4, -0.6) / 2
# the certain token counts as log p = -1e-6
UNLL_B = unlikelihood(-0.05, -0.25, -1e-6) / 3


@cache
def batch(picked: tuple[int, ...]) -> tuple[ResponseLogps, ResponseLogps]:
    """Policy and reference log-probs of the picked ones of pairs A (0) and B (1)."""
    return (
        logps(*[(A, B)[index] for index in picked]),
        logps(*[(A_REFERENCE, B_REFERENCE)[index] for index in picked]),
    )


def moments_become(*expected: float, start: tuple[float, ...] = MOMENTS) -> Callable[[Any], None]:
    """AlphaDPO's ``start`` becomes ``expected`` with a batch of both pairs, whatever the micro-batches."""

    def check_moments(loss: Any) -> None:
        state = torch.tensor(start, dtype=torch.float64)
        assert loss.uses_statistics
        assert loss.initial_statistics().tolist() == [0.0, 0.0, 0.0]
        for micro_batches in ([(0, 1)], [(0,), (1,)]):
            totals = sum(loss.partial_statistics(*batch(picked), context(len(picked))) for picked in micro_batches)
            assert close(loss.update_statistics(state, totals), torch.tensor(expected, dtype=torch.float64))
        assert torch.equal(loss.update_statistics(state, torch.zeros(3, dtype=torch.float64)), state)
        # One pair has no deviation; 1, 2, 3 have mean 2 and deviation 1.
        for totals, mean, deviation in (((1.0, 0.3, 0.09), 0.3, 0.0), ((3.0, 6.0, 14.0), 2.0, 1.0)):
            after = torch.stack([state[0] + 1, 0.9 * state[1] + 0.1 * mean, 0.9 * state[2] + 0.1 * deviation])
            assert close(loss.update_statistics(state, torch.tensor(totals, dtype=torch.float64)), after)

    return check_moments


def kto(m: Any, **changed: Any) -> Any:
    own = {"beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 0.8, "value": "sigmoid", "z0": "kl"}
    return m.KTO(**{**own, "z_scope": "optimiser_batch", "one_per_prompt": False, **changed})


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def kl_of_answers_to_other_prompts(loss: Any) -> None:
    """(0.4 + 0.3 - 0.1) / 3 = 0.2 over all rows, at least 0 after the mean; and the weights' balance."""
    state = torch.tensor([0.7], dtype=torch.float64)
    assert loss.uses_statistics
    assert loss.initial_statistics().tolist() == [0.0]
    ours, theirs = [A_OTHERS, B_OTHERS], [A_OTHERS_REFERENCE, B_OTHERS_REFERENCE]
    for micro_batches in ([[0, 1]], [[0], [1]]):
        totals = sum(
            loss.partial_statistics(
                # the pairs' own answers have no part in it
                logps(*[[*listed((A, B)[index]), *ours[index]] for index in picked]),
                logps(*[[*listed((A_REFERENCE, B_REFERENCE)[index]), *theirs[index]] for index in picked]),
                context(len(picked)),
            )
            for picked in micro_batches
        )
        assert close(loss.update_statistics(state, totals), torch.tensor([0.2], dtype=torch.float64))
    assert loss.update_statistics(state, torch.tensor([-0.3, 3.0], dtype=torch.float64)).tolist() == [0.0]
    assert loss.update_statistics(state, torch.tensor([0.0, 0.0], dtype=torch.float64)).tolist() == [0.7]
    # 1.5 n_w / (0.8 n_l): 15 and 28.125 are one, 20 and 28.125 are 4/3
    assert loss.balance(16, 30) is None
    assert loss.balance(64, 90) is None
    assert loss.balance(10, 30) is not None
    notice = loss.balance(100, 90)
    assert notice is not None
    assert "desirable_weight from 0.72 to 0.96" in notice


# z = 0.1 * 0.3 = 0.03; beta (s - s^r): A 0.02 and 0.05, B -0.005 and -0.05
KTO_X = {"A": (0.02 - 0.03, 0.03 - 0.05), "B": (-0.005 - 0.03, 0.03 + 0.05)}

GOLDEN = [
    Golden("sft", lambda m: m.SFT(), (0.75, 0.1), weights=(2.0, 1.0)),
    # beta (s - s^r): chosen 0.1 * 0.2 and 0.1 * -0.05, rejected 0.1 * 0.5 and 0.1 * -0.5
    Golden("dpo", dpo, (DPO_A, DPO_B), chosen_rewards=(0.02, -0.005), rejected_rewards=(0.05, -0.05)),
    Golden("dpo beta=2", lambda m: dpo(m, beta=2.0), (nls(-0.6), nls(0.9))),
    # 0.9 * -log sigmoid(x) + 0.1 * -log sigmoid(-x)
    Golden(
        "dpo label_smoothing=0.1",
        lambda m: dpo(m, label_smoothing=0.1),
        (0.9 * nls(-0.03) + 0.1 * nls(0.03), 0.9 * nls(0.045) + 0.1 * nls(-0.045)),
    ),
    # + 0.5 * -m_w
    Golden("dpo sft_weight=0.5", lambda m: dpo(m, sft_weight=0.5), (DPO_A + 0.375, DPO_B + 0.05)),
    # + 0.5 * -s_w / 1.5; their mean is 0.5 * (1.5 + 0.1) / (2 + 1)
    Golden(
        "dpo sft_weight=0.5 nll=token_mean",
        lambda m: dpo(m, sft_weight=0.5, nll="token_mean"),
        (DPO_A + 0.5, DPO_B + 0.1 / 3),
    ),
    # 3 * (-5/12 + 0.35) and 3 * (1.4 - 1.2); m - m^r: chosen 0.1, -0.05, rejected 1/6, -0.25
    Golden(
        "dpo_norm",
        dpo_norm,
        (nls(-0.2), nls(0.6)),
        chosen_rewards=(0.3, -0.15),
        rejected_rewards=(0.5, -0.75),
    ),
    # -0.2 - 0.2 * 3 * 0.25 * -0.35
    Golden("conll on dpo_norm", lambda m: conll(m, base=dpo_norm(m)), (nls(-0.2 + 0.0525), nls(0.6))),
    # d = -1/15, 0.2; the target 1 / (2 tau) is 2
    Golden(
        "ipo",
        ipo,
        ((31 / 15) ** 2, 3.24),
        chosen_rewards=(0.025, -0.0125),
        rejected_rewards=(0.25 / 6, -0.0625),
    ),
    Golden(
        "ipo reduction=sum",
        lambda m: ipo(m, reduction="sum"),
        (5.29, 1.55**2),
        chosen_rewards=(0.05, -0.0125),
        rejected_rewards=(0.125, -0.125),
    ),
    Golden("ipo sft_weight=0.5", lambda m: ipo(m, sft_weight=0.5), ((31 / 15) ** 2 + 0.375, 3.29)),
    # max(0, 0.75 + 1.5 - 1) + 0.5 * 1.5; max(0, 0.75 + 0.1 - 3) + 0.5 * 0.1
    Golden(
        "slic",
        lambda m: m.SLiC(delta=0.75, lambda_=0.5),
        (2.0, 0.05),
        chosen_rewards=(-1.5, -0.1),
        rejected_rewards=(-1.0, -3.0),
    ),
    # logits 0.1 * -0.5 and 0.1 * 2.9; + 0.5 * -m_w, -s_w or -s_w / 1.5
    Golden(
        "cpo",
        cpo,
        (nls(-0.05) + 0.375, nls(0.29) + 0.05),
        chosen_rewards=(-0.15, -0.01),
        rejected_rewards=(-0.1, -0.3),
    ),
    Golden("cpo nll=sum", lambda m: cpo(m, nll="sum"), (nls(-0.05) + 0.75, nls(0.29) + 0.05)),
    Golden("cpo nll=token_mean", lambda m: cpo(m, nll="token_mean"), (nls(-0.05) + 0.5, nls(0.29) + 0.1 / 3)),
    Golden(
        "cpo label_smoothing=0.1",
        lambda m: cpo(m, label_smoothing=0.1),
        (0.9 * nls(-0.05) + 0.1 * nls(0.05) + 0.375, 0.9 * nls(0.29) + 0.1 * nls(-0.29) + 0.05),
    ),
    Golden(
        "orpo",
        lambda m: m.ORPO(lambda_=0.5),
        (
            0.75 + 0.5 * nls(log_odds(-0.75) - log_odds(-1 / 3)),
            0.1 + 0.5 * nls(log_odds(-0.1) - log_odds(-1.5)),
        ),
        chosen_rewards=(-0.375, -0.05),
        rejected_rewards=(-0.5 / 3, -0.75),
        metrics={
            "log_odds_ratio": (log_odds(-0.75) - log_odds(-1 / 3), log_odds(-0.1) - log_odds(-1.5)),
        },
    ),
    # lengths 2, 3 and 1, 2: -0.03 - 0.05 and 0.045 - 0.05
    Golden("r_dpo", rdpo, (nls(-0.08), nls(-0.005)), chosen_rewards=(0.02, -0.005), rejected_rewards=(0.05, -0.05)),
    # 2 * -5/12 - 0.5 and 2 * 1.4 - 0.5
    Golden(
        "simpo",
        simpo,
        (nls(-4 / 3), nls(2.3)),
        chosen_rewards=(-1.5, -0.2),
        rejected_rewards=(-2 / 3, -3.0),
    ),
    Golden(
        "simpo gamma_beta_ratio=0.25",
        lambda m: simpo(m, gamma=None, gamma_beta_ratio=0.25),
        (nls(-4 / 3), nls(2.3)),
    ),
    Golden(
        "simpo normalise_by_length=false",
        lambda m: simpo(m, normalise_by_length=False),
        (nls(-1.5), nls(5.3)),
        chosen_rewards=(-3.0, -0.2),
        rejected_rewards=(-2.0, -6.0),
    ),
    Golden("simpo sft_weight=0.5", lambda m: simpo(m, sft_weight=0.5), (nls(-4 / 3) + 0.375, nls(2.3) + 0.05)),
    # max(0, s_w^r - s_w) is 0 and 0.05: 0.1 * (0.45 - 5 * 0.05)
    Golden(
        "dpo_positive",
        dpo_positive,
        (DPO_A, nls(0.02)),
        chosen_rewards=(0.02, -0.005),
        rejected_rewards=(0.05, -0.05),
        metrics={"chosen_below_reference": (0.0, 1.0)},
    ),
    Golden(
        "dpo_positive inside label_smoothing=0.1 sft_weight=0.5",
        lambda m: dpo_positive(m, label_smoothing=0.1, sft_weight=0.5),
        (0.9 * nls(-0.03) + 0.1 * nls(0.03) + 0.375, 0.9 * nls(0.02) + 0.1 * nls(-0.02) + 0.05),
    ),
    Golden("dpo_positive outside", lambda m: dpo_positive(m, placement="outside"), (DPO_A, DPO_B + 0.25)),
    Golden(
        "dpo_positive outside sft_weight=0.5",
        lambda m: dpo_positive(m, placement="outside", sft_weight=0.5),
        (DPO_A + 0.375, DPO_B + 0.3),
    ),
    # z = (-1/15 - 0.1) / 0.5 = -1/3 and 0.2; targets 2 (0.3 + 0.2 z) = 7/15 and 0.68; logits -5/6 - 7/15 and 2.8 - 0.68
    # update: mean 1/15, n-1 standard deviation (4/15) / sqrt 2
    Golden(
        "alpha_dpo",
        alpha_dpo,
        (nls(-1.3), nls(2.12)),
        chosen_rewards=(-1.54, -0.18),
        rejected_rewards=(-11 / 15, -2.9),
        metrics={"target_margin": (7 / 15, 0.68)},
        statistics=MOMENTS,
        also=moments_become(3.0, 0.0171 + 0.1 / 15, 0.0855 + 0.1 * 4 / 15 / math.sqrt(2)),
    ),
    Golden(
        "alpha_dpo bias_correction=false",
        lambda m: alpha_dpo(m, bias_correction=False),
        (nls(-1.3), nls(2.12)),
        statistics=(2.0, 0.1, 0.5),
    ),
    # no update yet: z = 0
    Golden(
        "alpha_dpo before the first update",
        alpha_dpo,
        (nls(-5 / 6 - 0.6), nls(2.2)),
        statistics=(0.0, 0.0, 0.0),
        also=moments_become(1.0, 0.1 / 15, 0.1 * 4 / 15 / math.sqrt(2), start=(0.0, 0.0, 0.0)),
    ),
    # 0.2 * 0.25 * -0.5; B's gate is closed
    Golden(
        "minll",
        minll,
        (DPO_A - 0.025, DPO_B),
        chosen_rewards=(0.02, -0.005),
        rejected_rewards=(0.05, -0.05),
        metrics={
            "gate_open": (1.0, 0.0),
            "penalty_share": (0.025 / (DPO_A + 0.025), 0.0),
            "generated_equals_chosen": (0.0, 0.0),
            "held_at_floor": (0.0, 0.0),
        },
        distributions={"penalty_strength": (0.25, 0.0), "weighted_penalty_strength": (0.05, 0.0)},
    ),
    Golden("minll reduction=sum", lambda m: minll(m, reduction="sum"), (DPO_A - 0.05, DPO_B)),
    Golden("minll floor=null", lambda m: minll(m, floor=None), (DPO_A - 0.025, DPO_B)),
    # m_g = -0.5 is held at -0.45: 0.05 * -0.45, and 2 tokens of it with reduction=sum
    Golden(
        "minll floor=-0.45",
        lambda m: minll(m, floor=-0.45),
        (DPO_A - 0.0225, DPO_B),
        metrics={"held_at_floor": (1.0, 0.0)},
    ),
    Golden("minll floor=-0.45 reduction=sum", lambda m: minll(m, floor=-0.45, reduction="sum"), (DPO_A - 0.045, DPO_B)),
    # 0.2 * 0.25 * UNLL_A
    Golden("unll", unll, (DPO_A + 0.05 * UNLL_A, DPO_B), metrics={"clamped_token_share": (0.0, 1 / 3)}),
    Golden("unll level=token_sum", lambda m: unll(m, level="token_sum"), (DPO_A + 0.1 * UNLL_A, DPO_B)),
    # s_g = -1: 0.05 * -log(1 - e^-1)
    Golden(
        "unll level=sequence",
        lambda m: unll(m, level="sequence"),
        (DPO_A + 0.05 * unlikelihood(-1.0), DPO_B),
        metrics={"clamped_token_share": (0.0, 0.0)},
    ),
    # f(r) at r = -0.5: 0.5, sqrt 0.5, 1, 0.7 * 0.25; expectile at r = 2.9: 0.3 * 8.41
    Golden("unll linear", lambda m: unll(m, m.Linear()), (DPO_A + 0.1 * UNLL_A, DPO_B)),
    Golden("unll sqrt", lambda m: unll(m, m.Sqrt()), (DPO_A + 0.2 * math.sqrt(0.5) * UNLL_A, DPO_B)),
    Golden("unll constant", lambda m: unll(m, m.Constant()), (DPO_A + 0.2 * UNLL_A, DPO_B)),
    Golden(
        "unll expectile",
        lambda m: unll(m, m.Expectile(zeta=0.3, form="absolute")),
        (DPO_A + 0.2 * 0.175 * UNLL_A, DPO_B + 0.2 * 2.523 * UNLL_B),
        metrics={"gate_open": (1.0, 1.0)},
        distributions={"penalty_strength": (0.175, 2.523), "weighted_penalty_strength": (0.035, 0.5046)},
    ),
    Golden(
        "unll expectile literal",
        lambda m: unll(m, m.Expectile(zeta=0.3, form="literal")),
        (DPO_A - 0.2 * 0.175 * UNLL_A, DPO_B + 0.2 * 2.523 * UNLL_B),
    ),
    # r not detached: the root has 1e-6 under it, all other values stay
    Golden(
        "unll sqrt detach=false",
        lambda m: unll(m, m.Sqrt(), detach=False),
        (DPO_A + 0.2 * math.sqrt(0.500001) * UNLL_A, DPO_B),
    ),
    Golden("unll detach=false", lambda m: unll(m, detach=False), (DPO_A + 0.05 * UNLL_A, DPO_B)),
    # r = -5/12 per token: r^2 = 25/144; implicit r = -0.3
    Golden("unll margin=mean", lambda m: unll(m, margin="mean"), (DPO_A + 0.2 * 25 / 144 * UNLL_A, DPO_B)),
    Golden("unll margin=implicit", lambda m: unll(m, margin="implicit"), (DPO_A + 0.2 * 0.09 * UNLL_A, DPO_B)),
    # without A's first generated token: -0.6 alone is left
    Golden(
        "unll mask_shared_prefix",
        lambda m: unll(m, mask_shared_prefix=True),
        (DPO_A + 0.05 * unlikelihood(-0.6), DPO_B),
        shared_prefix=(1, 0),
    ),
    Golden("unll unmasked", unll, (DPO_A + 0.05 * UNLL_A, DPO_B), shared_prefix=(1, 0)),
    Golden(
        "minll mask_shared_prefix reduction=sum",
        lambda m: minll(m, mask_shared_prefix=True, reduction="sum"),
        (DPO_A - 0.05 * 0.6, DPO_B),
        shared_prefix=(1, 0),
    ),
    # nothing left of A's generated answer, or equal to the chosen one: skipped
    Golden(
        "unll whole answer shared",
        lambda m: unll(m, mask_shared_prefix=True),
        (DPO_A, DPO_B),
        shared_prefix=(2, 0),
        metrics={"gate_open": (0.0, 0.0)},
    ),
    Golden(
        "minll equal to chosen",
        minll,
        (DPO_A, DPO_B),
        equal_to_chosen=(True, False),
        metrics={"gate_open": (0.0, 0.0), "generated_equals_chosen": (1.0, 0.0), "penalty_share": (0.0, 0.0)},
    ),
    Golden("conll equal to chosen", conll, (DPO_A, DPO_B), equal_to_chosen=(True, False)),
    # logit -0.03 - 0.2 * 0.1 * 0.25 * -0.7
    Golden(
        "conll",
        conll,
        (nls(-0.03 + 0.0035), DPO_B),
        chosen_rewards=(0.02, -0.005),
        rejected_rewards=(0.05, -0.05),
        metrics={"penalty_share": ((DPO_A - nls(-0.0265)) / (2 * DPO_A - nls(-0.0265)), 0.0)},
    ),
    # the shared first token leaves s_g - s_g^r = -0.6 + 0.2
    Golden(
        "conll mask_shared_prefix",
        lambda m: conll(m, mask_shared_prefix=True),
        (nls(-0.03 + 0.2 * 0.1 * 0.25 * 0.4), DPO_B),
        shared_prefix=(1, 0),
    ),
    # beta = 2: logit -0.6 - 0.2 * 2 * f(r) * -0.7; smoothing and sft_weight are the base's
    Golden(
        "conll expectile on a smoothed base with sft_weight",
        lambda m: conll(
            m,
            m.Expectile(zeta=0.3, form="absolute"),
            dpo(m, beta=2.0, label_smoothing=0.1, sft_weight=0.5),
        ),
        (
            0.9 * nls(-0.6 + 0.4 * 0.175 * 0.7) + 0.1 * nls(0.6 - 0.4 * 0.175 * 0.7) + 0.375,
            0.9 * nls(0.9 - 0.4 * 2.523 * 0.3) + 0.1 * nls(-0.9 + 0.4 * 2.523 * 0.3) + 0.05,
        ),
    ),
    # mean gap -0.5 + 0.15: -4/3 + 0.2 * 2 * 0.25 * 0.35; without normalisation -1.5 + 0.1 * 0.7
    Golden("conll on simpo", lambda m: conll(m, base=simpo(m)), (nls(-4 / 3 + 0.035), nls(2.3))),
    Golden(
        "conll on simpo normalise_by_length=false",
        lambda m: conll(m, base=simpo(m, normalise_by_length=False)),
        (nls(-1.43), nls(5.3)),
    ),
    Golden("conll on r_dpo", lambda m: conll(m, base=rdpo(m)), (nls(-0.08 + 0.0035), nls(-0.005))),
    Golden("conll on dpo_positive", lambda m: conll(m, base=dpo_positive(m)), (nls(-0.03 + 0.0035), nls(0.02))),
    Golden(
        "conll on alpha_dpo",
        lambda m: conll(m, base=alpha_dpo(m)),
        (nls(-1.3 + 0.035), nls(2.12)),
        statistics=MOMENTS,
        also=moments_become(3.0, 0.0171 + 0.1 / 15, 0.0855 + 0.1 * 4 / 15 / math.sqrt(2)),
    ),
    Golden("unll on ipo", lambda m: unll(m, base=ipo(m)), ((31 / 15) ** 2 + 0.05 * UNLL_A, 3.24)),
    # 0.05 * (2 / 0.5) * -log sigmoid(0.5 * 0.7)
    Golden("npo", npo, (DPO_A + 0.2 * nls(0.35), DPO_B)),
    # without the shared first token: s_g - s_g^r = -0.4
    Golden(
        "npo mask_shared_prefix",
        lambda m: npo(m, mask_shared_prefix=True),
        (DPO_A + 0.2 * nls(0.2), DPO_B),
        shared_prefix=(1, 0),
    ),
    # 0.05 * (2 / 0.5) * -log sigmoid(0.5 * 0.5 - 0.3)
    Golden("simnpo", simnpo, (DPO_A + 0.2 * nls(-0.05), DPO_B)),
    # C: of the pairs ranked by score only (third, first) is wrong: -0.1 + 0.3; + 0.5 * 0.6
    # D: first above the third and fourth by score, but 0.7 and 0.6 below; the second is above both; + 0.5 * 1
    Golden(
        "rrhf",
        lambda m: m.RRHF(lambda_=0.5),
        (0.5, 1.8),
        policy=(C, D),
        scores=((3.0, 1.0, 2.0), (2.0, 2.0, 0.5, 0.5)),
        chosen_rewards=(-0.3, -1.0),
        rejected_rewards=(-0.5, -0.3),
        metrics={"ranked_accuracy": (2 / 3, 0.5), "n_ranked_pairs": (3.0, 4.0)},
    ),
    # all tied: only 0.5 * 0.6; equal m of unequal scores count 1/2
    Golden(
        "rrhf ties",
        lambda m: m.RRHF(lambda_=0.5),
        (0.3, 0.2),
        policy=(C, [("ranked", [-0.4]), ("ranked", [-0.4])]),
        scores=((1.0, 1.0, 1.0), (1.0, 0.0)),
        metrics={"ranked_accuracy": (math.nan, 0.5), "n_ranked_pairs": (0.0, 1.0)},
    ),
    # pairs: A max(0, -1/3 + 3/4) + 0.5 * 1.5; B 0 + 0.5 * 0.1
    Golden(
        "rrhf on pairs",
        lambda m: m.RRHF(lambda_=0.5),
        (5 / 12 + 0.75, 0.05),
        policy=({"rejected": A["rejected"], "chosen": A["chosen"]}, {"chosen": B["chosen"], "rejected": B["rejected"]}),
        chosen_rewards=(-0.75, -0.1),
        rejected_rewards=(-1 / 3, -1.5),
    ),
    # 1 - sigmoid(x) = sigmoid(-x)
    Golden(
        "kto",
        kto,
        (
            (1.5 * sigmoid(-KTO_X["A"][0]) + 0.8 * sigmoid(-KTO_X["A"][1])) / 2,
            (1.5 * sigmoid(-KTO_X["B"][0]) + 0.8 * sigmoid(-KTO_X["B"][1])) / 2,
        ),
        weights=(2.0, 2.0),
        statistics=(0.3,),
        chosen_rewards=(0.02, -0.005),
        rejected_rewards=(0.05, -0.05),
        metrics={"kl": (0.3, 0.3)},
        also=kl_of_answers_to_other_prompts,
    ),
    Golden(
        "kto value=log_sigmoid",
        lambda m: kto(m, value="log_sigmoid"),
        (
            (1.5 * nls(KTO_X["A"][0]) + 0.8 * nls(KTO_X["A"][1])) / 2,
            (1.5 * nls(KTO_X["B"][0]) + 0.8 * nls(KTO_X["B"][1])) / 2,
        ),
        weights=(2.0, 2.0),
        statistics=(0.3,),
    ),
    # (-1.5 * -0.01 - 0.8 * -0.02) / 2; (-1.5 * -0.035 - 0.8 * 0.08) / 2
    Golden(
        "kto value=identity",
        lambda m: kto(m, value="identity"),
        (0.0155, -0.00575),
        weights=(2.0, 2.0),
        statistics=(0.3,),
    ),
    Golden(
        "kto z0=zero",
        lambda m: kto(m, z0="zero"),
        ((1.5 * sigmoid(-0.02) + 0.8 * sigmoid(0.05)) / 2, (1.5 * sigmoid(0.005) + 0.8 * sigmoid(-0.05)) / 2),
        weights=(2.0, 2.0),
        metrics={"kl": (0.0, 0.0)},
    ),
    # single answers: A's chosen one desirable, B's rejected one undesirable; the other kind has no reward
    Golden(
        "kto on labelled answers",
        kto,
        (1.5 * sigmoid(-KTO_X["A"][0]), 0.8 * sigmoid(-KTO_X["B"][1])),
        policy=({"desirable": A["chosen"]}, [("mismatched", [-0.3]), ("undesirable", B["rejected"])]),
        reference=(
            {"desirable": A_REFERENCE["chosen"]},
            [("mismatched", [-0.4]), ("undesirable", B_REFERENCE["rejected"])],
        ),
        statistics=(0.3,),
        chosen_rewards=(0.02, math.nan),
        rejected_rewards=(math.nan, -0.05),
    ),
]


def run(golden: Golden, m: Any, picked: tuple[int, ...]) -> LossTerms:
    """The terms of ``golden``'s loss for a batch of the picked ones of its two examples."""
    loss = golden.build(m)
    policy = logps(*[golden.policy[index] for index in picked])
    scores = [math.nan] * len(policy.roles)
    if golden.scores is not None:
        scores = [one for index in picked for one in golden.scores[index]]
    terms: LossTerms = loss(
        policy,
        logps(*[golden.reference[index] for index in picked]) if loss.uses_reference else None,
        context(
            len(picked),
            shared_prefix=[golden.shared_prefix[index] for index in picked],
            equal_to_chosen=[golden.equal_to_chosen[index] for index in picked],
            statistics=None if golden.statistics is None else torch.tensor(golden.statistics, dtype=torch.float64),
            scores=scores,
        ),
    )
    return terms


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.allclose(found, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


def check(golden: Golden, m: Any, picked: tuple[int, ...]) -> None:
    """Raise AssertionError unless the loss returns what ``golden`` says for a batch of the picked examples."""
    terms = run(golden, m, picked)

    def same(found: torch.Tensor, expected: tuple[float, float]) -> None:
        wanted = torch.tensor([expected[index] for index in picked], dtype=torch.float64)
        assert close(found, wanted), f"{found.tolist()} in place of {wanted.tolist()}"
        assert not found.requires_grad

    same(terms.value, golden.values)
    same(terms.weight, golden.weights)
    for key, rewards in (("chosen", golden.chosen_rewards), ("rejected", golden.rejected_rewards)):
        if rewards is not None:
            same(terms.rewards[key], rewards)
    for name, expected in (golden.metrics or {}).items():
        same(terms.metrics[name], expected)
    for name, expected in (golden.distributions or {}).items():
        same(terms.distributions[name], expected)
    if golden.also is not None:
        golden.also(golden.build(m))
