"""Fingerprints: one hash of everything that decides what a stage produces."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dppo.types import Json

FINGERPRINT = re.compile(r"[0-9a-f]{64}")
# Enters every artifact's fingerprint: with another layout on disk, artifacts of the old one are other artifacts.
LAYOUT = 1


def fingerprint(content: object) -> str:
    """The sha256 of ``content`` in canonical JSON, as 64 hexadecimal digits.

    Equal content gives equal fingerprints in every process and on every machine; the order of keys plays no part.
    Different values give different fingerprints, and so do different types: ``1``, ``1.0``, ``True`` and ``"1"`` are
    four contents (the typed settings make an integer given for a float setting a float, so the command line
    ``alpha=1`` is ``alpha=1.0``). Floats enter with all their digits. Tuples equal lists. A dataclass enters with its
    class and its fields, so that two penalties without fields differ.

    Raises TypeError for what JSON cannot hold (sets, paths, tensors, keys that are not strings) and ValueError for
    NaN and infinity, naming the place.
    """
    return hashlib.sha256(to_bytes(canonical(content))).hexdigest()


def identity(stage: str, inputs: Json, parents: Sequence[str]) -> str:
    """The fingerprint of what ``stage`` makes from ``inputs`` and from the artifacts ``parents``, in this order."""
    return fingerprint({"layout": LAYOUT, "stage": stage, "content": inputs, "parents": list(parents)})


def canonical(value: object, place: str = "content") -> Json:
    """``value`` as plain JSON types; dataclasses become their class name and fields."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{place} is {value}: a fingerprint takes finite numbers only")
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", "fields": canonical(fields, place)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{place} has the key {key!r}: a fingerprint takes string keys only")
        return {key: canonical(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [canonical(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{place} is a {type(value).__name__}: a fingerprint takes JSON types and dataclasses only")


def to_bytes(value: Json) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII, floats with all their digits."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def short(fingerprint: str) -> str:
    """What is printed: the first four digits."""
    return fingerprint[:4]


def differences(new: Json, old: Json, place: str = "") -> Iterator[str]:
    """One phrase for each leaf in which two contents differ, such as ``train.lr (0.0001, was 5e-05)``."""
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        for key in sorted(new.keys() | old.keys()):
            inner = f"{place}.{key}" if place else key
            if key not in old:
                yield f"{inner} (new)"
            elif key not in new:
                yield f"{inner} (gone)"
            else:
                yield from differences(new[key], old[key], inner)
    elif to_bytes(new) != to_bytes(old):
        yield f"{place} ({_brief(new)}, was {_brief(old)})"


def _brief(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
