"""What an answer is worth: scores by prompt and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from dppo.types import Json, Prompt


@runtime_checkable
class Reward(Protocol):
    """A reward: a frozen dataclass of settings with these methods. Higher is better; scores may be negative."""

    def identity(self) -> dict[str, Json]:
        """Everything that determines a score; part of cache fingerprints."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ``UserError`` before any training if these prompts can't be scored."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """One finite score per answer; ``answers[i]`` answers ``prompts[i]``."""


@runtime_checkable
class PairwiseReward(Protocol):
    """A reward that compares two answers to one prompt: a frozen dataclass of settings with these methods."""

    def identity(self) -> dict[str, Json]:
        """Everything that determines a verdict; part of cache fingerprints."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ``UserError`` before any training if answers to these prompts can't be compared."""

    def compare(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """How far ``first[i]`` is better than ``second[i]`` for ``prompts[i]``: 1 better, 0 worse, 1/2 a tie.

        The order in which the two are shown has no say: a judge that has a preference for a place is asked twice.
        """
