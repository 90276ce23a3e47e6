"""Threads: the user's word counts, several processes share the cores, and torchrun's one thread is not the user's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dppo import pipeline, threads
from dppo.errors import UserError
from dppo.search import workers
from dppo.threads import SHARING
from tests.conftest import outside
from tests.test_command_line import typed

NAMES = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES")
CODE = (
    "import os, torch\n"
    "from dppo import threads\n"
    "threads.settle()\n"
    "print(torch.get_num_threads(), os.environ['RAYON_NUM_THREADS'], os.environ['TOKENIZERS_PARALLELISM'])"
)


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_own", {})
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what a test sets is undone, too
        monkeypatch.delenv(name)


def settled(own: dict[str, str], of_the_parent: dict[str, str]) -> str:
    """(threads of torch, of tokenizers, whether those are parallel) in a process of a launcher's."""
    bare = {name: value for name, value in outside().items() if name not in NAMES}
    child = {**bare, **own}
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CODE!r}], env={child!r}, check=True)"
    done = subprocess.run(
        [sys.executable, "-c", launcher], env={**bare, **of_the_parent}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_what_torchrun_limits_is_the_share_and_what_the_user_limits_stays() -> None:
    share = threads.cores()  # of one process on this machine, as LOCAL_WORLD_SIZE says
    ours = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1"}
    assert settled(ours, {}) == f"{share} {share} {str(share > 1).lower()}"
    assert settled(ours, {"OMP_NUM_THREADS": "1"}) == "1 1 false"


def test_ranks_without_a_limit_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(threads, "cores", lambda: 6)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        threads.settle()
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        threads.settle()
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        threads.settle()
        assert torch.get_num_threads() == 1
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    finally:
        torch.set_num_threads(before)


def test_workers_of_a_search_share_what_the_user_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 8)
    monkeypatch.setattr(workers, "gpus", lambda: [])
    threads.for_tokenizers(8)  # as a run in the process that starts the workers
    assert workers.shares(3) == [{"OMP_NUM_THREADS": "2", "RAYON_NUM_THREADS": "2", SHARING: "3"}] * 3
    assert workers.shares(20)[0] == {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", SHARING: "20"}
    monkeypatch.setattr(workers, "gpus", lambda: ["4", "7"])
    assert [one["CUDA_VISIBLE_DEVICES"] for one in workers.shares(3)] == ["4", "7", "4"]
    assert {one["OMP_NUM_THREADS"] for one in workers.shares(3)} == {"2"}
    assert {one[SHARING] for one in workers.shares(3)} == {"2"}, "two of three workers share a GPU"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert workers.shares(3)[0]["OMP_NUM_THREADS"] == workers.shares(3)[0]["RAYON_NUM_THREADS"] == "5"


def test_tokenizers_get_what_nobody_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "3")
    threads.for_tokenizers(1)
    assert [os.environ[name] for name in NAMES[1:3]] == ["3", "false"]
    threads.for_tokenizers(4)  # its own word can be changed
    assert [os.environ[name] for name in NAMES[1:3]] == ["3", "true"]
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "0")
    threads.for_tokenizers(4)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "0"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_grant_is_read(files: dict[str, str], found: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert threads._granted(tmp_path) == found


def test_no_more_cores_than_are_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)
    bound = threads.cores()
    for quota, expected in (("50000", 1), ("100000", 1), ("99900000", bound)):
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert threads.cores() == expected


def test_denormals_are_zero_during_a_run_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """AdamW's mean of gradients that ended long ago: 0 during a run, elsewhere a slow number."""

    def product() -> float:
        return float((torch.full((8,), 1e-30) * 1e-10).sum())

    seen: list[float] = []

    def run(*arguments: object, **keywords: object) -> tuple[float, ...]:
        seen.append(product())
        raise UserError("seen")

    monkeypatch.setattr(pipeline, "run", run)
    assert typed(monkeypatch, tmp_path, "loss=dpo") == 2
    assert seen == [0.0]
    assert product() > 0
