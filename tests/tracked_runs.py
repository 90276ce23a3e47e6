"""Runs inside the test's process that are tracked, in a directory of the test's choice, and what W&B wrote of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dppo import config, pipeline
from dppo.pipeline import ALONE, Verdict
from dppo.tracking import STEP, Place
from tests.conftest import small
from tests.test_weights_and_biases import records

POINTS = "evaluation.interim.n_points=3"


def _goes_on(row: object) -> None:
    """A verdict that ends no run."""


def run_tracked(
    root: Path, name: str, *overrides: str, verdict: Verdict = _goes_on, place: Place = ALONE
) -> tuple[float, ...]:
    """A small run in ``root/name`` with its cache in ``root/cache``."""
    words = small("loss=unll", *overrides, f"cache.dir={root / 'cache'}", "device=cpu")
    composed = config.compose(words)
    resolved = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(resolved, dict)
    return pipeline.run(
        config.load(composed, words),
        root / name,
        resolved={str(key): value for key, value in resolved.items() if value != "???"},
        overrides=words,
        verdict=verdict,
        place=place,
    )


@dataclass
class Session:
    """One offline session, read back from its file."""

    path: Path

    def __post_init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.code: int | None = None
        self.told: Any = None
        self.step_metrics: dict[str, str] = {}
        for record in records(self.path):
            for item in [*record.run.config.update, *record.config.update]:
                self.config[item.key or item.nested_key[0]] = json.loads(item.value_json)
            for item in record.summary.update:
                self.summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
            if record.HasField("history"):
                items = record.history.item
                self.history.append(
                    {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
                )
            if record.HasField("metric") and record.metric.step_metric:
                self.step_metrics[record.metric.glob_name] = record.metric.step_metric
            if record.HasField("run"):
                self.told = self.told or record.run
                self.tags = list(record.run.tags)
            if record.HasField("exit"):
                self.code = record.exit.exit_code

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history's rows of metrics, without what W&B adds."""
        rows = [row for row in self.history if STEP in row]
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]

    def table(self, name: str) -> dict[str, Any]:
        """A table that was logged, from its media file."""
        (row,) = [row for row in self.history if f"{name}/path" in row]
        found: dict[str, Any] = json.loads((self.path.parent / "files" / row[f"{name}/path"]).read_text())
        return found


def sessions(directory: Path) -> list[Session]:
    """The offline sessions of a run directory, the oldest first."""
    return [Session(path) for path in sorted(directory.glob("wandb/offline-run-*/*.wandb"))]


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl by step: those of one step together, as a tracker shows them."""
    merged: dict[int, dict[str, Any]] = {}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        merged.setdefault(row["step"], {}).update(row)
    return [
        {STEP if key == "step" else key: value for key, value in row.items() if key != "phase"}
        for _, row in sorted(merged.items())
    ]
