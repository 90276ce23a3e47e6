"""Contenders in processes of their own that take turns, each with the environment that its users give it.

A contender's process says when its first step, the warm-up, is done, and does one more for each line it gets.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.rows import Timing, timed

_TOLD = "@"  # begins the lines that are meant for the parent


def as_dppo_has_it() -> dict[str, str]:
    """What ``python -m dppo`` sets before it computes; ``dppo.allocator`` and ``dppo.threads`` do the rest inside."""
    return {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}


def as_scripts_have_it() -> dict[str, str]:
    """Nobody who writes a script with torch asks for pages of 2 MiB."""
    return {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}


class Contender:
    """A process, a step at a time."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self.timings: list[Timing] = []
        self._process = process

    def step(self) -> None:
        """Let it do one step, and note what that took."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        wall, cpu = self.told()
        self.timings.append((wall, cpu))

    def end(self) -> Any:
        """There are no further steps; what it says in the end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.told()

    def told(self) -> Any:
        """What it says next. Raises SystemExit if it has ended instead."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_TOLD):
                return json.loads(line.removeprefix(_TOLD))
        raise SystemExit(f"{self.name} ended with status {self._process.wait()}; what it said is above")


@contextlib.contextmanager
def started(name: str, module: Sequence[str], environment: Mapping[str, str]) -> Iterator[Contender]:
    """A contender behind its warm-up; ``module`` is what follows ``python -m``. It is killed with the block."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-m", *module], stdin=pipe, stdout=pipe, text=True, env=dict(environment)
    ) as process:
        contender = Contender(name, process)
        try:
            contender.told()
            yield contender
        finally:
            process.kill()


@contextlib.contextmanager
def all_started(contenders: Sequence[tuple[str, Sequence[str], Mapping[str, str]]]) -> Iterator[list[Contender]]:
    """One after the other, so that each has the machine to itself in its warm-up too."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(started(*one)) for one in contenders]


# --- in the contender's process --------------------------------------------------------------------------------------


def tell(found: object) -> None:
    """Say something to the parent, in JSON."""
    print(_TOLD + json.dumps(found), flush=True)


def wait() -> bool:
    """Until it is this process's turn; False: there are no further turns."""
    return bool(sys.stdin.readline())


def take_turns(step: Callable[[], object]) -> None:
    """Warm up, then do a step in each turn and say what it took."""
    step()
    tell(None)
    while wait():
        tell(timed(step))
    tell(None)
