"""Nested mappings by dotted names, as they are typed: ``{"loss": {"beta": 1}}`` has ``loss.beta``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def names(values: Mapping[str, Any]) -> list[str]:
    """Every key of a nested mapping by its dotted name, branches included."""
    found = []
    for key, value in values.items():
        found.append(key)
        if isinstance(value, Mapping):
            found += [f"{key}.{name}" for name in names(value)]
    return found


def leaves(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Every leaf of a nested mapping by its dotted name; lists and empty mappings are leaves."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
