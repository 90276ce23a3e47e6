"""Training paradigms: SFT, DPO, every family of losses and chained phases side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dppo.evaluation.comparison import METRICS, shown_p
from dppo.report.drawing import INK, MUTED, colour, grid, lines_of, new_figure, tip
from dppo.report.evidence import SFT, Entry, Group, shown
from dppo.report.panel import Panel
from dppo.report.table import Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 24
# SFT hatched, what begins with DPO plain, the rest striped: bars can be told apart in grey.
_HATCHES = ("", "///", "\\\\\\", "...", "xxx", "---", "ooo")


def panel(group: Group) -> Panel:
    """One bar a family: the best of its configurations."""
    families: dict[str, list[Entry]] = {}
    for entry in group.entries:
        families.setdefault(entry.method, []).append(entry)
    best = [members[0] for members in families.values()][:_MOST]  # entries come best first
    chosen = sum(len(members) > 1 for members in families.values())
    lead = f"The {METRICS[group.metric]} of {len(best)} training paradigms on {group.title}; whiskers are 95 % intervals."
    if chosen:
        lead += (
            f" A family with several configurations ({chosen} here) shows its best one, chosen on these very prompts: "
            "that flatters families with many."
        )
    rows = tuple(
        (
            entry.method, entry.label, len(families[entry.method]), len(entry.line.seeds), entry.line.n, entry.value,
            entry.line.difference, shown_p(entry.line.p),
        )
        for entry in best
    )  # fmt: skip
    table = Table(
        "paradigms",
        "Training paradigms",
        (
            Column("paradigm"), Column("configuration", code=True), Column("of configurations"), Column("seeds"),
            Column("n"), Column(group.metric), Column(f"difference to {group.baseline.label}", sign=True), Column("p"),
        ),
        rows,
        "95 % intervals over seeds and prompts; differences are paired and simultaneous, p is Holm's.",
    )  # fmt: skip
    missing, command = _missing(group, families)
    return Panel(
        "paradigms",
        "Training paradigms",
        lead,
        lambda width: _draw(group, best, width),
        "; ".join(f"{entry.method} {shown(entry.value)}" for entry in best),
        (table,),
        missing,
        command,
    )


def _missing(group: Group, families: dict[str, list[Entry]]) -> tuple[str, str]:
    fixed = group.baseline.run.words
    kept = [word for word in fixed if word.partition("=")[0].lstrip("+") not in ("loss", "alpha", "seed", "penalty")]
    if SFT not in families and "DPO" not in families:
        return "neither SFT nor DPO is among these runs", _command(kept, "loss=none,dpo")
    if "DPO" not in families:
        return "DPO is not among these runs", _command(kept, "loss=dpo")
    if len(families) == 1:
        return "there is nothing to compare with", _command(kept, "loss=dpo,unll")
    if not any("→" in name for name in families):
        return "no chained phases are among these runs", "python -m dppo -m +sweep=training_paradigms"
    return "", ""


def _command(kept: Sequence[str], word: str) -> str:
    return " ".join(["python -m dppo", *kept, word, "seed=0,1,2", "-m"])


def _draw(group: Group, best: Sequence[Entry], width: float) -> Figure:
    names = [lines_of(entry.method, 20 if width < 5 else 34) for entry in best]
    height = 0.6 + sum(0.2 + 0.16 * (name.count("\n") + 1) for name in names)
    figure = new_figure(width, height)
    axes = figure.subplots()
    grid(axes, "x")
    for at, entry in enumerate(best):
        value = entry.value
        (bar,) = axes.barh(
            at, value.value, height=0.66, color=colour(0) if not entry.is_sft else MUTED, alpha=0.85,
            hatch=_HATCHES[min(entry.method.count("→") * 2 + (entry.method not in (SFT, "DPO")), 6)], edgecolor="white",
        )  # fmt: skip
        tip(bar, entry.told())
        axes.hlines(at, value.low, value.high, colors=[INK], linewidth=1.3, zorder=4)
        axes.plot([value.low, value.high], [at, at], "|", color=INK, markersize=6, zorder=4)
        axes.annotate(
            f"{value.value:.3f}", (max(value.high, value.value), at), (5, 0), textcoords="offset points", va="center"
        )
    if group.metric == "win_rate":
        axes.axvline(0.5, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=3)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.14)
    axes.set_xlabel(METRICS[group.metric])
    return figure
