"""What the finished seeds of one configuration measured: an objective's mean, with its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dppo.evaluation.comparison import prompt_values
from dppo.evaluation.win_rates import Array, Interval, crossed_mean, crossed_rate, t_interval

_BOOTSTRAP = {"n_bootstrap": 10_000, "seed": 0}
# Objectives that are means over prompts, as comparisons name them: the interval then covers prompts and seeds.
_OVER_PROMPTS = {
    "objective": "win_rate",
    "win_rate.value": "win_rate",
    "reward.policy.value": "reward",
    "reward.delta.value": "reward_gain",
}


def measured(places: Sequence[Path], path: str, values: Sequence[float]) -> Interval:
    """The mean of ``values`` (S,), the objective ``path`` of finished runs in ``places``, with its 95 % interval.

    Of a mean over prompts: the crossed bootstrap over seeds and prompts. Of another number: its own interval where one
    run has one, Student's t over several; NaN where nothing is known.
    """
    mean = float(np.mean(values))
    if not math.isfinite(mean):
        return Interval(mean, math.nan, math.nan)
    if path in _OVER_PROMPTS:
        metric = _OVER_PROMPTS[path]
        _, table = _over_prompts(places, metric)
        return (crossed_rate if metric == "win_rate" else crossed_mean)(table, **_BOOTSTRAP)
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
    prompts, table = _over_prompts(places, "win_rate")
    return dict(zip(prompts, table.mean(axis=0).tolist(), strict=True))


def _over_prompts(places: Sequence[Path], metric: str) -> tuple[list[str], Array]:
    """The prompts, and (S, P) values of the runs."""
    found = [prompt_values(place, metric) for place in places]
    return list(found[0]), np.array([list(values.values()) for values in found])
