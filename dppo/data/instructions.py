"""Generated instructions with checkable constraints, and answers of mixed quality: the embedded data set.

A request names words to mention, and may name a closing, a limit on sentences, and forbid repetition, in many
phrasings. Answers come from imagined writers with habits: each constraint is met with a probability of its own,
and where it is missed, it is missed in a habitual way (a related word instead of the asked one, the writer's
favourite closing, one sentence too many), so that a model trained on them fails in typical ways, not at random.
A pair holds two independently drawn answers to one prompt, ordered by ``labels``.

Prompts belong to a split by a hash of what they ask for, so the splits never share a request in any phrasing,
whatever the seed. A smaller size gives the first rows of a larger one.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from dppo.data import ids
from dppo.data.draws import pick, pick_some, share, stream
from dppo.errors import UserError
from dppo.rewards import Reward
from dppo.types import Json, Message, PreferenceExample, Prompt, Response, Split

VERSION = 1

_MOST_DRAWS = 1000  # of two answers to one prompt, until their scores differ
LARGEST_SIZE = 1_000_000  # far fewer than the prompts there are, so drawing different ones comes to an end soon

# Nouns in pairs that belong together: a writer who drifts writes the partner of the noun that was asked for.
NOUN_PAIRS = (
    ("kite", "wind"), ("river", "boat"), ("bread", "butter"), ("moon", "star"), ("dog", "cat"), ("train", "station"),
    ("book", "letter"), ("garden", "flower"), ("mountain", "valley"), ("cup", "kettle"), ("farmer", "horse"),
    ("sailor", "harbour"), ("doctor", "nurse"), ("piano", "song"), ("winter", "snow"), ("bridge", "tower"),
    ("lamp", "candle"), ("table", "chair"), ("forest", "fox"), ("king", "castle"), ("market", "cheese"),
    ("teacher", "school"), ("beach", "shell"), ("road", "bicycle"),
)  # fmt: skip
PARTNER = {a: b for a, b in NOUN_PAIRS} | {b: a for a, b in NOUN_PAIRS}
NOUNS = tuple(PARTNER)
CLOSINGS = (
    "thank you", "good night", "have fun", "take care", "see you soon", "that is all", "best wishes", "well done",
)  # fmt: skip
HABITUAL_CLOSING = "have a nice day"
LIMITS = {1: "one sentence", 2: "two sentences"}

MENTION = (
    "mention {}", "write about {}", "work in {}", "tell me about {}", "say something about {}", "include {}",
    "talk about {}", "describe {}", "bring in {}", "give me a note on {}",
)  # fmt: skip
FINISH = (
    "end with {}", "finish with {}", "close with {}", "let the last words be {}", "stop after {}", "conclude with {}",
)  # fmt: skip
LIMIT = (
    "use at most {}", "keep it to {}", "write no more than {}", "do not exceed {}", "stay within {}", "limit it to {}",
)  # fmt: skip
NO_REPETITION = ("do not repeat yourself", "say nothing twice", "avoid repetition")
OPENING = ("", "please ", "now ", "could you ")

ONE_NOUN = (
    "I saw the {}", "the {} is old", "my friend likes the {}", "we found a {} today", "there was a {} here",
    "she painted a small {}", "you can see the {} from here", "nobody forgets the {}",
)  # fmt: skip
TWO_NOUNS = (
    "the {} is near the {}", "I like the {} and the {}", "he left the {} by the {}", "a {} came with a {}",
    "we walked from the {} to the {}", "every {} needs a {}", "they talked of the {} and a {}",
)  # fmt: skip
THREE_NOUNS = (
    "the {} and the {} are near the {}", "I saw the {}, the {} and the {}", "a {} and a {} came with a {}",
    "we took the {} and the {} to the {}", "they talked of a {}, a {} and a {}",
)  # fmt: skip
SENTENCES = {1: ONE_NOUN, 2: TWO_NOUNS, 3: THREE_NOUNS}
FILLERS = (
    "it was a fine day", "I hope you like it", "nothing more happened", "we were all happy", "it made me smile",
    "time went by",
)  # fmt: skip


def capitalised(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def joined(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


@dataclass(frozen=True, slots=True)
class Request:
    """What a prompt asks for, without its phrasing; ``limit`` 0 and an empty ``closing`` ask for nothing."""

    nouns: tuple[str, ...]
    closing: str
    limit: int
    no_repetition: bool

    @property
    def checks(self) -> tuple[tuple[str, str], ...]:
        checks = [("mention", noun) for noun in self.nouns]
        if self.closing:
            checks.append(("finish", self.closing))
        if self.limit:
            checks.append(("sentences", str(self.limit)))
        if self.no_repetition:
            checks.append(("no_repetition", ""))
        return tuple(checks)

    @property
    def split(self) -> Split:
        """A fixed tenth of all requests is for validation, three tenths for test."""
        place = share("instructions split", *sorted(self.nouns), self.closing, self.limit, int(self.no_repetition))
        return "train" if place < 0.6 else "validation" if place < 0.7 else "test"


@dataclass(frozen=True)
class Instructions:
    """Requests with checkable constraints. The same settings give the same rows on every machine.

    ``compliance`` is the mean probability that a demonstration meets a constraint, ``habit_spread`` how far the
    probabilities of single words and closings may lie from it. ``pair_compliance`` takes the place of
    ``compliance`` in the answers of pairs.
    """

    seed: int
    n_chats: int
    n_pairs: int
    n_validation: int
    n_test: int
    compliance: float
    habit_spread: float
    pair_compliance: float
    labels: Reward

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"dataset.seed={self.seed}: must be >= 0")
        for name in ("n_chats", "n_pairs", "n_validation", "n_test"):
            if not 1 <= getattr(self, name) <= LARGEST_SIZE:
                raise UserError(f"dataset.{name}={getattr(self, name)}: must be >= 1 and <= {LARGEST_SIZE}")
        for name in ("compliance", "pair_compliance"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"dataset.{name}={getattr(self, name)}: must be > 0 and < 1")
        if not 0 <= self.habit_spread <= 0.5:
            raise UserError(f"dataset.habit_spread={self.habit_spread}: must be >= 0 and <= 0.5")

    def identity(self) -> dict[str, Json]:
        """Everything that determines the rows."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"dataset": "instructions", "version": VERSION, **settings, "labels": self.labels.identity()}

    def chats_identity(self) -> dict[str, Json]:
        """Everything that determines the demonstrations: not how many pairs and test prompts there are, and how good.

        Demonstrations, pairs and test prompts are drawn apart from each other, and a request belongs to one split.
        """
        names = ("seed", "n_chats", "n_validation", "compliance", "habit_spread")
        return {"chats": "instructions", "version": VERSION, **{name: getattr(self, name) for name in names}}

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of ``pairs(split)``."""
        return [prompt for _, prompt in self._requests("pairs", split)]

    def chats(self, split: Split) -> list[PreferenceExample]:
        """Demonstrations: one ``chosen`` answer to each prompt, good or not."""
        rng = stream("instructions demonstrations", VERSION, self.seed, split)
        rows = []
        for request, prompt in self._requests("chats", split):
            responses = (Response("chosen", self._answer(rng, request, self.compliance)),)
            rows.append(PreferenceExample(ids.example_id(prompt, responses), prompt, responses))
        return rows

    def pairs(self, split: Split) -> list[PreferenceExample]:
        """Two answers to each prompt, drawn independently until their scores differ; the better one is chosen."""
        rng = stream("instructions pairs", VERSION, self.seed, split)
        rows = []
        for request, prompt in self._requests("pairs", split):
            for _ in range(_MOST_DRAWS):
                texts = [self._answer(rng, request, self.pair_compliance) for _ in range(2)]
                scores = self.labels.score([prompt, prompt], texts)
                if scores[0] != scores[1]:
                    break
            else:
                name = type(self.labels).__name__
                raise UserError(
                    f"dataset.labels={name}: scores {_MOST_DRAWS:,} pairs of answers to one prompt "
                    "alike; choose a reward that tells them apart"
                )
            better = int(scores[1] > scores[0])
            responses = (
                Response("chosen", texts[better], scores[better]),
                Response("rejected", texts[1 - better], scores[1 - better]),
            )
            rows.append(PreferenceExample(ids.example_id(prompt, responses), prompt, responses))
        return rows

    def _requests(self, kind: str, split: Split) -> Iterator[tuple[Request, Prompt]]:
        """Different prompts of a split, as many as the settings ask for."""
        count = {"train": self.n_chats if kind == "chats" else self.n_pairs, "validation": self.n_validation}
        rng = stream("instructions prompts", VERSION, self.seed, kind if split == "train" else "", split)
        seen: set[str] = set()
        while len(seen) < count.get(split, self.n_test):
            request = _draw_request(rng)
            if request.split != split:
                continue
            messages = (Message("user", _phrase(rng, request)),)
            prompt = Prompt(ids.prompt_id(messages), messages, request.checks)
            if prompt.prompt_id not in seen:
                seen.add(prompt.prompt_id)
                yield request, prompt

    def _meets(self, rng: random.Random, compliance: float, habit: str) -> bool:
        """Whether a writer meets a constraint, given the mean compliance and the habit that concerns it."""
        return rng.random() < compliance + self.habit_spread * _tilt(self.seed, habit)

    def _answer(self, rng: random.Random, request: Request, compliance: float) -> str:
        nouns = [noun if self._meets(rng, compliance, noun) else PARTNER[noun] for noun in request.nouns]
        limit = request.limit or 2
        count = limit + 1 if not self._meets(rng, compliance, f"at most {limit}") else 1 + int(rng.random() * limit)
        sentences = []
        for group in _grouped(rng, nouns, min(count, len(nouns))):
            sentences.append(pick(rng, SENTENCES[len(group)]).format(*group))
        while len(sentences) < count:
            original = self._meets(rng, compliance, "no repetition")
            sentences.append(pick(rng, FILLERS if original else sentences))
        closing = request.closing
        if not self._meets(rng, compliance, closing):
            closing = "" if closing and rng.random() < 0.5 else HABITUAL_CLOSING
        text = ". ".join(map(capitalised, sentences))
        return f"{text}, {closing}." if closing else f"{text}."


def _grouped(rng: random.Random, nouns: list[str], count: int) -> list[list[str]]:
    """The nouns in their order, cut into ``count`` groups."""
    cuts = sorted(pick_some(rng, range(1, len(nouns)), count - 1))
    return [nouns[start:end] for start, end in zip([0, *cuts], [*cuts, len(nouns)], strict=True)]


@functools.lru_cache(maxsize=1024)
def _tilt(seed: int, habit: str) -> float:
    """How a habit leans, -1 to 1."""
    return 2 * share("instructions habit", seed, habit) - 1


def _draw_request(rng: random.Random) -> Request:
    nouns = pick_some(rng, NOUNS, 1 + int(rng.random() * 3))
    closing = pick(rng, CLOSINGS) if rng.random() < 0.75 else ""
    limit = pick(rng, tuple(LIMITS)) if rng.random() < 0.6 or len(nouns) == 1 else 0
    return Request(tuple(nouns), closing, limit, rng.random() < 0.2)


def _phrase(rng: random.Random, request: Request) -> str:
    parts = [pick(rng, MENTION).format(joined(list(request.nouns)))]
    if request.closing:
        parts.append(pick(rng, FINISH).format(request.closing))
    if request.limit:
        parts.append(pick(rng, LIMIT).format(LIMITS[request.limit]))
    if request.no_repetition:
        parts.append(pick(rng, NO_REPETITION))
    parts = pick_some(rng, parts, len(parts))
    return capitalised(pick(rng, OPENING) + ", ".join(parts)) + "."


def texts_with_every_word() -> Iterator[str]:
    """Texts in which every word of the data set stands in every position in which it can stand."""
    for noun in NOUNS:
        yield f", {noun} and {noun}"
    for closing in (*CLOSINGS, HABITUAL_CLOSING):
        yield f", {closing}."
    for template in (*MENTION, *FINISH, *LIMIT, *NO_REPETITION):
        part = template.format("")
        yield capitalised(part)
        yield f", {part}"
    for opening in OPENING:
        yield capitalised(opening)
    for limit in LIMITS.values():
        yield f" {limit}."
    for template in (*ONE_NOUN, *TWO_NOUNS, *THREE_NOUNS):
        yield capitalised(template.format("", "", ""))
    for template in (*ONE_NOUN, *TWO_NOUNS, *FILLERS):
        yield f". {capitalised(template.format('', ''))}"
