"""Cost: sums by hand over built and reused stages, what is estimated and what is unknown."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dppo.evaluation.win_rates import Interval
from dppo.report.cost import panel
from dppo.report.evidence import Evidence
from tests.report.figures import at_both_widths, drawn, tips
from tests.report.made_runs import gathered, make_run, unll

FIRST = [("sft", "s", 100.0, False), ("reference", "r", 8.0, False), ("preference", "p0", 30.0, False)]
SECOND = [("sft", "s", 0.5, True), ("reference", "r", 0.0, True), ("preference", "p1", 50.0, False)]
THIRD = [("sft", "other", 0.0, True), ("preference", "p9", 0.0, True), ("drift", "d", 1.0, True)]


def runs(path: Path) -> Evidence:
    """The second saved 99.5 + 8 s of the first's; the third's stages were built elsewhere; the fourth diverged."""
    make_run(path / "a", "loss=dpo", seed=0, stages=FIRST)
    make_run(path / "b", "loss=dpo", seed=1, stages=SECOND)
    make_run(path / "c", "alpha=0.1", loss=unll(0.1), stages=THIRD)
    make_run(path / "d", "alpha=9", loss=unll(9.0), stages=[("preference", "p2", 10.0, False)], status="diverged")
    return gathered(path)


def bars(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """(from, width) of each bar, by the stage beside it."""
    axes = figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for bar in axes.patches:
        assert isinstance(bar, Rectangle)
        found[names[round(bar.get_y() + bar.get_height() / 2)]].append((bar.get_x(), bar.get_width()))
    return found


def test_spent_saved_estimated_and_unknown_by_hand(tmp_path: Path) -> None:
    """The third run's sft is estimated as 100 s, its preference as the median of 30, 50 and 10 s, its drift unknown."""
    made = panel(runs(tmp_path))
    by_stage = {row[0]: row[1:] for row in made.tables[0].rows}
    assert by_stage == {
        "sft": (100.5, 1, Interval(100, 100, 100), 2, 199.5, 1, None),
        "reference": (8.0, 1, Interval(8, 8, 8), 1, 8.0, None, None),
        "preference": (90.0, 3, Interval(30, 10, 50), 1, 30.0, 1, None),
        "drift": (1.0, 0, None, 1, 0.0, None, 1),
        "total": (199.5, 5, None, 5, 237.5, 2, 1),
    }
    assert list(by_stage)[:2] == ["sft", "reference"]
    by_run = {(row[0], row[1]): row[2:] for row in made.tables[1].rows}
    assert by_run["loss=dpo", 1] == ("complete", 50.5, 107.5, 2)
    assert by_run["alpha=0.1", 0] == ("complete", 1.0, 130.0, 3)
    assert by_run["alpha=9", 0] == ("diverged", 10.0, 0.0, 0)
    assert made.lead.startswith("4 finished runs took 3 min together, 50 s each on average.")
    assert "saved at least 4 min" in made.lead and "7 min" in made.lead
    wide, narrow = at_both_widths(made)
    for figure in (wide, narrow):
        found = bars(figure)
        for stage in ("sft", "reference", "preference", "drift"):
            row = by_stage[stage]
            spent, saved = float(str(row[0])) / 60, float(str(row[4])) / 60  # the axis is in minutes
            expected = [(0, spent), (spent, saved)] if saved else [(0, spent)]
            assert found[stage] == [pytest.approx(bar) for bar in expected]
        assert "minutes" in figure.axes[0].get_xlabel()
    assert "sft: 3 min saved, reused 2 times" in tips(wide)


def test_a_run_less_is_less_and_what_built_it_is_no_longer_known(tmp_path: Path) -> None:
    runs(tmp_path)
    (tmp_path / "a" / "result.json").unlink()
    made = panel(gathered(tmp_path))
    found = {row[0]: row[1:] for row in made.tables[0].rows}
    assert found["sft"] == (0.5, 0, None, 2, 0.0, None, 2)
    assert found["reference"][4:] == (0.0, None, 1)
    assert "2 unknown savings" in drawn(made).axes[0].texts[0].get_text()


def test_what_no_stage_does_is_named(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", "loss=dpo", stages=FIRST)
    text = (path / "result.json").read_text()
    (path / "result.json").write_text(text.replace('"total_seconds": 138.0', '"total_seconds": 20000'))
    made = panel(gathered(tmp_path))
    assert made.tables[0].rows[3][:2] == ("everything else", 20000 - 138)
    assert "Nothing was reused" in made.lead
    figure, _ = at_both_widths(made)
    assert "hours" in figure.axes[0].get_xlabel()


def test_without_timings_nothing_is_drawn(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "loss=dpo", seed=4)
    made = panel(gathered(tmp_path))
    assert made.draw is None and "how long" in made.missing and made.command == "python -m dppo loss=dpo seed=4"
    nobody = panel(Evidence((), (), (), tmp_path))
    assert nobody.draw is None and nobody.command == ""
