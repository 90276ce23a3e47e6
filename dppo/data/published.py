"""Data sets as they are published, on the Hub or in a local copy: each is a YAML that names its source and schema.

What only one family of data sets needs is its schema, a ``Columns`` class: ``dppo.data.rows``,
``dppo.data.transcripts``, ``dppo.data.implicit``, ``dppo.data.corrupted``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dppo.data.preferences import Chats, Labelled, Pairs, Preferences
from dppo.data.rows import Columns
from dppo.data.sources import Published


@dataclass(frozen=True)
class _Source(Preferences):
    """Rows of ``path``: a repository of the Hub, a local folder in the same layout, or a file."""

    path: str
    revision: str
    config: str | None
    train_split: str
    validation_split: str | None
    test_split: str | None
    columns: Columns
    single_turn: bool
    validation_share: float
    test_share: float
    seed: int
    cache_dir: str

    @property
    def preferences(self) -> Published:
        return Published(
            "dataset.path",
            self.path,
            self.revision,
            self.config,
            self.train_split,
            self.validation_split,
            self.test_split,
            self.cache_dir,
        )


@dataclass(frozen=True)
class _WithChats(_Source):
    """The same with chats of ``sft_path``, or the best answers as demonstrations if that is null.

    Where a source has no official validation or test split, ``validation_share`` and ``test_share`` of the prompts are
    cut from its training rows. ``single_turn`` leaves out conversations of more than one exchange (a system turn may
    stand before it).
    """

    sft_path: str | None
    sft_revision: str
    sft_config: str | None
    sft_train_split: str
    sft_test_split: str | None
    sft_single_turn: bool

    @property
    def chats_single_turn(self) -> bool:
        return self.sft_single_turn

    @property
    def demonstrations(self) -> Published | None:
        if self.sft_path is None:
            return None
        return Published(
            "dataset.sft_path",
            self.sft_path,
            self.sft_revision,
            self.sft_config,
            self.sft_train_split,
            None,
            self.sft_test_split,
            self.cache_dir,
        )


@dataclass(frozen=True)
class PublishedPairs(Pairs, _WithChats):
    """Published preference pairs."""

    option: ClassVar[str] = "published pairs"


@dataclass(frozen=True)
class PublishedLabels(Labelled, _WithChats):
    """Published single answers, each labelled desirable or not."""

    option: ClassVar[str] = "published labels"


@dataclass(frozen=True)
class PublishedChats(Chats, _Source):
    """Published chats: for SFT, or as the ``dataset/chats`` of a preference data set."""

    option: ClassVar[str] = "published chats"

    @property
    def demonstrations(self) -> None:
        return None
