"""Where the losses lead a policy: optima and logit gradients of softmax policies small enough to solve by hand, fp64.

A bandit's answer is an arm: one token, unless a test says otherwise. Delta_ij is the log(pi / pi_ref) gap between
answers i and j.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, permutations
from typing import Literal

import pytest
import torch
from torch import Tensor

from dppo.losses.pairwise import DPO, IPO, RDPO, DpoPositive, PairwiseLoss
from dppo.types import ResponseLogps

from .pairs import context

REFERENCE = torch.tensor([0.2, -0.7, 0.5], dtype=torch.float64).log_softmax(0)


def dpo(beta: float) -> DPO:
    return DPO(beta=beta, label_smoothing=0.0, sft_weight=0.0, nll="mean")


def ipo(tau: float, reduction: Literal["mean", "sum"] = "mean") -> IPO:
    return IPO(tau=tau, reduction=reduction, sft_weight=0.0, nll="mean")


def pairs(answers: Sequence[Tensor], orders: Sequence[tuple[int, int]]) -> ResponseLogps:
    """One example for each (chosen, rejected) of ``orders``, from the token log-probs of every answer."""
    flat = [answers[index] for order in orders for index in order]
    return ResponseLogps(
        tokens=torch.cat(flat),
        lengths=torch.tensor([len(tokens) for tokens in flat]),
        example=torch.arange(len(orders)).repeat_interleave(2),
        roles=("chosen", "rejected") * len(orders),
        n_examples=len(orders),
    )


def expected_loss(
    loss: PairwiseLoss,
    policy: Sequence[Tensor],
    reference: Sequence[Tensor],
    orders: Sequence[tuple[int, int]],
    shares: Tensor | None = None,
) -> Tensor:
    """The mean loss over pairs of which each ``orders`` has this share of the data; None: equal shares."""
    terms = loss(pairs(policy, orders), pairs(reference, orders), context(len(orders)))
    shares = torch.ones_like(terms.value) if shares is None else shares
    return (terms.value * shares).sum() / shares.sum()


def arms(logits: Tensor) -> list[Tensor]:
    """The token log-probs of every arm of a softmax bandit."""
    return list(logits.log_softmax(0).split(1))


def minimum(objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The parameters at which L-BFGS from ``start`` finds no slope any more."""
    parameters = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = objective(parameters)
        value.backward()
        return value

    optimiser.step(closure)
    assert parameters.grad is not None
    assert parameters.grad.abs().max() < 1e-9
    return parameters.detach()


def gaps(logits: Tensor) -> Tensor:
    """Delta of each arm and the next one."""
    return -(logits.log_softmax(0) - REFERENCE).diff()


TOTAL_ORDER = list(combinations(range(3), 2))  # arm 0 above arm 1 above arm 2: three pairs


@pytest.mark.parametrize("beta", [0.5, 1.5])
def test_dpo_on_a_total_order_grows_without_end_towards_the_best_arm(beta: float) -> None:
    """The infimum 0 of sum_ij -log sigmoid(beta Delta_ij) is attained nowhere: every gap must be infinite.

    From the reference on both neighbours' gaps are one h, because the pairs treat them alike. Gradient descent of the
    mean over three pairs moves h by (beta / 3) (sigmoid(-beta h) + sigmoid(-2 beta h)) per unit of time (step times
    rate), which is (beta / 3) (x + O(x^3)) with x = e^{-beta h}. So e^{beta h} grows like beta^2 time / 3, and h by
    ln(10) / beta whenever the time is ten times as long. (What the start adds to e^{beta h} is of order 1, beside 42
    at step 50: hence the tolerance.)
    """
    logits, found = REFERENCE.clone().requires_grad_(), {}
    for step in range(1, 501):
        (slope,) = torch.autograd.grad(expected_loss(dpo(beta), arms(logits), arms(REFERENCE), TOTAL_ORDER), logits)
        logits = (logits - 2.5 / beta**2 * slope).detach().requires_grad_()
        found[step] = gaps(logits).tolist()
    assert found[500] == pytest.approx([found[500][0]] * 2)
    grown = found[500][0] - found[50][0]
    assert grown == pytest.approx(math.log(10) / beta, rel=0.04)
    best, second, worst = logits.detach().softmax(0).tolist()
    assert best > 0.95
    assert best > second > worst


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_ipo_on_a_total_order_stops_at_a_third_of_1_over_tau(tau: float, reduction: Literal["mean", "sum"]) -> None:
    """With a, b the neighbours' gaps and t = 1 / (2 tau): (a - t)^2 + (b - t)^2 + (a + b - t)^2 is least where

    2a + b = 2t = a + 2b, so a = b = 2t / 3 = 1 / (3 tau). Answers of one token have m = s: ``reduction`` is no choice.
    """
    logits = minimum(
        lambda logits: expected_loss(ipo(tau, reduction), arms(logits), arms(REFERENCE), TOTAL_ORDER), REFERENCE
    )
    torch.testing.assert_close(gaps(logits), torch.full((2,), 1 / (3 * tau), dtype=torch.float64), rtol=1e-8, atol=0)


