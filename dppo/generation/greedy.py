"""Greedy decoding in length-sorted batches; rows leave the batch when they end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from dppo.batches import padded_batches
from dppo.config import require
from dppo.errors import UserError
from dppo.types import Generation, Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Below this share of unfinished rows the batch and its cache are cut down to them: copying the cache costs about one
# decoding step, so compacting at every single end would cost more than it saves.
_COMPACT_BELOW = 0.75


@dataclass(frozen=True)
class Greedy:
    """The most likely token at every step, for y_gen and for the answers that are compared.

    ``max_new_tokens`` bounds an answer, its end-of-turn token included. ``tokens_per_batch`` bounds rows times
    (prompt + answer) tokens of a batch and changes no text beyond rounding. ``precision`` does change texts and is
    part of the cache key.
    """

    max_new_tokens: int
    tokens_per_batch: int
    precision: Literal["fp32", "bf16"]

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "must be at least 1")
        require(self.tokens_per_batch >= 1, "tokens_per_batch", self.tokens_per_batch, "must be at least 1")

    def identity(self) -> dict[str, Json]:
        return {"decoding": "greedy", "max_new_tokens": self.max_new_tokens, "precision": self.precision}

    @torch.inference_mode()
    def generate(
        self,
        model: PreTrainedModel,
        prompts: Sequence[tuple[str, Sequence[int]]],
        end_ids: frozenset[int],
        decode: Callable[[Sequence[int]], str],
    ) -> Iterator[list[Generation]]:
        """Answer every (prompt_id, token ids), batch by batch; batches come in the order of prompt lengths.

        ``end_ids`` end an answer; ``decode`` turns answer tokens without the end token into text. Raises UserError
        if an answer could grow beyond the model's positions.
        """
        model.eval()
        queue = sorted(prompts, key=lambda prompt: (len(prompt[1]), prompt[0]))
        longest = len(queue[-1][1]) if queue else 0
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and longest + self.max_new_tokens > limit:
            raise UserError(
                f"generation.max_new_tokens={self.max_new_tokens}: the longest prompt has {longest} tokens and the "
                f"model has {limit} positions; choose at most {limit - longest}"
            )
        widths = [len(ids) + self.max_new_tokens for _, ids in queue]
        for places in padded_batches(widths, self.tokens_per_batch):
            batch = [queue[place] for place in places]
            device_type = next(model.parameters()).device.type
            with torch.autocast(device_type, torch.bfloat16, enabled=self.precision == "bf16"):
                answers = _decode_batch(model, [ids for _, ids in batch], end_ids, self.max_new_tokens)
            yield [
                _generation(prompt, answer, end_ids, decode) for (prompt, _), answer in zip(batch, answers, strict=True)
            ]


def _generation(
    prompt_id: str, answer: list[int], end_ids: frozenset[int], decode: Callable[[Sequence[int]], str]
) -> Generation:
    ended = answer[-1] in end_ids
    text = decode(answer[:-1] if ended else answer)
    return Generation(prompt_id, text, tuple(answer), "eos" if ended else "length")


def _decode_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], end_ids: frozenset[int], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of each prompt's answer; every prompt has at least one token."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    width = max(len(prompt) for prompt in prompts)
    # Padded on the left, so that the last column predicts for every row.
    token_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        token_ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    token_ids, mask = token_ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the answer that each row of the batch writes
    alive = [True] * len(prompts)
    cache = DynamicCache(config=model.config)
    ends = torch.tensor(sorted(end_ids), dtype=torch.int64, device=device)
    for step in range(max_new_tokens):
        output = model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = output.logits[:, -1].float().argmax(-1)
        ended = torch.isin(chosen, ends).tolist()
        for place, token in enumerate(chosen.tolist()):
            if alive[place]:
                answers[rows[place]].append(token)
                alive[place] = not ended[place]
        if not any(alive) or step == max_new_tokens - 1:
            break
        token_ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if sum(alive) < _COMPACT_BELOW * len(rows):
            keep = torch.tensor([place for place, going in enumerate(alive) if going], device=device)
            cache.batch_select_indices(keep)
            token_ids, positions, mask = token_ids[keep], positions[keep], mask[keep]
            rows = [rows[place] for place in keep.tolist()]
            alive = [True] * len(rows)
    return answers
