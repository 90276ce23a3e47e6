"""Processes that the system kills because their memory is at an end: control groups with almost none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def starving(pid: int) -> Iterator[bool]:
    """Let the system kill this process with the next memory that it asks for; False where that is not allowed."""
    group, limit = _group(f"dppo-{pid}")
    try:
        group.mkdir()
        (group / limit).write_text("1M")
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        yield False
    else:
        yield True
    finally:
        deadline = time.monotonic() + 20
        while group.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # until the last process in it is gone
                group.rmdir()
            time.sleep(0.05)


def n_killed(pid: int) -> int:
    """How many processes the system has killed in the group that was made for ``pid``."""
    group, _ = _group(f"dppo-{pid}")
    for name in ("memory.events", "memory.oom_control"):
        with contextlib.suppress(OSError):
            for line in (group / name).read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
    return 0


def _group(name: str) -> tuple[Path, str]:
    """The folder of a control group and the file of its limit, in the first or second version of the interface."""
    if (_ROOT / "memory").is_dir():
        return _ROOT / "memory" / name, "memory.limit_in_bytes"
    return _ROOT / name, "memory.max"
