"""The user's own preferences in one file: parquet, JSON lines or CSV, under whatever column names."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dppo.data import ids
from dppo.data.rows import (
    ChatColumns,
    Columns,
    LabelledColumns,
    PairColumns,
    RankedColumns,
    check_share,
    cut,
    read_examples,
    unique_prompts,
)
from dppo.digests import content_digest
from dppo.errors import UserError
from dppo.types import Json, PreferenceExample, Prompt, Response, Split

VERSION = 1

CHAT = ChatColumns("messages")


@dataclass(frozen=True)
class PreferenceFile(ABC):
    """Preferences from ``path``, split by prompt: a prompt's rows are all in train, validation or test.

    ``test_path`` is a file of test rows; without it ``test_share`` of the prompts are cut from ``path``.
    ``sft_path`` is a file of chats (a column ``messages``), split by the same shares; without it the best answers of
    ``path`` are the demonstrations. Rows that cannot be used are left out, counted, and logged.
    """

    option: ClassVar[str]
    path: str
    test_path: str | None
    sft_path: str | None
    columns: Columns  # which hold the preferences
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

    @abstractmethod
    def best_answer(self, example: PreferenceExample) -> Response | None:
        """The answer that is a demonstration, in role ``chosen`` and without a score; None if there is none."""

    @abstractmethod
    def pairs(self, split: Split) -> list[PreferenceExample]:
        """Preference pairs. Raises UserError for missing or unusable files."""

    def identity(self) -> dict[str, Json]:
        """Everything that determines the rows. Raises UserError if a file is missing."""
        files = {"path": self.path, "test_path": self.test_path, "sft_path": self.sft_path}
        return {
            "dataset": self.option,
            "version": VERSION,
            "content": {
                key: None if path is None else content_digest([Path(path).expanduser()]) for key, path in files.items()
            },
            "columns": dataclasses.asdict(self.columns),  # type: ignore[call-overload]
            "single_turn": self.single_turn,
            "validation_share": self.validation_share,
            "test_share": self.test_share,
            "seed": self.seed,
        }

    def chats(self, split: Split) -> list[PreferenceExample]:
        """Demonstrations. Raises UserError for missing or unusable files."""
        if self.sft_path is not None:
            chats = self._read(self.sft_path, CHAT, leave_out=self._test_prompts())
            return cut(chats, split, self.validation_share, self.test_share, self.seed)
        found = {}
        for example in self.rows(split):
            if (best := self.best_answer(example)) is not None:
                identifier = ids.example_id(example.prompt, (best,))
                found[identifier] = PreferenceExample(identifier, example.prompt, (best,))
        return list(found.values())

    def rows(self, split: Split) -> list[PreferenceExample]:
        """The rows of the file as they are. Raises UserError for missing or unusable files."""
        if self.test_path is None:
            rows = self._read(self.path, self.columns)
            return cut(rows, split, self.validation_share, self.test_share, self.seed)
        if split == "test":
            return list(self._read(self.test_path, self.columns))
        rest = self._read(self.path, self.columns, leave_out=self._test_prompts())
        return cut(rest, split, self.validation_share, 0.0, self.seed)

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of a split, each once."""
        return unique_prompts(self.rows(split))

    def _read(
        self, path: str, columns: Columns, leave_out: frozenset[str] = frozenset()
    ) -> tuple[PreferenceExample, ...]:
        return read_examples([Path(path).expanduser()], columns, self.single_turn, path, leave_out)

    def _test_prompts(self) -> frozenset[str]:
        """Ids of the prompts of the file of test rows; those cut from ``path`` are cut from the chats likewise."""
        if self.test_path is None:
            return frozenset()
        return frozenset(example.prompt.prompt_id for example in self._read(self.test_path, self.columns))


@dataclass(frozen=True)
class PairsFile(PreferenceFile):
    """Preference pairs from a file: a prompt, a chosen and a rejected answer in each row."""

    option: ClassVar[str] = "pairs_file"
    columns: PairColumns

    def best_answer(self, example: PreferenceExample) -> Response | None:
        return dataclasses.replace(example.responses[0], score=None)

    def pairs(self, split: Split) -> list[PreferenceExample]:
        return self.rows(split)


@dataclass(frozen=True)
class RankedFile(PreferenceFile):
    """Groups of K ranked answers from a file; for losses of pairs the best and the worst of a group are the pair."""

    option: ClassVar[str] = "ranked_file"
    columns: RankedColumns

    def best_answer(self, example: PreferenceExample) -> Response | None:
        return Response("chosen", max(example.responses, key=_score).text)

    def ranked(self, split: Split) -> list[PreferenceExample]:
        """Groups of at least two answers with scores. Raises UserError for missing or unusable files."""
        return self.rows(split)

    def pairs(self, split: Split) -> list[PreferenceExample]:
        """Best and worst answer of each group, the first of equals; groups of ties are left out."""
        found = []
        for example in self.rows(split):
            best, worst = max(example.responses, key=_score), min(example.responses, key=_score)
            if _score(best) > _score(worst):
                pair = (Response("chosen", best.text, best.score), Response("rejected", worst.text, worst.score))
                found.append(PreferenceExample(ids.example_id(example.prompt, pair), example.prompt, pair))
        return found


@dataclass(frozen=True)
class LabelledFile(PreferenceFile):
    """Single answers from a file, each labelled desirable or not; prompts with both kinds also make pairs."""

    option: ClassVar[str] = "labelled_file"
    columns: LabelledColumns

    def best_answer(self, example: PreferenceExample) -> Response | None:
        (answer,) = example.responses
        return Response("chosen", answer.text) if answer.role == "desirable" else None

    def labelled(self, split: Split) -> list[PreferenceExample]:
        """Examples of one answer each, desirable or undesirable. Raises UserError for missing or unusable files."""
        return self.rows(split)

    def pairs(self, split: Split) -> list[PreferenceExample]:
        """The first desirable and the first undesirable answer to each prompt that has both; there may be none."""
        return list(self._pairs(split))

    def _pairs(self, split: Split) -> Iterator[PreferenceExample]:
        by_prompt: dict[str, dict[str, PreferenceExample]] = {}
        for example in self.rows(split):
            by_prompt.setdefault(example.prompt.prompt_id, {}).setdefault(example.responses[0].role, example)
        for kinds in by_prompt.values():
            if len(kinds) == 2:
                better, worse = kinds["desirable"], kinds["undesirable"]
                pair = Response("chosen", better.responses[0].text), Response("rejected", worse.responses[0].text)
                if pair[0].text != pair[1].text:
                    yield PreferenceExample(ids.example_id(better.prompt, pair), better.prompt, pair)


def _score(response: Response) -> float:
    assert response.score is not None
    return response.score
