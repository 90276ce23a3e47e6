"""Greedy decoding: token for token what the model answers to each prompt alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from dppo.errors import UserError
from dppo.generation import Greedy, decoding, kv_cache, weights
from dppo.generation.decoding import parts_of_similar_length
from dppo.generation.weights import linear_weights_in_bf16, linear_weights_packed
from dppo.logps import ResponseScorer
from dppo.types import Generation
from tests.tiny_models import SIZES, VOCABULARY, build, gpt2, grouped_llama, llama

# One token in five ends an answer, so that rows end one after another.
ENDS = frozenset(range(4, VOCABULARY, 5))


def windowed() -> PreTrainedModel:
    """A token sees the last eight positions only, and the cache holds no more."""
    config = MistralConfig(**{**SIZES, "num_key_value_heads": 2, "sliding_window": 8})
    return build(MistralForCausalLM, config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "grouped_llama": grouped_llama,
    "gpt2": gpt2,
    "windowed": windowed,
}


def some_prompts(n: int = 24, *, longest: int = 20) -> list[tuple[str, list[int]]]:
    """Prompts of 1 to ``longest`` tokens; padding and end tokens occur in them as well."""
    generator = random.Random(0)
    return [
        (f"prompt-{number}", [generator.randrange(VOCABULARY) for _ in range(generator.randint(1, longest))])
        for number in range(n)
    ]


PROMPTS = some_prompts()
WIDTH = max(len(token_ids) for _, token_ids in PROMPTS)


def words(token_ids: Sequence[int]) -> str:
    return " ".join(str(token) for token in token_ids)


def answers(
    model: PreTrainedModel,
    prompts: Sequence[tuple[str, Sequence[int]]] = PROMPTS,
    *,
    ends: frozenset[int] = ENDS,
    max_new_tokens: int = 16,
    tokens_per_batch: int = 100_000,
) -> dict[str, Generation]:
    settings = Greedy(max_new_tokens, tokens_per_batch, "fp32")
    found = [answer for batch in settings.generate(model, prompts, ends, words) for answer in batch]
    assert len({answer.prompt_id for answer in found}) == len(found) == len(prompts)
    return {answer.prompt_id: answer for answer in found}


def one_by_one(
    model: PreTrainedModel, *, ends: frozenset[int] = ENDS, max_new_tokens: int = 16
) -> dict[str, tuple[int, ...]]:
    """The answers of transformers' own generation, each prompt in a call of its own."""
    found = {}
    cast("Any", model).generation_config.eos_token_id = None
    for prompt_id, token_ids in PROMPTS:
        prompt = torch.tensor([token_ids])
        output = cast("Any", model).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
            **({"eos_token_id": sorted(ends)} if ends else {}),
        )
        found[prompt_id] = tuple(output[0, len(token_ids) :].tolist())
    return found


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[PreTrainedModel], list[tuple[int, int]]]:
    """Watch a model: (rows, columns) of the token ids of every forward pass."""

    def watch(model: PreTrainedModel) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        model.register_forward_pre_hook(
            lambda module, args, given: seen.append(tuple(given["input_ids"].shape)),
            with_kwargs=True,
        )
        return seen

    return watch


Watch = Callable[[PreTrainedModel], list[tuple[int, int]]]
Shapes = Sequence[tuple[int, int]]


