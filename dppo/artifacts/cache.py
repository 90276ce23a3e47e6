"""The cache as the stages use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dppo.artifacts.layout import Layout, identify
from dppo.artifacts.slots import Slot
from dppo.artifacts.stores import JsonRows, Store, TokenRows, Tokens

if TYPE_CHECKING:
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

    def json_store(self, stage: str, content: object, parents: Sequence[str] = ()) -> Store[Json]:
        """A growing store of JSON rows: generations, scores."""
        return Store(self, *identify(stage, content, parents), format=JsonRows())

    def token_store(self, stage: str, content: object, parents: Sequence[str] = ()) -> Store[Tokens]:
        """A growing store of ragged fp32 rows (n_tokens,): reference log-probs."""
        return Store(self, *identify(stage, content, parents), format=TokenRows())
