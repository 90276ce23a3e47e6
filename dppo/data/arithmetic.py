"""Generated word problems whose wrong answers differ from the right ones in one or two tokens: the embedded data set
for the study of pairs with a low edit distance (Pal et al. 2024, "Smaug", section 4).

An answer works in two steps, ``3 plus 5 is 8, minus 2 is 6.`` The rejected answer of a pair is the correct one with a
wrong last number, or with a wrong intermediate result that makes the last number wrong too.

Problems belong to a split by a hash of their numbers, so a test problem is never a training problem in other words,
whatever the seed. Demonstrations and training pairs have different numbers too: an SFT model knows its demonstrations
by heart, and on pairs made of them it would err as little as y_gen would differ from the chosen answer.

A smaller size gives the first rows of a larger one.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dppo.data import ids
from dppo.data.draws import pick, share, stream
from dppo.errors import UserError
from dppo.types import Json, Message, PreferenceExample, Prompt, Response, Split

VERSION = 3

Part = Literal["chats", "pairs", "validation", "test"]

LARGEST = 60  # the largest number for which the tokenizer has a piece of its own
NAMES = ("Tom", "Ann", "Sam", "Eva", "Ben", "Mia", "Leo", "Zoe")
THINGS = ("apples", "coins", "cards", "stamps", "shells", "pears", "books", "eggs")
QUESTIONS = (
    "{name} has {a} {thing}, gets {b} and gives away {c}. How many are left?",
    "{name} finds {a} {thing} and then {b}, but loses {c}. How many remain?",
    "There are {a} {thing}. {name} adds {b} and takes {c}. How many now?",
    "How many {thing} has {name} with {a}, {b} more and {c} fewer?",
)
ANSWER = "{a} plus {b} is {s}, minus {c} is {d}."


@dataclass(frozen=True)
class Arithmetic:
    """Two-step word problems ``a + b - c`` with a and b from 1 to ``largest_operand``, c from 1 to ``largest_removed``.

    Results are never negative.
    """

    seed: int
    n_chats: int
    n_pairs: int
    n_validation: int
    n_test: int
    largest_operand: int
    largest_removed: int

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"dataset.seed={self.seed}: must be >= 0")
        if not 4 <= self.largest_operand <= LARGEST // 2:
            raise UserError(f"dataset.largest_operand={self.largest_operand}: must be >= 4 and <= {LARGEST // 2}")
        if not 1 <= self.largest_removed <= self.largest_operand:
            raise UserError(
                f"dataset.largest_removed={self.largest_removed}: must be >= 1 and <= {self.largest_operand}, "
                "dataset.largest_operand"
            )
        sizes: tuple[tuple[str, Part], ...] = (
            ("n_chats", "chats"), ("n_pairs", "pairs"), ("n_validation", "validation"), ("n_test", "test"),
        )  # fmt: skip
        for name, part in sizes:
            # Half of what there is, so that drawing different prompts at random comes to an end soon.
            most = (
                len(_numbers(self.largest_operand, self.largest_removed, part))
                * len(QUESTIONS)
                * len(NAMES)
                * len(THINGS)
                // 2
            )
            if not 1 <= getattr(self, name) <= most:
                raise UserError(
                    f"dataset.{name}={getattr(self, name)}: must be >= 1 and <= {most} "
                    f"with dataset.largest_operand={self.largest_operand} "
                    f"and dataset.largest_removed={self.largest_removed}"
                )

    def identity(self) -> dict[str, Json]:
        """Everything that determines the rows."""
        return {"dataset": "arithmetic", "version": VERSION, **dataclasses.asdict(self)}

    def chats_identity(self) -> dict[str, Json]:
        """Everything that determines the demonstrations: not how many pairs and test prompts there are."""
        names = ("seed", "n_chats", "n_validation", "largest_operand", "largest_removed")
        return {"chats": "arithmetic", "version": VERSION, **{name: getattr(self, name) for name in names}}

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of ``pairs(split)``."""
        return [prompt for prompt, _ in self._problems("pairs", split)]

    def chats(self, split: Split) -> list[PreferenceExample]:
        """Demonstrations: the correct answer to each problem."""
        rows = []
        for prompt, numbers in self._problems("chats", split):
            responses = (Response("chosen", _answer(*numbers)),)
            rows.append(PreferenceExample(ids.example_id(prompt, responses), prompt, responses))
        return rows

    def pairs(self, split: Split) -> list[PreferenceExample]:
        """The correct answer, and the same with one wrong result."""
        rng = stream("arithmetic pairs", VERSION, self.seed, split)
        rows = []
        for prompt, numbers in self._problems("pairs", split):
            responses = (Response("chosen", _answer(*numbers)), Response("rejected", _wrong_answer(rng, *numbers)))
            rows.append(PreferenceExample(ids.example_id(prompt, responses), prompt, responses))
        return rows

    def _problems(self, kind: Literal["chats", "pairs"], split: Split) -> Iterator[tuple[Prompt, tuple[int, int, int]]]:
        """Different prompts, as many as the settings ask for, and their numbers."""
        part: Part = kind if split == "train" else split
        rng = stream("arithmetic prompts", VERSION, self.seed, part)
        numbers = _numbers(self.largest_operand, self.largest_removed, part)
        seen: set[str] = set()
        while len(seen) < getattr(self, f"n_{part}"):
            a, b, c = pick(rng, numbers)
            text = pick(rng, QUESTIONS).format(name=pick(rng, NAMES), thing=pick(rng, THINGS), a=a, b=b, c=c)
            messages = (Message("user", text),)
            prompt = Prompt(ids.prompt_id(messages), messages, (("answer", str(a + b - c)),))
            if prompt.prompt_id not in seen:
                seen.add(prompt.prompt_id)
                yield prompt, (a, b, c)


