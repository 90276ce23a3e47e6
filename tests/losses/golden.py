"""Golden values: every loss on pairs A and B, derived by hand from the formulas of the papers.

With the numbers of ``pairs``: s_w, s_l, s_g, m_g are -1.5, -1, -1, -0.5 for A and -0.1, -3, -0.3, -0.1 for B;
Delta is -0.3 for A and 0.8 for B; r = s_w - s_l is -0.5 for A and 2.9 for B; m_w - m_l is -5/12 and 1.4;
s_g - s_g^r is -0.7 and 0.3, per token -0.35 and 0.1. -log sigmoid(x) = log(1 + e^-x).
The closed forms below hold only such numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from dppo.losses import pairwise, penalised, penalties, sft
from dppo.types import LossTerms, ResponseLogps

from .pairs import A_REFERENCE, B_REFERENCE, A, B, context, logps


def classes(mutated: ModuleType | None = None) -> SimpleNamespace:
    """Every loss and penalty class by name, those of a changed module in place of the real ones."""
    found: dict[str, Any] = {}
    for module in (sft, pairwise, penalties, penalised, *([mutated] if mutated else [])):
        found |= {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return SimpleNamespace(**found)


@dataclass(frozen=True)
class Golden:
    """A loss (built from the namespace of ``classes``) and what it must return for pairs A and B."""

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


def nls(x: float) -> float:
    """-log sigmoid(x)."""
    return math.log(1 + math.exp(-x))


def unlikelihood(*tokens: float) -> float:
    """-sum_t log(1 - e^u_t)."""
    return -sum(math.log(1 - math.exp(token)) for token in tokens)


def dpo(m: Any, **changed: Any) -> Any:
    return m.DPO(**{"beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0, "nll": "mean", **changed})


PENALISED = {"alpha": 0.2, "margin": "sum", "detach": True, "mask_shared_prefix": False}


def minll(m: Any, penalty: Any = None, base: Any = None, **changed: Any) -> Any:
    own = {"reduction": "mean", "floor": -5.0}
    return m.MinLL(penalty=penalty or m.Quadratic(), base=base or dpo(m), **{**PENALISED, **own, **changed})


def unll(m: Any, penalty: Any = None, base: Any = None, **changed: Any) -> Any:
    own = {"level": "token_mean"}
    return m.UnLL(penalty=penalty or m.Quadratic(), base=base or dpo(m), **{**PENALISED, **own, **changed})


def conll(m: Any, penalty: Any = None, base: Any = None, **changed: Any) -> Any:
    return m.ConLL(penalty=penalty or m.Quadratic(), base=base or dpo(m), **{**PENALISED, **changed})


# -log sigmoid(0.1 * -0.3) and -log sigmoid(0.1 * 0.8)
DPO_A, DPO_B = nls(-0.03), nls(0.08)
# (1/2) * -(log(1 - e^-0.4) + log(1 - e^-0.6))
UNLL_A = unlikelihood(-0.4, -0.6) / 2
# the certain token counts as log p = -1e-6
UNLL_B = unlikelihood(-0.05, -0.25, -1e-6) / 3

GOLDEN = [
    Golden("sft", lambda m: m.SFT(), (0.75, 0.1), weights=(2.0, 1.0)),
    # beta (s - s^r): chosen 0.1 * 0.2 and 0.1 * 0.3, rejected 0.1 * 0.5 and 0.1 * -0.5
    Golden("dpo", dpo, (DPO_A, DPO_B), chosen_rewards=(0.02, 0.03), rejected_rewards=(0.05, -0.05)),
    Golden("dpo beta=2", lambda m: dpo(m, beta=2.0), (nls(-0.6), nls(1.6))),
    # 0.9 * -log sigmoid(x) + 0.1 * -log sigmoid(-x)
    Golden(
        "dpo label_smoothing=0.1",
        lambda m: dpo(m, label_smoothing=0.1),
        (0.9 * nls(-0.03) + 0.1 * nls(0.03), 0.9 * nls(0.08) + 0.1 * nls(-0.08)),
    ),
    # + 0.5 * -m_w
    Golden("dpo sft_weight=0.5", lambda m: dpo(m, sft_weight=0.5), (DPO_A + 0.375, DPO_B + 0.05)),
    # + 0.5 * -s_w / 1.5; their mean is 0.5 * (1.5 + 0.1) / (2 + 1)
    Golden(
        "dpo sft_weight=0.5 nll=token_mean",
        lambda m: dpo(m, sft_weight=0.5, nll="token_mean"),
        (DPO_A + 0.5, DPO_B + 0.1 / 3),
    ),
    # 0.2 * 0.25 * -0.5; B's gate is closed
    Golden(
        "minll",
        minll,
        (DPO_A - 0.025, DPO_B),
        chosen_rewards=(0.02, 0.03),
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
        chosen_rewards=(0.02, 0.03),
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
            0.9 * nls(1.6 - 0.4 * 2.523 * 0.3) + 0.1 * nls(-1.6 + 0.4 * 2.523 * 0.3) + 0.05,
        ),
    ),
]


@cache
def batch(picked: tuple[int, ...]) -> tuple[ResponseLogps, ResponseLogps]:
    """Policy and reference log-probs of the picked ones of pairs A (0) and B (1)."""
    return (
        logps(*[(A, B)[index] for index in picked]),
        logps(*[(A_REFERENCE, B_REFERENCE)[index] for index in picked]),
    )


def run(golden: Golden, m: Any, picked: tuple[int, ...]) -> LossTerms:
    """The terms of ``golden``'s loss for a batch of the picked ones of pairs A (0) and B (1)."""
    policy, reference = batch(picked)
    loss = golden.build(m)
    terms: LossTerms = loss(
        policy,
        reference if loss.uses_reference else None,
        context(
            len(picked),
            shared_prefix=[golden.shared_prefix[index] for index in picked],
            equal_to_chosen=[golden.equal_to_chosen[index] for index in picked],
            statistics=None if golden.statistics is None else torch.tensor(golden.statistics, dtype=torch.float64),
        ),
    )
    return terms


def check(golden: Golden, m: Any, picked: tuple[int, ...]) -> None:
    """Raise AssertionError unless the loss returns what ``golden`` says for a batch of the picked pairs."""
    terms = run(golden, m, picked)

    def same(found: torch.Tensor, expected: tuple[float, float]) -> None:
        wanted = torch.tensor([expected[index] for index in picked], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
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
