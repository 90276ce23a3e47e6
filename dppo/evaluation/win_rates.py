"""Win rates with intervals, over prompts and over seeds.

An outcome is 1 for a win, 1/2 for a tie, 0 for a loss. Intervals are 95 %: percentile bootstrap over prompts for the
rate with ties = 1/2 and for differences; Wilson without continuity correction for the strict rate, where ties lose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dppo.types import Json, WinRate

Array = npt.NDArray[np.float64]
_MOST_KEPT = 1 << 24  # counts, of four bytes
Counts = npt.NDArray[np.integer[Any]]
Z_95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def outcomes(policy: Sequence[float], reference: Sequence[float]) -> Array:
    """(P,) 1 where the policy's reward is higher, 1/2 where equal, else 0; rewards of the same prompts, in order."""
    own, other = np.asarray(policy, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if own.shape != other.shape or own.ndim != 1 or len(own) == 0:
        raise ValueError(f"need one reward of each model per prompt, got {own.shape} and {other.shape}")
    if not (np.isfinite(own).all() and np.isfinite(other).all()):
        raise ValueError("rewards must be finite")
    return (np.sign(own - other) + 1) / 2


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, without continuity correction (Wilson 1927)."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}")
    share = successes / n
    scale = 1 + Z_95**2 / n
    centre = (share + Z_95**2 / (2 * n)) / scale
    half = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n)) / scale
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def win_rate(policy: Sequence[float], reference: Sequence[float], *, n_bootstrap: int, seed: int) -> WinRate:
    """The win rate of one run on P prompts, from both models' rewards."""
    return win_rate_of(outcomes(policy, reference), n_bootstrap=n_bootstrap, seed=seed)


def win_rate_of(found: Array, *, n_bootstrap: int, seed: int) -> WinRate:
    """The win rate from (P,) outcomes in [0, 1]; a soft one, as a judge's log-probs give, is won above 1/2.

    ``value`` is then the mean preference; wins, ties and the strict rate count what is above, at and below 1/2.
    """
    n, wins, ties = len(found), int((found > 0.5).sum()), int((found == 0.5).sum())
    interval = crossed_rate(found[None], n_bootstrap=n_bootstrap, seed=seed)
    strict_low, strict_high = wilson(wins, n)
    return WinRate(
        value=interval.value,
        ci_low=interval.low,
        ci_high=interval.high,
        strict=wins / n,
        strict_ci_low=strict_low,
        strict_ci_high=strict_high,
        n=n,
        wins=wins,
        ties=ties,
    )


def compared_rewards(policy: Sequence[float], reference: Sequence[float], *, n_bootstrap: int, seed: int) -> Json:
    """Both models' mean reward and the policy's gain on P prompts, with intervals, and the shares below 0."""
    own, other = np.asarray(policy, dtype=np.float64), np.asarray(reference, dtype=np.float64)

    def mean(values: Array) -> Json:
        interval = crossed_mean(values[None], n_bootstrap=n_bootstrap, seed=seed)
        return {"value": interval.value, "ci_low": interval.low, "ci_high": interval.high}

    return {
        "policy": mean(own),
        "reference": mean(other),
        "delta": mean(own - other),
        "negative_share": {"policy": float((own < 0).mean()), "reference": float((other < 0).mean())},
    }


def crossed_mean(values: Array, *, n_bootstrap: int, seed: int) -> Interval:
    """The mean of (S, P) values of S seeds on the same P prompts, with its bootstrap interval.

    Every resample draws seeds, and prompts once for all of them: the seeds share the prompts.
    """
    means = _crossed_bootstrap(values, n_bootstrap, seed)
    low, high = (float(bound) for bound in np.quantile(means, [0.025, 0.975]))
    return Interval(float(values.mean()), low, high)


def crossed_rate(values: Array, *, n_bootstrap: int, seed: int) -> Interval:
    """``crossed_mean`` of (S, P) outcomes; where it has no width at 0 or 1, Wilson's interval on P prompts."""
    found = crossed_mean(values, n_bootstrap=n_bootstrap, seed=seed)
    if found.low == found.high and found.value in (0.0, 1.0):
        low, high = wilson(found.value * values.shape[1], values.shape[1])
        return Interval(found.value, low, high)
    return found


