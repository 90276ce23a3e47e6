"""Starts ``python -m dppo`` many times: what every start would import is imported once, each start is a fork.

An order is one JSON object behind its length, with the descriptors of stdin, stdout and stderr: ``module``, ``words``,
``cwd`` and ``env``. The answer is a process id; to that id alone it is the status, or null while the process runs.
A fork runs the module as ``python -m`` would, and ends as a process of its own does.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
# What is read when it is needed, as all that dppo sets itself. An import may have read other variables, and
# those of a fork come too late.
_READ_LATE = re.compile(
    r"COLUMNS|DPPO_STORAGE|HF_TOKEN|HOME|NETRC|NO_COLOR|PYTEST_CURRENT_TEST|WANDB_\w+|\w+_API_KEY"
    r"|CUBLAS_WORKSPACE_CONFIG|HYDRA_FULL_ERROR|RAYON_NUM_THREADS|THP_MEM_ALLOC_ENABLE|TOKENIZERS_PARALLELISM"
    r"|TORCHINDUCTOR_CACHE_DIR"
)
_IMPORTED = ("accelerate", "transformers.models.llama.modeling_llama", "dppo.pipeline")


class Forked:
    """As much of ``subprocess.Popen`` as the tests need."""

    def __init__(self, pid: int, forks: Forks) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._forks = forks

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._forks.ask({"pid": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if timeout is not None and until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """The side of the tests."""

    def __init__(self, channel: socket.socket, environment: Mapping[str, str]) -> None:
        self._channel = channel
        self._answers = channel.makefile()
        self.environment = environment

    def start(
        self,
        module: str,
        words: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
    ) -> Forked | subprocess.Popen[bytes]:
        """``python -m module`` with these words, which reads nothing; in another environment it is no fork."""
        if _early(env) != _early(self.environment):
            command = [sys.executable, "-m", module, *words]
            nothing = subprocess.DEVNULL
            return subprocess.Popen(command, cwd=cwd, env=env, stdin=nothing, stdout=stdout, stderr=stderr)
        order = {"module": module, "words": list(words), "cwd": str(cwd), "env": dict(env)}
        with open(os.devnull, "r+b", buffering=0) as file:
            streams = [
                file.fileno() if one == subprocess.DEVNULL else one for one in (subprocess.DEVNULL, stdout, stderr)
            ]
            pid = self.ask(order, streams)
        assert pid is not None
        return Forked(pid, self)

    def run(
        self, module: str, words: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """The same, waited for, with what it printed."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.start(module, words, cwd=cwd, env=env, stdout=out.fileno(), stderr=err.fileno())
            try:
                status = process.wait(timeout)
            except BaseException:
                process.kill()
                process.wait()
                raise
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess([module, *words], status, out.read(), err.read())

    def ask(self, order: Mapping[str, Any], descriptors: Sequence[int] = ()) -> int | None:
        """Send an order; returns what the other side says."""
        text = json.dumps(order).encode()
        socket.send_fds(self._channel, [len(text).to_bytes(4, "big")], descriptors)
        self._channel.sendall(text)
        return self.heard()

    def heard(self) -> int | None:
        answer: int | None = json.loads(self._answers.readline())
        return answer


@contextmanager
def forking(environment: Mapping[str, str]) -> Iterator[Forks]:
    """Commands start as forks of one process with this environment."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
    with ours:
        with theirs:
            # Ends at once and leaves the server behind, as nobody's child: a search that is stopped in a test ends all
            # children of its process. A session of its own, because Ctrl-C is for the tests, which end it.
            subprocess.run(
                command,
                cwd=_ROOT,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                check=True,
            )
        forks = Forks(ours, environment)
        assert forks.heard()
        try:
            yield forks
        finally:
            ours.shutdown(socket.SHUT_RDWR)


def _early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not _READ_LATE.fullmatch(name)}


def _serve(channel: socket.socket) -> dict[str, Any] | None:
    """Start forks until nobody wants more; returns twice for each, with its order in the fork."""
    while True:
        length, descriptors, _, _ = socket.recv_fds(channel, 4, 3)
        if not length:
            return None
        order: dict[str, Any] = json.loads(channel.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
        if "pid" in order:
            ended, status = os.waitpid(order["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            answer = os.fork()
            if answer == 0:
                for number, descriptor in enumerate(descriptors):
                    os.dup2(descriptor, number)
                    os.close(descriptor)
                return order
            for descriptor in descriptors:
                os.close(descriptor)
        channel.sendall(json.dumps(answer).encode() + b"\n")


def main() -> None:
    """Import, fork, and in each fork run what is ordered."""
    if os.fork():
        os._exit(0)
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        for name in _IMPORTED:
            importlib.import_module(name)
        channel.sendall(f"{os.getpid()}\n".encode())
        order = _serve(channel)
    if order is None:
        return
    import numpy

    numpy.random.seed()  # noqa: NPY002 - a process of its own would not draw what its neighbours draw
    for number, name in enumerate(("stdin", "stdout", "stderr")):  # of what kind they are was seen at the start
        old: io.TextIOWrapper = getattr(sys, name)
        at_once = old.write_through
        binary = open(number, "wb" if number else "rb", 0 if at_once else -1, closefd=False)  # noqa: SIM115
        by_line = not at_once and (number == 2 or binary.isatty())
        stream = io.TextIOWrapper(binary, old.encoding, old.errors, line_buffering=by_line, write_through=at_once)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.path[0] = order["cwd"]
    sys.argv[1:] = order["words"]
    runpy.run_module(order["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
