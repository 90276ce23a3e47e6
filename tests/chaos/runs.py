"""What is run and killed, how one start of it goes, and when it is struck."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.starter import OPERATIONS, STRUCK
from tests.conftest import outside, small

_TIMEOUT = 300.0
_PRUNED = ("hydra.sweeper.pruner.n_startup_trials=2", "hydra.sweeper.sampler.n_startup_trials=2")
# What a trial tries is decided by its index alone, so that several workers make the trials of one.
_FREE = ("hydra/sweeper/sampler=random", "hydra/sweeper/pruner=none")
_FREQUENT = ("sft.train.checkpoint_every=1", "train.checkpoint_every=2", "train.tokens_per_micro_batch=200")
_INTERIM = ("evaluation.interim.n_points=2", "evaluation.interim.n_prompts=4")
_ADAPTERS = ("train=lora", "train.lora.dropout=0.1", "train.save=best", "train.evaluate_every=2")


@dataclass(frozen=True)
class Case:
    """A command line that is run to its end, however often it is killed; a search has its study in ``study``."""

    name: str
    words: tuple[str, ...]
    study: str | None = None


def _run(name: str, *words: str) -> Case:
    return Case(name, (*small(*words, "device=cpu", "cache.dir=cache"), "hydra.run.dir=run"))


def _search(name: str, *words: str) -> Case:
    given = small("loss=dpo", "device=cpu", "cache.dir=cache", "reward=length", "evaluation.split=validation", *words)
    fixed = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.resume=true",
        f"hydra.sweeper.study_name={name}",
        "train.learning_rate=tag(log,interval(1e-4,1e-1))",
        "hydra.sweeper.max_failure_rate=0",
    ]
    return Case(name, ("-m", *fixed, *given), study=name)


CASES = {
    case.name: case
    for case in (
        _run("unll", "loss=unll", "alpha=0.1", *_INTERIM, *_FREQUENT),
        _run("lora", "loss=dpo", *_ADAPTERS, *_FREQUENT),
        _run("statistics", "loss=kto", "sft.train.dropout=0.1", *_FREQUENT),
        _run(
            "on_policy",
            "loss=dpo",
            "dataset=on_policy",
            "reward=bradley_terry",
            "reward.train.steps=6",
            "reward.train.batch_size=4",
            "reward.train.checkpoint_every=2",
            "reward.train.evaluate_every=null",
            "reward.n_pairs=8",
            *_FREQUENT,
        ),
        _search("search", "hydra.sweeper.n_trials=4", *_PRUNED, *_FREQUENT),
        _search("workers", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2", *_FREE, *_FREQUENT),
        _search(
            "replicated",
            "hydra.sweeper.n_trials=2",
            "hydra.sweeper.replicates=2",
            "hydra.sweeper.test_seeds=1",
            'hydra.sweeper.baselines=["loss=none"]',
            *_PRUNED,
            *_FREQUENT,
        ),
    )
}


@dataclass(frozen=True)
class Strike:
    """When a run is struck: before a change of a file, or some time after a stage's line in its log or its start.

    ``worker``: not the command itself but one of the processes that it has started.
    """

    how: str  # operation | line | time
    signal: signal.Signals
    operation: int | None = None
    line: str = ""
    seconds: float = 0.0
    worker: bool = False


@dataclass
class Ended:
    """How one start ended; ``stage`` is where it was when it was struck, ``place`` what it was about to change."""

    status: int
    log: str
    struck: bool
    seconds: float

    @property
    def stage(self) -> str:
        return stage_of(self.log)

    @property
    def place(self) -> str:
        found = re.findall(rf"^{STRUCK}(.*)$", self.log, re.MULTILINE)
        return _kind(found[-1]) if found else ""

    @property
    def operations(self) -> int:
        found = re.findall(rf"^{OPERATIONS}(\d+)$", self.log, re.MULTILINE)
        return int(found[-1]) if found else 0

    @property
    def lines(self) -> list[str]:
        """The stages that it built, as the beginnings of their lines."""
        return re.findall(r"^build \w+", self.log, re.MULTILINE)


_STAGE = re.compile(r"^(?:(?:build|reuse) (\w+) |(policy against)|(trial \d+ (?:\(|complete|pruned|failed)))")


def stage_of(log: str) -> str:
    """The stage that a log ends in."""
    stage = "start"
    for line in log.splitlines():
        if match := _STAGE.match(line):
            built, over, _ = match.groups()
            stage = built or ("end" if over else "bookkeeping")
    return stage


def _kind(operation: str) -> str:
    """A change of a file without the names that differ from run to run."""
    event, _, path = operation.partition(" ")
    parts = [part for part in path.split("/") if part not in ("cache", "outputs", "sweeps")]
    text = "/".join(parts[:2] if parts and parts[0].startswith(".") else parts)
    text = re.sub(r"[0-9a-f]{8,}", "#", text)
    text = re.sub(r"\.[0-9a-f]{8}\.tmp|\.#\.tmp", ".tmp", text)
    return f"{event} {re.sub(r'[0-9]+', '0', text)}"


@dataclass
class Fork:
    """Starts runs by the starter."""

    process: subprocess.Popen[str]

    def start(self, order: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self._answer()["pid"])

    def status(self, pid: int) -> int:
        return int(self._answer()["status"])

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


@contextmanager
def forking(*, warm: bool = False) -> Iterator[Fork]:
    """Runs start as forks of one process; they can be struck before a change of a file.

    ``warm``: of one that has made a whole run itself, so that nothing is left to import.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.starter", *(["warm"] if warm else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**outside(), "OMP_NUM_THREADS": "1"},
    ) as process:
        fork = Fork(process)
        assert fork._answer()["ready"]
        try:
            yield fork
        finally:
            assert process.stdin is not None
            process.stdin.close()


