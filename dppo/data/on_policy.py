"""Preferences from the model's own answers: which prompts, how answers are made, and how a ranking becomes examples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dppo.data import CountedDataset, Dataset, LabelledDataset, RankedDataset, chats_identity, ids
from dppo.data.rows import Reading
from dppo.errors import UserError
from dppo.generation import Several
from dppo.rewards import PairwiseReward, Reward
from dppo.types import Json, PreferenceExample, Prompt, Response, Split

VERSION = 1


@dataclass(frozen=True)
class OnPolicy:
    """Another data set whose training preferences are made anew by every run, from a model's answers.

    Chats, prompts, and all rows of validation and test are those of ``source``, and so is the identity: the SFT model
    is the one that the source alone has. ``answers`` says how the model answers the training prompts, ``ranker`` what
    ranks its answers (null: the reward that evaluates the run). ``mix_in`` ranks the source's own answers to the same
    prompts with them. In each of the ``rounds`` all phases train, on answers of the policy that the round starts from.
    """

    source: Dataset
    answers: Several
    ranker: Reward | PairwiseReward | None
    mix_in: bool
    rounds: int

    def __post_init__(self) -> None:
        if isinstance(self.source, OnPolicy):
            raise UserError("source=on_policy: the prompts must come from another data set")
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds}: must be at least 1")
        if self.answers.n_answers < 2 and not self.mix_in:
            raise UserError(
                f"answers.n_answers={self.answers.n_answers}: one answer cannot be ranked; take at least 2, or "
                "mix_in=true"
            )

    def identity(self) -> dict[str, Json]:
        """What determines everything but the training preferences; those are ``preferences_identity``."""
        return self.source.identity()

    def chats_identity(self) -> dict[str, Json]:
        """What determines the demonstrations: those of the source."""
        return chats_identity(self.source)

    def readings(self, of: Literal["preferences", "chats"]) -> tuple[Reading, ...]:
        """What became of the source's rows, where it reads any."""
        return self.source.readings(of) if isinstance(self.source, CountedDataset) else ()

    def preferences_identity(self) -> dict[str, Json]:
        """What determines the training preferences, besides the answers and the scores that they are made from."""
        return {"dataset": "on_policy", "version": VERSION, "source": self.source.identity(), "mix_in": self.mix_in}

    def chats(self, split: Split) -> list[PreferenceExample]:
        """The source's demonstrations."""
        return self.source.chats(split)

    def pairs(self, split: Split) -> list[PreferenceExample]:
        """The source's pairs."""
        return self.source.pairs(split)

    def prompts(self, split: Split) -> list[Prompt]:
        """The source's prompts; those of ``train`` are answered by the model."""
        return self.source.prompts(split)

    def own_answers(self, split: Split) -> dict[str, list[str]]:
        """The source's answers by prompt_id, each once, in the order of its rows."""
        if isinstance(self.source, RankedDataset):
            rows = self.source.ranked(split)
        elif isinstance(self.source, LabelledDataset):
            rows = self.source.labelled(split)
        else:
            rows = self.source.pairs(split)
        found: dict[str, list[str]] = {}
        for row in rows:
            texts = [response.text for response in row.responses]
            found[row.prompt.prompt_id] = unique([*found.get(row.prompt.prompt_id, []), *texts])
        return found


def unique(texts: Sequence[str]) -> list[str]:
    """The texts, each once, in the order in which they come first."""
    return list(dict.fromkeys(texts))


def contests(n: int) -> list[tuple[int, int]]:
    """The places of the answers in each contest of a round-robin among ``n``: everyone meets everyone once."""
    return list(itertools.combinations(range(n), 2))


def shares_won(n: int, verdicts: Sequence[float]) -> list[float]:
    """The share of its contests that each of ``n`` answers wins; a tie is half a win. One answer has no contest: 0.

    ``verdicts`` are those of ``contests(n)``: 1 if the first is better, 0 if the second is, 1/2 for a tie.
    """
    won = [0.0] * n
    for (first, second), verdict in zip(contests(n), verdicts, strict=True):
        won[first] += verdict
        won[second] += 1 - verdict
    return [wins / max(1, n - 1) for wins in won]


def ranked_group(prompt: Prompt, texts: Sequence[str], scores: Sequence[float]) -> PreferenceExample:
    """All answers to a prompt with their scores, in role ``ranked``."""
    responses = tuple(Response("ranked", text, score) for text, score in zip(texts, scores, strict=True))
    return PreferenceExample(ids.example_id(prompt, responses), prompt, responses)


def best_and_worst(group: PreferenceExample) -> PreferenceExample:
    """The pair of the best and the worst answer of a group, the first ones of equals."""
    best = max(group.responses, key=_score)
    worst = min(group.responses, key=_score)
    pair = (Response("chosen", best.text, best.score), Response("rejected", worst.text, worst.score))
    return PreferenceExample(ids.example_id(group.prompt, pair), group.prompt, pair)


def _score(response: Response) -> float:
    assert response.score is not None
    return response.score
