"""The training loop: the same trajectory whatever the cut, the layout, an interruption or the number of processes."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel

from dppo import loop
from dppo.artifacts.files import hash_file
from dppo.batches import batches, collate
from dppo.config import LoraSettings, TrainSettings
from dppo.data.shapes import with_answers_to_other_prompts
from dppo.errors import UserError
from dppo.logps import ResponseScorer
from dppo.loop import (
    Interrupted,
    Metrics,
    Outcome,
    ReferenceLogps,
    checkpoint_step,
    context_of,
    learning_rate,
    likelihoods,
    n_steps,
    stored_logps,
    train,
)
from dppo.losses.pairwise import DPO
from dppo.losses.penalised import UnLL
from dppo.losses.penalties import Linear, Quadratic
from dppo.losses.sft import SFT
from dppo.losses.unpaired import KTO
from dppo.stopping import REQUESTS
from dppo.types import EncodedExample, EncodedResponse, LossContext, LossTerms, Objective, ResponseLogps, Role, Shape
from tests import two_ranks
from tests.conftest import once
from tests.losses.pairs import logps
from tests.running_margin import RunningMargin
from tests.tiny_models import (
    VOCABULARY,
    build,
    draw,
    example,
    gpt2,
    llama,
    own_log_probs,
    pairs,
    stored,
    train_settings,
)

EXAMPLES = pairs(10)
HELD_OUT = pairs(4, seed=1)
LOSSES: dict[str, Objective] = {
    "sft": SFT(),
    "dpo": DPO(beta=0.5, label_smoothing=0.0, sft_weight=0.0, nll="mean"),
}


@pytest.fixture(autouse=True)
def _deterministic_as_before() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@dataclasses.dataclass
class Run:
    """A training run in a folder of its own, which can be entered again."""

    folder: Path
    model: PreTrainedModel
    rows: list[Metrics] = dataclasses.field(default_factory=list)
    on_log: Callable[[Metrics], None] = lambda row: None

    def __call__(
        self,
        objective: Objective,
        settings: TrainSettings,
        *,
        examples: Sequence[EncodedExample] = EXAMPLES,
        reference: ReferenceLogps | None = None,
        held_out: Sequence[EncodedExample] = (),
        seed: int = 7,
    ) -> Outcome:
        def log(row: Metrics) -> None:
            self.rows.append(row)
            self.on_log(row)

        return train(
            self.model,
            objective,
            examples,
            settings,
            seed=seed,
            accelerator=Accelerator(cpu=True),
            log=log,
            checkpoints=self.folder,
            reference=reference,
            held_out=held_out,
        )

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.named_parameters()}

    @property
    def values(self) -> list[Metrics]:
        """The logged rows without what a clock says."""
        return [
            {name: value for name, value in row.items() if not name.endswith(("seconds_per_step", "per_second"))}
            for row in self.rows
        ]


def close(found: dict[str, Tensor], expected: dict[str, Tensor], within: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        off = float((value - expected[name]).abs().max())
        assert off <= within, f"{name}: {off}"


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def moved(found: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    return max(float((found[name] - start[name]).abs().max()) for name in start)


# --- settings and schedule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"tokens_per_micro_batch": 0}, "tokens_per_micro_batch=0: must be at least 1"),
        ({"log_every": 0}, "log_every=0: must be at least 1"),
        ({"n_evaluation_examples": 0}, "n_evaluation_examples=0: must be at least 1"),
        ({"n_examples": 0}, "n_examples=0: must be at least 1, or null"),
        ({"steps": 0}, "steps=0: must be at least 1, or null"),
        ({"steps": None, "epochs": 0}, "epochs=0: must be at least 1, or null"),
        ({"evaluate_every": 0}, "evaluate_every=0: must be at least 1, or null"),
        ({"checkpoint_every": 0}, "checkpoint_every=0: must be at least 1, or null"),
        ({"epochs": 1}, "steps=5: give either steps or epochs"),
        ({"steps": None}, "steps=null: give either steps or epochs"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be > 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan: must be > 0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio=1.5: must be in [0, 1]"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must be >= 0"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0: must be in [0, 1)"),
        ({"adam_beta2": -0.5}, "adam_beta2=-0.5: must be in [0, 1)"),
        ({"adam_epsilon": 0.0}, "adam_epsilon=0.0: must be > 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0: must be > 0"),
        ({"dropout": 1.0}, "dropout=1.0: must be in [0, 1)"),
        ({"max_length": 0}, "max_length=0"),
        ({"max_length": "p101"}, "max_length=p101"),
        ({"save": "best"}, "save=best: needs evaluations to choose from"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        train_settings(**changes)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 0}, "rank=0: must be at least 1"),
        ({"lora_alpha": 0.0}, "lora_alpha=0.0: must be > 0"),
        ({"dropout": 1.0}, "dropout=1.0: must be in [0, 1)"),
    ],
)
def test_adapter_settings_out_of_range_are_refused(changes: dict[str, Any], said: str) -> None:
    settings: dict[str, Any] = {
        "rank": 4,
        "lora_alpha": 8.0,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "base_4bit": False,
    }
    with pytest.raises(UserError) as error:
        LoraSettings(**{**settings, **changes})
    assert str(error.value) == said


def test_steps_or_epochs() -> None:
    assert n_steps(train_settings(steps=3), 100) == 3
    assert n_steps(train_settings(steps=None, epochs=2, batch_size=4), 10) == 6  # 4 + 4 + 2, twice


def test_learning_rates_by_hand() -> None:
    """Ten steps, two of them warm-up: 1/2 and 2/2 of the rate, then down from done = 0, 1/8, ..., 7/8."""

    def rates(schedule: str, **changes: Any) -> list[float]:
        settings = train_settings(schedule=schedule, learning_rate=2.0, **changes)
        return [learning_rate(settings, step, 10) for step in range(10)]

    done = [number / 8 for number in range(8)]
    assert rates("constant", warmup_ratio=0.2) == [1.0, 2.0] + [2.0] * 8
    assert rates("linear", warmup_ratio=0.2) == pytest.approx([1.0, 2.0] + [2 * (1 - part) for part in done])
    cosine = rates("cosine", warmup_ratio=0.2)
    assert cosine[:3] == [1.0, 2.0, 2.0]
    assert cosine[6] == pytest.approx(1.0)  # half of the way: 2 * (1 + cos(pi / 2)) / 2
    assert cosine[4] == pytest.approx(1 + math.sqrt(0.5))  # a quarter: 2 * (1 + cos(pi / 4)) / 2
    assert rates("linear") == pytest.approx([2 * (1 - number / 10) for number in range(10)])
    assert rates("linear", warmup_ratio=1.0) == pytest.approx([0.2 * number for number in range(1, 11)])


def test_warm_up_is_not_lengthened_by_rounding() -> None:
    """0.07 * 100 is 7.000000000000001 in floating point: seven steps of warm-up all the same."""
    settings = train_settings(warmup_ratio=0.07, learning_rate=1.0)
    assert learning_rate(settings, 6, 100) == 1.0
    assert learning_rate(settings, 5, 100) == pytest.approx(6 / 7)


# --- the trajectory --------------------------------------------------------------------------------------------------


def naive_loss(name: str, model: PreTrainedModel, reference: PreTrainedModel, batch: list[EncodedExample]) -> Tensor:
    """The mean loss of an optimiser batch, straight from its definition."""

    def total(of: PreTrainedModel, item: EncodedExample, role: Role) -> Tensor:
        answer = item.response(role)
        assert answer is not None
        return own_log_probs(of, [dataclasses.replace(item, responses=(answer,))]).sum()

    if name == "sft":
        lengths = [len(answer.token_ids) for item in batch for answer in item.responses if answer.role == "chosen"]
        return -torch.stack([total(model, item, "chosen") for item in batch]).sum() / sum(lengths)
    margins = [
        total(model, item, "chosen")
        - total(model, item, "rejected")
        - (total(reference, item, "chosen") - total(reference, item, "rejected")).detach()
        for item in batch
    ]
    return -F.logsigmoid(0.5 * torch.stack(margins)).mean()


@pytest.mark.parametrize("name", LOSSES)
def test_the_trajectory_is_that_of_a_naive_loop(name: str, tmp_path: Path) -> None:
    """Order, mean, clipping, schedule, AdamW and its decay on matrices only, written out a second time."""
    settings = train_settings(
        schedule="cosine", warmup_ratio=0.4, weight_decay=0.1, max_grad_norm=0.05, tokens_per_micro_batch=40
    )
    run = Run(tmp_path, gpt2())
    run(LOSSES[name], settings, reference=stored(gpt2(seed=5), EXAMPLES) if name == "dpo" else None)

    model, reference = gpt2(), gpt2(seed=5)
    matrices = [value for value in model.parameters() if value.ndim > 1]
    others = [value for value in model.parameters() if value.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    for step, batch in enumerate(batches(EXAMPLES, 4, 5, seed=7)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(settings, step, 5)
        loss = naive_loss(name, model, reference, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimiser.step()
        optimiser.zero_grad()
        row = run.rows[step]
        assert row["step"] == step + 1
        assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert row["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-7)
        assert row["train/learning_rate"] == learning_rate(settings, step, 5)
        assert norm > 0.05
    # GPT-2's attention ignores its key biases: their gradients are rounding noise, which Adam blows up.
    found, expected = run.weights, {key: value.detach() for key, value in model.named_parameters()}
    for key in found:
        if key.endswith("c_attn.bias"):
            found[key], expected[key] = (
                found[key][[*range(32), *range(64, 96)]],
                expected[key][[*range(32), *range(64, 96)]],
            )
    close(found, expected, within=1e-9)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_cut_into_micro_batches_changes_nothing(
    name: str, dtype: torch.dtype, within: float, tmp_path: Path
) -> None:
    reference = stored(llama(dtype=dtype, seed=5), EXAMPLES + HELD_OUT) if name == "dpo" else None
    runs = {}
    for budget in (1, 45, 1_000_000):
        runs[budget] = Run(tmp_path / str(budget), llama(dtype=dtype))
        settings = train_settings(
            tokens_per_micro_batch=budget, learning_rate=1e-3, adam_epsilon=1e-6, evaluate_every=2
        )
        runs[budget](LOSSES[name], settings, reference=reference, held_out=HELD_OUT)
    assert moved(runs[1].weights, Run(tmp_path, llama(dtype=dtype)).weights) > 1e-3
    for budget in (1, 45):
        close(runs[budget].weights, runs[1_000_000].weights, within)
        for row, other in zip(runs[budget].values, runs[1_000_000].values, strict=True):
            assert row == pytest.approx(other, rel=1e-3 if dtype == torch.float32 else 1e-6, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_layout_and_activation_checkpointing_change_nothing(name: str, tmp_path: Path) -> None:
    reference = stored(llama(seed=5), EXAMPLES) if name == "dpo" else None
    weights = []
    variants: list[dict[str, Any]] = [
        {},
        {"packing": "padded"},
        {"activation_checkpointing": True, "tokens_per_micro_batch": 30},
    ]
    for number, changes in enumerate(variants):
        run = Run(tmp_path / str(number), llama())
        run(LOSSES[name], train_settings(**changes), reference=reference)
        weights.append(run.weights)
    close(weights[1], weights[0], 1e-9)
    close(weights[2], weights[0], 1e-9)


def test_the_same_seed_gives_the_same_run_in_any_order_of_the_examples(tmp_path: Path) -> None:
    weights = []
    for number, (examples, seed) in enumerate([(EXAMPLES, 7), (EXAMPLES[::-1], 7), (EXAMPLES, 8)]):
        run = Run(tmp_path / str(number), llama(dtype=torch.float32))
        run(SFT(), train_settings(), examples=examples, seed=seed)
        weights.append(run.weights)
    same(weights[1], weights[0])
    assert moved(weights[2], weights[0]) > 1e-3


def test_evaluation_does_not_disturb_training(tmp_path: Path) -> None:
    runs = []
    for every in (None, 1):
        run = Run(tmp_path / str(every), gpt2(dtype=torch.float32))
        run(SFT(), train_settings(dropout=0.2, evaluate_every=every), held_out=HELD_OUT)
        runs.append(run)
    same(runs[1].weights, runs[0].weights)
    assert [row["step"] for row in runs[1].rows if "eval/loss" in row] == [0, 1, 2, 3, 4, 5]


def test_bf16_keeps_weights_and_log_softmax_in_fp32(tmp_path: Path) -> None:
    runs = []
    for precision in ("fp32", "bf16"):
        run = Run(tmp_path / precision, llama(dtype=torch.float32))
        run(SFT(), train_settings(precision=precision, steps=1))
        runs.append(run)
    exact, rounded = runs
    assert all(value.dtype == torch.float32 for value in rounded.weights.values())
    assert rounded.rows[0]["train/loss"] != exact.rows[0]["train/loss"]
    assert rounded.rows[0]["train/loss"] == pytest.approx(exact.rows[0]["train/loss"], rel=0.05)


def test_adapters_alone_are_trained_and_continued(tmp_path: Path) -> None:
    def adapted() -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            wrapped = get_peft_model(llama(dtype=torch.float32), LoraConfig(r=2, target_modules="all-linear"))
        return cast("PreTrainedModel", wrapped)

    undisturbed = Run(tmp_path / "a", adapted())
    start = undisturbed.weights
    undisturbed(SFT(), train_settings())
    changed = {name for name, value in undisturbed.weights.items() if not torch.equal(value, start[name])}
    assert changed == {name for name in start if "lora_" in name}
    stopped = Run(tmp_path / "b", adapted())
    stopped.on_log = lambda row: interrupt() if row["step"] == 2 else None
    with pytest.raises(Interrupted):
        stopped(SFT(), train_settings())
    resumed = Run(tmp_path / "b", adapted())
    resumed(SFT(), train_settings())
    same(resumed.weights, undisturbed.weights)


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_0_makes_train_and_eval_mode_the_same_function(tmp_path: Path) -> None:
    model = gpt2()
    batch = collate(EXAMPLES)
    exact = ResponseScorer(model, "packed")(batch).tokens
    run = Run(tmp_path, model)
    run.model.train()
    assert not torch.equal(ResponseScorer(model, "packed")(batch).tokens, exact)  # its own dropout is 0.1
    loop.set_dropout(model, 0.0)
    assert torch.equal(ResponseScorer(model, "packed")(batch).tokens, exact)
    run(SFT(), train_settings(steps=1))
    assert model.training
    own = ResponseScorer(model, "packed")(batch).tokens
    model.eval()
    assert torch.equal(ResponseScorer(model, "packed")(batch).tokens, own)


def test_functional_dropout_is_set_as_well() -> None:
    """OPT reads its dropout of 0.1 from attributes of the layers, not from modules."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        attention_dropout=0.1,
    )
    model: Any = build(OPTForCausalLM, config)
    token_ids = torch.tensor([[3, 4, 5, 6]])
    exact = model(token_ids).logits
    model.train()
    assert not torch.equal(model(token_ids).logits, exact)
    loop.set_dropout(model, 0.0)
    assert torch.equal(model(token_ids).logits, exact)


