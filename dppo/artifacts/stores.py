"""Growing stores: rows by key, added in shards that are each committed at once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from dppo.artifacts import manifest as manifests
from dppo.artifacts.files import disk_errors, hash_file, remove, write_atomic
from dppo.artifacts.layout import Entry
from dppo.artifacts.locks import hold
from dppo.artifacts.manifest import Damaged, artifact_problem
from dppo.errors import UserError

if TYPE_CHECKING:
    from dppo.types import Artifact, Json

logger = logging.getLogger(__name__)

Tokens = npt.NDArray[np.float32]
Row = TypeVar("Row")
APPEND = ".append"  # the lock that is held while a shard is written
SHARD = re.compile(r"(?P<rows>\d+)-(?P<sha256>[0-9a-f]{64})\.(?:jsonl|safetensors)")


class MissingRows(LookupError):
    """Rows that should be in a store are not."""


def require_rows(expected: Iterable[str], found: Iterable[str], where: str) -> None:
    """The hole check: raise MissingRows, with their number and the first three, unless all expected ids are found."""
    present = set(found)
    missing = [key for key in dict.fromkeys(expected) if key not in present]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise MissingRows(f"{where}: {len(missing)} rows are missing: {first}")


class RowFormat(Protocol[Row]):
    """How the rows of a shard become a file."""

    kind: manifests.Kind
    suffix: str

    def encode(self, rows: Mapping[str, Row]) -> bytes:
        """The file of a shard; raises ValueError or TypeError naming the key of a row that cannot be stored."""

    def keys(self, path: Path) -> list[str]:
        """The keys of a shard whose hash was checked, in the order of its rows."""

    def rows(self, path: Path, indices: Sequence[int]) -> list[Row]:
        """The rows at ``indices``."""


class JsonRows:
    """One JSON value a row, one row a line: ``{"key":...,"row":...}``."""

    kind: manifests.Kind = "json rows"
    suffix = "jsonl"

    def encode(self, rows: Mapping[str, Json]) -> bytes:
        lines = []
        for key, row in rows.items():
            try:
                value = json.dumps(row, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
            except (ValueError, TypeError) as error:
                raise type(error)(f"row {key!r}: {error}") from None
            lines.append(f'{{"key":{json.dumps(key)},"row":{value}}}\n')
        return "".join(lines).encode("utf-8", "surrogatepass")

    def keys(self, path: Path) -> list[str]:
        # The rows themselves are parsed when somebody asks for them. Quotes within a key are escaped, so that the
        # first `,"row":` after a quote is where the key ends.
        start = len('{"key":')
        with open(path, "rb") as file:
            return [_parse_key(line[start : line.index(b'","row":') + 1]) for line in file]

    def rows(self, path: Path, indices: Sequence[int]) -> list[Json]:
        lines = path.read_bytes().split(b"\n")
        return [json.loads(lines[index])["row"] for index in indices]


def _parse_key(text: bytes) -> str:
    """A key in JSON; most keys are hashes, for which the parser would be the slow part of opening a store."""
    return str(json.loads(text)) if b"\\" in text else text[1:-1].decode("ascii")


class SafetensorsRows:
    """Shards in safetensors, whose tensor ``keys`` holds the keys of the rows in JSON."""

    suffix = "safetensors"

    def keys(self, path: Path) -> list[str]:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            keys: list[str] = json.loads(file.get_tensor("keys").tobytes())
        return keys


def packed(value: Json) -> npt.NDArray[np.uint8]:
    """A JSON value as a tensor of bytes."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


class TokenRows(SafetensorsRows):
    """One fp32 value a token: ragged rows end to end in safetensors, with their lengths."""

    kind: manifests.Kind = "token rows"

    def encode(self, rows: Mapping[str, Tokens]) -> bytes:
        from safetensors.numpy import save

        for key, row in rows.items():
            if row.dtype != np.float32 or row.ndim != 1:
                raise TypeError(f"row {key!r}: must be float32 of shape (n,), is {row.dtype} of shape {row.shape}")
            if not np.isfinite(row).all():
                raise ValueError(f"row {key!r}: holds NaN or infinity")
        return save(
            {
                "keys": packed(list(rows)),
                "lengths": np.array([len(row) for row in rows.values()], np.int64),
                "values": np.concatenate([*rows.values(), np.zeros(0, np.float32)]),
            }
        )

    def rows(self, path: Path, indices: Sequence[int]) -> list[Tokens]:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            lengths = file.get_tensor("lengths")
            values = file.get_tensor("values")
        ends = np.cumsum(lengths)
        return [values[ends[index] - lengths[index] : ends[index]] for index in indices]