def read_and_written(seen: Shapes, n: int = len(PROMPTS)) -> tuple[Shapes, Shapes]:
    """The passes that read ``n`` prompts, each once, and those that write tokens."""
    for place in range(1, len(seen) + 1):
        if sum(n_rows for n_rows, _ in seen[:place]) == n:
            return seen[:place], seen[place:]
    raise AssertionError(f"no passes over {n} rows: {seen}")


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_each_prompt_alone(name: str, rows: Watch) -> None:
    model = MODELS[name]()
    expected = one_by_one(model)
    seen = rows(model)
    found = answers(model)
    assert {key: answer.token_ids for key, answer in found.items()} == expected
    # The test tests something: answers vary, end at many lengths, and some never end.
    assert len(set(expected.values())) > 18
    lengths = {len(token_ids) for token_ids in expected.values()}
    assert len(lengths) > 5
    # Rows leave the batch as they end, in several cuts.
    read, written = read_and_written(seen)
    sizes = [n_rows for n_rows, _ in written]
    assert sizes[0] <= 24 and sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2
    assert {n_columns for _, n_columns in written} == {1}
    assert sum(sizes) < 0.8 * 24 * len(sizes)
    # Short prompts are not padded to the longest, where the cache can be put together.
    assert (len(read) == 1) == (name == "windowed")
    assert read[-1][1] == WIDTH


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_new_tokens", [1, 2, 7])
def test_answers_stop_at_the_limit(name: str, max_new_tokens: int) -> None:
    model = MODELS[name]()
    expected = one_by_one(model, max_new_tokens=max_new_tokens)
    found = answers(model, max_new_tokens=max_new_tokens)
    assert {key: answer.token_ids for key, answer in found.items()} == expected
    for answer in found.values():
        assert 1 <= len(answer.token_ids) <= max_new_tokens
        assert not any(token in ENDS for token in answer.token_ids[:-1])
        assert answer.stopped_by == ("eos" if answer.token_ids[-1] in ENDS else "length")
        assert answer.stopped_by == "eos" or len(answer.token_ids) == max_new_tokens
        text = answer.token_ids[:-1] if answer.stopped_by == "eos" else answer.token_ids
        assert answer.text == words(text)
    if max_new_tokens == 7:
        assert {answer.stopped_by for answer in found.values()} == {"eos", "length"}


def test_without_end_tokens_every_answer_has_the_full_length(rows: Watch) -> None:
    model = llama()
    expected = one_by_one(model, ends=frozenset())
    seen = rows(model)
    found = answers(model, ends=frozenset())
    assert {key: answer.token_ids for key, answer in found.items()} == expected
    assert {(len(answer.token_ids), answer.stopped_by) for answer in found.values()} == {(16, "length")}
    assert read_and_written(seen)[1] == [(24, 1)] * 15  # no pass after the last token


def test_when_all_rows_end_there_is_no_further_pass(rows: Watch) -> None:
    model = llama()
    seen = rows(model)
    found = answers(model, ends=frozenset(range(VOCABULARY)))
    assert read_and_written(seen)[1] == []
    assert {(len(answer.token_ids), answer.text, answer.stopped_by) for answer in found.values()} == {(1, "", "eos")}


def test_prompts_are_read_in_parts_of_similar_length() -> None:
    lengths = [40, 300, 41, 44, 310, 43, 42, 170, 5, 305]
    assert parts_of_similar_length(lengths, "cpu") == [[8, 0, 2, 6, 5], [3], [7], [1, 9, 4]]
    # A device that many tokens are not too many for takes all at once.
    assert parts_of_similar_length(lengths, "cuda") == [sorted(range(10), key=lengths.__getitem__)]
    generator = random.Random(3)
    for _ in range(50):
        drawn = [generator.randint(1, 400) for _ in range(generator.randint(1, 60))]
        parts = parts_of_similar_length(drawn, "cpu")
        assert sorted(place for part in parts for place in part) == list(range(len(drawn)))
        longest = [max(drawn[place] for place in part) for part in parts]
        assert longest == sorted(longest)
        for part, most in zip(parts, longest, strict=True):
            padded = most * len(part)
            assert padded <= 256 or sum(drawn[place] for place in part) >= 0.9 * padded


@pytest.mark.parametrize("name", ["grouped_llama", "gpt2"])
@pytest.mark.parametrize("enough", [1, 40])
def test_how_prompts_are_read_changes_no_answer(name: str, enough: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name]()
    monkeypatch.setitem(decoding._TOKENS_READ_AT_ONCE, "cpu", 10_000)
    whole = answers(model)
    monkeypatch.setitem(decoding._TOKENS_READ_AT_ONCE, "cpu", enough)
    assert answers(model) == whole
    # Write_each takes prompts in any order.
    shuffled = random.Random(1).sample(PROMPTS, len(PROMPTS))
    with torch.inference_mode():
        found = decoding.write_each(
            model.eval(), [ids for _, ids in shuffled], 1, lambda logits, owners, step: logits.argmax(-1), ENDS, 16
        )
    assert [tuple(answer) for answer in found] == [whole[key].token_ids for key, _ in shuffled]


