"""What a run logged while it trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dppo.evaluation.comparison import Run
from dppo.search.plot_axes import is_number


def metric_rows(run: Run) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; none without such a file, and none for a line that was torn."""
    try:
        text = (run.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def number_in(row: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a row."""
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) and is_number(value) else None
