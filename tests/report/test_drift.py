"""The drift of held-out log-probs: means and bands against the files, phases in a row, what is torn or missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from dppo.evaluation.win_rates import t_interval
from dppo.report.drift import panel
from dppo.report.evidence import Group
from tests.report.figures import at_both_widths, bands, drawn, points_of, tips
from tests.report.made_runs import DPO, eval_row, gathered, make_run, unll

CHANGES = {0: (-1.0, -2.0, -3.0), 1: (-2.0, -4.0, -3.5), 2: (-6.0, -3.0, -1.0)}


def group_of(path: Path) -> Group:
    return gathered(path).groups[0]


def dpo(path: Path, seed: int, **other: object) -> Path:
    rows = [
        eval_row(0),
        eval_row(8, *np.array(CHANGES[seed]) / 2),
        eval_row(16, *CHANGES[seed], accuracy=0.6 + seed / 10),
    ]
    rows.insert(1, {"phase": "main", "step": 1, "train/loss": 0.7})
    return make_run(path, "loss=dpo", seed=seed, metrics=rows, **other)  # type: ignore[arg-type]


def curves(axes: Axes) -> list[list[tuple[float, float]]]:
    """The lines through several points: chosen, rejected, generated."""
    return [points for line in axes.lines if len(points := points_of(line)) > 2]


def test_lines_are_means_and_bands_extremes_of_seeds(tmp_path: Path) -> None:
    for seed in CHANGES:
        dpo(tmp_path / f"d{seed}", seed)
    made = panel(group_of(tmp_path))
    wide, narrow = at_both_widths(made)
    for figure in (wide, narrow):
        chosen, rejected, generated = curves(figure.axes[0])
        assert chosen == rejected == [(0, 0), (8, -1.5), (16, -3)]
        assert generated == [(0, 0), (8, -1.25), (16, -2.5)]
        assert {(16.0, -6.0), (16.0, -1.0), (8.0, -3.0), (8.0, -0.5), (0.0, 0.0)} <= bands(figure.axes[0])[0]
        assert {(16.0, -4.0), (16.0, -2.0)} <= bands(figure.axes[0])[1]
        assert curves(figure.axes[1]) == [[(0, 0.5), (8, 0.5), (16, pytest.approx(0.7))]]
    rows = made.tables[0].rows
    assert len(rows) == 9
    last = rows[2]
    assert last[:4] == ("loss=dpo", "chosen", 16, 3)
    tokens = (-0.3, -0.6, -0.1)
    assert [(one.value, one.low, one.high) for one in last[4:6]] == [  # type: ignore[union-attr]
        (pytest.approx(-3), -6, -1), tuple(map(pytest.approx, tokens)),
    ]  # fmt: skip
    assert "3 seeds" in made.lead and "least and greatest" in made.lead
    assert "loss=dpo, step 16: chosen -3.00 [-6.00, -1.00] nats an answer" in tips(wide)
    kinds = {line.get_marker() for line in wide.axes[0].lines if len(points_of(line)) == 1}
    assert len(kinds) == 3  # they can be told apart without colour


def test_a_seed_less_changes_the_band_and_one_seed_has_none(tmp_path: Path) -> None:
    for seed in (0, 1):
        dpo(tmp_path / "two" / f"d{seed}", seed)
    axes = drawn(panel(group_of(tmp_path / "two"))).axes[0]
    assert max(abs(y) for _, y in bands(axes)[0]) == 2
    assert curves(axes)[0] == [(0, 0), (8, -0.75), (16, -1.5)]
    dpo(tmp_path / "one" / "d0", 0)
    made = panel(group_of(tmp_path / "one"))
    axes = drawn(made).axes[0]
    assert not bands(axes)
    assert "single seeds, which have no band" in made.lead


def test_more_than_four_seeds_have_a_t_interval(tmp_path: Path) -> None:
    values = [-1.0, -2.0, -4.0, -3.0, -7.0]
    for seed, value in enumerate(values):
        make_run(tmp_path / f"d{seed}", "loss=dpo", seed=seed, metrics=[eval_row(0), eval_row(9, value, -1, -1)])
    made = panel(group_of(tmp_path))
    expected = t_interval(values)
    assert made.tables[0].rows[1][4] == expected
    assert {(9.0, expected.low), (9.0, expected.high)} <= bands(drawn(made).axes[0])[0]
    assert "t intervals" in made.lead


def test_phases_continue_where_the_one_before_ended(tmp_path: Path) -> None:
    """-3 in the first phase and +1 in the second are -2; the generated answers end where y_gen is made anew."""
    rows = [
        eval_row(0, phase="one"),
        eval_row(8, -3, -4, -5, phase="one"),
        eval_row(8, start=(-13, -16, -6), phase="two"),
        eval_row(12, 1, -1, -7, start=(-13, -16, -6), phase="two"),
    ]
    phases = {"one": {"loss": unll(0.1), "reference": "sft"}, "two": {"loss": DPO, "reference": "previous"}}
    make_run(tmp_path / "previous" / "a", loss=None, phases=phases, metrics=rows)
    made = panel(group_of(tmp_path / "previous"))
    found = {(row[1], row[2]): row[4].value for row in made.tables[0].rows}  # type: ignore[union-attr]
    assert found == {
        ("chosen", 0): 0, ("chosen", 8): -3, ("chosen", 12): -2, ("rejected", 0): 0, ("rejected", 8): -4,
        ("rejected", 12): -5, ("generated", 0): 0, ("generated", 8): -5,
    }  # fmt: skip
    wide, _ = at_both_widths(made)
    assert [(8, 0), (8, 1)] in [points_of(line) for line in wide.axes[0].lines]
    phases["two"]["reference"] = "sft"
    make_run(tmp_path / "sft" / "a", loss=None, phases=phases, metrics=rows)
    again = {(row[1], row[2]): row[4].value for row in panel(group_of(tmp_path / "sft")).tables[0].rows}  # type: ignore[union-attr]
    assert again == {**found, ("generated", 12): -12}


def test_torn_and_missing_logs(tmp_path: Path) -> None:
    torn = dpo(tmp_path / "a", 0)
    text = (torn / "metrics.jsonl").read_text()
    (torn / "metrics.jsonl").write_text(text[:-40] + "\n[1]\nnull")
    dpo(tmp_path / "b", 1)
    make_run(tmp_path / "c", "loss=unll", "train.evaluate_every=null", loss=unll(0.1), metrics=None)
    make_run(tmp_path / "n", "loss=none", loss=None, policy=[0.0, 0.0, 0.0])
    make_run(tmp_path / "d", "alpha=9", loss=unll(9.0), status="diverged")
    make_run(tmp_path / "e", "alpha=1", loss=unll(1.0), metrics=[eval_row(0), eval_row(4, *[float("nan")] * 3)])
    made = panel(group_of(tmp_path))
    # The torn seed ends at step 8: so does the mean.
    assert [row[2] for row in made.tables[0].rows if row[1] == "chosen"] == [0, 8]
    assert made.missing.startswith("2 of 3 configurations")
    assert made.command == "python -m dppo loss=unll train.evaluate_every=50 seed=0"
    at_both_widths(made)


def test_without_any_log_nothing_is_drawn_but_said(tmp_path: Path) -> None:
    train = {"train": {"steps": 80, "evaluate_every": None}}
    make_run(tmp_path / "a" / "a", "loss=dpo", seed=3, metrics=[{"phase": "main", "step": 1}], settings=train)
    made = panel(group_of(tmp_path / "a"))
    assert made.draw is None and "held-out" in made.missing
    assert made.command == "python -m dppo loss=dpo train.evaluate_every=10 seed=3"
    make_run(tmp_path / "b" / "a", "loss=none", "train.steps=5", loss=None)
    made = panel(group_of(tmp_path / "b"))
    assert (made.draw, made.missing) == (None, "no run was trained on preferences")
    assert made.command == "python -m dppo train.steps=5 seed=0 loss=dpo"


def test_long_runs_have_few_marks_and_all_steps(tmp_path: Path) -> None:
    make_run(
        tmp_path / "a", "loss=dpo", metrics=[eval_row(0), *(eval_row(step, -step, -1, -1) for step in range(1, 301))]
    )
    made = panel(group_of(tmp_path))
    axes = drawn(made).axes[0]
    assert [len(curve) for curve in curves(axes)] == [301, 301, 301]
    marks = {points_of(line)[0] for line in axes.lines if len(points_of(line)) == 1}
    assert {(0, 0), (300, -300)} <= marks and len(marks) < 45


def test_the_best_the_baseline_and_the_most_different_are_shown(tmp_path: Path) -> None:
    """Six settings; the baseline drifts least, the best a little more, -50 and -20 differ most from those."""
    for place, (drift, reward) in enumerate([(-1, 1), (-2, 2), (-3, 1.5), (-20, 1.2), (-50, 0.5), (-4, 0.1)]):
        rewards = [reward - 1, reward, 1.0]
        loss = DPO if place == 0 else unll(place)
        make_run(
            tmp_path / f"r{place}", f"alpha={place}{'é$_' * 30}", loss=loss, policy=rewards, reference=[0.3, 0.1, 0.9],
            metrics=[eval_row(0), eval_row(5, drift, drift, drift)],
        )  # fmt: skip
    group = gathered(tmp_path, metric="reward").groups[0]
    made = panel(group)
    shown = {str(row[0])[:7] for row in made.tables[0].rows}
    assert shown == {"alpha=0", "alpha=1", "alpha=3", "alpha=4"}
    assert "4 of 6 configurations are shown" in made.lead
    wide, narrow = at_both_widths(made)
    assert len({axes.get_ylim() for axes in wide.axes[:4]}) == 1
    assert len({axes.get_ylim() for axes in (*narrow.axes[0:2], *narrow.axes[4:6])}) == 1
