"""What needs a server or a cluster's software: ``make test-cluster``; docs/clusters.md says what to install."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from tests.conftest import Run, outside, small
from tests.searches import files_with, free_port, pruning, states, until
from tests.test_launchers import SECRET, STORAGE

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(os.environ.get("DPPO_OPT_IN") != "1", reason="needs DPPO_OPT_IN=1"),
]
# Debian puts the servers' programs where no PATH leads.
_PROGRAMS = os.pathsep.join(
    [os.environ["PATH"], "/usr/sbin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))]
)
_INITDB, _POSTGRES = (shutil.which(name, path=_PROGRAMS) for name in ("initdb", "postgres"))
_MUNGED, _SLURMCTLD, _SLURMD = (shutil.which(name, path=_PROGRAMS) for name in ("munged", "slurmctld", "slurmd"))


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


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Slurm cluster of this machine alone, with a key of its own, found by ``SLURM_CONF``."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    node = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        "\n".join(
            [
                "ClusterName=here",
                f"SlurmctldHost={node}(127.0.0.1)",
                "SlurmUser=root",
                "SlurmdUser=root",
                f"AuthInfo=socket={folder / 'munge'}",
                f"SlurmctldPort={free_port()}",
                f"SlurmdPort={free_port()}",
                f"StateSaveLocation={folder / 'state'}",
                f"SlurmdSpoolDir={folder / 'spool'}",
                f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
                f"SlurmdPidFile={folder / 'slurmd.pid'}",
                "ProctrackType=proctrack/linuxproc",
                "TaskPlugin=task/none",
                "SelectType=select/cons_tres",
                "SelectTypeParameters=CR_Core",
                "ReturnToService=2",
                f"NodeName={node} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN",
                f"PartitionName=all Nodes={node} Default=YES MaxTime=INFINITE State=UP",
            ]
        )
        + "\n"
    )
    files = {
        "socket": "munge",
        "key-file": "key",
        "pid-file": "munge.pid",
        "log-file": "munge.log",
        "seed-file": "seed",
    }
    munge = [str(_MUNGED), "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items())]
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    servers: list[subprocess.Popen[str]] = []

    def serve(*command: str) -> None:
        log = (folder / f"{Path(command[0]).name}.log").open("w")
        servers.append(subprocess.Popen(command, stdout=log, stderr=log, text=True, env=outside()))

    try:
        serve(*munge)
        until((folder / "munge").exists, servers[0])
        serve(str(_SLURMCTLD), "-D", "-i")
        serve(str(_SLURMD), "-D")
        until(lambda: "idle" in subprocess.run(["sinfo", "-h"], capture_output=True, text=True).stdout, servers[-1])
        yield
    finally:
        for server in reversed(servers):
            server.terminate()
            server.wait()


@pytest.mark.skipif(_SLURMD is None or os.geteuid() != 0, reason="needs apt-get install slurm-wlm munge, and root")
def test_slurm_warns_requeues_and_the_job_goes_on(slurm: None, tmp_path: Path) -> None:
    """The batch script of docs/reliability.md; ``scancel --signal`` sends what Slurm sends before its time limit."""
    page = (Path(__file__).parent.parent / "docs" / "reliability.md").read_text()
    script = next(block for block in re.findall(r"```text\n(.*?)```", page, re.DOTALL) if "scontrol requeue" in block)
    frequent = ("sft.train.checkpoint_every=1", "train.checkpoint_every=1", "train.steps=300")
    run = f"{sys.executable} -m dppo {shlex.join(small('loss=dpo', 'device=cpu', *frequent))} hydra.run.dir=mine"
    given, n = re.subn(r"python -m dppo .*", run, script)
    assert n == 1
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n{given}")
    done = subprocess.run(["sbatch", "--parsable", "job.sh"], cwd=tmp_path, capture_output=True, text=True, check=True)
    job, log = done.stdout.strip(), tmp_path / f"slurm-{done.stdout.strip()}.out"

    def wait(reached: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, log.read_text() if log.exists() else state()
            time.sleep(0.1)

    def state() -> str:
        return subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout

    wait(lambda: bool(list(tmp_path.glob("outputs/cache/.work/preference-*/step-*"))))
    subprocess.run(["scancel", "--signal=USR1", job], check=True)
    wait(lambda: "Restarts=1" in state())
    wait(lambda: "JobState=COMPLETED" in state(), 300)  # Slurm begins a requeued job again after two minutes
    said = log.read_text()
    assert "Restarts=1" in state() and "interrupted: main stopped after step" in said
    assert "main: continues after step" in said and "Traceback" not in said
    assert json.loads((tmp_path / "mine" / "result.json").read_text())["status"] == "complete"


@pytest.mark.skipif(_SLURMD is None or os.geteuid() != 0, reason="needs apt-get install slurm-wlm munge, and root")
def test_slurm(slurm: None, dppo: Run, tmp_path: Path) -> None:
    done = dppo(*pruning(4, "hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=20"))
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == ["complete", "pruned", "pruned", "pruned"], done.stdout + done.stderr
    jobs = subprocess.run(["scontrol", "show", "jobs", "--oneliner"], capture_output=True, text=True).stdout
    assert jobs.count("JobState=COMPLETED") == 4


@pytest.fixture
def two_hosts() -> Iterator[list[tuple[str, list[str]]]]:
    """Two hosts on one cable: the address of each, and the words before a command that runs there."""
    names, addresses = [f"dppo{os.getpid()}{end}" for end in "ab"], ["10.77.0.1", "10.77.0.2"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield [
            (address, ["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable"])
            for name, address in zip(names, addresses, strict=True)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.skipif(shutil.which("ip") is None or os.geteuid() != 0, reason="needs apt-get install iproute2, and root")
@pytest.mark.parametrize("divided", [[], ["train=fsdp"]], ids=["ddp", "fsdp"])
def test_two_hosts_train_together_and_one_may_be_lost(
    divided: list[str], two_hosts: list[tuple[str, list[str]]], dppo: Run, tmp_path: Path
) -> None:
    """As docs/clusters.md has it, over a network; one host is gone in the middle, and the same command goes on."""
    words = small("loss=unll", "alpha=0.1", "device=cpu", "train.steps=200", "train.checkpoint_every=1")
    assert dppo(*words, "hydra.run.dir=alone", "cache.dir=cache-alone").returncode == 0
    run = ["-m", "dppo", *words, *divided, "hydra.run.dir=both", "cache.dir=cache-both"]
    head = two_hosts[0][0]

    def begin() -> list[subprocess.Popen[str]]:
        launch = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
        launch += ["--rdzv_endpoint", f"{head}:29500", "--rdzv_id", "run", "--rdzv_conf"]
        return [
            subprocess.Popen(
                # Both have the name of this machine, by which torchrun would find out who is the head.
                [*inside, sys.executable, *launch, f"is_host={address == head}", "--local_addr", address, *run],
                cwd=tmp_path,
                env={**outside(), "OMP_NUM_THREADS": "1"},
                stdout=(tmp_path / f"{address}.log").open("a"),
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for address, inside in two_hosts
        ]

    def said() -> str:
        return "".join(path.read_text() for path in tmp_path.glob("*.log"))

    first, second = begin()
    until(lambda: bool(list(tmp_path.glob("cache-both/.work/preference-*/step-*"))), first)
    for process in [psutil.Process(second.pid), *psutil.Process(second.pid).children(recursive=True)]:
        process.kill()
    second.wait()
    assert first.wait(timeout=120) != 0, said()
    assert "another process of this run has ended" in said()
    assert [process.wait(timeout=300) for process in begin()] == [0, 0], said()
    assert "main: continues after step" in said()
    result = json.loads((tmp_path / "both" / "result.json").read_text())
    assert (result["status"], result["processes"]) == ("complete", 2)
    losses = [
        [row["train/loss"] for row in rows if "train/loss" in row]
        for rows in (
            [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("alone", "both")
        )
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
