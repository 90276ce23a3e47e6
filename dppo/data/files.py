"""The user's own preferences in one file: parquet, JSON lines or CSV, under whatever column names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dppo.data.preferences import Labelled, Pairs, Preferences, Ranked
from dppo.data.rows import Columns, LabelledColumns, PairColumns, RankedColumns
from dppo.data.sources import Files


@dataclass(frozen=True)
class PreferenceFile(Preferences):
    """Preferences from ``path``.

    ``test_path`` is a file of test rows; without it ``test_share`` of the prompts are cut from ``path``.
    ``sft_path`` is a file of chats (a column ``messages``), split by the same shares; without it the best answers of
    ``path`` are the demonstrations.
    """

    path: str
    test_path: str | None
    sft_path: str | None
    columns: Columns
    single_turn: bool
    validation_share: float
    test_share: float
    seed: int

    @property
    def preferences(self) -> Files:
        return Files(self.path, self.test_path)

    @property
    def demonstrations(self) -> Files | None:
        return None if self.sft_path is None else Files(self.sft_path)


@dataclass(frozen=True)
class PairsFile(Pairs, PreferenceFile):
    """Preference pairs from a file: a prompt, a chosen and a rejected answer in each row."""

    option: ClassVar[str] = "pairs_file"
    columns: PairColumns


@dataclass(frozen=True)
class RankedFile(Ranked, PreferenceFile):
    """Groups of K ranked answers from a file."""

    option: ClassVar[str] = "ranked_file"
    columns: RankedColumns


@dataclass(frozen=True)
class LabelledFile(Labelled, PreferenceFile):
    """Single answers from a file, each labelled desirable or not."""

    option: ClassVar[str] = "labelled_file"
    columns: LabelledColumns
