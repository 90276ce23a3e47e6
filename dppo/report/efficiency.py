"""Data efficiency: the metric against the number of training pairs, one line a method, bands over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dppo.report.drawing import MUTED, colour, dashes, grid, legend, marker, new_figure, short, tip
from dppo.report.evidence import Entry, Group, phases, sentence, words_without
from dppo.report.panel import Panel
from dppo.report.table import Column, Table
from dppo.results import command_line
from dppo.search.plot_axes import is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_LINES = 8
_SIZES = ("train.n_examples", "dataset.n_pairs")


def n_pairs(entry: Entry) -> int | None:
    """How many examples the preference phases trained on, together; None where nothing says it."""
    counts = []
    for name, _, phase in phases(entry.settings):
        trained = entry.run.result.get("training", {}).get(name, {})
        count = trained.get("n_examples") or (phase.get("train") or {}).get("n_examples") or _all_pairs(entry.settings)
        if count is None:
            return None
        counts.append(int(count))
    return sum(counts) if counts else None


def _all_pairs(settings: Mapping[str, Any]) -> int | None:
    found = (settings.get("dataset") or {}).get("n_pairs")
    return int(found) if found is not None else None


def find(group: Group) -> dict[str, list[tuple[int, Entry]]]:
    """(number of pairs, entry) of every line, each in this order; only lines with several numbers."""
    lines: dict[str, list[tuple[int, Entry]]] = {}
    for entry in group.entries:
        if entry.measured and (count := n_pairs(entry)) is not None:
            words = words_without(entry.label.split(), *_SIZES)
            lines.setdefault(" ".join(words) or entry.method, []).append((count, entry))
    for points in lines.values():
        points.sort(key=lambda point: point[0])
    kept = {name: points for name, points in lines.items() if len({count for count, _ in points}) > 1}
    return dict(sorted(kept.items(), key=lambda item: -item[1][-1][1].value.value))


def panel(group: Group) -> Panel:
    lines = find(group)
    if not lines:
        return Panel(
            "data_efficiency",
            "Data efficiency",
            missing="all of these runs trained on equally many pairs",
            command="python -m dppo -m +sweep=data_efficiency",
        )
    seeds = sorted({len(entry.line.seeds) for points in lines.values() for _, entry in points})
    told = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    one = "1 seed a point: the bands cover prompts only" if seeds == [1] else f"{told} seeds a point"
    table = Table(
        "data_efficiency",
        "Data efficiency",
        (Column("line", code=True), Column("training pairs"), Column("seeds"), Column("n"), Column(group.metric)),
        tuple(
            (name, count, len(entry.line.seeds), entry.line.n, entry.value)
            for name, points in lines.items()
            for count, entry in points
        ),
        "95 % intervals over seeds and prompts.",
    )
    return Panel(
        "data_efficiency",
        "Data efficiency",
        f"{sentence(group.name)} against the number of training pairs on {group.title}; {one}. Bands are 95 % "
        f"intervals over seeds and prompts{_rest(lines)}.",
        lambda width: _draw(group, lines, width),
        "; ".join(
            f"{name}: {', '.join(f'{count:,} pairs give {entry.value.value:.3f}' for count, entry in points)}"
            for name, points in lines.items()
        ),
        (table,),
        *(("one seed each", _more_seeds(group)) if seeds == [1] else ("", "")),
    )


def _rest(lines: Mapping[str, Any]) -> str:
    return f"; {_MOST_LINES} of {len(lines)} lines, those that end highest" if len(lines) > _MOST_LINES else ""


def _more_seeds(group: Group) -> str:
    words = words_without(group.best.run.words, "seed", "sweep", *_SIZES)
    return command_line([*words, "train.n_examples=128,256,512,null", "seed=0,1,2", "-m"])


def _draw(group: Group, lines: Mapping[str, Sequence[tuple[int, Entry]]], width: float) -> Figure:
    from matplotlib.lines import Line2D

    figure = new_figure(width, 3.8 if width > 5 else 3.6)
    axes = figure.subplots()
    grid(axes)
    handles, texts = [], []
    ticks: set[int] = set()
    for place, (name, points) in enumerate(list(lines.items())[:_MOST_LINES]):
        counts = [count for count, _ in points]
        ticks |= set(counts)
        values = [entry.value for _, entry in points]
        if all(is_number(bound) for value in values for bound in (value.low, value.high)):
            axes.fill_between(
                counts, [value.low for value in values], [value.high for value in values], color=colour(place),
                alpha=0.16, linewidth=0,
            )  # fmt: skip
        axes.plot(
            counts, [value.value for value in values], color=colour(place), linestyle=dashes(place), linewidth=1.5
        )
        for count, entry in points:
            (dot,) = axes.plot(
                [count], [entry.value.value], marker=marker(place), color=colour(place), markersize=6,
                markeredgecolor="white", markeredgewidth=0.8,
            )  # fmt: skip
            tip(dot, f"{count:,} pairs, {entry.told()}")
        handles.append(Line2D([], [], color=colour(place), marker=marker(place), linestyle=dashes(place)))
        texts.append(name)
    _number_axis(axes, sorted(ticks), 8 if width > 5 else 4)
    if group.metric == "win_rate":
        axes.axhline(0.5, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        handles.append(axes.lines[-1])
        texts.append("SFT")
    axes.set(xlabel="training pairs", ylabel=group.name)
    legend(figure, handles, [short(text, 60) for text in texts])
    return figure


def _number_axis(axes: Any, counts: Sequence[int], most: int) -> None:
    """Ticks at the numbers that were tried, as many as fit; a logarithmic axis if they span a decade."""
    if counts[-1] / counts[0] >= 4:
        axes.set_xscale("log")
    step = math.ceil(len(counts) / most)
    axes.set_xticks(counts[::-1][::step], [f"{count:,}" for count in counts[::-1][::step]])
    axes.minorticks_off()
