"""Many configurations against each other on the same prompts: who beats whom how often, and one rating for each.

A configuration's rewards are an array (S, P) of S seeds on P prompts. Outcomes are 1 for a win, 1/2 for a tie, 0 for a
loss, as in ``win_rates``. Nothing here reads files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dppo.evaluation.win_rates import Array, holm, wilson

ELO = 400 / math.log(10)  # Elo points in a rating of 1 nat
_CHUNK = 1 << 23  # numbers in a work array
_CONVERGED = 1e-6  # nats; the next step of Newton's method would be of the order of its square
_MOST_STEPS = 200  # of at most 1 nat each: farther apart no ratings can be


@dataclass(frozen=True, eq=False)
class Entrant:
    """One configuration.

    ``rewards`` are (S, P), a row for each of ``seeds``; the P prompts are the same, in the same order, for all that
    are compared. ``seeds=None`` with (1, P) is a model that every seed shares, such as the SFT model. A reward of
    -inf, which a diverged run has on every prompt, loses to all others and ties with itself.
    """

    name: str
    seeds: tuple[int, ...] | None
    rewards: Array

    def __post_init__(self) -> None:
        rows = 1 if self.seeds is None else len(self.seeds)
        if self.rewards.ndim != 2 or self.rewards.shape[0] != rows or self.rewards.size == 0:
            raise ValueError(f"{self.name}: need rewards ({rows} seeds, prompts), got {self.rewards.shape}")
        if self.seeds is not None and len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"{self.name}: a seed is named twice in {self.seeds}")
        if np.isnan(self.rewards).any() or np.isposinf(self.rewards).any():
            raise ValueError(f"{self.name}: rewards must be finite, or -inf for what is lost")


@dataclass(frozen=True, eq=False)
class Ranking:
    """M configurations against each other, in the order in which they were given; intervals are 95 %, each for itself.

    Matrices are (M, M): entry (i, j) of ``rate`` is how often i's answer has the higher reward than j's, ties 1/2, so
    that (j, i) is 1 minus it; ``wins`` and ``ties`` count the answers behind it, of ``n_prompts`` times the number of
    seeds or pairs of seeds. ``common_seeds`` is how many seeds both have; 0: none, so all pairs of their seeds were
    compared. ``p`` is two-sided against 1/2, ``p_holm`` adjusted for all M (M - 1) / 2 comparisons. On the diagonal
    rates are 1/2 and p values 1. Vectors are (M,): ``rating`` in nats (``ELO`` times it in Elo points), 0 for the
    entrant ``anchor``. ``separated``: some configurations never lost a point to some others, the data alone set no
    bound to how much better they are.
    """

    names: tuple[str, ...]
    anchor: int
    n_prompts: int
    n_bootstrap: int
    common_seeds: npt.NDArray[np.int64]
    wins: npt.NDArray[np.int64]
    ties: npt.NDArray[np.int64]
    rate: Array
    low: Array
    high: Array
    p: Array
    p_holm: Array
    rating: Array
    rating_low: Array
    rating_high: Array
    separated: bool

    @property
    def order(self) -> tuple[int, ...]:
        """The entrants from the highest rating to the lowest; of equals the first given is first."""
        return tuple(sorted(range(len(self.names)), key=lambda place: -self.rating[place]))

    @property
    def least_p(self) -> float:
        """What ``p_holm`` can't fall below: above .05 there are too few resamples to tell anything apart."""
        m = len(self.names) * (len(self.names) - 1) // 2
        return min(1.0, 2 * m / (self.n_bootstrap + 1))


