"""What an answer is worth: scores by prompt and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far the first answer is better, 1 better, 0 worse, 1/2 a tie, in each order in which the two were shown.

    None: what was said in this order could not be read; it counts as a tie.
    """

    orders: tuple[float | None, float | None]

    @property
    def value(self) -> float:
        """The mean of both orders."""
        first, second = (0.5 if one is None else one for one in self.orders)
        return (first + second) / 2

    def swapped(self) -> Verdict:
        """The same, with the two answers exchanged."""
        first, second = (None if one is None else 1 - one for one in self.orders)
        return Verdict((first, second))


@runtime_checkable
class GradualReward(Reward, Protocol):
    """A reward whose scores cost time or money one by one: each is kept as soon as it is there."""

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Iterator[tuple[int, float]]:
        """(place, score) for every answer, in any order."""


@runtime_checkable
class SpreadReward(Reward, Protocol):
    """A reward whose model may lie on several GPUs."""

    @property
    def spread(self) -> bool:
        """Whether it takes all GPUs that it sees: then one process of a run has it, and scores for all."""


@runtime_checkable
class JudgingReward(PairwiseReward, Protocol):
    """A pairwise reward that tells what it thinks in each order, one pair after the other."""

    def verdicts(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> Iterator[tuple[int, Verdict]]:
        """(place, verdict) for every pair, in any order."""

    def accept(self, verdicts: Sequence[Verdict]) -> None:
        """Raise ``UserError`` if too many of them could not be read for a comparison to rest on."""
