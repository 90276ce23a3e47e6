"""Subsets that grow: the first n examples in an order given by their ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from dppo.types import EncodedExample, PreferenceExample, Prompt

Item = TypeVar("Item", PreferenceExample, EncodedExample, Prompt)


def nested_subset(examples: Sequence[Item], n: int | None, seed: int) -> list[Item]:
    """The first ``n`` examples (all for None) by the hash of ``seed`` and their id.

    A subset of 8,000 lies within that of 60,000 with the same seed, and rows added to the data set leave the order
    of the others as it was.
    """
    ordered = sorted(examples, key=lambda example: _place(example, seed))
    return ordered if n is None else ordered[:n]


def _place(example: PreferenceExample | EncodedExample | Prompt, seed: int) -> bytes:
    identifier = example.prompt_id if isinstance(example, Prompt) else example.example_id
    return hashlib.sha256(f"{seed}:{identifier}".encode()).digest()
