"""Bytes on disk: atomic writes, hashes, and disk errors told in one line."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dppo.errors import UserError

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
UNWRITABLE = DISK_FULL | {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.EIO,
}
_RUST_CODE = re.compile(r"\(os error (\d+)\)")  # how safetensors and tokenizers pass on an error of the system


@contextmanager
def disk_errors(path: Path, codes: frozenset[int] = UNWRITABLE) -> Iterator[None]:
    """Turn system errors with one of ``codes`` into a UserError that names the path and the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code is None and (match := _RUST_CODE.search(str(error))):
            code = int(match[1])
        if code not in codes or code is None:
            raise
        advice = "free some space" if code in DISK_FULL else "make it writable"
        raise UserError(
            f"{path}: cannot write: {os.strerror(code).lower()}; {advice}, "
            "or choose another place (cache.dir=, hydra.run.dir=)"
        ) from error


def sync(path: Path) -> None:
    """Make a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that at every moment ``path`` is the old content, the new one, or absent; never a part."""
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_files(directory: Path) -> list[Path]:
    """Every file below ``directory``, sorted; ValueError for a symbolic link, which may lead out of the cache."""
    found = []
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path}: an artifact must not contain symbolic links")
        if path.is_file():
            found.append(path)
    return found


def sync_tree(directory: Path) -> None:
    """``sync`` for a directory and everything below it."""
    for path in [*directory.rglob("*"), directory]:
        sync(path)


def tree_bytes(path: Path) -> int:
    """The size in bytes of a file, or of all files below a directory; what vanishes meanwhile counts nothing."""
    total = 0
    for found in [path, *path.rglob("*")]:
        with suppress(OSError):
            if not found.is_symlink() and found.is_file():
                total += found.stat().st_size
    return total


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