def rank(entrants: Sequence[Entrant], *, n_bootstrap: int, seed: int, anchor: int = 0) -> Ranking:
    """Win matrix and ratings of M >= 2 configurations on common prompts.

    Two configurations are compared seed by seed over the seeds that both have, and where there is none by all pairs of
    their seeds. Every resample draws prompts once for everything, and as many seeds as a comparison has: the same
    random numbers choose them in each, so that configurations with the same seeds share each draw (crossed, as in
    ``win_rates.crossed_mean``); without common seeds both sides draw independently. p = 2 min(share of resampled rates
    <= 1/2, share >= 1/2), at most 1, where the rate itself counts as one more resample: it is never 0 (Davison and
    Hinkley 1997, section 4.2), and many comparisons take many resamples (``Ranking.least_p``). Where an interval has no
    width at 0 or 1 it is Wilson's on P prompts. Raises ValueError for fewer than two, for different numbers of prompts,
    or an ``anchor`` that is none of them.
    """
    m = len(entrants)
    if m < 2:
        raise ValueError(f"need two configurations or more, got {m}")
    if not 0 <= anchor < m:
        raise ValueError(f"anchor={anchor}: must be one of the {m} configurations")
    if len({one.rewards.shape[1] for one in entrants}) > 1:
        raise ValueError(f"all must have the same prompts, got {[one.rewards.shape[1] for one in entrants]}")
    n_prompts = entrants[0].rewards.shape[1]
    first, second = np.triu_indices(m, 1)
    games = [_Games.between(entrants[i], entrants[j]) for i, j in zip(first.tolist(), second.tolist(), strict=True)]
    rates = np.array([game.outcomes.mean() for game in games])
    resampled = _resampled(games, n_prompts, n_bootstrap, seed)  # (pairs, n_bootstrap)

    low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
    for place in np.flatnonzero((low == high) & np.isin(rates, (0.0, 1.0))):
        low[place], high[place] = wilson(rates[place] * n_prompts, n_prompts)
    below, above = ((tail.sum(axis=1) + 1) / (n_bootstrap + 1) for tail in (resampled <= 0.5, resampled >= 0.5))
    p = np.minimum(1.0, 2 * np.minimum(below, above))

    rating = bradley_terry(_matrices(rates[None], m), n_prompts=n_prompts, anchor=anchor)[0]
    chunk = max(1, _CHUNK // (m * m))
    ratings = np.concatenate(
        [
            bradley_terry(
                _matrices(resampled.T[start : start + chunk], m), n_prompts=n_prompts, anchor=anchor, start=rating
            )
            for start in range(0, n_bootstrap, chunk)
        ]
    )
    rating_low, rating_high = np.quantile(ratings, [0.025, 0.975], axis=0)

    def symmetric(values: npt.ArrayLike, diagonal: float) -> Array:
        matrix = np.full((m, m), diagonal)
        matrix[first, second] = matrix[second, first] = values
        return matrix

    def counts(forth: list[int], back: list[int], diagonal: Sequence[int]) -> npt.NDArray[np.int64]:
        matrix = np.diag(np.array(diagonal, dtype=np.int64))
        matrix[first, second], matrix[second, first] = forth, back
        return matrix

    matrix = _matrices(rates[None], m)[0]
    ties = [int((game.outcomes == 0.5).sum()) for game in games]
    common = [game.common for game in games]
    lower, upper = _matrices(low[None], m)[0], _matrices(high[None], m)[0]
    below_diagonal = np.tril_indices(m, -1)
    lower[below_diagonal], upper[below_diagonal] = upper[below_diagonal], lower[below_diagonal]
    return Ranking(
        names=tuple(one.name for one in entrants),
        anchor=anchor,
        n_prompts=n_prompts,
        n_bootstrap=n_bootstrap,
        common_seeds=counts(common, common, [len(one.rewards) for one in entrants]),
        wins=counts(
            [int((game.outcomes == 1).sum()) for game in games],
            [int((game.outcomes == 0).sum()) for game in games],
            [0] * m,
        ),
        ties=counts(ties, ties, [one.rewards.size for one in entrants]),
        rate=matrix,
        low=lower,
        high=upper,
        p=symmetric(p, 1.0),
        p_holm=symmetric(holm(p.tolist()), 1.0),
        rating=rating,
        rating_low=rating_low,
        rating_high=rating_high,
        separated=_separated(matrix),
    )


def bradley_terry(rates: Array, *, n_prompts: int, anchor: int, start: Array | None = None) -> Array:
    """(B, M) ratings in nats by maximum likelihood, from (B, M, M) rates on ``n_prompts`` prompts each.

    i beats j with probability sigmoid(rating_i - rating_j) (Bradley and Terry 1952), a tie is half a win, and every
    pair counts the same. One tied prompt is added to every pair, so that a configuration that wins everything has a
    finite rating too (log(2 P + 1) for two of them, P prompts); it moves a rate by at most 1 / (2 P + 2). The rating
    of ``anchor`` is 0. ``start`` (M,) is where the search begins; the maximum is unique. Raises ValueError for what is
    no rate.
    """
    n_sets, m, _ = rates.shape
    if not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError("rates must lie in [0, 1]")
    wanted = (n_prompts * rates + 0.5) / (n_prompts + 1)
    free = np.delete(np.arange(m), anchor)
    ratings = np.zeros((n_sets, m)) if start is None else np.tile(start, (n_sets, 1))
    off_diagonal = ~np.eye(m, dtype=bool)
    for _ in range(_MOST_STEPS):
        expected = 1 / (1 + np.exp(ratings[:, None, :] - ratings[:, :, None]))
        slope = ((wanted - expected) * off_diagonal).sum(axis=2)
        spread = expected * (1 - expected) * off_diagonal
        curvature = -spread
        curvature[:, range(m), range(m)] = spread.sum(axis=2)
        step = np.zeros_like(ratings)
        step[:, free] = np.linalg.solve(curvature[:, free[:, None], free], slope[:, free, None])[..., 0]
        # Newton's steps, no two ratings moved apart by more than 1 nat: the likelihood then rises with each of them,
        # because the third derivative of log sigmoid is never larger than the second (Bach 2010, proposition 1).
        apart = step.max(axis=1) - step.min(axis=1)
        ratings += step / np.maximum(1.0, apart)[:, None]
        if apart.max() < _CONVERGED:
            break
    return ratings.round(12) + 0.0  # no rounding error beside 0, and no -0


@dataclass(frozen=True, eq=False)
class _Games:
    """Outcomes (rows, P) of one configuration against another; a row is a common seed, or a pair of seeds.

    ``seeds`` are the numbers of rows in a resample on both sides: (S, 1) for S common seeds, else (S_first, S_second).
    """

    outcomes: Array
    seeds: tuple[int, int]
    common: int

    @staticmethod
    def between(first: Entrant, second: Entrant) -> _Games:
        if first.seeds is None or second.seeds is None:
            rows = max(len(first.rewards), len(second.rewards))
            return _Games(_outcomes(first.rewards, second.rewards), (rows, 1), rows)
        if common := sorted(set(first.seeds) & set(second.seeds)):
            own, other = (one.rewards[[one.seeds.index(s) for s in common]] for one in (first, second) if one.seeds)
            return _Games(_outcomes(own, other), (len(common), 1), len(common))
        crossed = _outcomes(first.rewards[:, None], second.rewards[None])
        return _Games(crossed.reshape(-1, crossed.shape[-1]), (len(first.seeds), len(second.seeds)), 0)


def _outcomes(own: Array, other: Array) -> Array:
    """1 where ``own`` is higher, 1/2 where equal, else 0; by comparison, because -inf minus -inf is no number."""
    return np.where(own > other, 1.0, np.where(own == other, 0.5, 0.0))


def _resampled(games: Sequence[_Games], n_prompts: int, n_bootstrap: int, seed: int) -> Array:
    """(pairs, n_bootstrap) rates over resampled seeds and prompts."""
    generator = np.random.default_rng(seed)
    stacked = np.concatenate([game.outcomes for game in games])
    ends = np.cumsum([len(game.outcomes) for game in games])
    most = max(max(game.seeds) for game in games)
    rates = np.empty((len(games), n_bootstrap))
    chunk = max(1, _CHUNK // max(n_prompts, len(stacked)))
    for start in range(0, n_bootstrap, chunk):
        n = min(chunk, n_bootstrap - start)
        prompts = generator.integers(0, n_prompts, size=(n, n_prompts))
        drawn = np.bincount((prompts + n_prompts * np.arange(n)[:, None]).ravel(), minlength=n * n_prompts)
        # Sums of outcomes are exact, so that a rate of 1/2 is 1/2 and not a rounding error beside it.
        sums = stacked @ drawn.reshape(n, n_prompts).T.astype(np.float64)  # (rows of all pairs, n)
        own, other = generator.random((2, most, n))
        for place, (game, end) in enumerate(zip(games, ends, strict=True)):
            rows = sums[end - len(game.outcomes) : end]
            left, right = game.seeds
            picked = (own[:left] * left).astype(np.intp)  # (left, n)
            if right > 1 or game.common == 0:
                picked = (picked[:, None] * right + (other[:right] * right).astype(np.intp)[None]).reshape(-1, n)
            total = np.take_along_axis(rows, picked, axis=0).sum(axis=0)
            rates[place, start : start + n] = total / (len(picked) * n_prompts)
    return rates


def _matrices(rates: Array, m: int) -> Array:
    """(B, M, M) from (B, pairs) rates of the pairs above the diagonal."""
    first, second = np.triu_indices(m, 1)
    matrices = np.full((len(rates), m, m), 0.5)
    matrices[:, first, second] = rates
    matrices[:, second, first] = 1 - rates
    return matrices


def _separated(rates: Array) -> bool:
    """Whether the maximum likelihood is infinite: not everyone is reached from everyone by points won (Ford 1957)."""
    reached = rates > 0
    for _ in range(len(rates).bit_length()):
        reached = reached @ reached
    return not bool(reached.all())
