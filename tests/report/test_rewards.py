"""The histogram of rewards: shared bins, shares by hand, means and shares below 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch

from dppo.evaluation.histogram import FEWEST, MOST, shared_bins, shares
from dppo.evaluation.win_rates import crossed_rate, wilson
from dppo.report.evidence import Group
from dppo.report.rewards import panel
from tests.report.figures import at_both_widths, drawn, points_of, tips
from tests.report.made_runs import gathered, make_run, unll

GOOD = [2.0, 2.0, 1.0, -1.0]
FAIR = [1.0, 1.0, -1.0, -1.0]
SFT_REWARDS = [-1.0, 0.0, -1.0, 1.0]


def group_of(path: Path) -> Group:
    return gathered(path).groups[0]


def two_methods(path: Path) -> Group:
    """UnLL wins against DPO; two seeds each, the second seed of UnLL is worse."""
    make_run(path / "u0", "loss=unll", loss=unll(0.1), seed=0, policy=GOOD, reference=SFT_REWARDS)
    make_run(path / "u1", "loss=unll", loss=unll(0.1), seed=1, policy=[2, 1, -1, 1], reference=SFT_REWARDS)
    make_run(path / "d0", "loss=dpo", seed=0, policy=FAIR, reference=SFT_REWARDS)
    make_run(path / "d1", "loss=dpo", seed=1, policy=FAIR, reference=SFT_REWARDS)
    return group_of(path)


def bars(figure: Figure, place: int) -> list[float]:
    found = [patch for patch in figure.axes[place].patches if isinstance(patch, Rectangle)]
    return [patch.get_height() for patch in found]


def outline(figure: Figure, place: int) -> list[float]:
    (found,) = (patch for patch in figure.axes[place].patches if isinstance(patch, StepPatch))
    values: Any = found.get_data()[0]
    return [float(value) for value in values]


# --- bins ------------------------------------------------------------------------------------------------------------


def test_bins_are_shared_round_and_split_at_0() -> None:
    """IQR of 1000 even values in [-3, 5] is 4, so 2 * 4 / 10 = 0.8, rounded up to 1."""
    values = np.linspace(-3, 5, 1000)
    assert shared_bins(values[:300], values[300:]) == pytest.approx(np.arange(-3, 6))
    generator = np.random.default_rng(0)
    for scale in (1e-9, 1.0, 3e7):
        for shift in (-40.0, 0.0, 7.0):
            sample = scale * (generator.normal(size=500) + shift)
            edges = shared_bins(sample, sample[:3] - scale)
            assert FEWEST <= len(edges) - 1 <= MOST
            assert edges[0] <= sample.min() and sample.max() <= edges[-1]
            assert np.diff(edges) == pytest.approx(edges[1] - edges[0])
            assert not ((edges[:-1] < 0) & (edges[1:] > 0)).any()


def test_a_few_far_values_do_not_make_thousands_of_bins() -> None:
    edges = shared_bins(np.append(np.random.default_rng(0).normal(size=1000), 1e4))
    assert FEWEST <= len(edges) - 1 <= MOST


def test_discrete_values_have_a_bin_each() -> None:
    edges = shared_bins([0.0, 1.0, 1.0], [3.0, 1.0])
    assert edges == pytest.approx([-0.5, 0.5, 1.5, 2.5, 3.5])
    assert shares([0.0, 1.0, 1.0, 3.0], edges) == pytest.approx([0.25, 0.5, 0, 0.25])
    assert shared_bins([0.1, 0.2, 0.4]) == pytest.approx([0.05, 0.15, 0.25, 0.35, 0.45])
    assert shared_bins([2.0, 2.0]) == pytest.approx([1.5, 2.5])


def test_what_is_not_finite_is_left_out() -> None:
    edges = shared_bins([np.nan, 1.0, np.inf], [-np.inf, 0.0])
    assert edges == pytest.approx([-0.5, 0.5, 1.5])
    assert shares([np.nan, 1.0, np.inf, 0.0], edges) == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="no finite value"):
        shared_bins([np.nan], [])


# --- panel -----------------------------------------------------------------------------------------------------------


def test_bars_are_the_shares_of_the_files(tmp_path: Path) -> None:
    """Rewards are -1, 0, 1 and 2, so a bin each. UnLL's eight answers: two at -1, none at 0, three at 1, three at 2."""
    made = panel(two_methods(tmp_path))
    wide, narrow = at_both_widths(made)
    for figure in (wide, narrow):
        assert bars(figure, 0) == pytest.approx([25, 0, 37.5, 37.5])
        assert bars(figure, 1) == pytest.approx([50, 0, 50, 0])
        assert outline(figure, 0) == outline(figure, 1) == pytest.approx([50, 25, 25, 0])
        assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert wide.axes[0].get_position().y0 == pytest.approx(wide.axes[1].get_position().y0)  # side by side
    assert narrow.axes[0].get_position().y0 > narrow.axes[1].get_position().y1  # one below the other
    assert "2 seeds are pooled" in made.lead
    assert "reward -1.5 to -0.5: 25.0 % of loss=unll, 50.0 % of SFT" in tips(wide)
    table = made.tables[1]
    assert [row[0] for row in table.rows] == [-1.5, -0.5, 0.5, 1.5]
    assert [100 * float(str(row[2])) for row in table.rows] == pytest.approx(bars(wide, 0))
    assert [100 * float(str(row[4])) for row in table.rows] == pytest.approx(outline(wide, 0))


