"""The peak memory of a step is known before anything is loaded, and what does not fit is cut smaller or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig

from dppo.batches import collate
from dppo.config import LoraSettings
from dppo.errors import UserError
from dppo.logps import ResponseScorer
from dppo.memory import Peak, Step, control_groups, fit, largest
from dppo.stages import preflight
from dppo.types import EncodedExample, EncodedResponse
from tests.conftest import outside, small
from tests.runs import run_small
from tests.tiny_models import train_settings

LLAMA = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
GPT2 = GPT2Config(
    n_layer=5, n_embd=64, n_head=4, vocab_size=512, n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
LORA = LoraSettings(4, 8.0, 0.0, "all-linear", False)


def examples(n: int, prompt: int, *answers: int) -> list[EncodedExample]:
    responses = tuple(EncodedResponse("", "ranked", (1,) * length) for length in answers)
    return [EncodedExample(str(number), str(number), (1,) * prompt, responses) for number in range(n)]


def measured(config: PretrainedConfig, step: Step, part: Sequence[EncodedExample], *, accumulates: bool) -> int:
    """Bytes that PyTorch's profiler saw allocated at the peak of a second step, with what lay there before it."""
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train(step.trains)
    settings = step.settings
    if settings.lora is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    scorer, batch = ResponseScorer(model, settings.packing), collate(part)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            total: torch.Tensor = scorer(batch).tokens.sum()
            return total

    def once() -> None:
        if step.trains:
            forward().backward()
        else:
            with torch.no_grad():
                forward()

    once()
    if not accumulates:
        model.zero_grad(set_to_none=True)
    weights = sum(value.numel() * 4 for value in (*model.parameters(), *model.buffers()))
    trained = sum(value.numel() * 4 for value in model.parameters() if value.requires_grad) if step.trains else 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        once()
    found = seen.profiler
    assert found is not None
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    now, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += int(event.nbytes())
        most = max(most, now)
    return int(weights + 2 * trained + (trained if accumulates else 0) + most)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LLAMA, {}),
        (LLAMA, {"precision": "bf16"}),
        (LLAMA, {"lora": LORA}),
        (LLAMA, {"trains": False}),
        (LLAMA, {"accumulates": False, "long": True}),
        (GPT2, {"packing": "padded"}),
        (GPT2, {"activation_checkpointing": True, "lora": LORA}),
    ],
    ids=lambda given: given.model_type if isinstance(given, PretrainedConfig) else ",".join(given) or "default",
)
def test_the_estimate_is_what_the_profiler_measures(config: PretrainedConfig, words: dict[str, object]) -> None:
    words = dict(words)
    trains, accumulates = bool(words.pop("trains", True)), bool(words.pop("accumulates", True))
    part = examples(2, 200, 60, 90) if words.pop("long", False) else examples(6, 40, 30, 20, 25)
    step = Step(config, train_settings(**words), ResponseScorer, trains)
    accumulates = accumulates and trains
    estimate = step.peak(part, accumulates=accumulates)
    assert estimate.total == pytest.approx(measured(config, step, part, accumulates=accumulates), rel=0.1)
    assert estimate.activations > 0


