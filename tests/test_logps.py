"""Log-probs of response tokens: equal to the model's own, whatever the layout, the model and the neighbours."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dppo import attention, logps
from dppo.attention import SHARED_PROMPT
from dppo.batches import collate
from dppo.logps import ResponseScorer, response_log_softmax
from dppo.types import EncodedExample, EncodedResponse
from tests.tiny_models import (
    FAMILIES,
    SIZES,
    VOCABULARY,
    build,
    draw,
    example,
    gradients,
    llama,
    mixed,
    own_log_probs,
)


def close(found: Tensor, expected: Tensor, within: float = 1e-9, what: str = "") -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(found, expected, rtol=0, atol=within, msg=lambda said: f"{what} {said}")


@pytest.fixture(autouse=True)
def _warn_again() -> Iterator[None]:
    logps._warn_once.cache_clear()
    yield


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings that dppo gave so far."""
    caplog.set_level(logging.WARNING, logger="dppo")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "dppo"]


def scored(scorer: ResponseScorer, examples: list[EncodedExample]) -> Tensor:
    return cast("Tensor", scorer(collate(examples)).tokens)


# --- equal to the model's own ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("short_example", [96, 8], ids=["together", "apart"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_give_the_models_own_log_probs_and_gradients(
    family: str, short_example: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SHORT_EXAMPLE", short_example)
    model = FAMILIES[family]()
    examples = mixed()
    weight = torch.linspace(-1, 2, sum(len(answer.token_ids) for item in examples for answer in item.responses))
    expected = own_log_probs(model, examples)
    (expected * weight).sum().backward()
    slope = gradients(model)
    assert expected.std() > 1  # tokens differ: a wrong place would show
    for packing in ("padded", "packed"):
        scorer = ResponseScorer(model, packing)
        assert (scorer.packing, scorer.own_logits) == (packing, False)
        found = scored(scorer, examples)
        close(found, expected.detach())
        (found * weight).sum().backward()
        own = gradients(model)
        assert own.keys() == slope.keys()
        for name, value in own.items():
            close(value, slope[name], what=name)


@pytest.mark.parametrize(("short_example", "taken"), [(96, "_attend_together"), (8, "_attend_apart")])
def test_the_packed_layout_computes_every_token_once(
    short_example: int, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_SHORT_EXAMPLE", short_example)
    calls: list[tuple[str, int]] = []
    attend = {name: getattr(attention, name) for name in ("_attend_together", "_attend_apart")}
    for name in attend:

        def counted(query: Tensor, *args: Any, name: str = name, own: Any = attend[name]) -> Tensor:
            calls.append((name, query.shape[2]))
            return cast("Tensor", own(query, *args))

        monkeypatch.setattr(attention, name, counted)
    model = llama()
    packed, examples = ResponseScorer(model, "packed"), mixed()
    calls.clear()
    scored(packed, examples)
    n_tokens = sum(item.n_tokens for item in examples)
    assert calls == [(taken, n_tokens)] * model.config.num_hidden_layers
    padded = ResponseScorer(model, "padded")
    calls.clear()
    scored(padded, examples)
    assert calls == []


def test_the_result_keeps_the_batchs_responses() -> None:
    examples = mixed()
    found = ResponseScorer(llama(dtype=torch.float32), "packed")(collate(examples))
    assert found.tokens.dtype == torch.float32
    assert found.n_examples == len(examples)
    assert found.lengths.tolist() == [len(answer.token_ids) for item in examples for answer in item.responses]
    assert found.example.tolist() == [number for number, item in enumerate(examples) for _ in item.responses]
    assert found.roles == ("ranked",) * 15


def test_fp32_layouts_agree() -> None:
    model, examples = llama(dtype=torch.float32), mixed()
    packed, padded = (
        scored(ResponseScorer(model, "packed"), examples),
        scored(ResponseScorer(model, "padded"), examples),
    )
    close(packed, padded, within=1e-4)


def test_log_softmax_is_fp32_under_bf16_autocast() -> None:
    model, examples = llama(dtype=torch.float32), mixed()
    scorer = ResponseScorer(model, "packed")
    exact = scored(scorer, examples)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = scored(scorer, examples)
        whole = torch.cat(list(response_log_softmax(scorer, collate(examples))))
    assert rounded.dtype == whole.dtype == torch.float32
    close(whole.exp().sum(-1), torch.ones(len(whole)), within=1e-5)  # bf16: off by 1e-2
    assert 0 < float((rounded - exact).detach().abs().max()) < 1


def test_adapters_are_part_of_the_model() -> None:
    base = llama(seed=3)
    before = own_log_probs(base, mixed()).detach()
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).double().eval()
    found = scored(ResponseScorer(cast("PreTrainedModel", model), "packed"), mixed())
    close(found, own_log_probs(cast("PreTrainedModel", model), mixed()))
    assert float((found.detach() - before).abs().max()) > 0.1


