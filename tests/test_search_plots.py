"""The pictures of a study: every trial is where its numbers are, and no study is too odd to be drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation, Text
from matplotlib.tri import TriContourSet
from PIL import Image

from dppo.errors import UserError
from dppo.evaluation.win_rates import Interval
from dppo.search import plots
from dppo.search.overview import BaselineLine, Overview, TrialLine
from dppo.search.settings import Direction
from dppo.search.space import Parameter, Value, Values

NAN = math.nan
START = datetime(2025, 3, 1, 12, 0)
ALPHA = Parameter("alpha", "float", 1e-5, 1.0, log=True)
ZETA = Parameter("zeta", "float", 0.05, 0.95)


def of(value: float, width: float = 0.05) -> Interval:
    return Interval(value, value - width, value + width)


def trial(number: int, value: float | None = None, state: str = "complete", **other: Any) -> TrialLine:
    """Trial ``number`` of six minutes on one of two workers."""
    given: dict[str, Any] = {
        "index": number,
        "values": {"alpha": 10 ** (-4.5 + number / 2), "zeta": 0.1 + 0.8 * (number * 7 % 10) / 10},
        "objectives": None if value is None else (of(value),),
        "interim": {},
        "begun": START + timedelta(minutes=3 * number),
        "ended": START + timedelta(minutes=3 * number + 6),
        "worker": f"host:{number % 2}",
        **other,
    }
    return TrialLine(number=number, state=state, seeds=(0,), command="python -m dppo", **given)


def baseline(name: str, *objectives: Interval) -> BaselineLine:
    return BaselineLine(name, objectives or None, (0,), "python -m dppo")


def overview(*trials: TrialLine, **other: Any) -> Overview:
    given: dict[str, Any] = {
        "name": "alpha_zeta",
        "parameters": (ALPHA, ZETA),
        "objectives": ("win_rate.value",),
        "directions": ("maximize",),
        "baselines": (),
        "winners": (),
        **other,
    }
    return Overview(trials=trials, **given)


VALUES = (0.50, 0.55, 0.52, 0.70, 0.61, 0.58, 0.66)
STUDY = overview(
    *(trial(number, value, interim={25: value - 0.1, 50: value - 0.05}) for number, value in enumerate(VALUES)),
    trial(7, state="pruned", interim={50: 0.45, 25: 0.4}),
    trial(8, state="failed"),
    trial(9, 0.0, state="diverged", interim={25: 0.3}),
    baselines=(baseline("dpo", of(0.60)), baseline("simpo", of(0.605)), baseline("npo beta=0.1", of(0.5))),
    winners=(3,),
)
PLANE = overview(
    trial(0, objectives=(of(0.5), of(1.0))),
    trial(1, objectives=(of(0.7), of(3.0))),
    trial(2, objectives=(of(0.6), of(1.5))),
    trial(3, objectives=(of(0.55), of(2.5))),
    trial(4, objectives=(of(0.65), of(1.2)), feasible=False),
    trial(5, state="pruned", interim={20: 0.4}),
    objectives=("win_rate.value", "kl.nats_per_answer"),
    directions=("maximize", "minimize"),
    baselines=(baseline("dpo", of(0.62), of(2.0)), baseline("broken")),
    winners=(0, 1, 2),
)


def built(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def points(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Label -> coordinates of the markers."""
    return {
        str(one.get_label()): [(float(x), float(y)) for x, y in np.asarray(one.get_offsets())]
        for one in axes.collections
        if isinstance(one, PathCollection)
    }


def line(axes: Axes, label: str) -> list[tuple[float, float]]:
    (found,) = [one for one in axes.lines if one.get_label() == label]
    x, y = (np.asarray(values, dtype=float).tolist() for values in found.get_data())
    return list(zip(x, y, strict=True))


def intervals(axes: Axes) -> list[tuple[float, ...]]:
    """(x, low, high) of every vertical bar, by x."""
    parts = [part for one in axes.collections if isinstance(one, LineCollection) for part in one.get_segments()]
    found = [np.asarray(part) for part in parts]
    return sorted((float(part[0, 0]), *sorted(map(float, part[:, 1]))) for part in found if part[0, 0] == part[1, 0])


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return plots.draw(STUDY, tmp_path_factory.mktemp("study"))


