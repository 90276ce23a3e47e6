"""Reward against KL: points and bars of the files, the frontier by hand, names that lie on nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from dppo.evaluation.win_rates import Interval, crossed_mean
from dppo.report.evidence import Group
from dppo.report.frontier import frontier, panel
from tests.report.figures import at_both_widths, drawn, points_of, tips
from tests.report.made_runs import DPO, gathered, make_run, unll

REFERENCE = [0.5, -0.5, 0.0]


def group_of(path: Path) -> Group:
    return gathered(path, metric="reward").groups[0]


def sweep(path: Path) -> Group:
    """DPO gains 1 at 2 nats; UnLL 0.5 at 1, 2 at 4 (two seeds: 3 and 5), and 1.5 at 8, which is on no frontier."""
    make_run(path / "d", "loss=dpo", policy=[1.5, 0.5, 1.0], reference=REFERENCE, kl=(0.2, 2.0))
    make_run(path / "a", "alpha=1", loss=unll(1.0), policy=[1.0, 0.0, 0.5], reference=REFERENCE, kl=(0.1, 1.0))
    for seed, kl, gain in ((0, 3.0, 1.75), (1, 5.0, 2.25)):
        rewards = [one + gain for one in REFERENCE]
        make_run(
            path / f"b{seed}", "alpha=2", loss=unll(2.0), seed=seed, policy=rewards, reference=REFERENCE,
            kl=(kl / 10, kl),
        )  # fmt: skip
    make_run(path / "c", "alpha=3", loss=unll(3.0), policy=[2.0, 1.0, 1.5], reference=REFERENCE, kl=(0.8, 8.0))
    make_run(path / "n", "loss=none", loss=None, policy=REFERENCE, reference=REFERENCE, kl=(0.0, 0.0))
    return group_of(path)


def marks(figure: Figure) -> set[tuple[float, float]]:
    """The large marks."""
    return {
        points_of(line)[0] for line in figure.axes[0].lines if line.get_marker() != "None" and line.get_markersize() > 4
    }


def bars(figure: Figure) -> list[list[tuple[float, float]]]:
    found = [
        np.asarray(part)
        for one in figure.axes[0].collections
        if isinstance(one, LineCollection)
        for part in one.get_segments()
    ]
    return [[(float(x), float(y)) for x, y in part] for part in found]


def test_the_frontier_by_hand() -> None:
    """(2, 3) costs more and gains less than (1, 4); of equal costs and of equal gains the better one counts."""
    assert frontier([(2, 3), (1, 4), (5, 6), (0.5, 1), (5, 5), (7, 6)]) == [3, 1, 2]
    assert frontier([(1, -1), (2, 0)]) == []  # the SFT model has both for nothing


def test_points_bars_and_seeds_are_those_of_the_files(tmp_path: Path) -> None:
    made = panel(sweep(tmp_path))
    wide, narrow = at_both_widths(made)
    for figure in (wide, narrow):
        assert marks(figure) == {(0, 0), (1, 0.5), (2, 1), (4, 2), (8, 1.5)}
        assert [(3, 2), (5, 2)] in bars(figure)  # KL of two seeds
        seeds = {points_of(line)[0] for line in figure.axes[0].lines if line.get_markersize() < 3}
        assert seeds == {(3, 1.75), (5, 2.25)}
        stairs = [points_of(line) for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post"]
        assert stairs == [[(0, 0), (1, 0.5), (2, 1), (4, 2)]]
        names = {note.get_text() for note in figure.axes[0].texts}
        assert names == {"alpha=1", "alpha=2", "alpha=3", "loss=dpo"}
        joined = [points_of(line) for line in figure.axes[0].lines if len(points_of(line)) == 3]
        assert joined == [[(1, 0.5), (4, 2), (8, 1.5)]]  # UnLL, by KL
    rows = {row[0]: row for row in made.tables[0].rows}
    assert {label: row[7] for label, row in rows.items()} == {
        "alpha=2": "yes", "alpha=3": "", "loss=dpo": "yes", "alpha=1": "yes",
    }  # fmt: skip
    assert rows["alpha=2"][4:6] == (Interval(4, 3, 5), Interval(0.4, 0.3, 0.5))
    gains = np.array([[1.75] * 3, [2.25] * 3])
    assert rows["alpha=2"][6] == crossed_mean(gains, n_bootstrap=2000, seed=0)
    assert [(4, 1.75), (4, 2.25)] in bars(wide)
    assert "alpha=2, seed 0: +1.750 at 3 nats" in tips(wide)
    assert "4 configurations" in made.lead and "3 greedy answers" in made.lead


def test_a_seed_less_changes_the_bars(tmp_path: Path) -> None:
    group = sweep(tmp_path)
    assert group.best.label == "alpha=2"
    (tmp_path / "b1" / "result.json").unlink()
    made = panel(group_of(tmp_path))
    figure = drawn(made)
    assert (3, 1.75) in marks(figure)
    assert all(start[0] == end[0] for start, end in bars(figure))  # no range of KL from one seed
    assert "single seeds" not in made.lead


def test_a_wide_range_of_kl_and_many_long_names_do_not_collide(tmp_path: Path) -> None:
    for place in range(14):
        kl = 0.01 * 2.5**place
        make_run(
            tmp_path / f"r{place}", f"train.learning_rate={place}{'µ$_' * 20}",
            loss={**DPO, "beta": 0.1 + place, "kind": "ab"[place % 2]}, kl=(kl / 10, kl),
            policy=[0.1 * place, 0.2, 0.3 + 0.01 * place],
        )  # fmt: skip
    make_run(tmp_path / "r0b", "extra=1", loss={**DPO, "beta": 7.5}, kl=(0.0, 0.0), policy=[0.0, 0.2, 0.3])
    made = panel(group_of(tmp_path))
    wide, narrow = at_both_widths(made)
    for figure in (wide, narrow):
        axes = figure.axes[0]
        dots = [axes.transData.transform(points_of(line)[0]) for line in axes.lines if line.get_marker() != "None"]
        for note in axes.texts:
            assert not any(Text.get_window_extent(note).contains(x, y) for x, y in dots), note.get_text()
        ticks = axes.transData.transform([(x, 0) for x in axes.get_xticks()])[:, 0]
        assert np.diff(ticks).min() > 0.08 * axes.bbox.width  # square roots: ticks keep their distance
    assert "of 15 points are named" in made.lead


def test_little_to_draw(tmp_path: Path) -> None:
    make_run(tmp_path / "one" / "a", "alpha=0.2", loss=unll(0.2), kl=(0.1, 1.0), policy=[0.0, 0.0, -1.0])
    made = panel(group_of(tmp_path / "one"))
    at_both_widths(made)
    assert made.missing.startswith("one configuration is no frontier")
    assert made.command == "python -m dppo alpha=0.02,0.2,2 seed=0,1,2 -m"
    two = {"one": {"loss": DPO}, "two": {"loss": unll(0.5)}}
    make_run(tmp_path / "two" / "a", "+experiment=x", loss=None, phases=two)
    assert panel(group_of(tmp_path / "two")).command == (
        "python -m dppo +experiment=x phases.two.loss.alpha=0.05,0.5,5 seed=0,1,2 -m"
    )
    make_run(tmp_path / "none" / "a", "loss=none", loss=None)
    assert panel(group_of(tmp_path / "none")).draw is None
    nan = float("nan")
    make_run(tmp_path / "nokl" / "a", "loss=dpo", kl=(nan, nan))
    make_run(tmp_path / "nokl" / "b", "loss=ipo", loss=unll(1.0), status="diverged")
    made = panel(gathered(tmp_path / "nokl").groups[0])
    assert made.draw is None and "KL" in made.missing and made.command == "python -m dppo loss=dpo seed=0"
