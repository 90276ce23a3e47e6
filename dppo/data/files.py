"""The user's own preference pairs in one file: parquet, JSON lines or CSV, under whatever column names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from dppo.data import ids
from dppo.data.rows import ChatColumns, PairColumns, check_share, cut, read_examples, unique_prompts
from dppo.digests import content_digest
from dppo.errors import UserError
from dppo.types import Json, PreferenceExample, Prompt, Split

VERSION = 1

CHAT = ChatColumns("messages")


@dataclass(frozen=True)
class PairsFile:
    """Preference pairs from ``path``, split by prompt: a prompt's rows are all in train, validation or test.

    ``test_path`` is a file of test pairs; without it ``test_share`` of the prompts are cut from ``path``.
    ``sft_path`` is a file of chats (a column ``messages``), split by the same shares; without it the chosen answers
    of the pairs are the demonstrations. Rows that cannot be used are left out, counted, and logged.
    """

    path: str
    test_path: str | None
    sft_path: str | None
    columns: PairColumns
    single_turn: bool
    validation_share: float
    test_share: float
    seed: int

    def __post_init__(self) -> None:
        check_share("validation_share", self.validation_share)
        check_share("test_share", self.test_share)
        if self.validation_share + self.test_share >= 1:
            raise UserError(
                f"test_share={self.test_share}: leaves nothing to train on beside "
                f"validation_share={self.validation_share}; their sum must be below 1"
            )

    def identity(self) -> dict[str, Json]:
        """Everything that determines the rows. Raises UserError if a file is missing."""
        files = {"path": self.path, "test_path": self.test_path, "sft_path": self.sft_path}
        return {
            "dataset": "pairs_file",
            "version": VERSION,
            "content": {
                key: None if path is None else content_digest([Path(path).expanduser()]) for key, path in files.items()
            },
            "columns": dataclasses.asdict(self.columns),
            "single_turn": self.single_turn,
            "validation_share": self.validation_share,
            "test_share": self.test_share,
            "seed": self.seed,
        }

    def chats(self, split: Split) -> list[PreferenceExample]:
        """Demonstrations. Raises UserError for missing or unusable files."""
        if self.sft_path is None:
            chosen = {}
            for example in self.pairs(split):
                responses = (dataclasses.replace(example.responses[0], score=None),)
                identifier = ids.example_id(example.prompt, responses)
                chosen[identifier] = PreferenceExample(identifier, example.prompt, responses)
            return list(chosen.values())
        chats = self._read(self.sft_path, CHAT, leave_out=self._test_prompts())
        return cut(chats, split, self.validation_share, self.test_share, self.seed)

    def pairs(self, split: Split) -> list[PreferenceExample]:
        """Preference pairs. Raises UserError for missing or unusable files."""
        if self.test_path is None:
            return cut(self._read(self.path, self.columns), split, self.validation_share, self.test_share, self.seed)
        if split == "test":
            return list(self._read(self.test_path, self.columns))
        rest = self._read(self.path, self.columns, leave_out=self._test_prompts())
        return cut(rest, split, self.validation_share, 0.0, self.seed)

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of ``pairs(split)``, each once."""
        return unique_prompts(self.pairs(split))

    def _read(
        self, path: str, columns: ChatColumns | PairColumns, leave_out: frozenset[str] = frozenset()
    ) -> tuple[PreferenceExample, ...]:
        return read_examples([Path(path).expanduser()], columns, self.single_turn, path, leave_out)

    def _test_prompts(self) -> frozenset[str]:
        """Ids of the prompts of the file of test pairs; those cut from ``path`` are cut from the chats likewise."""
        if self.test_path is None:
            return frozenset()
        return frozenset(example.prompt.prompt_id for example in self._read(self.test_path, self.columns))
