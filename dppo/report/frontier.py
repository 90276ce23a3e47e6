"""Reward against KL: what a method gains over the SFT model, and how far it had to move for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dppo.dotted import leaves
from dppo.evaluation.win_rates import Array, Interval, crossed_mean
from dppo.report.choice import none_trained, trained
from dppo.report.drawing import INK, MUTED, colour, grid, heading, legend, marker, new_figure, point, tip
from dppo.report.evidence import SFT, Entry, Group, again, answers_of_policy, phases, shown, words_without
from dppo.report.panel import Panel
from dppo.report.table import Cell, Column, Table
from dppo.results import command_line
from dppo.search.plot_axes import is_number

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_NAMED = 10
_RESAMPLES = 2000
_WIDE_RANGE = 8  # a KL so many times the least one needs an axis that is not linear


@dataclass(frozen=True)
class _Point:
    """``kl`` in nats per answer, ``gain`` in mean reward above SFT's; ``seeds`` (kl, gain) of each run by its seed."""

    entry: Entry
    kl: Interval
    per_token: Interval | None
    gain: Interval
    seeds: dict[int, tuple[float, float]]


def panel(group: Group) -> Panel:
    """One point a configuration, and the frontier that none lies above and left of."""
    name, title = "frontier", "Reward against KL"
    entries = trained(group)
    points = [found for entry in entries if (found := _point(entry)) is not None]
    if not points:
        if not entries:
            missing, command = none_trained(group)
        else:
            missing, command = "no run has a KL to the SFT model", again(entries[0])
        return Panel(name, title, missing=missing, command=command)
    front = frontier([(one.kl.value, one.gain.value) for one in points])
    several = any(len(one.seeds) > 1 for one in points)
    lead = (
        f"Mean reward above SFT's against KL(policy || SFT) in nats per answer, {len(points)} configurations on "
        f"{group.title}. Vertical bars are 95 % intervals over {'seeds and ' if several else ''}prompts."
    )
    if several:
        lead += " Small dots are single seeds; KL is their mean, and its bar spans their least and greatest."
    lead += (
        f" KL is exact, the sum over the vocabulary at each token, {_on_answers(points)}. The stairs go through the "
        "means: no other configuration has both less KL and more reward."
    )
    named = _named(points, front, group)
    if len(points) > len(named):
        lead += (
            f" {len(named)} of {len(points)} points are named: the best, the baseline and the frontier from its top."
        )
    missing, command = _missing(points)
    return Panel(
        name,
        title,
        lead,
        lambda width: _draw(points, front, named, width),
        "; ".join(
            f"{points[at].entry.label}: {shown(points[at].gain, 2, '+')} at {points[at].kl.value:.3g} nats"
            for at in front
        ),
        (_table(points, front),),
        missing,
        command,
    )


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the (cost, gain) that no other one beats or equals in both, by cost; (0, 0) is among the others."""
    best, found = 0.0, []
    for at in sorted(range(len(points)), key=lambda at: (points[at][0], -points[at][1])):
        if points[at][1] > best:
            best = points[at][1]
            found.append(at)
    return found


def _point(entry: Entry) -> _Point | None:
    kl = entry.number("kl.nats_per_answer")
    gains = np.array([one.policy - one.reference for one in entry.measured.values()])
    gains = gains[:, np.isfinite(gains).all(axis=0)]
    if kl is None or not is_number(kl.value) or gains.size == 0:
        return None
    seeds = {
        seed: (float(run.result["kl"]["nats_per_answer"]), float(gain.mean()))
        for (seed, run), gain in zip(entry.runs.items(), gains, strict=True)
    }
    gain = crossed_mean(gains, n_bootstrap=_RESAMPLES, seed=0)
    return _Point(entry, kl, entry.number("kl.nats_per_token"), gain, seeds)


def _on_answers(points: Sequence[_Point]) -> str:
    """Which answers KL was measured on, and what that makes of it."""
    run = points[0].entry.run  # all of a group are decoded alike
    if run.decoding == "greedy":
        return f"but on {_n_answers(points)}greedy answers of the policy: it says nothing about less likely ones"
    on = f"on {_n_answers(points)}answers of the policy, {run.decoding}"
    if "monte_carlo" in run.result["kl"]:
        return f"{on}: an estimate of the KL between the models as they are"
    return f"but {on}: not those that the policy as it is would give"


def _n_answers(points: Sequence[_Point]) -> str:
    counts = {int(one.entry.run.result.get("kl", {}).get("n_answers", 0)) for one in points}
    return f"{counts.pop():,} " if len(counts) == 1 and 0 not in counts else ""


def _missing(points: Sequence[_Point]) -> tuple[str, str]:
    if len(points) > 1:
        return "", ""
    run = points[0].entry.run
    for phase, _, settings in reversed(phases(run.settings)):
        for name, value in leaves(settings.get("loss") or {}).items():
            key = name.rpartition(".")[2]
            if key in ("alpha", "beta") and isinstance(value, (int, float)) and value:
                if run.settings.get("phases"):
                    key = f"phases.{phase}.loss.{name}"
                words = words_without(run.words, "seed", key)
                values = ",".join(f"{value * factor:g}" for factor in (0.1, 1, 10))
                why = f"one configuration is no frontier: other values of {key} would show what a nat of KL buys"
                return why, command_line([*words, f"{key}={values}", "seed=0,1,2", "-m"])
    return "one configuration is no frontier", ""


def _table(points: Sequence[_Point], front: Sequence[int]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            one.entry.label, one.entry.method, len(one.seeds), one.entry.line.n, one.kl, one.per_token, one.gain,
            "yes" if at in front else "",
        )
        for at, one in enumerate(points)
    ]  # fmt: skip
    return Table(
        "frontier",
        "Reward above SFT's and KL to SFT",
        (
            Column("configuration", code=True), Column("method"), Column("seeds"), Column("prompts"),
            Column("KL, nats per answer"), Column("KL, nats per token", 4), Column("reward above SFT", sign=True),
            Column("on the frontier"),
        ),
        tuple(rows),
        "Reward: 95 % intervals over seeds and prompts. KL: mean of the seeds, with the least and the greatest; exact, "
        f"{answers_of_policy(points[0].entry)}.",
    )  # fmt: skip


def _named(points: Sequence[_Point], front: Sequence[int], group: Group) -> list[int]:
    """The points that are named: all if they are few; else the best, the baseline, and the frontier from its top."""
    if len(points) <= _MOST_NAMED:
        return list(range(len(points)))
    wanted = [0, *(at for at, one in enumerate(points) if one.entry is group.baseline), *reversed(front)]
    return list(dict.fromkeys(wanted))[:_MOST_NAMED]


def _families(points: Sequence[_Point]) -> list[list[_Point]]:
    """Points of one method that differ in numbers only, by their KL."""
    methods: dict[str, list[_Point]] = {}
    for one in points:
        methods.setdefault(one.entry.method, []).append(one)
    return [
        sorted(members, key=lambda one: one.kl.value)
        for members in methods.values()
        if len(members) > 1 and _differ_in_numbers([one.entry for one in members])
    ]


def _differ_in_numbers(entries: Sequence[Entry]) -> bool:
    flat = [leaves(entry.settings) for entry in entries]
    keys = dict.fromkeys(key for one in flat for key in one if key not in ("seed", "cache.dir"))
    columns = [[one.get(key) for one in flat] for key in keys]
    differing = [column for column in columns if any(value != column[0] for value in column)]
    numeric = [all(value is None or type(value) in (int, float) for value in column) for column in differing]
    return bool(numeric) and all(numeric)


# --- figure ----------------------------------------------------------------------------------------------------------


def _draw(points: Sequence[_Point], front: Sequence[int], named: Sequence[int], width: float) -> Figure:
    from matplotlib.lines import Line2D

    figure = new_figure(width, 3.2 if width < 5 else 3.7)
    axes = figure.subplots()
    grid(axes, "both")
    for one in reversed(points):  # the best lies on top
        _mark(axes, one)
    (zero,) = axes.plot(
        [0], [0], marker="o", markersize=6, markerfacecolor="white", markeredgecolor=INK, linestyle="none", zorder=4,
        clip_on=False,
    )  # fmt: skip
    tip(zero, f"{SFT}: KL 0")
    _scale(axes, points)
    stairs = [(0.0, 0.0), *((points[at].kl.value, points[at].gain.value) for at in front)]
    (line,) = axes.plot(
        [x for x, _ in stairs], [y for _, y in stairs], drawstyle="steps-post", color=INK, linewidth=0.9, zorder=1.8
    )
    tip(line, "frontier")
    axes.margins(y=0.1)
    axes.set_xlabel("KL to SFT, nats per answer")
    axes.set_ylabel("mean reward above SFT's")
    handles: list[Artist] = [zero, line]
    texts = [SFT, "frontier"]
    dotted: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (1, 1.5))}
    for family in _families(points):
        axes.plot([one.kl.value for one in family], [one.gain.value for one in family], zorder=1.6, **dotted)
    if _families(points):
        handles.append(Line2D([], [], **dotted))
        texts.append("same method")
    if any(len(one.seeds) > 1 for one in points):
        handles.append(Line2D([], [], marker="o", markersize=2.6, color=MUTED, linestyle="none"))
        texts.append("single seeds")
    _name(figure, axes, points, named, handles, texts)
    return figure


def _mark(axes: Axes, one: _Point) -> None:
    """A configuration with its bars and its seeds."""
    shade = colour(one.entry.place)
    if len(one.seeds) > 1:
        for seed, (kl, gain) in one.seeds.items():
            (dot,) = axes.plot([kl], [gain], marker="o", markersize=2.6, color=shade, alpha=0.55, zorder=2.5)
            tip(dot, f"{one.entry.label}, seed {seed}: {gain:+.3f} at {kl:.3g} nats")
    if is_number(one.kl.low) and is_number(one.kl.high):
        axes.hlines(one.gain.value, one.kl.low, one.kl.high, colors=[shade], linewidth=1.1, zorder=3)
    told = f"{one.entry.label}: reward {shown(one.gain, 3, '+')} above {SFT}, KL {_kl(one.kl)} nats per answer"
    point(axes, one.kl.value, one.gain, one.entry.place, told, best=one.entry.place == 0)


def _name(
    figure: Figure,
    axes: Axes,
    points: Sequence[_Point],
    named: Sequence[int],
    handles: Sequence[Artist],
    texts: Sequence[str],
) -> None:
    """Names beside the points where there is room, and in the legend where there is none."""
    from matplotlib.lines import Line2D

    look = {
        at: Line2D(
            [], [], marker="*" if points[at].entry.place == 0 else marker(points[at].entry.place), linestyle="none",
            markersize=11 if points[at].entry.place == 0 else 6, color=colour(points[at].entry.place),
            markeredgecolor="white",
        )
        for at in named
    }  # fmt: skip

    def explain(places: Sequence[int]) -> None:
        legend(figure, [*handles, *(look[at] for at in places)], [*texts, *(points[at].entry.label for at in places)])

    base = float(figure.get_figheight())

    def settle() -> None:
        """Let the figure grow by its legend: the panel keeps its size."""
        figure.set_figheight(3 * base)  # room for any legend, to measure this one
        figure.draw_without_rendering()
        figure.set_figheight(base + figure.legends[-1].get_window_extent().height / figure.dpi)
        figure.draw_without_rendering()

    explain(named)
    settle()
    taken = _covered(axes)
    left = []
    for at in named:
        inches = 1.5 if figure.get_figwidth() < 5 else 3.1
        box = _label(axes, points[at], heading(points[at].entry.label, inches), taken)
        if box is None:
            left.append(at)
        else:
            taken = np.vstack([taken, box])
    figure.legends[-1].remove()
    explain(left)
    settle()


def _label(axes: Axes, one: _Point, text: str, taken: Array) -> Array | None:
    """Write a name beside a point, on nothing that is drawn; returns its box, None where there is no room."""
    from matplotlib.text import Text

    frame = axes.get_window_extent()
    for dy, side in ((8, "center"), (-8, "center"), (16, "bottom"), (-16, "top"), (24, "bottom"), (-24, "top")):
        for dx in (5, -5):
            nearest = (0 if dx > 0 else 1, 0 if dy > 0 else 1)  # of its corners
            leader = {
                "arrowstyle": "-",
                "color": MUTED,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 4,
                "relpos": nearest,
            }
            note = axes.annotate(
                text, (one.kl.value, one.gain.value), (dx, dy), textcoords="offset points", fontsize=8, zorder=12,
                ha="left" if dx > 0 else "right", va=side, arrowprops=None if side == "center" else leader,
            )  # fmt: skip
            note.get_window_extent()  # puts it into its place
            box = Text.get_window_extent(note)  # without its leader
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            apart = (box.x1 < taken[:, 0]) | (taken[:, 2] < box.x0) | (box.y1 < taken[:, 1]) | (taken[:, 3] < box.y0)
            if inside and apart.all():
                return np.array([box.extents])
            note.remove()
    return None


def _covered(axes: Axes) -> Array:
    """(N, 4) boxes in pixels, left, bottom, right and top: of marks, and of short pieces of lines."""
    found = [np.empty((0, 4))]
    bars = [np.asarray(path.vertices) for one in axes.collections for path in one.get_paths()]
    lines = [
        (line.get_path().vertices, line.get_markersize() if line.get_marker() != "None" else 0) for line in axes.lines
    ]
    for vertices, size in [*((bar, 0.0) for bar in bars), *lines]:
        places = axes.transData.transform(np.asarray(vertices))
        if len(places) > 1:
            shares = np.linspace(0, 1, 60)[:, None]
            places = np.vstack([start + shares * (end - start) for start, end in pairwise(places)])
        half = 0.5 * size * axes.figure.dpi / 72 + 1
        found.append(np.hstack([places - half, places + half]))
    return np.vstack(found)


def _kl(kl: Interval) -> str:
    spread = f" ({kl.low:.3g} to {kl.high:.3g})" if is_number(kl.low) and is_number(kl.high) else ""
    return f"{kl.value:.3g}{spread}"


def _scale(axes: Axes, points: Sequence[_Point]) -> None:
    """From 0; over a wide range by square roots, as reward is often drawn against KL (Gao 2022, arXiv 2210.10760)."""
    right = max(number for one in points for number in (one.kl.value, one.kl.high) if is_number(number)) or 1.0
    least = min((one.kl.value for one in points if one.kl.value > 0), default=right)
    if right / least > _WIDE_RANGE:
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
        axes.set_xticks(square_root_ticks(right))
        axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
        axes.set_xlim(0, 1.08 * right)
    else:
        axes.set_xlim(-0.04 * right, 1.06 * right)


def square_root_ticks(right: float) -> list[float]:
    """0, and numbers such as 1, 2 and 5 that are far enough from each other where square roots are drawn."""
    ten = math.floor(math.log10(right))
    found: list[float] = []
    for number in (one * 10.0**power for power in range(ten, ten - 4, -1) for one in (5, 2, 1)):
        nearest = found[-1] if found else math.inf
        if number <= right and math.sqrt(nearest) - math.sqrt(number) > 0.11 * math.sqrt(right) < math.sqrt(number):
            found.append(number)
    return [0.0, *reversed(found)]
