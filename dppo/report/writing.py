"""A report and the files beside it: every figure as PNG and SVG, every table as CSV, Markdown and LaTeX."""

from __future__ import annotations

import datetime
import io
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from dppo import __version__
from dppo.artifacts.files import disk_errors
from dppo.dotted import leaves
from dppo.evaluation.comparison import METRICS, shown_p
from dppo.progress import Progress
from dppo.report import (
    cost,
    drift,
    edits,
    efficiency,
    frontier,
    hyperparameters,
    overoptimisation,
    paradigms,
    ranking,
    rewards,
)
from dppo.report.answers import choose
from dppo.report.drawing import NARROW, RC, WIDE
from dppo.report.evidence import NAMES, Entry, Evidence, Group, again, answers_of_policy, shown
from dppo.report.page import Card, Page, Settings, render
from dppo.report.panel import Panel
from dppo.report.studies import part
from dppo.report.svg import inline
from dppo.report.table import Cell, Column, Table

PAGE = "report.html"
_DPI = 160
_MOST_COMMANDS = 300
_OWN = (PAGE, "figures", "tables")


def write(evidence: Evidence, directory: Path, *, title: str) -> Path:
    """Write the report into ``directory`` and return its page; an older one there is replaced when this one is whole.

    Raises UserError if the directory can't be written to.
    """
    new = not directory.exists()
    with disk_errors(directory), ExitStack() as undo:
        directory.mkdir(parents=True, exist_ok=True)
        if new:  # an interrupted report leaves nothing
            undo.callback(directory.rmdir)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=directory) as scratch:
            made = Path(scratch)
            page = _page(evidence, made, title)
            for table in page.tables():
                for kind, text in (("csv", table.csv()), ("md", table.markdown()), ("tex", table.latex())):
                    _text(made / "tables" / f"{table.name}.{kind}", text)
            _text(made / PAGE, render(page))
            undo.pop_all()
            for name in _OWN:
                _replace(made / name, directory / name)
    return directory / PAGE