def test_every_figure_is_written_as_png_and_svg(drawn: list[Path]) -> None:
    names = ["history", "slices", "contour", "interim", "timeline"]
    assert [path.name for path in drawn] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    assert {path.parent.name for path in drawn} == {"plots"}
    for path in drawn:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.info["dpi"] == pytest.approx((160, 160), abs=0.1)
                assert min(image.size) > 200
                pixels = np.asarray(image.convert("L"))
                assert pixels[0, 0] == 255, "the background is light"
                assert 0.01 < (pixels < 200).mean() < 0.6


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "history",
            ["alpha_zeta: 10 trials, 7 complete, 1 pruned, 1 diverged, 1 failed", "win rate ↑", "dpo", "simpo"],
        ),
        ("history", ["npo beta=0.1", "pruned (last interim win rate)", "best so far", "95 % interval", "no value"]),
        ("slices", ["alpha", "zeta", "npo beta=0.1", "best trial", "pruned (last interim win rate)"]),
        ("contour", ["alpha", "zeta", "win rate ↑", "pruned", "failed"]),
        ("interim", ["training of the first seed (% of its steps; at 100: the result)", "win rate", "trial 3"]),
        ("timeline", ["minutes since the first trial began", "host:0", "host:1", "3*", "* best trial"]),
    ],
)
def test_the_words_are_there(drawn: list[Path], name: str, texts: list[str]) -> None:
    (svg,) = [path.read_text("utf-8") for path in drawn if path.name == f"{name}.svg"]
    assert "<dc:date>" not in svg
    for text in texts:
        assert f"<!-- {text} -->" in svg, text


def test_the_same_study_gives_the_same_bytes_whatever_the_user_prefers(
    drawn: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "FIGURES", {"history": plots.history, "contour": plots.contour})
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 20}):
        before = dict(matplotlib.rcParams)
        again = plots.draw(STUDY, tmp_path)
        assert dict(matplotlib.rcParams) == before
    first = {path.name: path.read_bytes() for path in drawn}
    assert len(again) == 4
    for path in again:
        assert path.read_bytes() == first[path.name]


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file")
    with pytest.raises(UserError, match="cannot write"):
        plots.draw(STUDY, tmp_path)


# --- what the figures show -------------------------------------------------------------------------------------------


def test_history_has_every_trial_at_its_value() -> None:
    (axes,) = built(plots.history(STUDY)).axes
    found = points(axes)
    assert found["complete"] == [(n, value) for n, value in enumerate(VALUES) if n != 3]
    assert found["best"] == [(3, 0.70)]
    assert found["pruned"] == [(7, 0.45)], "the value at the highest percent"
    assert sum(map(len, found.values())) == len(STUDY.trials)
    assert np.array(intervals(axes)) == pytest.approx(
        np.array([(n, value - 0.05, value + 0.05) for n, value in enumerate(VALUES)])
    )
    assert line(axes, "best so far") == [(0, 0.50), (1, 0.55), (3, 0.70), (9, 0.70)]
    assert [line(axes, name)[0][1] for name in ("dpo", "simpo", "npo beta=0.1")] == [0.60, 0.605, 0.5]


