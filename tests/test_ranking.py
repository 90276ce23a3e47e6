"""Win matrices and ratings, against values worked out by hand, invariances and simulations."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest

from dppo.evaluation.ranking import ELO, Entrant, Ranking, bradley_terry, rank
from dppo.evaluation.win_rates import Array, crossed_rate, wilson


def entrant(name: str, *rows: Sequence[float], seeds: tuple[int, ...] | None = None) -> Entrant:
    return Entrant(name, tuple(range(len(rows))) if seeds is None else seeds, np.array(rows, dtype=np.float64))


def ranked(*entrants: Entrant, anchor: int = 0, n_bootstrap: int = 400) -> Ranking:
    return rank(entrants, n_bootstrap=n_bootstrap, seed=0, anchor=anchor)


def drawn(m: int, s: int, p: int, seed: int = 0) -> list[Entrant]:
    """Configurations whose rewards share a part by prompt, each a little better than the one before."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=p)
    return [
        Entrant(f"c{place}", tuple(range(s)), np.round(shared + 0.2 * place + generator.normal(size=(s, p)), 1))
        for place in range(m)
    ]


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_two_configurations_by_hand() -> None:
    """Two wins, a tie and a loss on four prompts: 2.5 / 4. With a tied prompt added 3 / 5, and log(3 / 2) nats."""
    found = ranked(entrant("a", [0, 0, 0, 0]), entrant("b", [1, 1, 0, -1]))
    assert found.rate.tolist() == [[0.5, 0.375], [0.625, 0.5]]
    assert found.wins.tolist() == [[0, 1], [2, 0]]
    assert found.ties.tolist() == [[4, 1], [1, 4]]
    assert found.rating == pytest.approx([0, math.log(3 / 2)])
    assert math.log(3 / 2) * ELO == pytest.approx(400 * math.log10(1.5))
    assert found.order == (1, 0)
    assert not found.separated
    assert found.low[1, 0] == pytest.approx(1 - found.high[0, 1])
    # Means of four draws from 1, 1, 1/2, 0: P(<= 1/8) = 5/256, P(<= 1/4) = 19/256, P(1) = 16/256.
    assert found.low[1, 0] in (0.125, 0.25)
    assert found.high[1, 0] == 1
    assert found.p[0, 1] == found.p[1, 0] == found.p_holm[0, 1]


def test_three_configurations_by_hand() -> None:
    """A circle of equal strength has equal ratings; and rates that follow the model are fitted exactly.

    With ratings 0, log 2, log 6: 2/3 and 6/7 against the first, 6 / (6 + 2) = 3/4 against each other.
    """
    circle = ranked(entrant("a", [3, 1, 2]), entrant("b", [2, 3, 1]), entrant("c", [1, 2, 3]))
    assert [circle.rate[0, 1], circle.rate[1, 2], circle.rate[2, 0]] == pytest.approx([2 / 3] * 3)
    assert circle.rating == pytest.approx([0, 0, 0], abs=1e-12)
    rates = np.array([[1 / 2, 1 / 3, 1 / 7], [2 / 3, 1 / 2, 1 / 4], [6 / 7, 3 / 4, 1 / 2]])
    (many,) = bradley_terry(rates[None], n_prompts=10**9, anchor=0)
    assert many == pytest.approx([0, math.log(2), math.log(6)], abs=1e-7)
    (anchored,) = bradley_terry(rates[None], n_prompts=10**9, anchor=2)
    assert anchored == pytest.approx(many - many[2], abs=1e-9)


def test_the_ratings_are_where_the_likelihood_is_flat() -> None:
    """Each configuration's points equal the points that its rating predicts, for rates that follow no model."""
    generator = np.random.default_rng(1)
    upper = np.triu(generator.random((7, 5, 5)), 1)
    rates = upper + np.tril(1 - upper.transpose(0, 2, 1), -1) + np.eye(5) / 2
    found = bradley_terry(rates, n_prompts=20, anchor=1)
    expected = 1 / (1 + np.exp(found[:, None, :] - found[:, :, None]))
    assert expected.sum(axis=2) == pytest.approx(((20 * rates + 0.5) / 21).sum(axis=2), abs=1e-8)
    assert (found[:, 1] == 0).all()


