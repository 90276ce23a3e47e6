"""The rows of a run's files, as far as they can be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dppo.search.plot_axes import is_number


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none if it is not there, and none for a line that was torn."""
    if not path.is_file():  # reading a pipe would wait for a writer
        return []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def number_in(row: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a row."""
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and is_number(value) else None
