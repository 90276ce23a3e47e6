"""What ``hydra.sweeper`` holds, past the typed door."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dppo.errors import UserError

Direction = Literal["maximize", "minimize"]
Label = Literal["scientific", "nuisance"]

_CONSTRAINT = re.compile(r"\s*([\w./]+)\s*(<=|>=)\s*(\S+)\s*")


@dataclass(frozen=True)
class Constraint:
    """A bound on a number of ``result.json``."""

    path: str
    at_most: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """``kl.nats_per_token <= 0.5``; raises UserError."""
        match = _CONSTRAINT.fullmatch(text)
        try:
            if match is None:
                raise ValueError
            return cls(match[1], match[2] == "<=", float(match[3]))
        except ValueError:
            raise UserError(
                f"hydra.sweeper.constraints={text}: must be a number of result.json and a bound, for instance "
                "'hydra.sweeper.constraints=[\"kl.nats_per_token<=0.5\"]'"
            ) from None

    def excess(self, value: float) -> float:
        """By how much ``value`` violates it; at most 0 if it holds."""
        return value - self.bound if self.at_most else self.bound - value


@dataclass(frozen=True)
class SearchSettings:
    """One search: ``conf/hydra/sweeper/optuna.yaml`` says what each key means."""

    n_trials: int
    n_jobs: int
    direction: tuple[Direction, ...]
    storage: str
    study_name: str
    sampler: Mapping[str, Any]
    pruner: Mapping[str, Any]
    params: Mapping[str, Any]
    when: Mapping[str, Mapping[str, tuple[str | int | float | bool, ...]]]
    labels: Mapping[str, Label]
    custom_search_space: str | None
    enqueue: tuple[str, ...]
    constraints: tuple[str, ...]
    replicates: int
    value: Literal["mean", "lower_bound"]
    baselines: tuple[str, ...]
    test_seeds: int
    max_failure_rate: float
    resume: bool

    def __post_init__(self) -> None:
        for key in ("n_trials", "n_jobs", "replicates"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)}: must be at least 1")
        if self.test_seeds < 0:
            raise UserError(f"test_seeds={self.test_seeds}: must be 0 or a number of seeds")
        if not re.fullmatch(r"(?!\.)[^/\\\x00-\x1f]+", self.study_name) or len(self.study_name.encode()) > 200:
            raise UserError(
                f"study_name={self.study_name}: must be a word of at most 200 bytes that does not begin with a dot; it "
                "names the directory too"
            )
        if not 0 <= self.max_failure_rate <= 1:
            raise UserError(f"max_failure_rate={self.max_failure_rate}: must be in [0, 1]")

    @property
    def bounds(self) -> tuple[Constraint, ...]:
        return tuple(Constraint.parse(text) for text in self.constraints)
