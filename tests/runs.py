"""Runs inside the test's process: the same pipeline as the command line's, without the seconds of start-up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dppo import config, pipeline
from dppo.errors import Pruned
from dppo.pipeline import Verdict
from tests.conftest import small


@dataclass(frozen=True)
class Finished:
    directory: Path
    values: tuple[float, ...]

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "result.json").read_text())
        return found

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    @property
    def samples(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "samples.jsonl").read_text().splitlines()]

    @property
    def built(self) -> list[str]:
        """The stages that this run did not find in the cache, each once."""
        return list(dict.fromkeys(item["stage"] for item in self.result["timings"]["stages"] if not item["reused"]))

    @property
    def stages(self) -> list[str]:
        return [item["stage"] for item in self.result["timings"]["stages"]]


def _goes_on(row: object) -> None:
    """A verdict that ends no run."""


def run_small(root: Path, *overrides: str, verdict: Verdict = _goes_on) -> Finished:
    """A small run with its cache in ``root/cache`` and a directory of its own."""
    words = small(*overrides, f"cache.dir={root / 'cache'}", "device=cpu")
    composed = config.compose(words)
    experiment = config.load(composed, words)
    number = sum(1 for _ in root.glob("run-*"))
    directory = root / f"run-{number}"
    values = pipeline.run(experiment, directory, resolved={"overrides": words}, overrides=words, verdict=verdict)
    return Finished(directory, values)


def run_pruned(root: Path, *overrides: str, verdict: Verdict = _goes_on) -> Finished:
    """The same for a run that is pruned."""
    directory = root / f"run-{sum(1 for _ in root.glob('run-*'))}"
    with pytest.raises(Pruned):
        run_small(root, *overrides, verdict=verdict)
    return Finished(directory, ())