def test_activation_checkpointing_changes_no_gradient() -> None:
    model, examples = llama(), mixed()
    model.train()
    scorer = ResponseScorer(model, "packed")
    scored(scorer, examples).sum().backward()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    scored(scorer, examples).sum().backward()
    for name, value in gradients(model).items():
        close(value, plain[name])


# --- neighbours ------------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=6)
EXAMPLES = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=4)
NEIGHBOURS = llama(seed=1)


@pytest.mark.parametrize("short_example", [96, 1], ids=["together", "apart"])
@given(drawn=EXAMPLES, data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_response_sees_its_prompt_and_itself_only(
    short_example: int, drawn: list[tuple[list[int], list[list[int]]]], data: st.DataObject
) -> None:
    """Other tokens in one response, or in one prompt, change exactly the log-probs that depend on them."""
    examples = [
        example(str(number), prompt, *(("ranked", answer) for answer in answers))
        for number, (prompt, answers) in enumerate(drawn)
    ]
    owner = data.draw(st.integers(0, len(examples) - 1))
    item = examples[owner]
    changed = data.draw(st.integers(-1, len(item.responses) - 1))

    def other(token_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(3 + (token - 2) % (VOCABULARY - 3) for token in token_ids)

    if changed < 0:
        replaced = dataclasses.replace(item, prompt_ids=other(item.prompt_ids))
    else:
        answers = list(item.responses)
        answers[changed] = EncodedResponse("", "ranked", other(answers[changed].token_ids))
        replaced = dataclasses.replace(item, responses=tuple(answers))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention, "_SHORT_EXAMPLE", short_example)
        scorer = ResponseScorer(NEIGHBOURS, "packed")
        before = scorer(collate(examples))
        after = scorer(collate([*examples[:owner], replaced, *examples[owner + 1 :]]))
    moved = (before.tokens - after.tokens).abs() > 1e-9
    affected = [
        number == owner and changed in (-1, place)
        for number, one in enumerate(examples)
        for place, answer in enumerate(one.responses)
        for _ in answer.token_ids
    ]
    assert not bool((moved & ~torch.tensor(affected)).any())
    assert bool(moved[torch.tensor(affected)].any())


# --- the head --------------------------------------------------------------------------------------------------------


def test_a_chunked_head_changes_neither_values_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = llama(), mixed()
    scorer, batch = ResponseScorer(model, "packed"), collate(examples)
    whole = scorer(batch).tokens
    whole.square().sum().backward()
    slope = gradients(model)
    vocabulary = torch.cat(list(response_log_softmax(scorer, batch)))
    sizes: list[int] = []
    scorer.head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    monkeypatch.setattr(logps, "_LOGITS_PER_CHUNK", 7 * VOCABULARY + 3)
    monkeypatch.setattr(logps, "_LOGITS_KEPT", len(batch.targets) * VOCABULARY - 1)
    chunked = scorer(batch).tokens
    assert max(sizes) == 7 and sum(sizes) == len(batch.targets)
    close(chunked, whole)
    chunked.square().sum().backward()
    for name, value in gradients(model).items():
        close(value, slope[name])
    parts = list(response_log_softmax(scorer, batch))
    assert [len(part) for part in parts] == [len(part) for part in batch.targets.split(7)]
    close(torch.cat(parts), vocabulary)
    close(vocabulary.gather(1, batch.targets[:, None])[:, 0], whole)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_head_is_computed_once_where_its_logits_can_be_kept(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = llama(), collate(mixed())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    scorer = ResponseScorer(model, "packed")
    sizes: list[int] = []
    scorer.head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    monkeypatch.setattr(logps, "_LOGITS_PER_CHUNK", 7 * VOCABULARY)
    scorer(batch).tokens.sum().backward()
    n_positions = len(batch.targets)
    assert sum(sizes) == (2 * n_positions if checkpointing else n_positions)
    assert max(sizes) == (7 if checkpointing else n_positions)


@pytest.mark.parametrize("at_once", [1, 3 * VOCABULARY, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probs_of_targets_and_their_gradient(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log p(y) = z_y - log sum_v exp z_v, whose derivative by z_v is [v = y] - p(v)."""
    monkeypatch.setattr(logps, "_LOGITS_AT_ONCE", {"cpu": at_once})
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(8, VOCABULARY, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (8,), generator=generator)
    upstream = torch.randn(8, generator=generator).to(torch.float64 if dtype == torch.float64 else torch.float32)
    found = logps._pick(logits * 1, targets)
    assert found.dtype == upstream.dtype
    probability = logits.detach().double().softmax(-1)
    expected = probability.gather(1, targets[:, None])[:, 0].log().to(found.dtype)
    close(found, expected, 1e-12 if dtype == torch.float64 else 1e-5)
    found.backward(upstream, retain_graph=True)
    slope = upstream[:, None] * (torch.nn.functional.one_hot(targets, VOCABULARY) - probability)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, slope.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    first = logits.grad.clone()
    found.backward(upstream)
    assert torch.equal(logits.grad, 2 * first)


def test_the_head_sees_response_positions_only() -> None:
    scorer, examples = ResponseScorer(llama(), "packed"), mixed()
    sizes: list[int] = []
    scorer.head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    scored(scorer, examples)
    assert sum(sizes) == sum(len(answer.token_ids) for item in examples for answer in item.responses)


# --- models that need another way ------------------------------------------------------------------------------------


def model_of(name: str, *, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    config: PretrainedConfig = getattr(transformers, f"{name}Config")(**{**SIZES, "num_key_value_heads": 2, **changes})
    return build(getattr(transformers, f"{name}ForCausalLM"), config, dtype=dtype)


def smaller(name: str) -> PreTrainedModel:
    """A model whose configuration has names of its own."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "initializer_range": 0.3}
    config: PretrainedConfig = getattr(transformers, f"{name}Config")(**sizes, n_layer=2, n_head=4)
    return build(getattr(transformers, f"{name}ForCausalLM"), config)


def gemma3(layer_types: list[str]) -> PreTrainedModel:
    config = transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6, layer_types=layer_types)
    return build(transformers.Gemma3ForCausalLM, config)


@pytest.mark.parametrize("short_example", [96, 8], ids=["together", "apart"])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: model_of("Mistral", sliding_window=4), id="every layer"),
        pytest.param(lambda: model_of("Mistral", sliding_window=100), id="wider than any row"),
        pytest.param(
            lambda: gemma3(layer_types=["sliding_attention", "full_attention"]),
            id="every other layer",
        ),
    ],
)
def test_sliding_windows_are_packed(
    model: Callable[[], PreTrainedModel],
    short_example: int,
    monkeypatch: pytest.MonkeyPatch,
    warnings: Callable[[], list[str]],
) -> None:
    monkeypatch.setattr(attention, "_SHORT_EXAMPLE", short_example)
    built = model()
    expected = own_log_probs(built, mixed())
    scorer = ResponseScorer(built, "packed")
    assert scorer.packing == "packed" and warnings() == []
    close(scored(scorer, mixed()), expected)


@pytest.mark.parametrize(
    ("model", "packing", "own_logits", "said"),
    [
        pytest.param(
            lambda: model_of("Gemma2", head_dim=8, attn_logit_softcapping=5.0, final_logit_softcapping=2.0),
            "padded",
            False,
            "Gemma2ForCausalLM: the packed layout does not know attention with softcap",
            id="capped attention",
        ),
        pytest.param(
            # At these weights the cap moves log-probs by less than rounding; after some training it would not.
            lambda: model_of("Gemma2", head_dim=8, initializer_range=1e-3),
            "padded",
            False,
            "Gemma2ForCausalLM: the packed layout does not know attention with softcap",
            id="capped attention that does not show yet",
        ),
        pytest.param(
            lambda: gemma3(["full_attention", "full_attention"]),
            "padded",
            False,
            "Gemma3ForCausalLM: it has local attention that the packed layout does not know",
            id="masks that the attention is not told of",
        ),
        pytest.param(
            lambda: model_of("Cohere"),
            "packed",
            True,
            "CohereForCausalLM: its logits are not its LM head's alone",
            id="multiplied logits",
        ),
        pytest.param(
            lambda: model_of("Granite", logits_scaling=3.0),
            "packed",
            True,
            "GraniteForCausalLM: its logits are not its LM head's alone",
            id="divided logits",
        ),
        pytest.param(
            lambda: smaller("Bloom"),
            "padded",
            False,
            "BloomForCausalLM: its attention cannot be replaced",
            id="attention of its own",
        ),
        pytest.param(
            lambda: remembering(llama()),
            "padded",
            False,
            "LlamaForCausalLM: the packed layout gives other log-probs than its own",
            id="a state that runs along the row",
        ),
    ],
)
def test_other_models_fall_back_and_say_so_once(
    model: Callable[[], PreTrainedModel],
    packing: str,
    own_logits: bool,
    said: str,
    warnings: Callable[[], list[str]],
) -> None:
    built = model()
    built.train()
    implementation = built.config._attn_implementation
    expected = own_log_probs(built.eval(), mixed())
    built.train()
    scorer = ResponseScorer(built, "packed")
    assert (scorer.packing, scorer.own_logits) == (packing, own_logits)
    assert built.training
    assert built.config._attn_implementation == (SHARED_PROMPT if packing == "packed" else implementation)
    ResponseScorer(built, "packed")
    (line,) = warnings()
    assert line.startswith(f"warning: {said}, so ") and "\n" not in line
    scorer.eval()
    found = scored(scorer, mixed())
    close(found, expected, within=1e-5)  # some of these models compute in fp32 in part
    whole = torch.cat(list(response_log_softmax(scorer, collate(mixed()))))
    close(whole.gather(1, collate(mixed()).targets[:, None])[:, 0], found)
    padded = ResponseScorer(built, "padded")
    assert (padded.packing, padded.own_logits) == ("padded", own_logits)
    close(scored(padded.eval(), mixed()), expected, within=1e-5)


def remembering(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with a layer that carries a little of each token to the next, as recurrent layers do."""

    def carry(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + 0.05 * torch.nn.functional.pad(output, (0, 0, 1, 0))[:, :-1]

    model.get_submodule("model.layers.0").register_forward_hook(carry)
    return model


def test_capped_logits_keep_the_chunked_head(warnings: Callable[[], list[str]]) -> None:
    model = model_of("Gemma2", head_dim=8, attn_logit_softcapping=None, final_logit_softcapping=2.0)
    expected = own_log_probs(model, mixed())
    scorer = ResponseScorer(model, "packed")
    assert (scorer.packing, scorer.own_logits, scorer.logit_cap) == ("packed", False, 2.0)
    close(scored(scorer, mixed()), expected, within=1e-5)
    assert warnings() == []


def test_local_attention_that_only_the_masks_know_is_not_packed(warnings: Callable[[], list[str]]) -> None:
    """Its window of 20 tokens cannot show in the small batch of the check, but does in a longer one."""
    model = model_of(
        "Qwen2Moe",
        dtype=torch.float32,
        use_sliding_window=True,
        sliding_window=20,
        max_window_layers=0,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
    )
    expected = own_log_probs(model, mixed())
    scorer = ResponseScorer(model, "packed")
    assert scorer.packing == "padded"
    close(scored(scorer, mixed()), expected, within=1e-4)
    assert len(warnings()) == 1


def test_the_check_leaves_no_trace() -> None:
    model = llama()
    model.train()
    state = torch.get_rng_state()
    ResponseScorer(model, "packed")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value.grad is None for value in model.parameters())
    assert all(module.training for module in model.modules())


def test_a_model_with_packed_attention_still_works_as_usual() -> None:
    model = llama()
    token_ids = torch.tensor([draw(random.Random(0), 30)])
    before = cast("Any", model)(token_ids).logits
    ResponseScorer(model, "packed")
    close(cast("Any", model)(token_ids).logits, before)
