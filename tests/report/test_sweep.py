"""The figures of a real sweep, whose files are kept beside this: what is drawn is what its runs measured.

Made by ``python -m dppo -m loss=unll penalty=quadratic,linear alpha=0,0.001,0.01,0.1 seed=0,1,2`` with 32 prompts.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dppo import config
from dppo.evaluation.win_rates import Interval, crossed_rate
from dppo.report import drift, edits, efficiency, frontier, hyperparameters, paradigms, ranking, rewards
from dppo.report.drawing import NARROW, WIDE, new_figure
from dppo.report.evidence import Group, again
from tests.report.figures import bands, check_words, drawn, points_of
from tests.report.made_runs import gathered, make_run, unll

ALPHAS = (0.001, 0.01, 0.1)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kept")
    with tarfile.open(Path(__file__).parent / "sweep.tar.xz") as archive:
        archive.extractall(root, filter="data")
    return root / "sweep"


@pytest.fixture(scope="module")
def group(sweep: Path) -> Group:
    (found,) = gathered(sweep).groups
    return found


def outcomes(sweep: Path, penalty: str, alpha: float) -> Any:
    """(S, P) wins, ties and losses, straight from the files, in the order of the prompts' ids."""
    rows = []
    for path in sorted(sweep.iterdir(), key=lambda path: path.name):
        words = (path / "command.txt").read_text().split()
        if f"penalty={penalty}" in words and f"alpha={alpha:g}" in words:
            samples = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
            samples.sort(key=lambda row: str(row["prompt_id"]))
            signs = [np.sign(row["policy_reward"] - row["reference_reward"]) for row in samples]
            rows.append((words[6], [(float(sign) + 1) / 2 for sign in signs]))
    rows.sort()
    assert len(rows) == 3
    return np.array([values for _, values in rows])


def told(one: Interval) -> str:
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


def marks(figure: Figure) -> dict[str, tuple[float, float]]:
    """What one can point at, by its text."""
    return {
        str(line.get_gid()).removeprefix("tip:"): points_of(line)[0]
        for axes in figure.axes
        for line in axes.lines
        if line.get_gid()
    }


def test_the_search_shows_every_alpha_of_every_penalty(sweep: Path, group: Group) -> None:
    panel = hyperparameters.panel(group)
    for width in (WIDE, NARROW):
        figure = drawn(panel, width)
        check_words(figure)
        shown = marks(figure)
        for penalty in ("quadratic", "linear"):
            for alpha in ALPHAS:
                values = outcomes(sweep, penalty, alpha)
                found = crossed_rate(values, n_bootstrap=200, seed=0)
                text = f"penalty={penalty} alpha={alpha:g}: {told(found)}, 3 seeds x 32"
                (mark,) = [at for said, at in shown.items() if said.removesuffix(" (best)") == text]
                assert mark == pytest.approx((alpha, values.mean()))
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    # Intervals are drawn from bound to bound.
    drawn_ends = [np.asarray(path.vertices)[:, 1] for one in axes.collections for path in one.get_paths()]
    ends = {tuple(np.round(found, 6).tolist()) for found in drawn_ends}
    best = crossed_rate(outcomes(sweep, "quadratic", 0.001), n_bootstrap=200, seed=0)
    assert (round(best.low, 6), round(best.high, 6)) in ends
    # alpha = 0 has no place on a logarithmic axis: it is a level.
    level = [line for line in axes.lines if "alpha=0:" in str(line.get_gid())]
    assert len(level) == 1 and points_of(level[0])[0][1] == pytest.approx(outcomes(sweep, "quadratic", 0).mean())


def test_the_best_is_marked_and_the_end_is_said(group: Group) -> None:
    panel = hyperparameters.panel(group)
    best = max(
        (entry for entry in group.entries if "alpha=0" not in entry.label.split()), key=lambda one: one.value.value
    )
    stars = [line for line in drawn(panel).axes[0].lines if line.get_marker() == "*"]
    assert [points_of(line) for line in stars] == [[(0.001, best.value.value)]]
    # The lower end is no boundary where alpha = 0 was tried.
    assert "may lie beyond" not in panel.lead and panel.command == ""
    rows = {str(row[0]): row for row in panel.tables[0].rows}
    assert [label for label, row in rows.items() if row[-1] == "best"] == [best.label]
    assert len(rows) == 6


def test_a_seed_less_changes_what_is_drawn(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path / "sweep")
    (one,) = [
        path for path in (tmp_path / "sweep").iterdir()
        if {"penalty=linear", "alpha=0.1", "seed=2"} <= set((path / "command.txt").read_text().split())
    ]  # fmt: skip
    shutil.rmtree(one)
    (less,) = gathered(tmp_path / "sweep").groups
    said = [text for text in marks(drawn(hyperparameters.panel(less))) if text.startswith("penalty=linear alpha=0.1:")]
    values = outcomes(sweep, "linear", 0.1)
    found = crossed_rate(values[:2], n_bootstrap=200, seed=0)
    assert said == [
        f"penalty=linear alpha=0.1: {values[:2].mean():.3f} [{found.low:.3f}, {found.high:.3f}], 2 seeds x 32"
    ]


