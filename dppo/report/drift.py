"""Likelihood drift: how the log-probs of held-out answers move while a model trains on preferences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dppo.evaluation.runs import Run
from dppo.evaluation.win_rates import Interval, t_interval
from dppo.report.choice import choose, how_chosen, none_trained, trained
from dppo.report.drawing import DASHES, MARKERS, MUTED, WIDE, colour, grid, heading, legend, new_figure, tip
from dppo.report.evidence import Entry, Group, phases, shown, words_without
from dppo.report.panel import Panel
from dppo.report.rows import number_in, rows_of
from dppo.report.table import Cell, Column, Table
from dppo.results import command_line

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROLES = ("chosen", "rejected", "generated")
_ACCURACY = "accuracy"
_MOST = 4
_MOST_MARKS = 12  # on one line
_FEW = 4  # seeds of which a band shows the least and the greatest
_Curve = dict[int, float]  # by step


@dataclass(frozen=True)
class _Drift:
    """An entry's curves: by name (a role, a role per token, accuracy) the mean over seeds at every step.

    ``n_seeds`` are those that have the steps, ``begins`` the steps at which later phases begin.
    """

    entry: Entry
    curves: Mapping[str, Mapping[int, Interval]]
    n_seeds: int
    begins: tuple[int, ...]

    def last(self, name: str) -> float:
        found = self.curves[name]
        return found[max(found)].value if found else float("nan")


def panel(group: Group) -> Panel:
    """Log-probs of held-out chosen, rejected and generated answers against training steps."""
    name, title = "drift", "Likelihood drift"
    found = {entry: one for entry in trained(group) if (one := _drift(entry)) is not None}
    missing, command = _missing(group, found)
    if not found:
        return Panel(name, title, missing=missing, command=command)
    features = {entry: np.array([one.last(role) for role in ROLES]) for entry, one in found.items()}
    drifts = [found[entry] for entry in choose(features, group.baseline, _MOST)]
    lead = (
        "How the log-probs of held-out chosen and rejected answers, and of the SFT model's own (generated), change "
        f"from training step 0; means over {_n_pairs(drifts[0].entry)} held-out examples. {_bands(drifts)}"
        f"{how_chosen(len(drifts), len(found))}"
    )
    return Panel(
        name,
        title,
        lead,
        lambda width: _draw(drifts, width),
        "; ".join(_said(one) for one in drifts),
        (_table(drifts),),
        missing,
        command,
    )


def _n_pairs(entry: Entry) -> str:
    """How many held-out examples the metrics are means of."""
    found = [(phase.get("train") or {}).get("n_evaluation_examples") for _, _, phase in phases(entry.settings)]
    counts = [count for count in found if isinstance(count, int)]
    return f"at most {max(counts)}" if counts else "the"


def _bands(drifts: Sequence[_Drift]) -> str:
    seeds = sorted({one.n_seeds for one in drifts})
    if seeds == [1]:
        return "Lines are single seeds, which have no band."
    said = ["A single seed has no band."] if 1 in seeds else []
    if any(1 < n <= _FEW for n in seeds):
        said.append(f"Bands of 2 to {_FEW} seeds span their least and greatest.")
    if seeds[-1] > _FEW:
        said.append(f"Bands of more than {_FEW} seeds are 95 % t intervals of their mean.")
    number = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"Lines are means over {number} seeds. {' '.join(said)}"


def _said(one: _Drift) -> str:
    ends = []
    for role in ROLES:
        if curve := one.curves[role]:
            ends.append(f"{role} {shown(curve[max(curve)], 1, '+')} nats at step {max(curve)}")
    return f"{one.entry.label}: {', '.join(ends)}"


def _missing(group: Group, found: Mapping[Entry, _Drift]) -> tuple[str, str]:
    entries = trained(group)
    if not entries:
        return none_trained(group)
    without = [entry for entry in entries if entry not in found]
    if not without:
        return "", ""
    if len(without) == len(entries):
        why = "no run logged likelihoods of held-out answers during training"
    else:
        why = f"{len(without)} of {len(entries)} configurations logged no likelihoods of held-out answers"
    run = without[0].run
    words = words_without(run.words, "seed")
    for name, _, phase in phases(run.settings):
        train = phase.get("train") or {}
        if train.get("evaluate_every") is None:
            key = "train.evaluate_every" if not run.settings.get("phases") else f"phases.{name}.train.evaluate_every"
            steps = train.get("steps")
            words = words_without(words, key)
            words.append(f"{key}={max(1, steps // 8) if isinstance(steps, int) else 50}")
    return why, command_line([*words, f"seed={run.seed}"])


# --- curves ----------------------------------------------------------------------------------------------------------


def _drift(entry: Entry) -> _Drift | None:
    read = [_curves(run) for run in entry.runs.values()]
    seeds = [curves for curves, _ in read if any(len(curves[role]) > 1 for role in ROLES)]
    if not seeds:
        return None
    begins = next(begins for curves, begins in read if curves is seeds[0])
    means = {}
    for name in seeds[0]:
        # A seed whose file was torn ends early; the mean of fewer seeds would jump there.
        steps = sorted(set.intersection(*(set(curves[name]) for curves in seeds)))
        means[name] = {step: _over_seeds([curves[name][step] for curves in seeds]) for step in steps}
    return _Drift(entry, means, len(seeds), begins) if any(means[role] for role in ROLES) else None


def _over_seeds(values: Sequence[float]) -> Interval:
    if len(values) > _FEW:
        return t_interval(values)
    if len(values) == 1:
        return Interval(values[0], float("nan"), float("nan"))
    return Interval(float(np.mean(values)), min(values), max(values))


def _curves(run: Run) -> tuple[dict[str, _Curve], tuple[int, ...]]:
    """Changes since the first step of the first phase, by name; and the steps at which later phases begin.

    The log counts changes from the beginning of each phase: what the phases before changed is added. A phase that made
    y_gen anew has other generated answers: theirs end there.
    """
    curves: dict[str, _Curve] = {name: {} for role in ROLES for name in (role, f"{role}_per_token")}
    accuracy: _Curve = {}
    settings: Mapping[str, Any] = run.settings.get("phases") or {}
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(run.path / "metrics.jsonl"):
        if isinstance(row.get("step"), int) and any(key.startswith("eval/") for key in row):
            by_phase.setdefault(str(row.get("phase")), []).append(row)
    begins = []
    for place, (phase, rows) in enumerate(by_phase.items()):
        begins.append(int(rows[0]["step"]))
        remade = place > 0 and (settings.get(phase) or {}).get("reference") == "previous"
        for row in rows:
            if (value := number_in(row, f"eval/{_ACCURACY}")) is not None:
                accuracy[row["step"]] = value
        for name, curve in curves.items():
            broken = place > 0 and begins[-1] not in curve
            if broken or (remade and name.startswith("generated")) or f"eval/logps/{name}" not in rows[0]:
                continue
            start = curve.get(begins[-1], 0.0)
            curve[begins[-1]] = start
            for row in rows:
                if (change := number_in(row, f"eval/logps_change/{name}")) is not None:
                    curve[row["step"]] = start + change
    return {**curves, _ACCURACY: accuracy}, tuple(begins[1:])


def _table(drifts: Sequence[_Drift]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for one in drifts:
        for role in ROLES:
            tokens, accuracy = one.curves[f"{role}_per_token"], one.curves[_ACCURACY]
            rows += [
                (one.entry.label, role, step, one.n_seeds, change, tokens.get(step), accuracy.get(step))
                for step, change in one.curves[role].items()
            ]
    return Table(
        "drift",
        "Change of held-out log-probs since step 0",
        (
            Column("configuration", code=True), Column("answers"), Column("step"), Column("seeds"),
            Column("nats an answer", 2, sign=True), Column("nats a token", sign=True), Column("held-out accuracy"),
        ),
        tuple(rows),
        f"Means over seeds; in brackets the least and the greatest of 2 to {_FEW} seeds, a 95 % t interval of more.",
    )  # fmt: skip


# --- figure ----------------------------------------------------------------------------------------------------------


def _draw(drifts: Sequence[_Drift], width: float) -> Figure:
    from matplotlib.lines import Line2D

    beside = min(len(drifts), 4 if width >= WIDE else 2)
    blocks = -(-len(drifts) // beside)
    inches = (width - 0.6) / beside - 0.15
    titles = [heading(one.entry.label, inches) for one in drifts]
    most_lines = max(title.count("\n") + 1 for title in titles)
    figure = new_figure(width, 0.65 + blocks * (2.9 + 0.15 * most_lines))
    heights = [2.0, 1.0] * blocks
    panels = figure.subplots(2 * blocks, beside, sharex=True, squeeze=False, height_ratios=heights)
    for at, (one, title) in enumerate(zip(drifts, titles, strict=True)):
        block, column = divmod(at, beside)
        above, below = panels[2 * block, column], panels[2 * block + 1, column]
        for look, name in enumerate(ROLES):
            _line(above, one, name, look)
        _line(below, one, _ACCURACY, 0)
        above.set_title(title, loc="left", fontsize=9)
        for axes, label in ((above, "change, nats an answer"), (below, "accuracy")):
            grid(axes)
            axes.tick_params(labelleft=column == 0, labelbottom=axes is below)
            if column == 0:
                axes.set_ylabel(label)
            for step in one.begins:
                axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        above.axhline(0, color=MUTED, linewidth=0.8, zorder=1.5)
        below.set_xlabel("training step")
    for row in range(2):
        _same_height([panels[2 * block + row, at] for block in range(blocks) for at in range(beside)])
    for empty in range(len(drifts), blocks * beside):
        for row in range(2):
            panels[2 * (empty // beside) + row, empty % beside].set_visible(False)
    handles: list[Artist] = [
        Line2D([], [], color=MUTED, linestyle=DASHES[look], marker=MARKERS[look], markersize=4.5, linewidth=1.3)
        for look in range(3)
    ]
    texts = [f"{role} answers" for role in ROLES]
    if any(one.begins for one in drifts):
        handles.append(Line2D([], [], color=MUTED, linewidth=0.8, linestyle=(0, (1, 2))))
        texts.append("next phase begins")
    legend(figure, handles, texts)
    return figure


def _line(axes: Axes, one: _Drift, name: str, look: int) -> None:
    """A curve with its band; its kind of line says which answers, its colour which entry."""
    curve, shade = one.curves[name], colour(one.entry.place)
    if not curve:
        return
    steps = list(curve)
    if one.n_seeds > 1:
        axes.fill_between(
            steps, [curve[step].low for step in steps], [curve[step].high for step in steps],
            color=shade, alpha=0.2, linewidth=0, zorder=2,
        )  # fmt: skip
    axes.plot(
        steps, [curve[step].value for step in steps], color=shade, linestyle=DASHES[look], linewidth=1.3, zorder=3
    )
    # A mark for every step would be a band of marks.
    for step in {*steps[:: math.ceil(len(steps) / _MOST_MARKS)], steps[-1]}:
        value = curve[step]
        (dot,) = axes.plot(
            [step], [value.value], marker=MARKERS[look], markersize=4.5, color=shade, markeredgecolor="white",
            markeredgewidth=0.5, zorder=4,
        )  # fmt: skip
        what = f"accuracy {shown(value)}" if name == _ACCURACY else f"{name} {shown(value, 2, '+')} nats an answer"
        tip(dot, f"{one.entry.label}, step {step}: {what}")


def _same_height(panels: Sequence[Axes]) -> None:
    used = [axes for axes in panels if axes.lines]
    limits = [axes.get_ylim() for axes in used]
    for axes in used:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