@pytest.mark.parametrize("budget", [1, 100, 400])
def test_the_budget_cuts_batches_and_changes_no_answer(budget: int, rows: Watch) -> None:
    model = gpt2()
    whole = answers(model)
    seen = rows(model)
    assert answers(model, tokens_per_batch=budget) == whole
    length = {prompt_id: len(token_ids) for prompt_id, token_ids in PROMPTS}
    for batch in Greedy(16, budget, "fp32").generate(model, PROMPTS, ENDS, words):
        widest = max(length[answer.prompt_id] for answer in batch)
        assert len(batch) == 1 or len(batch) * (widest + 16) <= budget
    if budget == 1:
        assert max(n_rows for n_rows, _ in seen) == 1
    if budget == 400:
        assert max(n_rows for n_rows, _ in seen) > 5


def test_batches_come_in_the_order_of_prompt_lengths() -> None:
    settings = Greedy(4, 200, "fp32")
    length = {prompt_id: len(token_ids) for prompt_id, token_ids in PROMPTS}
    made = [
        [length[answer.prompt_id] for answer in batch] for batch in settings.generate(llama(), PROMPTS, ENDS, words)
    ]
    assert len(made) > 2
    assert [item for batch in made for item in batch] == sorted(length.values())


def test_the_order_of_the_prompts_changes_nothing() -> None:
    """Nor for a bit of the batches: prompts are sorted by length and id."""
    model = llama(dtype=torch.float32)
    shuffled = random.Random(1).sample(PROMPTS, len(PROMPTS))
    assert answers(model, shuffled, tokens_per_batch=300) == answers(model, tokens_per_batch=300)


def test_equal_prompts_get_equal_answers() -> None:
    found = answers(llama(), [("a", [5, 6, 7]), ("b", [5, 6, 7]), ("c", [9])])
    assert found["a"].token_ids == found["b"].token_ids


def test_no_prompts_give_no_answers() -> None:
    assert answers(llama(), []) == {}


def test_a_model_in_training_answers_without_dropout() -> None:
    model = gpt2()
    expected = answers(model)
    model.train()
    assert answers(model) == expected


def test_a_model_that_was_scored_answers_the_same() -> None:
    """The packed layout replaces the model's attention."""
    model = grouped_llama()
    expected = answers(model)
    assert ResponseScorer(model, "packed").packing == "packed"
    assert answers(model) == expected


def test_bf16_is_another_decoding() -> None:
    model = llama(dtype=torch.float32)
    exact = answers(model)
    half = Greedy(16, 100_000, "bf16")
    found = {answer.prompt_id: answer for batch in half.generate(model, PROMPTS, ENDS, words) for answer in batch}
    assert found != exact and found.keys() == exact.keys()
    assert half.identity() != Greedy(16, 100_000, "fp32").identity()
    assert half.identity() == Greedy(16, 1, "bf16").identity() != Greedy(15, 1, "bf16").identity()


@pytest.mark.parametrize("model", [llama, gpt2])
def test_answers_beyond_the_models_positions_are_refused(model: Callable[[], PreTrainedModel]) -> None:
    built = model()
    prompts = [("a", [5] * 500), ("b", [5])]
    answers(built, prompts, max_new_tokens=12)
    with pytest.raises(UserError, match=r"^generation.max_new_tokens=13: the longest prompt has 500 tokens and the "):
        answers(built, prompts, max_new_tokens=13)


@pytest.mark.parametrize(("changed", "said"), [((0, 1), "max_new_tokens=0"), ((1, 0), "tokens_per_batch=0")])
def test_settings_out_of_range_are_refused(changed: tuple[int, int], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}: must be at least 1"):
        Greedy(*changed, "fp32")


def test_batches_are_made_when_they_are_asked_for(rows: Watch) -> None:
    """A stage stores each batch before the next is decoded."""
    model = llama()
    seen = rows(model)
    made: Iterator[list[Generation]] = Greedy(4, 1, "fp32").generate(model, PROMPTS, ENDS, words)
    assert seen == []
    next(made)
    assert 0 < len(seen) <= 4


