"""Small file systems of real memory, to be filled up or made read-only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _as_root(*command: str) -> None:
    words = command if os.geteuid() == 0 else ("sudo", "-n", *command)
    subprocess.run(words, check=True, capture_output=True)


@contextmanager
def small_disk(mount: Path, kibibytes: int = 1024) -> Iterator[Path]:
    """A file system of this size at ``mount``, gone when the block is left."""
    mount.mkdir()
    try:
        _as_root("mount", "-t", "tmpfs", "-o", f"size={kibibytes}k,mode=777", "tmpfs", str(mount))
    except (OSError, subprocess.CalledProcessError):
        # Said in the summary; a size limit of the process stands for a full disk where nothing can be mounted.
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield mount
    finally:
        _as_root("umount", "-l", str(mount))


def make_read_only(mount: Path) -> None:
    _as_root("mount", "-o", "remount,ro", str(mount))


def fill(path: Path, *, but: int = 0) -> None:
    """Write a file until the disk is full, ``but`` for so many KiB."""
    with open(path, "wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(b"x" * 4096)
        file.truncate(file.tell() - 1024 * but)
