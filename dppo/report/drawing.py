"""How the report's figures look: for a page or a phone, on light or dark, in colour or grey.

Colours are those of Okabe and Ito without their yellow; whatever has a colour has a marker or a dash of its own too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dppo.evaluation.win_rates import Interval
from dppo.search.plot_axes import is_number, plain, wrapped

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 7.2, 3.7  # inches: a page, a phone
RC: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "dppo",  # identifiers in the file are random without it
}
# Black on paper; a page shows these three in the colours of its theme.
INK, MUTED, GRID = "#000000", "#737373", "#ededed"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))
TIP = "tip:"


def colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def marker(place: int) -> str:
    return MARKERS[place % len(MARKERS)]


def dashes(place: int) -> Any:
    """A new kind of line where the colours begin again."""
    return DASHES[place // len(COLOURS) % len(DASHES)]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of ``width`` x ``height`` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    FigureCanvasAgg(figure)
    return figure


def tip(artist: Artist, text: str) -> None:
    """What a page shows while one points at ``artist``."""
    artist.set_gid(f"{TIP}{text}")


def point(axes: Axes, x: float, y: Interval, place: int, text: str, *, best: bool = False, size: float = 6) -> None:
    """One measured value with its interval."""
    shade = colour(place)
    if is_number(y.low) and is_number(y.high):
        axes.vlines(x, y.low, y.high, colors=[shade], linewidth=1.1, zorder=3)
    shape, size = ("*", size * 2.2) if best else (marker(place), size)
    (dot,) = axes.plot(
        [x],
        [y.value],
        marker=shape,
        markersize=size,
        color=shade,
        markeredgecolor="white",
        markeredgewidth=0.8,
        zorder=4,
    )
    tip(dot, text)


def reference_line(axes: Axes, value: Interval, label: str, place: int) -> None:
    """A level to compare with, across the whole panel, with its interval."""
    (line,) = axes.plot(
        [0, 1], [value.value] * 2, transform=axes.get_yaxis_transform(), color=MUTED, linestyle=DASHES[1 + place % 3],
        linewidth=1.2, label=label, zorder=1.5,
    )  # fmt: skip
    tip(line, label)
    if is_number(value.low) and is_number(value.high):
        axes.axhspan(value.low, value.high, color=MUTED, alpha=0.14, linewidth=0, zorder=0.5)


def legend(figure: Figure, handles: Sequence[Artist], texts: Sequence[str]) -> None:
    """What the marks mean, below the panels, in as many columns as fit."""
    shown = [short(text, 44) for text in texts]
    if not shown:
        return
    width = float(figure.get_figwidth())
    columns = max(1, min(len(shown), int(width / (0.55 + 0.068 * max(map(len, shown))))))
    figure.legend(list(handles), shown, loc="outside lower center", ncols=columns, frameon=False)


def heading(text: str, inches: float, most_lines: int = 3) -> str:
    """A user's words as the title of a panel ``inches`` wide."""
    width = max(10, int(11 * inches))
    most = width * most_lines
    return wrapped(text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}", width)


def short(text: str, most: int) -> str:
    """A user's words, at most so long, and not taken for a formula."""
    return plain(text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}")


def lines_of(text: str, width: int) -> str:
    """A user's words in lines of about ``width`` letters."""
    return plain("\n".join(textwrap.wrap(text, width, break_long_words=True) or [""]))


def grid(axes: Axes, which: str = "y") -> None:
    axes.grid(axis=which, color=GRID, linewidth=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
