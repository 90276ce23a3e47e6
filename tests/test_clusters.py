"""What needs a server or a cluster's software: ``make test-cluster``; docs/clusters.md says what to install."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.searches import files_with, free_port, pruning, states, until
from tests.test_launchers import SECRET, STORAGE

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.environ.get("DPPO_OPT_IN") != "1", reason="needs DPPO_OPT_IN=1"),
]
# Debian puts the server's programs where no PATH leads.
_PROGRAMS = os.pathsep.join([os.environ["PATH"], *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))])
_INITDB, _POSTGRES = (shutil.which(name, path=_PROGRAMS) for name in ("initdb", "postgres"))


@pytest.mark.skipif(find_spec("ray") is None, reason="needs pip install hydra-ray-launcher")
def test_ray(dppo: Run, tmp_path: Path) -> None:
    done = dppo(*pruning(4, "hydra/launcher=ray"))
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == ["complete", "pruned", "pruned", "pruned"], done.stdout + done.stderr


@pytest.fixture
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL, with a password, of a server of its own; it refuses to run as root, so that somebody else runs it."""
    folder = tmp_path_factory.mktemp("postgresql")
    user = "nobody" if os.geteuid() == 0 else None
    (folder / "password").write_text(SECRET)
    if user:
        for path in (*list(folder.parents)[:2], folder):
            path.chmod(0o755)
        for path in (folder, folder / "password"):
            shutil.chown(path, user)
    data, port = folder / "data", free_port()
    made = subprocess.run(
        [str(_INITDB), "-D", data, "-U", "me", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}"],
        user=user,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [str(_POSTGRES), "-D", data, "-p", str(port), "-k", str(folder), "-h", "127.0.0.1"],
        user=user,
        cwd=folder,
        stdout=log,
        stderr=log,
        text=True,
    )
    try:
        until(lambda: "ready to accept connections" in (folder / "log").read_text(), server)
        yield f"postgresql://me:{SECRET}@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.skipif(_POSTGRES is None, reason="needs apt-get install postgresql")
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_postgresql(launcher: str, postgresql: str, dppo: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_STORAGE", postgresql)
    done = dppo(*pruning(4, STORAGE, f"hydra/launcher={launcher}"))
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == ["complete", "pruned", "pruned", "pruned"], done.stdout + done.stderr
    assert not files_with(tmp_path, SECRET)
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.skipif(_POSTGRES is None, reason="needs apt-get install postgresql")
def test_workers_and_postgresql(postgresql: str, dppo: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPPO_STORAGE", postgresql)
    done = dppo(*pruning(6, STORAGE, "hydra.sweeper.n_jobs=2", "hydra/launcher=submitit_local"))
    assert done.returncode == 0, done.stderr
    ended = states(tmp_path)
    assert len(ended) == 6
    assert set(ended) == {"complete", "pruned"}
    assert not files_with(tmp_path, SECRET)
