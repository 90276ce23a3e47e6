"""Models and examples small enough to train in a test, with weights large enough that tokens matter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dppo.config import TrainSettings
from dppo.loop import ReferenceLogps
from dppo.types import EncodedExample, EncodedResponse, Role

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def build(
    kind: type[PreTrainedModel], config: PretrainedConfig, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> PreTrainedModel:
    """A model with random weights from ``seed``, in eval mode; the global random state is left as it was.

    In fp64 its norms are fp64 as well: those of transformers round to fp32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = kind(config)
    if dtype == torch.float64:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__ in ("LlamaRMSNorm", "Qwen2RMSNorm"):
                    setattr(parent, name, nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
    return cast("PreTrainedModel", model.to(dtype).eval())


def llama(*, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> PreTrainedModel:
    return build(LlamaForCausalLM, LlamaConfig(**{**SIZES, **changes}), dtype=dtype, seed=seed)


def grouped_llama(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """Four query heads share two key-value heads; embedding and LM head are tied."""
    return llama(dtype=dtype, seed=seed, num_key_value_heads=2, tie_word_embeddings=True)


def gpt2(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """Learned positions, biases, and a dropout of 0.1 unless the training turns it off."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return build(GPT2LMHeadModel, config, dtype=dtype, seed=seed)


def qwen2(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """Biases on query, key and value, two key-value heads."""
    return build(Qwen2ForCausalLM, Qwen2Config(**{**SIZES, "num_key_value_heads": 2}), dtype=dtype, seed=seed)


FAMILIES = {"llama": llama, "grouped_llama": grouped_llama, "gpt2": gpt2, "qwen2": qwen2}


def example(name: str, prompt: Sequence[int], *answers: tuple[Role, Sequence[int]]) -> EncodedExample:
    """An example from token ids; its ids are made from ``name``."""
    return EncodedExample(
        example_id=name,
        prompt_id=f"prompt of {name}",
        prompt_ids=tuple(prompt),
        responses=tuple(
            EncodedResponse(f"{name}/{number}", role, tuple(token_ids))
            for number, (role, token_ids) in enumerate(answers)
        ),
    )


def draw(generator: random.Random, n: int) -> list[int]:
    """``n`` token ids above the special ones."""
    return [generator.randrange(3, VOCABULARY) for _ in range(n)]


def pairs(n: int, seed: int = 0, *, longest: int = 12) -> list[EncodedExample]:
    """Pairs with prompts and answers of 1 to ``longest`` tokens."""
    generator = random.Random(seed)

    def some() -> list[int]:
        return draw(generator, generator.randint(1, longest))

    return [example(f"pair-{seed}-{number}", some(), ("chosen", some()), ("rejected", some())) for number in range(n)]


def mixed(seed: int = 0, *, long: int = 40) -> list[EncodedExample]:
    """One to five responses behind prompts of 1 to ``long`` tokens; one-token responses among them."""
    generator = random.Random(seed)
    sizes = [(1, [1]), (3, [4, 1]), (long, [2, long, 5]), (5, [1, 1, 7, 2]), (1, [3, 9, 1, 6, 2])]
    return [
        example(
            f"mixed-{number}", draw(generator, n_prompt), *(("ranked", draw(generator, length)) for length in lengths)
        )
        for number, (n_prompt, lengths) in enumerate(sizes)
    ]


def own_log_probs(model: PreTrainedModel, examples: Sequence[EncodedExample]) -> Tensor:
    """(N,) log-probs of all response tokens, one plain forward pass per response: what a scorer must return."""
    found = []
    for item in examples:
        for response in item.responses:
            token_ids = torch.tensor([[*item.prompt_ids, *response.token_ids]])
            log_probs = cast("Any", model)(input_ids=token_ids).logits[0].log_softmax(-1)
            for place in range(len(item.prompt_ids), token_ids.shape[1]):
                found.append(log_probs[place - 1, token_ids[0, place]])
    return torch.stack(found)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The gradients of all parameters, which are then cleared."""
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def train_settings(**changes: Any) -> TrainSettings:
    """A short training run without warm-up; ``changes`` are its fields."""
    settings: dict[str, Any] = {
        "n_examples": None,
        "max_length": None,
        "batch_size": 4,
        "steps": 5,
        "epochs": None,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "tokens_per_micro_batch": 1000,
        "packing": "packed",
        "attention": "auto",
        "precision": "fp32",
        "dropout": 0.0,
        "activation_checkpointing": False,
        "compile": False,
        "deterministic": True,
        "sharding": "none",
        "log_every": 1,
        "evaluate_every": None,
        "n_evaluation_examples": 4,
        "penalty_gradient_ratio": True,
        "save": "last",
        "checkpoint_every": None,
        "lora": None,
    }
    return TrainSettings(**{**settings, **changes})


def stored(model: PreTrainedModel, examples: Sequence[EncodedExample]) -> ReferenceLogps:
    """The log-probs of all responses under ``model``, looked up by (prompt_id, response_id)."""
    with torch.no_grad():
        rows = own_log_probs(model, examples)
    keys = [(item.prompt_id, answer.response_id) for item in examples for answer in item.responses]
    lengths = [len(answer.token_ids) for item in examples for answer in item.responses]
    found = dict(zip(keys, rows.split(lengths), strict=True))
    return lambda wanted: [found[key] for key in wanted]