@pytest.mark.parametrize(("direction", "below"), [("maximize", True), ("minimize", False)])
def test_what_has_no_value_lies_at_the_worst_edge(direction: Direction, below: bool) -> None:
    (axes,) = built(plots.history(replace(STUDY, directions=(direction,), winners=()))).axes
    (crash,), (blown_up,) = points(axes)["failed"], points(axes)["diverged"]
    assert (crash[0], blown_up[0]) == (8, 9)
    low, high = axes.get_ylim()
    for _, y in (crash, blown_up):
        assert low < y < high
        assert y < 0.445 if below else y > 0.755
    ticks = {text.get_text(): at for at, text in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    assert ticks["no value"] == crash[1]


def test_open_markers_are_open_and_have_an_edge() -> None:
    (axes,) = built(plots.history(STUDY)).axes
    (pruned,) = [one for one in axes.collections if one.get_label() == "pruned"]
    assert len(pruned.get_facecolor()) == 0
    assert len(pruned.get_edgecolor()) == 1


@pytest.mark.parametrize(
    ("objective", "metric", "shown"),
    [
        ("win_rate.value", "win rate", True),
        ("objective", "win rate", True),
        ("win_rate.n", "win rate", False),
        ("kl.nats_per_answer", "win rate", False),
        ("held_out.accuracy", "accuracy", True),
        ("win_rate.value", "accuracy", False),
    ],
)
def test_an_interim_value_is_drawn_only_on_an_axis_of_its_kind(objective: str, metric: str, shown: bool) -> None:
    study = replace(STUDY, objectives=(objective,), interim_metric=metric)
    (axes,) = built(plots.history(study)).axes
    assert (points(axes)["pruned"] == [(7, 0.45)]) == shown
    (paths,) = built(plots.interim(study)).axes
    assert line(paths, "trial 0")[-1] == ((100, 0.5) if shown else (50, pytest.approx(0.45)))


def test_the_best_so_far_knows_the_direction_and_the_constraints() -> None:
    study = overview(
        trial(0, 0.5), trial(1, 0.2, feasible=False), trial(2, 0.6), trial(3, 0.4), directions=("minimize",)
    )
    (axes,) = built(plots.history(study)).axes
    assert line(axes, "best so far") == [(0, 0.5), (3, 0.4), (3, 0.4)]
    assert points(axes)["infeasible"] == [(1, 0.2)]


def test_slices_have_the_winner_at_its_parameters_and_the_range_as_limits() -> None:
    left, right, _ = built(plots.slices(STUDY)).axes
    winner = STUDY.trials[3]
    assert points(left)["best"] == [(winner.values["alpha"], 0.70)]
    assert points(right)["best"] == [(winner.values["zeta"], 0.70)]
    assert (left.get_xscale(), right.get_xscale()) == ("log", "linear")
    assert left.get_xlim() == pytest.approx((1e-5 / 10**0.2, 10**0.2))
    assert right.get_xlim() == pytest.approx((0.05 - 0.036, 0.95 + 0.036))
    for axes in (left, right):
        assert sum(map(len, points(axes).values())) == len(STUDY.trials)
        assert len(intervals(axes)) == len(VALUES)
        assert line(axes, "dpo")[0][1] == 0.60


def test_slices_leave_out_a_trial_without_the_parameter() -> None:
    study = overview(trial(0, 0.5, values={"alpha": 0.1}), trial(1, 0.6))
    left, right, _ = built(plots.slices(study)).axes
    assert points(left)["complete"] == [(0.1, 0.5), (pytest.approx(1e-4), 0.6)]
    assert [y for _, y in points(right)["complete"]] == [0.6]


def test_choices_are_told_apart_by_kind_and_named_in_their_words() -> None:
    choices: tuple[Value, ...] = (1, True, None, "npo")
    parameter = Parameter("loss", "choice", choices=choices, texts=("1", "true", "null", "npo"))
    trials = [trial(n, 0.5, values={"loss": value}) for n, value in enumerate(choices)]
    axes, _ = built(plots.slices(overview(*trials, parameters=(parameter,)))).axes
    assert [round(x) for x, _ in points(axes)["complete"]] == [0, 1, 2, 3]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "true", "null", "npo"]


def test_slices_have_a_row_for_each_objective() -> None:
    figure = built(plots.slices(PLANE))
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels[0] == "win rate ↑"
    assert labels[2] == "KL to SFT (nats per answer) ↓"
    assert points(figure.axes[3])["best"][0] == (PLANE.trials[0].values["zeta"], 1.0)


def grid(n: int, values: Callable[[float, float], float], *, places: list[Values] | None = None) -> Overview:
    square: list[Values] = [{"alpha": 10.0**a, "zeta": z / 10} for a in (-4, -2, -1) for z in (1, 4, 9)]
    where = places or square[:n]
    return overview(
        *(
            trial(number, values(math.log10(float(str(one["alpha"]))), float(str(one["zeta"]))), values=one)
            for number, one in enumerate(where)
        ),
        winners=(2,),
    )


def test_contours_interpolate_in_the_logarithm() -> None:
    axes, _ = built(plots.contour(grid(9, lambda a, z: 1 + a / 10))).axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    (filled,) = [one for one in axes.collections if isinstance(one, TriContourSet)]
    assert len(filled.get_paths()) > 8
    for path, (low, high) in zip(filled.get_paths(), itertools.pairwise(filled.levels), strict=True):
        heights = 1 + np.log10(np.asarray(path.vertices)[:, 0]) / 10
        assert low - 1e-4 < heights.min() < heights.max() < high + 1e-4
    assert points(axes)["best"] == [(1e-4, 0.9)]
    assert len(points(axes)["complete"]) == 8


LINE_OF_SIX: list[Values] = [{"alpha": 10.0 ** -(n / 2), "zeta": 0.1 + n / 10} for n in range(6)]