def test_divided_over_processes_gradients_and_moments_are_their_parts() -> None:
    part = examples(4, 40, 30, 20)
    alone, four = (
        Step(LLAMA, train_settings(), ResponseScorer, True, shards=n).peak(part, accumulates=True) for n in (1, 4)
    )
    assert (four.weights, four.activations) == (alone.weights, alone.activations)
    assert (four.gradients, four.moments) == (alone.gradients // 4, alone.moments // 4)


def test_the_budget_is_the_largest_that_fits() -> None:
    step = Step(LLAMA, train_settings(), ResponseScorer, True)
    whole = [examples(8, 40, 30, 20)]
    full = fit(step, whole, 4096, 1e12)
    assert (full.budget, full.alone) == (4096, None)
    for part in (0.6, 0.8):
        room = part * full.asked.total
        found = fit(step, whole, 4096, room)
        assert found.asked == full.asked
        assert found.peak.total <= room < full.asked.total
        assert found.peak.tokens < full.asked.tokens
        one_more = found.peak.tokens + whole[0][0].n_tokens
        kept, accumulates = largest(whole, one_more, "packed")
        assert step.peak(kept, accumulates=accumulates).total > 0.85 * room
    least = fit(step, whole, 4096, 1.0)
    assert least.budget == 1 and least.peak == least.alone
    assert least.peak.total > 1.0


def test_the_largest_micro_batch_counts_padding() -> None:
    long, many = examples(1, 300, 10), examples(4, 60, 10, 10, 10)
    assert largest([long, many], 10_000, "packed")[0] == many
    wide = [*examples(1, 100, 10), *examples(1, 10, 90)]
    assert len(largest([wide, examples(1, 150, 10)], 10_000, "padded")[0]) == 2
    assert largest([many], 100, "packed")[1] is True
    assert largest([many], 10_000, "packed")[1] is False


def test_too_little_memory_lowers_the_budget_and_changes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="dppo")
    plenty = run_small(tmp_path / "plenty", "loss=unll", "alpha=0.1")
    assert "lowered" not in caplog.text
    memory = {item["stage"]: item["memory"] for item in plenty.result["timings"]["stages"]}
    asked = memory["preference"]["estimated"]
    assert memory["preference"]["measured"] > 0
    assert memory["y_gen"] is None
    monkeypatch.setattr(preflight, "room", lambda device: round(0.8 * asked))
    little = run_small(tmp_path / "little", "loss=unll", "alpha=0.1")
    said = [record.getMessage() for record in caplog.records if "is lowered from" in record.getMessage()]
    assert any(line.startswith("  main: ") and "train.tokens_per_micro_batch" in line for line in said)
    assert any(line.startswith("  reference: ") for line in said)
    lowered = {item["stage"]: item["memory"] for item in little.result["timings"]["stages"]}
    assert lowered["preference"]["tokens_per_micro_batch"] < 4096
    assert lowered["preference"]["estimated"] <= 0.8 * asked
    assert little.result["models"] == plenty.result["models"], "the budget is in no fingerprint"
    losses = [[row["train/loss"] for row in run.metrics if "train/loss" in row] for run in (plenty, little)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_cannot_fit_is_refused_before_a_model_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "room", lambda device: 10_000)
    monkeypatch.setattr("dppo.models.TinyLlama.load_model", lambda self, seed: pytest.fail("a model was made"))
    with pytest.raises(UserError) as refused:
        run_small(tmp_path, "loss=dpo")
    said = str(refused.value)
    assert said.startswith("sft: needs about ")
    knobs = ["sft.train.activation_checkpointing=true (then", "sft.train.max_length", "train@sft.train=lora", "bf16"]
    assert [said.index(knob) for knob in knobs] == sorted(said.index(knob) for knob in knobs)
    assert "weights" in said and "activations" in said


def test_an_estimate_that_cannot_be_made_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: Step, part: object, *, accumulates: bool) -> Peak:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(Step, "peak", refuse)
    caplog.set_level("INFO", logger="dppo")
    found = run_small(tmp_path, "loss=dpo")
    assert {item["memory"]["estimated"] for item in found.result["timings"]["stages"] if item["memory"]} == {None}
    assert "no such operation" not in caplog.text


# A loss that a user brings: from its third optimiser step on the process may not have more memory than it has.
GREEDY = """
import resource
from dataclasses import dataclass
import psutil
import torch
from dppo.losses.pairwise import DPO

CALLS = []

@dataclass(frozen=True)
class Greedy(DPO):
    def __call__(self, policy, reference, context):
        if torch.is_grad_enabled():
            CALLS.append(1)
        if len(CALLS) == 3:
            used = psutil.Process().memory_info().vms
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, -1))
            torch.ones(2**26)
        return super().__call__(policy, reference, context)
"""


def test_running_out_of_memory_is_one_line_and_keeps_what_was_done(tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text(GREEDY)
    words = small(
        "loss=dpo",
        "loss._target_=greedy.Greedy",
        "allowed_targets=[greedy]",
        "device=cpu",
        "train.evaluate_every=null",
    )
    done = subprocess.run(
        [sys.executable, "-m", "dppo", *words, "hydra.run.dir=here"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env={**outside(), "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"},
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: main: out of memory on cpu, about "), done.stderr
    assert "train.tokens_per_micro_batch=2048 (now 4096, same result)" in last
    assert "Traceback" not in done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "here" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
    assert [path.name.rpartition("-")[0] for path in tmp_path.rglob("step-*")] == ["step-000000002"]


def test_limits_of_control_groups_count_what_cannot_be_given_up(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    inner = tmp_path / "root" / "outer" / "inner"
    inner.mkdir(parents=True)
    for place, limit in ((inner, "max"), (inner.parent, "1000")):
        (place / "memory.max").write_text(limit)
        (place / "memory.current").write_text("700")
        (place / "memory.stat").write_text("anon 300\ninactive_file 400\n")
    assert control_groups(tmp_path / "root", own) == [(1000, 300)]
    assert control_groups(tmp_path / "none", tmp_path / "neither") == []
