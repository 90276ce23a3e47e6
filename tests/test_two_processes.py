"""The whole pipeline with two processes: the same run, one run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dppo.tracking import SHARED
from tests.conftest import Run, small
from tests.test_command_line import typed
from tests.tracked_runs import metrics, sessions


@pytest.mark.parametrize(
    "loss",
    [
        ["loss=unll", "alpha=0.1"],
        pytest.param(["loss=kto", "train.tokens_per_micro_batch=100"], marks=pytest.mark.slow),
    ],
)
def test_torchrun_with_two_processes_is_the_same_experiment(
    loss: list[str], two_processes: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = small(*loss, "device=cpu")
    assert typed(monkeypatch, tmp_path, *words, "hydra.run.dir=alone", "cache.dir=cache-alone") == 0
    pair = two_processes(*words, "tracking=wandb", "hydra.run.dir=pair", "cache.dir=cache-pair")
    assert pair.returncode == 0, pair.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "pair", "cache-alone", "cache-pair"}
    assert pair.stdout.count("policy against SFT") == 1, "only the first process speaks"
    assert json.loads((tmp_path / "pair" / "versions.json").read_text())["processes"] == 2

    def losses(name: str) -> list[float]:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["train/loss"] for row in rows if "train/loss" in row]

    assert losses("pair") == pytest.approx(losses("alone"), rel=1e-4)
    (session,) = sessions(tmp_path / "pair")
    assert session.rows == metrics(tmp_path / "pair"), "only the first process logs"
    assert session.code == 0
    linked = set(session.config["stages"].values())
    assert len(linked) == len(list((tmp_path / "cache-pair" / SHARED).rglob("*.wandb")))
