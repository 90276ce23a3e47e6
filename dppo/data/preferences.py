"""Preferences from one source and demonstrations from it or another: what all data sets in files have in common."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

from dppo.data import ids
from dppo.data.division import Cut, Division, divide
from dppo.data.rows import ChatColumns, Columns, Reading, check_share, unique_prompts
from dppo.data.sources import Source
from dppo.errors import UserError
from dppo.types import Json, PreferenceExample, Prompt, Response, Split

VERSION = 2

CHAT = ChatColumns("messages")
Kind = Literal["preferences", "chats"]


class Preferences(ABC):
    """A data set whose rows are in files, split by prompt: a prompt's rows are all in train, validation or test.

    Test and validation prompts of the preferences are in no demonstration that is trained on, whatever its source.
    Rows that cannot be used are left out, counted, and logged; ``readings`` has the counts. A subclass is a frozen
    dataclass that has the settings below as fields and says where the rows are.
    """

    option: ClassVar[str]
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

    @property
    @abstractmethod
    def preferences(self) -> Source:
        """Where the preferences are."""

    @property
    @abstractmethod
    def demonstrations(self) -> Source | None:
        """Where chats for SFT are; None: the best answers of the preferences are the demonstrations."""

    @property
    def chats_single_turn(self) -> bool:
        """Whether chats of more than one exchange are left out of ``demonstrations``."""
        return self.single_turn

    @abstractmethod
    def best_answer(self, example: PreferenceExample) -> Response | None:
        """The answer that is a demonstration, in role ``chosen`` and without a score; None if there is none."""

    @abstractmethod
    def pairs(self, split: Split) -> list[PreferenceExample]:
        """Preference pairs. Raises UserError for missing or unusable files."""

    def identity(self) -> dict[str, Json]:
        """Everything that determines the rows. Raises UserError if a source cannot be found."""
        chats = self.demonstrations
        return {
            "dataset": self.option,
            "version": VERSION,
            "preferences": self.preferences.identity(),
            "columns": _identity(self.columns),
            "single_turn": self.single_turn,
            "demonstrations": None if chats is None else self._chats_identity(chats),
            "cut": dataclasses.asdict(self._cut),
        }

    def chats_identity(self) -> dict[str, Json]:
        """Everything that determines the demonstrations. Raises UserError if a source cannot be found."""
        chats = self.demonstrations
        if chats is None:
            return self.identity()
        left_out: list[Json] = [*sorted(self._divided().evaluation_keys)]
        return {
            "version": VERSION,
            "demonstrations": self._chats_identity(chats),
            "left_out": ids.content_hash(left_out),
            "cut": dataclasses.asdict(self._cut),
        }

    def chats(self, split: Split) -> list[PreferenceExample]:
        """Demonstrations. Raises UserError for missing or unusable files."""
        if self.demonstrations is not None:
            return self._divided_chats(self.demonstrations).part(split)
        found = {}
        for example in self.rows(split):
            if (best := self.best_answer(example)) is not None:
                identifier = ids.example_id(example.prompt, (best,))
                found[identifier] = PreferenceExample(identifier, example.prompt, (best,))
        return list(found.values())

    def rows(self, split: Split) -> list[PreferenceExample]:
        """The preferences as the rows have them. Raises UserError for missing or unusable files."""
        return self._divided().part(split)

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of a split, each once."""
        return unique_prompts(self.rows(split))

    def readings(self, of: Kind) -> tuple[Reading, ...]:
        """What became of the rows of each split that the source has; none for chats made of the preferences."""
        if of == "preferences":
            return self._divided().readings
        return () if self.demonstrations is None else self._divided_chats(self.demonstrations).readings

    @property
    def _cut(self) -> Cut:
        return Cut(self.validation_share, self.test_share, self.seed)

    def _chats_identity(self, source: Source) -> dict[str, Json]:
        return {"source": source.identity(), "columns": _identity(CHAT), "single_turn": self.chats_single_turn}

    def _divided(self) -> Division:
        return divide(self.preferences, self.columns, self.single_turn, self._cut)

    def _divided_chats(self, source: Source) -> Division:
        return divide(source, CHAT, self.chats_single_turn, self._cut, self._divided().evaluation_keys)


class Pairs(Preferences):
    """A prompt, a chosen and a rejected answer in each row."""

    def best_answer(self, example: PreferenceExample) -> Response | None:
        return dataclasses.replace(example.responses[0], score=None)

    def pairs(self, split: Split) -> list[PreferenceExample]:
        return self.rows(split)


class Ranked(Preferences):
    """Groups of K ranked answers; for losses of pairs the best and the worst of a group are the pair."""

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


class Labelled(Preferences):
    """Single answers, each labelled desirable or not; prompts with both kinds also make pairs."""

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


class Chats(Preferences):
    """Chats and nothing else: demonstrations and evaluation prompts for ``loss=none``, no preference."""

    def best_answer(self, example: PreferenceExample) -> Response | None:
        return example.responses[0]

    def pairs(self, split: Split) -> list[PreferenceExample]:
        """None: there is one answer to a prompt."""
        return []


def _identity(columns: Columns) -> dict[str, Json]:
    return {"schema": type(columns).__name__, **dataclasses.asdict(columns)}  # type: ignore[call-overload]


def _score(response: Response) -> float:
    assert response.score is not None
    return response.score
