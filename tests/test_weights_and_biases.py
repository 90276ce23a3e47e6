"""The W&B mirror of a run, with W&B itself: no account, no network, a server that never answers."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2  # noqa: TID251 - what W&B writes is read back

from dppo.results import final_scalars
from tests.conftest import small
from tests.forks import Forks

KEY = "planted0123456789abcdef0123456789abcdef0"
WORDS = (*small("loss=dpo"), "tracking=wandb", "hydra.run.dir=run", "cache.dir=cache")
ONLINE = (*WORDS, "tracking.mode=online", "tracking.init_timeout_seconds=3")

Dppo = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def address() -> Iterator[Callable[[bool], str]]:
    """The URL of a loopback port: one that takes connections and never answers, or one where nobody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))

        def url(listens: bool) -> str:
            if listens:
                server.listen(100)
            return f"http://127.0.0.1:{server.getsockname()[1]}"

        yield url


@pytest.fixture
def dppo(tmp_path: Path, forks: Forks) -> Dppo:
    """Run ``python -m dppo`` with nothing of this machine's W&B account; the run must end within ``timeout``."""
    (tmp_path / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}

    def run(
        *words: str, timeout: float = 120, env: dict[str, str], terminal: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        env = {**kept, "HOME": str(tmp_path / "home"), **env}
        if terminal is None:
            return forks.run("dppo", words, cwd=tmp_path, env=env, timeout=timeout)
        command = [sys.executable, "-m", "dppo", *words]
        pipe = subprocess.PIPE
        return subprocess.run(
            command, cwd=tmp_path, env=env, text=True, timeout=timeout, stdin=terminal, stdout=pipe, stderr=terminal
        )

    return run


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, 32 KiB blocks of fragments, after a header of 7 bytes."""
    record: Any = vars(wandb_internal_pb2)["Record"]
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last fragment of one
            yield record.FromString(whole)
            whole = b""


def offline(directory: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], int]:
    """Config, summary, history and exit code of the one offline run below a run directory."""
    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    code = -1
    for record in records(path):
        for item in [*record.run.config.update, *record.config.update]:
            config[item.key or item.nested_key[0]] = json.loads(item.value_json)
        for item in record.summary.update:
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        if record.HasField("history"):
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            history.append(row)
        if record.HasField("exit"):
            code = record.exit.exit_code
    return config, summary, history, code


def check(tmp_path: Path, *, key: bool) -> None:
    """The run is complete, its mirror is whole, nothing of an attempt is left, and the planted key is nowhere."""
    assert list((tmp_path / "run" / "wandb").glob("run-*")) == []
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "complete"
    config, summary, history, code = offline(tmp_path / "run")
    assert code == 0
    assert config["hp"]["loss._target_"].endswith("DPO")
    assert config["train"]["steps"] == config["hp"]["train.steps"] == 8
    assert summary["status"] == "complete"
    final = {f"final/{name}": value for name, value in final_scalars(result).items() if name != "schema"}
    assert {name: value for name, value in summary.items() if name.startswith("final/")} == final
    assert summary["final/win_rate.value"] == result["win_rate"]["value"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [row["train/loss"] for row in history if "train/loss" in row]
    assert logged == [row["train/loss"] for row in rows if "train/loss" in row]
    if key:
        for path in tmp_path.rglob("*"):
            if path.is_file():
                assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    "listens", [pytest.param(False, marks=pytest.mark.slow, id="closed port"), pytest.param(True, id="never answers")]
)
def test_online_without_a_network_says_one_line_and_goes_on_offline(
    listens: bool, dppo: Dppo, address: Callable[[bool], str], tmp_path: Path
) -> None:
    done = dppo(*ONLINE, env={"WANDB_BASE_URL": address(listens), "WANDB_API_KEY": KEY})
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "wandb" in line.lower() or "W&B" in line]
    (line,) = [line for line in said if not line.startswith("python -m dppo")]
    assert line.startswith("warning: tracking.mode=online: W&B can't be used (")
    assert line.endswith("; this run is tracked offline")
    check(tmp_path, key=True)


def test_online_without_a_login_says_one_line_and_goes_on_offline(
    dppo: Dppo, address: Callable[[bool], str], tmp_path: Path
) -> None:
    done = dppo(*ONLINE, env={"WANDB_BASE_URL": address(False)})
    assert done.returncode == 0, done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "W&B" in line]
    assert said == [
        "warning: tracking.mode=online: W&B can't be used (No API key configured. Use `wandb login` to log in.); "
        "this run is tracked offline"
    ]
    check(tmp_path, key=False)


def test_online_asks_nothing_in_a_terminal(dppo: Dppo, address: Callable[[bool], str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        # W&B asks where both of these are a terminal; what a run says there fits into the terminal's buffer.
        done = dppo(*ONLINE, env={"WANDB_BASE_URL": address(False)}, terminal=theirs)
        assert done.returncode == 0
        assert "this run is tracked offline" in done.stdout
    finally:
        os.close(ours)
        os.close(theirs)
    check(tmp_path, key=False)


@pytest.mark.slow
def test_offline_needs_neither(dppo: Dppo, address: Callable[[bool], str], tmp_path: Path) -> None:
    done = dppo(*WORDS, env={"WANDB_BASE_URL": address(True), "WANDB_API_KEY": KEY})
    assert done.returncode == 0, done.stderr
    assert "W&B" not in done.stdout + done.stderr
    check(tmp_path, key=True)
