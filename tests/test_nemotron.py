"""The reward that a causal LM says as the first logit behind a conversation; quantised weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dppo.errors import UserError
from dppo.rewards import Reward
from dppo.rewards.classifier import _load as _load_classifier
from dppo.rewards.nemotron import Nemotron, _load
from tests.data.chat_models import chatml
from tests.runs import run_small
from tests.test_classifier_reward import ANSWERS, PROMPTS, SIZES, prompt
from tests.test_classifier_reward import folder as classifier_folder
from tests.test_classifier_reward import reward as classifier


def folder(path: Path, *, template: bool = True) -> Path:
    """A model with random weights in the layout of nvidia/Llama-3.1-Nemotron-70B-Reward-HF."""
    tokenizer = chatml()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **SIZES))
    model.save_pretrained(path)
    if not template:
        tokenizer.chat_template = None
    tokenizer.save_pretrained(path)
    return path


def reward(path: Path, **changed: Any) -> Nemotron:
    settings: dict[str, Any] = {"revision": "main", "max_length": 4096, "tokens_per_batch": 10_000, "precision": "fp32"}
    return Nemotron(**{"name_or_path": str(path), "quantisation": None, "device": "cpu", **settings, **changed})


@pytest.fixture(autouse=True)
def _no_model_of_another_test() -> None:
    _load.cache_clear()
    _load_classifier.cache_clear()


def test_a_score_is_what_generating_one_token_shows_whatever_the_batch(tmp_path: Path) -> None:
    """As the model card reads it: the scores of the first new token, entry 0."""
    scorer = reward(folder(tmp_path / "m"))
    assert isinstance(scorer, Reward)
    scorer.check(PROMPTS)
    found = scorer.score(PROMPTS, ANSWERS)
    model, tokenizer = _load(scorer)
    expected = []
    for one, answer in zip(PROMPTS, ANSWERS, strict=True):
        chat = [{"role": turn.role, "content": turn.content} for turn in one.messages]
        chat.append({"role": "assistant", "content": answer})
        rendered: Any = tokenizer.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=False, return_tensors="pt", return_dict=True
        )
        generator: Any = model
        out = generator.generate(
            rendered["input_ids"],
            attention_mask=rendered["attention_mask"],
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        expected.append(out["scores"][0][0][0].item())
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 4) for value in found}) == 3
    assert reward(Path(scorer.name_or_path), tokens_per_batch=1).score(PROMPTS, ANSWERS) == pytest.approx(
        found, abs=1e-5
    )
    automatic = reward(Path(scorer.name_or_path), device="auto")
    assert automatic.score(PROMPTS, ANSWERS) == pytest.approx(found, abs=1e-5)


def test_weights_are_read_straight_into_their_precision(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    half = reward(path, precision="bf16")
    found = half.score(PROMPTS, ANSWERS)
    assert {weight.dtype for weight in _load(half)[0].parameters()} == {torch.bfloat16}
    full = reward(path).score(PROMPTS, ANSWERS)
    assert found != full
    assert found == pytest.approx(full, abs=0.2)


def test_long_conversations_lose_their_beginning(tmp_path: Path) -> None:
    scorer = reward(folder(tmp_path / "m"), max_length=12)
    same_end = [prompt("hello " * 40 + word) for word in ("question", "answer")]
    first, second = scorer.score(same_end, ["and so on, and so on, and so on."] * 2)
    assert first == second
    assert scorer.score(same_end[:1], ["and so on, and so on, and so on!"])[0] != first


def test_what_decides_a_score_is_in_its_identity_and_what_cannot_work_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    base = reward(path).identity()
    assert reward(path, tokens_per_batch=5).identity() == base
    for changed in ({"max_length": 5}, {"precision": "bf16"}, {"quantisation": "nf4"}):
        assert reward(path, **changed).identity() != base
    with pytest.raises(UserError, match=r"reward\.name_or_path=/nonexistent: there is no such folder"):
        reward(Path("/nonexistent")).check(PROMPTS)
    with pytest.raises(UserError, match="has no chat template"):
        reward(folder(tmp_path / "n", template=False)).check(PROMPTS)
    with pytest.raises(UserError, match="max_length=0: must be at least 1"):
        reward(path, max_length=0)


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantised_weights_need_a_package(tmp_path: Path) -> None:
    said = r"reward\.quantisation=nf4: needs a package: pip install bitsandbytes"
    with pytest.raises(UserError, match=said):
        reward(folder(tmp_path / "m"), quantisation="nf4").check(PROMPTS)
    with pytest.raises(UserError, match=said):
        classifier(classifier_folder(tmp_path / "c", "llama"), quantisation="nf4").check(PROMPTS)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("quantisation", ["int8", "nf4"])
def test_quantised_weights_score_as_what_they_stand_for(
    quantisation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    for key in ("hidden_size", "intermediate_size"):
        monkeypatch.setitem(SIZES, key, 64)  # NF4 packs rows by 32 on a CPU
    for make, load, where in (
        (reward, _load, folder(tmp_path / "m")),
        (classifier, _load_classifier, classifier_folder(tmp_path / "c", "llama")),
    ):
        few: Any = make(where, quantisation=quantisation)
        model: Any = load(few)[0]
        layers = {name: part for name, part in model.named_modules() if "bitsandbytes" in type(part).__module__}
        assert len(layers) == 14, "seven of each of two layers, not the head"
        weights = {}
        if quantisation == "nf4":
            weights = {name: dequantize_4bit(part.weight, part.weight.quant_state) for name, part in layers.items()}
        found = few.score(PROMPTS, ANSWERS)
        _load.cache_clear()
        _load_classifier.cache_clear()
        full: Any = make(where)
        plain: Any = load(full)[0]
        expected = full.score(PROMPTS, ANSWERS)
        assert found != expected
        with torch.no_grad():
            for name, weight in weights.items():
                plain.get_submodule(name).weight.copy_(weight.view_as(plain.get_submodule(name).weight))
        assert full.score(PROMPTS, ANSWERS) == pytest.approx(found, abs=0.7 if quantisation == "int8" else 0.25)


def test_a_run_is_scored_by_it(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    found = run_small(tmp_path, "loss=none", "reward=nemotron_70b_local", f"reward.name_or_path={path}")
    assert found.result["status"] == "complete"
    assert found.result["reward"]["policy"]["value"] != 0
