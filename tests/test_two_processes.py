"""The whole pipeline with two processes: the same run, one run directory, the work shared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

from dppo.artifacts.manifest import Manifest
from dppo.artifacts.stores import JsonRows, RowFormat, TokenRows, shard_keys
from dppo.tracking import SHARED
from tests.conftest import Run, outside, small
from tests.searches import until
from tests.test_command_line import typed
from tests.tracked_runs import metrics, sessions

FSDP2 = Path(__file__).parent.parent / "docs" / "accelerate" / "fsdp2.yaml"


@pytest.mark.parametrize(
    ("loss", "divided"),
    [
        (["loss=unll", "alpha=0.1"], ["train=fsdp", "train.activation_checkpointing=true"]),
        pytest.param(["loss=kto", "train.tokens_per_micro_batch=100"], [], marks=pytest.mark.slow),
    ],
)
def test_torchrun_with_two_processes_is_the_same_experiment(
    loss: list[str], divided: list[str], two_processes: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = small(*loss, "device=cpu")
    assert typed(monkeypatch, tmp_path, *words, "hydra.run.dir=alone", "cache.dir=cache-alone") == 0
    # The same SFT model to the last bit: what it makes must be the same rows.
    shutil.copytree(tmp_path / "cache-alone" / "sft", tmp_path / "cache-pair" / "sft")
    pair = two_processes(*words, *divided, "tracking=wandb", "hydra.run.dir=pair", "cache.dir=cache-pair")
    assert pair.returncode == 0, pair.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "pair", "cache-alone", "cache-pair"}
    assert pair.stdout.count("policy against SFT") == 1, "only the first process speaks"
    assert json.loads((tmp_path / "pair" / "versions.json").read_text())["processes"] == 2
    results = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in ("alone", "pair")}
    assert [results[name]["processes"] for name in ("alone", "pair")] == [1, 2]

    def losses(name: str) -> list[float]:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["train/loss"] for row in rows if "train/loss" in row]

    assert losses("pair") == pytest.approx(losses("alone"), rel=1e-4)
    (sft,) = (path.name for path in (tmp_path / "cache-alone" / "sft").iterdir())
    for stage, of_sft in (("generate", True), ("reference", True), ("scores", False)):
        for place in (tmp_path / "cache-alone" / stage).iterdir():
            if of_sft and sft not in Manifest.read(place).parents:
                continue  # answers of the policies, which are the same up to rounding only
            one, pair_rows = stored(place), stored(tmp_path / "cache-pair" / stage / place.name)
            shared = one.keys() & pair_rows.keys()
            assert len(shared) == len(one) if of_sft else shared
            for key in shared:
                assert pair_rows[key] == (pytest.approx(one[key], abs=1e-5) if stage == "reference" else one[key]), key
            assert len(list((tmp_path / "cache-pair" / stage / place.name / "shards").iterdir())) >= 2, "both wrote"
    (session,) = sessions(tmp_path / "pair")
    assert session.rows == metrics(tmp_path / "pair"), "only the first process logs"
    assert session.code == 0
    linked = set(session.config["stages"].values())
    assert len(linked) == len(list((tmp_path / "cache-pair" / SHARED).rglob("*.wandb")))


@pytest.mark.slow
def test_adapters_and_a_reward_model_train_divided_under_accelerate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three training stages, each divided because Accelerate's configuration says so; answers, KL, best weights."""
    words = small(
        "loss=unll",
        "train=lora",
        "train.save=best",
        "reward=bradley_terry",
        "reward.train.steps=4",
        "evaluation.interim.n_points=1",
        "evaluation.interim.n_prompts=7",
        "evaluation.interim.kl=true",
        "device=cpu",
    )
    assert typed(monkeypatch, tmp_path, *words, "hydra.run.dir=alone", "cache.dir=cache-alone") == 0
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(FSDP2), "-m", "dppo"]
    done = subprocess.run(
        [sys.executable, *launch, *words, "hydra.run.dir=pair", "cache.dir=cache-pair"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        env={**outside(), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, both = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "pair")
    )
    for row, expected in zip(both, one, strict=True):
        del row["phase"], expected["phase"]
        clock = [key for key in row if "second" in key]
        assert {key: row[key] for key in row if key not in clock} == pytest.approx(
            {key: expected[key] for key in expected if key not in clock}, rel=1e-4, abs=1e-6
        )
    results = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in ("alone", "pair")}
    assert results["pair"]["processes"] == 2
    assert results["pair"]["reward_model"]["splits"] == results["alone"]["reward_model"]["splits"]
    place = tmp_path / "cache-pair" / results["pair"]["models"]["policy"]
    assert Manifest.read(place).processes == 2
    weights = {name: tmp_path / f"cache-{name}" / results[name]["models"]["policy"] for name in results}
    ours, alone = (load_file(weights[name] / "adapter_model.safetensors") for name in ("pair", "alone"))
    assert ours.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-4)


