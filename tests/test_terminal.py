"""Text of unknown origin on a terminal: nothing in it moves the cursor, colours anything or hides other text."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo.terminal import cut, harmless, paragraph, shown_width


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ä and 日本", "plain, ä and 日本"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("a\rb\x08\x00\t\x7f", "a␍b␈␀␉␡"),
        ("\x9b2J", r"\x9b2J"),
        ("abc\u202edcba", r"abc\u202edcba"),
        ("\u2066x\u2069 \u200b\ufeff\u2028", r"\u2066x\u2069 \u200b\ufeff\u2028"),
        ("\U000e0041\ue000\u3164", r"\U000e0041\ue000\u3164"),
        ("\ud800", r"\ud800"),
        ("one\u00a0two", "one two"),
        ("e\u0301", "e\u0301"),
        ("e" + "\u0301" * 5, "e" + "\u0301" * 3 + r"\u0301\u0301"),
    ],
)
def test_what_is_not_plainly_visible_is_shown_as_such(text: str, shown: str) -> None:
    assert harmless(text) == shown


@given(st.text(), st.integers(10, 90), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_any_text_keeps_to_its_place(text: str, width: int, limit: int) -> None:
    lines = paragraph(text, first="A  ", width=width, limit=limit)
    assert lines[0].startswith("A  ") and all(line.startswith("   ") for line in lines[1:])
    for line in lines:
        assert shown_width(line) <= max(width, 11)
        assert not any(unicodedata.category(sign) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co") for sign in line)
    if len(text) <= limit:
        # Nothing is lost but spaces at line ends.
        kept = "".join(line[3:] for line in lines).replace(" ", "")
        assert kept == harmless(text.replace("\n", "")).replace(" ", "") or "\n" in text


def test_lines_break_at_spaces_and_where_the_text_does() -> None:
    assert paragraph("aa bb cc\ndddddddddddd", first="> ", width=10, limit=99) == [
        "> aa bb",
        "  cc␊",
        "  dddddddd",
        "  dddd",
    ]
    assert paragraph("", first="> ", width=10, limit=9) == ["> "]
    assert paragraph("日本語日本語", first="> ", width=10, limit=9) == ["> 日本語日", "  本語"]


def test_a_long_text_says_how_long_it_was() -> None:
    (line,) = paragraph("x" * 5000, first="", width=60, limit=20)
    assert line == "x" * 20 + " … (20 of 5000 characters)"
    assert cut("abcdef", 4) == "abc…"
    assert cut("日本語", 4) == "日…"
    assert cut("abcd", 4) == "abcd"