@functools.lru_cache(maxsize=64)
def _numbers(largest: int, largest_removed: int, part: Part) -> tuple[tuple[int, int, int], ...]:
    """Every (a, b, c) of a part with a and b up to ``largest``, c up to ``largest_removed``, ``a + b - c >= 0``."""
    operands = range(1, largest + 1)
    return tuple(
        (a, b, c)
        for a in operands
        for b in operands
        for c in range(1, min(a + b, largest_removed) + 1)
        if _part_of(a, b, c) == part
    )


def _part_of(a: int, b: int, c: int) -> Part:
    """Of all problems half are for demonstrations, a fifth for pairs, a tenth for validation, a fifth for test."""
    place = share("arithmetic part", a, b, c)
    return "chats" if place < 0.5 else "pairs" if place < 0.7 else "validation" if place < 0.8 else "test"


def _answer(a: int, b: int, c: int) -> str:
    return ANSWER.format(a=a, b=b, c=c, s=a + b, d=a + b - c)


def _wrong_answer(rng: random.Random, a: int, b: int, c: int) -> str:
    # Near misses, never negative: the slip that a weak calculator makes.
    shift = pick(rng, (-2, -1, 1, 2))
    d = a + b - c
    if rng.random() < 0.5:
        return ANSWER.format(a=a, b=b, c=c, s=a + b, d=d + (shift if d + shift >= 0 else -shift))
    wrong = a + b + (shift if a + b + shift >= c else -shift)
    return ANSWER.format(a=a, b=b, c=c, s=wrong, d=wrong - c)


def texts_with_every_word() -> Iterator[str]:
    """Texts in which every word of the data set stands in every position in which it can stand."""
    for number in range(LARGEST + 3):
        yield f"{number} is {number}"
    for question in QUESTIONS:
        yield question.format(name="", thing="", a=1, b=2, c=3)
    for name in NAMES:
        yield f"{name} {name}"
    for thing in THINGS:
        yield f" {thing}"
    yield ANSWER.format(a=1, b=2, c=3, s=4, d=5)
