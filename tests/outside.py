"""A reward that is not dppo's own, for the test of allowed_targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dppo.types import Json, Prompt


@dataclass(frozen=True)
class Always:
    def identity(self) -> dict[str, Json]:
        return {}

    def check(self, prompts: Sequence[Prompt]) -> None:
        pass

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        return [1.0] * len(answers)
