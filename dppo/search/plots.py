"""A study in pictures: what was found when and where, at which cost, and against which baselines.

Every figure's function returns None where there is nothing to show. Colours are those of Okabe and Ito, or viridis;
every kind of trial has a marker of its own, so that a copy in grey can be read too.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dppo.artifacts.files import disk_errors, write_atomic
from dppo.evaluation.win_rates import Interval
from dppo.search.overview import BaselineLine, Overview, TrialLine
from dppo.search.plot_axes import (
    LINE,
    Array,
    Scale,
    apply_range,
    as_number,
    bar_labels,
    colour_range,
    halo,
    interpolated,
    is_number,
    plain,
    point_labels,
    position,
    share_of,
    side_labels,
    value_scale,
    values_at,
    whole_numbers,
    wrapped,
)
from dppo.search.settings import Direction
from dppo.search.space import Parameter

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

_DPI = 160
_RC = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "dppo",  # identifiers in the file are random without it
}
_BLUE, _ORANGE, _VERMILION, _GREEN, _SKY, _PURPLE = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#56B4E9", "#CC79A7"
_GREY = "0.45"
_WIDTH = 7.0  # inches: the text of a page


class _Style(NamedTuple):
    marker: str
    colour: str
    size: float
    hatch: str
    filled: bool = True


_STYLES = {
    "complete": _Style("o", _BLUE, 26, ""),
    "infeasible": _Style("x", _GREY, 26, "\\\\\\"),
    "pruned": _Style("o", _ORANGE, 26, "///", filled=False),
    "diverged": _Style("X", _VERMILION, 40, "xxx"),
    "failed": _Style("P", "black", 40, "..."),
    "running": _Style(">", _GREEN, 26, "|||"),
    "best": _Style("*", _BLUE, 150, ""),
}
_BASELINES = (_PURPLE, _GREEN, _SKY, "black")
_DASHES: tuple[tuple[float, ...], ...] = ((5, 2), (1, 1.5), (6, 1.5, 1, 1.5))
_LABELS = {
    "objective": "win rate",
    "win_rate.value": "win rate",
    "win_rate.ci_low": "win rate, lower 95 % bound",
    "win_rate.strict": "win rate, ties lost",
    "held_out.accuracy": "held-out accuracy",
    "kl.nats_per_token": "KL to SFT (nats per token)",
    "kl.nats_per_answer": "KL to SFT (nats per answer)",
    "length.policy.tokens": "answer length (tokens)",
}
_COUNTS = ("win_rate.n", "win_rate.wins", "win_rate.ties")


def draw(overview: Overview, directory: Path) -> list[Path]:
    """Write every figure that has something to show to ``directory/plots`` as PNG and SVG; returns the files.

    The same overview gives the same bytes. Raises UserError if the directory is not writable.
    """
    from matplotlib import style

    folder = directory / "plots"
    found = []
    with disk_errors(folder), style.context(["default", _RC]):
        folder.mkdir(parents=True, exist_ok=True)
        for name, build in FIGURES.items():
            figure = build(overview)
            if figure is None:
                continue
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                data = io.BytesIO()
                figure.savefig(data, format=kind, dpi=_DPI, metadata=metadata)
                figure.set_layout_engine(None)  # laid out once, for both; with any engine it would be drawn twice
                path = folder / f"{name}.{kind}"
                write_atomic(path, data.getvalue())
                found.append(path)
    return found


# --- the figures -----------------------------------------------------------------------------------------------------


def history(overview: Overview) -> Figure | None:
    """Every objective against the order of the trials, with the best so far and the baselines."""
    panels = [_marks(overview, place) for place in range(len(overview.objectives))]
    if not any(panels) and all(one.objectives is None for one in overview.baselines):
        return None
    height = max(2.7, LINE * 1.6 * len(overview.baselines))
    figure = _figure(overview, _WIDTH, height * len(panels) + 0.9)
    rows = figure.subplots(len(panels), 1, squeeze=False, sharex=True)
    for place, (axes, marks) in enumerate(zip(rows[:, 0], panels, strict=True)):
        scale = _scale(overview, place, marks)
        scale.apply(axes)
        axes.set_ylabel(_objective_label(overview, place))
        _draw_baselines(axes, overview.baselines, place, scale, height)
        _draw_marks(axes, marks, scale, [mark.trial.index for mark in marks])
        best = _best_so_far(marks, overview.directions[place])
        if best:
            last = max(trial.index for trial in overview.trials)
            order, values = zip(*best, (last, best[-1][1]), strict=True)
            axes.plot(order, values, color=_BLUE, linewidth=1.4, drawstyle="steps-post", label="best so far", zorder=2)
    rows[-1, 0].set_xlabel("trial, in the order of the search")
    whole_numbers(rows[-1, 0], [trial.index for trial in overview.trials])
    _legend(figure, overview, panels, lines=[("best so far", _BLUE)])
    return figure


def slices(overview: Overview) -> Figure | None:
    """Every objective against every parameter; the limits of an axis are the ends of the parameter's range.

    A trial without a parameter is not in its panel.
    """
    from matplotlib.cm import ScalarMappable

    panels = [_marks(overview, place) for place in range(len(overview.objectives))]
    if not overview.parameters or not any(panels):
        return None
    columns = 2 if len(overview.parameters) == 4 else min(3, len(overview.parameters))
    deep = math.ceil(len(overview.parameters) / columns)
    height = max(2.5, LINE * 1.6 * len(overview.baselines))
    figure = _figure(overview, 2.3 * columns + 1.9, height * deep * len(panels) + 0.9)
    grid = figure.subplots(deep * len(panels), columns, squeeze=False)
    # The pale end of the map could not be seen on white.
    colours, norm = _truncated_viridis(), colour_range([trial.index for trial in overview.trials])
    order = sorted(trial.index for trial in overview.trials)
    spread = {index: place / max(1, len(order) - 1) for place, index in enumerate(order)}
    for place, marks in enumerate(panels):
        scale = _scale(overview, place, marks)
        cells = grid[place * deep : (place + 1) * deep].ravel()
        for cell, axes in enumerate(cells):
            if cell >= len(overview.parameters):
                axes.remove()
                continue
            parameter = overview.parameters[cell]
            present = [mark for mark in marks if parameter.name in mark.trial.values]
            scale.apply(axes)
            apply_range(axes, "x", parameter)
            _draw_baselines(axes, overview.baselines, place, scale, height, labelled=cell % columns == columns - 1)
            _draw_marks(
                axes,
                present,
                scale,
                [position(parameter, mark.trial.values[parameter.name], spread[mark.trial.index]) for mark in present],
                [colours(norm(mark.trial.index)) for mark in present],
            )
            if cell % columns == 0:
                axes.set_ylabel(_objective_label(overview, place))
            else:
                axes.tick_params(labelleft=False)
    bar = figure.colorbar(
        ScalarMappable(norm, colours), ax=figure.axes, label="trial, in the order of the search", aspect=30
    )
    whole_numbers(bar.ax, [trial.index for trial in overview.trials], "y")
    bar.ax.minorticks_off()
    _legend(figure, overview, panels, neutral=True)
    return figure


def contour(overview: Overview) -> Figure | None:
    """Every objective over two numeric parameters: alpha and zeta, else the first two; None without two.

    Linear interpolation between the complete trials (in the logarithm where the parameter's scale is one), if there are
    six of them that do not lie on a line.
    """
    from matplotlib.cm import ScalarMappable

    pair = _numeric_pair(overview.parameters)
    panels = [
        [mark for mark in _marks(overview, place) if pair and all(one.name in mark.trial.values for one in pair)]
        for place in range(len(overview.objectives))
    ]
    if pair is None or not any(panels):
        return None
    figure = _figure(overview, 0.6 + 4.6 * len(panels), 4.2)
    for place, (axes, marks) in enumerate(zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True)):
        for which, parameter in zip("xy", pair, strict=True):
            apply_range(axes, "x" if which == "x" else "y", parameter)
        measured = [mark for mark in marks if mark.measured and math.isfinite(mark.value.value)]
        colours, norm = _viridis(), colour_range([mark.value.value for mark in measured])
        if (filled := _interpolated(measured, pair)) is not None:
            axes.tricontourf(*filled, levels=np.linspace(norm.vmin, norm.vmax, 13), cmap=colours, norm=norm, zorder=1)
        for kind in _kinds(marks):
            style, some = _STYLES[kind], [mark for mark in marks if mark.kind == kind]
            x, y = ([as_number(mark.trial.values[one.name]) for mark in some] for one in pair)
            inside: Any = "white" if not style.filled else style.colour
            if kind in ("complete", "best"):
                inside = [
                    colours(norm(mark.value.value)) if math.isfinite(mark.value.value) else "0.7" for mark in some
                ]
            points = axes.scatter(
                x, y, s=style.size * 1.2, marker=style.marker, c=inside, linewidths=0.9, label=kind, zorder=_order(kind)
            )
            if style.marker == "x":
                points.set_path_effects(halo())
            else:
                points.set_edgecolor("black" if kind in ("best", "complete", "pruned") else "white")
        if measured:
            figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=_objective_label(overview, place))
        else:
            axes.set_title(f"{_objective_label(overview, place)}: no value yet")
    _legend(figure, overview, panels, neutral=True, intervals=False)
    return figure


def interim(overview: Overview) -> Figure | None:
    """What was measured during training against the percent of it; None if nothing was.

    A complete trial ends at 100 % with its first objective if that is the same quantity.
    """
    from matplotlib.lines import Line2D

    if not any(is_number(value) for trial in overview.trials for value in trial.interim.values()):
        return None
    figure = _figure(overview, _WIDTH, 3.9)
    axes = figure.subplots()
    ends = {"pruned": "x", "diverged": "X", "failed": "P", "running": ">"}
    seen: set[str] = set()
    labels = []
    for trial in sorted(overview.trials, key=lambda one: one.index):
        path = {percent: value for percent, value in sorted(trial.interim.items()) if is_number(value)}
        final = trial.objectives[0].value if trial.state == "complete" and trial.objectives else math.nan
        if _comparable(overview, 0) and is_number(final):
            path[100] = final
        if not path:
            continue
        kind = "best" if trial.number in overview.winners else trial.state
        colour, strong = _STYLES[kind].colour, kind == "best"
        axes.plot(
            list(path),
            list(path.values()),
            color=colour,
            linewidth=2.4 if strong else 1.0,
            alpha=1.0 if strong or kind != "complete" else 0.5,
            linestyle=(0, (4, 1.5)) if kind == "pruned" else "-",
            zorder=4 if strong else 2,
            label=f"trial {trial.number}",
        )
        last = max(path)
        marker = ends.get(kind, _STYLES[kind].marker)
        axes.scatter([last], [path[last]], s=40 if not strong else 150, marker=marker, c=[colour], zorder=5, label=kind)
        seen.add(kind)
        if strong:
            labels.append((path[last], f"trial {trial.number}", colour))
    ends_with = "; at 100: the result" if _comparable(overview, 0) else ""
    axes.set(xlabel=f"training of the first seed (% of its steps{ends_with})", xlim=(0, 102))
    axes.set_ylabel(plain(overview.interim_metric))
    side_labels(axes, labels, 2.9)
    handles: list[Artist] = [
        Line2D(
            [],
            [],
            color=_STYLES[kind].colour,
            marker=ends.get(kind, _STYLES[kind].marker),
            markersize=11 if kind == "best" else 6,
            linestyle=(0, (4, 1.5)) if kind == "pruned" else "-",
            label=_kind_label(overview, kind),
        )
        for kind in _STYLES
        if kind in seen
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    return figure


def timeline(overview: Overview) -> Figure | None:
    """When each worker ran which trial; a running one lasts until the latest time known. None without trials."""
    from matplotlib.patches import Patch

    if not overview.trials:
        return None
    trials = sorted(overview.trials, key=lambda one: one.begun)
    first = trials[0].begun
    latest = max(moment for trial in trials for moment in (trial.begun, trial.ended) if moment is not None)
    span = (latest - first).total_seconds() / 60 or 1.0
    workers = list(dict.fromkeys(trial.worker for trial in trials))
    figure = _figure(overview, _WIDTH, 0.5 * len(workers) + 1.5)
    axes = figure.subplots()
    bars = []
    for trial in trials:
        begun = (trial.begun - first).total_seconds() / 60
        length = ((trial.ended or latest) - trial.begun).total_seconds() / 60
        style, won = _STYLES[trial.state], trial.number in overview.winners
        # A trial of no length is still seen.
        (bar,) = axes.barh(
            workers.index(trial.worker),
            max(length, span / 300),
            left=begun,
            height=0.62,
            color=style.colour,
            alpha=0.75,
            edgecolor="white",
            hatch=style.hatch,
            linewidth=0.8,
            label=trial.state,
        )
        bars.append((bar, f"{trial.number}{'*' if won else ''}"))
    axes.set(xlabel="minutes since the first trial began", xlim=(0, span * 1.01), ylim=(len(workers) - 0.5, -0.5))
    axes.set_yticks(range(len(workers)), [wrapped(worker, 20) for worker in workers])
    axes.set_ylabel("worker")
    handles: list[Artist] = [
        Patch(facecolor=_STYLES[kind].colour, alpha=0.75, edgecolor="white", hatch=_STYLES[kind].hatch, label=kind)
        for kind in _STYLES
        if any(trial.state == kind for trial in trials)
    ]
    if any(trial.number in overview.winners for trial in trials):
        handles.append(Patch(facecolor="none", edgecolor="none", label=f"* {_kind_label(overview, 'best')}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    bar_labels(figure, axes, bars)
    return figure


def pareto(overview: Overview) -> Figure | None:
    """The second objective against the first: the front, what it dominates, and the baselines; None for one."""
    from matplotlib.lines import Line2D

    if len(overview.objectives) < 2:
        return None
    found = [
        (kind, trial.number, trial.objectives[:2])
        for trial in overview.trials
        if (kind := _kind(overview, trial)) in ("complete", "infeasible", "best") and trial.objectives
    ]
    shown = [one for one in found if all(is_number(value.value) for value in one[2])]
    baselines = [
        (place, one.name, one.objectives[:2])
        for place, one in enumerate(overview.baselines)
        if one.objectives and all(is_number(value.value) for value in one.objectives[:2])
    ]
    if not shown and not baselines:
        return None
    figure = _figure(overview, 5.6, 4.6)
    axes = figure.subplots()
    axes.set(xlabel=_objective_label(overview, 0), ylabel=_objective_label(overview, 1))
    if len(shown) < len(found):
        axes.set_title(f"{len(found) - len(shown)} without finite values not shown", fontsize=8, loc="right")
    labels = []
    for kind in ("complete", "infeasible", "best"):
        some = [(number, x, y) for other, number, (x, y) in shown if other == kind]
        if not some:
            continue
        style, faint = _STYLES[kind], kind == "complete"
        axes.scatter(
            [x.value for _, x, _ in some],
            [y.value for _, _, y in some],
            s=style.size,
            marker=style.marker,
            c="0.7" if faint else style.colour,
            linewidths=0.8,
            label=kind,
            zorder=_order(kind),
        )
        if kind == "best":
            _crosses(axes, [(x, y) for _, x, y in some], style.colour)
            _connect(axes, [(x.value, y.value) for _, x, y in some], overview.directions)
            labels += [(x.value, y.value, str(number)) for number, x, y in some]
    for place, name, (x, y) in baselines:
        colour = _BASELINES[place % len(_BASELINES)]
        _crosses(axes, [(x, y)], colour)
        axes.scatter([x.value], [y.value], s=42, marker="sDv^"[place % 4], c=colour, zorder=6, label=f"baseline {name}")
        labels.append((x.value, y.value, wrapped(name, 24)))
    axes.margins(0.08)
    names = {"complete": "dominated", "infeasible": "infeasible", "best": _kind_label(overview, "best")}
    handles: list[Artist] = [
        Line2D(
            [],
            [],
            linestyle="-" if kind == "best" else "none",
            color="0.7" if kind == "complete" else _STYLES[kind].colour,
            marker=_STYLES[kind].marker,
            markersize=11 if kind == "best" else 6,
            label=name,
        )
        for kind, name in names.items()
        if any(kind == other for other, _, _ in shown)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    point_labels(figure, axes, labels)
    return figure


FIGURES: dict[str, Callable[[Overview], Figure | None]] = {
    "history": history,
    "slices": slices,
    "contour": contour,
    "interim": interim,
    "timeline": timeline,
    "pareto": pareto,
}


# --- trials as marks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mark:
    """A trial in a panel; what has no finite ``value`` is drawn in the band of those without one."""

    trial: TrialLine
    kind: str
    value: Interval

    @property
    def measured(self) -> bool:
        return self.kind in ("complete", "infeasible", "best")


def _kind(overview: Overview, trial: TrialLine) -> str:
    if trial.number in overview.winners:
        return "best"
    return "infeasible" if trial.state == "complete" and not trial.feasible else trial.state


def _marks(overview: Overview, place: int) -> list[_Mark]:
    """The trials that ended, in order, with their objective at ``place``; a pruned one with its last interim value."""
    found = []
    for trial in sorted(overview.trials, key=lambda one: one.index):
        value = Interval(math.nan, math.nan, math.nan)
        if trial.state == "running":
            continue
        if trial.state == "complete" and trial.objectives is not None:
            value = trial.objectives[place]
        elif trial.state == "pruned" and trial.interim and _comparable(overview, place):
            value = Interval(trial.interim[max(trial.interim)], math.nan, math.nan)
        if not is_number(value.value):
            value = Interval(math.nan, math.nan, math.nan)
        found.append(_Mark(trial, _kind(overview, trial), value))
    return found


def _comparable(overview: Overview, place: int) -> bool:
    """Whether the objective at ``place`` is the quantity that was measured during training."""
    path = overview.objectives[place]
    if "accuracy" in overview.interim_metric:
        return path.startswith("held_out.accuracy")
    return path == "objective" or (path.startswith("win_rate") and path not in _COUNTS)


def _kinds(marks: Iterable[_Mark]) -> list[str]:
    present = {mark.kind for mark in marks}
    return [kind for kind in _STYLES if kind in present]


def _order(kind: str) -> int:
    """What is drawn above what."""
    return 3 + list(_STYLES).index(kind)


def _scale(overview: Overview, place: int, marks: Iterable[_Mark]) -> Scale:
    """An axis with the objective at ``place`` of all trials and baselines."""
    known = [one.objectives[place] for one in overview.baselines if one.objectives is not None]
    return value_scale([*known, *(mark.value for mark in marks)], overview.directions[place])


def _best_so_far(marks: Sequence[_Mark], direction: Direction) -> list[tuple[int, float]]:
    """(index, value) of every trial that was better than all before it, of the feasible ones."""
    sign = 1 if direction == "maximize" else -1
    found: list[tuple[int, float]] = []
    for mark in marks:
        counts = mark.measured and mark.trial.feasible and math.isfinite(mark.value.value)
        if counts and (not found or sign * mark.value.value > sign * found[-1][1]):
            found.append((mark.trial.index, mark.value.value))
    return found


def _viridis() -> Colormap:
    from matplotlib import colormaps

    return colormaps["viridis"]


def _truncated_viridis() -> Colormap:
    from matplotlib.colors import ListedColormap

    return ListedColormap(_viridis()(np.linspace(0, 0.88, 256)))


# --- what is drawn ---------------------------------------------------------------------------------------------------


def _figure(overview: Overview, width: float, height: float) -> Figure:
    """An empty figure of ``width`` x ``height`` inches with the study's name and the number of its trials."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    states = Counter(trial.state for trial in overview.trials)
    n = len(overview.trials)
    counts = [f"{n} trial{'' if n == 1 else 's'}", *(f"{states[kind]} {kind}" for kind in _STYLES if states[kind])]
    figure.suptitle(f"{wrapped(overview.name, 60)}: {', '.join(counts)}")
    return figure


def _draw_marks(
    axes: Axes,
    marks: Sequence[_Mark],
    scale: Scale,
    positions: Sequence[float],
    colours: Sequence[Any] | None = None,
) -> None:
    """Points with their intervals; ``colours`` are instead of those of the kinds that have a result."""
    for kind in _kinds(marks):
        style, some = _STYLES[kind], [place for place, mark in enumerate(marks) if mark.kind == kind]
        own = colours if kind in ("complete", "pruned", "best") else None
        shades = [own[place] if own else style.colour for place in some]
        points = axes.scatter(
            [positions[place] for place in some],
            [scale.at(marks[place].value.value) for place in some],
            s=style.size,
            marker=style.marker,
            c=shades,
            linewidths=1.2 if style.marker == "x" or not style.filled else 0.6,
            label=kind,
            zorder=_order(kind),
        )
        if not style.filled:
            points.set_facecolor("none")
            points.set_edgecolor(shades)
        elif style.marker != "x":
            points.set_edgecolor("black" if kind == "best" else "white")
        for place, shade in zip(some, shades, strict=True):
            low, high = marks[place].value.low, marks[place].value.high
            if is_number(low) and is_number(high):
                axes.vlines(positions[place], low, high, colors=[shade], linewidth=0.9, alpha=0.8)


def _draw_baselines(
    axes: Axes,
    baselines: Sequence[BaselineLine],
    place: int,
    scale: Scale,
    height: float,
    *,
    labelled: bool = True,
) -> None:
    """Horizontal lines with their intervals, named at the right of a panel ``height`` inches high."""
    labels = []
    for number, baseline in enumerate(baselines):
        if baseline.objectives is None:
            continue
        found, colour = baseline.objectives[place], _BASELINES[number % len(_BASELINES)]
        value = found.value if is_number(found.value) else math.nan
        labels.append((scale.at(value), baseline.name, colour))
        if math.isnan(value):
            continue
        dashes = (0, _DASHES[number % len(_DASHES)])
        axes.axhline(value, color=colour, linestyle=dashes, linewidth=1.2, zorder=1.5, label=baseline.name)
        if is_number(found.low) and is_number(found.high):
            axes.axhspan(found.low, found.high, color=colour, alpha=0.12, linewidth=0, zorder=0.5)
    if labelled:
        side_labels(axes, labels, height)


def _legend(
    figure: Figure,
    overview: Overview,
    panels: Sequence[Sequence[_Mark]],
    *,
    lines: Sequence[tuple[str, str]] = (),
    neutral: bool = False,
    intervals: bool = True,
) -> None:
    """What the marks of the panels mean; ``neutral`` where their colour says something else."""
    from matplotlib.lines import Line2D

    marks = [mark for panel in panels for mark in panel]
    handles: list[Artist] = []
    for kind in _kinds(marks):
        style = _STYLES[kind]
        colour = "0.35" if neutral and kind in ("complete", "best", "pruned") else style.colour
        label = _kind_label(overview, kind)
        if any(mark.kind == "pruned" == kind and not math.isnan(mark.value.value) for mark in marks) and intervals:
            label = f"pruned (last interim {plain(overview.interim_metric)})"
        handles.append(
            Line2D(
                [],
                [],
                linestyle="none",
                marker=style.marker,
                color=colour,
                markerfacecolor=colour if style.filled else "none",
                markersize=11 if kind == "best" else 6,
                label=label,
            )
        )
    if any(mark.measured for mark in marks):
        handles += [Line2D([], [], color=colour, label=name) for name, colour in lines]
    if intervals and any(is_number(mark.value.low) for mark in marks):
        colour = "0.35" if neutral else _BLUE
        handles.append(Line2D([], [], linestyle="none", marker="|", markersize=10, color=colour, label="95 % interval"))
    if handles:
        columns = max(2, int(figure.get_figwidth() / 1.7))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _numeric_pair(parameters: Sequence[Parameter]) -> tuple[Parameter, Parameter] | None:
    numeric = {one.name: one for one in parameters if one.kind != "choice"}
    if {"alpha", "zeta"} <= numeric.keys():
        return numeric["alpha"], numeric["zeta"]
    first = list(numeric.values())[:2]
    return (first[0], first[1]) if len(first) == 2 else None


def _interpolated(marks: Sequence[_Mark], pair: tuple[Parameter, Parameter]) -> tuple[Any, Array] | None:
    """A fine triangulation and its (N,) values for tricontourf; None if the trials are too few, on a line or equal."""
    from matplotlib.tri import Triangulation

    where = [[share_of(one, mark.trial.values[one.name]) for one in pair] for mark in marks]
    found = interpolated(where, [mark.value.value for mark in marks])
    if found is None:
        return None
    shares, triangles, heights = found
    x, y = (values_at(one, shares[:, which]) for which, one in enumerate(pair))
    return Triangulation(x, y, triangles), heights


def _crosses(axes: Axes, points: Sequence[tuple[Interval, Interval]], colour: str) -> None:
    """The intervals of points in a plane, where they are known."""
    for x, y in points:
        if is_number(y.low) and is_number(y.high):
            axes.vlines(x.value, y.low, y.high, colors=[colour], linewidth=0.8, alpha=0.5, zorder=2)
        if is_number(x.low) and is_number(x.high):
            axes.hlines(y.value, x.low, x.high, colors=[colour], linewidth=0.8, alpha=0.5, zorder=2)


def _connect(axes: Axes, points: Sequence[tuple[float, float]], directions: Sequence[Direction]) -> None:
    """The border of what the points dominate in this plane, as a staircase."""
    signs = [1 if direction == "maximize" else -1 for direction in directions[:2]]
    front = sorted(
        {
            (x, y)
            for x, y in points
            if not any(
                (a, b) != (x, y) and signs[0] * a >= signs[0] * x and signs[1] * b >= signs[1] * y for a, b in points
            )
        }
    )
    axes.plot(
        [x for x, _ in front],
        [y for _, y in front],
        drawstyle="steps-pre" if signs[0] == 1 else "steps-post",
        color=_BLUE,
        linewidth=1.2,
        label="front",
        zorder=4,
    )


# --- words -----------------------------------------------------------------------------------------------------------


def _objective_label(overview: Overview, place: int) -> str:
    """What an objective is called, with an arrow to its better end."""
    path = overview.objectives[place]
    arrow = "\N{UPWARDS ARROW}" if overview.directions[place] == "maximize" else "\N{DOWNWARDS ARROW}"
    return f"{wrapped(_LABELS.get(path, path), 34)} {arrow}"


def _kind_label(overview: Overview, kind: str) -> str:
    if kind != "best":
        return kind
    return "Pareto front" if len(overview.objectives) > 1 else "best trial"