def stored(place: Path) -> dict[str, Any]:
    """The rows of a store, by key."""
    kind: RowFormat[Any] = TokenRows() if Manifest.read(place).kind == "token rows" else JsonRows()
    found: dict[str, Any] = {}
    for shard in (place / "shards").iterdir():
        keys = shard_keys(shard, kind)
        rows = kind.rows(shard, range(len(keys)))
        assert not found.keys() & set(keys), "no row is made twice"
        found |= zip(keys, (row.tolist() if isinstance(row, np.ndarray) else row for row in rows), strict=True)
    return found


@contextmanager
def started(folder: Path, module: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """``module`` under torchrun with two processes, in ``folder``; none of them is left."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    with (folder / "said").open("w") as said:
        launched = subprocess.Popen(
            [sys.executable, *launcher, "-m", module, *words],
            cwd=folder,
            stdout=said,
            stderr=said,
            env={**outside(), "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            text=True,
        )
        family: list[psutil.Process] = []
        try:
            yield launched
            family = psutil.Process(launched.pid).children(recursive=True) if launched.poll() is None else []
        finally:
            launched.kill()
            launched.wait()
            for one in family:
                with suppress(psutil.Error):
                    one.kill()
    assert not family, "a process outlived the run"


def test_an_error_of_one_process_ends_all_in_one_line(tmp_path: Path) -> None:
    """The second process alone is told to write longer answers than its model has positions for."""
    with started(tmp_path, "tests.apart", *small("device=cpu", "loss=unll"), "generation.max_new_tokens=9999") as run:
        assert run.wait(120) != 0
    lines = (tmp_path / "said").read_text().splitlines()
    (error,) = [line for line in lines if "error: " in line and "torch.distributed" not in line]
    assert error.startswith("error: generation.max_new_tokens=9999: the longest prompt has")
    assert not any("this is a bug" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["y_gen", "main"])
def test_a_process_that_is_killed_takes_the_others_with_it(stage: str, tmp_path: Path) -> None:
    """In generation and in training; started again, the run ends as it would have."""
    words = small("device=cpu", "loss=unll", "train.steps=400", "dataset.n_pairs=2048", "dataset.n_chats=64")
    words += ["generation.tokens_per_batch=64"] if stage == "y_gen" else ["train.sharding=fsdp"]
    place = tmp_path / "outputs" / "cache" / {"y_gen": "sft", "main": "reference"}[stage]
    with started(tmp_path, "dppo", *words) as run:
        until(lambda: any(place.glob("*/manifest.json")), run)
        time.sleep(1)
        (second,) = (
            one for one in psutil.Process(run.pid).children(recursive=True) if one.environ().get("RANK") == "1"
        )
        second.send_signal(signal.SIGKILL)
        assert run.wait(60) != 0
    said = (tmp_path / "said").read_text()
    assert "policy against SFT" not in said
    assert "this is a bug" not in said
