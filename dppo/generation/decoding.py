"""What all ways of decoding share: batches sorted by length, one step of the model, rows that leave when they end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from dppo.batches import padded_batches
from dppo.config import require
from dppo.errors import UserError
from dppo.generation.weights import linear_weights_in_bf16, linear_weights_packed
from dppo.types import Generation, Json

if TYPE_CHECKING:
    from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

# Below this share of unfinished rows the batch and its cache are cut down to them: copying the cache costs about one
# decoding step, so compacting at every single end would cost more than it saves.
COMPACT_BELOW = 0.75

# Prompts are read in parts of similar length: a part grows to so many tokens whatever padding that takes, because
# smaller ones leave the processor idle, and beyond that while at most a tenth of it is padding.
_TOKENS_READ_AT_ONCE = {"cpu": 256}
_TOKENS_READ_AT_ONCE_ELSEWHERE = 8192
_MOST_PADDING = 0.1

Prompts = Sequence[tuple[str, Sequence[int]]]
"""(prompt_id, token ids) of each prompt of a batch; every prompt has at least one token."""
Choose = Callable[[Tensor, Sequence[int], int], Tensor]
"""(logits (rows, vocabulary) fp32, the answer that each row writes, step) -> the next token (rows,) of each."""


@dataclass(frozen=True)
class Decoding(ABC):
    """How a model answers.

    ``max_new_tokens`` bounds an answer, its end-of-turn token included. ``tokens_per_batch`` bounds rows times
    (prompt + answer) tokens of a batch and changes no text beyond rounding. ``precision`` does change texts and is
    part of the cache key.
    """

    group: ClassVar[str]  # the configuration's group, for messages
    max_new_tokens: int
    tokens_per_batch: int
    precision: Literal["fp32", "bf16"]

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "must be at least 1")
        require(self.tokens_per_batch >= 1, "tokens_per_batch", self.tokens_per_batch, "must be at least 1")

    @property
    @abstractmethod
    def per_prompt(self) -> int:
        """How many answers a prompt gets; equal ones among them count."""

    @abstractmethod
    def identity(self) -> dict[str, Json]:
        """Everything that decides the texts; part of cache fingerprints."""

    @abstractmethod
    def write(self, model: PreTrainedModel, batch: Prompts, end_ids: frozenset[int]) -> list[list[int]]:
        """Token ids of the answers to a batch: ``per_prompt`` for the first, then those to the second."""

    @torch.inference_mode()
    def generate(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        end_ids: frozenset[int],
        decode: Callable[[Sequence[int]], str],
    ) -> Iterator[list[Generation]]:
        """Answer every (prompt_id, token ids), batch by batch; batches come in the order of prompt lengths.

        The answers to a prompt stand together. ``end_ids`` end an answer; ``decode`` turns answer tokens without the
        end token into text. Raises UserError if an answer could grow beyond the model's positions.
        """
        model.eval()
        queue = sorted(prompts, key=lambda prompt: (len(prompt[1]), prompt[0]))
        longest = len(queue[-1][1]) if queue else 0
        check_positions(self.group, self.max_new_tokens, longest, model.config)
        widths = [self.per_prompt * (len(ids) + self.max_new_tokens) for _, ids in queue]
        for places in padded_batches(widths, self.tokens_per_batch):
            batch = [queue[place] for place in places]
            device_type = next(model.parameters()).device.type
            with self._weights(model), torch.autocast(device_type, torch.bfloat16, enabled=self.precision == "bf16"):
                answers = self.write(model, batch, end_ids)
            asked = [prompt_id for prompt_id, _ in batch for _ in range(self.per_prompt)]
            yield [
                generation_of(prompt_id, answer, end_ids, decode)
                for prompt_id, answer in zip(asked, answers, strict=True)
            ]

    def _weights(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return linear_weights_in_bf16(model) if self.precision == "bf16" else linear_weights_packed(model)


@dataclass(frozen=True)
class Several(Decoding):
    """``n_answers`` answers a prompt. Logits are divided by ``temperature`` first: below 1 likely tokens gain."""

    group: ClassVar[str] = "dataset.answers"
    n_answers: int
    temperature: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.n_answers >= 1, "n_answers", self.n_answers, "must be at least 1")
        require(self.temperature > 0, "temperature", self.temperature, "must be > 0")

    @property
    def per_prompt(self) -> int:
        return self.n_answers


def check_positions(group: str, max_new_tokens: int, longest: int, config: PretrainedConfig) -> None:
    """Raise UserError if an answer behind a prompt of ``longest`` tokens could grow beyond the model's positions."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest + max_new_tokens > limit:
        raise UserError(
            f"{group}.max_new_tokens={max_new_tokens}: the longest prompt has {longest} tokens and the model has "
            f"{limit} positions; choose at most {limit - longest}"
        )


