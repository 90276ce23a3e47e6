"""A reward that a program can check: which of the prompt's constraints an answer meets.

The checks travel with the prompt as (kind, argument) pairs:

========================= ==============================================================================
``("mention", "kite")``   the word occurs in the answer
``("finish", "thank you")`` the answer's last words are these; punctuation behind them does not count
``("sentences", "2")``    the answer has at least one sentence and at most so many
``("no_repetition", "")`` no two neighbouring words occur twice in this order; an empty answer fails
``("answer", "42")``      the last whole number in the answer is this one
========================= ==============================================================================

Words are runs of letters, digits and apostrophes; case is ignored. Sentences end with ``.``, ``!`` or ``?``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dppo.errors import UserError
from dppo.types import Json, Prompt

VERSION = 1

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?:\s+|$)")
_WHOLE_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True)
class Findings:
    """What the checks find in one answer.

    ``repetition`` is the share, 0 to 1, of pairs of neighbouring words that occurred earlier in the answer.
    ``surplus_words`` counts the words beyond those that ``mention`` and ``finish`` ask for.
    """

    met: int
    violated: int
    repetition: float
    surplus_words: int


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, in their order."""
    return _WORD.findall(text.lower())


def count_sentences(text: str) -> int:
    """How many sentences a text has; words without a full stop behind them count as one."""
    return sum(1 for part in _SENTENCE_END.split(text) if _WORD.search(part))


def repetition(words: Sequence[str]) -> float:
    """The share, 0 to 1, of pairs of neighbouring words that occurred earlier; 0 for fewer than two words."""
    pairs = list(itertools.pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def inspect_answer(answer: str, checks: Sequence[tuple[str, str]]) -> Findings:
    """Apply every check to an answer. Raises ValueError for a kind of check that does not exist."""
    words = words_of(answer)
    repeated = repetition(words)
    asked = 0
    met = 0
    for kind, argument in checks:
        if kind == "mention":
            met += argument.lower() in words
            asked += 1
        elif kind == "finish":
            ending = words_of(argument)
            met += bool(ending) and words[-len(ending) :] == ending
            asked += len(ending)
        elif kind == "sentences":
            met += 1 <= count_sentences(answer) <= int(argument)
        elif kind == "no_repetition":
            met += bool(words) and repeated == 0
        elif kind == "answer":
            numbers = _WHOLE_NUMBER.findall(answer)
            met += bool(numbers) and int(numbers[-1]) == int(argument)
        else:
            raise ValueError(f"unknown check {kind!r}")
    return Findings(met, len(checks) - met, repeated, max(0, len(words) - asked))


@dataclass(frozen=True)
class Verifiable:
    """``met * n_met - violated * n_violated - repetition * share - surplus_word * n_surplus``, in reward points.

    Signed, and fine-grained so that two different answers rarely tie: they do when they meet equally many checks
    with equally many words and equal repetition. Higher is better.
    """

    met: float
    violated: float
    repetition: float
    surplus_word: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"reward.{field.name}={value}: must be a number >= 0")
        if self.met + self.violated == 0:
            raise UserError("reward.met=0 reward.violated=0: one of the two must be > 0")

    def identity(self) -> dict[str, Json]:
        """Everything that determines a score."""
        return {"reward": "verifiable", "version": VERSION, **dataclasses.asdict(self)}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError unless every prompt carries checks."""
        without = sum(1 for prompt in prompts if not prompt.checks)
        if without:
            raise UserError(
                f"reward=verifiable: {without} of {len(prompts)} prompts carry no checks; "
                "it needs dataset=instructions or dataset=arithmetic, choose another reward for this data set"
            )

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """One reward for each prompt and its answer, in their order."""
        return [self.score_one(prompt.checks, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def score_one(self, checks: Sequence[tuple[str, str]], answer: str) -> float:
        """The reward of one answer."""
        found = inspect_answer(answer, checks)
        reward = (
            self.met * found.met
            - self.violated * found.violated
            - self.repetition * found.repetition
            - self.surplus_word * found.surplus_words
        )
        return round(reward, 6)  # equal findings must tie whatever the rounding of the sum
