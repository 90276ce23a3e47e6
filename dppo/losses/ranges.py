"""Range checks of hyperparameters: one line that names the key, the value and what is allowed."""

from __future__ import annotations

import math

from dppo.errors import UserError


def check_positive(key: str, value: float) -> None:
    """Raise ``UserError`` unless ``value`` is finite and > 0."""
    _require(math.isfinite(value) and value > 0, key, value, "must be > 0 and finite")


def check_not_negative(key: str, value: float) -> None:
    """Raise ``UserError`` unless ``value`` is finite and >= 0."""
    _require(math.isfinite(value) and value >= 0, key, value, "must be >= 0 and finite")


def check_fraction(key: str, value: float) -> None:
    """Raise ``UserError`` unless 0 <= value < 1."""
    _require(0 <= value < 1, key, value, "must be >= 0 and below 1")


def check_inside(key: str, value: float, low: float, high: float) -> None:
    """Raise ``UserError`` unless low < value < high."""
    _require(low < value < high, key, value, f"must be above {low:g} and below {high:g}")


def check_label_smoothing(value: float) -> None:
    """Raise ``UserError`` unless 0 <= value < 0.5; from 0.5 on the labels would be believed to be wrong."""
    _require(0 <= value < 0.5, "label_smoothing", value, "must be >= 0 and below 0.5")


def _require(condition: bool, key: str, value: float, rule: str) -> None:
    if not condition:
        raise UserError(f"{key}={value:g}: {rule}")
