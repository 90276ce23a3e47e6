"""Content hashes by which examples, prompts and stored results are joined: never by position.

An id is the first 32 hexadecimal digits (128 bits) of the SHA-256 of canonical JSON: sorted keys, no spaces,
non-ASCII characters escaped. It depends on the content alone, not on file, row order, split or platform.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence

from dppo.types import Json, Message, Prompt, Response

ID_DIGITS = 32

# Soft hyphens, zero-width spaces and joiners, directional marks, tags: they show nothing.
_UNSEEN = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]")
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical_json(content: Json) -> str:
    """One spelling per content. Raises ValueError for NaN and infinities, which JSON cannot hold."""
    return _ENCODER.encode(content)


def content_hash(content: Json) -> str:
    """32 hexadecimal digits that identify ``content``."""
    return hashlib.sha256(canonical_json(content).encode("ascii")).hexdigest()[:ID_DIGITS]


def prompt_id(messages: Sequence[Message]) -> str:
    """The id of a prompt: its turns, each with role and exact text. ``checks`` do not enter."""
    return content_hash([[message.role, message.content] for message in messages])


def example_id(prompt: Prompt, responses: Sequence[Response]) -> str:
    """The id of an example: its prompt's id and its responses in their order, each with role, text and score.

    Raises ValueError if a score is NaN or infinite.
    """
    rows: list[Json] = [
        [response.role, response.text, None if response.score is None else float(response.score)]
        for response in responses
    ]
    return content_hash([prompt.prompt_id, rows])


def prompt_key(messages: Sequence[Message]) -> str:
    """The same for prompts that a reader takes for the same: by it splits are kept apart.

    System turns, upper case, white space, characters that show nothing and compatible forms of Unicode (NFKC) make no
    difference; user and assistant turns and their order do. Results are joined by ``prompt_id``, never by this.
    """
    return content_hash([[turn.role, _plain(turn.content)] for turn in messages if turn.role != "system"])


def content_key(prompt: Prompt, responses: Sequence[Response]) -> str:
    """The same for examples that differ in white space or Unicode composition (NFC) only, or in scores without a say.

    Scores decide what a group of ranked answers means; those of a pair are ratings beside its order.
    """
    turns: list[Json] = [[turn.role, _spaced(turn.content)] for turn in prompt.messages]
    answers: list[Json] = [
        [one.role, _spaced(one.text), one.score if one.role == "ranked" else None] for one in responses
    ]
    return content_hash([turns, answers])


def _plain(text: str) -> str:
    if not text.isascii():
        text = _UNSEEN.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(text.casefold().split())


def _spaced(text: str) -> str:
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())
