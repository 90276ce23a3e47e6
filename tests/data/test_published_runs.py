"""Whole runs on published layouts: chats alone, chats chosen apart from the preferences, and a shared SFT model."""

from __future__ import annotations

from pathlib import Path

import pytest

from dppo.errors import UserError
from dppo.evaluation.comparison import configurations
from dppo.evaluation.runs import find_runs
from tests.runs import run_small, write_run

from .test_schemas import put, turn
from .test_sources import pair_row, preferences


def ultrachat(folder: Path, n: int = 60) -> Path:
    for split in ("train_sft", "test_sft"):
        rows = [
            {"prompt": f"{split} {k}", "messages": [turn("user", f"a boat {k}"), turn("assistant", "a boat")]}
            for k in range(n if split == "train_sft" else 2 * n)
        ]
        put(folder / "data" / f"{split}-00000-of-00001.parquet", rows[n * (split == "test_sft") :])
    return folder


def test_chats_alone_train_sft_and_a_preference_loss_is_refused(tmp_path: Path) -> None:
    words = ["dataset=ultrachat", f"dataset.path={ultrachat(tmp_path / 'chats')}", "reward=length"]
    found = run_small(tmp_path, "loss=none", *words)
    assert found.result["status"] == "complete"
    assert found.result["win_rate"]["value"] == 0.5
    with pytest.raises(UserError, match="has no prompt with a better and a worse answer, which phase main needs"):
        run_small(tmp_path, "loss=dpo", *words)


def test_preferences_with_chats_of_their_own_share_one_sft_model(tmp_path: Path) -> None:
    rows = [pair_row(f"a boat {n}", "a boat", "a fox") for n in range(100, 140)]
    test = [pair_row(f"a fox {n}", "a fox", "a boat") for n in range(20)]
    chats = ["dataset/chats=ultrachat", f"dataset.sft_path={ultrachat(tmp_path / 'chats')}"]
    words = ["loss=dpo", "dataset=ultrafeedback", *chats, "reward=length", "dataset.validation_share=0.2"]
    first = run_small(tmp_path, *words, f"dataset.path={preferences(tmp_path / 'one', rows, test)}")
    assert first.result["status"] == "complete"
    assert "sft" in first.built
    other = [pair_row(row["prompt"], "a boat near", "a") for row in rows]
    second = run_small(tmp_path, *words, f"dataset.path={preferences(tmp_path / 'two', other, test)}")
    assert "preference" in second.built
    assert "sft" not in second.built


def test_runs_with_caches_in_two_places_are_one_configuration(tmp_path: Path) -> None:
    for seed in (0, 1):
        data = {"path": "we/pairs", "cache_dir": f"cache-{seed}"}
        settings = {"dataset": data, "cache": {"dir": f"cache-{seed}"}}
        write_run(tmp_path / str(seed), "loss=dpo", seed=seed, rewards=[1.0, -1.0], settings=settings)
    (found,) = configurations(find_runs([tmp_path]))
    assert sorted(found.runs) == [0, 1]
