"""Win rates and their intervals, against values worked out by hand and against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo.evaluation.win_rates import (
    Array,
    Interval,
    _crossed_bootstrap,
    _t_quantile,
    crossed_mean,
    crossed_rate,
    outcomes,
    paired_difference,
    t_interval,
    wilson,
    win_rate,
)

REWARDS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=30)


def half_width(interval: Interval) -> float:
    return (interval.high - interval.low) / 2


# --- one run ----------------------------------------------------------------------------------------------------------


def test_outcomes() -> None:
    assert outcomes([2.0, -1.0, 0.5, 0.0], [1.0, 1.0, 0.5, -0.0]).tolist() == [1, 0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # p = 0: the upper bound is z^2 / (n + z^2) = 3.841459 / 13.841459.
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        # p = 1/2: 1/2 +- z sqrt(1/(4n) + z^2/(4n^2)) / (1 + z^2/n) = 0.5 +- 1.959964 * 0.186020 / 1.384146.
        (5, 10, 0.236593, 0.763407),
        # Published by Newcombe (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # Half a success: p = 0.05, centre (0.05 + 0.192073) / 1.384146 = 0.174890, half width 0.169648.
        (0.5, 10, 0.005242, 0.344538),
    ],
)
def test_wilson(successes: float, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(("successes", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_wilson_refuses_what_is_no_share(successes: float, n: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(successes, n)


def test_win_rate_counts_ties_one_half_and_as_lost() -> None:
    """Four wins, two ties, four losses of ten: (4 + 2/2) / 10 and 4/10."""
    policy = [1.0] * 4 + [0.0] * 2 + [-1.0] * 4
    found = win_rate(policy, [0.0] * 10, n_bootstrap=2000, seed=0)
    assert (found.n, found.wins, found.ties) == (10, 4, 2)
    assert (found.value, found.strict) == (0.5, 0.4)
    assert (found.strict_ci_low, found.strict_ci_high) == wilson(4, 10)
    assert 0.15 <= found.ci_low <= 0.25 and 0.75 <= found.ci_high <= 0.85  # 0.5 +- 1.96 * sqrt(0.2 / 10)


def test_a_model_against_itself() -> None:
    found = win_rate([0.3, -1.0, 2.0], [0.3, -1.0, 2.0], n_bootstrap=500, seed=0)
    assert (found.value, found.strict, found.ties) == (0.5, 0.0, 3)
    assert (found.ci_low, found.ci_high) == (0.5, 0.5)
    assert (found.strict_ci_low, found.strict_ci_high) == wilson(0, 3)


@pytest.mark.parametrize(("rewards", "value"), [([1.0] * 20, 1.0), ([-1.0] * 20, 0.0)])
def test_without_a_width_the_interval_is_wilsons(rewards: list[float], value: float) -> None:
    found = win_rate(rewards, [0.0] * 20, n_bootstrap=500, seed=0)
    assert found.value == found.strict == value
    assert (found.ci_low, found.ci_high) == wilson(20 * value, 20) == (found.strict_ci_low, found.strict_ci_high)
    assert found.ci_high - found.ci_low == pytest.approx(0.1611, abs=1e-4)


@given(REWARDS)
@settings(max_examples=30, deadline=None)
def test_exchanging_the_models_mirrors_the_rate(rewards: list[tuple[int, int]]) -> None:
    own, other = [float(pair[0]) for pair in rewards], [float(pair[1]) for pair in rewards]
    there = win_rate(own, other, n_bootstrap=200, seed=0)
    back = win_rate(other, own, n_bootstrap=200, seed=0)
    assert there.value + back.value == pytest.approx(1)
    assert there.strict + back.strict + there.ties / there.n == pytest.approx(1)
    assert 0 <= there.ci_low <= there.ci_high <= 1 and 0 <= there.strict_ci_low <= there.strict_ci_high <= 1
    assert (there.ci_low, there.ci_high) == pytest.approx((1 - back.ci_high, 1 - back.ci_low))
    scaled = win_rate([0.01 * value for value in own], [0.01 * value for value in other], n_bootstrap=200, seed=0)
    assert scaled == there


@pytest.mark.parametrize(
    ("policy", "reference", "said"),
    [
        ([1.0], [1.0, 2.0], "one reward of each model per prompt"),
        ([], [], "one reward of each model per prompt"),
        ([math.nan], [1.0], "must be finite"),
        ([1.0], [math.inf], "must be finite"),
    ],
)
def test_rewards_that_cannot_be_compared_are_refused(policy: list[float], reference: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        win_rate(policy, reference, n_bootstrap=100, seed=0)


# --- several seeds ----------------------------------------------------------------------------------------------------


def drawn(*shape: int, rate: float = 0.6, seed: int = 0) -> Array:
    """Outcomes: wins with probability ``rate`` - 0.1, ties with 0.2."""
    chance = np.random.default_rng(seed).random(shape)
    return np.where(chance < rate - 0.1, 1.0, np.where(chance < rate + 0.1, 0.5, 0.0))


def test_on_many_prompts_the_bootstrap_is_the_normal_approximation() -> None:
    values = drawn(1, 4000)
    found = crossed_mean(values, n_bootstrap=4000, seed=1)
    error = 1.959964 * values.std() / math.sqrt(4000)
    assert found.value == values.mean()
    assert found.low == pytest.approx(found.value - error, abs=0.06 * error)
    assert found.high == pytest.approx(found.value + error, abs=0.06 * error)


def test_the_same_seed_draws_the_same_resamples() -> None:
    values = drawn(3, 50)
    first = crossed_mean(values, n_bootstrap=300, seed=4)
    assert crossed_mean(values, n_bootstrap=300, seed=4) == first
    assert crossed_mean(values, n_bootstrap=300, seed=5) != first


def test_seeds_share_their_prompts() -> None:
    """Five seeds with the same outcomes know no more than one: the interval must not shrink by sqrt(5)."""
    once = drawn(1, 400)
    error = 1.959964 * once.std() / math.sqrt(400)
    found = crossed_mean(np.repeat(once, 5, axis=0), n_bootstrap=4000, seed=0)
    assert half_width(found) == pytest.approx(error, rel=0.06)


def test_resamples_draw_seeds_and_prompts_independently() -> None:
    """The exact variance of the sum of w_s v_p x_sp, w and v being independent multinomial weights of mean 1/S and 1/P.

    E[w_s w_s'] = ((1 - 1/S) + [s = s']) / S^2, and so for v.
    """
    values = drawn(6, 40)
    n_seeds, n_prompts = values.shape
    seeds = ((1 - 1 / n_seeds) * np.ones((n_seeds, n_seeds)) + np.eye(n_seeds)) / n_seeds**2
    prompts = ((1 - 1 / n_prompts) * np.ones((n_prompts, n_prompts)) + np.eye(n_prompts)) / n_prompts**2
    variance = np.trace(seeds @ values @ prompts @ values.T) - values.mean() ** 2
    means = _crossed_bootstrap(values, 20_000, 0)
    assert means.mean() == pytest.approx(values.mean(), abs=0.003)
    assert means.std() == pytest.approx(math.sqrt(variance), rel=0.02)


def test_variance_between_seeds_widens_the_interval() -> None:
    """Outcomes that are the same for all prompts of a seed: the bootstrap of the S means alone."""
    means = np.array([0.2, 0.4, 0.5, 0.6, 0.8, 0.5, 0.3, 0.7])
    found = crossed_mean(np.repeat(means[:, None], 50, axis=1), n_bootstrap=8000, seed=0)
    error = 1.959964 * means.std() / math.sqrt(8)
    assert found.value == pytest.approx(0.5)
    assert half_width(found) == pytest.approx(error, rel=0.06)
    prompts = drawn(1, 400, rate=0.5)
    alike = crossed_mean(np.repeat(prompts, 8, axis=0), n_bootstrap=4000, seed=0)
    unlike = crossed_mean(np.repeat(prompts, 8, axis=0) + means[:, None] - 0.5, n_bootstrap=4000, seed=0)
    assert half_width(unlike) == pytest.approx(math.hypot(half_width(alike), error), rel=0.06)


def test_crossed_rate_counts_prompts_once() -> None:
    assert crossed_rate(np.ones((5, 20)), n_bootstrap=200, seed=0) == Interval(1.0, *wilson(20, 20))
    assert crossed_rate(np.zeros((5, 20)), n_bootstrap=200, seed=0) == Interval(0.0, *wilson(0, 20))
    values = drawn(2, 30)
    assert crossed_rate(values, n_bootstrap=200, seed=0) == crossed_mean(values, n_bootstrap=200, seed=0)


@pytest.mark.parametrize("shape", [(4,), (0, 3), (3, 0), (1, 2, 3)])
def test_outcomes_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="seeds, prompts"):
        crossed_mean(np.ones(shape), n_bootstrap=100, seed=0)


def test_chunks_of_resamples_are_all_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 prompts and 2,000 resamples take three chunks; each resample has its own prompts."""
    means = _crossed_bootstrap(drawn(1, 5000), 2000, 0)
    assert len(means) == 2000 and len(np.unique(means)) > 200
    assert means.std() == pytest.approx(drawn(1, 5000).std() / math.sqrt(5000), rel=0.06)