def test_adapters_keep_their_own_dropout() -> None:
    model = get_peft_model(gpt2(), LoraConfig(r=2, lora_dropout=0.3, target_modules=["c_attn"], fan_in_fan_out=True))
    loop.set_dropout(model, 0.0)
    rates = {("lora" in name, module.p) for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert rates == {(True, 0.3), (False, 0.0)}


def test_dropout_of_the_settings_is_used(tmp_path: Path) -> None:
    losses = []
    for dropout in (0.0, 0.5):
        run = Run(tmp_path / str(dropout), gpt2())
        run(SFT(), train_settings(steps=1, dropout=dropout))
        losses.append(run.rows[0]["train/loss"])
    assert losses[0] != losses[1]


# --- statistics ------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_whole_optimiser_batch(tmp_path: Path) -> None:
    runs = {}
    for budget in (1, 1_000_000):
        runs[budget] = Run(tmp_path / str(budget), llama())
        runs[budget](
            RunningMargin(), train_settings(tokens_per_micro_batch=budget, evaluate_every=5), held_out=HELD_OUT
        )
    close(runs[1].weights, runs[1_000_000].weights, 1e-9)
    rows = runs[1].rows
    assert [row["train/updates"] for row in rows if "train/updates" in row] == [1, 2, 3, 4, 5]
    # By hand: the state before the first step is 0, and the loss sees the state that this batch has moved.
    batch = next(batches(EXAMPLES, 4, 1, seed=7))
    found = ResponseScorer(llama(), "padded")(collate(batch))
    assert rows[1]["train/average"] == pytest.approx(0.5 * (found.chosen.mean - found.rejected.mean).mean().item())
    # Evaluation takes the state as it is.
    assert (rows[-1]["eval/updates"], rows[-1]["eval/average"]) == (5, rows[-2]["train/average"])


def test_statistics_of_micro_batches_follow_each_of_them(tmp_path: Path) -> None:
    whole, each, apart = (
        Run(tmp_path / "whole", llama()),
        Run(tmp_path / "each", llama()),
        Run(tmp_path / "apart", llama()),
    )
    whole(RunningMargin(), train_settings())
    each(RunningMargin("micro_batch"), train_settings())
    close(each.weights, whole.weights, 1e-9)  # one micro-batch a step
    apart(RunningMargin("micro_batch"), train_settings(tokens_per_micro_batch=1))
    assert [row["train/updates"] for row in apart.rows] == pytest.approx([2.5, 6.5, 9.5, 12.5, 16.5])  # 4 4 2 4 4
    assert moved(apart.weights, whole.weights) > 1e-3


KTO_SETTINGS: dict[str, Any] = {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.0, "value": "sigmoid"}


def kto(**changed: Any) -> KTO:
    return KTO(**{**KTO_SETTINGS, "z0": "kl", "z_scope": "optimiser_batch", "one_per_prompt": False, **changed})


def test_kto_takes_z_from_answers_to_other_prompts_of_the_whole_batch(tmp_path: Path) -> None:
    """By hand: KL is the mean of s(y'|x) - s^r(y'|x) over the batch, and z = beta max(0, KL)."""
    examples = with_answers_to_other_prompts(EXAMPLES, None, seed=0)
    reference = stored(llama(seed=5), [*examples, *HELD_OUT])
    runs = {}
    for budget in (1, 1_000_000):
        runs[budget] = Run(tmp_path / str(budget), llama())
        settings = train_settings(tokens_per_micro_batch=budget, evaluate_every=5)
        runs[budget](kto(), settings, examples=examples, reference=reference, held_out=HELD_OUT)
    close(runs[1].weights, runs[1_000_000].weights, 1e-9)
    batch = next(batches(examples, 4, 1, seed=7))
    with torch.no_grad():
        own = ResponseScorer(llama(), "padded")(collate(batch))
        theirs = ResponseScorer(llama(seed=5), "padded")(collate(batch))
    gaps = own.sum - theirs.sum
    kl = float(torch.stack([gap for gap, role in zip(gaps, own.roles, strict=True) if role == "mismatched"]).mean())
    rows = {row["step"]: row for row in runs[1].rows if "train/kl" in row}
    assert rows[1]["train/kl"] == pytest.approx(max(0.0, kl))
    assert any(row["train/kl"] > 0 for row in rows.values())
    x = [0.5 * float(gap) - 0.5 * max(0.0, kl) for gap in gaps]
    values = [
        1 / (1 + math.exp(one if role == "chosen" else -one))
        for one, role in zip(x, own.roles, strict=True)
        if role != "mismatched"
    ]
    assert rows[1]["train/loss"] == pytest.approx(sum(values) / 8)
    # Answers to other prompts are computed without gradients, and not at all in the pass that has some.
    kept = sum(len(one.prompt_ids) + sum(len(r.token_ids) for r in one.responses[:2]) for one in batch)
    assert rows[1]["train/computed_tokens"] == kept
    assert runs[1].rows[-1]["eval/kl"] == rows[5]["train/kl"]  # frozen


def test_kto_of_micro_batches_is_kto_of_the_batch_where_there_is_one(tmp_path: Path) -> None:
    examples = with_answers_to_other_prompts(EXAMPLES, None, seed=0)
    reference = stored(llama(seed=5), examples)
    whole, one, each = (Run(tmp_path / name, llama()) for name in ("whole", "one", "each"))
    whole(kto(), train_settings(), examples=examples, reference=reference)
    one(kto(z_scope="micro_batch"), train_settings(), examples=examples, reference=reference)
    close(one.weights, whole.weights, 1e-9)
    cut = train_settings(tokens_per_micro_batch=1)
    each(kto(z_scope="micro_batch"), cut, examples=examples, reference=reference)
    assert moved(each.weights, whole.weights) > 1e-6


# --- what is logged ------------------------------------------------------------------------------------------------


def test_log_probs_are_logged_as_change_from_step_0_also_after_an_interruption(tmp_path: Path) -> None:
    settings = train_settings(evaluate_every=2)
    whole = Run(tmp_path / "whole", llama())
    whole(LOSSES["sft"], settings, held_out=HELD_OUT)
    evaluated = [row for row in whole.rows if "eval/loss" in row]
    assert [row["step"] for row in evaluated] == [0, 2, 4, 5]
    start = own_log_probs(llama(), [dataclasses.replace(one, responses=one.responses[:1]) for one in HELD_OUT])
    assert evaluated[0]["eval/logps/chosen"] == pytest.approx(float(start.sum()) / len(HELD_OUT))
    assert not any("logps_change" in name for name in evaluated[0])
    for row in evaluated[1:]:
        for name in ("chosen", "chosen_per_token", "rejected", "rejected_per_token"):
            change = row[f"eval/logps/{name}"] - evaluated[0][f"eval/logps/{name}"]
            assert row[f"eval/logps_change/{name}"] == pytest.approx(change)
            assert change != 0

    def stop(row: Metrics) -> None:
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    broken = Run(tmp_path / "broken", llama(), on_log=stop)
    with pytest.raises(Interrupted):
        broken(LOSSES["sft"], settings, held_out=HELD_OUT)
    again = Run(tmp_path / "broken", llama())
    again(LOSSES["sft"], settings, held_out=HELD_OUT)
    assert again.values[-1] == whole.values[-1]


def test_what_an_example_lacks_is_left_out_of_means() -> None:
    """Log-probs by hand for a chosen answer alone, two desirable ones, and an undesirable one."""
    policy = logps(
        {"chosen": [-0.5, -1.5]},
        [("desirable", [-1.0]), ("desirable", [-3.0])],
        [("undesirable", [-4.0]), ("mismatched", [-9.0])],
    )
    reference = dataclasses.replace(policy, tokens=policy.tokens * 2)
    found = likelihoods(policy, reference)
    nan = math.nan
    expected = {
        "logps/chosen": [-2.0, nan, nan],
        "logps/chosen_per_token": [-1.0, nan, nan],
        "log_ratio/chosen": [2.0, nan, nan],
        "logps/desirable": [nan, -2.0, nan],
        "log_ratio/desirable_per_token": [nan, 2.0, nan],
        "logps/undesirable": [nan, nan, -4.0],
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(values, dtype=torch.float64), equal_nan=True)
    assert not any("mismatched" in name or "margin" in name or "rejected" in name for name in found)
    own = logps({"chosen": [-1.0], "rejected": [-1.0, -1.0]})
    pair = likelihoods(own, logps({"chosen": [-3.0], "rejected": [-1.0, -2.0]}))
    wanted = {
        "margin": 1.0,
        "margin_per_token": 0.0,
        "margin_to_reference": 1.0,
        "margin_to_reference_per_token": 1.5,
        "accuracy": 1.0,
        "accuracy_per_token": 0.5,
        "accuracy_to_reference": 1.0,
        "accuracy_to_reference_per_token": 1.0,
    }
    assert {name: float(pair[name]) for name in wanted} == wanted


def test_the_gradient_ratio_is_that_of_penalty_and_base(tmp_path: Path) -> None:
    """By hand: gradients of base and of the whole loss by autograd on the whole batch, their difference the penalty."""
    generator = random.Random(4)
    roles: tuple[Role, ...] = ("chosen", "rejected", "generated")
    examples = [example(f"t{n}", draw(generator, 4), *((role, draw(generator, 5)) for role in roles)) for n in range(4)]
    reference = stored(llama(seed=5), examples)
    loss = UnLL(
        alpha=0.3,
        penalty=Linear(),
        base=LOSSES["dpo"],  # type: ignore[arg-type]
        margin="sum",
        detach=True,
        mask_shared_prefix=False,
        level="token_mean",
    )
    settings = train_settings(steps=1, batch_size=4, evaluate_every=1, tokens_per_micro_batch=30)
    run, without = Run(tmp_path / "with", llama()), Run(tmp_path / "without", llama())
    run(loss, settings, examples=examples, reference=reference, held_out=examples)
    off = dataclasses.replace(settings, penalty_gradient_ratio=False)
    without(loss, off, examples=examples, reference=reference, held_out=examples)
    same(run.weights, without.weights)  # measuring changes nothing
    assert not any("train/penalty_gradient_ratio" in row for row in without.rows)

    model = llama()
    batch = collate(examples)
    policy = ResponseScorer(model, "padded")(batch)
    theirs = stored_logps(reference, batch, policy)
    gradients = []
    for objective in (loss, loss.base):
        value = objective(policy, theirs, context_of(batch, 1.0, None)).value.sum()
        gradients.append(torch.autograd.grad(value, list(model.parameters()), retain_graph=True))
    penalty = torch.cat([(a - b).flatten() for a, b in zip(*gradients, strict=True)]).norm()
    base = torch.cat([b.flatten() for b in gradients[1]]).norm()
    assert run.rows[-1]["train/penalty_gradient_ratio"] == pytest.approx(float(penalty / base))
    assert float(penalty) > 0


# --- divergence ------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged(tmp_path: Path) -> None:
    settings = train_settings(
        tokens_per_micro_batch=1, checkpoint_every=1, evaluate_every=1, save="best", learning_rate=1e-3
    )
    bad = [batch for batch in batches(EXAMPLES, 4, 3, seed=7)][2][0]
    rows = stored(llama(seed=5), EXAMPLES + HELD_OUT)

    def reference(keys: Sequence[tuple[str, str]]) -> list[Tensor]:
        found = rows(keys)
        return [row * math.nan if key[0] == bad.prompt_id else row for key, row in zip(keys, found, strict=True)]

    run = Run(tmp_path / "bad", llama())
    outcome = run(LOSSES["dpo"], settings, reference=reference, held_out=HELD_OUT)
    two = Run(tmp_path / "good", llama())
    assert (
        two(LOSSES["dpo"], dataclasses.replace(settings, steps=2, save="last"), reference=rows, held_out=HELD_OUT).steps
        == 2
    )
    assert (outcome.status, outcome.steps, outcome.example_ids) == ("diverged", 2, (bad.example_id,))
    assert outcome.computed_tokens == run.rows[-1].get("train/computed_tokens", run.rows[-2]["train/computed_tokens"])
    assert outcome.to_json()["example_ids"] == [bad.example_id]
    assert checkpoint_step(tmp_path / "bad") == 2
    same(run.weights, two.weights)  # the step that failed has left no trace


@dataclasses.dataclass(frozen=True)
class Kink:
    """A finite loss whose gradient is not: the square root at 0."""

    name = "kink"
    uses_reference = False
    uses_roles: tuple[Role, ...] = ("chosen",)
    uses_statistics = False
    trains_on: Shape = "pairs"

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms:
        value = (policy.chosen.sum * 0).sqrt()
        return LossTerms(value, torch.ones_like(value.detach()))


def test_a_gradient_that_is_not_finite_ends_the_run_as_diverged(tmp_path: Path) -> None:
    run = Run(tmp_path, llama())
    start = run.weights
    outcome = run(Kink(), train_settings())
    (batch,) = batches(EXAMPLES, 4, 1, seed=7)
    assert (outcome.status, outcome.steps) == ("diverged", 0)
    assert outcome.example_ids == tuple(item.example_id for item in batch)
    same(run.weights, start)
    assert list(tmp_path.iterdir()) == []


# --- interruptions ---------------------------------------------------------------------------------------------------


def interrupt(*signals: signal.Signals) -> None:
    """Send this process signals from another thread, and wait until they are there."""
    for number in signals or (signal.SIGTERM,):
        thread = threading.Thread(target=os.kill, args=(os.getpid(), number))
        thread.start()
        thread.join()
        # Any thread may receive it, a moment later; two pending signals of one number would count as one.
        time.sleep(0.2 if len(signals) < 2 else 2.0)


@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("case", ["sft with dropout", "dpo", "statistics", "best"])
def test_an_interrupted_run_continues_as_if_nothing_had_happened(case: str, step: int, tmp_path: Path) -> None:
    objective: Objective = {"dpo": LOSSES["dpo"], "statistics": RunningMargin()}.get(case, SFT())
    settings = train_settings(
        schedule="linear",
        tokens_per_micro_batch=45,
        dropout=0.1 if case == "sft with dropout" else 0.0,
        evaluate_every=2 if case == "best" else None,
        save="best" if case == "best" else "last",
    )

    def start() -> PreTrainedModel:
        return gpt2(dtype=torch.float32)

    given: dict[str, Any] = {"held_out": HELD_OUT}
    if case == "dpo":
        given["reference"] = stored(gpt2(dtype=torch.float32, seed=5), EXAMPLES)
    undisturbed = Run(tmp_path / "undisturbed", start())
    outcome = undisturbed(objective, settings, **given)
    assert outcome.status == "complete" and checkpoint_step(undisturbed.folder) == 0

    stopped = Run(tmp_path / "stopped", start())
    stopped.on_log = lambda row: interrupt() if row["step"] == step and "train/loss" in row else None
    handlers = [signal.getsignal(number) for number in REQUESTS]
    with pytest.raises(Interrupted, match=rf"train stopped after step {step} of 5"):
        stopped(objective, settings, **given)
    assert [signal.getsignal(number) for number in REQUESTS] == handlers
    assert checkpoint_step(stopped.folder) == step

    resumed = Run(stopped.folder, start())
    assert resumed(objective, settings, **given) == outcome
    same(resumed.weights, undisturbed.weights)
    assert stopped.values + resumed.values == undisturbed.values
    assert moved(undisturbed.weights, Run(tmp_path, start()).weights) > 1e-3


def test_a_copied_checkpoint_continues_as_if_nothing_had_happened(tmp_path: Path) -> None:
    settings = train_settings(checkpoint_every=2)
    undisturbed = Run(tmp_path / "a", gpt2(dtype=torch.float32))

    def copy(row: Metrics) -> None:
        if row["step"] == 5:
            shutil.copytree(undisturbed.folder, tmp_path / "b")

    undisturbed.on_log = copy
    undisturbed(RunningMargin(), settings)
    (path,) = (tmp_path / "b").iterdir()
    assert path.name == f"step-000000004-{hash_file(path)}.safetensors", "the older is gone"
    (tmp_path / "b" / "step-000000005.partial-1").write_bytes(b"torn")  # what a kill leaves
    copied = Run(tmp_path / "b", gpt2(dtype=torch.float32, seed=9))  # every weight comes from the checkpoint
    copied(RunningMargin(), settings)
    assert [row["step"] for row in copied.rows] == [5]
    same(copied.weights, undisturbed.weights)


def test_a_second_signal_acts_at_once(tmp_path: Path, sigint_as_in_a_terminal: None) -> None:
    run = Run(tmp_path, llama())
    run.on_log = lambda row: interrupt(signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(SFT(), train_settings())
    assert len(run.rows) == 1


def test_outside_the_main_thread_signals_are_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path, llama())
    thread = threading.Thread(target=run, args=(SFT(), train_settings()))
    thread.start()
    thread.join()
    assert len(run.rows) == 5


# --- a penalty that takes over ---------------------------------------------------------------------------------------


def watched(strengths: Sequence[float]) -> dict[int, str]:
    """The notices of a run with this mean alpha f(r) at its steps."""
    watch, found = loop.PenaltyWatch(), {}
    for step, strength in enumerate(strengths, start=1):
        half = torch.full((2,), strength)
        sums = loop.Accumulated(distributions={"weighted_penalty_strength": [half - 0.1, half + 0.1]})
        if (notice := watch.see(sums)) is not None:
            found[step] = notice
    return found


def test_a_penalty_that_drowns_the_preference_term_is_noticed_once() -> None:
    assert watched([4.9] * 60) == {}
    assert watched([100.0] * 19) == {}  # not yet
    (found,) = watched([5.2] * 60).items()
    assert found == (20, "mean alpha f(r) is 5.2 over 20 steps: the penalty drowns the preference term")


def test_a_penalty_that_grows_tenfold_is_noticed_once() -> None:
    """A mean of 20 passes 10 * 0.3 with ten of the later ones in it: (10 * 0.3 + 10 * 6.12) / 20 = 3.21."""
    (found,) = watched([0.3] * 20 + [6.12] * 40).items()
    assert found == (30, "mean alpha f(r) grew from 0.3 to 3.2: the penalty takes over")
    assert watched([0.3] * 20 + [2.9] * 40) == {}
    assert watched([0.001] * 20 + [0.9] * 40) == {}  # a thousandfold of nothing


def test_losses_without_a_penalty_are_not_watched() -> None:
    assert loop.PenaltyWatch().see(loop.Accumulated()) is None


def test_notices_survive_an_interruption_and_say_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loss = UnLL(
        alpha=3.0,
        penalty=Quadratic(),
        base=cast("DPO", LOSSES["dpo"]),
        margin="sum",
        detach=True,
        mask_shared_prefix=False,
        level="token_mean",
    )
    generator = random.Random(0)
    examples = []
    for item in EXAMPLES:
        generated = EncodedResponse(f"{item.example_id}/g", "generated", tuple(draw(generator, 5)))
        examples.append(dataclasses.replace(item, responses=(*item.responses, generated)))
    settings = train_settings(steps=22, learning_rate=1e-10, batch_size=10)
    given: dict[str, Any] = {"examples": examples, "reference": stored(llama(seed=5), examples)}
    undisturbed = Run(tmp_path / "a", llama())
    outcome = undisturbed(loss, settings, **given)
    (notice,) = outcome.notices
    assert [record.getMessage() for record in caplog.records] == [f"warning: train step 20: {notice}"]
    # At this learning rate the model stays as it was: r^2 of sums and of means, over the pairs that are ranked wrongly.
    found: ResponseLogps = ResponseScorer(llama(), "padded")(collate(examples))
    r_sum, r_mean = found.chosen.sum - found.rejected.sum, found.chosen.mean - found.rejected.mean
    own, other = (torch.relu(-r).square().mean().item() for r in (r_sum, r_mean))
    assert notice == (
        f"mean alpha f(r) is {3 * own:.1f} over 20 steps: the penalty drowns the preference term; use a smaller alpha, "
        f"or loss.margin=mean with alpha times {own / other:.0f}"
    )
    assert outcome.to_json()["notices"] == [notice]
    for stop in (12, 21):
        stopped = Run(tmp_path / str(stop), llama())
        stopped.on_log = lambda row, stop=stop: interrupt() if row["step"] == stop else None  # type: ignore[misc]
        with pytest.raises(Interrupted):
            stopped(loss, settings, **given)
        resumed = Run(tmp_path / str(stop), llama())
        assert resumed(loss, settings, **given) == outcome
        same(resumed.weights, undisturbed.weights)


# --- the best weights ------------------------------------------------------------------------------------------------


def test_save_best_ends_with_the_weights_of_the_lowest_held_out_loss(tmp_path: Path) -> None:
    seen: dict[int, tuple[float, dict[str, Tensor]]] = {}
    settings = train_settings(steps=12, evaluate_every=1, save="best", learning_rate=1.5e-2, batch_size=10)
    run = Run(tmp_path / "best", llama())

    def look(row: Metrics) -> None:
        if "eval/loss" in row:
            seen[int(row["step"])] = (float(row["eval/loss"]), run.weights)

    run.on_log = look
    outcome = run(SFT(), settings, held_out=HELD_OUT)
    best = min(seen, key=lambda step: seen[step][0])
    assert outcome.best_step == best and 1 < best < 12
    same(run.weights, seen[best][1])
    last = Run(tmp_path / "last", llama())
    assert last(SFT(), dataclasses.replace(settings, save="last"), held_out=HELD_OUT).best_step == best
    same(last.weights, seen[12][1])


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_a_step_by_hand(tmp_path: Path) -> None:
    """The first row holds means over the batch under the untrained model, as the log-probs give them."""
    run, reference = Run(tmp_path, llama()), llama(seed=5)
    run(LOSSES["dpo"], train_settings(steps=3, log_every=2), reference=stored(reference, EXAMPLES))
    assert [row["step"] for row in run.rows] == [1, 2, 3]  # the first, every second, the last
    (batch,) = batches(EXAMPLES, 4, 1, seed=7)

    def sums(model: PreTrainedModel, role: Role) -> Tensor:
        found: ResponseLogps = ResponseScorer(model, "padded")(collate(batch))
        return found.select(role).sum.detach()

    own_w, own_l, ref_w, ref_l = (
        sums(model, role) for model in (llama(), reference) for role in ("chosen", "rejected")
    )
    n_w, n_l = (
        torch.tensor([len(answer.token_ids) for item in batch for answer in item.responses if answer.role == role])
        for role in ("chosen", "rejected")
    )
    expected = {
        "logps/chosen": own_w,
        "logps/rejected": own_l,
        "logps/chosen_per_token": own_w / n_w,
        "logps/rejected_per_token": own_l / n_l,
        "log_ratio/chosen": own_w - ref_w,
        "log_ratio/rejected": own_l - ref_l,
        "log_ratio/chosen_per_token": (own_w - ref_w) / n_w,
        "log_ratio/rejected_per_token": (own_l - ref_l) / n_l,
        "margin": own_w - own_l,
        "margin_per_token": own_w / n_w - own_l / n_l,
        "margin_to_reference": own_w - ref_w - own_l + ref_l,
        "margin_to_reference_per_token": (own_w - ref_w) / n_w - (own_l - ref_l) / n_l,
        "accuracy": (own_w > own_l).double(),
        "accuracy_per_token": (own_w / n_w > own_l / n_l).double(),
        "accuracy_to_reference": (own_w - ref_w > own_l - ref_l).double(),
        "accuracy_to_reference_per_token": ((own_w - ref_w) / n_w > (own_l - ref_l) / n_l).double(),
        "rewards/chosen": 0.5 * (own_w - ref_w),
        "rewards/rejected": 0.5 * (own_l - ref_l),
        "rewards/margins": 0.5 * (own_w - ref_w - own_l + ref_l),
        "rewards/accuracies": (own_w - ref_w > own_l - ref_l).double(),
    }
    row = run.rows[0]
    for name, values in expected.items():
        assert row[f"train/{name}"] == pytest.approx(float(values.mean()), rel=1e-5), name
    assert row["train/computed_tokens"] == sum(item.n_tokens for item in batch)
    assert row["train/tokens_per_second"] == pytest.approx(row["train/computed_tokens"] / row["train/seconds_per_step"])
    extra = {"step", "train/loss", "train/grad_norm", "train/learning_rate", "train/computed_tokens"}
    assert row.keys() - extra == {f"train/{name}" for name in expected} | {
        "train/tokens_per_second",
        "train/seconds_per_step",
    }


def test_exact_ties_count_one_half() -> None:
    tied = [example("tied", [5], ("chosen", [6, 7]), ("rejected", [6, 7]))]
    found = ResponseScorer(llama(), "padded")(collate(tied))
    columns = loop.likelihoods(found, found)
    for name in ("accuracy", "accuracy_per_token", "accuracy_to_reference"):
        assert columns[name].tolist() == [0.5], name


def test_likelihoods_of_what_is_there() -> None:
    single = collate([example("one", [5], ("generated", [6, 7, 8]))])
    found = ResponseScorer(llama(), "padded")(single)
    assert loop.likelihoods(found, None).keys() == {"logps/generated", "logps/generated_per_token"}
    ranked = collate([example("two", [5], ("ranked", [6]), ("ranked", [7]))])
    scored = ResponseScorer(llama(), "padded")(ranked)
    found_ranked = loop.likelihoods(scored, None)
    assert found_ranked.keys() == {"logps/ranked", "logps/ranked_per_token"}
    torch.testing.assert_close(found_ranked["logps/ranked"], scored.sum.detach().mean()[None])


def test_distributions_have_a_mean_and_a_95th_percentile() -> None:
    sums = loop.Accumulated()
    batch = collate([example("one", [5], ("chosen", [6, 7]))])
    policy = ResponseScorer(llama(), "padded")(batch)
    for value in range(101):
        terms = LossTerms(
            torch.tensor([float(value)]), torch.tensor([2.0]), distributions={"gate": torch.tensor([float(value)])}
        )
        sums.add(terms, policy, None)
    metrics = sums.metrics()
    assert metrics["loss"] == 50 and metrics["gate_mean"] == 50 and metrics["gate_p95"] == pytest.approx(95)
    assert (sums.weight, sums.n_examples) == (202, 101)


def test_stored_log_probs_of_other_lengths_are_refused() -> None:
    batch = collate(EXAMPLES[:1])
    policy = ResponseScorer(llama(), "padded")(batch)
    with pytest.raises(ValueError, match="lengths"):
        loop.stored_logps(lambda keys: [torch.zeros(99) for _ in keys], batch, policy)


def test_mean_chosen_tokens() -> None:
    some = [
        example("a", [5], ("chosen", [6, 7, 8])),
        example("b", [5], ("chosen", [6])),
        example("c", [5], ("ranked", [6])),
    ]
    assert loop.mean_chosen_tokens(some) == 2.0
    assert loop.mean_chosen_tokens(some[2:]) == 1.0


def test_computed_tokens_by_hand() -> None:
    """Prompt 2 with answers of 3 and 1, prompt 1 with an answer of 1: 8 packed, 3 rows of 5 padded."""
    batch = collate(
        [example("a", [5, 6], ("chosen", [7, 8, 9]), ("rejected", [7])), example("b", [5], ("chosen", [6]))]
    )
    assert loop.computed_tokens(batch, "packed") == 8
    assert loop.computed_tokens(batch, "padded") == 15


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes ended with, all scenarios in one start."""

    def build(folder: Path) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        finished = subprocess.run(
            [*launcher, "-m", "tests.two_ranks", str(folder)],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr

    return once(tmp_path_factory, "two-ranks", build)


@pytest.mark.parametrize("scenario", two_ranks.SCENARIOS)
def test_two_processes_train_as_one_does(scenario: str, two_processes: Path, tmp_path: Path) -> None:
    two_ranks.play(scenario, Accelerator(cpu=True), tmp_path)
    one, main, other = (
        (
            json.loads((folder / f"{scenario}-{rank}.json").read_text()),
            load_file(folder / f"{scenario}-{rank}.safetensors"),
        )
        for folder, rank in ((tmp_path, 0), (two_processes, 0), (two_processes, 1))
    )
    assert (one[0]["world"], main[0]["world"], other[0]["world"]) == (1, 2, 2)
    assert [found[0]["divided"] for found in (one, main, other)] == [False, *[scenario == "sharded"] * 2]
    same(other[1], {name: main[1][name] for name in other[1]})  # weights, and the gradients of the last step
    assert len(other[1]) == len(main[1]) // (2 if scenario == "sharded" else 1)
    scale = {name: 2.0 if name.startswith("gradient.") else 1.0 for name in main[1]}  # DDP means over ranks
    close({name: value * scale[name] for name, value in main[1].items()}, one[1], within=1e-9)
    assert main[0]["outcome"] == other[0]["outcome"] == one[0]["outcome"]
    assert other[0]["rows"] == []
    for row, expected in zip(main[0]["rows"], one[0]["rows"], strict=True):
        clock = ("train/seconds_per_step", "train/tokens_per_second", "interim/seconds")
        assert {name: value for name, value in row.items() if name not in clock} == pytest.approx(
            {name: value for name, value in expected.items() if name not in clock}, rel=1e-5
        )
    if scenario == "sharded":
        shutil.copytree(two_processes / "sharded-checkpoints", tmp_path / "moved")
        moved = two_ranks.finish_sharded(Accelerator(cpu=True), tmp_path / "moved")
        close(moved, {name: value for name, value in one[1].items() if name in moved}, within=1e-9)
    if scenario == "diverged":
        assert main[0]["outcome"]["example_ids"] == [two_ranks.BAD.example_id]
    else:
        assert main[0]["outcome"]["status"] == "complete"


def test_two_processes_that_are_interrupted_draw_what_they_would_have_drawn(two_processes: Path) -> None:
    """Each its own masks, and in every step those of the undisturbed run."""
    whole, stopped = (
        [load_file(two_processes / f"{name}-{rank}.safetensors") for rank in (0, 1)]
        for name in ("dropout", "dropout_interrupted")
    )
    for found, expected in zip(stopped, whole, strict=True):
        same(found, expected)
    same(whole[0], whole[1])  # gradients as well: they are those of both
    seeds = {loop.seed_of_draws(7, step, rank) for step in range(3) for rank in range(3)}
    assert len(seeds) == 9 and max(seeds) < 2**63