def test_ipo_reductions_agree_on_answers_of_one_token_only() -> None:
    """d = m - m = s - s for one token; for one chosen token -0.5 and rejected ones -1, -3 under a certain reference

    the mean gives d = -0.5 + 2 = 1.5, the sum -0.5 + 4 = 3.5; with tau = 0.5 the target is 1: 0.25 and 6.25.
    """
    logits = torch.tensor([1.3, -0.2, 0.4], dtype=torch.float64)
    mean, total = (
        expected_loss(ipo(0.3, reduction), arms(logits), arms(REFERENCE), TOTAL_ORDER) for reduction in ("mean", "sum")
    )
    assert torch.equal(mean, total)
    policy = [torch.tensor([-0.5], dtype=torch.float64), torch.tensor([-1.0, -3.0], dtype=torch.float64)]
    certain = [torch.zeros_like(tokens) for tokens in policy]
    assert expected_loss(ipo(0.5, "mean"), policy, certain, [(0, 1)]).item() == pytest.approx(0.25)
    assert expected_loss(ipo(0.5, "sum"), policy, certain, [(0, 1)]).item() == pytest.approx(6.25)


@pytest.mark.parametrize("beta", [0.4, 2.0])
def test_dpo_on_soft_preferences_is_the_optimal_policy_of_the_reward(beta: float) -> None:
    """Both orders of a pair, in shares q = sigmoid(r_i - r_j) and 1 - q, ask for -q log sigmoid(beta Delta_ij)

    - (1 - q) log sigmoid(-beta Delta_ij), least where sigmoid(beta Delta_ij) = q: Delta_ij = (r_i - r_j) / beta. All
    pairs agree on it at log(pi / pi_ref) = r / beta + constant: pi = pi_ref e^{r / beta} / Z.
    """
    rewards = torch.tensor([0.3, 1.1, -0.6], dtype=torch.float64)
    orders = list(permutations(range(3), 2))
    shares = torch.stack([torch.sigmoid(rewards[i] - rewards[j]) for i, j in orders])
    logits = minimum(lambda logits: expected_loss(dpo(beta), arms(logits), arms(REFERENCE), orders, shares), REFERENCE)
    torch.testing.assert_close(logits.softmax(0), (REFERENCE + rewards / beta).softmax(0), rtol=1e-8, atol=0)


@pytest.mark.parametrize("beta", [0.4, 2.0])
def test_r_dpo_on_soft_preferences_takes_alpha_len_a_token_off_the_reward(beta: float) -> None:
    """Answer 1 is one token, answer 2 is two. With q = sigmoid(r_1 - r_2) as above the optimum has

    beta Delta + alpha_len (n_1 - n_2) = r_1 - r_2, so Delta = ((r_1 - alpha_len n_1) - (r_2 - alpha_len n_2)) / beta.
    """
    r_1, r_2, alpha_len = 0.3, 0.8, 0.25
    start = torch.tensor([[0.4, -0.3], [0.1, 0.6]], dtype=torch.float64)
    loss = RDPO(beta=beta, label_smoothing=0.0, sft_weight=0.0, nll="mean", alpha_len=alpha_len)
    share = torch.sigmoid(torch.tensor(r_1 - r_2, dtype=torch.float64))

    def answers(logits: Tensor) -> list[Tensor]:
        first, second = logits.log_softmax(1)
        return [first[:1], torch.stack([first[1], second[0]])]

    logits = minimum(
        lambda logits: expected_loss(
            loss, answers(logits), answers(start), [(0, 1), (1, 0)], torch.stack([share, 1 - share])
        ),
        start,
    )
    one, two = (ours.sum() - theirs.sum() for ours, theirs in zip(answers(logits), answers(start), strict=True))
    expected = ((r_1 - alpha_len * 1) - (r_2 - alpha_len * 2)) / beta
    assert (one - two).item() == pytest.approx(expected, rel=1e-8)


