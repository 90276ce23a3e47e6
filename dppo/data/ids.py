"""Content hashes by which examples, prompts and stored results are joined: never by position.

An id is the first 32 hexadecimal digits (128 bits) of the SHA-256 of canonical JSON: sorted keys, no spaces,
non-ASCII characters escaped. It depends on the content alone, not on file, row order, split or platform.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from dppo.types import Json, Message, Prompt, Response

ID_DIGITS = 32

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