def test_a_configuration_that_wins_everything_has_a_finite_rating() -> None:
    """Of four prompts all won: (4 + 1/2) to 1/2, log 9. It is said that the data set no bound."""
    found = ranked(entrant("a", [0, 0, 0, 0]), entrant("b", [1, 2, 3, 4]))
    assert found.separated
    assert found.rating == pytest.approx([0, math.log(9)])
    assert (found.low[1, 0], found.high[1, 0]) == wilson(4, 4)
    assert (found.low[0, 1], found.high[0, 1]) == pytest.approx((1 - wilson(4, 4)[1], 1 - wilson(4, 4)[0]))
    # Two groups, even within, one above the other in everything: no configuration has won all, and yet no bound.
    groups = [entrant(name, row) for name, row in zip("abcd", ([0, 1], [1, 0], [5, 6], [6, 5]), strict=True)]
    assert ranked(*groups).separated
    assert not ranked(*groups[:2]).separated
    far = bradley_terry(np.array([[[0.5, 0, 0], [1, 0.5, 0], [1, 1, 0.5]]]), n_prompts=10**6, anchor=0)[0]
    assert np.isfinite(far).all()
    assert far[2] > far[1] > 0


def test_a_diverged_run_loses_to_all_and_ties_with_another() -> None:
    lost = [-math.inf] * 3
    found = ranked(entrant("a", [0, 0, 0]), entrant("b", lost), entrant("c", lost))
    assert found.rate.tolist() == [[0.5, 1, 1], [0, 0.5, 0.5], [0, 0.5, 0.5]]
    assert found.rating[1] == pytest.approx(found.rating[2])
    assert found.rating[1] < -1


def test_equal_configurations_are_equal() -> None:
    found = ranked(entrant("a", [1, 2, 3]), entrant("b", [1, 2, 3]))
    assert (found.rate == 0.5).all() and (found.low == 0.5).all() and (found.high == 0.5).all()
    assert (found.p == 1).all() and (found.p_holm == 1).all()
    assert (found.rating == 0).all() and (found.rating_high == 0).all()


def test_p_values_are_never_0_and_adjusted_for_all_comparisons() -> None:
    """Certain wins on 399 resamples: 2 / 400, times 3 for the smallest of three."""
    found = ranked(entrant("a", [0] * 9), entrant("b", [1] * 9), entrant("c", [2] * 9), n_bootstrap=399)
    assert found.p[0, 1] == 2 / 400
    assert found.p_holm[0, 2] == pytest.approx(6 / 400)
    assert found.least_p == pytest.approx(6 / 400)
    assert (np.diag(found.p_holm) == 1).all()


# --- seeds ------------------------------------------------------------------------------------------------------------


def test_common_seeds_are_compared_seed_by_seed() -> None:
    """Seeds 1 and 2 are common: rows (1, 0) against (0, 0) and (5, 5) against (9, 4): 1, 1/2, 0, 1."""
    first = entrant("a", [7, 7], [1, 0], [5, 5], seeds=(0, 1, 2))
    second = entrant("b", [9, 4], [0, 0], [8, 8], seeds=(2, 1, 3))
    found = ranked(first, second)
    assert found.rate[0, 1] == (1 + 0.5 + 0 + 1) / 4
    assert found.common_seeds.tolist() == [[3, 2], [2, 3]]
    assert (found.wins[0, 1], found.ties[0, 1], found.wins[1, 0]) == (2, 1, 1)


def test_without_common_seeds_all_pairs_of_seeds_are_compared() -> None:
    """(1, 0) and (3, 0) against (2, 0): 0, 1/2, 1, 1/2."""
    found = ranked(entrant("a", [1, 0], [3, 0], seeds=(0, 1)), entrant("b", [2, 0], seeds=(5,)))
    assert found.rate[0, 1] == 0.5
    assert found.common_seeds[0, 1] == 0
    assert (found.wins[0, 1], found.ties[0, 1], found.wins[1, 0]) == (1, 2, 1)
    # The seeds are drawn: with both rows of ``a`` on either side of ``b`` the rate is anything from 1/4 to 3/4.
    assert (found.low[0, 1], found.high[0, 1]) == (0, 1)


