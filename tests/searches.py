"""A search whose trials are known beforehand: the first one is good, a pruner ends all others."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import small
from tests.forks import Forked

# The tiny SFT model's answers are empty. The first rate makes longer ones at once: the policy wins every comparison.
# The others leave the policy as it is: every comparison is a tie, and the trial is below the median from the start.
_RATES = ("1e-1", "1e-9", "2e-9", "3e-9", "4e-9", "5e-9")


def pruning(n_trials: int, *overrides: str) -> list[str]:
    """The words of such a search, of at most six trials; one process prunes all of them but the first."""
    return [
        "-m",
        "hydra/sweeper=optuna",
        "hydra/sweeper/sampler=grid",
        f"train.learning_rate={','.join(_RATES[:n_trials])}",
        "hydra.sweeper.pruner.n_startup_trials=1",
        *small("loss=dpo", "reward=length", "train.schedule=constant", "train.warmup_ratio=0", *overrides),
    ]


def states(root: Path, study: str = "search") -> list[str]:
    """How the trials of a search that ran in ``root`` ended, by number, as its table has it."""
    with (root / "outputs" / "sweeps" / study / "trials.csv").open() as file:
        return [row["state"] for row in csv.DictReader(file)]


def files_with(root: Path, secret: str) -> list[Path]:
    """Files below ``root`` that hold ``secret``, in text or in anything pickled."""
    return [path for path in root.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def grpc_server(folder: Path) -> Iterator[str]:
    """Optuna's proxy in a process of its own, before a database in ``folder``; gives its URL."""
    port = free_port()
    code = (
        "import optuna; from optuna.storages import RDBStorage, run_grpc_proxy_server; "
        f"run_grpc_proxy_server(RDBStorage('sqlite:///{folder}/behind.db'), host='127.0.0.1', port={port})"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    try:
        until(lambda: _answers(port), process)
        yield f"grpc://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def start(root: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """``python -m dppo`` in ``root``, not waited for."""
    return subprocess.Popen(
        [sys.executable, "-m", "dppo", *words],
        cwd=root,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(reached: Callable[[], bool], process: subprocess.Popen[Any] | Forked) -> None:
    """Wait for what ``process`` does."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
