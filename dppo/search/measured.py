"""What the finished seeds of one configuration measured: an objective's mean, with its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dppo.evaluation.win_rates import Array, Interval, crossed_mean, crossed_rate, outcomes, t_interval

_BOOTSTRAP = {"n_bootstrap": 10_000, "seed": 0}
# Objectives that are means over prompts: the interval then covers prompts and seeds.
_OVER_PROMPTS = ("objective", "win_rate.value", "reward.policy.value", "reward.delta.value")


def measured(places: Sequence[Path], path: str, values: Sequence[float]) -> Interval:
    """The mean of ``values`` (S,), the objective ``path`` of finished runs in ``places``, with its 95 % interval.

    Of a mean over prompts: the crossed bootstrap over seeds and prompts. Of another number: its own interval where one
    run has one, Student's t over several; NaN where nothing is known.
    """
    mean = float(np.mean(values))
    if not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan)
    if path in _OVER_PROMPTS:
        table = np.stack([_over_prompts(place, path) for place in places])
        rate = path in ("objective", "win_rate.value")
        return (crossed_rate if rate else crossed_mean)(table, **_BOOTSTRAP)
    if len(values) > 1:
        return t_interval(list(values))
    parent, _, leaf = path.rpartition(".")
    beside: Any = json.loads((places[0] / "result.json").read_text("utf-8"))
    for key in parent.split(".") if parent else []:
        beside = beside[key]
    stem = {"value": "ci", "strict": "strict_ci"}.get(leaf)
    if stem is None or f"{stem}_low" not in beside:
        return Interval(mean, math.nan, math.nan)
    return Interval(mean, float(beside[f"{stem}_low"]), float(beside[f"{stem}_high"]))


def by_prompt(places: Sequence[Path]) -> dict[str, float]:
    """Outcomes (win 1, tie 1/2, loss 0) by prompt, means over the runs in ``places``."""
    table = np.stack([_over_prompts(place, "win_rate.value") for place in places])
    keys = [row["prompt_id"] for row in _samples(places[0])]
    return dict(zip(keys, table.mean(axis=0).tolist(), strict=True))


def _over_prompts(place: Path, path: str) -> Array:
    rows = _samples(place)
    own = [row["policy_reward"] for row in rows]
    other = [row["reference_reward"] for row in rows]
    if path == "reward.policy.value":
        return np.asarray(own, dtype=np.float64)
    if path == "reward.delta.value":
        return np.asarray(own, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return outcomes(own, other)


def _samples(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "samples.jsonl").read_text("utf-8").splitlines()]
