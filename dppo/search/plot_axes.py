"""Axes of a study's pictures: a parameter's range, values and a band for those without one, texts that do not meet."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from dppo.evaluation.win_rates import Interval
from dppo.search.settings import Direction
from dppo.search.space import Parameter, Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patheffects import AbstractPathEffect
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

Array = npt.NDArray[np.float64]

BAND = "0.93"
_FEWEST_FOR_CONTOUR = 6
LINE = 0.17  # inches between lines of small text
_LARGEST = 1e100  # what lies beyond overflows in the arithmetic of an axis


def is_number(value: float) -> bool:
    """Whether a value can be drawn."""
    return math.isfinite(value) and abs(value) < _LARGEST


def halo() -> list[AbstractPathEffect]:
    """A white border: what is drawn stays readable on lines and colours."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.4, foreground="white")]


def as_number(value: Value) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


# --- values ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """The axis of an objective: limits, ticks, and the height and the extent of the band of those without a value."""

    limits: tuple[float, float]
    ticks: tuple[float, ...]
    texts: tuple[str, ...]
    band: tuple[float, float] | None

    def at(self, value: float) -> float:
        """Where a value is drawn."""
        return value if is_number(value) or self.band is None else sum(self.band) / 2

    def apply(self, axes: Axes) -> None:
        axes.set_ylim(self.limits)
        axes.set_yticks(self.ticks, self.texts)
        if self.band is not None:
            axes.axhspan(*self.band, color=BAND, linewidth=0, zorder=0)


