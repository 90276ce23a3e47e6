"""Stopping when asked to: Ctrl-C, SIGTERM, and the signals by which Slurm announces a job's end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
REQUESTS = (signal.SIGINT, signal.SIGTERM, *WARNINGS)

# What a batch script asks for: 75 is sysexits' EX_TEMPFAIL, "try again later".
EXIT_INTERRUPTED, EXIT_REQUEUE = 130, 75

Handler = Callable[[int, Any], None]


class Stopped(KeyboardInterrupt):
    """The signal ``signum`` asked this process to end; the message says how far its work came, or is empty.

    Not an Exception: whoever goes on after a failed job must not go on after this.
    """

    def __init__(self, said: str, signum: int) -> None:
        super().__init__(said, signum)
        self.said, self.signum = said, signum

    def __str__(self) -> str:
        return self.said


class Resumable(Stopped):
    """The same for what another command continues; the message says which."""


def status(stop: KeyboardInterrupt) -> int:
    """The exit status of a process that was stopped: 75 after a signal by which Slurm warns, else 130."""
    return EXIT_REQUEUE if isinstance(stop, Stopped) and stop.signum in WARNINGS else EXIT_INTERRUPTED


def handlers(on_signal: Handler) -> dict[int, Any]:
    """Have ``on_signal`` called for all of these signals; returns what was called before, for ``restore``.

    Left alone are signals that are ignored, and a SIGTERM that a launcher has taken: submitit waits for a signal of its
    own. Outside of the main thread nothing is changed.
    """
    previous: dict[int, Any] = {}
    for number in REQUESTS:
        before = signal.getsignal(number)
        ignored = before is None or (before == signal.SIG_IGN and number != signal.SIGINT)
        if ignored or (number == signal.SIGTERM and of_launcher(before)):
            continue
        try:
            previous[number] = signal.signal(number, on_signal)
        except ValueError:  # not the main thread
            return {}
    return previous


def restore(previous: dict[int, Any]) -> None:
    """Undo ``handlers``."""
    for number, handler in previous.items():
        signal.signal(number, handler)


def of_launcher(handler: Any) -> bool:
    """Whether the handler of a signal is neither Python's own nor this package's."""
    own = str(getattr(handler, "__module__", "")).partition(".")[0] == "dppo"
    return callable(handler) and handler is not signal.default_int_handler and not own


class _Block:
    """The handler within ``on_request``: it raises, or while the end of something is waited for, only remembers."""

    def __init__(self) -> None:
        self.previous: dict[int, Any] = {}
        self.waits = False
        self.asked: int | None = None
        self.raised: int | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if self.waits:
            self.asked = number
            restore(self.previous)
            return
        self.stop(number)

    def stop(self, number: int) -> None:
        restore(self.previous)
        self.raised = number
        raise Stopped("", number)


_blocks: list[_Block] = []


@contextmanager
def on_request() -> Iterator[None]:
    """Within the block these signals raise ``Stopped``; a second one acts as it would without the block.

    The signal of a launcher that requeues its job (submitit) is handed on to it once the block has been left and all is
    stored. A block within another one changes nothing.
    """
    if _blocks:
        yield
        return
    block = _Block()
    _blocks.append(block)
    block.previous = handlers(block)
    try:
        yield
    except Stopped as stop:
        restore(block.previous)
        launcher = block.previous.get(stop.signum)
        if launcher is not None and of_launcher(launcher):
            launcher(stop.signum, None)
        raise
    finally:
        restore(block.previous)
        _blocks.remove(block)


def wait() -> None:
    """From now on a signal stops nothing before ``go_on``: what is being written would be lost."""
    for block in _blocks:
        block.waits = True


def go_on() -> None:
    """Raise ``Stopped`` if a signal came since ``wait``; from now on signals stop at once again."""
    for block in _blocks:
        asked, block.asked, block.waits = block.asked, None, False
        if asked is not None:
            block.stop(asked)


def raise_again() -> None:
    """Raise ``Stopped`` if a signal has raised it in this block before, and somebody made another exception of it."""
    for block in _blocks:
        if block.raised is not None:
            raise Stopped("", block.raised)


@contextmanager
def later() -> Iterator[None]:
    """Within the block a signal stops nothing; ``Stopped`` is raised at its end."""
    wait()
    try:
        yield
    finally:
        go_on()
