"""Tables of a report: one set of rows as a page, CSV, Markdown and LaTeX show it."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass

from dppo.evaluation.comparison import shown_interval
from dppo.evaluation.win_rates import Interval

Cell = str | int | float | Interval | None
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


@dataclass(frozen=True)
class Column:
    """``digits`` are those behind the point, ``sign`` shows a plus, ``code`` is for what can be pasted."""

    name: str
    digits: int = 3
    sign: bool = False
    code: bool = False

    def text(self, cell: Cell) -> str:
        """A cell as one reads it; nothing for what is not known."""
        plus = "+" if self.sign else ""
        if cell is None:
            return ""
        if isinstance(cell, Interval):
            if math.isnan(cell.low) or math.isnan(cell.high):
                return self.text(cell.value)
            return shown_interval(cell, plus, self.digits)
        if isinstance(cell, float):
            if not math.isfinite(cell):
                return "" if math.isnan(cell) else f"{cell:{plus}}"
            # Rates of learning and strengths of penalties span powers of ten.
            return f"{cell:{plus}.{self.digits}f}" if self.digits >= 0 else f"{cell:{plus}g}"
        return str(cell)


def number_of(cell: Cell) -> float | None:
    """What a cell is sorted by; None for text and for what is not known."""
    value = cell.value if isinstance(cell, Interval) else cell
    if not isinstance(value, (int, float)) or math.isnan(value):
        return None
    return float(value)


@dataclass(frozen=True)
class Table:
    """Rows of equally many cells; ``name`` is that of its files, ``note`` says how its numbers were made."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def csv(self) -> str:
        """Numbers in full; an interval takes three columns."""
        spans = [any(isinstance(row[at], Interval) for row in self.rows) for at in range(len(self.columns))]
        text = io.StringIO()
        write = csv.writer(text, lineterminator="\n").writerow
        headings = []
        for column, wide in zip(self.columns, spans, strict=True):
            headings += [column.name, f"{column.name} low", f"{column.name} high"] if wide else [column.name]
        write(headings)
        for row in self.rows:
            cells: list[str] = []
            for cell, wide in zip(row, spans, strict=True):
                if not wide:
                    cells.append(_plain(cell))
                elif isinstance(cell, Interval):
                    cells += [_plain(cell.value), _plain(cell.low), _plain(cell.high)]
                else:
                    cells += [_plain(cell), "", ""]
            write(cells)
        return text.getvalue()

    def markdown(self) -> str:
        """With a heading and the note."""

        def line(cells: list[str]) -> str:
            one_line = (re.sub(r"\s+", " ", cell).replace("|", r"\|") for cell in cells)
            return f"| {' | '.join(one_line)} |"

        lines = [f"**{self.title}**", "", line([column.name for column in self.columns])]
        lines.append(line(["---" if self._is_text(at) else "---:" for at in range(len(self.columns))]))
        lines += [
            line([column.text(cell) for column, cell in zip(self.columns, row, strict=True)]) for row in self.rows
        ]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"

    def latex(self) -> str:
        """A ``table`` for the package booktabs."""
        layout = "".join("l" if self._is_text(at) else "r" for at in range(len(self.columns)))
        rows = [[column.text(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]
        lines = [" & ".join(map(_latex, row)) + r" \\" for row in rows]
        caption = f"{self.title}. {self.note}" if self.note else self.title
        return "\n".join(
            [
                r"\begin{table}",
                r"  \centering",
                f"  \\caption{{{_latex(caption)}}}",
                f"  \\label{{tab:{self.name}}}",
                f"  \\begin{{tabular}}{{{layout}}}",
                r"    \toprule",
                f"    {' & '.join(_latex(column.name) for column in self.columns)} \\\\",
                r"    \midrule",
                *(f"    {line}" for line in lines),
                r"    \bottomrule",
                r"  \end{tabular}",
                r"\end{table}",
                "",
            ]
        )

    def _is_text(self, at: int) -> bool:
        return all(number_of(row[at]) is None for row in self.rows)


def _plain(cell: Cell) -> str:
    if isinstance(cell, float):
        return "" if math.isnan(cell) else f"{cell:.10g}"
    return "" if cell is None else _plain(cell.value) if isinstance(cell, Interval) else str(cell)


def _latex(text: str) -> str:
    found = "".join(_LATEX.get(sign, sign) for sign in text)
    return re.sub(r"(?<![\w.\]])-(?=\d)", "$-$", found)