@pytest.mark.parametrize(
    ("study", "expected"),
    [
        (grid(9, lambda a, z: a + z), True),
        (grid(6, lambda a, z: a * z), True),
        (grid(5, lambda a, z: a + z), False),
        (grid(9, lambda a, z: 0.5), False),
        (grid(6, lambda a, z: a + z, places=LINE_OF_SIX), False),
        (grid(8, lambda a, z: a + z, places=LINE_OF_SIX + [{"alpha": 1e-4, "zeta": 0.3}] * 2), True),
        (grid(6, lambda a, z: a + z, places=[{"alpha": 0.1, "zeta": 0.5}] * 6), False),
    ],
    ids=["nine", "six", "five", "flat", "line", "repeated", "one-point"],
)
def test_contours_need_six_trials_that_span_a_plane(study: Overview, expected: bool) -> None:
    axes = built(plots.contour(study)).axes[0]
    assert any(isinstance(one, TriContourSet) for one in axes.collections) == expected
    assert sum(map(len, points(axes).values())) == len(study.trials)


def test_contour_takes_alpha_and_zeta_else_the_first_two_numbers() -> None:
    lr, size = Parameter("lr", "float", 1e-5, 1e-3, log=True), Parameter("size", "int", 1, 9)
    choice = Parameter("loss", "choice", choices=("a",), texts=("a",))
    values: Values = {"lr": 1e-4, "size": 3, "loss": "a", "alpha": 0.1, "zeta": 0.5}
    one = trial(0, 0.5, values=values)

    def labels(*parameters: Parameter) -> tuple[str, str]:
        axes = built(plots.contour(overview(one, parameters=parameters))).axes[0]
        return axes.get_xlabel(), axes.get_ylabel()

    assert labels(lr, size, ZETA, ALPHA) == ("alpha", "zeta")
    assert labels(choice, lr, size, ZETA) == ("lr", "size")
    assert plots.contour(overview(one, parameters=(choice, lr))) is None


def test_interim_lines_end_where_the_trial_ended() -> None:
    (axes,) = built(plots.interim(STUDY)).axes
    assert line(axes, "trial 7") == [(25, 0.4), (50, 0.45)]
    assert line(axes, "trial 0") == [(25, pytest.approx(0.4)), (50, pytest.approx(0.45)), (100, 0.50)]
    ends = [(one.get_label(), tuple(np.asarray(one.get_offsets())[0])) for one in axes.collections]
    assert ("pruned", (50, 0.45)) in ends
    assert ("best", (100, 0.70)) in ends
    widths = {str(one.get_label()): one.get_linewidth() for one in axes.lines}
    assert widths["trial 3"] > max(width for name, width in widths.items() if name != "trial 3")
    assert len(axes.lines) == 9, "the failed one measured nothing"
    assert plots.interim(overview(trial(0, 0.5))) is None


