"""Hashes of files by their content: moving or touching a file changes no fingerprint, rewriting it does."""

from __future__ import annotations

import functools
import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path

from dppo.errors import UserError


def content_digest(files: Iterable[Path]) -> str:
    """32 hexadecimal digits for the bytes of these files in this order, whatever their names and folders.

    Raises UserError if one is missing, cannot be read, or is no regular file.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
                raise UserError(f"{file}: is no file")
            digest.update(_file_digest(file.resolve(), status.st_size, status.st_mtime_ns))
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()[:32]


@functools.lru_cache(maxsize=256)
def _file_digest(file: Path, size: int, modified: int) -> bytes:
    """SHA-256 of a file; size and time of change are there so that a rewritten file is hashed anew."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
