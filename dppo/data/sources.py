"""Where rows come from: a repository of the Hub at a commit, a local folder in the same layout, or files.

What is read are files that were named or found by their names, never what a cache has under a folder's name.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dppo.data.tables import ENDINGS
from dppo.digests import content_digest
from dppo.errors import UserError, first_line
from dppo.hub import local_folder, pinned_commit, snapshot, typed_path
from dppo.types import Json, Split

if TYPE_CHECKING:
    from dppo.artifacts import Build, Slot

VERSION = 1  # of what is materialised
README = "README.md"
ROWS = "rows.parquet"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Source(Hashable, Protocol):
    """Rows in files, some of which may be official splits. Hashable, and equal if the settings are."""

    def has(self, split: Split) -> bool:
        """Whether there is such an official split; there always is ``train``."""

    def files(self, split: Split) -> list[Path]:
        """The files of an official split. Raises UserError."""

    def where(self, split: Split) -> str:
        """What an official split is called in messages."""

    def identity(self) -> dict[str, Json]:
        """Everything that determines the rows. Raises UserError if files are missing."""

    def stamps(self) -> Iterator[object]:
        """What changes when a file is rewritten. Raises UserError if files are missing."""


@dataclass(frozen=True)
class Files:
    """Files that the user names: training rows, and test rows where there are some."""

    path: str
    test_path: str | None = None

    def has(self, split: Split) -> bool:
        return split == "train" or (split == "test" and self.test_path is not None)

    def files(self, split: Split) -> list[Path]:
        return [typed_path(self.where(split))]

    def where(self, split: Split) -> str:
        return self.test_path if split == "test" and self.test_path is not None else self.path

    def identity(self) -> dict[str, Json]:
        has_test = self.test_path is not None
        return {"path": self._digest("train"), "test_path": self._digest("test") if has_test else None}

    def stamps(self) -> Iterator[object]:
        yield from _stamps(self)

    def _digest(self, split: Split) -> str:
        return content_digest(self.files(split))


@dataclass(frozen=True)
class Published:
    """A data set as it is published: a repository of the Hub, or a local folder in the same layout, or one file.

    ``key`` names its path in the configuration. ``revision`` is a branch, tag or commit of a repository.
    ``train_split``, ``validation_split`` and ``test_split`` are names of splits as the file names have them; None for
    those that the data set lacks. ``config`` is its configuration, None where there is none. The files of a split are

    - ``data/<config>/<split>-*`` or ``<config>/<split>-*``, without a configuration ``data/<split>-*`` or
      ``<split>-*``, or ``<split>`` alone, or everything in a folder ``<split>/``, all of one ending: .parquet, .jsonl,
      .csv, .json, and .gz of the last three;
    - or, where there are none, what the ``datasets`` library makes of a README that declares ``configs``. That is done
      once, in a place of its own, and kept as parquet in the cache ``cache_dir``.

    A path to a file is training rows without official test and validation rows.
    """

    key: str
    path: str
    revision: str
    config: str | None
    train_split: str
    validation_split: str | None
    test_split: str | None
    cache_dir: str

    def has(self, split: Split) -> bool:
        return split == "train" or (self._file() is None and self._name(split) is not None)

    def files(self, split: Split) -> list[Path]:
        if (file := self._file()) is not None:
            return [file]
        name = self._name(split)
        assert name is not None
        folder = local_folder(self.path, self.key)
        if folder is not None:
            if found := self._in(folder, name):
                return found
            if not _declares_configs(folder):
                raise self._missing(folder, name)
            tree = [[str(file.relative_to(folder)), content_digest([file])] for file in _tree(folder)]
            return [self._materialised(self._slot(name, tree), folder, name)]
        commit = self._commit()
        slot = self._slot(name, {"repository": self.path, "commit": commit})
        if slot.complete():
            return [slot.path / ROWS]
        patterns = [f"{below}{pattern}" for below in self._below for pattern in _patterns(name)]
        folder = snapshot(self.path, "dataset", commit, [README, *patterns], self.key)
        if found := self._in(folder, name):
            return found
        if not _declares_configs(folder):
            raise self._missing(folder, name)
        folder = snapshot(self.path, "dataset", commit, ["*"], self.key)
        return [self._materialised(slot, folder, name)]

    def where(self, split: Split) -> str:
        return self.path if self._file() is not None else f"{self.path} {self._name(split)}"

    def identity(self) -> dict[str, Json]:
        """The commit of a repository, or a hash of the content of local files."""
        layout: dict[str, Json] = {
            "config": self.config,
            "train": self.train_split,
            "validation": self.validation_split,
            "test": self.test_split,
        }
        if (file := self._file()) is not None:
            return {"content": content_digest([file])}
        if local_folder(self.path, self.key) is None:
            return {"repository": self.path, "commit": self._commit(), **layout}
        return {"content": [content_digest(self.files(split)) for split in SPLITS if self.has(split)], **layout}

    def stamps(self) -> Iterator[object]:
        if self._file() is None and local_folder(self.path, self.key) is None:
            yield self._commit()
        else:
            yield from _stamps(self)

    @property
    def _below(self) -> tuple[str, str]:
        return ("data/", "") if self.config is None else (f"data/{self.config}/", f"{self.config}/")

    def _name(self, split: Split) -> str | None:
        return {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}[split]

    def _file(self) -> Path | None:
        path = typed_path(self.path)
        return path if path.is_file() else None

    def _commit(self) -> str:
        return pinned_commit(self.path, "dataset", self.revision, self.key)

    def _in(self, folder: Path, name: str) -> list[Path]:
        """The files of a split in a folder, sorted by name; none if the layout is another one."""
        for below in self._below:
            for ending in ENDINGS:
                patterns = [glob.escape(below) + pattern for pattern in _patterns(glob.escape(name), ending)]
                found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
                if found:
                    return sorted(found)
        return []

    def _missing(self, folder: Path, name: str) -> UserError:
        there = sorted(str(file.relative_to(folder)) for file in _tree(folder) if file.name.endswith(ENDINGS))
        places = " or ".join(f"{below}{name}-*" for below in self._below)
        return UserError(
            f"{self.key}={self.path}: has no split {name} ({places}, parquet, jsonl, csv or json); "
            f"found {', '.join(there[:8]) or 'no such file'}{', ...' if len(there) > 8 else ''}"
        )

    def _slot(self, name: str, content: Json) -> Slot:
        """Where a split is in the cache that only ``datasets`` can read."""
        from dppo.artifacts import Cache

        return Cache(Path(self.cache_dir)).artifact(
            "data", {"version": VERSION, "content": content, "config": self.config, "split": name}
        )

    def _materialised(self, slot: Slot, folder: Path, name: str) -> Path:
        """A split as one parquet file, made once by ``datasets`` from a folder.

        ``datasets`` keeps what it has read under the folder's name, whatever is in it: here it gets a cache directory
        of its own, which is gone afterwards.
        """

        def build(started: Build) -> None:
            from datasets import disable_progress_bars, load_dataset

            disable_progress_bars()
            try:
                with tempfile.TemporaryDirectory(dir=started.work) as own:
                    rows = load_dataset(str(folder), self.config, split=name, cache_dir=own, token=False)
                    rows.to_parquet(str(started.directory / ROWS))
            except Exception as error:  # of many kinds, from a wrong README to a damaged file
                said = first_line(error)
                raise UserError(f"{self.key}={self.path}: its split {name} cannot be read ({said})") from error

        return Path(slot.get_or_build(build).path) / ROWS


def _patterns(name: str, ending: str = ".*") -> list[str]:
    """Where the files of a split are, below its configuration's folder."""
    return [f"{name}-*{ending}", f"{name}{ending}", f"{name}/*{ending}"]


def _declares_configs(folder: Path) -> bool:
    """Whether a README says, as the Hub's do, which files are which split."""
    import yaml

    try:
        text = (folder / README).read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, yaml.YAMLError, IndexError, RecursionError):
        return False
    return isinstance(head, dict) and bool(head.get("configs"))


def _tree(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _stamps(source: Source) -> Iterator[object]:
    for file in (file for split in SPLITS if source.has(split) for file in source.files(split)):
        yield (file, file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else file
