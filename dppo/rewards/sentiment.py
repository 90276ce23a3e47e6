"""How positive an answer sounds: a reward for trying real language models before a reward model is trained."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dppo.errors import UserError
from dppo.types import Json, Prompt

VERSION = 1


@dataclass(frozen=True)
class Sentiment:
    """The compound score of VADER (Hutto and Gilbert 2014) for the whole answer, in [-1, 1]; 0 is neutral or empty.

    It reads the answer only, never the prompt, and saturates: long friendly texts are all near 1.
    """

    def identity(self) -> dict[str, Json]:
        """The installed release of the package, whose word list determines the scores."""
        from importlib.metadata import version

        _require_package()
        return {"reward": "sentiment", "version": VERSION, "vader": version("vaderSentiment")}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError if the package is missing; any prompt will do."""
        _require_package()

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """One score per answer."""
        _require_package()
        analyzer = _analyzer()
        return [float(analyzer.polarity_scores(answer)["compound"]) for answer in answers]


@functools.cache
def _analyzer() -> Any:
    """Reads its word list once."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def _require_package() -> None:
    if importlib.util.find_spec("vaderSentiment") is None:
        raise UserError("reward=sentiment: needs the package vaderSentiment: pip install 'dppo[sentiment]'")
