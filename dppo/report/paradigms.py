"""Training paradigms: SFT, DPO, every family of losses and chained phases side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dppo.evaluation.comparison import shown_p
from dppo.evaluation.win_rates import Interval
from dppo.report.drawing import COLOURS, INK, MUTED, grid, legend, lines_of, new_figure, short, tip
from dppo.report.efficiency import n_pairs
from dppo.report.evidence import SFT, Entry, Group, phases, sentence, shown, words_without
from dppo.report.panel import Panel
from dppo.report.table import Column, Table
from dppo.results import command_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST = 24
_KINDS = {
    SFT: (MUTED, ""),
    "DPO": (COLOURS[0], ""),
    "other losses": (COLOURS[5], ""),
    "penalty on y_gen": (COLOURS[1], "//"),
    "chained phases": (COLOURS[2], "\\\\"),
}


def panel(group: Group) -> Panel:
    """One bar a family: the best of its configurations."""
    families: dict[str, list[Entry]] = {}
    for entry in group.entries:
        families.setdefault(entry.method, []).append(entry)
    # More data is another paradigm's advantage: the best of those that trained on as much as the baseline.
    size = n_pairs(group.baseline)
    equal = {
        name: [one for one in members if n_pairs(one) in (size, None)] or members for name, members in families.items()
    }
    best = sorted((members[0] for members in equal.values()), key=lambda entry: -entry.value.value)[:_MOST]
    chosen = sum(len(members) > 1 for members in equal.values())
    unequal = sum(n_pairs(entry) not in (size, None) for entry in best)
    what = "training paradigm" if len(best) == 1 else "training paradigms"
    lead = f"{sentence(group.name)} of {len(best)} {what} on {group.title}; whiskers are 95 % intervals."
    if chosen:
        lead += (
            f" {chosen} of them had several configurations and show their best, chosen on these very prompts: that "
            "flatters those with many. Its name stands below."
        )
    if any(len(equal[name]) < len(families[name]) for name in families):
        lead += f" Only configurations trained on {size:,} examples, as many as the baseline, are meant."
    if unequal:
        lead += f" {unequal} of them trained on another number of examples than the baseline."
    rows = tuple(
        (
            entry.method, entry.label, len(equal[entry.method]), len(entry.line.seeds), entry.line.n, entry.value,
            entry.line.difference, shown_p(entry.line.p),
        )
        for entry in best
    )  # fmt: skip
    table = Table(
        "paradigms",
        "Training paradigms",
        (
            Column("paradigm"), Column("configuration", code=True), Column("of configurations"), Column("seeds"),
            Column("n"), Column(group.metric), Column("difference", sign=True), Column("p"),
        ),
        rows,
        f"95 % intervals over seeds and prompts; differences are to {group.baseline.label}, paired and simultaneous, p "
        "is Holm's.",
    )  # fmt: skip
    missing, command = _missing(group, families)
    return Panel(
        "paradigms",
        "Training paradigms",
        lead,
        lambda width: _draw(group, best, {entry: len(equal[entry.method]) for entry in best}, width),
        "; ".join(f"{entry.method} {shown(entry.value)}" for entry in best),
        (table,),
        missing,
        command,
    )


def _missing(group: Group, families: dict[str, list[Entry]]) -> tuple[str, str]:
    kept = words_without(group.baseline.run.words, "loss", "alpha", "seed", "penalty", "sweep", "experiment")
    if "DPO" not in families:
        return "DPO is not among these runs", _command(kept, "loss=dpo")
    if len(families) == 1:
        return "there is nothing to compare with", _command(kept, "loss=dpo,unll")
    if not any("\N{RIGHTWARDS ARROW}" in name for name in families):
        return "no chained phases are among these runs", "python -m dppo -m +sweep=training_paradigms"
    return "", ""


def _command(kept: Sequence[str], word: str) -> str:
    return command_line([*kept, word, "seed=0,1,2", "-m"])


def _kind(entry: Entry) -> str:
    if entry.is_sft or entry.method == "DPO":
        return entry.method
    if "\N{RIGHTWARDS ARROW}" in entry.method:
        return "chained phases"
    _, _, phase = phases(entry.settings)[0]
    return "penalty on y_gen" if "penalty" in (phase.get("loss") or {}) else "other losses"


def _draw(group: Group, best: Sequence[Entry], of: Mapping[Entry, int], width: float) -> Figure:
    letters = 20 if width < 5 else 34
    names = [lines_of(entry.method, letters) for entry in best]
    for at, entry in enumerate(best):
        if of[entry] > 1:
            names[at] += f"\n{short(entry.label, letters - 10)}, best of {of[entry]}"
    rows = len(best)
    if group.metric == "win_rate" and not any(entry.is_sft for entry in best):
        names.append(f"{SFT}\n(by construction)")
    height = 0.9 + sum(0.17 + 0.15 * (name.count("\n") + 1) for name in names)
    figure = new_figure(width, height)
    axes = figure.subplots()
    grid(axes, "x")
    seen = {}
    for at, entry in enumerate(best):
        value, kind = entry.value, _kind(entry)
        shade, hatch = _KINDS[kind]
        (bar,) = axes.barh(at, value.value, height=0.68, color=shade, hatch=hatch, edgecolor="white", linewidth=0)
        tip(bar, entry.told())
        seen[kind] = bar
        axes.hlines(at, value.low, value.high, colors=[INK], linewidth=1.3, zorder=4)
        axes.plot([value.low, value.high], [at, at], "|", color=INK, markersize=6, zorder=4)
        _number(axes, at, value)
    if len(names) > rows:
        seen[SFT] = axes.barh(rows, 0.5, height=0.68, color=_KINDS[SFT][0], edgecolor="white", linewidth=0)[0]
        _number(axes, rows, Interval(0.5, 0.5, 0.5))
    if group.metric == "win_rate":
        axes.axvline(0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=3)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    # Room for the numbers, on both sides if some are negative.
    axes.margins(x=0.14 if all(entry.value.value >= 0 for entry in best) else 1.4 / width)
    axes.set_xlabel(group.name)
    if len(seen) > 1:
        kinds = [kind for kind in _KINDS if kind in seen]
        legend(figure, [seen[kind] for kind in kinds], kinds)
    return figure


def _number(axes: Axes, at: int, value: Interval) -> None:
    """The value behind the end of its bar, which a negative one has on the left."""
    left = value.value < 0
    x, offset = (value.low, -5) if left else (value.high, 5)
    axes.annotate(
        f"{value.value:.3f}", (x, at), (offset, 0), textcoords="offset points", va="center",
        ha="right" if left else "left",
    )  # fmt: skip
