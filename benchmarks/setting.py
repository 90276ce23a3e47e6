"""What is measured on: a model, and real or made-up pairs, as texts and as tokens."""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dppo.data.encoding import ChatEncoder
    from dppo.types import EncodedExample, PreferenceExample

BATCH_SIZE = 4
PRECISIONS = ("fp32", "bf16")
SEED = 0
BALANCED = 0.9  # of the longer answer's tokens the shorter one has at least
_CHUNK = 64  # pairs that are tokenised at once while some are looked for
_WORDS = "the of to and a in is it you that he was for on are with as his they be at one have this"


@dataclass(frozen=True)
class Setting:
    """What is measured on: an option of the group model, a folder of pairs in UltraFeedback's layout (None: made up),
    the most tokens of a prompt and its longer answer, whether only pairs of similar answers are taken, how many
    pairs a step has, and in which precisions ``trl``, ``memory``, ``step`` and ``generation`` compute.
    """

    model: str
    pairs: Path | None
    max_length: int
    cache_dir: str
    balanced: bool = False
    batch_size: int = BATCH_SIZE
    precisions: tuple[str, ...] = PRECISIONS

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model", default="tiny", help="an option of the group model (%(default)s)")
        parser.add_argument(
            "--pairs", type=Path, help="a folder of pairs in UltraFeedback's layout; without it pairs are made up"
        )
        parser.add_argument(
            "--max-length", type=int, default=160, help="tokens of a prompt and its longer answer (%(default)s)"
        )
        parser.add_argument(
            "--balanced",
            action="store_true",
            help=f"only pairs whose shorter answer has at least {BALANCED:g} of the longer one's tokens",
        )
        parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="pairs of a step (%(default)s)")
        parser.add_argument(
            "--precision",
            action="append",
            choices=PRECISIONS,
            help="what steps and answers are computed in; repeat (both). A processor without AVX512-BF16 or AMX takes "
            "many times as long for bf16",
        )
        parser.add_argument("--cache-dir", default="outputs/cache", help="where a converted model is kept")

    @classmethod
    def of(cls, given: argparse.Namespace) -> Setting:
        """What the options say; pairs are made up, and that is said, where their folder is absent."""
        pairs = given.pairs
        if pairs is not None and not pairs.is_dir():
            print(f"--pairs {pairs}: no such folder, pairs are made up instead", file=sys.stderr, flush=True)
            pairs = None
        precisions = tuple(one for one in PRECISIONS if one in (given.precision or PRECISIONS))
        return cls(given.model, pairs, given.max_length, given.cache_dir, given.balanced, given.batch_size, precisions)

    @property
    def options(self) -> list[str]:
        """The options that say this, for another process."""
        found = ["--model", self.model, "--max-length", str(self.max_length), "--cache-dir", self.cache_dir]
        found += ["--batch-size", str(self.batch_size)]
        found += [word for one in self.precisions for word in ("--precision", one)]
        found += [] if self.pairs is None else ["--pairs", str(self.pairs)]
        return found + ["--balanced"] * self.balanced

    @property
    def words(self) -> str:
        """The setting in a table."""
        where = "made-up pairs" if self.pairs is None else self.pairs.name
        balanced = f", shorter answer at least {BALANCED:g} of the longer" if self.balanced else ""
        return f"{self.model}, {where}, at most {self.max_length} tokens{balanced}, {self.batch_size} a step"

    def takes(self, pair: EncodedExample) -> bool:
        lengths = [len(answer.token_ids) for answer in pair.responses]
        fits = len(pair.prompt_ids) + max(lengths) <= self.max_length
        return fits and (not self.balanced or min(lengths) >= BALANCED * max(lengths))


@functools.lru_cache(maxsize=1)
def experiment(setting: Setting) -> Any:
    from dppo.config import compose, load

    words = [f"model={setting.model}", "reward=length", f"cache.dir={setting.cache_dir}", "device=cpu"]
    if setting.pairs is not None:
        words += ["dataset=ultrafeedback", f"dataset.path={setting.pairs}"]
    return load(compose(words), words)


@functools.lru_cache(maxsize=1)
def encoder_of(setting: Setting) -> ChatEncoder:
    from dppo.data.encoding import ChatEncoder

    return ChatEncoder(experiment(setting).model.load_tokenizer())


def texts(setting: Setting, n: int) -> list[PreferenceExample]:
    """The first ``n`` pairs that the setting takes."""
    drawn = (
        _made_up(200 * n, setting.max_length) if setting.pairs is None else experiment(setting).dataset.pairs("train")
    )
    encoder = encoder_of(setting)
    found: list[PreferenceExample] = []
    for chunk in _chunks(drawn):
        taken = {one.example_id for one in encoder.encode(chunk, None).examples if setting.takes(one)}
        found += [example for example in chunk if example.example_id in taken]
        if len(found) >= n:
            return found[:n]
    raise SystemExit(f"{setting.words}: {len(found)} such pairs, {n} are needed; raise --max-length or lower --rounds")


def _chunks(drawn: Iterable[PreferenceExample]) -> Iterator[list[PreferenceExample]]:
    left = iter(drawn)
    while chunk := list(itertools.islice(left, _CHUNK)):
        yield chunk


def _made_up(n: int, max_length: int) -> Iterator[PreferenceExample]:
    """Pairs of words, balanced between the two answers: at 160 tokens prompts of 5 to 30 words, answers of 5 to 60."""
    from dppo.data.ids import example_id, prompt_id
    from dppo.types import Message, PreferenceExample, Prompt, Response

    draw = random.Random(SEED)

    def text(most: int) -> str:
        return " ".join(draw.choice(_WORDS.split()) for _ in range(draw.randint(5, max(5, most * max_length // 160))))

    for _ in range(n):
        messages = (Message("user", text(30)),)
        prompt = Prompt(prompt_id(messages), messages)
        answers = (Response("chosen", text(60)), Response("rejected", text(60)))
        yield PreferenceExample(example_id(prompt, answers), prompt, answers)


def in_order(setting: Setting, n: int) -> list[PreferenceExample]:
    """``n`` pairs in the order in which dppo trains on them in one epoch."""
    found = {example.example_id: example for example in texts(setting, n)}
    return [found[one.example_id] for one in in_training_order(setting, examples(setting, n))]


def in_training_order(setting: Setting, encoded: Sequence[EncodedExample]) -> list[EncodedExample]:
    """The order in which dppo trains on them in one epoch."""
    from dppo.batches import batches

    steps = math.ceil(len(encoded) / setting.batch_size)
    return [one for batch in batches(encoded, setting.batch_size, steps, SEED) for one in batch]


def examples(setting: Setting, n: int) -> list[EncodedExample]:
    """The same as tokens."""
    return list(encoder_of(setting).encode(texts(setting, n), None).examples)


def with_third(pairs: Sequence[EncodedExample]) -> list[EncodedExample]:
    """The pairs with a third answer as long as the chosen one: its tokens backwards."""
    from dppo.types import EncodedExample, EncodedResponse

    found = []
    for pair in pairs:
        chosen = pair.responses[0]
        third = EncodedResponse(chosen.response_id[::-1], "generated", chosen.token_ids[::-1])
        found.append(EncodedExample(pair.example_id, pair.prompt_id, pair.prompt_ids, (*pair.responses, third)))
    return found