@pytest.mark.parametrize("name", ["grouped_llama", "gpt2"])
def test_bf16_weights_made_once_are_those_of_autocast(name: str) -> None:
    model = MODELS[name]().float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    embedding = model.get_input_embeddings().weight
    prompt = torch.tensor([PROMPTS[0][1]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(prompt).logits
        with linear_weights_in_bf16(model):
            linear = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
            assert {one.dtype for module in linear for one in module.parameters()} == {torch.bfloat16}
            assert model.get_input_embeddings().weight is embedding
            assert torch.equal(model(prompt).logits, expected)
    with pytest.raises(KeyError), linear_weights_in_bf16(model):
        raise KeyError("an interruption")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.get_output_embeddings().weight is embedding
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.skipif(not weights._onednn_packs(), reason="this torch packs no weights")
def test_packed_weights_give_the_same_products_and_leave_no_trace() -> None:
    """Nothing is packed that is not a plain linear layer in fp32, nor where a layer's forward is somebody else's."""
    model = grouped_llama().float()
    ids = torch.tensor([PROMPTS[0][1], PROMPTS[0][1][::-1]])
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    other, before = layers[3], {key: value.clone() for key, value in model.state_dict().items()}
    own = other.forward
    other.forward = lambda *given: own(*given)  # type: ignore[method-assign]
    with torch.no_grad():
        expected = model(ids).logits
        with linear_weights_packed(model):
            assert sum("forward" in vars(one) for one in layers) == len(layers)
            assert "<lambda>" in other.forward.__qualname__
            found = model(ids).logits
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
        assert torch.equal(model(ids).logits, expected)
    assert [one for one in layers if "forward" in vars(one)] == [other]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(KeyError), linear_weights_packed(model):
        raise KeyError("an interruption")
    assert [one for one in layers if "forward" in vars(one)] == [other]
    with linear_weights_packed(llama(dtype=torch.float64)) as nothing:
        assert nothing is None


@pytest.mark.skipif(not weights._onednn_packs(), reason="this torch packs no weights")
def test_biases_and_shared_weights_are_packed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = nn.Linear(6, 5), nn.Linear(6, 5)
    second.weight = first.weight
    both = nn.ModuleList([first, second])
    given = torch.randn(3, 2, 6)
    with torch.inference_mode():
        expected = [one(given) for one in both]
        with linear_weights_packed(both):
            for one, wanted in zip(both, expected, strict=True):
                torch.testing.assert_close(one(given), wanted)
        monkeypatch.setattr(weights, "_MOST_PACKED", 5 * 6 * 4 - 1)
        with linear_weights_packed(both):  # one weight, counted once, is too large
            assert not any("forward" in vars(one) for one in both)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("room", [1, 3, 64])
def test_a_cache_with_room_holds_what_a_growing_one_holds(
    room: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values after a prompt, single tokens and a choice of rows; bf16: what attention would make of them."""
    monkeypatch.setattr(kv_cache, "_ROOM", room)
    model = grouped_llama().float()
    roomy, growing = kv_cache.roomy_cache(model.config), DynamicCache(config=model.config)
    token_ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for step in range(6):
            found, expected = (model(token_ids, past_key_values=one).logits[:, -1] for one in (roomy, growing))
            assert torch.equal(found, expected)
            token_ids = found.argmax(-1)[:, None]
            if step == 2:
                places = torch.tensor([2, 0, 2])
                token_ids = token_ids[places]
                for one in (roomy, growing):
                    one.batch_select_indices(places)
    for mine, theirs in zip(roomy.layers, growing.layers, strict=True):
        assert type(mine) is kv_cache.RoomyLayer and type(theirs) is DynamicLayer
        for own, other in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            assert own is not None and other is not None
            assert own.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
            assert torch.equal(own, other.to(own.dtype))


def test_layers_of_another_kind_keep_their_cache() -> None:
    model = windowed()
    assert not any(isinstance(one, kv_cache.RoomyLayer) for one in kv_cache.roomy_cache(model.config).layers)
