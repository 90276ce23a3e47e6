"""Where prompts, demonstrations and preferences come from, and how they become tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from dppo.types import Json, PreferenceExample, Prompt, Shape, Split

if TYPE_CHECKING:
    from dppo.data.rows import Reading


@runtime_checkable
class Dataset(Protocol):
    """A data set: a frozen dataclass of settings with these methods. Splits share no prompt."""

    def identity(self) -> dict[str, Json]:
        """Everything that determines the content; part of cache fingerprints."""

    def chats(self, split: Split) -> list[PreferenceExample]:
        """Demonstrations for SFT: each example has one ``chosen`` response."""

    def pairs(self, split: Split) -> list[PreferenceExample]:
        """Preferences: each example has a ``chosen`` and a ``rejected`` response."""

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts to be answered in an evaluation, unique by ``prompt_id``."""


@runtime_checkable
class RankedDataset(Dataset, Protocol):
    """A data set that also has groups of K ranked answers."""

    def ranked(self, split: Split) -> list[PreferenceExample]:
        """Groups: each example has two or more ``ranked`` responses with scores."""


@runtime_checkable
class LabelledDataset(Dataset, Protocol):
    """A data set that also has single answers, labelled desirable or not."""

    def labelled(self, split: Split) -> list[PreferenceExample]:
        """Answers: each example has one ``desirable`` or ``undesirable`` response."""


@runtime_checkable
class CountedDataset(Dataset, Protocol):
    """A data set whose rows are read from somewhere, and counted."""

    def readings(self, of: Literal["preferences", "chats"]) -> tuple[Reading, ...]:
        """What became of the rows: how many there were, how many are left, and why the others are not."""


@runtime_checkable
class SharedChats(Dataset, Protocol):
    """A data set whose demonstrations are decided by less than the whole ``identity``."""

    def chats_identity(self) -> dict[str, Json]:
        """Everything that determines ``chats``; data sets that agree in it share their SFT models."""


def chats_identity(dataset: Dataset) -> dict[str, Json]:
    """Everything that determines the demonstrations of a data set: part of SFT's fingerprint."""
    return dataset.chats_identity() if isinstance(dataset, SharedChats) else dataset.identity()


def examples_for(dataset: Dataset, shape: Shape, split: Split) -> tuple[Shape, Callable[[], list[PreferenceExample]]]:
    """What a loss that trains on ``shape`` gets of a split: its own shape, and the examples when they are asked for.

    A pair serves every loss.
    """
    if shape == "ranked" and isinstance(dataset, RankedDataset):
        return shape, lambda: dataset.ranked(split)
    if shape == "labelled" and isinstance(dataset, LabelledDataset):
        return shape, lambda: dataset.labelled(split)
    return "pairs", lambda: dataset.pairs(split)
