"""A study as its reports see it: plain values, whatever storage they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from dppo.evaluation.win_rates import Interval
from dppo.search.settings import Direction
from dppo.search.space import Parameter, Values


@dataclass(frozen=True)
class TrialLine:
    """One trial that counts.

    ``state`` is complete, pruned, diverged, failed or running. ``objectives`` are in the order of the study's, with
    bounds of NaN where no interval is known; None unless complete or diverged (then they can be infinite). ``interim``
    holds what was measured during training of the first seed: percent of its steps -> win rate (or accuracy).
    ``seeds`` are the seeds that ended. ``worker`` names the process that ran it. ``note`` says why it failed or was
    pruned. ``feasible``: no constraint is violated.
    """

    number: int
    index: int
    values: Values
    state: str
    objectives: tuple[Interval, ...] | None
    interim: Mapping[int, float]
    seeds: tuple[int, ...]
    begun: datetime
    ended: datetime | None
    worker: str
    command: str
    note: str = ""
    feasible: bool = True


@dataclass(frozen=True)
class BaselineLine:
    """A configuration that is not searched, with the same seeds; ``objectives`` None: not run, or failed."""

    name: str
    objectives: tuple[Interval, ...] | None
    seeds: tuple[int, ...]
    command: str
    note: str = ""


@dataclass(frozen=True)
class Overview:
    """A whole study; ``winners`` are the numbers of the best trial, of the Pareto front, or of the best of each."""

    name: str
    parameters: tuple[Parameter, ...]
    objectives: tuple[str, ...]
    directions: tuple[Direction, ...]
    trials: tuple[TrialLine, ...]
    baselines: tuple[BaselineLine, ...]
    winners: tuple[int, ...]
    interim_metric: str = "win rate"
