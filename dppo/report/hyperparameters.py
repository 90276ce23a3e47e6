"""Hyperparameter search: the metric against the searched numbers, one line a penalty, the best marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dppo.report.drawing import (
    INK,
    MUTED,
    colour,
    dashes,
    grid,
    legend,
    marker,
    new_figure,
    point,
    reference_line,
    short,
    tip,
)
from dppo.report.evidence import Entry, Group, preset, sentence, shown, words_without
from dppo.report.panel import Panel
from dppo.report.table import Cell, Column, Table
from dppo.results import command_line
from dppo.search.plot_axes import interpolated

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Root values come first: alpha is what the method is about.
_FIRST = ("alpha", "zeta", "beta", "train.learning_rate")
# How many pairs are trained on is the subject of another part.
_NOT_SEARCHED = ("train.n_examples", "dataset.n_pairs", "dataset.n_chats")
_FEWEST, _MOST_LINES, _MOST_LEVELS = 3, 8, 3
_DECADE = 10.0


@dataclass(frozen=True)
class Search:
    """``numbers`` are the searched keys with a number, the first on the x axis; ``lines`` by name, each in its order.

    ``levels`` are drawn across the panel: configurations without such a value, or with 0 on a logarithmic axis.
    """

    numbers: tuple[str, ...]
    log: Mapping[str, bool]
    lines: Mapping[str, tuple[Entry, ...]]
    levels: tuple[Entry, ...]
    best: Entry
    end: str | None  # lower or upper, if the best lies at that end of what was tried

    def x(self, entry: Entry) -> float:
        return number(entry, self.numbers[0])


def number(entry: Entry, key: str) -> float:
    """The value of a setting; NaN for what is no number."""
    found = entry.flat.get(key)
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else math.nan


def find(group: Group) -> Search | None:
    """What was searched in a group; None if no number was given three values."""
    values = {
        key: {value for entry in group.entries if not math.isnan(value := number(entry, key))}
        for key in group.varying
        if key not in _NOT_SEARCHED and not key.startswith("phases.")
    }
    several = [key for key in values if len(values[key]) >= _FEWEST]
    # A root value reaches the losses under their own keys too.
    roots = [key for key in _FIRST if key in several]
    several = roots + [key for key in several if key not in roots and key.rpartition(".")[2] not in roots]
    if not several:
        return None
    key = several[0]
    log = {one: _is_log(values[one]) for one in several}
    inside = [
        entry
        for entry in group.entries
        if not math.isnan(x := number(entry, key)) and not (log[key] and x <= 0) and entry.measured
    ]
    if len({number(entry, key) for entry in inside}) < _FEWEST:
        return None
    lines: dict[str, list[Entry]] = {}
    for entry in inside:
        lines.setdefault(_line_name(entry, several), []).append(entry)
    best = inside[0]  # entries come best first
    tried = [number(entry, key) for entry in inside]
    levels = _levels(group, inside, key)
    beyond = any(number(level, key) == 0 for level in levels)  # below the least positive value
    x = number(best, key)
    end = "upper" if x == max(tried) else "lower" if x == min(tried) and not beyond else None
    return Search(
        tuple(several),
        log,
        {name: tuple(sorted(found, key=lambda one: number(one, key))) for name, found in lines.items()},
        levels,
        best,
        end,
    )


def _levels(group: Group, inside: Sequence[Entry], key: str) -> tuple[Entry, ...]:
    """What the lines are compared with: 0, the baseline, SFT, and the best of the rest."""
    rest = [entry for entry in group.entries if entry not in inside and entry.measured and not entry.is_sft]
    wanted = [entry for entry in rest if number(entry, key) == 0] + [entry for entry in rest if entry is group.baseline]
    return tuple(dict.fromkeys([*wanted, *rest[:1]]))[:_MOST_LEVELS]


def _is_log(values: set[float]) -> bool:
    positive = [value for value in values if value > 0]
    return min(values) >= 0 and len(positive) >= _FEWEST and max(positive) / min(positive) >= _DECADE


def _line_name(entry: Entry, numbers: Sequence[str]) -> str:
    """What tells an entry from the others beside the searched numbers."""
    return " ".join(words_without(entry.label.split(), *numbers)) or entry.method


def panel(group: Group) -> Panel:
    found = find(group)
    if found is None:
        return Panel(
            "hyperparameter_search",
            "Hyperparameter search",
            missing="no number was given three values in runs that can be compared",
            command="python -m dppo -m +sweep=alpha_grid",
        )
    key, best = found.numbers[0], found.best
    n = sum(len(line) for line in found.lines.values())
    lead = (
        f"{sentence(group.name)} of {n} configurations against {key} on {group.title}. Best: {short(best.label, 80)} "
        f"with {shown(best.value)}, chosen on these prompts."
    )
    if found.end:
        lead += f" It lies at the {found.end} end of the values tried: the best may lie beyond."
    table = Table(
        "hyperparameter_search",
        "Hyperparameter search",
        (
            Column("configuration", code=True), *(Column(name, digits=-1) for name in found.numbers), Column("seeds"),
            Column("n"), Column(group.metric), Column("difference", sign=True), Column("best"),
        ),
        tuple(
            (entry.label, *_numbers(entry, found.numbers), len(entry.line.seeds), entry.line.n, entry.value,
             entry.line.difference, "best" if entry is best else "")
            for line in found.lines.values() for entry in line
        ),
        f"95 % intervals over seeds and prompts; differences are to {group.baseline.label}, paired and simultaneous.",
    )  # fmt: skip
    return Panel(
        "hyperparameter_search",
        "Hyperparameter search",
        lead,
        lambda width: _draw(group, found, width),
        f"{group.metric} against {key}: "
        + "; ".join(
            f"{name}: {', '.join(f'{found.x(one):g} gives {one.value.value:.3f}' for one in line)}"
            for name, line in found.lines.items()
        ),
        (table,),
        *_further(found),
    )


def _numbers(entry: Entry, names: Sequence[str]) -> list[Cell]:
    return [None if math.isnan(value) else value for value in (number(entry, name) for name in names)]


def _further(found: Search) -> tuple[str, str]:
    if found.end is None:
        return "", ""
    key = found.numbers[0]
    x = found.x(found.best)
    step = 10.0 if found.log[key] else 1.5
    values = sorted([x / step**2, x / step] if found.end == "lower" else [x * step, x * step**2])
    words = words_without(found.best.run.words, key, "seed", "evaluation.interim.n_points")
    if name := preset(words):
        # A preset's own search would begin again with its own range.
        inside = f"interval({values[0]:.3g},{max(values[1], x):.3g})"
        words += [f"{key}=tag(log, {inside})" if found.log[key] else f"{key}={inside}"]
        return "values beyond that end", command_line([*words, f"hydra.sweeper.study_name={name}_beyond", "-m"])
    told = ",".join(f"{value:.3g}" for value in values)
    return "values beyond that end", command_line([*words, f"{key}={told}", "seed=0,1,2", "-m"])


def _draw(group: Group, found: Search, width: float) -> Figure:
    pair = _pair(found)
    flat = pair is None
    wide = width > 5
    figure = new_figure(width, 3.6 if flat else 3.6 if wide else 6.2)
    grids = figure.subplots(1 if flat or wide else 2, 2 if not flat and wide else 1, squeeze=False).ravel()
    handles, texts = _lines(grids[0], group, found, wide=flat or not wide)
    if pair is not None:
        _surface(figure, grids[1], group, found, pair)
    legend(figure, handles, texts)
    return figure


def _lines(axes: Axes, group: Group, found: Search, *, wide: bool) -> tuple[list[Line2D], list[str]]:
    from matplotlib.lines import Line2D

    grid(axes)
    key = found.numbers[0]
    if found.log[key]:
        axes.set_xscale("log")
    by_value = sorted(found.lines.items(), key=lambda item: -max(one.value.value for one in item[1]))
    shown_lines = dict(by_value[:_MOST_LINES])
    handles, texts = [], []
    for place, (name, line) in enumerate(shown_lines.items()):
        xs = [found.x(one) for one in line]
        # Where other numbers vary too, neighbours in this one need not have to do with each other.
        if len(found.numbers) == 1 and len(set(xs)) == len(xs):
            axes.plot(
                xs, [one.value.value for one in line], color=colour(place), linestyle=dashes(place), linewidth=1.3
            )
        for one in line:
            best = one is found.best
            point(axes, found.x(one), one.value, place, one.told() + (" (best)" if best else ""), best=best)
        handles.append(
            Line2D([], [], color=colour(place), marker=marker(place), linestyle=dashes(place), markeredgecolor="white")
        )
        texts.append(name)
    handles.append(Line2D([], [], color=MUTED, marker="*", linestyle="none", markersize=11))
    texts.append("best")
    for place, level in enumerate(found.levels):
        reference_line(axes, level.value, level.told(), place)
        handles.append(axes.lines[-1])
        texts.append(level.label)
    if group.metric == "win_rate":
        axes.axhline(0.5, color=MUTED, linewidth=0.8, zorder=1)
        low, high = axes.get_ylim()
        if low <= 0.5 <= high:
            axes.annotate("SFT", (1.0, 0.5), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
                          ha="right", va="bottom", color=MUTED, fontsize=8)  # fmt: skip
    axes.set_xlabel(short(key, 40))
    axes.set_ylabel(group.name if wide else group.metric.replace("_", " "))
    return handles, texts


def _pair(found: Search) -> tuple[str, str] | None:
    """The two numbers of a surface, if enough configurations have both."""
    if len(found.numbers) < 2:
        return None
    pair = found.numbers[0], found.numbers[1]
    return pair if len({tuple(number(one, key) for key in pair) for one in _with_both(found, pair)}) >= 6 else None


def _with_both(found: Search, pair: tuple[str, str]) -> list[Entry]:
    """The configurations that have a place on both axes."""
    return [
        one
        for line in found.lines.values()
        for one in line
        if not any(math.isnan(number(one, key)) or (found.log[key] and number(one, key) <= 0) for key in pair)
    ]


def _surface(figure: Figure, axes: Axes, group: Group, found: Search, pair: tuple[str, str]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.tri import Triangulation

    entries = _with_both(found, pair)
    xs, ys = ([number(one, key) for one in entries] for key in pair)
    values = [one.value.value for one in entries]
    norm, colours = Normalize(min(values), max(values) if max(values) > min(values) else min(values) + 1), "viridis"
    logs = (found.log[pair[0]], found.log[pair[1]])
    if logs[0]:
        axes.set_xscale("log")
    if logs[1]:
        axes.set_yscale("log")
    units = [np.log(values) if log else np.asarray(values) for values, log in zip((xs, ys), logs, strict=True)]
    low, span = [one.min() for one in units], [float(np.ptp(one)) or 1.0 for one in units]
    where = np.stack([(one - low[at]) / span[at] for at, one in enumerate(units)], axis=1)
    if (filled := interpolated(where.tolist(), values)) is not None:
        shares, triangles, heights = filled
        back = [shares[:, at] * span[at] + low[at] for at in range(2)]
        x, y = (np.exp(one) if log else one for one, log in zip(back, logs, strict=True))
        axes.tricontourf(Triangulation(x, y, triangles), heights, levels=12, cmap=colours, norm=norm)
    shades = colormaps[colours]
    for one, x, y, value in zip(entries, xs, ys, values, strict=True):
        best = one is found.best
        (dot,) = axes.plot(
            [x], [y], marker="*" if best else "o", markersize=14 if best else 6, color=shades(norm(value)),
            markeredgecolor="white" if best else INK, markeredgewidth=1.2 if best else 0.7, zorder=5 if best else 4,
        )  # fmt: skip
        tip(dot, one.told() + (" (best)" if best else ""))
    axes.set(xlabel=short(pair[0], 40), ylabel=short(pair[1], 40))
    figure.colorbar(ScalarMappable(norm, colours), ax=axes, label=group.metric.replace("_", " "))
