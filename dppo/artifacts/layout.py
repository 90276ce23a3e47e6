"""Where everything lies in the cache, and the place of one fingerprint in it."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dppo.artifacts import manifest as manifests
from dppo.artifacts.files import disk_errors, remove, write_atomic
from dppo.artifacts.fingerprint import FINGERPRINT, canonical, differences, fingerprint, identity, short
from dppo.artifacts.locks import OnWait, hold
from dppo.artifacts.manifest import Damaged, FileRecord, Manifest
from dppo.processes import world_size

if TYPE_CHECKING:
    from dppo.types import Artifact, Json

STAGE = re.compile(r"[a-z][a-z0-9_]{0,39}")
TAG = "CACHEDIR.TAG"  # https://bford.info/cachedir/: backups skip the directory, and gc knows that it is ours
_TAG_TEXT = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# The cache of dppo: stages that were computed once. See `python -m dppo.cache --help`.\n"
)
_COMPARED = 20  # siblings that `Entry.reason` looks at


@dataclass(frozen=True)
class Layout:
    """The directory of a cache; processes and users may share it.

    ``<stage>/<fingerprint>/`` is an artifact or a growing store. ``.work`` holds checkpoints of unfinished builds,
    ``.building`` what is being written, ``.trash`` what is being deleted or was found damaged, ``.locks`` the locks,
    ``.runs`` which run directories used the cache, ``.tracked`` what trackers keep of shared stages.
    """

    root: Path

    def make(self, name: str) -> Path:
        """A directory of the cache, made if it is absent."""
        path = self.root / name
        with disk_errors(self.root):
            path.mkdir(parents=True, exist_ok=True)
            if not (tag := self.root / TAG).exists():
                write_atomic(tag, _TAG_TEXT)
        return path

    def check_writable(self) -> None:
        """Raise UserError unless files can be made in the cache: for a run to ask before its first stage."""
        probe = self.make(".building") / f"probe-{secrets.token_hex(4)}"
        with disk_errors(self.root):
            write_atomic(probe, b"")
            probe.unlink(missing_ok=True)

    def lock_path(self, stage: str, fingerprint: str, suffix: str = "") -> Path:
        return self.root / ".locks" / f"{stage}-{fingerprint}{suffix}.lock"

    def record_run(self, run: Path, artifacts: Sequence[tuple[str, str]]) -> None:
        """Write ``parents.json`` of a run directory, the (stage, fingerprint) pairs that it uses, and remember the run.

        `python -m dppo.cache gc` keeps what a remembered run refers to, wherever its directory lies, until that
        directory is gone. Call it again whenever a stage is added.
        """
        body = [{"stage": stage, "fingerprint": value} for stage, value in artifacts]
        with disk_errors(run):
            write_atomic(run / "parents.json", json.dumps(body, indent=2).encode() + b"\n")
        where = str(run.resolve())
        note = self.make(".runs") / f"{fingerprint(where)[:32]}.json"
        with disk_errors(self.root):
            if not note.exists():
                write_atomic(note, json.dumps({"run": where}).encode())

    def discard(self, path: Path) -> None:
        """Delete a part of the cache. It vanishes under its name at once, so that a kill leaves nothing by halves."""
        remove(self.set_aside(path))

    def set_aside(self, path: Path) -> Path:
        """Move something damaged out of the way, to ``.trash`` until the next gc; returns where it is now."""
        trash = self.make(".trash") / f"{path.name[:80]}-{secrets.token_hex(4)}"
        with disk_errors(self.root), suppress(FileNotFoundError):
            path.rename(trash)
        return trash


@dataclass(frozen=True)
class Entry:
    """The place of one fingerprint in the cache: what a slot and a store have in common."""

    layout: Layout
    stage: str
    fingerprint: str
    inputs: Json
    parents: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.layout.root / self.stage / self.fingerprint

    @property
    def name(self) -> str:
        """What is printed: the stage and the first digits of the fingerprint, such as ``sft 3fa2``."""
        return f"{self.stage} {short(self.fingerprint)}"

    @property
    def slug(self) -> str:
        """The name of this place in the flat directories of the cache."""
        return f"{self.stage}-{self.fingerprint}"

    @contextmanager
    def lock(self, on_wait: OnWait | None = None) -> Iterator[None]:
        """Be the one process that builds this.

        The others wait; after a second they call ``on_wait`` once with a line that says for whom. When the holder is
        killed, the system releases the lock and a waiter takes over what the holder had finished.
        """
        self.layout.make(".locks")
        with hold(self.layout.lock_path(self.stage, self.fingerprint), self.name, on_wait):
            yield

    def artifact(self, *, reused: bool) -> Artifact:
        """The record of this artifact or store for those who use it; notes the time of use for gc."""
        from dppo.types import Artifact  # imports torch, which the commands do without

        with suppress(OSError):  # another user's artifact
            (self.path / manifests.NAME).touch()
        return Artifact(self.stage, self.fingerprint, str(self.path), self.parents, reused)

    def new_manifest(
        self,
        kind: manifests.Kind,
        *,
        timings: Mapping[str, float] | None = None,
        files: Mapping[str, FileRecord] | None = None,
        extra: Mapping[str, Json] | None = None,
    ) -> Manifest:
        """The manifest of what is made at this place here and now."""
        return Manifest(
            stage=self.stage,
            fingerprint=self.fingerprint,
            kind=kind,
            inputs=self.inputs,
            parents=self.parents,
            status="complete" if kind == "artifact" else "growing",
            created=manifests.now(),
            versions=manifests.versions(),
            git=manifests.git_revision(),
            threads=manifests.thread_count(),
            processes=world_size(),
            timings=dict(timings or {}),
            files=dict(files or {}),
            extra=dict(extra or {}),
        )

    def reason(self) -> str:
        """Why this is not in the cache: in which settings it differs from the nearest artifact that is."""
        nearest: tuple[int, str, list[str]] | None = None
        with suppress(OSError):
            siblings = sorted(self.path.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
            for sibling in siblings[:_COMPARED]:
                with suppress(Damaged):
                    changes = self._changes_since(Manifest.read(sibling))
                    if changes and (nearest is None or len(changes) < nearest[0]):
                        nearest = (len(changes), short(sibling.name), changes)
        if nearest is None:
            return f"the first {self.stage}"
        count, name, changes = nearest
        more = f" and {count - 3} more" if count > 3 else ""
        return f"differs from {name} in {', '.join(changes[:3])}{more}"

    def _changes_since(self, other: Manifest) -> list[str]:
        parents = [
            f"a parent ({short(new)}, was {short(old)})"
            for new, old in zip(self.parents, other.parents, strict=False)
            if new != old
        ]
        return [*parents, *differences(self.inputs, other.inputs)]


def identify(stage: str, content: object, parents: Sequence[str]) -> tuple[str, str, Json, tuple[str, ...]]:
    """(stage, fingerprint, inputs, parents) of what ``stage`` makes from ``content`` and the artifacts ``parents``.

    Raises ValueError for a stage name that is no plain lower-case word and for a parent that is no fingerprint.
    """
    if not STAGE.fullmatch(stage):
        raise ValueError(f"stage {stage!r}: must match {STAGE.pattern}")
    for parent in parents:
        if not FINGERPRINT.fullmatch(parent):
            raise ValueError(f"parent {parent!r} of stage {stage}: must be a fingerprint")
    inputs = canonical(content)
    return stage, identity(stage, inputs, parents), inputs, tuple(parents)
