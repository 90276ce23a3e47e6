"""What happens to a chosen answer behind the first token in which it differs from the rejected one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dppo.evaluation.win_rates import Array, Interval, crossed_mean
from dppo.report.choice import choose, how_chosen, none_trained, trained
from dppo.report.drawing import MUTED, colour, dashes, grid, legend, marker, new_figure, tip
from dppo.report.evidence import SFT, Entry, Group, shown, words_without
from dppo.report.panel import Panel
from dppo.report.rows import rows_of
from dppo.report.table import Cell, Column, Table
from dppo.results import command_line
from dppo.search.plot_axes import is_number, whole_numbers

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 4  # bands of more lie on each other
_RESAMPLES = 500
_Tokens = dict[int, tuple[Array, Array]]  # by distance: (S, P) token log-probs of the policy and of the SFT model


@dataclass(frozen=True)
class _Place:
    """One distance from the first edit; ``gain`` is the paired difference of policy and SFT model."""

    n_pairs: int
    policy: Interval
    sft: Interval
    gain: Interval


@dataclass(frozen=True)
class _Behind:
    entry: Entry
    n_seeds: int
    places: Mapping[int, _Place]


def panel(group: Group) -> Panel:
    """Mean token log-prob of held-out chosen answers against the distance from the first edit."""
    name, title = "edits", "Behind the first edit"
    read = {entry: tokens for entry in trained(group) if (tokens := _read(entry))}
    missing, command = _missing(group, read)
    if not read:
        return Panel(name, title, missing=missing, command=command)
    last = max(max(tokens) for tokens in read.values())
    features = {
        entry: np.array([float(np.mean(tokens[at][0])) if at in tokens else np.nan for at in range(last + 1)])
        for entry, tokens in read.items()
    }
    found = [_behind(entry, read[entry]) for entry in choose(features, group.baseline, _MOST)]
    n_pairs = max(place.n_pairs for one in found for place in one.places.values())
    seeds = sorted({one.n_seeds for one in found})
    number = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    plural = seeds[-1] > 1
    lead = (
        "Mean log-prob of the tokens of held-out chosen answers, from the first token in which chosen and rejected "
        f"differ (distance 0) on, and its difference to {SFT} on the same tokens; {n_pairs} pairs at most (few "
        f"answers are long), {number} seed{'s' if plural else ''}. Bands are 95 % intervals at a distance, bootstrap "
        f"over pairs{' and seeds' if plural else ''}.{how_chosen(len(found), len(read))}"
    )
    return Panel(
        name,
        title,
        lead,
        lambda width: _draw(found, width),
        "; ".join(f"{one.entry.label}: {_said(one)}" for one in found),
        (_table(found),),
        missing,
        command,
    )


def _said(one: _Behind) -> str:
    lowest = min(one.places, key=lambda at: one.places[at].gain.value)
    highest = max(one.places, key=lambda at: one.places[at].gain.value)
    parts = [
        f"at distance {at} {shown(one.places[at].gain, 2, '+')} nats against SFT" for at in sorted({lowest, highest})
    ]
    return ", ".join(parts)


def _missing(group: Group, read: Mapping[Entry, _Tokens]) -> tuple[str, str]:
    entries = trained(group)
    if not entries:
        return none_trained(group)
    without = [entry for entry in entries if entry not in read]
    if not without:
        return "", ""
    several = f"{len(without)} of {len(entries)} configurations have" if read else "no run has"
    run = without[0].run
    words = words_without(run.words, "seed")
    if (run.settings.get("evaluation") or {}).get("n_pairs") == 0:
        words = [*words_without(words, "evaluation.n_pairs"), "evaluation.n_pairs=256"]
    return f"{several} log-probs of held-out pairs", command_line([*words, f"seed={run.seed}"])


# --- numbers ---------------------------------------------------------------------------------------------------------


def _read(entry: Entry) -> _Tokens:
    """Token log-probs at every distance that all seeds have pairs at, the pairs in the same order."""
    seeds = []
    for run in entry.runs.values():
        at: dict[int, dict[str, tuple[float, float]]] = {}
        for row in rows_of(run.path / "pairs.jsonl"):
            both = zip(row.get("by_distance") or (), row.get("reference_by_distance") or (), strict=False)
            for distance, (own, other) in enumerate(both):
                if is_number(own) and is_number(other):
                    at.setdefault(distance, {})[str(row["example_id"])] = (float(own), float(other))
        if at:
            seeds.append(at)
    found: _Tokens = {}
    for distance in sorted(set.intersection(*map(set, seeds)) if seeds else ()):
        if ids := sorted(set.intersection(*(set(one[distance]) for one in seeds))):
            values = np.array([[one[distance][key] for key in ids] for one in seeds])
            found[distance] = values[..., 0], values[..., 1]
    return found


def _behind(entry: Entry, tokens: _Tokens) -> _Behind:
    places = {}
    for distance, (own, other) in tokens.items():
        # Seeds share the SFT model: its rows are alike.
        sft = np.unique(other, axis=0)
        places[distance] = _Place(own.shape[1], _mean(own), _mean(sft), _mean(own - other))
    return _Behind(entry, max(len(own) for own, _ in tokens.values()), places)


def _mean(values: Array) -> Interval:
    """No width is claimed for a single pair."""
    if values.shape[1] < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"))
    return crossed_mean(values, n_bootstrap=_RESAMPLES, seed=0)


def _table(found: Sequence[_Behind]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (one.entry.label, distance, one.n_seeds, place.n_pairs, place.policy, place.sft, place.gain)
        for one in found
        for distance, place in one.places.items()
    ]
    return Table(
        "edits",
        "Mean token log-prob of held-out chosen answers by the distance from the first edit",
        (
            Column("configuration", code=True), Column("distance"), Column("seeds"), Column("pairs"),
            Column("nats a token"), Column(f"{SFT}, nats a token"), Column("difference", sign=True),
        ),
        tuple(rows),
        f"Distance 0 is the first token that differs. 95 % intervals: bootstrap over pairs and seeds, {_RESAMPLES} "
        "resamples; the difference is paired.",
    )  # fmt: skip


# --- figure ----------------------------------------------------------------------------------------------------------


def _draw(found: Sequence[_Behind], width: float) -> Figure:
    columns = 1 if width < 5 else 2
    figure = new_figure(width, 4.6 + 0.17 * (len(found) // columns + 1))
    above, below = figure.subplots(2, 1, sharex=True)
    handles = [_sft(above, found[0])]
    for one in reversed(found):  # the best lies on top
        handles.insert(1, _curve(above, one, lambda place: place.policy, "log-prob"))
        _curve(below, one, lambda place: place.gain, f"difference to {SFT}")
    below.axhline(0, color=MUTED, linestyle=(0, (5, 2)), linewidth=1.2, zorder=1.5)
    for axes, label in ((above, "mean log-prob,\nnats a token"), (below, f"difference to {SFT},\nnats a token")):
        grid(axes)
        axes.set_ylabel(label)
    below.set_xlabel("tokens behind the first edit")
    whole_numbers(below, sorted({distance for one in found for distance in one.places}))
    figure.align_ylabels()
    legend(figure, handles, [SFT, *(one.entry.label for one in found)])
    return figure


def _sft(axes: Axes, one: _Behind) -> Artist:
    """The level to compare with; the pairs are the same for all entries."""
    xs, values = list(one.places), [place.sft for place in one.places.values()]
    axes.fill_between(
        xs,
        [value.low for value in values],
        [value.high for value in values],
        color=MUTED,
        alpha=0.2,
        linewidth=0,
        zorder=1,
    )
    (line,) = axes.plot(
        xs, [value.value for value in values], color=MUTED, linestyle=(0, (5, 2)), linewidth=1.6, zorder=2, label=SFT
    )
    tip(line, SFT)
    return line


def _curve(axes: Axes, one: _Behind, which: Callable[[_Place], Interval], what: str) -> Artist:
    entry = one.entry
    shade = colour(entry.place)
    xs, values = list(one.places), [which(place) for place in one.places.values()]
    axes.fill_between(
        xs,
        [value.low for value in values],
        [value.high for value in values],
        color=shade,
        alpha=0.18,
        linewidth=0,
        zorder=2,
    )
    look: dict[str, Any] = {"color": shade, "marker": marker(entry.place), "markersize": 4.5, "markeredgewidth": 0.5}
    axes.plot(
        xs, [value.value for value in values], color=shade, linestyle=dashes(entry.place), linewidth=1.2, zorder=3
    )
    for (distance, place), value in zip(one.places.items(), values, strict=True):
        (dot,) = axes.plot([distance], [value.value], **look, markeredgecolor="white", zorder=4)
        tip(dot, f"{entry.label}, distance {distance}: {what} {shown(value)} nats, {place.n_pairs} pairs")
    (handle,) = axes.plot([], [], **look, markeredgecolor="white", linestyle=dashes(entry.place), linewidth=1.2)
    return handle
