"""A sequence classifier as the reward: what it reads, whatever the batch, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dppo.errors import UserError
from dppo.rewards import Reward
from dppo.rewards.classifier import Classifier, _load
from dppo.types import Message, Prompt
from tests.data.chat_models import chatml
from tests.runs import run_small

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
}


def prompt(*turns: str) -> Prompt:
    messages = tuple(Message("user" if place % 2 == 0 else "assistant", turn) for place, turn in enumerate(turns))
    return Prompt("/".join(turns), messages)


PROMPTS = [prompt("What is the capital of France?"), prompt("hello"), prompt("Name three", "red", "and another one")]
ANSWERS = ["Paris.", "hello world, and so on, and so on", "green"]


def folder(path: Path, kind: str, *, outputs: int = 1, padded: bool = True) -> Path:
    """A model with random weights that reads chats (llama) or pairs of texts (bert)."""
    tokenizer: PreTrainedTokenizerFast = chatml()
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind == "llama":
        llama = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **SIZES)
        llama.num_labels, llama.pad_token_id = outputs, tokenizer.pad_token_id if padded else None
        model = LlamaForSequenceClassification(llama)
    else:
        bert = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **SIZES)
        bert.num_labels = outputs
        model = BertForSequenceClassification(bert)
        tokenizer.chat_template = None
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def reward(path: Path, **changed: Any) -> Classifier:
    settings: dict[str, Any] = {"revision": "main", "output": 0, "max_length": None, "tokens_per_batch": 10_000}
    return Classifier(
        **{"name_or_path": str(path), "precision": "fp32", "quantisation": None, "device": "cpu", **settings, **changed}
    )


@pytest.fixture(autouse=True)
def _no_model_of_another_test() -> None:
    _load.cache_clear()


@pytest.mark.parametrize(("kind", "padded"), [("llama", True), ("llama", False), ("bert", True)])
def test_a_score_is_the_models_own_logit_whatever_the_batch(kind: str, padded: bool, tmp_path: Path) -> None:
    scorer = reward(folder(tmp_path / kind, kind, outputs=2, padded=padded), output=1)
    assert isinstance(scorer, Reward)
    scorer.check(PROMPTS)
    found = scorer.score(PROMPTS, ANSWERS)
    model, tokenizer, _ = _load(scorer)
    for one, answer, value in zip(PROMPTS, ANSWERS, found, strict=True):
        if kind == "llama":
            chat = [{"role": turn.role, "content": turn.content} for turn in one.messages]
            chat.append({"role": "assistant", "content": answer})
            text = tokenizer.apply_chat_template(chat, tokenize=False)
            row = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        else:
            row = tokenizer("\n".join(turn.content for turn in one.messages), answer, return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=row["input_ids"]).logits
        assert value == pytest.approx(float(logits[0, 1]), abs=1e-5)
    alone = reward(Path(scorer.name_or_path), output=1, tokens_per_batch=1)
    assert alone.score(PROMPTS, ANSWERS) == pytest.approx(found, abs=1e-5)
    assert len(set(found)) == 3
    assert min(found) < max(found)
    swapped = scorer.score(PROMPTS[::-1], ANSWERS[::-1])
    assert swapped[::-1] == pytest.approx(found, abs=1e-5)


def test_long_conversations_lose_their_beginning(tmp_path: Path) -> None:
    scorer = reward(folder(tmp_path / "m", "llama"), max_length=12)
    same_end = [prompt("hello " * 40 + word) for word in ("question", "answer")]
    first, second = scorer.score(same_end, ["and so on, and so on, and so on."] * 2)
    assert first == second  # what differs was cut
    other = scorer.score(same_end[:1], ["and so on, and so on, and so on!"])[0]
    assert other != first


def test_identity_follows_what_decides_a_score(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "llama", outputs=2)
    base = reward(path).identity()
    assert reward(path, tokens_per_batch=5).identity() == base
    for changed in ({"output": 1}, {"max_length": 5}, {"precision": "bf16"}, {"quantisation": "nf4"}):
        assert reward(path, **changed).identity() != base
    assert reward(folder(tmp_path / "n", "llama", outputs=3)).identity() != base


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"output": 2}, r"reward\.output=2: .* has 1 \(0 is the first\)"),
        ({"name_or_path": "/nonexistent"}, r"reward\.name_or_path=/nonexistent: there is no such folder"),
    ],
)
def test_what_cannot_score_is_refused_before_training(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        reward(folder(tmp_path / "m", "llama"), **changed).check(PROMPTS)
    for wrong in ({"output": -1}, {"tokens_per_batch": 0}, {"max_length": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            reward(tmp_path, **wrong)


def test_a_run_is_scored_by_it(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "llama")
    found = run_small(tmp_path, "loss=dpo", "train.steps=2", "reward=classifier", f"reward.name_or_path={path}")
    assert found.result["status"] == "complete"
    assert found.result["reward"]["policy"]["value"] != 0