def generation_of(
    prompt_id: str, answer: list[int], end_ids: frozenset[int], decode: Callable[[Sequence[int]], str]
) -> Generation:
    """An answer from its tokens, the one that ended it included."""
    ended = answer[-1] in end_ids
    text = decode(answer[:-1] if ended else answer)
    return Generation(prompt_id, text, tuple(answer), "eos" if ended else "length")


class Rows:
    """The rows of a batch, each a prompt and what was written behind it, with the cache of keys and values."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> None:
        from dppo.generation.kv_cache import roomy_cache

        self._model = model
        self.device = next(model.parameters()).device
        # Padded on the left, so that the last column predicts for every row.
        self._token_ids, self._mask = (part.to(self.device) for part in _padded_on_the_left(prompts))
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        self._cache = roomy_cache(model.config)
        self._unread = [len(prompt) for prompt in prompts]

    def logits(self) -> Tensor:
        """(rows, vocabulary) fp32, of the token that follows in each row: one pass over what is not in the cache."""
        if self._unread:
            return self._read_prompts()
        return self._pass(self._token_ids, self._mask, self._positions, self._cache)

    def _read_prompts(self) -> Tensor:
        """Prompts of similar length together, so that few of the tokens that are computed are padding."""
        from dppo.generation.kv_cache import can_be_joined, joined, roomy_cache

        lengths, self._unread = self._unread, []
        parts = parts_of_similar_length(lengths, self.device.type)
        if len(parts) == 1 or not can_be_joined(self._cache):
            return self._pass(self._token_ids, self._mask, self._positions, self._cache)
        caches, found = [], []
        for part in parts:
            # Within a part the columns on the left hold padding only.
            own = slice(-max(lengths[place] for place in part), None)
            taken = torch.tensor(part, device=self.device)
            caches.append(roomy_cache(self._model.config))
            token_ids, mask, positions = (whole[taken, own] for whole in (self._token_ids, self._mask, self._positions))
            found.append(self._pass(token_ids, mask, positions, caches[-1]))
        places = torch.tensor([place for part in parts for place in part], device=self.device)
        self._cache = joined(caches, places)
        return torch.cat(found)[places.argsort()]

    def _pass(self, token_ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        output = self._model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def add(self, tokens: Tensor) -> None:
        """Write a token (rows,) into each row."""
        self._token_ids, self._positions = tokens[:, None], self._positions[:, -1:] + 1
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)

    def keep(self, places: Tensor) -> None:
        """Go on with the rows at ``places``, in this order; a place that is named twice becomes two rows."""
        self._cache.batch_select_indices(places)
        self._token_ids, self._positions = self._token_ids[places], self._positions[places]
        self._mask = self._mask[places]


def _padded_on_the_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask (rows, longest prompt)."""
    width = max(len(prompt) for prompt in prompts)
    token_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(token_ids)
    for row, prompt in enumerate(prompts):
        token_ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    return token_ids, mask


def parts_of_similar_length(lengths: Sequence[int], device: str) -> list[list[int]]:
    """The places of prompts of these lengths, short ones first, in the parts in which they are read."""
    enough = _TOKENS_READ_AT_ONCE.get(device, _TOKENS_READ_AT_ONCE_ELSEWHERE)
    parts: list[list[int]] = []
    n_tokens = 0  # of the last part, without padding
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        n_tokens += lengths[place]
        padded = lengths[place] * (len(parts[-1]) + 1) if parts else 0
        if not parts or (padded > enough and n_tokens < (1 - _MOST_PADDING) * padded):
            parts.append([])
            n_tokens = lengths[place]
        parts[-1].append(place)
    return parts


def write_each(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    n_each: int,
    choose: Choose,
    end_ids: frozenset[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Token ids of ``n_each`` answers a prompt that know nothing of one another; a prompt is computed once.

    The answers of the first prompt come first; their places are what ``choose`` is told.
    """
    rows = Rows(model, prompts)
    logits = rows.logits()
    writing = [place for place in range(len(prompts)) for _ in range(n_each)]
    if n_each > 1:
        places = torch.tensor(writing, device=rows.device)
        rows.keep(places)
        logits = logits[places]
    answers: list[list[int]] = [[] for _ in writing]
    owners = list(range(len(answers)))  # the answer that each row of the batch writes
    alive = [True] * len(owners)
    ends = torch.tensor(sorted(end_ids), dtype=torch.int64, device=rows.device)
    for step in range(max_new_tokens):
        chosen = choose(logits, owners, step)
        ended = torch.isin(chosen, ends).tolist()
        for place, token in enumerate(chosen.tolist()):
            if alive[place]:
                answers[owners[place]].append(token)
                alive[place] = not ended[place]
        if not any(alive) or step == max_new_tokens - 1:
            break
        rows.add(chosen)
        if sum(alive) < COMPACT_BELOW * len(owners):
            going = [place for place, goes_on in enumerate(alive) if goes_on]
            rows.keep(torch.tensor(going, device=rows.device))
            owners = [owners[place] for place in going]
            alive = [True] * len(owners)
        logits = rows.logits()
    return answers
