"""What losses of labelled answers make of the examples: one row a prompt, and answers to other prompts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

from dppo.data.encoding import cut_response
from dppo.errors import UserError
from dppo.types import EncodedExample, EncodedResponse

Row = tuple[int, EncodedResponse]
"""The place of an example, and one of its labelled answers."""


def one_row_per_prompt(examples: Sequence[EncodedExample], seed: int) -> tuple[EncodedExample, ...]:
    """One example for each prompt, with one of its answers, drawn by a hash of ``seed``, prompt and answer."""
    drawn: dict[str, Row] = {}
    for place, response in _rows(examples):
        prompt_id = examples[place].prompt_id
        if prompt_id not in drawn or _draw(seed, prompt_id, response) < _draw(seed, prompt_id, drawn[prompt_id][1]):
            drawn[prompt_id] = place, response
    return tuple(dataclasses.replace(examples[place], responses=(response,)) for place, response in drawn.values())


def with_answers_to_other_prompts(
    examples: Sequence[EncodedExample], max_length: int | None, seed: int
) -> tuple[EncodedExample, ...]:
    """The examples with one response ``mismatched`` for each of their answers: an answer to another prompt.

    Every answer is given away once, to a row of another prompt, in an order drawn by ``seed``; only where one prompt
    has more than half of all rows are answers given twice. Cut so that prompt and answer fit into ``max_length``
    tokens.

    Raises UserError if there is one prompt only.
    """
    rows = list(_rows(examples))
    largest: dict[str, int] = {}
    for place, _ in rows:
        prompt_id = examples[place].prompt_id
        largest[prompt_id] = largest.get(prompt_id, 0) + 1
    if len(largest) < 2:
        raise UserError(
            "loss.z0=kl: needs answers to at least two prompts, the training data have one; "
            "set loss.z0=zero or take more data"
        )
    # The rows of a prompt stand together, so that behind a shift by the longest run stands another prompt.
    order = sorted(rows, key=lambda row: _draw(seed, examples[row[0]].prompt_id) + _draw(seed, "", row[1]))
    shift = max(largest.values())
    received: dict[int, list[EncodedResponse]] = {}
    for number, (place, _) in enumerate(order):
        giver, answer = order[(number + shift) % len(order)]
        step = number + shift
        while examples[giver].prompt_id == examples[place].prompt_id:
            step += 1
            giver, answer = order[step % len(order)]
        received.setdefault(place, []).append(answer)
    return _received(examples, received, max_length)


def with_answers_of_the_row_before(
    examples: Sequence[EncodedExample], batches: Iterable[Sequence[EncodedExample]], max_length: int | None
) -> tuple[EncodedExample, ...]:
    """The examples with the answer of the row before in their batch as ``mismatched``, cyclic, as TRL does.

    ``batches`` are those of the first epoch. The rows of a batch are the first answers of its examples, then the second
    ones and so on, in TRL's order of pairs: so an answer to the same prompt is taken only where two examples share it,
    or one stands alone in its batch.
    """
    places = {example.example_id: place for place, example in enumerate(examples)}
    received: dict[int, list[EncodedResponse]] = {}
    for batch in batches:
        rows = [
            (places[example.example_id], response)
            for turn in range(max(len(example.responses) for example in batch))
            for example in batch
            for response in example.responses[turn : turn + 1]
        ]
        for number, (place, _) in enumerate(rows):
            received.setdefault(place, []).append(rows[number - 1][1])
    return _received(examples, received, max_length)


def _rows(examples: Sequence[EncodedExample]) -> Iterable[Row]:
    for place, example in enumerate(examples):
        for response in example.responses:
            yield place, response


def _received(
    examples: Sequence[EncodedExample], received: dict[int, list[EncodedResponse]], max_length: int | None
) -> tuple[EncodedExample, ...]:
    extended = []
    for place, example in enumerate(examples):
        room = None if max_length is None else max_length - len(example.prompt_ids)
        others = (
            cut_response(dataclasses.replace(answer, role="mismatched", score=None), room) for answer in received[place]
        )
        extended.append(dataclasses.replace(example, responses=(*example.responses, *others)))
    return tuple(extended)


def _draw(seed: int, prompt_id: str, response: EncodedResponse | None = None) -> bytes:
    answer = "" if response is None else f"{response.role}:{response.response_id}"
    return hashlib.sha256(f"{seed}:{prompt_id}:{answer}".encode()).digest()