# --- differences ------------------------------------------------------------------------------------------------------


def test_a_run_does_not_differ_from_itself() -> None:
    values = drawn(3, 70)
    assert paired_difference(values, values, n_bootstrap=300, seed=0) == (Interval(0.0, 0.0, 0.0), 1.0)


def test_a_resampled_difference_of_0_is_exactly_0() -> None:
    """0.1 + 0.2 - 0.3 is not 0 in floating point: such noise would count as a sign in p."""
    difference = np.random.default_rng(0).integers(-1, 2, size=(3, 10)).astype(float)
    means = _crossed_bootstrap(difference, 4000, 0)
    assert float((means == 0).mean()) > 0.02
    assert not ((means != 0) & (np.abs(means) < 1e-9)).any()


def test_pairing_takes_the_prompts_out() -> None:
    """Two runs that differ on few prompts: the interval is that of the differences, far narrower than unpaired."""
    first = drawn(1, 1000)
    second = first.copy()
    second[0, :40] = 0.0
    found, p = paired_difference(first, second, n_bootstrap=4000, seed=0)
    gaps = first - second
    assert found.value == gaps.mean() > 0 and 0 < found.low < found.value < found.high
    assert half_width(found) == pytest.approx(1.959964 * gaps.std() / math.sqrt(1000), rel=0.06)
    assert half_width(found) < half_width(crossed_mean(first, n_bootstrap=1000, seed=0)) / 2
    assert p == pytest.approx(2 / 4001), "what was observed counts as one more resample"
    back, p_back = paired_difference(second, first, n_bootstrap=4000, seed=0)
    assert (back.value, back.low, back.high, p_back) == pytest.approx((-found.value, -found.high, -found.low, p))