def paired_difference(
    first: Array, second: Array, *, n_bootstrap: int, seed: int, comparisons: int = 1
) -> tuple[Interval, float]:
    """Mean of ``first - second``, both (S, P) on the same seeds and prompts, with its interval and two-sided p.

    p = 2 min(share of resampled differences <= 0, share >= 0), at most 1, where what was observed counts as one more
    resample: no finite number of them can show that p is 0. The interval has level 1 - .05 / ``comparisons``: that of
    all comparisons of a report together is then at least 95 % (Bonferroni).
    """
    if first.shape != second.shape:
        raise ValueError(f"paired outcomes need the same seeds and prompts, got {first.shape} and {second.shape}")
    means = _crossed_bootstrap(first - second, n_bootstrap, seed)
    tail = 0.025 / comparisons
    low, high = (float(bound) for bound in np.quantile(means, [tail, 1 - tail]))
    p = 2 * (min(int((means <= 0).sum()), int((means >= 0).sum())) + 1) / (n_bootstrap + 1)
    return Interval(float((first - second).mean()), low, high), min(1.0, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number (Holm 1979), in their order."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def t_interval(means: Sequence[float]) -> Interval:
    """Mean over seeds with Student's 95 % t interval; no width is claimed for a single seed (bounds are NaN)."""
    values = np.asarray(means, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    if n < 2:
        return Interval(mean, math.nan, math.nan)
    half = _t_quantile(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def _t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t within 1e-4: tabled to 30 degrees of freedom, then Cornish-Fisher.

    The expansion is that of Abramowitz and Stegun, 26.7.5.
    """
    table = (
        12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
        2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
        2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
    )  # fmt: skip
    if degrees <= len(table):
        return table[degrees - 1]
    z = Z_95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def _crossed_bootstrap(values: Array, n_bootstrap: int, seed: int) -> Array:
    """(n_bootstrap,) means over resampled seeds and prompts of (S, P) values."""
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"need (seeds, prompts), got {values.shape}")
    n_seeds, n_prompts = values.shape
    means = np.empty(n_bootstrap)
    start = 0
    small = n_prompts * n_bootstrap <= _MOST_KEPT
    for drawn, seeds in (_kept_resamples if small else _resamples)(n_seeds, n_prompts, n_bootstrap, seed):
        # Sums before the division: those of outcomes are exact, so that a difference of 0 is 0 and not rounding noise.
        per_seed = (drawn.astype(np.float64) @ values.T).T  # this way round it takes a third of the time
        own = slice(start, start + len(drawn))
        means[own] = np.take_along_axis(per_seed, seeds, axis=0).sum(axis=0) / (n_seeds * n_prompts)
        start += len(drawn)
    return means


def _resamples(n_seeds: int, n_prompts: int, n_bootstrap: int, seed: int) -> Iterator[tuple[Counts, Counts]]:
    """In chunks of N: how often each resample drew each prompt (N, P), and which seeds it drew (S, N)."""
    generator = np.random.default_rng(seed)
    chunk = max(1, (1 << 20) // n_prompts)
    for start in range(0, n_bootstrap, chunk):
        n = min(chunk, n_bootstrap - start)
        prompts = generator.integers(0, n_prompts, size=(n, n_prompts))
        seeds = generator.integers(0, n_seeds, size=(n_seeds, n))
        drawn = np.bincount((prompts + n_prompts * np.arange(n)[:, None]).ravel(), minlength=n * n_prompts)
        yield drawn.reshape(n, n_prompts).astype(np.uint32), seeds


@functools.lru_cache(maxsize=4)
def _kept_resamples(*numbers: int) -> list[tuple[Counts, Counts]]:
    """The same, kept: drawing costs more than the product that uses it, and a comparison of many runs shares it."""
    return list(_resamples(*numbers))