def value_scale(known: Sequence[Interval], direction: Direction) -> Scale:
    """An axis with all these values and their intervals; the band lies at the worst end."""
    from matplotlib.ticker import MaxNLocator

    numbers = [n for one in known for n in (one.value, one.low, one.high) if is_number(n)]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    pad = 0.06 * (high - low) if high - low > 1e-9 * max(abs(low), abs(high)) else 0.05 * (abs(high) or 1.0)
    low, high = low - pad, high + pad
    ticks = [float(tick) for tick in MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    ticks = [tick for tick in ticks if low <= tick <= high] if numbers else []
    texts = _tick_texts(ticks)
    band = None
    if not all(is_number(one.value) for one in known):
        depth = 0.13 * (high - low)
        if direction == "maximize":
            band = (low - depth, low)
            low -= depth
        else:
            band = (high, high + depth)
            high += depth
        ticks, texts = [*ticks, sum(band) / 2], [*texts, "no value"]
    return Scale((low, high), tuple(ticks), tuple(texts), band)


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """Ticks with as many decimals as tell them apart."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if not 1e-3 <= largest < 1e6:
        return [f"{tick:.4g}".replace("-", "\N{MINUS SIGN}") for tick in ticks]
    near = (ticks[1] - ticks[0] if len(ticks) > 1 else largest) / 100
    decimals = next((n for n in range(13) if all(abs(round(tick, n) - tick) < near for tick in ticks)), 13)
    return [f"{tick:.{decimals}f}".replace("-", "\N{MINUS SIGN}") for tick in ticks]


def colour_range(values: Sequence[float]) -> Any:
    """Colours from the least to the greatest value."""
    from matplotlib.colors import Normalize

    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.05 * (abs(low) or 1), high + 0.05 * (abs(high) or 1)
    return Normalize(low, high)


def whole_numbers(axes: Axes, numbers: Sequence[int], which: Literal["x", "y"] = "x") -> None:
    """Ticks at whole numbers; an x axis shows all of ``numbers``."""
    from matplotlib.ticker import MaxNLocator

    low, high = (min(numbers), max(numbers)) if numbers else (0, 0)
    if which == "x":
        axes.set_xlim(low - 0.7, high + 0.7)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


# --- parameters ------------------------------------------------------------------------------------------------------


def apply_range(axes: Axes, which: Literal["x", "y"], parameter: Parameter) -> None:
    """Give an axis the scale, the label and the range of ``parameter``; what lies beyond the range is grey."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    set_limits = axes.set_xlim if which == "x" else axes.set_ylim
    shade = axes.axvspan if which == "x" else axes.axhspan
    axis.set_label_text(wrapped(parameter.name, 26))
    if parameter.kind == "choice":
        texts = [plain(text if len(text) <= 24 else f"{text[:11]}…{text[-12:]}") for text in parameter.texts]
        steep = sum(map(len, texts)) > 24
        axis.set_ticks(
            range(len(texts)),
            texts,
            rotation=35 if steep else 0,
            ha="right" if steep else "center",
            rotation_mode="anchor",
        )
        set_limits(-0.5, len(texts) - 0.5)
        return
    low, high = parameter.low, parameter.high
    if parameter.log:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        pad = (high / low) ** 0.04 if low < high else 2.0
        limits = low / pad, high * pad
        axis.set_minor_locator(NullLocator())
        axis.set_major_locator(LogLocator(numticks=6))
        if high / low < 40:
            # Powers of ten would leave such an axis without two labels.
            tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            ticks = [tick for ten in tens for tick in (10.0**ten, 3 * 10.0**ten) if low <= tick <= high]
            axis.set_major_locator(FixedLocator(ticks if len(ticks) > 1 else sorted({low, high})))
            axis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    else:
        pad = 0.04 * (high - low) if low < high else 0.5
        limits = low - pad, high + pad
        axis.set_major_locator(MaxNLocator(4, integer=parameter.kind == "int", steps=[1, 2, 2.5, 5, 10]))
    for beyond in ((limits[0], low), (high, limits[1])):
        shade(*beyond, color=BAND, linewidth=0, zorder=0)
    set_limits(*limits)


def position(parameter: Parameter, value: Value, spread: float) -> float:
    """Where a value lies on the axis of a parameter; ``spread`` in [0, 1] tells equal choices apart."""
    if parameter.kind != "choice":
        return as_number(value)
    # True equals 1 and False 0: the kind of the value decides.
    same = (place for place, one in enumerate(parameter.choices) if type(one) is type(value) and one == value)
    return next(same, math.nan) + 0.4 * (spread - 0.5)


def share_of(parameter: Parameter, value: Value) -> float:
    """The place of a value in its range, 0 to 1 on its scale."""
    scale = math.log if parameter.log else float
    low, high = scale(parameter.low), scale(parameter.high)
    return (scale(as_number(value)) - low) / (high - low) if low < high else 0.0


def values_at(parameter: Parameter, shares: Array) -> Array:
    """(N,) the values at places in the range, 0 to 1 on its scale."""
    if parameter.log:
        return np.asarray(parameter.low * (parameter.high / parameter.low) ** shares)
    return parameter.low + (parameter.high - parameter.low) * shares


def interpolated(where: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[Array, Any, Array] | None:
    """Linear interpolation of (N,) values at (N, 2) places, which are given in the units of the picture.

    Fine places (M, 2), triangles of them, and their heights (M,); None if there are fewer than six values, or they lie
    on a line or are equal. Several values at one place count as their mean. The triangles are refined in these units:
    contours between two values would be bent on another scale.
    """
    from matplotlib.tri import LinearTriInterpolator, Triangulation, UniformTriRefiner

    points: dict[tuple[float, ...], list[float]] = {}
    for place, value in zip(where, values, strict=True):
        points.setdefault(tuple(place), []).append(value)
    places, heights = np.array(list(points)), np.array([np.mean(some) for some in points.values()])
    if len(values) < _FEWEST_FOR_CONTOUR or len(points) < 3 or np.ptp(heights) == 0:
        return None
    spread = np.linalg.svd(places - places.mean(0), compute_uv=False)
    if spread[1] < 1e-3 * spread[0]:
        return None
    coarse = Triangulation(places[:, 0], places[:, 1])
    fine, found = UniformTriRefiner(coarse).refine_field(heights, LinearTriInterpolator(coarse, heights), subdiv=4)
    # Rounding must not leave a point above the highest level.
    fitted = np.clip(np.asarray(found), heights.min(), heights.max())
    return np.stack([fine.x, fine.y], axis=1), fine.triangles, fitted


# --- texts that do not meet ------------------------------------------------------------------------------------------


def side_labels(axes: Axes, labels: Sequence[tuple[float, str, str]], height: float) -> None:
    """(value, text, colour) written at the right of a panel about ``height`` inches high, one below the other."""
    low, high = axes.get_ylim()
    rows = sorted(((value - low) / (high - low), wrapped(text, 22), colour) for value, text, colour in labels)
    sizes = [LINE * (text.count("\n") + 1) / (0.75 * height) for _, text, _ in rows]
    places = [share for share, _, _ in rows]
    for row in range(1, len(rows)):
        places[row] = max(places[row], places[row - 1] + (sizes[row - 1] + sizes[row]) / 2)
    ceiling = 1.0
    for row in reversed(range(len(rows))):
        places[row] = min(places[row], ceiling - sizes[row] / 2)
        ceiling = places[row] - sizes[row] / 2
    for (share, text, colour), place in zip(rows, places, strict=True):
        axes.annotate(
            text,
            (1.0, share),
            (1.04, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0},
        )


def point_labels(figure: Figure, axes: Axes, labels: Sequence[tuple[float, float, str]]) -> None:
    """Write (x, y, text) beside the points, where no point and no other text is; else at the freest place."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    dots = [axes.transData.transform((x, y)) for x, y, _ in labels]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in dots]
    frame = axes.get_window_extent()
    # Beside the lines of the intervals first.
    sides = [(dx, dy, "left" if dx > 0 else "right", "center") for dy in (9, -9) for dx in (6, -6)]
    sides += [(9, 0, "left", "center"), (-9, 0, "right", "center")]
    sides += [(0, 9, "center", "bottom"), (0, -9, "center", "top")]
    for x, y, text in labels:
        tries: list[tuple[float, int, Bbox, Annotation]] = []
        for order, (dx, dy, ha, va) in enumerate(sides):
            note = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=8, zorder=12
            )
            note.set_path_effects(halo())
            box = note.get_window_extent()
            outside = 0 if frame.containsx(box.x0) and frame.containsx(box.x1) else box.width * box.height
            outside += 0 if frame.containsy(box.y0) and frame.containsy(box.y1) else box.width * box.height
            tries.append((outside + sum(_overlap(box, other) for other in taken), order, box, note))
        tries.sort(key=lambda one: one[:2])
        taken.append(tries[0][2])
        for _, _, _, note in tries[1:]:
            note.remove()


def bar_labels(figure: Figure, axes: Axes, bars: Sequence[tuple[Any, str]]) -> None:
    """Write a text into each bar that is wide enough, above the others where that meets no other text."""
    figure.draw_without_rendering()
    above: list[Bbox] = []
    for bar, text in bars:
        x, y = bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        note = axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=box, zorder=5)
        if note.get_window_extent().width + 4 <= bar.get_window_extent().width:
            continue
        note.set(y=bar.get_y(), va="bottom", bbox=None)
        place = note.get_window_extent()
        if any(_overlap(place, other) for other in above):
            note.remove()
        else:
            above.append(place)


def _overlap(one: Bbox, other: Bbox) -> float:
    """The area that two rectangles share, in square pixels."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(max(width, 0.0) * max(height, 0.0))


# --- words -----------------------------------------------------------------------------------------------------------


def wrapped(text: str, width: int) -> str:
    """``text`` in lines of about ``width`` letters, broken behind a space or a joining sign if there is one."""
    lines = [""]
    for piece in re.findall(rf"[^\s._=,/-]{{1,{width}}}[\s._=,/-]*|[\s._=,/-]+", text):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return plain("\n".join(line.strip() for line in lines))


def plain(text: str) -> str:
    """A user's words are not formulas."""
    return text.replace("$", r"\$")
