"""Reward histogram: how the rewards of a policy's answers lie beside those of the SFT model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dppo.evaluation.histogram import shared_bins, shares
from dppo.evaluation.win_rates import Array, Interval, crossed_mean, crossed_rate, wilson
from dppo.report.drawing import INK, MUTED, WIDE, colour, grid, heading, legend, new_figure, tip
from dppo.report.evidence import SFT, Entry, Group, again, shown
from dppo.report.panel import Panel
from dppo.report.table import Cell, Column, Table

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RESAMPLES = 2000


@dataclass(frozen=True)
class _Rewards:
    """The rewards (S, P) of one model; ``negative`` is the share below 0."""

    values: Array
    mean: Interval
    negative: Interval


@dataclass(frozen=True)
class _Pair:
    """A configuration beside its SFT model; seeds that share that model have one row of its rewards."""

    entry: Entry
    policy: _Rewards
    sft: _Rewards


def panel(group: Group) -> Panel:
    """The best entry and the baseline, on the same bins."""
    name, title = "rewards", "Rewards of the answers"
    pairs = [found for entry in _shown(group) if (found := _pair(entry)) is not None]
    if not pairs:
        why = "none of these runs has rewards that can be drawn (all diverged, or none is finite)"
        return Panel(name, title, missing=why, command=again(group.best))
    edges = shared_bins(*(model.values for pair in pairs for model in (pair.policy, pair.sft)))
    seeds = {len(pair.entry.measured) for pair in pairs}
    lead = (
        f"Shares of rewards of the policy (filled) and of the SFT model (outline) on {group.title}, on the same "
        f"{len(edges) - 1} bins: {_named(group, pairs)}. Triangles are means; in brackets and as bars 95 % intervals."
    )
    if max(seeds) > 1:
        number = str(max(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
        lead += f" The answers of {number} seeds are pooled; intervals are over seeds and prompts."
    return Panel(
        name,
        title,
        lead,
        lambda width: _draw(pairs, edges, width),
        "; ".join(
            f"{pair.entry.label}: mean reward {shown(pair.policy.mean, 2)}, {_percent(pair.policy.negative)} negative"
            f" (SFT {shown(pair.sft.mean, 2)}, {_percent(pair.sft.negative)})"
            for pair in pairs
        ),
        (_summary(pairs), _bins(pairs, edges), *_reward_model(group)),
    )


def _shown(group: Group) -> list[Entry]:
    """The best entry that was measured, and the baseline."""
    best = [entry for entry in group.entries if entry.measured][:1]
    return [*best, *(entry for entry in (group.baseline,) if entry not in best and entry.measured)]


def _named(group: Group, pairs: Sequence[_Pair]) -> str:
    best, *others = [pair.entry.label for pair in pairs]
    if others:
        return f"the best, {best}, and the baseline, {others[0]}"
    return f"{best}, the best and the baseline" if pairs[0].entry is group.baseline else f"the best, {best}"


def _pair(entry: Entry) -> _Pair | None:
    # Configurations of one group may start from different SFT models, seeds of one configuration hardly ever do.
    references = np.unique([one.reference for one in entry.measured.values()], axis=0)
    policy, sft = _rewards(entry.rewards), _rewards(references)
    return None if policy is None or sft is None else _Pair(entry, policy, sft)


def _rewards(values: Array) -> _Rewards | None:
    values = values[:, np.isfinite(values).all(axis=0)]
    if values.size == 0:
        return None
    below = (values < 0).astype(np.float64)
    if len(below) == 1:
        negative = Interval(float(below.mean()), *wilson(float(below.sum()), below.size))
    else:
        # Seeds answer the same prompts: Wilson's interval of all answers together would claim too much.
        negative = crossed_rate(below, n_bootstrap=_RESAMPLES, seed=0)
    return _Rewards(values, crossed_mean(values, n_bootstrap=_RESAMPLES, seed=0), negative)


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"


# --- tables ----------------------------------------------------------------------------------------------------------


def _models(pairs: Sequence[_Pair]) -> list[tuple[str, _Rewards]]:
    """Every model that is drawn, each SFT model once."""
    found = [(pair.entry.label, pair.policy) for pair in pairs]
    for pair in pairs:
        if not any(np.array_equal(pair.sft.values, other.values) for name, other in found if name.startswith(SFT)):
            first = all(name != SFT for name, _ in found)
            found.append((SFT if first else f"{SFT} of {pair.entry.label}", pair.sft))
    return found


def _summary(pairs: Sequence[_Pair]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for name, found in _models(pairs):
        n_seeds, n = found.values.shape
        spread = float(found.values.std(ddof=1)) if found.values.size > 1 else float("nan")
        rows.append((name, n_seeds, n, found.mean, float(np.median(found.values)), spread, found.negative))
    return Table(
        "rewards",
        "Rewards of the answers",
        (
            Column("model", code=True), Column("seeds"), Column("prompts"), Column("mean"), Column("median"),
            Column("standard deviation"), Column("share of negative rewards"),
        ),
        tuple(rows),
        "95 % intervals: bootstrap over seeds and prompts; Wilson's for the share below 0 of a single seed.",
    )  # fmt: skip


def _reward_model(group: Group) -> list[Table]:
    """How good the reward model is that the runs of this group trained; nothing for another reward."""
    runs = (run for entry in group.entries for run in entry.configuration.runs.values())
    ranked = next((run.result["reward_model"] for run in runs if "reward_model" in run.result), None)
    if ranked is None:
        return []
    rows: list[tuple[Cell, ...]] = []
    for split, measured in ranked["splits"].items():
        for name in ("reward_model", "length", "sentiment"):
            if (own := measured[name]) is not None:
                ahead = _between(own["difference"]) if "difference" in own else None
                rows.append(
                    (name, split, measured["n_pairs"], measured["n_prompts"], _between(own), own["ties"], ahead)
                )
    columns = ("ranked by", "pairs of", "pairs", "prompts", "ranked right", "ties", "reward model ahead by")
    return [
        Table(
            "reward_model",
            "Held-out pairs that the reward model ranks right",
            tuple(Column(name, sign=name == columns[-1]) for name in columns),
            tuple(rows),
            "The reward model was trained on other pairs; length and sentiment are what it must beat. Ties count 1/2; "
            "95 % intervals, bootstrap over prompts, of the difference on the same pairs.",
        )
    ]


def _between(found: Mapping[str, float]) -> Interval:
    return Interval(found["value"], found["ci_low"], found["ci_high"])


def _bins(pairs: Sequence[_Pair], edges: Array) -> Table:
    models = _models(pairs)
    columns = [shares(found.values, edges) for _, found in models]
    return Table(
        "reward_bins",
        "Histogram of rewards",
        (Column("from"), Column("to"), *(Column(f"share of {name}", 4) for name, _ in models)),
        tuple(
            (float(edges[at]), float(edges[at + 1]), *(float(column[at]) for column in columns))
            for at in range(len(edges) - 1)
        ),
        "A bin holds its lower edge and not its upper one, the last one both.",
    )


# --- figure ----------------------------------------------------------------------------------------------------------


def _draw(pairs: Sequence[_Pair], edges: Array, width: float) -> Figure:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    beside = len(pairs) if width >= WIDE else 1
    below = len(pairs) // beside
    figure = new_figure(width, 0.75 + 2.5 * below)
    panels = figure.subplots(below, beside, sharex=True, sharey=True, squeeze=False)
    highest = max(float(shares(model.values, edges).max()) for pair in pairs for model in (pair.policy, pair.sft))
    for at, (axes, pair) in enumerate(zip(panels.ravel(), pairs, strict=True)):
        _histogram(axes, pair, edges, 100 * highest)
        axes.set_title(_heading(pair, width / beside - 0.7), loc="left", fontsize=9)
        if at % beside == 0:
            axes.set_ylabel("share of answers, %")
        if at // beside == below - 1:
            axes.set_xlabel("reward")
    handles: list[Artist] = [
        Patch(facecolor=MUTED, alpha=0.6),
        Line2D([], [], color=INK, linewidth=1.2),
        Line2D([], [], linestyle="none", marker="v", color=MUTED),
        Line2D([], [], linestyle="none", marker="v", markerfacecolor="white", markeredgecolor=INK),
    ]
    legend(figure, handles, ["policy", SFT, "mean of the policy", f"mean of {SFT}"])
    return figure


def _heading(pair: _Pair, inches: float) -> str:
    return (
        f"{heading(pair.entry.label, inches)}\nbelow 0: {_percent(pair.policy.negative)}\n{SFT}: "
        f"{_percent(pair.sft.negative)}"
    )


def _histogram(axes: Axes, pair: _Pair, edges: Array, highest: float) -> None:
    """One pair of models; ``highest`` is the greatest share of any bin, in percent."""
    grid(axes)
    own, other = 100 * shares(pair.policy.values, edges), 100 * shares(pair.sft.values, edges)
    shade = colour(pair.entry.place)
    bars = axes.bar(
        edges[:-1], own, np.diff(edges), align="edge", color=shade, alpha=0.6, edgecolor="white", linewidth=0.4
    )
    for at, bar in enumerate(bars):
        told = f"{own[at]:.1f} % of {pair.entry.label}, {other[at]:.1f} % of {SFT}"
        tip(bar, f"reward {edges[at]:.4g} to {edges[at + 1]:.4g}: {told}")
    axes.stairs(other, edges, color=INK, linewidth=1.2, zorder=3)
    axes.axvline(0, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)), zorder=2.5)
    # Means have a strip of their own above the bars; a triangle stands on its interval.
    axes.set_ylim(0, 1.34 * highest)
    for model, name, height, paint, filled in (
        (pair.policy, pair.entry.label, 1.21, shade, True), (pair.sft, SFT, 1.06, INK, False),
    ):  # fmt: skip
        mean = model.mean
        axes.hlines(height * highest, mean.low, mean.high, colors=[paint], linewidth=2, zorder=4)
        (dot,) = axes.plot(
            [mean.value], [(height + 0.06) * highest], marker="v", markersize=6, linestyle="none", zorder=5,
            markerfacecolor=paint if filled else "white", markeredgecolor=paint,
        )  # fmt: skip
        tip(dot, f"mean reward of {name}: {shown(mean)}")
