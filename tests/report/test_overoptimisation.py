"""Reward against KL along training: points of the files, means and ranges of seeds, what fills what is missing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from dppo import config
from dppo.report.evidence import Group
from dppo.report.overoptimisation import panel
from tests.report.figures import at_both_widths, points_of, tips
from tests.report.made_runs import gathered, make_run, unll


def row(percent: int, kl: float, gain: float, rate: float = 0.5, **more: Any) -> dict[str, Any]:
    """A row of interim measurements on 40 prompts, with intervals 0.25 wide on both sides."""
    return {
        "phase": "main", "step": percent, "interim/percent": percent, "interim/n_prompts": 40,
        "interim/kl_nats_per_token": kl / 10, "interim/kl_nats_per_answer": kl, "interim/reward": gain - 1,
        "interim/gain": gain, "interim/gain_ci_low": gain - 0.25, "interim/gain_ci_high": gain + 0.25,
        "interim/win_rate": rate, "interim/win_rate_ci_low": rate - 0.25, "interim/win_rate_ci_high": rate + 0.25,
        **more,
    }  # fmt: skip


DPO = [row(25, 1.0, 0.5, 0.6), {"phase": "main", "step": 30, "train/loss": 0.1}, row(50, 4.0, 1.0, 0.7)]
LOST = [*DPO, row(75, 9.0, 0.25, 0.55)]


def group_of(path: Path) -> Group:
    return gathered(path, metric="reward").groups[0]


def curves(figure: Any, at: int) -> list[list[tuple[float, float]]]:
    """The lines of a panel that are curves."""
    found = [points_of(line) for line in figure.axes[at].lines if line.get_marker() == "None"]
    return sorted(points for points in found if len(points) > 2)


def test_a_curve_begins_at_sft_and_its_highest_point_is_marked(tmp_path: Path) -> None:
    make_run(tmp_path / "d", "loss=dpo", metrics=LOST)
    made = panel(group_of(tmp_path))
    for figure in at_both_widths(made):
        assert curves(figure, 0) == [[(0, 0), (1, 0.5), (4, 1), (9, 0.25)]]
        assert curves(figure, 1) == [[(0, 0.5), (1, 0.6), (4, 0.7), (9, 0.55)]]
        for axes, value in zip(figure.axes, (1.0, 0.7), strict=True):
            large = [
                points_of(line) for line in axes.lines if line.get_marker() != "None" and line.get_markersize() > 6
            ]
            assert large == [[(4, value)]]  # that of the highest reward
        lines = [one for one in figure.axes[0].collections if isinstance(one, LineCollection)]
        bars = {tuple(map(tuple, np.asarray(part))) for one in lines for part in one.get_segments()}
        assert bars == {((1, 0.25), (1, 0.75)), ((4, 0.75), (4, 1.25)), ((9, 0.0), (9, 0.5))}
    assert "40 fixed validation prompts" in made.lead and "95 % intervals over prompts" in made.lead
    assert made.missing == made.command == ""
    rows = made.tables[0].rows
    assert [(one[1], one[2], one[3], one[7]) for one in rows] == [(25, 1, 40, ""), (50, 1, 40, "yes"), (75, 1, 40, "")]
    assert "highest +1.00" in made.alt and "last +0.25" in made.alt


def test_seeds_are_means_with_their_range_at_the_points_that_all_have(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "loss=dpo", seed=0, metrics=LOST)
    make_run(tmp_path / "b", "loss=dpo", seed=1, metrics=[row(25, 3.0, 0.7, 0.8), row(50, 6.0, 2.0, 0.9)])
    make_run(tmp_path / "c", "loss=dpo", seed=2, metrics=[])  # measured nothing
    make_run(tmp_path / "u", "loss=unll", loss=unll(0.1), metrics=[row(50, 2.0, -0.5)])
    made = panel(group_of(tmp_path))
    wide, _ = at_both_widths(made)
    (mean,) = curves(wide, 0)
    assert [x for x, _ in mean] == [0, 2, 5] and [y for _, y in mean] == pytest.approx([0, 0.6, 1.5])
    told = [tip for tip in tips(wide) if tip.startswith("loss=dpo, 50 %")]
    assert told and "1.500 [1.000, 2.000]" in told[0]
    assert "up to 2 seeds span their least and greatest" in made.lead and "one seed" in made.lead
    assert [one[2] for one in made.tables[0].rows if one[0] == "loss=dpo"] == [2, 2]


def test_what_is_missing_is_measured_by_the_command(tmp_path: Path) -> None:
    """The command is one that the typed door takes, and asks for what the panel needs."""
    for seed in (0, 1):
        make_run(tmp_path / f"d{seed}", "loss=dpo", "evaluation.interim.n_points=3", seed=seed)
    make_run(tmp_path / "n", "loss=none", loss=None)
    made = panel(group_of(tmp_path))
    assert made.draw is None and "no run measured reward and KL" in made.missing
    program, dash, module, *words = shlex.split(made.command)
    assert (program, dash, module) == ("python", "-m", "dppo")
    assert words == ["loss=dpo", "evaluation.interim.kl=true", "evaluation.interim.n_points=9", "seed=0,1", "-m"]
    settings = config.from_words([*words[:-2], "seed=0"]).evaluation.interim
    assert settings.kl and settings.n_points == 9
    make_run(tmp_path / "u", "loss=unll", loss=unll(0.1), metrics=DPO)
    made = panel(group_of(tmp_path))
    assert made.draw is not None and made.missing.startswith("1 of 2 configurations measured no reward and KL")
    assert made.command.startswith("python -m dppo loss=dpo evaluation.interim.kl=true")


def test_torn_and_foreign_rows_are_left_out(tmp_path: Path) -> None:
    limited = row(75, 9.0, 0.25)
    del limited["interim/gain"]  # as max_kl alone measured before
    path = make_run(tmp_path / "d", "loss=dpo", metrics=[*DPO, limited, row(80, float("nan"), 1.0)])
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(90, 1.0, 9.0))[:-20])
    made = panel(group_of(tmp_path))
    assert [one[1] for one in made.tables[0].rows] == [25, 50]
    make_run(tmp_path / "none" / "a", "loss=none", loss=None)
    assert panel(group_of(tmp_path / "none")).missing == "no run was trained on preferences"


def test_many_configurations_and_wide_ranges_can_be_read(tmp_path: Path) -> None:
    for n in range(9):
        rows = [row(percent, 0.01 * 3**n * percent, 0.1 * n * percent / 100) for percent in (10, 50, 90)]
        words = (f"alpha={n + 1}", "train.learning_rate=0.000123456789", "dataset.n_pairs=1000")
        make_run(tmp_path / str(n), *words, loss=unll(n + 1.0), metrics=rows, policy=[n * 0.1, 0.0, 1.0])
    made = panel(group_of(tmp_path))
    at_both_widths(made)
    assert "6 of 9 configurations are shown" in made.lead