def test_every_other_figure_of_the_sweep_can_be_drawn_and_read(group: Group) -> None:
    for part in (paradigms, rewards, ranking, drift, edits, frontier):
        panel = part.panel(group)
        for width in (WIDE, NARROW):
            check_words(drawn(panel, width))
        assert panel.alt and panel.lead and all(table.rows for table in panel.tables)
    assert efficiency.panel(group).draw is None and "+sweep=data_efficiency" in efficiency.panel(group).command


def test_paradigms_are_the_best_of_each_family_beside_sft(group: Group) -> None:
    panel = paradigms.panel(group)
    bars = [one for one in drawn(panel).axes[0].patches if isinstance(one, Rectangle) and one.get_width() > 0]
    best: dict[str, float] = {}
    for one in group.entries:
        best[one.method] = max(best.get(one.method, 0.0), one.value.value)
    assert set(best) == {"UnLL quadratic", "UnLL linear", "DPO"}, "alpha=0 is DPO"
    assert sorted(bar.get_width() for bar in bars) == pytest.approx(sorted([*best.values(), 0.5]))
    assert "flatters those with many" in panel.lead
    assert "best of 3" in "".join(text.get_text() for text in drawn(panel).axes[0].get_yticklabels())


def test_paradigms_are_compared_on_equal_data(sizes: Path) -> None:
    (group,) = gathered(sizes, baseline="train.n_examples=200").groups
    panel = paradigms.panel(group)
    assert [row[1] for row in panel.tables[0].rows] == [
        "loss=unll train.n_examples=200",
        "loss=dpo train.n_examples=200",
    ]
    assert "Only configurations trained on 200 examples" in panel.lead