def test_means_and_negative_shares(tmp_path: Path) -> None:
    group = two_methods(tmp_path)
    made = panel(group)
    best, baseline, sft = made.tables[0].rows
    assert (best[0], baseline[0], sft[0]) == ("loss=unll", "loss=dpo", "SFT")
    below = np.array([[0, 0, 0, 1], [0, 0, 1, 0]], dtype=float)  # UnLL's, over both seeds
    assert best[6] == crossed_rate(below, n_bootstrap=2000, seed=0)
    assert "below 0: 25.0 %" in drawn(made).axes[0].get_title(loc="left")
    mean, negative = best[3], sft[6]
    assert getattr(mean, "value", None) == pytest.approx(np.mean([GOOD, [2, 1, -1, 1]]))
    assert (negative.value, negative.low, negative.high) == pytest.approx((0.5, *wilson(2, 4)))  # type: ignore[union-attr]
    drawn_means = [points_of(line)[0][0] for line in drawn(made).axes[0].lines if line.get_marker() == "v"]
    assert drawn_means == pytest.approx([7 / 8, -0.25])
    assert "mean reward 0.88" in made.alt and "SFT -0.25" in made.alt


def test_a_seed_less_changes_the_bars(tmp_path: Path) -> None:
    two_methods(tmp_path / "both")
    make_run(tmp_path / "one" / "u0", "loss=unll", loss=unll(0.1), policy=GOOD, reference=SFT_REWARDS)
    make_run(tmp_path / "one" / "d0", "loss=dpo", policy=FAIR, reference=SFT_REWARDS)
    made = panel(group_of(tmp_path / "one"))
    assert bars(drawn(made), 0) == pytest.approx([25, 0, 25, 50])
    assert "pooled" not in made.lead


def test_one_run_odd_words_and_broken_rewards(tmp_path: Path) -> None:
    long = "model.name=" + "x$_" * 40
    make_run(tmp_path / "one" / "a", long, "é$^{", policy=[0.5] * 5)
    at_both_widths(panel(group_of(tmp_path / "one")))
    make_run(tmp_path / "nan" / "a", long, policy=[1.0, 2.0, 0.0])
    make_run(tmp_path / "nan" / "b", "loss=unll", loss=unll(0.1), policy=[float("nan"), float("inf"), 1.0])
    make_run(tmp_path / "nan" / "c", "loss=none", loss=None, policy=[0.0, 0.0, 0.0], metrics=None)
    make_run(tmp_path / "nan" / "d", "alpha=1", loss=unll(1.0), status="diverged")
    group = group_of(tmp_path / "nan")
    at_both_widths(panel(group))
    for entry in group.entries:
        for one in entry.measured.values():
            one.policy[:] = np.nan
    empty = panel(group)
    assert empty.draw is None and "rewards" in empty.missing and empty.command.startswith("python -m dppo")