@dataclass(frozen=True)
class Store(Entry, Generic[Row]):
    """Rows by key that are never computed twice: ``missing`` says what to compute, ``append`` keeps it for good.

    Every shard is a file that is named by the number of its rows and its sha256, so that a torn, truncated or
    altered one is found when it is opened: it is set aside with a warning and its rows are missing again.
    """

    format: RowFormat[Row]
    _index: dict[str, tuple[str, int]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _opened: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def shards(self) -> Path:
        return self.path / "shards"

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that have no row yet, each once, in the order given."""
        self._refresh()
        return [key for key in dict.fromkeys(keys) if key not in self._index]

    def n_rows(self) -> int:
        """How many rows there are."""
        self._refresh()
        return len(self._index)

    def get(self, keys: Sequence[str]) -> list[Row]:
        """One row for each key, in the order given; raises MissingRows if there are holes."""
        self._refresh()
        require_rows(keys, self._index, self.name)
        wanted: dict[str, list[tuple[int, int]]] = {}
        for place, key in enumerate(keys):
            shard, index = self._index[key]
            wanted.setdefault(shard, []).append((place, index))
        found: dict[int, Row] = {}
        for shard, places in wanted.items():
            rows = self.format.rows(self.shards / shard, [index for _, index in places])
            found.update(zip((place for place, _ in places), rows, strict=True))
        return [found[place] for place in range(len(keys))]

    def append(self, rows: Mapping[str, Row]) -> None:
        """Add rows as one shard: all of them or, if the process dies, none. Keys that have a row keep it.

        Any number of processes may append at the same time, with or without ``lock``. Raises UserError if the disk
        is full or not writable, ValueError or TypeError for a row that the format cannot hold.
        """
        self.layout.make(".locks")
        with hold(self.layout.lock_path(self.stage, self.fingerprint, APPEND), f"{self.name} to be written"):
            with disk_errors(self.layout.root):
                self.shards.mkdir(parents=True, exist_ok=True)
                for leftover in self.shards.glob(".*.tmp"):
                    remove(leftover)  # of a process that died: the lock is ours now
                self._mend_manifest()
            self._refresh()
            new = {key: row for key, row in rows.items() if key not in self._index}
            if not new:
                return
            data = self.format.encode(new)
            shard = f"{len(new):06d}-{hashlib.sha256(data).hexdigest()}.{self.format.suffix}"
            with disk_errors(self.layout.root):
                write_atomic(self.shards / shard, data)
            self._take(shard, list(new))

    def reason(self) -> str:
        """Why rows must be computed."""
        return f"adds to {len(self._index)} rows" if self._index else super().reason()

    def artifact(self, *, reused: bool) -> Artifact:
        """The record of this store for those who use it."""
        with suppress(OSError):  # a cache that we may only read
            self._mend_manifest()
        return super().artifact(reused=reused)

    def _mend_manifest(self) -> None:
        """Write the manifest if it is not there as it should be: all of it is known."""
        if artifact_problem(self.path, deep=False) is not None:
            self.path.mkdir(parents=True, exist_ok=True)
            self.new_manifest(self.format.kind).write(self.path)

    def _refresh(self) -> None:
        """Open the shards that appeared since the last look, forget those that are gone."""
        try:
            names = {entry.name for entry in os.scandir(self.shards)}
        except (FileNotFoundError, NotADirectoryError):
            names = set()
        if gone := self._opened - names:
            for key in [key for key, (shard, _) in self._index.items() if shard in gone]:
                del self._index[key]
            self._opened.difference_update(gone)
        for name in sorted(names - self._opened):
            if not name.endswith(f".{self.format.suffix}"):
                continue
            try:
                self._take(name, shard_keys(self.shards / name, self.format))
            except FileNotFoundError:
                continue
            except Damaged as damage:
                logger.warning("%s: a shard is damaged, its rows will be computed again: %s", self.name, damage)
                try:
                    self.layout.set_aside(self.shards / name)
                except UserError:
                    self._opened.add(name)  # a cache that we may only read: pass over it

    def _take(self, shard: str, keys: Iterable[str]) -> None:
        for index, key in enumerate(keys):
            self._index.setdefault(key, (shard, index))
        self._opened.add(shard)


def shard_rows(name: str) -> int:
    """The number of rows in a shard, by its file name; raises Damaged for any other name."""
    if (match := SHARD.fullmatch(name)) is None:
        raise Damaged(f"{name} is not the name of a shard")
    return int(match["rows"])


def n_rows(entry: Path) -> int:
    """The number of rows in the store at ``<stage>/<fingerprint>``."""
    return sum(shard_rows(path.name) for path in (entry / "shards").glob("[!.]*"))


def shard_keys(path: Path, format: RowFormat[Row]) -> list[str]:
    """The keys of a shard; raises Damaged unless its bytes are those that were written."""
    rows = shard_rows(path.name)
    if hash_file(path) != path.stem.partition("-")[2]:
        raise Damaged(f"{path} does not match its sha256")
    keys = format.keys(path)
    if len(keys) != rows:
        raise Damaged(f"{path} has {len(keys)} rows instead of {rows}")
    return keys
