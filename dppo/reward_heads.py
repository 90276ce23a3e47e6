"""A causal LM with a scalar head: the reward of an answer, read at its last token.

The head is one vector in fp32, without a bias, which no difference of rewards would show. While it is trained the
model keeps its LM head, so that ``RewardScorer`` finds its way of computing as ``ResponseScorer`` does; what is saved
is the sequence classifier that transformers has for this architecture.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from dppo.errors import UserError
from dppo.logps import ResponseScorer
from dppo.types import Batch, ResponseRewards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEAD = "reward_head"


class RewardScorer(ResponseScorer):
    """A model that has a head (``add_head``) and returns one reward for every response of a ``Batch``."""

    def forward(self, batch: Batch) -> ResponseRewards:
        """Rewards (R,) in fp32 for a batch on the model's device."""
        inputs = self._inputs(batch)
        if self.packing == "padded":
            row = torch.arange(len(batch.lengths), device=batch.lengths.device)
            place = batch.prompt_length[batch.example] + batch.lengths - 1
        else:
            place = batch.response_start + batch.lengths - 1
            row = torch.zeros_like(place)
        last = self._hidden(dataclasses.replace(inputs, row=row, place=place))
        with torch.autocast(last.device.type, enabled=False):
            rewards = _head_of(self._base)(last.to(_head_of(self._base).weight.dtype)).squeeze(-1)
        return ResponseRewards(
            tokens=rewards,
            lengths=torch.ones_like(batch.lengths),
            example=batch.example,
            roles=batch.roles,
            n_examples=batch.n_examples,
        )


def add_head(model: PreTrainedModel, seed: int) -> None:
    """Give a causal LM, adapted or not, a new head with weights from N(0, 1 / (hidden size + 1)), drawn by ``seed``.

    That scale is Stiennon's (2020): rewards of about 1 for states of about 1. The LM head has no part in a reward, so
    it is frozen, unless it is the embedding.
    """
    base = _causal(model)
    embedding, output = base.get_input_embeddings(), base.get_output_embeddings()
    if output is not None and output.weight is not cast("nn.Embedding", embedding).weight:
        output.requires_grad_(False)
    size = int(cast("nn.Embedding", embedding).weight.shape[1] if output is None else output.weight.shape[1])
    head = nn.Linear(size, 1, bias=False, dtype=torch.float32, device="meta").to_empty(device="cpu")
    drawn = torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
    head.weight.data.copy_(drawn / (size + 1) ** 0.5)
    setattr(base, _HEAD, head.to(base.device))


def as_classifier(model: PreTrainedModel, pad_token_id: int | None) -> PreTrainedModel:
    """The sequence classifier of transformers with the body and the head of a causal LM, on the CPU.

    ``pad_token_id`` is one that no text holds, or None. Raises UserError if the architecture has none.
    """
    found = _classifier_of(model)
    found.base_model.load_state_dict(model.base_model.state_dict())
    with torch.no_grad():
        found.score.weight.copy_(_head_of(model).weight)
    found.config.pad_token_id = pad_token_id
    return cast("PreTrainedModel", found)


def check_classifier(model: PreTrainedModel) -> None:
    """Raise UserError if transformers has no sequence classifier to save this model's rewards as."""
    with torch.device("meta"):
        _classifier_of(_causal(model))


def _classifier_of(model: PreTrainedModel) -> Any:
    from transformers import AutoModelForSequenceClassification

    settings = type(model.config).from_dict(model.config.to_dict())
    settings.num_labels = 1
    try:
        found: Any = AutoModelForSequenceClassification.from_config(settings, dtype=torch.float32)
    except ValueError:
        found = None
    head = getattr(found, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise UserError(
            f"reward=bradley_terry: transformers has no sequence classifier with a plain head for "
            f"{type(model).__name__}; choose another model, or another reward"
        )
    return found


def _causal(model: PreTrainedModel) -> PreTrainedModel:
    """The causal LM itself; adapters of PEFT live inside its layers."""
    peft = getattr(model, "get_base_model", None)
    return model if peft is None else cast("PreTrainedModel", peft())


def _head_of(model: nn.Module) -> nn.Linear:
    return cast("nn.Linear", getattr(model, _HEAD))
