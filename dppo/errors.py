"""Errors that are the user's to mend: shown as one line, without a traceback, with exit status 2."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line that names the key or file, the value, and what to do about it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Pruned(Exception):
    """A run was ended early, as it should be: its interim values promise too little.

    The message is the reason, ``step`` the optimiser step after which it was given.
    """

    def __init__(self, reason: str, step: int = 0) -> None:
        super().__init__(reason)
        self.step = step


class JobError(Exception):
    """What made a job fail in another process, as text: not every exception can be sent from one to another."""


def lost_process(error: BaseException) -> bool:
    """Whether a process could not go on because another one of its run is gone; gloo says so in text only."""
    said = str(error).lower()
    closed = any(words in said for words in ("connection closed by peer", "connection reset by peer", "broken pipe"))
    return type(error).__name__.startswith("Dist") or (isinstance(error, RuntimeError) and closed)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or else its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left; PyTorch says so in the text of a RuntimeError."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in said for words in ("out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc")
    )
