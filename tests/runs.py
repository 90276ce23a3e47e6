"""Runs inside the test's process, without the seconds of start-up; and run directories written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dppo import config, pipeline
from dppo.errors import Pruned
from dppo.pipeline import Verdict
from dppo.results import SCHEMA
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


def write_run(
    path: Path,
    *words: str,
    seed: int,
    rewards: Sequence[float] = (),
    status: str = "complete",
    settings: Mapping[str, Any] | None = None,
    first_prompt: int = 0,
    answers: Sequence[str] | None = None,
) -> Path:
    """A run directory whose SFT model has reward 0 for every prompt."""
    path.mkdir(parents=True)
    result: dict[str, Any] = {"schema": SCHEMA, "status": status}
    if status == "complete":
        result |= {
            "n_prompts": len(rewards),
            "reward": {"policy": {"value": float(np.mean(rewards))}},
            "kl": {"nats_per_answer": 2.0 + seed},
            "length": {"policy": {"tokens": 10.0}},
        }
    (path / "result.json").write_text(json.dumps(result))
    (path / "config.yaml").write_text(
        yaml.safe_dump({"seed": seed, "loss": list(words), "device": "cpu", **(settings or {})})
    )
    (path / "command.txt").write_text(" ".join(["python", "-m", "dppo", *words, f"seed={seed}", "cache.dir=x"]))
    samples = [
        {
            "prompt_id": f"p{first_prompt + n}",
            "prompt": f"question {n}",
            "policy_answer": "word" if answers is None else answers[n],
            "reference_answer": "none",
            "policy_reward": reward,
            "reference_reward": 0.0,
        }
        for n, reward in enumerate(rewards)
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    pairs = [
        {
            "example_id": f"e{n}",
            "chosen": -2.0 + reward,
            "rejected": -2.0,
            "reference_chosen": -3.0,
            "after_edit": None if n == 0 else -1.0 + reward,
            "reference_after_edit": None if n == 0 else -1.5,
        }
        for n, reward in enumerate(rewards)
    ]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return path