def test_seeds_drawn_on_both_sides_widen_the_interval() -> None:
    """Without common seeds an effect of the seed on either side shows: variances add up, 2 / S of the seeds' own."""
    generator = np.random.default_rng(3)
    effects = np.sort(generator.normal(size=(2, 40)))  # drawn together, good seeds would meet good ones
    prompts = generator.normal(size=(2, 40, 500)) * 0.3
    first, second = (
        Entrant(name, tuple(range(at, at + 40)), effects[side][:, None] + prompts[side])
        for side, (name, at) in enumerate((("a", 0), ("b", 100)))
    )
    found = rank([first, second], n_bootstrap=2000, seed=0)
    outcomes = (first.rewards[:, None] > second.rewards[None]).mean(axis=2)  # (40, 40)
    # The variance of a mean over crossed rows and columns (each drawn anew): of row means and of column means.
    error = math.sqrt(outcomes.mean(axis=1).var() / 40 + outcomes.mean(axis=0).var() / 40)
    assert (found.high[0, 1] - found.low[0, 1]) / 2 == pytest.approx(1.96 * error, rel=0.12)


def test_a_shared_model_meets_every_seed() -> None:
    shared = Entrant("SFT", None, np.array([[0.0, 1.0]]))
    found = ranked(shared, entrant("a", [1, 1], [2, 0], seeds=(4, 9)), entrant("b", [3, 3], seeds=(4,)))
    assert found.rate[1, 0] == (1 + 0.5 + 1 + 0) / 4
    assert found.common_seeds.tolist() == [[1, 2, 1], [2, 2, 1], [1, 1, 1]]
    assert ranked(shared, Entrant("other", None, np.array([[1.0, 1.0]]))).rate[1, 0] == 0.75


def test_intervals_are_those_of_one_run_against_sft() -> None:
    """Against a shared model the rate is the win rate: value and, within its noise, interval of ``crossed_rate``."""
    first, second = drawn(2, 3, 300)
    sft = Entrant("SFT", None, first.rewards[:1] - 0.3)
    found = rank([sft, first, second], n_bootstrap=4000, seed=0)
    outcomes = (np.sign(second.rewards - sft.rewards) + 1) / 2
    same = crossed_rate(outcomes, n_bootstrap=4000, seed=1)
    assert found.rate[2, 0] == same.value
    assert (found.low[2, 0], found.high[2, 0]) == pytest.approx((same.low, same.high), abs=0.006)


# --- invariances ------------------------------------------------------------------------------------------------------


def test_the_order_of_configurations_and_prompts_does_not_matter() -> None:
    entrants = drawn(4, 2, 60)
    found = ranked(*entrants)
    order = [2, 0, 3, 1]
    moved = ranked(*(entrants[place] for place in order), anchor=1)
    for name in ("rate", "low", "high", "p", "p_holm", "wins", "ties"):
        assert getattr(moved, name) == pytest.approx(getattr(found, name)[np.ix_(order, order)]), name
    for name in ("rating", "rating_low", "rating_high"):
        assert getattr(moved, name) == pytest.approx(getattr(found, name)[order], abs=1e-8), name
    shuffled = np.random.default_rng(5).permutation(60)
    other = ranked(*(Entrant(one.name, one.seeds, one.rewards[:, shuffled]) for one in entrants))
    assert other.rate == pytest.approx(found.rate)
    assert other.rating == pytest.approx(found.rating, abs=1e-8)
    # Only the order of rewards counts, not their size.
    grown = ranked(*(Entrant(one.name, one.seeds, np.exp(one.rewards)) for one in entrants))
    assert np.array_equal(grown.low, found.low)


