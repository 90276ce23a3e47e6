"""The slot of one artifact: complete or absent, never half there."""

from __future__ import annotations

import functools
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dppo.artifacts import manifest as manifests
from dppo.artifacts.files import DISK_FULL, disk_errors, hash_file, remove, sync, sync_tree, tree_files, write_atomic
from dppo.artifacts.fingerprint import to_bytes
from dppo.artifacts.layout import Entry
from dppo.artifacts.locks import OnWait
from dppo.artifacts.manifest import FileRecord, Manifest, artifact_problem

if TYPE_CHECKING:
    from dppo.types import Artifact, Json

logger = logging.getLogger(__name__)


@functools.cache  # a stage may ask more than once, the user is told once
def _warn(name: str, problem: str, path: Path) -> None:
    logger.warning("%s is damaged and will be built again: %s (%s)", name, problem, path)


@dataclass
class Build:
    """An artifact in the making: write files into ``directory``, checkpoints into ``work``.

    ``directory`` is new and empty and becomes the artifact. ``work`` is kept until the artifact is complete, also
    when the process is killed, so that the next attempt can continue from it. ``timings`` (seconds) and ``extra``
    go into the manifest.
    """

    directory: Path
    work: Path
    timings: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Slot(Entry):
    """The slot of one artifact; with ``verify`` every byte is read before an artifact is reused."""

    verify: bool = False

    @property
    def work(self) -> Path:
        """Where an unfinished build keeps its checkpoints."""
        return self.layout.root / ".work" / self.slug

    @property
    def _request(self) -> Path:
        return self.work.with_suffix(".json")

    def manifest(self) -> Manifest:
        """The manifest of the complete artifact; raises Damaged."""
        return Manifest.read(self.path)

    def complete(self) -> bool:
        """Whether the artifact is there: manifest sound, every file of the right size (with ``verify``: and hash).

        A damaged one counts as absent, with a warning, and the next build replaces it.
        """
        problem = artifact_problem(self.path, deep=self.verify)
        if problem is not None and self.path.exists():
            _warn(self.name, problem, self.path)
        return problem is None

    def reason(self) -> str:
        """Why this must be built."""
        if self.path.exists():
            return f"it is damaged: {artifact_problem(self.path, deep=True)}"
        with suppress(OSError):
            if any(self.work.iterdir()):
                return "continues an unfinished build"
        return super().reason()

    def get_or_build(self, build: Callable[[Build], None], on_wait: OnWait | None = None) -> Artifact:
        """The artifact: reused if it is complete, else built by exactly one of the processes that ask for it."""
        if not self.complete():
            with self.lock(on_wait):
                if not self.complete():
                    with self.building() as started:
                        build(started)
                    return self.artifact(reused=False)
        return self.artifact(reused=True)

    @contextmanager
    def building(self, on_wait: OnWait | None = None) -> Iterator[Build]:
        """Build the artifact under its lock; leaving the block commits it, an exception leaves nothing but ``work``.

        Ask ``complete()`` under ``lock()`` first, as ``get_or_build`` does: where another process was faster, this
        build is thrown away, because the first one wins. A disk that fills up is a UserError.
        """
        with self.lock(on_wait):
            directory = self.layout.make(".building") / f"{self.slug}-{secrets.token_hex(4)}"
            self.layout.make(".work")
            with disk_errors(self.layout.root):
                for leftover in directory.parent.glob(f"{self.slug}-*"):
                    remove(leftover)  # of a builder that died: its lock is ours now
                directory.mkdir()
                self.work.mkdir(exist_ok=True)
                write_atomic(self._request, self._request_body())
            build = Build(directory, self.work)
            started = time.perf_counter()
            try:
                with disk_errors(directory, DISK_FULL):
                    yield build
                build.timings.setdefault("total", round(time.perf_counter() - started, 3))
                with disk_errors(self.layout.root):
                    self._commit(build)
            finally:
                remove(directory)
                with suppress(OSError):
                    if not any(self.work.iterdir()):
                        self._forget_work()

    def _commit(self, build: Build) -> None:
        files = {}
        allowed = build.directory.stat().st_mode & 0o666
        for path in tree_files(build.directory):
            # Some libraries write files for their owner alone; whom the umask lets in may read the artifact.
            path.chmod(path.stat().st_mode | allowed)
            name = path.relative_to(build.directory).as_posix()
            if name == manifests.NAME:
                raise ValueError(f"{self.name}: {name} is written by the cache, not by the stage")
            files[name] = FileRecord(hash_file(path), path.stat().st_size)
        self.new_manifest("artifact", timings=build.timings, files=files, extra=build.extra).write(build.directory)
        sync_tree(build.directory)
        self.path.parent.mkdir(exist_ok=True)
        if self.path.exists() and artifact_problem(self.path, deep=True) is not None:
            self.layout.set_aside(self.path)
        if not self.path.exists():
            build.directory.rename(self.path)
            sync(self.path.parent)
        self._forget_work()

    def _request_body(self) -> bytes:
        """What the work directory is for: by it gc knows the parents of unfinished work, and keeps them."""
        return to_bytes(
            {
                "stage": self.stage,
                "fingerprint": self.fingerprint,
                "parents": list(self.parents),
                "inputs": self.inputs,
            }
        )

    def _forget_work(self) -> None:
        remove(self.work)
        self._request.unlink(missing_ok=True)
