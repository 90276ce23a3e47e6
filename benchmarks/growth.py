"""How a training step's cost grows: with the prompt, with the answers' length, with their number."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from benchmarks.rows import Row, alternate
from benchmarks.setting import Setting, experiment

if TYPE_CHECKING:
    from dppo.types import EncodedExample

_N_EXAMPLES = 2
_USUAL = {"prompt": 64, "answer": 64, "answers": 2}
_SWEEPS = {"prompt": (16, 64, 256), "answer": (16, 64, 256), "answers": (1, 2, 3, 5)}


def growth(setting: Setting, rounds: int) -> list[Row]:
    """Forward and backward pass of two examples of random tokens, packed against padded, one size changed at a time."""
    rows = []
    for swept, values in _SWEEPS.items():
        for value in values:
            sizes = {**_USUAL, swept: value}
            name = f"prompt {sizes['prompt']}, {sizes['answers']} x {sizes['answer']}"
            packed, padded = (_pass(setting, sizes, packing) for packing in ("packed", "padded"))
            rows.append(alternate(name, ("packed", packed), ("padded", padded), rounds))
    return rows


def _pass(setting: Setting, sizes: dict[str, int], packing: Literal["packed", "padded"]) -> Callable[[], object]:
    from dppo.batches import collate
    from dppo.logps import ResponseScorer

    model = experiment(setting).model.load_model(0)
    scorer = ResponseScorer(model, packing)
    draw = random.Random(0)
    batch = collate([_example(draw, sizes, model.config.vocab_size) for _ in range(_N_EXAMPLES)])

    def run() -> None:
        scorer.zero_grad()
        scorer(batch).sum.sum().backward()

    return run


def _example(draw: random.Random, sizes: dict[str, int], vocabulary: int) -> EncodedExample:
    from dppo.types import EncodedExample, EncodedResponse

    def ids(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(n))

    answers = tuple(EncodedResponse("", "ranked", ids(sizes["answer"])) for _ in range(sizes["answers"]))
    return EncodedExample("", "", ids(sizes["prompt"]), answers)
