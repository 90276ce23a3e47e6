"""A reward model that a run trains itself, on preference pairs that its policy does not train on."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from dppo.config import TrainSettings, require
from dppo.data.draws import share
from dppo.data.ids import prompt_key
from dppo.errors import UserError
from dppo.types import Artifact, Json, PreferenceExample, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dppo.data.encoding import ChatEncoder

VERSION = 1


@dataclass(frozen=True)
class BradleyTerry:
    """How a reward model is trained: the SFT model or the base model with a scalar head, on preference pairs.

    It sees the pairs of a share ``held_back`` of the training prompts, chosen by a hash of ``held_back_seed`` and the
    prompt; the preference phases train on the others. ``held_back`` null uses the pairs of all training prompts for
    both: the reward model then knows the very pairs that the policy learned from. ``margin`` and ``centring`` are
    those of the loss (``losses.bradley_terry``); ``seed`` draws the head and the order of the pairs.

    Its accuracy is measured on at most ``n_pairs`` pairs of a split. ``tokens_per_batch`` and ``precision`` are those
    of scoring; the head is fp32 in any case.
    """

    start: Literal["sft", "base"]
    held_back: float | None
    held_back_seed: int
    margin: float
    centring: float
    seed: int
    train: TrainSettings
    n_pairs: int | None
    tokens_per_batch: int
    precision: Literal["fp32", "bf16"]
    device: str

    def __post_init__(self) -> None:
        if self.held_back is not None:
            require(0 < self.held_back < 1, "held_back", self.held_back, "must be a share in (0, 1), or null")
        for key in ("margin", "centring"):
            value = getattr(self, key)
            require(math.isfinite(value) and value >= 0, key, value, "must be a number >= 0")
        for key in ("n_pairs", "tokens_per_batch"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "must be at least 1")
        lora = self.train.lora
        require(
            lora is None or not lora.base_4bit,
            "train.lora.base_4bit",
            True,
            "a reward model is saved with its adapters merged, which a 4-bit base does not allow; set it to false",
        )

    def identity(self) -> dict[str, Json]:
        """What decides the trained model beside its data and the model that it starts from."""
        return {
            "reward": "bradley_terry",
            "start": self.start,
            "margin": self.margin,
            "centring": self.centring,
            "seed": self.seed,
            "pairs": self.rows_identity(),
        }

    def rows_identity(self) -> Json:
        """Which of the training prompts are its own; null: all are, and the policy's as well."""
        if self.held_back is None:
            return None
        # "by" counts the ways in which prompts were told apart: 2 is that of ``_is_held_back``.
        return {"held_back": self.held_back, "seed": self.held_back_seed, "by": 2}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Any prompt will do."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """Raises UserError: only a run has the model (``TrainedReward``)."""
        raise UserError(
            "reward=bradley_terry: is trained by a run; to score elsewhere with a model that a run has trained, "
            "type reward=classifier reward.name_or_path=FOLDER"
        )

    def is_own(self, prompt: Prompt) -> bool:
        """Whether the pairs of this training prompt train the reward model."""
        return self.held_back is None or self._is_held_back(prompt)

    def is_left(self, prompt: Prompt) -> bool:
        """Whether the policy may train on this training prompt."""
        return self.held_back is None or not self._is_held_back(prompt)

    def own_pairs(self, pairs: Sequence[PreferenceExample]) -> list[PreferenceExample]:
        """The training pairs of the reward model. Raises UserError if there is none."""
        found = [pair for pair in pairs if self.is_own(pair.prompt)]
        if not found:
            raise UserError(
                f"reward=bradley_terry: the data set has {len(pairs):,} training pairs"
                + (f", and none is held back with reward.held_back={self.held_back:g}" if pairs else "")
                + "; choose a data set with preference pairs, a larger share, or another reward"
            )
        return found

    def _is_held_back(self, prompt: Prompt) -> bool:
        assert self.held_back is not None
        # Prompts that a reader takes for the same are on the same side, whatever their spelling and system turn.
        return share("reward model", self.held_back_seed, prompt_key(prompt.messages)) < self.held_back


@dataclass(frozen=True)
class TrainedReward:
    """The reward of a trained model: unbounded, and of no meaning but by differences between answers to one prompt.

    Prompt and answer become the ids that training gave them, end-of-turn token included: control tokens that are
    spelled out in a text are ordinary text. What is beyond the model's context loses its beginning but the first
    token.
    """

    settings: BradleyTerry
    model: Artifact
    encoder: ChatEncoder = field(compare=False)

    def identity(self) -> dict[str, Json]:
        """The model's fingerprint, and what else decides a score."""
        return {
            "reward": "bradley_terry",
            "version": VERSION,
            "model": self.model.fingerprint,
            "precision": self.settings.precision,
        }

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Any prompt will do."""

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """One reward per answer. Raises UserError if one is not finite."""
        from dppo.rewards.classifier import finite, output_of

        limit = self.encoder.tokenizer.model_max_length
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            messages = prompt.messages
            row = [*self.encoder.prompt_ids(messages), *self.encoder.response_ids(messages, answer)]
            rows.append(row if len(row) <= limit else row[:1] + row[len(row) - limit + 1 :])
        model = _loaded(self)
        found = output_of(model, rows, 0, self.settings.tokens_per_batch, model.device)
        return finite(found, "reward=bradley_terry")


@functools.lru_cache(maxsize=1)  # every call of `score` needs the same one
def _loaded(reward: TrainedReward) -> PreTrainedModel:
    from pathlib import Path
    from typing import Any

    from dppo.models import load_classifier
    from dppo.rewards.classifier import placed

    model, _ = load_classifier(Path(reward.model.path), reward.model.path)
    model = placed(model, reward.settings.precision, reward.settings.device)
    head: Any = model.score
    head.float().register_forward_pre_hook(lambda module, given: (given[0].float(),))
    return model
