"""A figure as part of a page: text that follows the page's fonts, colours that follow its theme, tips."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING

from dppo.report.drawing import GRID, INK, MUTED, TIP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_DARK_GREY = "#595959"  # of the figures that a search draws
_THEME = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    _DARK_GREY: "var(--muted)",
    GRID: "var(--grid)",
    "#ffffff": "var(--surface)",
}
_DRAWN = {
    f"{{{_SVG}}}{name}"
    for name in (
        *("svg", "g", "defs", "path", "use", "text", "tspan", "image", "clipPath", "rect", "circle", "line"),
        *("polygon", "polyline", "title", "desc", "pattern", "style"),
    )
}


def inline(figure: Figure, name: str) -> str:
    """The figure as an ``svg`` element whose identifiers begin with ``name``."""
    from matplotlib import rc_context

    data = io.BytesIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return embedded(data.getvalue().decode(), name)


def embedded(text: str, name: str) -> str:
    """An SVG file of matplotlib's as an ``svg`` element for a page. Raises ValueError for what is no such file."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(str(error)) from None
    if root.tag != f"{{{_SVG}}}svg" or "viewBox" not in root.attrib:
        raise ValueError("no SVG with a viewBox")
    width = float(root.attrib["viewBox"].split()[2])
    root.attrib = {"viewBox": root.attrib["viewBox"], "style": f"max-width:{width * 1.5:.0f}px"}
    _clean(root, name)
    ElementTree.register_namespace("", _SVG)
    found = ElementTree.tostring(root, encoding="unicode")
    return found.replace(f' xmlns="{_SVG}"', "", 1)


def _clean(element: ElementTree.Element, name: str) -> None:
    """Keep what is drawn, with identifiers and colours that fit into the page."""
    for child in list(element):
        if child.tag in _DRAWN:
            _clean(child, name)
        else:
            element.remove(child)
    if element.tag == f"{{{_SVG}}}style":
        # matplotlib's says how lines join; the page has a rule for that.
        element.text = ""
    for key, value in list(element.attrib.items()):
        if key == "id":
            del element.attrib[key]
            if value.startswith(TIP):
                element.set("data-tip", value.removeprefix(TIP))
            else:
                element.set("id", f"{name}-{value}")
        elif key.startswith("on"):
            del element.attrib[key]
        elif key == f"{{{_XLINK}}}href":
            del element.attrib[key]
            if value.startswith("#"):
                element.set("href", f"#{name}-{value[1:]}")
            elif value.startswith("data:image/png;base64,"):
                element.set("href", value)
        else:
            element.set(key, _themed(re.sub(r"url\(#", f"url(#{name}-", value)) if "url(" in value else _themed(value))


def _themed(value: str) -> str:
    for colour, variable in _THEME.items():
        value = re.sub(rf"{colour}\b", variable, value, flags=re.IGNORECASE)
    # Depending on its version matplotlib names the fonts alone, or behind the size.
    value = re.sub(r"font-family: [^;]*", "font-family: var(--sans)", value)
    return re.sub(r"(font: [^'\";]*?[\d.]+px) [^;]*", r"\1 var(--sans)", value)
