"""Attention over the packed layout: the block masks of FlexAttention, and what each kernel is asked for.

FlexAttention trains on CUDA only. Here it runs uncompiled on the CPU: there torch computes it without gradients, and
with them once its check of the device is out of the way, by the same operator that CUDA's kernels stand for.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.attention import flex_attention
from transformers import PreTrainedModel

from dppo import attention, logps
from dppo.attention import SharedPromptLayout
from dppo.batches import collate
from dppo.config import compose, load
from dppo.errors import UserError
from dppo.logps import ResponseScorer
from dppo.types import EncodedExample
from tests.runs import run_small
from tests.tiny_models import FAMILIES, SIZES, build, draw, example, gradients, llama, mixed, train_settings


@pytest.fixture
def trainable(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention with gradients on the CPU."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


def examples(*shapes: tuple[int, ...]) -> list[EncodedExample]:
    """Examples of these lengths: a prompt's and its responses'."""
    chance = random.Random(3)
    return [
        example(str(number), draw(chance, prompt), *(("ranked", draw(chance, length)) for length in responses))
        for number, (prompt, *responses) in enumerate(shapes)
    ]


SHAPES = {
    "one of everything": [(1, 1)],
    "K from 1 to 5": [(5, 4), (1, 7, 1), (9, 3, 3, 8), (2, 1, 1, 1, 1), (6, 2, 9, 4, 3, 5)],
    "several blocks": [(150, 40, 90), (20, 5), (3, 140, 30, 1)],
    "whole blocks": [(128, 128, 256), (128, 128)],
}


def dense(layout: SharedPromptLayout, window: int | None) -> Tensor:
    """(T, T) who sees whom, token by token."""
    told = [
        (number, place, position)
        for number, (n_prompt, responses) in enumerate(layout.examples)
        for place, length in enumerate((n_prompt, *responses))
        for position in range(n_prompt if place else 0, (n_prompt if place else 0) + length)
    ]
    seen = torch.zeros(len(told), len(told), dtype=torch.bool)
    for query, (owner, own, position) in enumerate(told):
        for key, (other, segment, at) in enumerate(told[: query + 1]):
            near = window is None or position - at < window
            seen[query, key] = owner == other and segment in (0, own) and near
    return seen


@pytest.mark.parametrize("window", [None, 1, 30], ids=lambda window: f"window {window}")
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_block_masks_say_who_sees_whom(shapes: list[tuple[int, ...]], window: int | None) -> None:
    layout = SharedPromptLayout.of(collate(examples(*shapes)), "flex")
    assert layout.blocks is not None and layout.grid is None
    mask, expected = layout.blocks.mask(window), dense(layout, window)
    place = torch.arange(len(expected))
    told = layout.blocks.visible(window)(place, place, place[:, None], place[None, :])
    assert torch.equal(told, expected)
    visible = layout.blocks.visible(window)
    theirs = flex_attention.create_block_mask(visible, None, None, len(expected), len(expected), device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(theirs, name)), name
    assert torch.equal(mask.to_dense(), theirs.to_dense())
    for kinds in ("", "full_"):
        for side in ("kv", "q"):
            number = getattr(mask, f"{kinds}{side}_num_blocks")[0, 0].tolist()
            own, other = (getattr(one, f"{kinds}{side}_indices")[0, 0].tolist() for one in (mask, theirs))
            listed = zip(number, own, other, strict=True)
            assert all(sorted(row[:n]) == sorted(known[:n]) for n, row, known in listed), (kinds, side)


def mistral(window: int) -> PreTrainedModel:
    config = transformers.MistralConfig(**{**SIZES, "num_key_value_heads": 2}, sliding_window=window)
    return build(transformers.MistralForCausalLM, config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **FAMILIES,
    "window of 30": lambda: mistral(30),
}


@pytest.mark.usefixtures("trainable")
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_flex_gives_the_log_probs_and_gradients_of_sdpa(model: Callable[[], PreTrainedModel]) -> None:
    built = model()
    drawn = [*mixed(), *examples((130, 20, 40))]
    weight = torch.linspace(-1, 2, sum(len(answer.token_ids) for item in drawn for answer in item.responses))
    found: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    for kernel in ("sdpa", "flex"):
        scorer = ResponseScorer(built, "packed", cast("Any", kernel))
        assert (scorer.packing, scorer.kernel) == ("packed", kernel)
        tokens = scorer(collate(drawn)).tokens
        (tokens * weight).sum().backward()
        found[kernel] = tokens.detach(), gradients(built)
    torch.testing.assert_close(found["flex"][0], found["sdpa"][0], rtol=0, atol=1e-9)
    for name, value in found["flex"][1].items():
        torch.testing.assert_close(value, found["sdpa"][1][name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.usefixtures("trainable")
def test_a_block_mask_is_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ResponseScorer(llama(), "packed", "flex")
    made: list[int] = []
    own = attention.Blocks.visible

    def counted(self: attention.Blocks, window: int | None) -> Any:
        made.append(len(self.position))
        return own(self, window)

    monkeypatch.setattr(attention.Blocks, "visible", counted)
    batch = collate(mixed())
    scorer(batch)
    assert made == [len(batch.token_ids)]


def test_flex_under_autocast_takes_tensors_of_one_type() -> None:
    """A rotation in fp32 raises queries and keys above the values, which FlexAttention refuses."""
    model = llama(dtype=torch.float32)
    model.requires_grad_(False)
    batch = collate(mixed())
    with torch.autocast("cpu", torch.bfloat16):
        found = {kernel: ResponseScorer(model, "packed", cast("Any", kernel))(batch) for kernel in ("sdpa", "flex")}
    torch.testing.assert_close(found["flex"].tokens, found["sdpa"].tokens, rtol=0, atol=0.02)


def test_a_device_without_its_backward_pass_falls_back_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    logps._warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="dppo")
    model = llama()
    for _ in range(2):
        scorer = ResponseScorer(model, "packed", "flex")
        assert (scorer.packing, scorer.kernel, scorer.own_logits) == ("packed", "sdpa", False)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dppo"]
    assert line.startswith("warning: LlamaForCausalLM: FlexAttention cannot be used (FlexAttention does not support")
    assert line.endswith("so its attention is torch's own")
    assert all(weight.grad is None for weight in model.parameters())


def test_flex_refuses_dropout() -> None:
    layout = SharedPromptLayout.of(collate(mixed()), "flex")
    heads = torch.zeros(1, 2, sum(layout.segments), 8)
    mask = torch.zeros(1, 1, 1, 1)
    with pytest.raises(TypeError, match="no dropout"):
        attention.shared_prompt_attention(torch.nn.Module(), heads, heads, heads, mask, dropout=0.1, dppo_layout=layout)


# --- which one a run takes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        ("cpu", {}, "sdpa"),
        ("mps", {}, "sdpa"),
        ("cuda", {}, "flex"),
        ("cuda", {"attention": "flex"}, "flex"),
        ("cuda", {"attention": "sdpa"}, "sdpa"),
        ("cuda", {"dropout": 0.1}, "sdpa"),
        ("cuda", {"packing": "padded"}, "sdpa"),
    ],
)
def test_auto_is_flex_where_that_works(device: str, changes: dict[str, Any], expected: str) -> None:
    assert train_settings(**changes).kernel(device) == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"packing": "padded"}, "attention=flex: needs packing=packed"),
        ({"dropout": 0.1}, "attention=flex: has no dropout: needs dropout=0"),
    ],
)
def test_flex_is_refused_where_it_can_do_nothing(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train_settings(attention="flex", **changes)
    train_settings(**changes)


def test_a_cpu_run_that_asks_for_flex_is_told_what_to_choose() -> None:
    words = ["train.attention=flex"]
    settings = load(compose(words), words).phases["main"].train
    with pytest.raises(UserError, match=r"train\.attention=flex: needs a CUDA device, this run is on cpu; choose"):
        settings.kernel("cpu")


def test_the_choice_of_a_kernel_alone_makes_no_other_model() -> None:
    """Those that come to the same kernel share what is cached; ``numerics`` tells the others apart."""
    assert train_settings(attention="sdpa").identity() == train_settings(attention="auto").identity()


def test_flex_on_a_cpu_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^train\.attention=flex: needs a CUDA device"):
        run_small(tmp_path, "loss=dpo", "train.attention=flex")
    assert not list((tmp_path / "cache").glob("*/*/manifest.json"))