def test_timeline_has_a_row_for_each_worker_and_running_trials_last_until_now() -> None:
    study = replace(STUDY, trials=(*STUDY.trials, trial(10, state="running", ended=None)))
    (axes,) = built(plots.timeline(study)).axes
    rectangles = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    bars = [(bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in rectangles]
    assert bars[:3] == [(0, 6, 0), (3, 6, 1), (6, 6, 0)]
    assert bars[10] == (30, 3, 0), "the latest time known is the end of trial 9"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["host:0", "host:1"]
    assert {text.get_text() for text in axes.texts} == {*map(str, {*range(11)} - {3}), "3*"}


def test_pareto_connects_the_front_and_marks_the_rest() -> None:
    (axes,) = built(plots.pareto(PLANE)).axes
    found = points(axes)
    assert found["best"] == [(0.5, 1.0), (0.7, 3.0), (0.6, 1.5)]
    assert found["complete"] == [(0.55, 2.5)]
    assert found["infeasible"] == [(0.65, 1.2)]
    assert found["baseline dpo"] == [(0.62, 2.0)]
    assert line(axes, "front") == [(0.5, 1.0), (0.6, 1.5), (0.7, 3.0)]
    assert {text.get_text() for text in axes.texts} == {"0", "1", "2", "dpo"}
    assert plots.pareto(STUDY) is None


def test_a_front_of_three_objectives_is_connected_only_where_it_is_one_in_the_plane() -> None:
    trials = [
        trial(n, objectives=(of(a), of(b), of(c))) for n, (a, b, c) in enumerate([(1, 1, 0), (2, 2, 0), (0, 0, 5)])
    ]
    study = overview(
        *trials, objectives=("a", "b", "c"), directions=("maximize", "maximize", "maximize"), winners=(1, 2)
    )
    (axes,) = built(plots.pareto(study)).axes
    assert line(axes, "front") == [(2, 2)]


@pytest.mark.parametrize("n", [2, 5, 9])
def test_names_of_baselines_do_not_overlap(n: int) -> None:
    lines = tuple(baseline(f"baseline number {place} with a long name", of(0.6 + place / 1000)) for place in range(n))
    for build in (plots.history, plots.slices):
        figure = built(build(replace(STUDY, baselines=lines)))
        figure.draw_without_rendering()
        notes = [one for axes in figure.axes for one in axes.texts if isinstance(one, Annotation)]
        boxes = [Text.get_window_extent(note) for note in notes if "baseline" in note.get_text()]
        assert len(boxes) == n
        assert all(not one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        frame = figure.bbox
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


# --- studies that are not as one would like --------------------------------------------------------------------------


WORST = (Interval(math.inf, NAN, NAN), Interval(-math.inf, NAN, NAN), Interval(NAN, NAN, NAN))
INTEGERS = (
    Parameter("steps", "int", 100, 400, step=100),
    Parameter("size", "int", 8, 64, log=True),
    Parameter("fixed", "float", 0.5, 0.5),
)
ODD = {
    "nothing": overview(),
    "only baselines": overview(baselines=(baseline("dpo", of(0.5)), baseline("broken"))),
    "one, no time": overview(trial(0, 0.5, ended=START), winners=(0,)),
    "running": overview(trial(0, state="running", ended=None)),
    "failed, parameters unknown": overview(*(trial(n, state="failed", values={}) for n in range(2))),
    "pruned": overview(
        *(trial(n, state="pruned", interim={10: 0.4}) for n in range(6)),
        trial(6, state="pruned"),
        trial(7, state="pruned", interim={10: NAN}),
    ),
    "infinite": overview(
        *(trial(n, objectives=(one,), interim={10: math.inf, 20: 0.5}) for n, one in enumerate(WORST)),
        trial(3, objectives=(Interval(0.5, -math.inf, 0.6),), interim={10: NAN}),
        baselines=(baseline("dpo", WORST[0]), baseline("npo", WORST[2])),
        winners=(0,),
    ),
    "huge": overview(trial(0, 1.7e308), trial(1, -1.7e308), trial(2, 1e99), trial(3, 5e-324)),
    "equal": overview(*(trial(n, 0.5) for n in range(3))),
    "far from zero": overview(*(trial(n, 1e6 + n / 1e4) for n in range(8))),
    "integers": overview(
        *(trial(n, n / 10, values={"steps": 100 + n % 4 * 100, "size": 8 + n, "fixed": 0.5}) for n in range(8)),
        parameters=INTEGERS,
    ),
    "no parameters": overview(trial(0, 0.5, values={}), parameters=()),
    "two, infinite": replace(PLANE, trials=tuple(replace(one, objectives=WORST[:2]) for one in PLANE.trials[:3])),
    "two, none complete": replace(PLANE, trials=PLANE.trials[5:], winners=(), baselines=()),
    "many": overview(*(trial(n, 0.5 + n % 7 / 100, index=2 * n, worker="one") for n in range(40))),
}
WORDS = overview(
    trial(0, 0.5, values={"$x$_{y": True}, worker="$w^"),
    name="a $study$ -- with & <b>",
    parameters=(Parameter("$x$_{y", "choice", choices=(True, None), texts=("true", "a" * 60)),),
    baselines=(baseline("$\\frac{", of(0.5)),),
    objectives=("$kl$.<x>--",),
)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("error")
def test_no_study_is_too_odd(name: str) -> None:
    study = ODD[name]
    expected = {
        "history": name not in ("nothing", "running"),
        "slices": name not in ("nothing", "running", "only baselines", "no parameters"),
        "timeline": name != "nothing",
        "pareto": name == "two, infinite",
    }
    for kind, build in plots.FIGURES.items():
        if kind == "timeline" and name not in ("nothing", "one, no time", "running", "many"):
            continue  # it does not look at values
        figure = build(study)
        if kind in expected:
            assert (figure is not None) == expected[kind], kind
        if figure is None:
            continue
        figure.set_layout_engine("none")  # it would take most of the time
        figure.draw_without_rendering()
        if kind == "history":
            ended = [one for one in study.trials if one.state != "running"]
            for axes in figure.axes:
                assert sum(map(len, points(axes).values())) == len(ended)
                low, high = axes.get_ylim()
                assert all(low <= y <= high for some in points(axes).values() for _, y in some)


@pytest.mark.filterwarnings("error")
def test_a_study_without_trials_leaves_no_file_and_odd_words_can_be_written(tmp_path: Path) -> None:
    assert plots.draw(ODD["nothing"], tmp_path) == []
    files = plots.draw(WORDS, tmp_path)
    assert [path.name for path in files if path.suffix == ".svg"] == ["history.svg", "slices.svg", "timeline.svg"]
    assert "$x$" in (tmp_path / "plots" / "slices.svg").read_text("utf-8")
