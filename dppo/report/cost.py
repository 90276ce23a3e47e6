"""Cost: what every stage took over all runs, and what the cache saved."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dppo.command_line import duration
from dppo.evaluation.runs import Run
from dppo.evaluation.win_rates import Interval
from dppo.report.drawing import INK, colour, grid, legend, new_figure, tip
from dppo.report.evidence import Entry, Evidence, again
from dppo.report.panel import Panel
from dppo.report.table import Cell, Column, Table
from dppo.search.plot_axes import is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_REST = "everything else"


@dataclass(frozen=True)
class _Item:
    """One stage of one run, as ``result.json`` tells it."""

    stage: str
    fingerprint: str
    seconds: float
    reused: bool


@dataclass
class _Stage:
    """Seconds of a stage over all runs: ``built`` of each time it was built, ``spent`` on looking it up too.

    ``saved`` is what building would have taken where it was reused: ``n_known`` times as the run took that built it,
    ``n_estimated`` times as long as this stage takes in the median; ``n_unknown`` times nobody knows.
    """

    spent: float = 0.0
    saved: float = 0.0
    built: list[float] = field(default_factory=list)
    n_known: int = 0
    n_estimated: int = 0
    n_unknown: int = 0

    @property
    def n_reused(self) -> int:
        return self.n_known + self.n_estimated + self.n_unknown


@dataclass
class _Run:
    entry: Entry
    seed: int
    run: Run
    items: list[_Item]
    saved: float = 0.0
    complete: bool = True  # whether all that it saved is known

    @property
    def spent(self) -> float:
        """Its total, which holds what no stage does too: start-up and the writing of files."""
        stages = sum(item.seconds for item in self.items)
        return max(stages, _seconds(_timings(self.run).get("total_seconds")) or 0.0)


def panel(evidence: Evidence) -> Panel:
    """Time by stage over all runs of all groups."""
    name, title = "cost", "Cost"
    runs = list(_runs(evidence.entries))
    timed = [one for one in runs if one.items]
    if not timed:
        command = again(runs[0].entry) if runs else ""
        return Panel(name, title, missing="no run recorded how long its stages took", command=command)
    stages = _stages(timed)
    spent, saved = sum(one.spent for one in timed), sum(one.saved for one in timed)
    lead = (
        f"{len(timed)} finished run{'s' if len(timed) > 1 else ''} took {duration(spent)} together, "
        f"{duration(spent / len(timed))} each on average."
    )
    lead += _on_savings(stages, spent, saved)
    return Panel(
        name,
        title,
        lead,
        lambda width: _draw(stages, width),
        "; ".join(f"{stage}: {_told(one)}" for stage, one in stages.items()),
        (_by_stage(stages), _by_run(timed)),
    )


def _on_savings(stages: dict[str, _Stage], spent: float, saved: float) -> str:
    known, estimated, unknown = (
        sum(getattr(one, name) for one in stages.values()) for name in ("n_known", "n_estimated", "n_unknown")
    )
    n = known + estimated + unknown
    if n == 0:
        return " Nothing was reused from the cache."
    least = "at least " if unknown else ""
    said = (
        f" The cache saved {least}{duration(saved)}: without it they would have taken {duration(spent + saved)}. "
        f"{n} stages were reused; {known} count as long as the run took that built them"
    )
    if estimated:
        said += f", {estimated} as long as that stage takes in the median, because no run here built them"
    if unknown:
        said += f", and {unknown} as nothing, because no run here built such a stage"
    return f"{said}. What a stage reused in part is not counted."


def _told(one: _Stage) -> str:
    unknown = f", {one.n_unknown} reused for an unknown time" if one.n_unknown else ""
    return f"{duration(one.spent)} spent, {duration(one.saved)} saved{unknown}"


# --- numbers ---------------------------------------------------------------------------------------------------------


def _timings(run: Run) -> dict[str, Any]:
    found = run.result.get("timings")
    return found if isinstance(found, dict) else {}


def _seconds(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and is_number(value) and value >= 0 else None


def _runs(entries: Iterable[Entry]) -> Iterable[_Run]:
    """Every run once, the diverged ones too: they took their time."""
    for entry in entries:
        for seed, run in sorted(entry.configuration.runs.items()):
            items = [
                _Item(str(item["stage"]), str(item.get("fingerprint")), seconds, bool(item.get("reused")))
                for item in _timings(run).get("stages") or ()
                if (seconds := _seconds(item.get("seconds"))) is not None
            ]
            yield _Run(entry, seed, run, items)


def _stages(runs: Sequence[_Run]) -> dict[str, _Stage]:
    """Sums by stage in the order of the pipeline; what each run saved is noted at the run."""
    built: dict[tuple[str, str], float] = {}
    stages: dict[str, _Stage] = {}
    # The run with the most stages tells their order best.
    for item in (item for one in sorted(runs, key=lambda one: -len(one.items)) for item in one.items):
        stage = stages.setdefault(item.stage, _Stage())
        stage.spent += item.seconds
        if not item.reused:
            stage.built.append(item.seconds)
            # A store grows: whoever reuses it is spared its longest part at least.
            key = item.stage, item.fingerprint
            built[key] = max(built.get(key, 0.0), item.seconds)
    for one in runs:
        for item in (item for item in one.items if item.reused):
            stage = stages[item.stage]
            if (known := built.get((item.stage, item.fingerprint))) is not None:
                stage.n_known += 1
                would = known
            elif stage.built:
                stage.n_estimated += 1
                would = statistics.median(stage.built)
            else:
                stage.n_unknown += 1
                one.complete = False
                continue
            # Looking it up took a moment as well.
            gained = max(0.0, would - item.seconds)
            stage.saved += gained
            one.saved += gained
    rest = sum(one.spent - sum(item.seconds for item in one.items) for one in runs)
    if rest > 0.05:
        stages[_REST] = _Stage(spent=rest)
    return stages


def _by_stage(stages: dict[str, _Stage]) -> Table:
    def build(one: _Stage) -> Cell:
        if not one.built:
            return None
        return Interval(statistics.median(one.built), min(one.built), max(one.built))

    rows: list[tuple[Cell, ...]] = [
        (
            name, one.spent, len(one.built), build(one), one.n_reused, one.saved, one.n_estimated or None,
            one.n_unknown or None,
        )
        for name, one in stages.items()
    ]  # fmt: skip
    every = list(stages.values())
    rows.append(
        (
            "total", sum(one.spent for one in every), sum(len(one.built) for one in every), None,
            sum(one.n_reused for one in every), sum(one.saved for one in every),
            sum(one.n_estimated for one in every) or None, sum(one.n_unknown for one in every) or None,
        )
    )  # fmt: skip
    return Table(
        "cost",
        "Time by stage",
        (
            Column("stage"), Column("spent, s", 1), Column("built"), Column("a build, s", 1), Column("reused"),
            Column("saved, s", 1), Column("of them estimated"), Column("of them unknown"),
        ),
        tuple(rows),
        "A build: the median, in brackets the least and the greatest. Estimated: no run here built that very one, the "
        "median build of the stage counts; unknown: there is none, and nothing counts.",
    )  # fmt: skip


def _by_run(runs: Sequence[_Run]) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            one.entry.label, one.seed, str(one.run.result.get("status")), one.spent,
            one.saved if one.complete or one.saved else None, sum(item.reused for item in one.items),
        )
        for one in runs
    ]  # fmt: skip
    return Table(
        "cost_runs",
        "Time by run",
        (
            Column("configuration", code=True), Column("seed"), Column("status"), Column("spent, s", 1),
            Column("saved, s", 1), Column("stages reused"),
        ),
        tuple(rows),
        "Seconds by the clock, on whatever machine and beside whatever else a run had to share it with. What is not "
        "known to be saved is not counted.",
    )  # fmt: skip


# --- figure ----------------------------------------------------------------------------------------------------------


def _draw(stages: dict[str, _Stage], width: float) -> Figure:
    from matplotlib.patches import Patch

    longest = max(one.spent + one.saved for one in stages.values())
    unit, name = (1, "seconds") if longest < 180 else (60, "minutes") if longest < 3 * 3600 else (3600, "hours")
    figure = new_figure(width, 0.95 + 0.33 * len(stages))
    axes = figure.subplots()
    grid(axes, "x")
    shade = colour(0)
    for at, (stage, one) in enumerate(stages.items()):
        (spent,) = axes.barh(at, one.spent / unit, height=0.62, color=shade, linewidth=0)
        tip(spent, f"{stage}: {duration(one.spent)} spent, built {len(one.built)} times")
        if one.saved > 0:
            (saved,) = axes.barh(
                at, one.saved / unit, left=one.spent / unit, height=0.62, facecolor="none", edgecolor=shade,
                hatch="////", linewidth=0.8,
            )  # fmt: skip
            tip(saved, f"{stage}: {duration(one.saved)} saved, reused {one.n_reused} times")
        axes.annotate(
            _beside(one), ((one.spent + one.saved) / unit, at), (5, 0), textcoords="offset points", va="center",
            fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(stages)), list(stages))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(stages) - 0.4, -0.6)
    # Room for the numbers at the ends, which a phone has less of.
    axes.set_xlim(0, (longest / unit or 1.0) * (1.75 if width < 5 else 1.28))
    axes.set_xlabel(f"time over all runs, {name}")
    handles = [Patch(facecolor=shade), Patch(facecolor="none", edgecolor=shade, hatch="////")]
    legend(figure, handles, ["spent", "saved by the cache"])
    return figure


def _beside(one: _Stage) -> str:
    parts = [duration(one.spent)]
    if one.saved > 0:
        parts.append(f"{duration(one.saved)} saved")
    if one.n_unknown:
        parts.append(f"{one.n_unknown} unknown savings")
    return " + ".join(parts)
