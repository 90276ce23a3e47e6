"""A search as its directory shows it: its figures, its trials, and how far it can be trusted."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from dppo.report.svg import embedded
from dppo.report.table import Cell, Column, Table

# Those of the search that the report has no own figure for.
_FIGURES = {
    "history": "History of the search",
    "slices": "Every objective against every parameter",
    "contour": "Objective over two parameters",
    "interim": "What was measured during training",
    "pareto": "Pareto front",
    "timeline": "Which worker ran which trial",
}
_SUMMARY = "summary.txt"
_LARGEST = 1_500_000  # bytes of a figure


@dataclass(frozen=True)
class StudyPart:
    """What a page shows of one search."""

    name: str
    anchor: str
    summary: str
    figures: tuple[tuple[str, str], ...]
    table: Table | None
    lines: tuple[str, ...]


def part(directory: Path, place: int) -> StudyPart:
    """The search in ``directory``; what can't be read is left out and said to be."""
    anchor = f"search-{place}"
    lines, figures = [], []
    for name, title in _FIGURES.items():
        path = directory / "plots" / f"{name}.svg"
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > _LARGEST:
                raise ValueError("too large for a page")
            figures.append((title, embedded(path.read_text(encoding="utf-8"), f"{anchor}-{name}")))
        except (OSError, ValueError, RecursionError) as error:
            lines.append(f"{path} is not shown: {error}")
    summary = ""
    try:
        if (directory / _SUMMARY).is_file():
            summary = (directory / _SUMMARY).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        lines.append(f"{directory / _SUMMARY} can't be read: {error}")
    try:
        table = _trials(directory, anchor)
    except (OSError, ValueError, csv.Error) as error:
        table = None
        lines.append(f"{directory / 'trials.csv'} can't be read: {error}")
    return StudyPart(directory.name, anchor, summary, tuple(figures), table, tuple(lines))


def _trials(directory: Path, anchor: str) -> Table:
    with (directory / "trials.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = list(csv.reader(file))
    wanted = [at for at, name in enumerate(head) if name != "command"]
    columns = tuple(Column(head[at], digits=-1) for at in wanted)
    return Table(
        f"{anchor}-trials",
        f"Trials of {directory.name}",
        columns,
        tuple(tuple(_cell(row[at]) for at in wanted) for row in rows if len(row) == len(head)),
    )


def _cell(text: str) -> Cell:
    try:
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    except ValueError:
        return text or None
