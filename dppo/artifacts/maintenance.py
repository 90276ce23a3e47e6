"""What is in a cache, whether it is sound, and what of it nobody needs: the work of ``python -m dppo.cache``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dppo.artifacts import manifest as manifests
from dppo.artifacts.files import tree_bytes
from dppo.artifacts.fingerprint import FINGERPRINT
from dppo.artifacts.layout import STAGE, TAG, Layout
from dppo.artifacts.locks import try_hold
from dppo.artifacts.manifest import Damaged, Manifest, artifact_problem
from dppo.artifacts.stores import APPEND, JsonRows, RowFormat, TokenRows, n_rows, shard_keys
from dppo.errors import UserError

# To check a shard its keys must be read, which is the same for all formats with one suffix.
_FORMATS: dict[str, RowFormat[Any]] = {f".{JsonRows.suffix}": JsonRows(), f".{TokenRows.suffix}": TokenRows()}
_STALE = 86400.0  # seconds after which a temporary file belongs to nobody: each is written at one go


@dataclass(frozen=True, slots=True)
class Found:
    """Something in the cache: an artifact, a store, or the checkpoints of an unfinished build.

    ``used`` is when it was last used, in seconds since the epoch; ``rows`` is None but for stores.
    """

    kind: manifests.Kind | Literal["unfinished", "damaged"]
    stage: str
    fingerprint: str
    path: Path
    parents: tuple[str, ...]
    rows: int | None
    bytes: int
    used: float


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory and the fingerprints in its ``parents.json``."""

    path: Path
    uses: frozenset[str]


@dataclass(frozen=True, slots=True)
class Damage:
    """A file or directory that is not what was written; ``removed`` is False if it is still there."""

    path: Path
    problem: str
    removed: bool


@dataclass(frozen=True, slots=True)
class Removal:
    """What gc removed, or would remove, and why."""

    what: str
    path: Path
    bytes: int
    reason: str


def open_layout(root: Path) -> Layout:
    """The cache at ``root``; raises UserError for any other directory, so that none is ever cleaned up by mistake."""
    if not (root / TAG).is_file() and (root.is_file() or _listing(root)):
        raise UserError(f"{root}: is no cache of dppo (which would hold the file {TAG}); say where it is with --dir")
    return Layout(root)


def contents(layout: Layout) -> list[Found]:
    """Everything in the cache, by stage and age."""
    found = [*_finished(layout), *_unfinished(layout)]
    return sorted(found, key=lambda item: (item.stage, item.used, item.fingerprint))


def _finished(layout: Layout) -> Iterator[Found]:
    for path in _entries(layout):
        parents: tuple[str, ...] = ()
        rows = None
        kind: manifests.Kind | Literal["damaged"] = "damaged"
        with suppress(Damaged):
            manifest = Manifest.read(path)
            kind, parents = manifest.kind, manifest.parents
            if kind != "artifact":
                rows = n_rows(path)
        yield Found(kind, path.parent.name, path.name, path, parents, rows, tree_bytes(path), _used(path))


def _unfinished(layout: Layout) -> Iterator[Found]:
    for path in _listing(layout.root / ".work"):
        if path.is_dir() and (slug := _slug(path.name)) is not None:
            parents: tuple[str, ...] = ()
            with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                parents = tuple(json.loads(path.with_suffix(".json").read_bytes())["parents"])
            newest = max(map(_modified, [path, *path.rglob("*")]))
            yield Found("unfinished", *slug, path, parents, None, tree_bytes(path), newest)


def runs(layout: Layout, outputs: Sequence[Path]) -> list[Run]:
    """The run directories below ``outputs``, and those elsewhere that told the cache and still exist.

    Raises UserError for a ``parents.json`` that cannot be read: nobody could say what that run needs.
    """
    directories = set()
    for top in outputs:
        for name, below, names in os.walk(top):
            here = Path(name)
            below[:] = [inner for inner in below if (here / inner).resolve() != layout.root.resolve()]
            if "parents.json" in names:
                directories.add(here.resolve())
    for note in _listing(layout.root / ".runs"):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            directory = Path(json.loads(note.read_bytes())["run"])
            if (directory / "parents.json").is_file():
                directories.add(directory)
    return [Run(directory, _parents(directory / "parents.json")) for directory in sorted(directories)]


def _parents(path: Path) -> frozenset[str]:
    try:
        items = json.loads(path.read_bytes())
        found = frozenset(item["fingerprint"] for item in items)
        if not isinstance(items, list) or not all(FINGERPRINT.fullmatch(item) for item in found):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{path}: must be a list of {{"stage", "fingerprint"}}; mend or delete it') from None
    return found


def reachable(items: Sequence[Found], roots: frozenset[str]) -> frozenset[str]:
    """``roots`` and all they were made from, however indirectly."""
    parents: dict[str, set[str]] = {}
    for item in items:
        parents.setdefault(item.fingerprint, set()).update(item.parents)
    reached: set[str] = set()
    waiting = list(roots)
    while waiting:
        if (one := waiting.pop()) not in reached:
            reached.add(one)
            waiting.extend(parents.get(one, ()))
    return frozenset(reached)


