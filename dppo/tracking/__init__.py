"""Where a run's metrics go beside its own files. Local files are the truth; a tracker mirrors them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from dppo.types import Json

Status = Literal["complete", "diverged", "pruned", "interrupted", "failed"]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a tracker shows about a run before its first metric."""

    name: str
    group: str
    tags: tuple[str, ...]
    directory: Path
    config: Mapping[str, Json]


class Tracker(Protocol):
    """One run being tracked; ``finish`` is called exactly once, also after errors."""

    def log(self, metrics: Mapping[str, float | int]) -> None:
        """One row of metrics; ``step`` is the optimiser step."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Json]]) -> None:
        """A table, such as the samples of the run."""

    def finish(self, status: Status, final: Mapping[str, float | int]) -> None:
        """Write the final scalars and close the run."""


@runtime_checkable
class Tracking(Protocol):
    """Settings of a tracker: a frozen dataclass with this method."""

    def start(self, run: RunInfo) -> Tracker:
        """Open the run. Must not fail the experiment for want of a network or an account."""


@dataclass(frozen=True)
class Nothing:
    """No tracker: metrics.jsonl, samples.jsonl and result.json in the run directory are all there is."""

    def start(self, run: RunInfo) -> Tracker:
        return _Silent()


class _Silent:
    def log(self, metrics: Mapping[str, float | int]) -> None:
        pass

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Json]]) -> None:
        pass

    def finish(self, status: Status, final: Mapping[str, float | int]) -> None:
        pass
