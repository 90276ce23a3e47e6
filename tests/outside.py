"""A reward and a data set that are not dppo's own, for tests with allowed_targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dppo.data.published import PublishedPairs
from dppo.types import Json, Prompt, Split


@dataclass(frozen=True)
class Always:
    def identity(self) -> dict[str, Json]:
        return {}

    def check(self, prompts: Sequence[Prompt]) -> None:
        pass

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        return [1.0] * len(answers)


@dataclass(frozen=True)
class Leaky(PublishedPairs):
    """Evaluates on the prompts that it trains on."""

    def prompts(self, split: Split) -> list[Prompt]:
        return super().prompts("train")