def test_turned_rewards_turn_the_ranking() -> None:
    entrants = drawn(3, 2, 50)
    found = ranked(*entrants)
    turned = ranked(*(Entrant(one.name, one.seeds, -one.rewards) for one in entrants))
    assert turned.rate == pytest.approx(found.rate.T)
    assert turned.rating == pytest.approx(-found.rating, abs=1e-8)
    assert turned.rating_low == pytest.approx(-found.rating_high, abs=1e-8)
    assert found.order == (2, 1, 0)
    assert turned.order == (0, 1, 2)


def test_the_same_seed_draws_the_same_resamples() -> None:
    entrants = drawn(3, 2, 50)
    first, again = ranked(*entrants), ranked(*entrants)
    assert np.array_equal(first.low, again.low) and np.array_equal(first.rating_low, again.rating_low)
    other = rank(entrants, n_bootstrap=400, seed=1)
    assert not np.array_equal(first.rating_low, other.rating_low)


# --- calibration and speed --------------------------------------------------------------------------------------------


def coverage(n_simulations: int) -> tuple[float, float, float]:
    """How often the intervals of a rate and of a rating hold the truth, and p falls below .05 where nothing differs.

    Gumbel noise on a score makes the difference logistic: the chance to win is then exactly Bradley-Terry's. Seeds
    have no effect of their own, prompts are drawn anew.
    """
    truth = np.array([0.0, 0.5, 0.5])
    held = np.zeros(3)
    for number in range(n_simulations):
        generator = np.random.default_rng(number)
        scores: Array = truth[:, None] + generator.gumbel(size=(3, 200))
        found = rank([Entrant(str(i), (0,), scores[i][None]) for i in range(3)], n_bootstrap=300, seed=number)
        held += (
            found.low[1, 0] <= 1 / (1 + math.exp(-0.5)) <= found.high[1, 0],
            found.rating_low[1] <= 0.5 <= found.rating_high[1],
            found.p[1, 2] < 0.05,
        )
    rate, rating, false = held / n_simulations
    return float(rate), float(rating), float(false)


def test_intervals_hold_the_truth() -> None:
    rate, rating, false = coverage(120)
    assert rate > 0.89 and rating > 0.89  # 0.95 less three standard errors
    assert false < 0.11


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    rate, rating, false = coverage(2000)
    assert rate == pytest.approx(0.95, abs=0.02)
    assert rating == pytest.approx(0.95, abs=0.02)
    assert false == pytest.approx(0.05, abs=0.02)


def test_thirty_configurations_take_seconds() -> None:
    entrants = drawn(30, 3, 1024)
    started = time.process_time()
    found = rank(entrants, n_bootstrap=1000, seed=0)
    assert time.process_time() - started < 6  # some 0.4 s where nothing else runs
    assert found.order == tuple(range(29, -1, -1))
    assert (np.diff(found.rating) > 0).all()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entrants", "said"),
    [
        ([("a", (0,), [[1.0]])], "two configurations or more, got 1"),
        ([("a", (0,), [[1.0]]), ("b", (0,), [[1.0, 2.0]])], "the same prompts"),
        ([("a", (0,), [[math.nan]])], "a: rewards must be finite"),
        ([("a", (0,), [[math.inf]])], "a: rewards must be finite"),
        ([("a", (0, 1), [[1.0]])], r"a: need rewards \(2 seeds, prompts\)"),
        ([("a", (0, 0), [[1.0], [1.0]])], "a: a seed is named twice"),
        ([("a", (0,), [[]])], r"a: need rewards \(1 seeds, prompts\)"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    entrants: list[tuple[str, tuple[int, ...], list[list[float]]]], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        rank([Entrant(name, seeds, np.array(rows)) for name, seeds, rows in entrants], n_bootstrap=10, seed=0)


def test_what_is_no_rate_or_no_entrant_is_refused() -> None:
    with pytest.raises(ValueError, match="rates must lie in"):
        bradley_terry(np.array([[[0.5, math.nan], [0.5, 0.5]]]), n_prompts=3, anchor=0)
    with pytest.raises(ValueError, match="anchor=2"):
        ranked(entrant("a", [1]), entrant("b", [2]), anchor=2)
