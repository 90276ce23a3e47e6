"""A tracker that fails costs the run its mirror and nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from dppo.errors import first_line
from dppo.tracking import RunInfo, Silent, StageInfo, Status, Table, Tracker

_log = logging.getLogger("dppo.tracking")


def guarded(what: str, consequence: str, call: Callable[[], None]) -> bool:
    """Make a call; an exception is said in one line, and False returned."""
    try:
        call()
    except Exception as error:  # of a library, its processes, the network or the disk
        reason = first_line(error)
        _log.warning("warning: %s: %s; %s", what, reason, consequence)
        return False
    return True


def start(what: str, run: RunInfo, begin: Callable[[RunInfo], Tracker]) -> Tracker:
    """Open a run; ``what`` names the tracker in the one line that says why there is none."""
    opened: list[Tracker] = []
    guarded(what, "this run goes on without it", lambda: opened.append(begin(run)))
    return _Guarded(what, opened[0]) if opened else Silent()


class _Guarded:
    """Passes on every call until one fails; the run is closed in any case."""

    def __init__(self, what: str, tracker: Tracker) -> None:
        self._what, self._tracker = what, tracker
        self._lost = False

    def _try(self, call: Callable[[], None]) -> None:
        if not self._lost:
            self._lost = not guarded(self._what, "the rest of this run is not tracked", call)

    def log(self, metrics: Mapping[str, float | int]) -> None:
        self._try(lambda: self._tracker.log(metrics))

    def stage(self, stage: StageInfo) -> None:
        self._try(lambda: self._tracker.stage(stage))

    def table(self, name: str, table: Table) -> None:
        self._try(lambda: self._tracker.table(name, table))

    def histograms(self, edges: Sequence[float], counts: Mapping[str, Sequence[int]]) -> None:
        self._try(lambda: self._tracker.histograms(edges, counts))

    def finish(self, status: Status, final: Mapping[str, float | int]) -> None:
        try:
            self._tracker.finish(status, final)
        except Exception as error:
            if not self._lost:
                _log.warning("warning: %s: %s; the run is not closed there", self._what, error or type(error).__name__)