def test_bars_below_zero_have_their_numbers_on_the_left(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a", "loss=dpo", policy=(-2.0, -1.0, -3.0))
    make_run(tmp_path / "runs" / "b", "loss=unll", loss=unll(0.1), policy=(2.0, 1.0, 0.0))
    (group,) = gathered(tmp_path / "runs", metric="reward").groups
    for width in (WIDE, NARROW):
        figure = drawn(paradigms.panel(group), width)
        check_words(figure)
        numbers = {text.get_text(): text for text in figure.axes[0].texts}
        assert numbers["-2.000"].get_horizontalalignment() == "right"
        assert numbers["1.000"].get_horizontalalignment() == "left"
        assert numbers["-2.000"].get_window_extent().x1 < numbers["1.000"].get_window_extent().x0


def test_the_matrix_is_what_the_answers_say(sweep: Path, group: Group) -> None:
    panel = ranking.panel(group)
    table = next(one for one in panel.tables if one.name == "win_rate_matrix")
    rewards_of = {
        entry.label: np.array([one.policy for _, one in sorted(entry.measured.items())]) for entry in group.entries
    }
    checked = 0
    for first, second, rate, *_ in table.rows:
        if "SFT" not in (first, second):
            own, other = rewards_of[str(first)], rewards_of[str(second)]
            assert rate.value == pytest.approx(((np.sign(own - other) + 1) / 2).mean())  # type: ignore[union-attr]
            checked += 1
    assert checked == 21
    cells = [one for one in drawn(panel).axes[0].patches if isinstance(one, Rectangle)]
    assert len(cells) == 8 * 7


# --- data efficiency, from made runs: what the sweep above does not vary ---------------------------------------------


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    """Two methods on three numbers of pairs, three seeds; more pairs win more of 40 prompts."""
    for name, loss, lead in (("dpo", None, 0), ("unll", unll(0.1), 2)):
        for count in (100, 200, 400):
            for seed in range(3):
                wins = 10 + count // 20 + lead + 2 * seed
                settings = {"train": {"n_examples": count}}
                make_run(
                    tmp_path / "runs" / f"{name}{count}-{seed}", f"loss={name}", f"train.n_examples={count}",
                    seed=seed, settings=settings, policy=[1.0] * wins + [-1.0] * (40 - wins),
                    **({} if loss is None else {"loss": loss}),  # type: ignore[arg-type]
                )  # fmt: skip
    return tmp_path / "runs"


def test_data_efficiency_has_a_line_and_a_band_a_method(sizes: Path) -> None:
    (group,) = gathered(sizes).groups
    panel = efficiency.panel(group)
    figure = drawn(panel)
    check_words(figure)
    check_words(drawn(panel, NARROW))
    lines = [points_of(line) for line in figure.axes[0].lines if len(line.get_xdata()) == 3]  # type: ignore[arg-type]
    # The line that ends highest comes first.
    expected = [[(count, (12 + count // 20 + lead) / 40) for count in (100, 200, 400)] for lead in (2, 0)]
    np.testing.assert_allclose(lines, expected)
    for corners in bands(figure.axes[0]):
        assert {x for x, _ in corners} == {100, 200, 400}
    order = sorted(range(40), key=lambda n: f"p{n}")
    values = np.array([[float(n < 32 + 2 * seed) for n in order] for seed in range(3)])
    top = crossed_rate(values, n_bootstrap=200, seed=0)
    assert {(400.0, top.low), (400.0, top.high)} <= bands(figure.axes[0])[0]


def test_a_seed_less_changes_the_band(sizes: Path) -> None:
    (group,) = gathered(sizes).groups
    before = bands(drawn(efficiency.panel(group)).axes[0])
    shutil.rmtree(sizes / "unll400-2")
    (group,) = gathered(sizes).groups
    after = bands(drawn(efficiency.panel(group)).axes[0])
    assert {corner for corner in before[0] if corner[0] < 400} == {corner for corner in after[0] if corner[0] < 400}
    assert {corner for corner in before[0] if corner[0] == 400} != {corner for corner in after[0] if corner[0] == 400}
    assert before[1] == after[1]


def test_alpha_and_zeta_make_a_surface(tmp_path: Path) -> None:
    for n, (alpha, zeta) in enumerate((a, z) for a in (0.01, 0.1, 1.0) for z in (0.1, 0.5, 0.9)):
        loss = unll(alpha)
        loss["penalty"] = {"_target_": "dppo.losses.penalties.Expectile", "zeta": zeta}
        make_run(
            tmp_path / "runs" / str(n), f"alpha={alpha}", f"zeta={zeta}", loss=loss,
            settings={"alpha": alpha, "zeta": zeta}, policy=[1.0] * (n + 1) + [-1.0] * (9 - n),
        )  # fmt: skip
    (group,) = gathered(tmp_path / "runs").groups
    panel = hyperparameters.panel(group)
    for width in (WIDE, NARROW):
        figure = drawn(panel, width)
        check_words(figure)
        line, surface = figure.axes[:2]
        assert (surface.get_xlabel(), surface.get_ylabel(), surface.get_xscale()) == ("alpha", "zeta", "log")
        places = {point for one in surface.lines for point in points_of(one)}
        assert places == {(a, z) for a in (0.01, 0.1, 1.0) for z in (0.1, 0.5, 0.9)}
        (star,) = [one for one in surface.lines if one.get_marker() == "*"]
        assert points_of(star) == [(1.0, 0.9)]
        assert surface.collections, "contours between the points"
        assert line.get_xscale() == "log"
    assert "upper end" in panel.lead


def test_one_run_has_nothing_to_search_and_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "one")
    (group,) = gathered(tmp_path / "runs").groups
    for part in (hyperparameters, efficiency, ranking):
        panel = part.panel(group)
        assert panel.draw is None and panel.missing and panel.command.startswith("python -m dppo")
    assert paradigms.panel(group).draw is not None
    assert new_figure(WIDE, 1).get_figwidth() == WIDE


# --- what a report tells to run --------------------------------------------------------------------------------------


def test_every_command_that_a_report_names_is_accepted(sweep: Path, group: Group, tmp_path: Path) -> None:
    """Commands that fill what is missing, and those that make a row again, at the typed door of the command line."""
    for n, alpha in enumerate((0.01, 0.1, 1.0)):
        trial = ("+sweep=alpha", f"alpha={alpha}")
        policy = [1.0] * (n + 1) + [-1.0] * (2 - n)
        make_run(tmp_path / "study" / str(n), *trial, loss=unll(alpha), settings={"alpha": alpha}, policy=policy)
    (of_study,) = gathered(tmp_path / "study").groups
    told = [hyperparameters.panel(of_study).command, again(of_study.best)]
    told += [part.panel(group).command for part in (paradigms, efficiency)]
    told += [again(group.best), again(group.baseline)]
    commands = list(dict.fromkeys(command for command in told if command))
    assert len(commands) >= 5
    assert any("hydra.sweeper.study_name=alpha_beyond" in command for command in commands)
    for command in commands:
        program, dash, module, *words = shlex.split(command)
        assert (program, dash, module) == ("python", "-m", "dppo")
        job = [word for word in words if not word.startswith(("-", "hydra."))]
        # The first of several values; a range by one of its ends.
        job = [re.sub(r"=.*interval\((.*),.*", r"=\1", word).partition(",")[0] for word in job]
        config.load(config.compose(job), job)
