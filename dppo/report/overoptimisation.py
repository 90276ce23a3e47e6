"""Reward against KL along training: whether a method still gains while it moves away, or has begun to lose.

As Gao 2022 (arXiv 2210.10760) draws reward models, and Rafailov 2024 (arXiv 2406.02900) methods such as DPO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dppo.evaluation.runs import Run
from dppo.evaluation.win_rates import Interval
from dppo.report.choice import choose, how_chosen, none_trained, trained
from dppo.report.drawing import MUTED, WIDE, colour, dashes, grid, legend, marker, new_figure, short, tip
from dppo.report.evidence import SFT, Entry, Group, again, answers_of_policy, shown
from dppo.report.frontier import square_root_ticks
from dppo.report.panel import Panel
from dppo.report.rows import number_in, rows_of
from dppo.report.table import Cell, Column, Table
from dppo.search.plot_axes import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 6
_POINTS = 9
_KL = "interim/kl_nats_per_answer"
_KEYS = ("evaluation.interim.kl", "evaluation.interim.n_points")
# What is drawn against KL, by its name in metrics.jsonl; at KL 0 the policy is the SFT model.
_MEASURES = {"gain": ("mean reward above SFT's", 0.0), "win_rate": ("win rate against SFT", 0.5)}


@dataclass(frozen=True)
class _Point:
    """The state after ``percent`` of training: KL in nats an answer, and what was measured by name."""

    percent: int
    kl: Interval
    values: Mapping[str, Interval]


@dataclass(frozen=True)
class _Curve:
    """An entry's points by percent; over ``n_seeds``, their mean with the least and the greatest.

    Of one seed, 95 % intervals over its ``n_prompts`` prompts.
    """

    entry: Entry
    points: tuple[_Point, ...]
    n_seeds: int
    n_prompts: int

    @property
    def peak(self) -> _Point:
        return max(self.points, key=lambda point: point.values["gain"].value)


def panel(group: Group) -> Panel:
    """Reward and win rate against KL on validation prompts, one line a configuration."""
    name, title = "overoptimisation", "Reward along training"
    entries = trained(group)
    found = {entry: one for entry in entries if (one := _curve(entry)) is not None}
    missing, command = _missing(group, found)
    if not found:
        return Panel(name, title, missing=missing, command=command)
    features = {
        entry: np.array([one.points[-1].kl.value, *(one.points[-1].values[key].value for key in _MEASURES)])
        for entry, one in found.items()
    }
    curves = [found[entry] for entry in choose(features, group.baseline, _MOST)]
    prompts = sorted({one.n_prompts for one in curves})
    told = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
    lead = (
        f"Each point is the model at a share of its training, answering {told} fixed validation prompts: mean reward "
        "above SFT's, and win rate, against exact KL(policy || SFT) of those answers, nats an answer, on a scale of "
        f"square roots. {_bars(curves)} A line that falls while KL grows is over-optimisation; a large mark is each "
        f"line's highest point, which the noise of these prompts flatters.{how_chosen(len(curves), len(found))}"
    )
    return Panel(
        name,
        title,
        lead,
        lambda width: _draw(curves, width),
        "; ".join(f"{one.entry.label}: highest {_told(one.peak)}, last {_told(one.points[-1])}" for one in curves),
        (_table(curves),),
        missing,
        command,
    )


def _told(point: _Point) -> str:
    return f"{shown(point.values['gain'], 2, '+')} at {point.kl.value:.3g} nats"


def _curve(entry: Entry) -> _Curve | None:
    seeds = [rows for run in entry.runs.values() if (rows := _rows(run))]
    if not seeds:
        return None
    # A seed whose file was torn ends early; the mean of fewer seeds would jump there.
    percents = sorted(set.intersection(*map(set, seeds)))
    if not percents:
        return None
    if len(seeds) == 1:
        points = tuple(_alone(percent, seeds[0][percent]) for percent in percents)
    else:
        points = tuple(_over_seeds(percent, [one[percent] for one in seeds]) for percent in percents)
    counts = [int(row["interim/n_prompts"]) for row in seeds[0].values()]
    return _Curve(entry, points, len(seeds), counts[0])


def _rows(run: Run) -> dict[int, dict[str, float]]:
    """The rows of a run that have KL and reward, by the percent of training."""
    needed = (_KL, "interim/percent", "interim/n_prompts", *(f"interim/{key}" for key in _MEASURES))
    found = {}
    for row in rows_of(run.path / "metrics.jsonl"):
        numbers = {key: number for key in row if (number := number_in(row, key)) is not None}
        if all(key in numbers for key in needed):
            found[int(numbers["interim/percent"])] = numbers
    return found


def _alone(percent: int, row: Mapping[str, float]) -> _Point:
    nan = float("nan")
    values = {
        key: Interval(
            row[f"interim/{key}"], row.get(f"interim/{key}_ci_low", nan), row.get(f"interim/{key}_ci_high", nan)
        )
        for key in _MEASURES
    }
    return _Point(percent, Interval(row[_KL], nan, nan), values)


def _over_seeds(percent: int, rows: Sequence[Mapping[str, float]]) -> _Point:
    def spread(key: str) -> Interval:
        values = [row[key] for row in rows]
        return Interval(float(np.mean(values)), min(values), max(values))

    return _Point(percent, spread(_KL), {key: spread(f"interim/{key}") for key in _MEASURES})


def _bars(curves: Sequence[_Curve]) -> str:
    seeds = sorted({one.n_seeds for one in curves})
    told = []
    if 1 in seeds:
        told.append("Bars of one seed are 95 % intervals over prompts.")
    if seeds[-1] > 1:
        number = f"{seeds[-1]}" if len(seeds) == 1 else f"up to {seeds[-1]}"
        told.append(f"Bars of {number} seeds span their least and greatest around the mean.")
    return " ".join(told)


def _missing(group: Group, found: Mapping[Entry, _Curve]) -> tuple[str, str]:
    entries = trained(group)
    if not entries:
        return none_trained(group)
    without = [entry for entry in entries if entry not in found]
    if not without:
        return "", ""
    why = "no run measured reward and KL during training"
    if found:
        why = f"{len(without)} of {len(entries)} configurations measured no reward and KL during training"
    return why, again(without[0], f"{_KEYS[0]}=true", f"{_KEYS[1]}={_POINTS}")


def _table(curves: Sequence[_Curve]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            one.entry.label, point.percent, one.n_seeds, one.n_prompts, point.kl, point.values["gain"],
            point.values["win_rate"], "yes" if point is one.peak else "",
        )
        for one in curves
        for point in one.points
    ]  # fmt: skip
    return Table(
        "overoptimisation",
        "Reward above SFT's and win rate against KL along training",
        (
            Column("configuration", code=True), Column("training, %"), Column("seeds"), Column("prompts"),
            Column("KL, nats per answer"), Column("reward above SFT", sign=True), Column("win rate"),
            Column("highest"),
        ),
        tuple(rows),
        "On validation prompts. Of one seed 95 % intervals over prompts; of several the mean, with the least and the "
        f"greatest. KL is exact, {answers_of_policy(curves[0].entry)}.",
    )  # fmt: skip


# --- figure ----------------------------------------------------------------------------------------------------------


def _draw(curves: Sequence[_Curve], width: float) -> Figure:
    from matplotlib.lines import Line2D

    beside = width >= WIDE
    figure = new_figure(width, 3.4 if beside else 5.2)
    panels: Any = figure.subplots(*((1, 2) if beside else (2, 1)), sharex=True)
    for axes, (key, (label, level)) in zip(panels, _MEASURES.items(), strict=True):
        grid(axes, "both")
        axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        for one in reversed(curves):  # the best lies on top
            _line(axes, one, key, level)
        axes.set_ylabel(label)
    right = max(number for one in curves for point in one.points for number in _kls(point)) or 1.0
    panels[0].set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
    for axes in panels if beside else panels[1:]:
        axes.set_xlabel("KL to SFT, nats per answer")
    panels[0].set_xticks(square_root_ticks(right))
    panels[0].xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    panels[0].set_xlim(0, 1.08 * right)
    handles = [
        Line2D([], [], color=colour(one.entry.place), linestyle=dashes(one.entry.place), marker=marker(one.entry.place))
        for one in curves
    ]
    handles.append(Line2D([], [], color=MUTED, linewidth=0.9, linestyle=(0, (4, 2))))
    legend(figure, handles, [*(short(one.entry.label, 60) for one in curves), SFT])
    return figure


def _kls(point: _Point) -> list[float]:
    return [number for number in (point.kl.value, point.kl.high) if is_number(number)]


def _line(axes: Axes, one: _Curve, key: str, level: float) -> None:
    """A curve from the SFT model on, its band, and a large mark at its highest reward."""
    shade, place = colour(one.entry.place), one.entry.place
    kls = [0.0, *(point.kl.value for point in one.points)]
    values = [Interval(level, level, level), *(point.values[key] for point in one.points)]
    axes.plot(kls, [value.value for value in values], color=shade, linestyle=dashes(place), linewidth=1.3, zorder=3)
    for point in one.points:
        value = point.values[key]
        if is_number(value.low) and is_number(value.high):
            axes.vlines(point.kl.value, value.low, value.high, colors=[shade], linewidth=1.0, alpha=0.6, zorder=2.5)
        if is_number(point.kl.low) and is_number(point.kl.high):
            axes.hlines(value.value, point.kl.low, point.kl.high, colors=[shade], linewidth=1.0, alpha=0.6, zorder=2.5)
        (dot,) = axes.plot(
            [point.kl.value], [value.value], marker=marker(place), markersize=9 if point is one.peak else 4.5,
            color=shade, markeredgecolor="white", markeredgewidth=0.6, zorder=4,
        )  # fmt: skip
        tip(dot, f"{one.entry.label}, {point.percent} % of training: {shown(value, 3)} at {point.kl.value:.3g} nats")
