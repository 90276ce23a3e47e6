"""What a tracker is told of where a run belongs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hydra.types import RunMode
from omegaconf import open_dict

from dppo import config
from dppo.__main__ import _place
from dppo.tracking import Place


def place(words: list[str], directory: str, *, mode: RunMode, sweep: str = "sweep", search: bool = False) -> Place:
    sweeper = ["hydra/sweeper=optuna", "hydra.sweeper.study_name=a_study"] if search else []
    hydra = config.compose([*words, *sweeper], with_hydra=True).hydra
    with open_dict(hydra):
        hydra.mode, hydra.sweep.dir = mode, sweep
    return _place(hydra, words, Path(directory), search=search)


def test_a_single_run_is_grouped_by_its_preset_alone() -> None:
    alone = place(["loss=dpo"], "outputs/runs/1", mode=RunMode.RUN)
    assert (alone.group, alone.job_type, alone.label, alone.presets) == (None, "experiment", "", ())
    assert alone.choices["loss"] == "dpo"
    assert not any(group.startswith("hydra") for group in alone.choices)
    preset = place(["+experiment=unll_then_dpo"], "outputs/runs/1", mode=RunMode.RUN)
    assert (preset.group, preset.presets) == ("unll_then_dpo", ("unll_then_dpo",))


@pytest.mark.parametrize(
    ("sweep", "group"),
    [("outputs/multirun/2026-11-22/13-09-54", "2026-11-22/13-09-54"), ("mine", "mine"), ("/data/mine", "mine")],
)
def test_a_multirun_is_grouped_by_its_folder(sweep: str, group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dppo", "-m", "seed=0,1", "train.steps=5"])
    found = place(["seed=1", "train.steps=5"], f"{sweep}/0", mode=RunMode.MULTIRUN, sweep=sweep)
    assert (found.group, found.job_type, found.varied) == (group, "experiment", ("seed=1",))


@pytest.mark.parametrize(
    ("folder", "job_type", "label"),
    [
        ("7", "trial", "trial 7"),
        ("7/seed=2", "trial", "trial 7"),
        ("baselines/loss=dpo,beta=0.1/seed=0", "baseline", "baseline loss=dpo beta=0.1"),
        ("results/best,trial,13/seed=3", "result", "result best trial 13"),
    ],
)
def test_the_folders_of_a_study_tell_what_a_run_is(folder: str, job_type: str, label: str) -> None:
    found = place(["loss=dpo"], f"sweep/{folder}", mode=RunMode.MULTIRUN, search=True)
    assert (found.group, found.job_type, found.label) == ("a_study", job_type, label)
