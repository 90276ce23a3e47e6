"""Everything that a tracker is told, as JSON lines: for those who feed a dashboard of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dppo.artifacts.files import disk_errors
from dppo.tracking import STEP, RunInfo, StageInfo, Status, StudyInfo, Table, Tracker
from dppo.tracking.guard import guarded, start

FILE = "tracking.jsonl"


@dataclass(frozen=True)
class JsonLines:
    """``tracking.jsonl`` in the run directory, and one in a study's, with one JSON object a line.

    ``event`` is ``start`` (id, name, group, job_type, tags, config), ``stage`` (title, id, config, rows, final),
    ``metrics`` (a row with ``train/global_step``), ``table`` (name, columns, rows), ``histogram`` (edges, counts),
    ``file`` (name, text) or ``finish`` (status, final), in the order in which things happen. The file begins anew
    with the run: what an earlier process had logged is logged again. Numbers that are not finite are null.
    """

    def start(self, run: RunInfo) -> Tracker:
        return start("tracking=jsonl", run, self._start)

    def _start(self, run: RunInfo) -> Tracker:
        opened = _Run(run.directory / FILE)
        told = {"id": run.id, "name": run.name, "group": run.group, "job_type": run.job_type, "tags": list(run.tags)}
        opened.write("start", **told, config=run.config)
        return opened

    def study(self, study: StudyInfo) -> None:
        guarded("tracking=jsonl", f"study {study.name} has no summary there", lambda: self._study(study))

    def _study(self, study: StudyInfo) -> None:
        opened = _Run(study.directory / FILE)
        told = {"id": study.id, "name": study.name, "group": study.name, "job_type": "study", "tags": list(study.tags)}
        opened.write("start", **told, config=study.config)
        for name, table in study.tables.items():
            opened.table(name, table)
        for name, text in study.files.items():
            opened.write("file", name=name, text=text)
        opened.finish(study.status, study.final)


class _Run:
    def __init__(self, path: Path) -> None:
        self._path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    def write(self, event: str, **content: object) -> None:
        line = json.dumps({"event": event, **_finite(content)}, ensure_ascii=False, allow_nan=False)
        with disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def log(self, metrics: Mapping[str, float | int]) -> None:
        self.write("metrics", **{STEP if name == "step" else name: value for name, value in metrics.items()})

    def stage(self, stage: StageInfo) -> None:
        rows = [dict(row) for row in stage.metrics]
        self.write("stage", title=stage.title, id=stage.id, config=stage.config, rows=rows, final=stage.final)

    def table(self, name: str, table: Table) -> None:
        self.write("table", name=name, columns=list(table.columns), rows=[list(row) for row in table.rows])

    def histograms(self, edges: Sequence[float], counts: Mapping[str, Sequence[int]]) -> None:
        self.write("histogram", edges=list(edges), counts={name: list(values) for name, values in counts.items()})

    def finish(self, status: Status, final: Mapping[str, float | int]) -> None:
        self.write("finish", status=status, final=final)


def _finite(value: object) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