@dataclass
class Command:
    """Starts runs as a user does, each with ``python -m dppo``."""

    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, order: dict[str, Any]) -> int:
        assert order["operation"] is None, "only a fork counts its changes"
        with open(order["log"], "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dppo", *order["words"]],
                cwd=order["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**outside(), "OMP_NUM_THREADS": "1"},
            )
        self.running[process.pid] = process
        return process.pid

    def status(self, pid: int) -> int:
        return self.running.pop(pid).wait()


def run(
    starter: Fork | Command,
    case: Case,
    folder: Path,
    strike: Strike | None,
    rows: int,
    user: tuple[int, int, int] | None = None,
) -> Ended:
    """One start of a case in ``folder``, struck or not, until it has ended; ``user``: with its group and umask."""
    folder.mkdir(exist_ok=True)
    log = folder / f"{len(list(folder.glob('*.log')))}.log"
    log.touch()
    started = time.monotonic()
    pid = starter.start(
        {
            "cwd": str(folder),
            "log": str(log),
            "words": case.words,
            "rows": rows,
            "operation": strike.operation if strike else None,
            "signal": int(strike.signal) if strike else 0,
            "user": user,
        }
    )
    sent = False
    if strike is not None and strike.operation is None:
        sent = _wait(log, strike, pid)
        if sent:
            sent = _strike(pid, strike)
    status = starter.status(pid)
    text = log.read_text(errors="replace")
    return Ended(status, text, sent or STRUCK in text, time.monotonic() - started)


def _strike(pid: int, strike: Strike) -> bool:
    """Send the signal; False if nobody was there to get it."""
    with suppress(ProcessLookupError, psutil.NoSuchProcess, IndexError):
        struck = psutil.Process(pid).children()[0].pid if strike.worker else pid
        os.kill(struck, strike.signal)
        return True
    return False


def _wait(log: Path, strike: Strike, pid: int) -> bool:
    """Until a run that lives is to be struck; False if it ended before."""
    deadline = time.monotonic() + _TIMEOUT
    while strike.line and strike.line not in log.read_text(errors="replace"):
        if _ended(pid):
            return False
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        time.sleep(0.002)
    until = time.monotonic() + strike.seconds
    while time.monotonic() < until:
        if _ended(pid):
            return False
        time.sleep(0.002)
    return not _ended(pid)


def _ended(pid: int) -> bool:
    try:
        # A process that has ended stays a zombie until its parent asks.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def strikes(
    case: Case, chance: random.Random, whole: Ended, kinds: list[signal.Signals], *, counted: bool
) -> Iterator[Strike]:
    """Moments to strike at, all stages and all changes of files alike; ``whole`` is how an undisturbed run went.

    Where a case has workers, two strikes are theirs: a trial whose third worker dies counts as failed.
    """
    ways = ["operation", "operation", "line", "time"] if counted else ["line", "line", "time"]
    if not whole.lines:  # the stages are in the logs of workers
        ways = [way if way != "line" else "time" for way in ways]
    for_workers = [True, True] if "hydra.sweeper.n_jobs=2" in case.words else []
    while True:
        if for_workers and chance.random() < 0.4:
            yield Strike("time", signal.SIGKILL, seconds=chance.uniform(0.0, whole.seconds), worker=for_workers.pop())
            continue
        number = chance.choice(kinds)
        how = chance.choice(ways)
        if how == "operation":
            yield Strike(how, number, operation=chance.randint(1, max(1, whole.operations)))
        elif how == "line":
            yield Strike(how, number, line=chance.choice(whole.lines), seconds=chance.expovariate(4.0))
        else:
            yield Strike(how, number, seconds=chance.uniform(0.0, whole.seconds))
