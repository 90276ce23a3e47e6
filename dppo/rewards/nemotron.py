"""Llama-3.1-Nemotron-70B-Reward as a local model, and others that say their reward the same way."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dppo.config import require
from dppo.errors import UserError
from dppo.processes import rank
from dppo.rewards.classifier import KEY, conversation_tokens, finite
from dppo.types import Json, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1


@dataclass(frozen=True)
class Nemotron:
    """The reward that a causal LM gives as the logit of token 0 behind the conversation, unbounded on both sides.

    So the model card of nvidia/Llama-3.1-Nemotron-70B-Reward-HF reads it (HelpSteer2-Preference, Wang et al. 2024): the
    chat template writes the prompt and the answer as the last turn, without a generation prompt, and the score is the
    first entry of the logits of the token that would come next. From a repository of the Hugging Face Hub
    (``revision``: branch, tag or commit) or a folder in its layout. At most ``max_length`` tokens: longer conversations
    lose their beginning, but the first token. ``tokens_per_batch`` counts padded tokens. The weights are read straight
    into ``precision`` or ``quantisation``, over all GPUs if ``device`` is auto.
    """

    name_or_path: str
    revision: str
    max_length: int
    tokens_per_batch: int
    precision: Literal["fp32", "bf16"]
    quantisation: Literal["int8", "nf4"] | None
    device: str

    def __post_init__(self) -> None:
        for key in ("max_length", "tokens_per_batch"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")

    def identity(self) -> dict[str, Json]:
        """The model's commit or content, and what else decides a score."""
        from dppo.models import folder_identity

        return {
            "reward": "nemotron",
            "version": VERSION,
            "max_length": self.max_length,
            "precision": self.precision,
            "quantisation": self.quantisation,
            **folder_identity(self.name_or_path, self.revision, KEY),
        }

    @property
    def spread(self) -> bool:
        """Whether the model is on all GPUs, and so in one process of a run."""
        return self.device == "auto"

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Load the model. Raises UserError if there is none, or it has no chat template."""
        if rank() == 0 or not self.spread:
            _load(self)

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """One logit per answer. Raises UserError if one is not finite."""
        import torch

        from dppo.batches import padded_batches

        model, tokenizer = _load(self)
        rows = conversation_tokens(tokenizer, prompts, answers, self.max_length)
        found = [math.nan] * len(rows)
        for part in padded_batches([len(row) for row in rows], self.tokens_per_batch):
            width = max(len(rows[place]) for place in part)
            token_ids = torch.zeros((len(part), width), dtype=torch.int64)
            mask = torch.zeros_like(token_ids)
            # Padded on the left, all rows end in the same place: the head is needed there only.
            for line, place in enumerate(part):
                token_ids[line, width - len(rows[place]) :] = torch.tensor(rows[place])
                mask[line, width - len(rows[place]) :] = 1
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.inference_mode():
                logits = model(
                    input_ids=token_ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    position_ids=positions.to(model.device),
                    logits_to_keep=1,
                    use_cache=False,
                ).logits
            for place, value in zip(part, logits[:, -1, 0].float().tolist(), strict=True):
                found[place] = value
        return finite(found, f"{KEY}={self.name_or_path}")


@functools.lru_cache(maxsize=1)  # `check` and every call of `score` need the same one
def _load(reward: Nemotron) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from dppo.models import load_scorer, model_folder

    name, folder = f"{KEY}={reward.name_or_path}", model_folder(reward.name_or_path, reward.revision, KEY)
    model, tokenizer = load_scorer(
        folder,
        name,
        classifier=False,
        precision=reward.precision,
        quantisation=reward.quantisation,
        device=reward.device,
    )
    if not tokenizer.chat_template:
        raise UserError(f"{name}: its tokenizer has no chat template, by which it would read a conversation")
    return model, tokenizer
