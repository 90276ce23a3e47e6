"""Which examples make an optimiser batch, how it is cut, and how a cut is laid out for the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dppo.types import Batch, EncodedExample, Role


def batches(
    examples: Sequence[EncodedExample], batch_size: int, steps: int, seed: int
) -> Iterator[list[EncodedExample]]:
    """``steps`` optimiser batches, epoch after epoch, in an order that depends on seed and example ids only.

    The last batch of an epoch may be smaller. Raises ValueError if there are no examples.
    """
    if not examples:
        raise ValueError("there are no examples to train on")
    done, epoch = 0, 0
    while done < steps:
        order = sorted(examples, key=lambda example: _rank(f"{seed}:{epoch}:{example.example_id}"))
        for start in range(0, len(order), batch_size):
            if done == steps:
                return
            yield order[start : start + batch_size]
            done += 1
        epoch += 1


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def micro_batches(examples: Sequence[EncodedExample], budget: int) -> list[list[EncodedExample]]:
    """Cut an optimiser batch into micro-batches of similar length and at most ``budget`` tokens.

    An example above the budget stands alone.
    """
    parts: list[list[EncodedExample]] = []
    room = 0
    for example in sorted(examples, key=lambda example: (example.n_tokens, example.example_id)):
        if not parts or example.n_tokens > room:
            parts.append([])
            room = budget
        parts[-1].append(example)
        room -= example.n_tokens
    return parts


def padded_batches(widths: Sequence[int], budget: int) -> list[list[int]]:
    """Places of rows of these widths in batches, the narrow ones first, of at most ``budget`` tokens with padding.

    A row above the budget stands alone.
    """
    parts: list[list[int]] = []
    for place in sorted(range(len(widths)), key=widths.__getitem__):
        if not parts or (len(parts[-1]) + 1) * widths[place] > budget:
            parts.append([])
        parts[-1].append(place)
    return parts


def collate(examples: Sequence[EncodedExample]) -> Batch:
    """Lay examples out flat: prompt once, then its responses, positions restarting at the prompt's end."""
    token_ids: list[int] = []
    positions: list[int] = []
    predict_from: list[int] = []
    targets: list[int] = []
    prompt_start, prompt_length, response_start, lengths, owner = [], [], [], [], []
    roles: list[Role] = []
    keys: list[tuple[str, str]] = []
    scores: list[float] = []
    shared: list[int] = []
    equal: list[bool] = []
    for place, example in enumerate(examples):
        n_prompt = len(example.prompt_ids)
        if n_prompt == 0:
            raise ValueError(f"example {example.example_id} has an empty prompt")
        prompt_start.append(len(token_ids))
        prompt_length.append(n_prompt)
        token_ids += example.prompt_ids
        positions += range(n_prompt)
        last_of_prompt = len(token_ids) - 1
        for response in example.responses:
            start, n_tokens = len(token_ids), len(response.token_ids)
            if n_tokens == 0:
                raise ValueError(f"example {example.example_id} has an empty {response.role} response")
            response_start.append(start)
            lengths.append(n_tokens)
            owner.append(place)
            roles.append(response.role)
            keys.append((example.prompt_id, response.response_id))
            scores.append(float("nan") if response.score is None else response.score)
            token_ids += response.token_ids
            positions += range(n_prompt, n_prompt + n_tokens)
            predict_from += [last_of_prompt, *range(start, start + n_tokens - 1)]
            targets += response.token_ids
        chosen, generated = example.response("chosen"), example.response("generated")
        prefix = 0
        if chosen is not None and generated is not None:
            prefix = shared_prefix(chosen.token_ids, generated.token_ids)
        shared.append(prefix)
        equal.append(chosen is not None and generated is not None and chosen.token_ids == generated.token_ids)

    def whole(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return Batch(
        token_ids=whole(token_ids),
        positions=whole(positions),
        prompt_start=whole(prompt_start),
        prompt_length=whole(prompt_length),
        response_start=whole(response_start),
        lengths=whole(lengths),
        example=whole(owner),
        roles=tuple(roles),
        predict_from=whole(predict_from),
        targets=whole(targets),
        example_ids=tuple(example.example_id for example in examples),
        response_keys=tuple(keys),
        scores=torch.tensor(scores, dtype=torch.float32),
        shared_prefix=whole(shared),
        equal_to_chosen=torch.tensor(equal, dtype=torch.bool),
    )


def shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two answers have in common."""
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length
