"""The cache as the stages use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dppo.artifacts.fingerprint import FINGERPRINT
from dppo.artifacts.layout import STAGE, Layout, identify
from dppo.artifacts.manifest import Damaged, Manifest, artifact_problem
from dppo.artifacts.slots import Slot
from dppo.artifacts.stores import JsonRows, Store, TokenRows, Tokens
from dppo.artifacts.token_ids import IdRow, IdRows
from dppo.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from dppo.types import Json


@dataclass(frozen=True)
class Cache(Layout):
    """Artifacts and growing stores by fingerprint, below ``root``.

    ``content`` is everything besides ``parents`` that decides the result: the stage's hand-bumped version and the
    settings that count, as JSON types and dataclasses. ``parents`` are the fingerprints of the artifacts it is made
    from. With ``verify`` artifacts are hashed before they are reused; shards of stores always are.
    """

    verify: bool = False

    def artifact(self, stage: str, content: object, parents: Sequence[str] = ()) -> Slot:
        """The slot of an artifact, which is a directory of files made in one go."""
        return Slot(self, *identify(stage, content, parents), verify=self.verify)

    def existing(self, stage: str, fingerprint: str) -> Slot:
        """The slot of a complete artifact that is known by its fingerprint alone. Raises Damaged if it is not there."""
        if not (STAGE.fullmatch(stage) and FINGERPRINT.fullmatch(fingerprint)):
            raise Damaged("there is no such artifact")
        path = self.root / stage / fingerprint
        if (problem := artifact_problem(path, deep=self.verify)) is not None:
            raise Damaged(problem if path.exists() else "it is gone")
        found = Manifest.read(path)
        return Slot(self, stage, fingerprint, found.inputs, found.parents, verify=self.verify)

    def json_store(self, stage: str, content: object, parents: Sequence[str] = ()) -> Store[Json]:
        """A growing store of JSON rows: generations, scores."""
        return Store(self, *identify(stage, content, parents), format=JsonRows())

    def token_store(self, stage: str, content: object, parents: Sequence[str] = ()) -> Store[Tokens]:
        """A growing store of ragged fp32 rows (n_tokens,): reference log-probs."""
        return Store(self, *identify(stage, content, parents), format=TokenRows())

    def id_store(self, stage: str, content: object, parents: Sequence[str] = ()) -> Store[IdRow]:
        """A growing store of token ids, mapped to memory when they are read: tokenised examples."""
        return Store(self, *identify(stage, content, parents), format=IdRows())


@dataclass(frozen=True)
class ReadOnly(Cache):
    """A cache in which nothing can be made: no entry, no lock, no directory."""

    def make(self, name: str) -> Path:
        raise UserError(f"{self.root / name}: nothing is made here, only looked at")
