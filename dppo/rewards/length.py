"""The length of an answer as its reward: a control that shows how much of a gain length alone would explain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dppo.types import Json, Prompt

VERSION = 1


@dataclass(frozen=True)
class Length:
    """The number of characters, or of words (runs without white space), of an answer; longer is better."""

    unit: Literal["characters", "words"]

    def identity(self) -> dict[str, Json]:
        """Everything that determines a score."""
        return {"reward": "length", "version": VERSION, "unit": self.unit}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Any prompt will do."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """One length per answer."""
        return [float(len(answer) if self.unit == "characters" else len(answer.split())) for answer in answers]
