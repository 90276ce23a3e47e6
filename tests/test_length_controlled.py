"""The length-controlled win rate: by hand, against a general optimiser, by its symmetries, and by its coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo.evaluation.length_controlled import LengthControlled, length_controlled, published_form
from dppo.evaluation.win_rates import Array

PAIRS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0, 0.93]), st.sampled_from([-1e9, -7.0, -1.0, 0.0, 1.0, 2.0, 500.0, 1e9])),
    min_size=1,
    max_size=20,
)


def fitted(y: list[float] | Array, d: list[float] | Array, n_resamples: int = 100) -> LengthControlled:
    outcomes, longer_by = np.asarray(y, dtype=np.float64), np.asarray(d, dtype=np.float64)
    return length_controlled(outcomes, longer_by, seed=0, n_resamples=n_resamples)


def made(n: int, seed: int = 0, intercept: float = 0.4, slope: float = 1.5) -> tuple[Array, Array]:
    """Outcomes with some ties, more often won by longer answers."""
    generator = np.random.default_rng(seed)
    d = generator.normal(30, 100, n).round()
    won = generator.random(n) < 1 / (1 + np.exp(-(intercept + slope * np.tanh(d / 100))))
    return np.where(generator.random(n) < 0.1, 0.5, won.astype(np.float64)), d


def by_definition(y: Array, d: Array) -> Array:
    """(w_0, w_1) by a general optimiser from the text of METHODS: one term of the loss after another."""
    optimize = pytest.importorskip("scipy.optimize")
    std = math.sqrt(sum((v - d.mean()) ** 2 for v in d) / (len(d) - 1))
    x = [math.tanh(v / std) if std > 0 else 0.0 for v in d]

    def loss(w: Array) -> float:
        terms = [math.log1p(math.exp(w[0] + w[1] * a)) - b * (w[0] + w[1] * a) for a, b in zip(x, y, strict=True)]
        return float(sum(terms) + 0.01 / 2 * (w[0] ** 2 + w[1] ** 2))

    best = optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
    return np.asarray(best.x)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_one_win_is_shrunk_by_the_ridge() -> None:
    """No spread: x = 0, w_1 = 0, and 1 - sigmoid(w) = 0.01 w at w = 3.3593 (1 / (1 + e^3.3593) = 0.033593)."""
    found = fitted([1.0], [40.0])
    assert [found.intercept, found.slope] == pytest.approx([3.3593, 0], abs=1e-4)
    assert found.value == pytest.approx(1 - 0.033593, abs=1e-6)


def test_a_win_that_is_all_length_is_no_win() -> None:
    """The longer answer wins both times, 3 characters longer and 3 shorter: w_0 = 0 by symmetry.

    std = 3 sqrt 2, x = +-t with t = tanh(1 / sqrt 2) = 0.608859, and w_1 solves 2 t (1 - sigmoid(t w)) = 0.01 w.
    """
    found = fitted([1.0, 0.0], [3.0, -3.0])
    assert found.value == pytest.approx(0.5, abs=1e-12)
    t = 0.608859
    assert 2 * t / (1 + math.exp(t * found.slope)) == pytest.approx(0.01 * found.slope, rel=1e-5)


@pytest.mark.parametrize("longer_by", [0.0, 0.1, -12.0])
def test_equal_differences_give_the_plain_rate(longer_by: float) -> None:
    """n (mean(y) - sigmoid(w_0)) = 0.01 w_0; for 0.1 the computed std is not quite 0, and x must still be."""
    found = fitted([1.0, 1.0, 0.5, 0.0, 1.0, 1.0], [longer_by] * 6)
    assert found.slope == 0
    assert 6 * (0.75 - found.value) == pytest.approx(0.01 * found.intercept, abs=1e-9)
    assert found.ci_low < found.value < found.ci_high


def test_a_model_against_itself() -> None:
    found = fitted([0.5] * 9, [0.0] * 9)
    assert (found.value, found.ci_low, found.ci_high, found.warning) == (0.5, 0.5, 0.5, None)


def test_the_published_form() -> None:
    """sigmoid(2 * log(3) / 2) = 3/4 and sigmoid(0) = 1/2: mean 62.5, std sqrt 2 / 8, over sqrt 2."""
    value, error = published_form(np.array([math.log(3) / 2, 0.0]), difficulty_weight=2.0, model_weight=0.0)
    assert [value, error] == pytest.approx([62.5, 12.5])
    value, error = published_form(np.array([7.0]), difficulty_weight=0.0, model_weight=-math.log(3))
    assert value == pytest.approx(25)
    assert math.isnan(error)


# --- by other means ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_a_general_optimiser_finds_the_same(soft: bool) -> None:
    y, d = made(60)
    y = np.clip(y * 0.8 + 0.07, 0, 1) if soft else y
    found = fitted(y, d)
    assert [found.intercept, found.slope] == pytest.approx(by_definition(y, d), abs=1e-6)
    assert found.value == pytest.approx(1 / (1 + math.exp(-found.intercept)), abs=1e-12)


def test_the_interval_refits_std_and_weights_on_resampled_prompts() -> None:
    y, d = made(25)
    drawn = np.random.default_rng(0).integers(0, 25, size=(20, 25))
    values = [1 / (1 + math.exp(-by_definition(y[row], d[row])[0])) for row in drawn]
    found = fitted(y, d, n_resamples=20)
    assert [found.ci_low, found.ci_high] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(PAIRS)
def test_every_fit_is_the_optimum_of_its_loss(pairs: list[tuple[float, float]]) -> None:
    """The gradient vanishes, and the loss is convex; also for separable data and lengths far apart."""
    y, d = (np.array(values) for values in zip(*pairs, strict=True))
    found = fitted(y, d, n_resamples=20)
    assert 0 < found.value < 1
    assert 0 < found.ci_low <= found.ci_high < 1
    x = np.zeros(len(d)) if (d == d[0]).all() else np.tanh(d / d.std(ddof=1))
    missing = y - 1 / (1 + np.exp(-(found.intercept + found.slope * x)))
    gradient = [missing.sum() - 0.01 * found.intercept, (missing * x).sum() - 0.01 * found.slope]
    assert gradient == pytest.approx([0, 0], abs=1e-8)


@settings(deadline=None, max_examples=50)
@given(PAIRS)
def test_symmetries(pairs: list[tuple[float, float]]) -> None:
    """Swapped models mirror value and interval around 1/2; neither order nor the unit of length matters."""
    y, d = (np.array(values) for values in zip(*pairs, strict=True))
    found, swapped = fitted(y, d, 20), fitted(1 - y, -d, 20)
    assert [swapped.value, swapped.ci_low, swapped.ci_high] == pytest.approx(
        [1 - found.value, 1 - found.ci_high, 1 - found.ci_low], abs=1e-7
    )
    assert (swapped.longer, swapped.shorter) == (found.shorter, found.longer)
    order = np.random.default_rng(len(y)).permutation(len(y))
    assert fitted(y[order], d[order], 1).value == pytest.approx(found.value, abs=1e-7)
    assert fitted(y, 4 * d, 1).value == pytest.approx(found.value, abs=1e-7)


def test_batches_of_resamples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    y, d = made(50)
    at_once = fitted(y, d, n_resamples=30)
    monkeypatch.setattr("dppo.evaluation.length_controlled._AT_ONCE", 7 * 50)
    batched = fitted(y, d, n_resamples=30)
    assert [batched.ci_low, batched.ci_high] == pytest.approx([at_once.ci_low, at_once.ci_high], abs=1e-12)


def test_the_length_effect_is_taken_out() -> None:
    """Longer answers win more often, and the model's are longer: its plain rate is above, at equal lengths it loses."""
    y, d = made(2000, intercept=-0.4, slope=3.0)
    y[d > 200] = 1.0
    found = fitted(y, d)
    assert y.mean() > found.value
    assert found.ci_high < 0.5


