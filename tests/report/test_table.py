"""Tables as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import math

from dppo.evaluation.win_rates import Interval
from dppo.report.table import Cell, Column, Table, number_of

ROWS: tuple[tuple[Cell, ...], ...] = (
    ("loss=dpo | a_b & 5%", 1024, Interval(0.81234567, 0.79, 0.83), -0.5, None),
    ("<x> \\ ~^#{}$", 0, Interval(0.5, math.nan, math.nan), math.inf, "p"),
    ("two\nlines", None, None, math.nan, 'q, "r"'),
)
TABLE = Table(
    "made",
    "A title & more",
    (Column("name", code=True), Column("n"), Column("win rate"), Column("difference", sign=True), Column("note")),
    ROWS,
    "A note.",
)


def test_csv_has_full_numbers_and_the_bounds_apart() -> None:
    rows = list(csv.reader(io.StringIO(TABLE.csv())))
    assert rows[0] == ["name", "n", "win rate", "win rate low", "win rate high", "difference", "note"]
    assert rows[1] == ["loss=dpo | a_b & 5%", "1024", "0.81234567", "0.79", "0.83", "-0.5", ""]
    assert rows[2] == ["<x> \\ ~^#{}$", "0", "0.5", "", "", "inf", "p"]
    assert rows[3] == ["two\nlines", "", "", "", "", "", 'q, "r"']


def test_markdown_rows_stay_rows() -> None:
    lines = TABLE.markdown().splitlines()
    assert lines[0] == "**A title & more**"
    assert lines[2] == "| name | n | win rate | difference | note |"
    assert lines[3] == "| --- | ---: | ---: | ---: | --- |"
    assert lines[4] == "| loss=dpo \\| a_b & 5% | 1024 | 0.812 [0.790, 0.830] | -0.500 |  |"
    assert lines[6] == '| two lines |  |  |  | q, "r" |'
    assert lines[-1] == "A note."


def test_latex_is_escaped() -> None:
    text = TABLE.latex()
    assert r"loss=dpo | a\_b \& 5\% & 1024 & 0.812 [0.790, 0.830] & $-$0.500 &  \\" in text
    assert r"\textless{}x\textgreater{} \textbackslash{} \textasciitilde{}\textasciicircum{}\#\{\}\$" in text
    assert r"\caption{A title \& more. A note.}" in text
    assert r"\begin{tabular}{lrrrl}" in text
    assert text.count(r"\\") >= 4 and text.count("{") == text.count("}")


def test_how_cells_are_read() -> None:
    assert Column("x", digits=1).text(2.0) == "2.0"
    assert Column("x", digits=-1).text(1e-5) == "1e-05"
    assert Column("x", sign=True).text(Interval(0.1, 0.0, 0.2)) == "+0.100 [+0.000, +0.200]"
    assert Column("x", digits=0).text(Interval(312.4, 290.6, 330.0)) == "312 [291, 330]"
    assert Column("x").text(math.nan) == "" and Column("x").text(None) == ""
    assert number_of(Interval(0.25, 0, 1)) == 0.25 and number_of("0.25") is None and number_of(math.nan) is None
