"""Whether answers still look like text: how varied and how repetitive they are.

Words are what stands between white space, so that models with different tokenizers can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_REPEATED = 4  # words of the n-grams whose repetitions are counted


@dataclass(frozen=True, slots=True)
class TextHealth:
    """Distinct-1, -2 and -3 of a model's answers (None where no answer has so many words), and the repetition rate."""

    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    repetition_rate: float


def text_health(answers: Sequence[str]) -> TextHealth:
    """Statistics of the answers of one model, at least one."""
    words = [answer.split() for answer in answers]
    return TextHealth(
        distinct_1=distinct(words, 1),
        distinct_2=distinct(words, 2),
        distinct_3=distinct(words, 3),
        repetition_rate=sum(map(repetition_rate, words)) / len(answers),
    )


def distinct(answers: Sequence[Sequence[str]], n: int) -> float | None:
    """Different n-grams / all n-grams, pooled over the answers (Li et al. 2016, arXiv 1510.03055).

    It falls with the amount of text: compare models on the same prompts. None if there is no n-gram.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for words in answers:
        grams = _ngrams(words, n)
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else None


def repetition_rate(words: Sequence[str]) -> float:
    """The share of an answer's 4-grams that stood earlier in it; 0 for an answer of fewer than four words."""
    grams = _ngrams(words, _REPEATED)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
