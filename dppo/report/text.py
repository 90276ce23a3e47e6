"""What a user or a model wrote, as text that shows all of it: signs that have no form of their own get one."""

from __future__ import annotations

import re

# Control characters; lone surrogates; separators and joiners without a width; what turns the direction of a line.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """``text`` with a sign for each character that is not seen; line ends and tabs stay."""
    return _UNSEEN.sub(_sign, text.replace("\r\n", "\n"))


def _sign(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return (
        "\N{SYMBOL FOR DELETE}"
        if code == 0x7F
        else f"\N{MATHEMATICAL LEFT ANGLE BRACKET}U+{code:04X}\N{MATHEMATICAL RIGHT ANGLE BRACKET}"
    )


def cut(text: str, most: int) -> str:
    """``text``, or its beginning with a note of how much is left out."""
    if len(text) <= most:
        return text
    return f"{text[:most]} \N{HORIZONTAL ELLIPSIS} [{len(text) - most:,} more characters]"
