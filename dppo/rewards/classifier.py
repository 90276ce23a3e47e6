"""A reward model: any sequence classifier that transformers knows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from dppo.data.encoding import TemplateRefusal, apply_template
from dppo.errors import UserError
from dppo.processes import rank
from dppo.types import Json, Message, Prompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1
KEY = "reward.name_or_path"


@dataclass(frozen=True)
class Classifier:
    """The logit ``output`` of a sequence classifier for a prompt and an answer, unbounded on both sides.

    From a repository of the Hugging Face Hub (``revision``: branch, tag or commit) or a folder in its layout. The
    conversation is written by the model's chat template; models without one read prompt and answer as a pair of
    texts (the turns of a longer prompt one below the other). At most ``max_length`` tokens: longer conversations lose
    their beginning (but the first token), of a pair of texts the longer one loses its end; null is the model's own
    limit. ``tokens_per_batch`` counts padded tokens. ``precision`` bf16 halves the memory of the weights;
    ``quantisation`` makes them 8-bit integers or 4-bit NF4 (all but the output layer, with bitsandbytes), read without
    ever being there in full and spread over all GPUs if ``device`` is auto.
    """

    name_or_path: str
    revision: str
    output: int
    max_length: int | None
    tokens_per_batch: int
    precision: Literal["fp32", "bf16"]
    quantisation: Literal["int8", "nf4"] | None
    device: str

    def __post_init__(self) -> None:
        for key in ("max_length", "tokens_per_batch"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key}={value}: must be at least 1")
        if self.output < 0:
            raise UserError(f"output={self.output}: must be the place of an output, 0 for the first")

    def identity(self) -> dict[str, Json]:
        """The model's commit or content, and what else decides a score."""
        from dppo.models import folder_identity

        return {
            "reward": "classifier",
            "version": VERSION,
            "output": self.output,
            "max_length": self.max_length,
            "precision": self.precision,
            **({} if self.quantisation is None else {"quantisation": self.quantisation}),
            **folder_identity(self.name_or_path, self.revision, KEY),
        }

    @property
    def spread(self) -> bool:
        """Whether the model is on all GPUs, and so in one process of a run."""
        return self.quantisation is not None and self.device == "auto"

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Load the model. Raises UserError if there is none, or it has no such output."""
        if rank() == 0 or not self.spread:
            self._loaded()

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """One logit per answer. Raises UserError if one is not finite."""
        model, tokenizer, device = self._loaded()
        rows = conversation_tokens(tokenizer, prompts, answers, self.max_length)
        found = output_of(model, rows, self.output, self.tokens_per_batch, device)
        return finite(found, f"{KEY}={self.name_or_path}")

    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.device]:
        return _load(self)


def finite(scores: list[float], reward: str) -> list[float]:
    """The scores of a model as they are. Raises UserError, naming ``reward``, if one is not finite."""
    if not all(map(math.isfinite, scores)):
        raise UserError(f"{reward}: gave a score that is not finite; try reward.precision=fp32")
    return scores


def conversation_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], answers: Sequence[str], max_length: int | None
) -> list[list[int]]:
    """Each prompt with its answer as token ids, at most ``max_length`` (null: the model's own limit) of them."""
    limit = max_length or min(tokenizer.model_max_length, 1 << 20)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        if tokenizer.chat_template:
            chat = (*prompt.messages, Message("assistant", answer))
            try:
                text = apply_template(tokenizer, chat, None, for_generation=False)
            except TemplateRefusal as error:
                raise UserError(f"reward: the chat template of its model cannot be used: {error}") from None
            row = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        else:
            before = "\n".join(turn.content for turn in prompt.messages)
            row = list(tokenizer(before, answer, truncation="longest_first", max_length=limit)["input_ids"])
        rows.append(row if len(row) <= limit else row[:1] + row[len(row) - limit + 1 :])
    return rows


def output_of(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], output: int, tokens_per_batch: int, device: torch.device
) -> list[float]:
    """A sequence classifier's logit ``output`` for each row of token ids, in fp32, whatever it is batched with."""
    import torch

    from dppo.batches import padded_batches

    # Decoders find a row's last token by the padding, which must not be a token of the text.
    padding = own = model.config.pad_token_id
    if own is None:
        used = set().union(*rows)
        padding = next(one for one in range(len(used) + 1) if one not in used)
    model.config.pad_token_id = padding
    found = [math.nan] * len(rows)
    for part in padded_batches([len(row) for row in rows], tokens_per_batch):
        width = max(len(rows[place]) for place in part)
        token_ids = torch.full((len(part), width), padding)
        mask = torch.zeros_like(token_ids)
        for line, place in enumerate(part):
            token_ids[line, : len(rows[place])] = torch.tensor(rows[place])
            mask[line, : len(rows[place])] = 1
        with torch.inference_mode():
            logits = model(input_ids=token_ids.to(device), attention_mask=mask.to(device)).logits
        for place, value in zip(part, logits[:, output].float().tolist(), strict=True):
            found[place] = value
    model.config.pad_token_id = own
    return found


def placed(model: PreTrainedModel, precision: Literal["fp32", "bf16"], device: str) -> PreTrainedModel:
    """A model for scoring: in its precision on its device, ``auto`` being a GPU where there is one."""
    import torch

    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    moved: Any = model
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return cast("PreTrainedModel", moved.to(torch.device(automatic if device == "auto" else device), dtype).eval())


@functools.lru_cache(maxsize=1)  # `check` and every call of `score` need the same one
def _load(reward: Classifier) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.device]:
    from dppo.models import load_classifier, load_scorer, model_folder

    name, folder = f"{KEY}={reward.name_or_path}", model_folder(reward.name_or_path, reward.revision, KEY)
    if reward.quantisation is None:
        model, tokenizer = load_classifier(folder, name)
    else:
        model, tokenizer = load_scorer(
            folder,
            name,
            classifier=True,
            precision=reward.precision,
            quantisation=reward.quantisation,
            device=reward.device,
        )
    n_outputs = int(model.config.num_labels or 0)
    if reward.output >= n_outputs:
        raise UserError(f"reward.output={reward.output}: {reward.name_or_path} has {n_outputs} (0 is the first)")
    if reward.quantisation is None:
        model = placed(model, reward.precision, reward.device)
    return model, tokenizer, model.device
