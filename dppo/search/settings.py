"""What ``hydra.sweeper`` holds, past the typed door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dppo.errors import UserError

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True)
class SearchSettings:
    """One search: ``conf/hydra/sweeper/optuna.yaml`` says what each key means."""

    n_trials: int
    direction: tuple[Direction, ...]
    storage: str
    study_name: str
    sampler: Mapping[str, Any]
    params: Mapping[str, Any]
    when: Mapping[str, Mapping[str, tuple[str | int | float | bool, ...]]]
    max_failure_rate: float
    resume: bool

    def __post_init__(self) -> None:
        if self.n_trials < 1:
            raise UserError(f"n_trials={self.n_trials}: must be at least 1")
        if not self.study_name or "/" in self.study_name:
            raise UserError(f"study_name={self.study_name}: must be a word; it names the directory too")
        if not 0 <= self.max_failure_rate <= 1:
            raise UserError(f"max_failure_rate={self.max_failure_rate}: must be in [0, 1]")