# The edit is the first token; behind it both answers go on with the same correct token, the first of three.
EDIT = torch.tensor([0.3, -0.1], dtype=torch.float64)
BEHIND_CHOSEN = torch.tensor([1.2, 0.1, -0.4], dtype=torch.float64)
BEHIND_REJECTED = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
P_W, P_L = BEHIND_CHOSEN.softmax(0)[0].item(), BEHIND_REJECTED.softmax(0)[0].item()
THRESHOLD = (P_W - P_L) / (1 - P_W)
BETA = 0.3


def edited(shared: Tensor) -> list[Tensor]:
    """Chosen and rejected answer: ``shared`` (3,) is added to the logits behind both edits, as an output bias is."""
    edit = EDIT.log_softmax(0)
    return [
        torch.stack([edit[0], (BEHIND_CHOSEN + shared).log_softmax(0)[0]]),
        torch.stack([edit[1], (BEHIND_REJECTED + shared).log_softmax(0)[0]]),
    ]


def slope_of_the_correct_logit(loss: PairwiseLoss, reference: Sequence[Tensor]) -> float:
    """d loss / d logit of the correct token: descent lowers the logit where it is positive."""
    shared = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(expected_loss(loss, edited(shared), reference, [(0, 1)]), shared)
    return float(slope[0])


def dpo_positive(lambda_: float) -> DpoPositive:
    return DpoPositive(beta=BETA, label_smoothing=0.0, sft_weight=0.0, nll="mean", lambda_=lambda_, placement="inside")


SAME = [tokens.detach() for tokens in edited(torch.zeros(3, dtype=torch.float64))]
ABOVE = [SAME[0] + 0.2, SAME[1] - 0.1]  # s_w^r - s_w = 0.4 over two tokens, and Delta = -0.4 - 0.2 = -0.6


def test_dpo_lowers_the_correct_token_behind_an_edit() -> None:
    """d s_w / d logit = 1 - p_w and d s_l / d logit = 1 - p_l, so d Delta / d logit = p_l - p_w < 0:

    the loss's slope is -beta sigmoid(-beta Delta) (p_l - p_w) > 0, at the reference with sigmoid(0) = 1/2.
    """
    assert P_W > P_L
    assert slope_of_the_correct_logit(dpo(BETA), SAME) == pytest.approx(BETA * 0.5 * (P_W - P_L))
    weight = torch.sigmoid(torch.tensor(0.6 * BETA, dtype=torch.float64)).item()
    assert slope_of_the_correct_logit(dpo(BETA), ABOVE) == pytest.approx(BETA * weight * (P_W - P_L))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_dpo_positive_below_the_reference_raises_it_from_a_threshold_of_lambda_on(factor: float) -> None:
    """Where s_w < s_w^r the logit's argument Delta - lambda (s_w^r - s_w) has the slope (p_l - p_w) + lambda (1 - p_w):

    positive, so that descent raises the token, from lambda = (p_w - p_l) / (1 - p_w) on. Here Delta = -0.6 and the
    shortfall is 0.4.
    """
    lambda_ = factor * THRESHOLD
    weight = torch.sigmoid(torch.tensor(BETA * (0.6 + 0.4 * lambda_), dtype=torch.float64)).item()
    expected = -BETA * weight * ((P_L - P_W) + lambda_ * (1 - P_W))
    slope = slope_of_the_correct_logit(dpo_positive(lambda_), ABOVE)
    assert slope == pytest.approx(expected, abs=1e-12)
    assert slope == pytest.approx(0, abs=1e-12) if factor == 1 else (slope < 0) == (factor > 1)


def test_dpo_positive_at_the_reference_still_has_the_slope_of_dpo() -> None:
    """max(0, s_w^r - s_w) has derivative 0 at 0: whatever lambda is, the first step is DPO's."""
    slope = slope_of_the_correct_logit(dpo_positive(100 * THRESHOLD), SAME)
    assert slope == slope_of_the_correct_logit(dpo(BETA), SAME)
    assert slope > 0
