"""Runs that are tracked online, by W&B's own client, at a server on loopback."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dppo.loop import Interrupted
from dppo.tracking import SHARED, STEP
from tests.runs import Finished
from tests.tracked_runs import POINTS, metrics, run_tracked, sessions
from tests.wandb_server import Received, forget, serve

KEY = "planted0123456789abcdef0123456789abcdef0"
ONLINE = ("tracking=wandb", "tracking.mode=online", "tracking.init_timeout_seconds=10", POINTS)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    """The only server that W&B knows of, and a key for it."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    with serve() as received:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("WANDB_BASE_URL", received.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        forget()
        yield received
        forget()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def rows(received: Received, run: str) -> list[dict[str, object]]:
    found = [row for row in received.rows(run) if STEP in row]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in found]


def test_a_run_and_its_stages_arrive_and_a_continued_one_sends_nothing_twice(server: Received, tmp_path: Path) -> None:
    def stop(row: dict[str, float | int]) -> None:
        if row["interim/percent"] == 50:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run_tracked(tmp_path, "run", *ONLINE, verdict=stop)
    (run,) = [name for name, told in server.runs.items() if told["jobType"] == "experiment"]
    assert server.exit_codes[run] == 255
    assert [row[STEP] for row in rows(server, run)] == [0, 1, 2, 3, 4]

    run_tracked(tmp_path, "run", *ONLINE)
    assert [name for name, told in server.runs.items() if told["jobType"] == "experiment"] == [run]
    expected = metrics(tmp_path / "run")
    came = rows(server, run)
    assert [row[STEP] for row in came] == list(range(9))
    assert came[5:] == expected[5:]
    sent = [row[STEP] for name, row in server.lines if name == run and STEP in row]
    assert sent == list(range(9)), "each once"
    assert server.exit_codes[run] == 0
    assert server.summary[run]["status"] == "complete"
    assert server.runs[run]["tags"] == ["unll"]
    assert server.summary[run]["final/win_rate.value"] == Finished(tmp_path / "run", ()).result["win_rate"]["value"]

    stages = {name for name, told in server.runs.items() if told.get("groupName") == "shared stages"}
    linked = json.loads(server.runs[run]["config"])["stages"]["value"]
    assert set(linked.values()) == stages
    assert [server.exit_codes[stage] for stage in stages] == [0, 0, 0]
    assert f"{server.url}/me/dppo/runs/{linked['sft']}" in server.runs[run]["notes"]
    (sft,) = [name for name in stages if name.startswith("sft-")]
    assert rows(server, sft) == metrics(tmp_path / "cache" / sft.replace("-", "/"))
    steps = [row[STEP] for name, row in server.lines if name == sft]
    assert steps == list(range(5)), "logged once"

    assert list((tmp_path / "run").glob("wandb/offline-run-*")) == []
    for path in (*(tmp_path / "run").rglob("*"), *(tmp_path / "cache" / SHARED).rglob("*")):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def test_a_server_that_falls_silent_does_not_hold_up_the_end(
    server: Received, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def mute(row: dict[str, float | int]) -> None:
        server.mute.set()

    started = time.monotonic()
    run_tracked(tmp_path, "run", *ONLINE, "tracking.finish_timeout_seconds=2", verdict=mute)
    assert time.monotonic() - started < 60
    assert Finished(tmp_path / "run", ()).result["status"] == "complete"
    lines = [record.getMessage() for record in caplog.records if record.name == "dppo.tracking"]
    assert len(lines) == 1
    assert lines[0].startswith("warning: tracking=wandb: ")
    started = time.monotonic()
    forget()  # ends W&B's service, as the end of the process does
    assert time.monotonic() - started < 10


def test_a_server_that_refused_is_not_asked_again_at_once(
    server: Received, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The jobs of a multirun do not wait for the server one after the other."""
    server.broken = True
    run_tracked(tmp_path, "first", *ONLINE)
    asked = len(server.requests)
    assert asked > 0
    run_tracked(tmp_path, "second", *ONLINE, "seed=1")
    assert len(server.requests) == asked
    first, second = [record.getMessage() for record in caplog.records if record.name == "dppo.tracking"]
    assert first == second
    assert first.startswith("warning: tracking.mode=online: W&B can't be used (")
    assert first.endswith("; this run is tracked offline")
    for name in ("first", "second"):
        (found,) = sessions(tmp_path / name)
        assert found.rows == metrics(tmp_path / name)
        assert list((tmp_path / name).glob("wandb/run-*")) == []
