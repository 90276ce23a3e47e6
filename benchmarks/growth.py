"""How a training step's cost grows: with the prompt, with the answers' length, with their number."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row, alternate
from benchmarks.setting import SEED, Setting, experiment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dppo.types import EncodedExample

_USUAL = {"prompt": 96, "answer": 96, "answers": 2}
# At most 480 tokens in a sequence and 864 in an example: a round on SmolLM2 with one example takes about a minute.
_SWEEPS = {"prompt": (24, 96, 384), "answer": (24, 96, 384), "answers": (1, 2, 4, 8)}


def growth(setting: Setting, rounds: int) -> list[Row]:
    """Forward and backward pass of a step of random tokens, packed against padded, one size changed at a time.

    The note has how many tokens each computes, and how many times the packed time of the usual sizes a row takes.
    """
    model = experiment(setting).model.load_model(0)
    distinct = [tuple({**_USUAL, swept: value}.values()) for swept, values in _SWEEPS.items() for value in values]
    found: dict[tuple[int, ...], Row] = {}
    for prompt, answer, answers in dict.fromkeys(distinct):
        draw = random.Random(SEED)
        examples = [_example(draw, prompt, answer, answers, model.config.vocab_size) for _ in range(setting.batch_size)]
        packed, padded = (_pass(model, examples, packing) for packing in ("packed", "padded"))
        row = alternate(f"prompt {prompt}, {answers} x {answer}", ("packed", packed), ("padded", padded), rounds)
        n_packed, n_padded = prompt + answers * answer, answers * (prompt + answer)
        found[prompt, answer, answers] = row.noted(f"{n_packed} and {n_padded} tokens an example")
    usual = found[tuple(_USUAL.values())].first_median
    rows = []
    for swept, values in _SWEEPS.items():
        for value in values:
            row = found[tuple({**_USUAL, swept: value}.values())]
            rows.append(row.noted(f"{row.first_median / usual:.2f} of the usual step"))
    return rows


def _pass(model: PreTrainedModel, examples: Sequence[EncodedExample], packing: Any) -> Callable[[], object]:
    from dppo.batches import collate
    from dppo.logps import ResponseScorer

    scorer = ResponseScorer(model, packing)
    batch = collate(examples)

    def run() -> None:
        scorer.zero_grad()
        scorer(batch).sum.sum().backward()

    return run


def _example(draw: random.Random, prompt: int, answer: int, n_answers: int, vocabulary: int) -> EncodedExample:
    from dppo.types import EncodedExample, EncodedResponse

    def ids(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(n))

    answers = tuple(EncodedResponse("", "ranked", ids(answer)) for _ in range(n_answers))
    return EncodedExample("", "", ids(prompt), answers)
