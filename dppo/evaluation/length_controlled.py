"""The length-controlled win rate: how often a model would win if its answers were as long as the reference's.

Dubois et al. 2024, "Length-Controlled AlpacaEval" (arXiv 2404.04475), in the form that needs the compared answers only
(AlpacaEval's ``length_controlled_minimal``), and the published form from published weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

N_RESAMPLES = 1_000
RIDGE = 0.01
FEWEST = 0.1  # share of answers that must be longer, and share that must be shorter
_AT_ONCE = 1 << 15  # resampled answers that are fitted together: a few arrays that stay in the processor's cache
_MOST_STEPS = 100


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """The length-controlled win rate of P prompts with its 95 % interval.

    ``intercept`` and ``slope`` are the fitted w_0 and w_1, ``longer`` and ``shorter`` the shares of prompts on which
    the model's answer is longer or shorter than the reference's. ``warning`` says why the value or its interval
    should not be relied on; None if nothing is wrong.
    """

    value: float
    ci_low: float
    ci_high: float
    n: int
    n_resamples: int
    intercept: float
    slope: float
    longer: float
    shorter: float
    warning: str | None


def length_controlled(
    outcomes: Array, longer_by: Array, *, seed: int, n_resamples: int = N_RESAMPLES
) -> LengthControlled:
    """The win rate at equal lengths, from a logistic regression of the outcome on the standardised length difference.

    ``outcomes`` (P,) in [0, 1]: 1 a win, 1/2 a tie, 0 a loss, or a soft preference for the model. ``longer_by`` (P,)
    characters of the model's answer minus those of the reference's. With x = tanh(d / std(d)), std with P - 1 (x = 0
    where that is 0), (w_0, w_1) minimise

        sum_i [log(1 + exp(w_0 + w_1 x_i)) - y_i (w_0 + w_1 x_i)] + (0.01 / 2) (w_0^2 + w_1^2)

    and the value is sigmoid(w_0). Interval: the 2.5 and 97.5 % quantiles over resamples of prompts, std and weights
    fitted anew in each. Raises ValueError for shapes that differ, no prompts, or values out of range.
    """
    if outcomes.shape != longer_by.shape or outcomes.ndim != 1 or len(outcomes) == 0:
        raise ValueError(
            f"need one outcome and one length difference a prompt, got {outcomes.shape}, {longer_by.shape}"
        )
    if not (((outcomes >= 0) & (outcomes <= 1)).all() and np.isfinite(longer_by).all()):
        raise ValueError("outcomes must be in [0, 1] and length differences finite")
    n = len(outcomes)
    weights = _fit(outcomes[None], _standardised(longer_by[None]), np.zeros(2))[0]
    generator = np.random.default_rng(seed)
    values = np.empty(n_resamples)
    at_once = max(1, _AT_ONCE // n)
    for start in range(0, n_resamples, at_once):
        drawn = generator.integers(0, n, size=(min(at_once, n_resamples - start), n))
        fitted = _fit(outcomes[drawn], _standardised(longer_by[drawn]), weights)
        values[start : start + len(drawn)] = _sigmoid(fitted[:, 0])
    low, high = (float(bound) for bound in np.quantile(values, [0.025, 0.975]))
    longer, shorter = float((longer_by > 0).mean()), float((longer_by < 0).mean())
    return LengthControlled(
        value=float(_sigmoid(weights[0])),
        ci_low=low,
        ci_high=high,
        n=n,
        n_resamples=n_resamples,
        intercept=float(weights[0]),
        slope=float(weights[1]),
        longer=longer,
        shorter=shorter,
        warning=_warning(outcomes, longer_by, longer, shorter),
    )


def published_form(difficulty: Array, *, difficulty_weight: float, model_weight: float) -> tuple[float, float]:
    """AlpacaEval's ``length_controlled_winrate`` from its fitted weights, and its standard error, both 0..100.

    100 mean_i sigmoid(w_difficulty difficulty_i + w_model): the term of the length difference is 0 at equal lengths.
    ``difficulty`` (P,) is the column instruction_difficulty. The standard error is NaN for a single prompt.
    """
    predicted = _sigmoid(difficulty_weight * difficulty + model_weight)
    error = float(predicted.std(ddof=1)) / np.sqrt(len(predicted)) if len(predicted) > 1 else np.nan
    return 100 * float(predicted.mean()), 100 * float(error)


def _standardised(longer_by: Array) -> Array:
    """(B, P) tanh of the differences over their own std in each row; 0 in rows without spread."""
    spread = longer_by.std(axis=1, ddof=1, keepdims=True) if longer_by.shape[1] > 1 else np.zeros((len(longer_by), 1))
    # The std of equal numbers may be rounding noise, which would make x of them 1.
    flat = longer_by.max(axis=1, keepdims=True) == longer_by.min(axis=1, keepdims=True)
    return np.where(flat, 0.0, np.tanh(longer_by / np.where(flat, 1.0, spread)))


def _fit(outcomes: Array, x: Array, start: Array) -> Array:
    """(B, 2) weights (w_0, w_1) of B regressions on P prompts each, both (B, P), from ``start`` (2,).

    Newton's method, all rows at once, each step halved until the loss doesn't rise: from afar a whole step can
    overshoot. The ridge makes every loss strictly convex, so that there is one optimum, also for separable data.
    """
    weights = np.tile(start, (len(x), 1))
    loss, p = _loss(outcomes, x, weights)
    for _ in range(_MOST_STEPS):
        step = _newton_step(outcomes, x, weights, p)
        for _ in range(_MOST_STEPS):
            then, p = _loss(outcomes, x, weights + step)
            # At the optimum the loss changes by less than it is rounded by.
            rises = then > loss + 1e-12 * (1 + loss)
            if not rises.any():
                break
            step[rises] /= 2
        weights, loss = weights + step, then
        if np.abs(step).max() < 1e-9:
            return weights
    raise ArithmeticError(f"logistic regressions didn't converge in {_MOST_STEPS} Newton steps")


def _newton_step(outcomes: Array, x: Array, weights: Array, p: Array) -> Array:
    """(B, 2) minus the inverse Hessian times the gradient, where ``p`` (B, P) are the fitted probabilities."""
    missing, curvature = outcomes - p, p * (1 - p)
    g0 = missing.sum(axis=1) - RIDGE * weights[:, 0]
    g1 = np.vecdot(missing, x) - RIDGE * weights[:, 1]
    weighted = curvature * x
    a, b, c = curvature.sum(axis=1) + RIDGE, weighted.sum(axis=1), np.vecdot(weighted, x) + RIDGE
    step: Array = np.stack([c * g0 - b * g1, a * g1 - b * g0], axis=1) / (a * c - b * b)[:, None]
    return step


def _loss(outcomes: Array, x: Array, weights: Array) -> tuple[Array, Array]:
    """(B,) summed log loss with the ridge, and the probabilities (B, P)."""
    logits = weights[:, :1] + weights[:, 1:] * x
    rest = np.exp(-np.abs(logits))
    p = np.where(logits >= 0, 1.0, rest) / (1 + rest)
    losses = np.maximum(logits, 0) + np.log(1 + rest) - outcomes * logits
    return losses.sum(axis=1) + RIDGE / 2 * (weights**2).sum(axis=1), p


def _sigmoid(logits: Array) -> Array:
    # By tanh, which can't overflow.
    return 0.5 * (1 + np.tanh(0.5 * logits))


def _warning(outcomes: Array, longer_by: Array, longer: float, shorter: float) -> str | None:
    if (outcomes == outcomes[0]).all() and outcomes[0] in (0.0, 1.0):
        return "all outcomes are the same: the interval has no width, rely on that of the plain win rate"
    if not longer_by.any():  # equal lengths everywhere are what is asked about
        return None
    which, share = ("longer", longer) if longer < shorter else ("shorter", shorter)
    if share >= FEWEST:
        return None
    return f"{share:.1%} of the answers are {which} than the reference's: equal lengths are an extrapolation"
