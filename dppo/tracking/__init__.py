"""Where a run's metrics go beside its own files. Local files are the truth; a tracker mirrors them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from dppo.types import Json


Status = Literal["complete", "diverged", "pruned", "interrupted", "failed"]
JobType = Literal["experiment", "trial", "baseline", "result"]

# The step that every metric is plotted against: optimiser steps, over all phases.
STEP = "train/global_step"
# Below the cache: what trackers keep of stages that many runs share. No artifact, so that the cache leaves it alone.
SHARED = ".tracked"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run belongs: alone, in a multirun, or in a study.

    ``label`` is its name there, such as ``trial 3``; ``choices`` are the options of the groups that it was composed
    from, ``varied`` the words in which the runs beside it differ, where that is known.
    """

    group: str | None = None
    job_type: JobType = "experiment"
    label: str = ""
    presets: tuple[str, ...] = ()
    choices: Mapping[str, str] = field(default_factory=dict)
    varied: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a tracker shows about a run before its first metric; the same run has the same ``id`` again."""

    id: str
    name: str
    group: str | None
    job_type: JobType
    tags: tuple[str, ...]
    directory: Path
    config: Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class StageInfo:
    """A stage that many runs share.

    ``title`` is what this run calls it, ``home`` a directory of the cache for what a tracker keeps about such stages.
    ``metrics`` are the rows of its training, none for a stage that trains nothing; ``final`` its last numbers.
    """

    title: str
    stage: str
    fingerprint: str
    home: Path
    config: Mapping[str, Json]
    metrics: Sequence[Mapping[str, float | int]]
    final: Mapping[str, float | int]

    @property
    def id(self) -> str:
        return f"{self.stage}-{self.fingerprint}"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of equally many cells."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Json, ...], ...]


@dataclass(frozen=True, slots=True)
class StudyInfo:
    """A study as one run shows it; ``files`` are texts by name, ``final`` its numbers."""

    id: str
    name: str
    directory: Path
    tags: tuple[str, ...]
    config: Mapping[str, Json]
    tables: Mapping[str, Table]
    files: Mapping[str, str]
    final: Mapping[str, float | int]
    status: Status


class Tracker(Protocol):
    """One run being tracked; ``finish`` is called exactly once, also after errors. No method raises."""

    def log(self, metrics: Mapping[str, float | int]) -> None:
        """One row of metrics; ``step`` is the optimiser step. Rows arrive in order, from the first on."""

    def stage(self, stage: StageInfo) -> None:
        """A shared stage that the run uses: linked from the run, and logged itself unless it was before."""

    def table(self, name: str, table: Table) -> None:
        """A table, such as the samples of the run."""

    def histograms(self, edges: Sequence[float], counts: Mapping[str, Sequence[int]]) -> None:
        """Histograms by name on the same bins; ``edges`` are one more than the counts of each."""

    def finish(self, status: Status, final: Mapping[str, float | int]) -> None:
        """Write the final scalars and close the run."""


@runtime_checkable
class Tracking(Protocol):
    """Settings of a tracker: a frozen dataclass with these methods."""

    def start(self, run: RunInfo) -> Tracker:
        """Open the run. Must not fail the experiment for want of a network or an account."""

    def study(self, study: StudyInfo) -> None:
        """Show a study, anew each time it is called."""


@dataclass(frozen=True)
class Nothing:
    """No tracker: metrics.jsonl, samples.jsonl and result.json in the run directory are all there is."""

    def start(self, run: RunInfo) -> Tracker:
        return Silent()

    def study(self, study: StudyInfo) -> None:
        pass


class Silent:
    """A run that nobody tracks."""

    def log(self, metrics: Mapping[str, float | int]) -> None:
        pass

    def stage(self, stage: StageInfo) -> None:
        pass

    def table(self, name: str, table: Table) -> None:
        pass

    def histograms(self, edges: Sequence[float], counts: Mapping[str, Sequence[int]]) -> None:
        pass

    def finish(self, status: Status, final: Mapping[str, float | int]) -> None:
        pass
