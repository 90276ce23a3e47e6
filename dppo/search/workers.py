"""Several processes that pull from one study, each with its share of the machine; none waits for another.

A worker is the same command line again: it asks the study for something to run until nothing is left. Workers log to
``workers/<number>.log`` in the study's directory; what they say of trials is shown as they say it.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dppo import stopping, threads
from dppo.errors import UserError
from dppo.search.study import WORKER

_SHOWN = ("trial ", "baseline ", "result ", "warning", "error")
# A worker that is killed or stopped alone is started again, so often at the most.
_MOST_STARTS = 9
# Seconds for what an ended worker printed; a process that it started and left may hold its output open.
_LAST_WORDS = 5
# Seconds for a job of another process to write a checkpoint.
_GRACE = 10


def shares(n_jobs: int) -> list[dict[str, str]]:
    """The environment of each worker: its share of the cores, its own GPU where there are any, who shares memory."""
    devices, threads_each = gpus(), threads.environment(n_jobs)
    together = {threads.SHARING: str(math.ceil(n_jobs / max(1, len(devices))))}
    own = [{"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]} if devices else {} for place in range(n_jobs)]
    return [{**threads_each, **together, **one} for one in own]


def gpus() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [word.strip() for word in named.split(",") if word.strip() not in ("", "-1")]
    import torch

    return [str(place) for place in range(torch.cuda.device_count())]


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[str]
    reader: threading.Thread


def run_workers(
    n_jobs: int, directory: Path, died: Callable[[int], None], left: Callable[[], bool], arguments: Sequence[str]
) -> None:
    """Start the workers and wait until they have nothing to do; one that is killed is replaced while work is ``left``.

    ``died`` is told the process id of a killed one. Raises Stopped when they were stopped, and UserError
    when a worker fails, after the others have ended.
    """
    environments = shares(n_jobs)
    (directory / "workers").mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    starts = [0] * n_jobs
    running: dict[int, _Worker] = {}
    stopped: int | None = None

    def start(number: int) -> None:
        starts[number] += 1
        running[number] = _start(number, directory, environments[number], arguments)

    def forward(signum: int, frame: object) -> None:
        nonlocal stopped
        stopped = signum
        for worker in running.values():
            worker.process.send_signal(signal.SIGTERM)

    previous = stopping.handlers(forward)
    try:
        for number in range(n_jobs):
            start(number)
        while running:
            for number, worker in list(running.items()):
                try:
                    status = worker.process.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    continue
                worker.reader.join(timeout=_LAST_WORDS)
                del running[number]
                if stopped is not None or status == 0:
                    continue
                if status < 0:
                    print(f"worker {number} was killed by signal {-status}", flush=True)
                    died(worker.process.pid)
                elif status not in (stopping.EXIT_INTERRUPTED, stopping.EXIT_REQUEUE):
                    failed.append(f"worker {number} ended with status {status}")
                    continue
                if left() and starts[number] < _MOST_STARTS:
                    start(number)
    finally:
        stopping.restore(previous)
    if stopped is not None:
        raise stopping.Stopped("", stopped)
    if failed:
        raise UserError(f"{failed[0]}; see {directory / 'workers'}")


def _start(number: int, directory: Path, environment: dict[str, str], arguments: Sequence[str]) -> _Worker:
    process = subprocess.Popen(
        [sys.executable, "-m", "dppo", *arguments],
        env={**os.environ, **environment, WORKER: str(number), "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,  # its end tells the worker that this process is gone
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches this process, which tells the workers once
    )
    assert process.stdout is not None
    log = directory / "workers" / f"{number}.log"
    reader = threading.Thread(target=_read, args=(process.stdout, log, number), daemon=True)
    reader.start()
    return _Worker(number, process, reader)


def _read(output: IO[str], log: Path, number: int) -> None:
    with log.open("a", encoding="utf-8") as file:
        for line in output:
            file.write(line)
            file.flush()
            if line.startswith(_SHOWN):
                print(f"[worker {number}] {line}", end="", flush=True)


def end_with_parent() -> None:
    """In a worker: stop as after SIGTERM when the process that started it is gone."""

    def wait() -> None:
        # Not through Python's buffer, whose lock a thread may not hold when the interpreter ends.
        while os.read(sys.stdin.fileno(), 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def stopped_together() -> Iterator[None]:
    """While a launcher waits for its job: SIGTERM stops it as Ctrl-C does, and the job ends with this process."""

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        _end_children()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end_children() -> None:
    import psutil

    children = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            # Python's and joblib's own helper ends with this process, and must: it cleans up behind it.
            if not any("resource_tracker" in word for word in child.cmdline()):
                child.terminate()
                children.append(child)
    _, left = psutil.wait_procs(children, timeout=_GRACE)
    for child in left:
        with suppress(psutil.NoSuchProcess):
            child.kill()