def _text(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    # What a run's words hold may be no Unicode at all.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def _replace(made: Path, place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    if made.exists():
        os.replace(made, place)


# --- parts -----------------------------------------------------------------------------------------------------------


def _panels(evidence: Evidence) -> list[Panel]:
    first = evidence.groups[0]

    def whichever(find: Callable[[Group], object]) -> Group:
        """The group with the most configurations of those that have what a part shows; else the first."""
        return max((group for group in evidence.groups if find(group)), key=lambda one: len(one.entries), default=first)

    return [
        hyperparameters.panel(whichever(hyperparameters.find)),
        paradigms.panel(first),
        efficiency.panel(whichever(efficiency.find)),
        rewards.panel(first),
        ranking.panel(first),
        drift.panel(first),
        frontier.panel(first),
        overoptimisation.panel(first),
        edits.panel(first),
        cost.panel(evidence),
    ]


def _page(evidence: Evidence, made: Path, title: str) -> Page:
    from matplotlib import style

    first = evidence.groups[0]
    panels = _panels(evidence)
    drawn = []
    with style.context(["default", RC]), Progress("report", len(panels), "figure") as bar:
        for panel in panels:
            drawn.append((panel, _figures(panel, made / "figures")))
            bar.advance()
    settings = _settings(first)
    return Page(
        title=title,
        subtitle=_subtitle(evidence),
        warnings=_warnings(evidence),
        cards=_cards(first),
        panels=tuple(drawn),
        studies=tuple(part(study, place) for place, study in enumerate(evidence.studies)),
        comparisons=tuple(_comparison(group, place) for place, group in enumerate(evidence.groups)),
        runs=_runs(evidence),
        left_out=Table(
            "left_out",
            "Left out of every comparison",
            (Column("run", code=True), Column("status"), Column("why")),
            tuple((_place(one.path, evidence.root), one.status, one.why) for one in evidence.left_out),
        ),
        answers=choose(first),
        settings=settings,
        settings_table=Table(
            "settings",
            "Settings that differ",
            (Column("configuration", code=True), *(Column(key, digits=-1, code=True) for key in settings.keys)),
            tuple((label, *values) for label, values in zip(settings.labels, settings.values, strict=True)),
        ),
        commands=_commands(evidence),
        footer=f"dppo {__version__}, {datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
    )


def _figures(panel: Panel, folder: Path) -> tuple[tuple[str, str], ...]:
    if panel.draw is None:
        return ()
    folder.mkdir(exist_ok=True)
    found = []
    for kind, width in (("wide", WIDE), ("narrow", NARROW)):
        figure = panel.draw(width)
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # laid out once, for all files; with any engine each would be drawn twice
        found.append((kind, inline(figure, f"{panel.name}-{kind}")))
        if kind == "wide":
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                data = io.BytesIO()
                figure.savefig(data, format=suffix, dpi=_DPI, metadata=metadata, facecolor="white")
                (folder / f"{panel.name}.{suffix}").write_bytes(data.getvalue())
    return tuple(found)


def _subtitle(evidence: Evidence) -> tuple[str, ...]:
    lines = []
    for group in evidence.groups:
        runs = sum(len(entry.configuration.runs) for entry in group.entries)
        seeds = {seed for entry in group.entries for seed in entry.configuration.runs}
        told = ", ".join(map(str, sorted(seeds)))
        lines.append(
            f"{_several(len(group.entries), 'configuration')}, {_several(runs, 'run')}, "
            f"{_several(len(seeds), 'seed')} ({told}), {group.title}"
        )
    return tuple(lines)


def _warnings(evidence: Evidence) -> tuple[str, ...]:
    lines = []
    for group in evidence.groups:
        references = {
            run.result["models"]["reference"]
            for one in group.entries
            for run in one.runs.values()
            if "models" in run.result
        }
        if len(references) > 1:
            lines.append(
                f"The runs on {group.title} were measured against {len(references)} different SFT models: their win "
                "rates do not share a scale; the win-rate matrix compares their answers directly."
            )
        if all(len(entry.line.seeds) == 1 for entry in group.entries):
            lines.append(
                f"One seed each on {group.title}: the intervals hold for these trained models, not for the methods."
            )
    if evidence.left_out:
        kinds = Counter(one.status for one in evidence.left_out)
        told = ", ".join(f"{count} {status}" for status, count in kinds.items())
        lines.append(f"Left out: {told}; the end of the page says which and why.")
    return tuple(lines)


def _cards(group: Group) -> tuple[Card, ...]:
    best, base = group.best, group.baseline
    name = NAMES[group.metric]
    among = f" of {len(group.entries)}" if len(group.entries) > 1 else ""
    cards = [_card(f"Best {name}{among}", best)]
    other = best
    if best is not base:
        cards.append(_card("Baseline", base))
    elif len(group.entries) > 1:
        other = group.entries[1]
        cards.append(_card("Next, behind the baseline", other))
    if (difference := other.line.difference) is not None:
        clear = difference.low > 0 or difference.high < 0
        cards.append(
            Card(
                "Best minus baseline" if other is best else "Next minus baseline",
                f"{difference.value:+.3f}",
                f"[{difference.low:+.3f}, {difference.high:+.3f}], p {_equals(shown_p(other.line.p))} (Holm)"
                + ("" if clear else ": they can't be told apart"),
            )
        )
    if (kl := best.number("kl.nats_per_answer")) is not None:
        cards.append(Card("KL of the best to SFT", f"{kl.value:.2f}", f"nats an answer, {answers_of_policy(best)}"))
    return tuple(cards)


def _card(name: str, entry: Entry) -> Card:
    value, bounds = shown(entry.value).partition(" ")[::2]
    seeds = len(entry.line.seeds)
    return Card(name, value, f"{bounds}, n = {entry.line.n:,} x {seeds} seed{'s' if seeds > 1 else ''}: {entry.label}")


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _equals(p: str) -> str:
    return p if p.startswith("<") else f"= {p}"


def _comparison(group: Group, place: int) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for entry in group.entries:
        seeds = f"{len(entry.line.seeds)} ({', '.join(map(str, entry.line.seeds))})"
        diverged = f" ({len(entry.line.diverged)} diverged)" if entry.line.diverged else ""
        rows.append(
            (
                entry.label, entry.value, entry.line.difference, shown_p(entry.line.p),
                entry.line.n_common if entry.line.difference is not None else None, entry.line.n,
                seeds + diverged, entry.method, entry.mean_reward() if entry.measured else None,
                entry.number("kl.nats_per_answer"),
                entry.number("length.policy.tokens"), entry.number("held_out.accuracy"),
            )
        )  # fmt: skip
    several = any(len(entry.line.seeds) > 1 for entry in group.entries)
    return Table(
        f"configurations_{place}",
        group.title[0].upper() + group.title[1:],
        (
            Column("configuration", code=True), Column(group.name), Column("difference", sign=True), Column("p"),
            Column("over seeds"), Column("n"), Column("seeds"), Column("method"), Column("reward"),
            Column("KL, nats an answer", digits=2), Column("answer tokens", digits=1), Column("held-out accuracy"),
        ),
        tuple(rows),
        f"{METRICS[group.metric]}; 95 % intervals over seeds and prompts. Differences are to {group.baseline.label}, "
        "paired over the seeds that both have, with simultaneous 95 % intervals (Bonferroni's); p is Holm's over all "
        "comparisons of this table. Fewer than five seeds make both too confident about other seeds."
        + (" KL, tokens and accuracy: means over seeds with their range." if several else ""),
    )  # fmt: skip


def _runs(evidence: Evidence) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for group in evidence.groups:
        for entry in group.entries:
            for seed, run in sorted(entry.configuration.runs.items()):
                found = leaves(run.result)
                numbers = [found.get(path) for path in _RUN_NUMBERS.values()]
                rows.append((entry.label, seed, run.status, group.split, *numbers, _place(run.path, evidence.root)))
    return Table(
        "runs",
        "Runs",
        (
            Column("configuration", code=True), Column("seed"), Column("status"), Column("split"),
            *(Column(name, digits=1 if name in ("tokens", "seconds") else 3) for name in _RUN_NUMBERS),
            Column("directory", code=True),
        ),
        tuple(rows),
    )  # fmt: skip


_RUN_NUMBERS = {
    "win rate": "win_rate.value",
    "low": "win_rate.ci_low",
    "high": "win_rate.ci_high",
    "strict": "win_rate.strict",
    "n": "win_rate.n",
    "reward": "reward.policy.value",
    "SFT's": "reward.reference.value",
    "negative": "reward.negative_share.policy",
    "KL, nats an answer": "kl.nats_per_answer",
    "tokens": "length.policy.tokens",
    "held-out accuracy": "held_out.accuracy",
    "seconds": "timings.total_seconds",
}


def _place(path: Path, root: Path) -> str:
    try:
        return str(path.resolve().relative_to(root.resolve()))
    except ValueError:
        return str(path)


def _settings(group: Group) -> Settings:
    entries = group.entries
    keys = group.varying
    flat = [entry.flat for entry in entries]
    values = tuple(tuple(_setting(one[key]) if key in one else None for key in keys) for one in flat)
    second = group.entries.index(group.baseline) if group.baseline is not group.best else min(1, len(entries) - 1)
    return Settings(tuple(entry.label for entry in entries), keys, values, second)


def _setting(value: object) -> str:
    """A class by its own name, a number as one would type it."""
    if isinstance(value, str) and value.startswith("dppo."):
        return value.rpartition(".")[2]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _commands(evidence: Evidence) -> tuple[tuple[str, str], ...]:
    """A line a configuration that makes all of its seeds again."""
    return tuple((entry.label, again(entry)) for entry in evidence.entries)[:_MOST_COMMANDS]


def title_of(paths: Sequence[Path]) -> str:
    """What a report of these directories is called."""
    return f"dppo: {', '.join(path.name or str(path.resolve().name) for path in paths)}"
