"""What is true of every figure of a report: its words lie inside it and do not meet."""

from __future__ import annotations

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from dppo.report.drawing import NARROW, RC, WIDE
from dppo.report.panel import Panel


def drawn(panel: Panel, width: float = WIDE) -> Figure:
    """The figure of a panel as a report draws it."""
    assert panel.draw is not None, panel.missing
    with style.context(["default", RC]):
        figure = panel.draw(width)
        figure.draw_without_rendering()
    return figure


def at_both_widths(panel: Panel) -> tuple[Figure, Figure]:
    """Its figures for a page and a phone, each checked to be readable."""
    found = drawn(panel, WIDE), drawn(panel, NARROW)
    for figure, width in zip(found, (WIDE, NARROW), strict=True):
        assert figure.get_figwidth() == width
        check_words(figure)
    return found


def check_words(figure: Figure) -> None:
    """No text crosses the figure's edge, and none lies on another."""
    edge = figure.bbox
    boxes = {text: Text.get_window_extent(text) for text in _words(figure)}  # of notes without their leaders
    assert boxes
    for text, box in boxes.items():
        inside = box.x0 >= edge.x0 - 1 and box.x1 <= edge.x1 + 1 and box.y0 >= edge.y0 - 1 and box.y1 <= edge.y1 + 1
        assert inside, f"{text.get_text()!r} crosses the edge: {box} in {edge}"
    found = list(boxes.items())
    for at, (text, box) in enumerate(found):
        for other, beside in found[at + 1 :]:
            assert not _meet(box, beside), f"{text.get_text()!r} lies on {other.get_text()!r}"


def points_of(line: Line2D) -> list[tuple[float, float]]:
    """The points of a line, as they were given."""
    return [(float(x), float(y)) for x, y in np.column_stack([line.get_xdata(), line.get_ydata()])]


def bands(axes: Axes) -> list[set[tuple[float, float]]]:
    """The corners of every band."""
    shades = [one for one in axes.collections if isinstance(one, PolyCollection)]
    return [{(float(x), float(y)) for x, y in np.asarray(one.get_paths()[0].vertices)} for one in shades]


def tips(figure: Figure) -> list[str]:
    """What is told where one points at something."""
    marks = [str(artist.get_gid() or "") for artist in figure.findobj()]
    return [mark.removeprefix("tip:") for mark in marks if mark.startswith("tip:")]


def _words(figure: Figure) -> list[Text]:
    beyond = _beyond_limits(figure)
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text not in beyond]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def _beyond_limits(figure: Figure) -> set[Text]:
    """The labels of ticks beyond an axis' limits, which are kept but not drawn."""
    found: set[Text] = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-9 * (high - low)
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not low - slack <= tick.get_loc() <= high + slack:
                    found |= {tick.label1, tick.label2}
    return found


def _meet(one: Bbox, other: Bbox) -> bool:
    """Whether two rectangles share more than a pixel in both directions."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return bool(width > 1 and height > 1)
