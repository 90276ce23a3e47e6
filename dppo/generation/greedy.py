"""Greedy decoding: the answer that a model gives every time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dppo.generation.decoding import Decoding, Prompts, write_each
from dppo.types import Json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Greedy(Decoding):
    """The most likely token at every step, for y_gen and for the answers that are compared."""

    group: ClassVar[str] = "generation"

    @property
    def per_prompt(self) -> int:
        return 1

    def check(self, device: torch.device) -> None:
        """Raise UserError if no answers can be made on this device; these can be made on all."""

    def identity(self) -> dict[str, Json]:
        return {"decoding": "greedy", "max_new_tokens": self.max_new_tokens, "precision": self.precision}

    def write(self, model: PreTrainedModel, batch: Prompts, end_ids: frozenset[int]) -> list[list[int]]:
        prompts = [ids for _, ids in batch]
        return write_each(
            model, prompts, 1, lambda logits, owners, step: logits.argmax(-1), end_ids, self.max_new_tokens
        )
