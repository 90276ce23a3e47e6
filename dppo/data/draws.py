"""Reproducible random draws for generated data sets.

Only ``random.Random.random`` is used: the one method whose sequence Python keeps equal between versions.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def stream(*key: str | int) -> random.Random:
    """A generator of its own for every key; the global state of ``random`` is neither read nor changed."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "big"))


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of the items, all equally likely."""
    return items[int(rng.random() * len(items))]


def pick_some(rng: random.Random, items: Sequence[T], count: int) -> list[T]:
    """``count`` different places of ``items`` in random order; ``count = len(items)`` shuffles."""
    pool = list(items)
    for place in range(count):
        other = place + int(rng.random() * (len(pool) - place))
        pool[place], pool[other] = pool[other], pool[place]
    return pool[:count]


def share(*key: str | int) -> float:
    """A fixed number in [0, 1) for every key; over different keys it is uniform."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
