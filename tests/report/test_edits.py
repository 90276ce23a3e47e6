"""Token log-probs behind the first edit: means by hand, intervals over pairs and seeds, answers of unlike length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dppo.evaluation.win_rates import Interval, crossed_mean
from dppo.report.edits import panel
from dppo.report.evidence import Group
from dppo.report.table import Table
from tests.report.figures import at_both_widths, bands, drawn, points_of, tips
from tests.report.made_runs import gathered, make_run, pair_row, unll

SFT_TOKENS = {"a": [-2.0, -1.0, -0.5], "b": [-3.0, -0.5], "c": [-1.0, -0.6, -0.7]}
MOVED = {0: [-1.0, 0.5, 0.0], 1: [-2.0, 1.5, 0.5]}


def pairs(seed: int, scale: float = 1.0) -> list[dict[str, object]]:
    """The chosen answers' tokens, moved by ``MOVED`` at each distance; pair b has one token less."""
    return [
        pair_row(name, [one + scale * move for one, move in zip(tokens, MOVED[seed], strict=False)], tokens)
        for name, tokens in SFT_TOKENS.items()
    ]


def group_of(path: Path) -> Group:
    return gathered(path).groups[0]


def column(table: Table, at: int) -> list[Interval]:
    found = [row[at] for row in table.rows]
    assert all(isinstance(one, Interval) for one in found)
    return [one for one in found if isinstance(one, Interval)]


def places(values: list[Interval]) -> list[tuple[int, float]]:
    return [(at, one.value) for at, one in enumerate(values)]


def test_means_intervals_and_n_are_those_of_the_files(tmp_path: Path) -> None:
    """SFT: -2, -0.7 over three pairs and -0.6 over two. Moved on average by -1.5, 1 and 0.25."""
    for seed in (0, 1):
        make_run(tmp_path / f"r{seed}", "loss=dpo", seed=seed, pairs=pairs(seed))
    made = panel(group_of(tmp_path))
    (table,) = made.tables
    assert [row[1:4] for row in table.rows] == [(0, 2, 3), (1, 2, 3), (2, 2, 2)]
    assert [one.value for one in column(table, 4)] == pytest.approx([-3.5, 0.3, -0.35])
    assert [one.value for one in column(table, 5)] == pytest.approx([-2, -0.7, -0.6])
    gains = column(table, 6)
    assert [one.value for one in gains] == pytest.approx([-1.5, 1, 0.25])
    # All pairs moved alike: the paired difference varies between seeds only.
    assert [(one.low, one.high) for one in gains] == [
        pytest.approx((-2, -1)), pytest.approx((0.5, 1.5)), pytest.approx((0, 0.5)),
    ]  # fmt: skip
    assert column(table, 5)[0] == crossed_mean(np.array([[-2.0, -3.0, -1.0]]), n_bootstrap=500, seed=0)
    for figure in at_both_widths(made):
        above, below = figure.axes
        lines = [points_of(line) for line in above.lines if len(points_of(line)) == 3]
        assert np.array(lines) == pytest.approx(np.array([places(column(table, 5)), places(column(table, 4))]))
        (line,) = (points_of(line) for line in below.lines if len(points_of(line)) == 3)
        assert np.array(line) == pytest.approx(np.array(places(gains)))
        for axes, place, intervals in ((above, 0, column(table, 5)), (above, 1, column(table, 4)), (below, 0, gains)):
            corners = {corner for at, one in enumerate(intervals) for corner in ((at, one.low), (at, one.high))}
            assert corners <= bands(axes)[place]
    told = f"loss=dpo, distance 0: difference to SFT {gains[0].value:.3f}"
    assert any(tip.startswith(told) and tip.endswith("3 pairs") for tip in tips(drawn(made)))
    assert "3 pairs at most" in made.lead and "2 seeds" in made.lead


def test_a_seed_less_changes_the_band(tmp_path: Path) -> None:
    make_run(tmp_path / "r0", "loss=dpo", seed=0, pairs=pairs(0))
    made = panel(group_of(tmp_path))
    gains = column(made.tables[0], 6)
    assert [(one.low, one.high) for one in gains] == [pytest.approx((one.value, one.value)) for one in gains]
    assert gains[0].value == pytest.approx(-1)
    assert {(0.0, -1.0)} <= bands(drawn(made).axes[1])[0]
    assert "seeds" not in made.lead


def test_the_same_pairs_count_for_all_seeds(tmp_path: Path) -> None:
    """The second seed was measured on fewer pairs."""
    for seed in (0, 1):
        make_run(tmp_path / f"r{seed}", "loss=dpo", seed=seed, pairs=pairs(seed))
    path = tmp_path / "r1" / "pairs.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    made = panel(group_of(tmp_path))
    assert [row[3] for row in made.tables[0].rows] == [1, 1, 1]
    assert all(np.isnan(one.low) for one in column(made.tables[0], 4))  # no width from a single pair
    at_both_widths(made)


def test_at_most_four_lines_and_long_words(tmp_path: Path) -> None:
    for place in range(6):
        make_run(
            tmp_path / f"r{place}", f"alpha={place}{'$ñ_' * 40}", loss=unll(place + 1.0), policy=[place - 1.0, 1.0],
            pairs=pairs(0, scale=float(place)),
        )  # fmt: skip
    made = panel(gathered(tmp_path, metric="reward").groups[0])
    assert len({row[0] for row in made.tables[0].rows}) == 4
    assert "4 of 6 configurations" in made.lead
    wide, _ = at_both_widths(made)
    assert len([line for line in wide.axes[0].lines if len(points_of(line)) == 3]) == 5  # and SFT's


def test_without_pairs_it_says_what_is_missing(tmp_path: Path) -> None:
    none = {"evaluation": {"n_pairs": 0}}
    make_run(tmp_path / "a", "loss=dpo", "evaluation.n_pairs=0", seed=2, settings=none)
    make_run(tmp_path / "n", "loss=none", loss=None, pairs=pairs(0), settings=none, policy=[0.0, 0.0, 0.0])
    made = panel(group_of(tmp_path))
    assert made.draw is None and made.missing == "no run has log-probs of held-out pairs"
    assert made.command == "python -m dppo loss=dpo evaluation.n_pairs=256 seed=2"
    make_run(tmp_path / "b", "loss=unll", loss=unll(0.1), pairs=pairs(0), settings=none)
    make_run(tmp_path / "d", "alpha=8", loss=unll(8.0), status="diverged", settings=none)
    (tmp_path / "a" / "pairs.jsonl").write_text("")
    made = panel(group_of(tmp_path))
    assert made.draw is not None and made.missing.startswith("1 of 2 configurations have")
    at_both_widths(made)
