"""Text that a model or a file wrote, on a terminal: it can't move the cursor, colour anything or hide other text."""

from __future__ import annotations

import io
import shutil
import sys
import unicodedata
from collections.abc import Iterator

# Stacked on one letter, more combining marks than any script needs cover the lines around them.
_MOST_MARKS = 3
# Controls and separators, invisible formatting (bidirectional overrides, zero width), surrogates, private and unknown.
_ESCAPED = frozenset(("Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"))
# Letters by their category, and yet nothing is to be seen: fillers of Hangul, the empty pattern of Braille.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800\u034f")


def harmless(text: str) -> str:
    """One line in which everything that isn't plainly visible stands as such: ␛, or a code such as U+202E's."""
    return "".join(_pieces(text))


def _pieces(text: str) -> Iterator[str]:
    marks = 0
    for sign in text:
        category, code = unicodedata.category(sign), ord(sign)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        if code < 0x20:
            yield chr(0x2400 + code)
        elif code == 0x7F:
            yield "␡"
        elif category in _ESCAPED or sign in _BLANK or marks > _MOST_MARKS:
            yield f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
        elif category == "Zs":
            yield " "
        else:
            yield sign


def shown_width(text: str) -> int:
    """How many columns a harmless text takes: wide signs two, combining marks none."""
    return sum(
        0
        if unicodedata.category(sign) in ("Mn", "Me")
        else 2
        if unicodedata.east_asian_width(sign) in ("W", "F")
        else 1
        for sign in text
    )


def cut(text: str, width: int) -> str:
    """A harmless text in at most ``width`` columns; what is cut off leaves a … behind."""
    if shown_width(text) <= width:
        return text
    kept = ""
    for sign in text:
        if shown_width(kept + sign) > width - 1:
            break
        kept += sign
    return f"{kept}…"


def paragraph(text: str, *, first: str, width: int, limit: int) -> list[str]:
    """Any text as harmless lines of at most ``width`` columns, ``first`` before the first of them.

    A line break stays one, behind a ␊. Of more than ``limit`` characters the rest is left out, and it is said how many
    there were.
    """
    kept, note = text, ""
    if len(text) > limit:
        kept, note = text[:limit], f" … ({limit} of {len(text)} characters)"
    lines = [harmless(line) + ("␊" if number else "") for number, line in enumerate(reversed(kept.split("\n")))][::-1]
    lines[-1] += note
    room = max(8, width - shown_width(first))
    rows = [row for line in lines for row in _wrapped(line, room)]
    return [(first if number == 0 else " " * shown_width(first)) + row for number, row in enumerate(rows)]


def _wrapped(line: str, room: int) -> list[str]:
    """A harmless line in rows of at most ``room`` columns, broken at spaces where there are some."""
    rows, row, columns = [], "", 0
    for word in _words(line):
        taken = shown_width(word)
        if columns + taken > room and row.strip():
            rows.append(row.rstrip())
            row, columns = "", 0
            word = word.lstrip() if taken <= room else word
            taken = shown_width(word)
        while taken > room:
            end = next(n for n in range(1, len(word) + 1) if shown_width(word[: n + 1]) > room)
            rows.append(word[:end])
            word = word[end:]
            taken = shown_width(word)
        row, columns = row + word, columns + taken
    return [*rows, row.rstrip()] if row.strip() or not rows else rows


def _words(line: str) -> Iterator[str]:
    """Words with the spaces before them; together they are the line."""
    start = 0
    for place in range(1, len(line)):
        if line[place] == " " and line[place - 1] != " ":
            yield line[start:place]
            start = place
    yield line[start:]


def columns() -> int:
    """How wide the output is: the terminal's width, or that in the environment variable COLUMNS."""
    return max(60, shutil.get_terminal_size((100, 24)).columns)


def print_anything() -> None:
    """Show what the output's encoding lacks as an escape, where printing it would fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
