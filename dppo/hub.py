"""Models and data sets on the Hugging Face Hub: pinned to a commit, downloaded once, or one line that says why not."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from dppo.errors import UserError, first_line

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def typed_path(text: str) -> Path:
    """A path as it was typed, with ``~`` for a home; unlike Path's own way that of an unknown user stays as it is."""
    return Path(os.path.expanduser(text))


def local_folder(name: str, key: str) -> Path | None:
    """The folder that ``name`` means, or None where it is the name of a repository on the Hub.

    A folder that exists wins over a repository of the same name. Raises UserError for a path to nothing, a path to
    a file, and what can be neither path nor repository.
    """
    path = typed_path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{key}={name}: is a file; give the folder that holds it")
    if name.startswith(("/", ".", "~")) or not _REPOSITORY.fullmatch(name):
        raise UserError(f"{key}={name}: there is no such folder")
    return None


def pinned_commit(repository: str, kind: Literal["model", "dataset"], revision: str, key: str) -> str:
    """The commit (40 hexadecimal digits) that a branch or tag points at now; a commit is returned as it is.

    Without a connection it is the commit that the branch pointed at when it was last downloaded to this machine.
    Raises UserError if the Hub refuses, or cannot be reached and nothing is cached.
    """
    if _COMMIT.fullmatch(revision):
        return revision
    # Downloads no file: it records where the branch points, and reads that record without a connection.
    with _silent():
        return _download(repository, kind, revision, [], key).name


def snapshot(
    repository: str, kind: Literal["model", "dataset"], commit: str, patterns: Sequence[str], key: str
) -> Path:
    """The folder with those files of the commit that match a pattern, downloaded unless they are here already.

    Raises UserError if the Hub refuses or cannot be reached.
    """
    return _download(repository, kind, commit, patterns, key)


def _download(repository: str, kind: str, revision: str, patterns: Sequence[str], key: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["original/*", "consolidated*"],  # second copies of the weights in another format
        )
    except Exception as error:  # the client has changed its HTTP library before, so its errors share no class
        _refuse(error, repository, kind, revision, key)
        raise _unreachable(repository, kind, key, error) from error
    return Path(folder)


@contextmanager
def _silent() -> Iterator[None]:
    """Where nothing is to be downloaded, neither a bar of no files nor a warning of no matches is news."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    said, shown = logging.getLogger("huggingface_hub"), not are_progress_bars_disabled()
    level = said.level
    said.setLevel(logging.ERROR)
    disable_progress_bars()
    try:
        yield
    finally:
        said.setLevel(level)
        if shown:
            enable_progress_bars()


def _refuse(error: Exception, repository: str, kind: str, revision: str, key: str) -> None:
    """Raise a UserError for an answer of the Hub that trying again will not change."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repository}"
    if isinstance(error, errors.GatedRepoError):
        raise UserError(f"{key}={repository}: needs access; accept its terms at {page}, then run `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        raise UserError(
            f"{key}={repository}: the Hugging Face Hub has no such {kind} (or it is private: `hf auth login`), "
            "and there is no folder of this name here"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        raise UserError(f"{key}={repository}: has no revision {revision}; see the branches and commits at {page}")


def _unreachable(repository: str, kind: str, key: str, error: Exception) -> UserError:
    said = first_line(error).rstrip(".")
    return UserError(
        f"{key}={repository}: the Hugging Face Hub cannot be reached ({said}) and this {kind} is not cached here; "
        f"check the connection and HF_HUB_OFFLINE, or give a local folder in the same layout ({key}=/path/to/folder)"
    )