@pytest.mark.parametrize("sign", [1, -1])
def test_p_is_two_sided(sign: int) -> None:
    """A mean of two standard errors: p = 2 (1 - Phi(2)) = 0.0455."""
    values = np.random.default_rng(3).standard_normal((1, 2000))
    values = (values - values.mean()) / values.std() + 2 / math.sqrt(2000)
    found, p = paired_difference(sign * values, np.zeros_like(values), n_bootstrap=20_000, seed=0)
    assert found.value == pytest.approx(sign * 2 / math.sqrt(2000))
    assert p == pytest.approx(0.0455, abs=0.008)


def test_differences_need_the_same_seeds_and_prompts() -> None:
    with pytest.raises(ValueError, match="same seeds and prompts"):
        paired_difference(np.ones((1, 3)), np.ones((1, 4)), n_bootstrap=100, seed=0)


# --- over seeds alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # Abramowitz and Stegun, table 26.10; above 30 by numerical integration of the density.
    [
        *((1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (30, 2.0423)),
        *((31, 2.0395134), (40, 2.0210754), (60, 2.0002978), (120, 1.9799304), (10**9, 1.9599640)),
    ],
)
def test_quantiles_of_student(degrees: int, quantile: float) -> None:
    assert _t_quantile(degrees) == pytest.approx(quantile, abs=1e-4 if degrees <= 30 else 3e-6)


def test_quantiles_of_student_fall_with_the_degrees() -> None:
    found = [_t_quantile(degrees) for degrees in range(1, 200)]
    assert found == sorted(found, reverse=True) and len(set(found)) == len(found)


def test_t_interval() -> None:
    """1, 2, 3: mean 2, standard deviation 1, 4.3027 / sqrt(3) = 2.4842."""
    found = t_interval([1.0, 2.0, 3.0])
    assert (found.value, found.low, found.high) == pytest.approx((2, -0.4842, 4.4842), abs=1e-4)


def test_one_seed_has_no_width() -> None:
    found = t_interval([0.6])
    assert found.value == 0.6 and math.isnan(found.low) and math.isnan(found.high)
