"""The manifest: what an artifact is, what made it, and the hash of every file in it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import dppo
from dppo.artifacts.files import hash_file, write_atomic
from dppo.artifacts.fingerprint import identity, to_bytes

if TYPE_CHECKING:
    from dppo.types import Json

NAME = "manifest.json"
Kind = Literal["artifact", "json rows", "token rows", "token ids"]
_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "numpy", "safetensors")


class Damaged(Exception):
    """Something in the cache is not what was written; the message says what."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What stands in ``manifest.json``.

    A growing store is ``growing`` and lists no files: the names of its shards are their hashes. ``timings`` are
    seconds, ``threads`` those of each of the ``processes`` that a launcher had started. ``git`` is the revision of the
    code, with ``+`` behind it if files had been changed, or None outside of a checkout. ``extra`` is what the stage
    wants to keep beside its files, such as metrics.
    """

    stage: str
    fingerprint: str
    kind: Kind
    status: Literal["complete", "growing"]
    inputs: Json
    parents: tuple[str, ...]
    created: str
    versions: Mapping[str, str]
    git: str | None
    threads: int
    processes: int
    timings: Mapping[str, float]
    files: Mapping[str, FileRecord]
    extra: Mapping[str, Json]

    def write(self, directory: Path) -> None:
        """Write ``manifest.json`` with a checksum of itself; ValueError if ``extra`` holds NaN or infinity."""
        body: dict[str, Any] = asdict(self)
        body["checksum"] = hashlib.sha256(to_bytes(body)).hexdigest()
        text = json.dumps(body, indent=2, sort_keys=True, allow_nan=False)
        write_atomic(directory / NAME, text.encode() + b"\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of an artifact's directory; raises Damaged if it is absent or not as it was written."""
        try:
            body = json.loads((directory / NAME).read_bytes())
            checksum = body.pop("checksum")
            if hashlib.sha256(to_bytes(body)).hexdigest() != checksum:
                raise Damaged(f"{NAME} does not match its checksum")
            body.setdefault("processes", 1)  # they were not counted at first
            files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
            return cls(**{**body, "parents": tuple(body["parents"]), "files": files})
        except OSError as error:
            raise Damaged(f"{NAME} cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(f"{NAME} is unreadable ({type(error).__name__})") from None

    def check_files(self, directory: Path, *, deep: bool) -> None:
        """Raise Damaged unless every listed file is there with its size, and if ``deep`` with its sha256."""
        for name, record in self.files.items():
            path = directory / name
            if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
                raise Damaged(f"{NAME} lists {name!r}, which is no file of this artifact")
            try:
                if (size := path.stat().st_size) != record.bytes:
                    raise Damaged(f"{name} has {size} bytes instead of {record.bytes}")
                if deep and hash_file(path) != record.sha256:
                    raise Damaged(f"{name} does not match its sha256")
            except OSError as error:
                raise Damaged(f"{name} cannot be read ({error.strerror})") from None


def artifact_problem(path: Path, *, deep: bool) -> str | None:
    """What is wrong with the artifact or store in ``<stage>/<fingerprint>``, or None; of a store only its manifest.

    ``deep`` reads every byte, otherwise the sizes of the files must do.
    """
    try:
        manifest = Manifest.read(path)
        if identity(manifest.stage, manifest.inputs, manifest.parents) != path.name:
            raise Damaged(f"{NAME} belongs to another artifact")
        manifest.check_files(path, deep=deep)
    except Damaged as damage:
        return str(damage)
    return None


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@functools.cache
def versions() -> dict[str, str]:
    """The versions of Python, dppo and the packages that decide results; packages that are absent are left out."""
    found = {"python": platform.python_version(), "dppo": dppo.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_revision() -> str | None:
    """The commit of the checkout that dppo runs from, ``+`` behind it if tracked files differ; None without one."""
    package = Path(dppo.__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def thread_count() -> int:
    """The threads that torch computes with, or would: this module does not import it for that."""
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else os.cpu_count() or 1
