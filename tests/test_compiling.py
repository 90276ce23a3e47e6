"""``train.compile``: the same numbers from compiled layers, for rows of any length, and plain words where it fails."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dppo import compiling
from dppo.batches import collate
from dppo.compiling import check_compiler, compile_layers
from dppo.errors import UserError
from dppo.logps import ResponseScorer
from dppo.loop import set_dropout
from dppo.types import Batch, Role
from tests.runs import run_small
from tests.tiny_models import VOCABULARY, example, gpt2, llama, train_settings

ROLES: tuple[Role, ...] = ("chosen", "rejected", "generated")


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What one test compiled is not found by the next."""
    compiling.check_compiler.cache_clear()
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def rows(n_examples: int, n_responses: int, longest: int) -> Batch:
    draw = random.Random(longest)

    def ids(most: int) -> list[int]:
        return [draw.randrange(1, VOCABULARY) for _ in range(draw.randint(2, most))]

    return collate(
        [example(str(n), ids(longest), *[(role, ids(20)) for role in ROLES[:n_responses]]) for n in range(n_examples)]
    )


@pytest.mark.parametrize(
    ("family", "backend"),
    [
        (llama, "aot_eager"),
        pytest.param(gpt2, "aot_eager", marks=pytest.mark.slow),
        pytest.param(llama, "inductor", marks=pytest.mark.slow),
        pytest.param(gpt2, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_give_the_same_log_probs_and_gradients_at_any_length(
    family: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_BACKEND", backend)
    torch._dynamo.utils.counters.clear()
    models = [family(dtype=torch.float32).train(), family(dtype=torch.float32).train()]
    for model in models:
        set_dropout(model, 0.0)
    plain, fast = (ResponseScorer(model, "packed") for model in models)
    names = list(models[1].state_dict())
    fast.compile_layers()
    assert list(models[1].state_dict()) == names
    made = []
    # Examples of 96 tokens and less share an attention call, longer ones do not.
    for batch in [rows(2, 2, 20), rows(3, 3, 40), rows(1, 1, 150), rows(4, 2, 120)]:
        expected, found = plain(batch).tokens, fast(batch).tokens
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        expected.sum().backward()
        found.sum().backward()
        for own, other in zip(models[1].parameters(), models[0].parameters(), strict=True):
            torch.testing.assert_close(
                own.grad, other.grad, rtol=1e-4, atol=1e-4 * float(cast("Any", other.grad).abs().max())
            )
        for model in models:
            model.zero_grad()
        made.append(graphs())
    # Once for all lengths; a part behind the attention once more, because its output may lie otherwise in memory.
    assert 1 <= made[0] == made[1] and made[-1] <= made[0] + 1

    prompt = torch.tensor([[1, 5, 9]])
    with fast.own_attention():
        own = models[1].generate(prompt, max_new_tokens=8, do_sample=False)
    assert graphs() == made[-1], "decoding is not compiled"
    with plain.own_attention():
        assert torch.equal(own, models[0].generate(prompt, max_new_tokens=8, do_sample=False))
    assert torch.equal(fast(rows(2, 2, 20)).tokens, fast(rows(2, 2, 20)).tokens)
    assert graphs() == made[-1], "and training goes on with what was compiled"


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_run_trains_and_scores_its_reference_with_compiled_layers(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_BACKEND", backend)
    torch._dynamo.utils.counters.clear()
    words = ("loss=unll", "penalty=linear", "train.evaluate_every=null", "train.steps=3", "tracking=none")
    plain = run_small(tmp_path, *words)
    assert graphs() == 0
    fast = run_small(tmp_path, *words, "train.compile=true")
    assert graphs() >= 2  # with gradients, and without for the reference
    assert fast.built[:2] == ["reference", "preference"]  # y_gen is shared, and SFT has settings of its own
    for own, other in zip(fast.metrics, plain.metrics, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/logps/chosen"):
            assert (name in own) == (name in other)
            if name in own:
                assert own[name] == pytest.approx(other[name], rel=1e-3)
    again = run_small(tmp_path, *words, "train.compile=true", "alpha=0.5")
    assert "reference" not in again.built and "preference" in again.built


def test_a_model_without_layers_is_refused() -> None:
    model = llama()
    model._no_split_modules = set()
    with pytest.raises(UserError, match=r"^train\.compile=true: LlamaForCausalLM does not say which of its"):
        compile_layers(model)


def test_a_machine_without_a_compiler_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    without = config.patch({"cpp.cxx": ("no-such-compiler",)})
    with fresh_cache(), without, pytest.raises(UserError) as caught:
        run_small(tmp_path, "loss=dpo", "train.compile=true")
    line = str(caught.value)
    assert line.startswith("train.compile=true: torch.compile fails on this machine (") and "\n" not in line
    assert line.endswith("install a C++ compiler (apt-get install g++), or choose train.compile=false")
    assert not list(tmp_path.glob("cache/sft/*/manifest.json"))
    check_compiler("cpu")


def test_compiling_is_no_part_of_the_settings_but_of_the_numerics() -> None:
    assert train_settings(compile=True).identity() == train_settings().identity()
