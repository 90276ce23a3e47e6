"""Sampled answers: temperature and top-p, with a random stream of its own for every answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dppo.config import require
from dppo.data.draws import stream
from dppo.generation.decoding import Prompts, Several, write_each
from dppo.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1


@dataclass(frozen=True)
class Sampled(Several):
    """Independent answers, each token drawn from the model's distribution.

    Of the distribution at ``temperature`` only the smallest set of most likely tokens whose probabilities sum to
    at least ``top_p`` is kept (1: all). What an answer draws depends on ``seed``, prompt_id and its number among the
    prompt's answers alone: other prompts, their order, the batch and an interruption change nothing beyond rounding.
    """

    top_p: float
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be > 0 and <= 1 (1: all tokens)")
        require(self.seed >= 0, "seed", self.seed, "must be >= 0")

    def identity(self) -> dict[str, Json]:
        return {
            "decoding": "sampled",
            "version": VERSION,
            "n_answers": self.n_answers,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "max_new_tokens": self.max_new_tokens,
            "precision": self.precision,
        }

    def write(self, model: PreTrainedModel, batch: Prompts, end_ids: frozenset[int]) -> list[list[int]]:
        streams = [
            stream("sampled answer", self.seed, prompt_id, number)
            for prompt_id, _ in batch
            for number in range(self.n_answers)
        ]

        def choose(logits: Tensor, owners: Sequence[int], step: int) -> Tensor:
            shares = torch.tensor([streams[owner].random() for owner in owners], dtype=torch.float64)
            return drawn(logits, shares, self.temperature, self.top_p)

        prompts = [ids for _, ids in batch]
        return write_each(model, prompts, self.n_answers, choose, end_ids, self.max_new_tokens)


def drawn(logits: Tensor, shares: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token (rows,) at which the cumulative distribution of each row passes its share of [0, 1).

    ``logits`` (rows, vocabulary), ``shares`` (rows,). The tokens are added up in the order of their ids: sorted by
    probability, two equally likely ones would change places with the rounding of a batch.
    """
    probabilities = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        # A token stays if those before it do not reach top_p without it; so the first one always stays.
        stays = ordered.cumsum(-1) - ordered < top_p
        probabilities = probabilities * torch.zeros_like(stays).scatter(-1, tokens, stays)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # mps has no fp64
    reached = probabilities.to(exact).cumsum(-1)
    total = reached[:, -1:].contiguous()
    wanted = shares.to(logits.device, exact)[:, None] * total
    # Equal entries are tokens without probability: the first entry above the share is never one of them. Should
    # rounding lift a share to the end, the last token with probability is meant.
    place = torch.searchsorted(reached, wanted, right=True)
    last = torch.searchsorted(reached, total, right=False)
    return torch.minimum(place, last)[:, 0]
