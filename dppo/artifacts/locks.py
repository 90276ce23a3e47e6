"""One builder at a time: a lock of the operating system, which it releases when the holder dies."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from dppo.artifacts.files import disk_errors, write_atomic

OnWait = Callable[[str], None]
NOTICE_AFTER = 1.0  # seconds of waiting before the user is told


def _lock(path: Path) -> FileLock:
    # One object per path and process: a thread that holds the lock can take it again. Lock files stay after use,
    # because deleting one that somebody waits for would let two processes in.
    return FileLock(str(path), is_singleton=True)


@contextmanager
def hold(path: Path, what: str, on_wait: OnWait | None = None) -> Iterator[None]:
    """Hold the lock ``path``, waiting for it as long as it takes; re-entrant within a thread.

    After a second of waiting ``on_wait`` is called once with a line that says who holds it. When the holder dies,
    however it dies, the system frees the lock and one of the waiters gets it.
    """
    holder = path.with_suffix(".holder.json")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        nested = lock.is_locked
        try:
            lock.acquire(timeout=NOTICE_AFTER, poll_interval=0.05)
        except Timeout:
            if on_wait is not None:
                on_wait(f"waiting for {what}: {_describe(holder)}")
            lock.acquire(timeout=-1, poll_interval=0.2)
    try:
        if not nested:
            with disk_errors(path.parent):
                write_atomic(holder, _record())
        yield
    finally:
        if not nested:
            with suppress(OSError):
                holder.unlink()
        lock.release()


@contextmanager
def try_hold(path: Path) -> Iterator[bool]:
    """Hold the lock ``path`` if it is free; yields whether it was."""
    lock = _lock(path)
    try:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _record() -> bytes:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode()


def _describe(holder: Path) -> str:
    try:
        record = json.loads(holder.read_bytes())
        return f"process {record['pid']} on {record['host']} has held it since {record['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process holds it"
