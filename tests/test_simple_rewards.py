"""The rewards that need no model: sentiment and length."""

from __future__ import annotations

import importlib.util
import json

import pytest

from dppo.errors import UserError
from dppo.rewards import Reward
from dppo.rewards.length import Length
from dppo.rewards.sentiment import Sentiment
from dppo.types import Message, Prompt

PROMPT = Prompt("id", (Message("user", "I hate this terrible day."),))


def test_sentiment_rates_the_answer_and_not_the_prompt() -> None:
    reward = Sentiment()
    assert isinstance(reward, Reward)
    answers = ["What a wonderful, lovely day!", "A day has 24 hours.", "What a horrible, awful day!", ""]
    reward.check([PROMPT])
    good, neutral, bad, empty = reward.score([PROMPT] * 4, answers)
    assert (neutral, empty) == (0.0, 0.0)
    # Word ratings of the lexicon: wonderful 2.7, lovely 2.8; "!" adds 0.292; x / sqrt(x^2 + 15).
    x = 2.7 + 2.8 + 0.292
    assert good == pytest.approx(x / (x * x + 15) ** 0.5, abs=1e-4)
    assert bad < -0.5


def test_sentiment_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reward = Sentiment()
    with pytest.raises(UserError, match=r"reward=sentiment: .*pip install 'dppo\[sentiment\]'"):
        reward.check([PROMPT])
    with pytest.raises(UserError):
        reward.identity()


def test_length_counts_characters_or_words() -> None:
    answers = ["two  words\n", "", "née"]
    characters, words = Length("characters"), Length("words")
    assert isinstance(words, Reward)
    characters.check([PROMPT])
    assert characters.score([PROMPT] * 3, answers) == [11.0, 0.0, 3.0]
    assert words.score([PROMPT] * 3, answers) == [2.0, 0.0, 1.0]
    assert characters.identity() != words.identity()


def test_identities_are_json() -> None:
    for reward in (Sentiment(), Length("words")):
        assert json.loads(json.dumps(reward.identity())) == reward.identity()