# --- warnings and errors ----------------------------------------------------------------------------------------------


def test_a_warning_where_equal_lengths_are_hardly_seen() -> None:
    y = np.tile([1.0, 0.0], 50)
    short = np.where(np.arange(100) < 9, 5.0, -5.0)
    assert fitted(y, short).warning == (
        "9.0% of the answers are longer than the reference's: equal lengths are an extrapolation"
    )
    long = fitted(y, -short)
    assert long.warning is not None
    assert "9.0% of the answers are shorter" in long.warning
    assert (long.longer, long.shorter) == (0.91, 0.09)
    assert fitted(y, np.where(np.arange(100) < 10, 5.0, -5.0)).warning is None
    assert fitted(y, np.zeros(100)).warning is None
    assert fitted(y, np.ones(100)).warning is not None


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_a_warning_where_the_interval_says_nothing(outcome: float) -> None:
    found = fitted([outcome] * 20, list(range(-10, 10)))
    assert found.warning is not None
    assert "all outcomes are the same" in found.warning


@pytest.mark.parametrize(
    ("y", "d"), [([1.0], [1.0, 2.0]), ([], []), ([1.5], [1.0]), ([math.nan], [1.0]), ([1.0], [math.inf])]
)
def test_what_is_no_outcome_or_length_is_refused(y: list[float], d: list[float]) -> None:
    with pytest.raises(ValueError, match=r"one outcome|must be in"):
        fitted(y, d)


@pytest.mark.slow
def test_the_interval_covers_the_truth() -> None:
    """Of 300 samples of 300 prompts the 95 % interval holds sigmoid(0.4) in 95 %, within four standard errors."""
    truth = 1 / (1 + math.exp(-0.4))
    covered = 0
    for seed in range(300):
        generator = np.random.default_rng(1000 + seed)
        d = generator.normal(30, 100, 300)
        y = (generator.random(300) < 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(d / 100))))).astype(np.float64)
        found = length_controlled(y, d, seed=seed, n_resamples=500)
        covered += found.ci_low <= truth <= found.ci_high
    assert abs(covered / 300 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 300)
