"""Text that hides nothing, and figures as parts of a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo.report.drawing import GRID, INK, MUTED, new_figure, tip
from dppo.report.svg import embedded, inline
from dppo.report.text import cut, visible


def test_what_cannot_be_seen_gets_a_sign() -> None:
    assert visible("a\x00b\x1b[31m\x7f") == "a\u2400b\u241b[31m\u2421"
    assert visible("\u202egnp.exe") == "\u27e8U+202E\u27e9gnp.exe"
    assert visible("one\r\ntwo\tthree\n") == "one\ntwo\tthree\n"
    assert (
        visible("\u05e9\u05dc\u05d5\u05dd, caf\u00e9, \U0001f600, \u4f60\u597d")
        == "\u05e9\u05dc\u05d5\u05dd, caf\u00e9, \U0001f600, \u4f60\u597d"
    )
    assert cut("abcdef", 4) == "abcd \u2026 [2 more characters]" and cut("abcd", 4) == "abcd"


@given(st.text(st.characters(codec=None), max_size=60))
def test_every_text_can_be_written_and_shows_all_of_it(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    assert visible(shown) == shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200b\u202a-\u202e\u2066-\u2069\ufeff]", shown)
    assert len(shown) >= len(text.replace("\r\n", "\n"))


def test_a_figure_takes_the_colours_of_the_page() -> None:
    figure = new_figure(3, 2)
    axes = figure.subplots()
    for at, colour in enumerate((INK, MUTED, GRID, "#0072B2")):
        (line,) = axes.plot([0, 1], [at, at], color=colour)
    tip(line, 'a "tip" & <more>')
    axes.set_xlabel("label")
    text = inline(figure, "one-wide")
    for colour in (INK, MUTED, GRID, "#ffffff"):
        assert colour not in text.lower()
    assert {"var(--ink)", "var(--muted)", "var(--grid)"} <= set(re.findall(r"var\(--\w+\)", text))
    assert "#0072b2" in text.lower() and "var(--sans)" in text and ">label</text>" in text
    found = ElementTree.fromstring(text)
    assert [one.get("data-tip") for one in found.iter() if one.get("data-tip")] == ['a "tip" & <more>']
    names = [str(one.get("id")) for one in found.iter() if one.get("id")]
    assert len(names) == len(set(names)) and all(name.startswith("one-wide-") for name in names)
    links = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
    assert links and {one or other for one, other in links} <= set(names)


def test_only_what_is_drawn_is_embedded() -> None:
    made = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 10 10" '
        'onload="hack()"><script>hack()</script><foreignObject><p>x</p></foreignObject><style>*{x:url(//evil)}</style>'
        '<g id="a" onclick="hack()"><a xlink:href="javascript:hack()"><path d="M0 0"/></a>'
        '<image xlink:href="http://evil/x.png"/><image xlink:href="data:image/png;base64,AAAA"/>'
        '<use xlink:href="#a"/><rect style="fill: #000000; clip-path: url(#a)"/></g></svg>'
    )
    text = embedded(made, "s")
    for word in ("hack", "evil", "foreignObject", "javascript"):
        assert word not in text
    assert 'id="s-a"' in text and 'href="#s-a"' in text and "url(#s-a)" in text and "AAAA" in text
    assert "var(--ink)" in text


@pytest.mark.parametrize("text", ["", "<svg", "<html/>", '<svg xmlns="http://www.w3.org/2000/svg"/>'])
def test_what_is_no_figure_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        embedded(text, "s")
