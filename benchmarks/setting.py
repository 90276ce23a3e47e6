"""What is measured on: a model, and real or made-up pairs, as texts and as tokens."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dppo.data.encoding import ChatEncoder
    from dppo.types import EncodedExample, PreferenceExample

BATCH_SIZE = 4
SEED = 0
_WORDS = "the of to and a in is it you that he was for on are with as his they be at one have this"


@dataclass(frozen=True)
class Setting:
    """What is measured on: an option of the group model, a folder of pairs in UltraFeedback's layout (None: made up),
    and the most tokens of a prompt and its longer answer.
    """

    model: str
    pairs: Path | None
    max_length: int
    cache_dir: str

    @functools.cached_property
    def words(self) -> str:
        """The setting in a table."""
        where = "made-up pairs" if self.pairs is None else self.pairs.name
        return f"{where}, at most {self.max_length} tokens"


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
    """The first ``n`` pairs of which prompt and longer answer have at most ``max_length`` tokens."""
    drawn = _made_up(16 * n) if setting.pairs is None else experiment(setting).dataset.pairs("train")
    encoder = encoder_of(setting)
    whole = encoder.encode(drawn[: 16 * n], None).examples
    short = {
        one.example_id
        for one in whole
        if len(one.prompt_ids) + max(len(answer.token_ids) for answer in one.responses) <= setting.max_length
    }
    found = [example for example in drawn if example.example_id in short][:n]
    if len(found) < n:
        raise SystemExit(f"{setting.words}: {len(found)} such pairs, {n} are needed; raise --max-length")
    return found


def _made_up(n: int) -> list[PreferenceExample]:
    """Pairs of words, with prompts of 5 to 30 words and answers of 5 to 60, balanced between the two."""
    from dppo.data.ids import example_id, prompt_id
    from dppo.types import Message, PreferenceExample, Prompt, Response

    draw = random.Random(SEED)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choice(_WORDS.split()) for _ in range(draw.randint(least, most)))

    found = []
    for _ in range(n):
        messages = (Message("user", text(5, 30)),)
        prompt = Prompt(prompt_id(messages), messages)
        answers = (Response("chosen", text(5, 60)), Response("rejected", text(5, 60)))
        found.append(PreferenceExample(example_id(prompt, answers), prompt, answers))
    return found


def in_order(setting: Setting, n: int) -> list[PreferenceExample]:
    """``n`` pairs in the order in which dppo trains on them in one epoch."""
    from dppo.batches import batches

    found = {example.example_id: example for example in texts(setting, n)}
    encoded = examples(setting, n)
    ordered = (one for batch in batches(encoded, BATCH_SIZE, math.ceil(n / BATCH_SIZE), SEED) for one in batch)
    return [found[one.example_id] for one in ordered]


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
