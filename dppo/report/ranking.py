"""Everybody against everybody: whose answers win on the same prompts, and ratings from all of these comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dppo.evaluation.comparison import Standings, shown_p, standings
from dppo.evaluation.ranking import ELO
from dppo.evaluation.win_rates import Interval
from dppo.report.drawing import INK, MUTED, colour, grid, marker, new_figure, short, tip
from dppo.report.evidence import Group, shown
from dppo.report.panel import Panel
from dppo.report.table import Cell, Column, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 16
_N_BOOTSTRAP = 10_000


def panel(group: Group) -> Panel:
    """The best configurations, the baseline among them, and SFT."""
    entries = [entry for entry in group.entries if entry.measured and not entry.is_sft]
    chosen = [entry for place, entry in enumerate(entries) if place < _MOST - 1 or entry is group.baseline][:_MOST]
    if len(chosen) < 2:
        return Panel(
            "win_rate_matrix",
            "Win-rate matrix and ratings",
            missing="it takes two configurations that answered the same prompts",
            command="python -m dppo -m loss=dpo,unll seed=0,1,2",
        )
    found = standings([entry.configuration for entry in chosen], n_bootstrap=_N_BOOTSTRAP)
    ranking, order = found.ranking, list(found.ranking.order)
    rest = f" The best {len(chosen)} of {len(entries)} are shown." if len(chosen) < len(entries) else ""
    clear = int((np.triu(ranking.p_holm, 1) < 0.05)[np.triu_indices(len(order), 1)].sum())
    m = len(order) * (len(order) - 1) // 2
    lead = (
        f"The share of {found.n_prompts:,} prompts on which the row's answer has a higher reward than the column's "
        "(ties 1/2), and Bradley-Terry ratings in Elo points above SFT with 95 % intervals over prompts and seeds. Of "
        f"{m} comparisons {clear} differ from 1/2 at 5 % after Holm's correction; the others are in brackets.{rest}"
    )
    if ranking.separated:
        lead += " Somebody won or lost every comparison: such a rating is held finite by the prior of the fit."
    return Panel(
        "win_rate_matrix",
        "Win-rate matrix and ratings",
        lead,
        lambda width: _draw(found, width),
        "ratings above SFT, in Elo points: "
        + "; ".join(f"{found.labels[at]} {shown(_rating(found, at), 0)}" for at in order),
        (_ratings(found), _matrix(found)),
    )


def _rating(found: Standings, at: int) -> Interval:
    ranking = found.ranking
    return Interval(*(float(part[at]) * ELO for part in (ranking.rating, ranking.rating_low, ranking.rating_high)))


def _ratings(found: Standings) -> Table:
    return Table(
        "ratings",
        "Bradley-Terry ratings",
        (Column("configuration", code=True), Column("Elo points above SFT", digits=0), Column("n prompts")),
        tuple((found.labels[at], _rating(found, at), found.n_prompts) for at in found.ranking.order),
        "Maximum likelihood on all comparisons, ties as half wins; 95 % intervals over prompts and seeds. 100 points "
        "are a win rate of 0.64.",
    )


def _matrix(found: Standings) -> Table:
    ranking = found.ranking
    rows: list[tuple[Cell, ...]] = []
    order = list(ranking.order)
    for nth, i in enumerate(order):
        for j in order[nth + 1 :]:
            rate = Interval(float(ranking.rate[i, j]), float(ranking.low[i, j]), float(ranking.high[i, j]))
            rows.append(
                (
                    found.labels[i],
                    found.labels[j],
                    rate,
                    shown_p(float(ranking.p_holm[i, j])),
                    int(ranking.common_seeds[i, j]),
                    found.n_prompts,
                )
            )
    return Table(
        "win_rate_matrix",
        "Win rates of answers against answers",
        (
            Column("configuration", code=True), Column("against", code=True), Column("win rate"), Column("p"),
            Column("common seeds"), Column("n"),
        ),
        tuple(rows),
        "Ties 1/2; p against 1/2, Holm's over all comparisons of this table; 0 common seeds: all pairs of seeds.",
    )  # fmt: skip


def _draw(found: Standings, width: float) -> Figure:
    n = len(found.labels)
    wide = width > 5
    side = 0.9 + 0.3 * n
    figure = new_figure(width, (side if wide else 1.4 * side) + 0.9)
    if wide:
        cells, rated = figure.subplots(1, 2, width_ratios=[1.75, 1])
    else:
        cells, rated = figure.subplots(2, 1, height_ratios=[1.5, 1])
    _cells(cells, found, wide)
    _rated(rated, found, wide)
    return figure


def _cells(axes: Axes, found: Standings, wide: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    ranking, order = found.ranking, list(found.ranking.order)
    n = len(order)
    shades = colormaps["PuOr_r"]
    small = 7.5 if n <= 8 else 6.2 if n <= 12 else 5
    for row, i in enumerate(order):
        for column, j in enumerate(order):
            if i == j:
                continue
            rate, clear = float(ranking.rate[i, j]), ranking.p_holm[i, j] < 0.05
            # The ends of the map are dark: text on them is white.
            share = 0.5 + (rate - 0.5) * 0.94
            cell = axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=shades(share), edgecolor="white")
            )
            tip(
                cell,
                f"{found.labels[i]} against {found.labels[j]}: {rate:.3f} [{ranking.low[i, j]:.3f}, "
                f"{ranking.high[i, j]:.3f}], p {shown_p(float(ranking.p_holm[i, j]))} (Holm)",
            )
            if wide or n <= 8:
                text = f"{rate:.2f}".removeprefix("0") if clear else f"({rate:.2f})".replace("0.", ".")
                ink = "#fffffe" if abs(share - 0.5) > 0.3 else "#010101"  # the same on a light and a dark page
                axes.text(column, row, text, ha="center", va="center", fontsize=small, color=ink)
    axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
    axes.set_yticks(range(n), _names(found, 34 if wide else 20), fontsize=7.5)
    axes.set_xticks(range(n), [str(nth + 1) for nth in range(n)], fontsize=7.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _names(found: Standings, most: int) -> list[str]:
    """The rows' names behind their numbers, by which the columns go."""
    return [f"{short(found.labels[at], most)}  {nth + 1}" for nth, at in enumerate(found.ranking.order)]


def _rated(axes: Axes, found: Standings, wide: bool) -> None:
    order = list(found.ranking.order)
    grid(axes, "x")
    for row, at in enumerate(order):
        rating, is_sft = _rating(found, at), found.sft and at == 0
        shade = MUTED if is_sft else colour(row)
        axes.hlines(row, rating.low, rating.high, colors=[shade], linewidth=1.4)
        (dot,) = axes.plot(
            [rating.value], [row], marker=marker(row), color=shade, markersize=6, markeredgecolor="white"
        )
        tip(dot, f"{found.labels[at]}: {shown(rating, 0)} Elo points above SFT")
    axes.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.set_yticks(range(len(order)), [""] * len(order) if wide else _names(found, 20), fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("Elo points above SFT" if found.sft else "Elo points")
