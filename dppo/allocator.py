"""Memory that was freed stays with the process while a stage computes, and goes back to the system after it.

A training step frees what it made and the next one makes the same again. glibc gives every piece above 32 MiB back at
once, and whatever lies free at the end of its heap; the kernel then has to find those pages anew and to fill them with
zeros, in every step. What the user says of glibc's allocator in the environment counts, and other allocators and
systems are left as they are.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

# mallopt's names of settings (malloc.h), and glibc's own values of them (mallopt(3)).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_OWN = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 128 * 1024}
_SAID = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


@contextmanager
def freed_memory_is_kept() -> Iterator[None]:
    """Inside, freed memory stays with this process until ``give_back``; afterwards all of it is given back."""
    library = _glibc()
    if library is None or _user_decides():
        yield
        return
    # No piece is mapped on its own, and the heap's free end is not cut off.
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for setting, value in _OWN.items():
            library.mallopt(setting, value)
        give_back()


def give_back() -> None:
    """Let the system have the whole pages of what is free, for other processes; takes milliseconds."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _user_decides() -> bool:
    return any(name in os.environ for name in _SAID) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is glibc."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # TypeError: Windows
        return None
    known = all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim"))
    return library if known else None