def verify(layout: Layout, *, remove: bool) -> Iterator[Damage]:
    """Read every byte of every artifact and shard, and yield what is damaged; with ``remove`` delete it.

    Deleted artifacts are built again when a run needs them, and so are the rows of deleted shards. What another
    process is building or writing at this moment is not deleted.
    """
    for path in _entries(layout):
        if (problem := artifact_problem(path, deep=True)) is not None:
            # A store whose manifest is damaged keeps its rows: the next run that uses it writes the manifest anew.
            target = path / manifests.NAME if (path / "shards").is_dir() else path
            yield Damage(target, problem, remove and _remove_if_free(layout, path, target))
        for shard in _shards(path):
            try:
                if shard.suffix not in _FORMATS:
                    raise Damaged(f"{shard.name} is not the name of a shard")
                shard_keys(shard, _FORMATS[shard.suffix])
            except FileNotFoundError:
                continue
            except (Damaged, OSError) as damage:
                yield Damage(shard, str(damage), remove and _remove_if_free(layout, path, shard))


def collect(
    layout: Layout,
    outputs: Sequence[Path],
    *,
    grace: float,
    work_age: float,
    everything: bool = False,
    dry_run: bool = False,
) -> Iterator[Removal]:
    """Remove what no run refers to, directly or through parents, and yield each removal once it is done.

    Kept in any case is what a process holds at this moment, with its parents. Unless ``everything``: also what was
    used in the last ``grace`` seconds, since a run in progress may be about to refer to it, and the checkpoints of
    unfinished builds that are younger than ``work_age`` seconds, with the artifacts they build on.
    """
    items = contents(layout)
    now = time.time()
    roots = {item.fingerprint for item in items if _busy(layout, item.stage, item.fingerprint)}
    if not everything:
        roots.update(*(run.uses for run in runs(layout, outputs)))
        roots.update(
            item.fingerprint for item in items if now - item.used < (work_age if item.kind == "unfinished" else grace)
        )
    needed = reachable(items, frozenset(roots))
    finished = {item.fingerprint for item in items if item.kind not in ("unfinished", "damaged")}
    for item in items:
        targets = [item.path]
        reason = "no run refers to it" if not everything else "all is removed"
        if item.kind == "unfinished":
            targets.append(item.path.with_suffix(".json"))
            reason = "its build is complete" if item.fingerprint in finished else "its build was abandoned"
        elif _used(item.path) != item.used:
            continue  # a run began to use it just now
        if item.fingerprint in needed and not (item.kind == "unfinished" and item.fingerprint in finished):
            continue
        if dry_run or _remove_if_free(layout, layout.root / item.stage / item.fingerprint, *targets):
            yield Removal(f"{item.stage} {item.fingerprint[:8]}", item.path, item.bytes, reason)
    for path, reason in _leftovers(layout):
        size = tree_bytes(path)
        if not dry_run:
            layout.discard(path)
        yield Removal("leftover", path, size, reason)


def _leftovers(layout: Layout) -> Iterator[tuple[Path, str]]:
    for path in _listing(layout.root / ".building"):
        slug = _slug(path.name.rpartition("-")[0])
        if slug is None or not _busy(layout, *slug):
            yield path, "its writer is gone"
    for path in _listing(layout.root / ".trash"):
        yield path, "it was damaged or is being deleted"
    for path in _listing(layout.root / ".work"):
        if path.suffix == ".json" and not path.with_suffix("").exists():
            yield path, "its build is complete"
    for path in _listing(layout.root / ".runs"):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            if not (Path(json.loads(path.read_bytes())["run"]) / "parents.json").is_file():
                yield path, "its run directory is gone"
    for path in sorted(layout.root.rglob(".*.tmp")):
        if time.time() - _modified(path) > _STALE:
            yield path, "its writer is gone"


def _remove_if_free(layout: Layout, entry: Path, *targets: Path) -> bool:
    """Delete ``targets``, which belong to the artifact at ``entry``, unless a process is building or writing that."""
    with _holding(layout, entry.parent.name, entry.name) as free:
        if free:
            for target in targets:
                layout.discard(target)
    return free


@contextmanager
def _holding(layout: Layout, stage: str, fingerprint: str) -> Iterator[bool]:
    with (
        try_hold(layout.lock_path(stage, fingerprint)) as building,
        try_hold(layout.lock_path(stage, fingerprint, APPEND)) as writing,
    ):
        yield building and writing


def _busy(layout: Layout, stage: str, fingerprint: str) -> bool:
    if not layout.lock_path(stage, fingerprint).exists() and not layout.lock_path(stage, fingerprint, APPEND).exists():
        return False
    with _holding(layout, stage, fingerprint) as free:
        return not free


def _entries(layout: Layout) -> Iterator[Path]:
    """The directories ``<stage>/<fingerprint>``; nothing else in the cache is looked at."""
    for stage in _listing(layout.root):
        if STAGE.fullmatch(stage.name):
            yield from (path for path in _listing(stage) if FINGERPRINT.fullmatch(path.name) and path.is_dir())


def _shards(entry: Path) -> list[Path]:
    return [path for path in _listing(entry / "shards") if not path.name.startswith(".")]


def _slug(name: str) -> tuple[str, str] | None:
    stage, _, fingerprint = name.partition("-")
    return (stage, fingerprint) if STAGE.fullmatch(stage) and FINGERPRINT.fullmatch(fingerprint) else None


def _listing(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _used(entry: Path) -> float:
    return max(_modified(entry / manifests.NAME), _modified(entry))


def _modified(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0
