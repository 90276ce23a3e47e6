"""generation=vllm: what vLLM is told, that its process always ends, and where real vLLM is, that it answers as we do.

Without vLLM a stand-in is behind the process; everything else is real. ``DPPO_VLLM_PYTHON`` names the Python of an
environment with real vLLM (a build for CPUs will do), for the tests at the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from dppo import config
from dppo.config import SamplingSettings
from dppo.errors import UserError
from dppo.generation import VLLM, Greedy, SampledOnce, decoding_in_training, decoding_of
from dppo.generation import vllm as vllm_module
from dppo.plan import plan
from dppo.types import Generation
from tests.conftest import small
from tests.runs import run_small
from tests.test_generation import ENDS, PROMPTS, some_prompts, words
from tests.tiny_models import VOCABULARY, build, llama
from tests.vllm_stand_in import answer, installed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return installed(tmp_path_factory.mktemp("environment"), "9.8.7+cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    llama(dtype=torch.float32).save_pretrained(found)
    return found


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """What the stand-in was told: all notes of one kind."""
    path = tmp_path / "notes.jsonl"
    path.touch()
    monkeypatch.setenv("VLLM_STAND_IN_NOTES", str(path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def read(kind: str) -> list[Any]:
        return [row for row in map(json.loads, path.read_text().splitlines()) if kind in row]

    return read


Notes = Callable[[str], list[Any]]


def settings(python: str | None, **changes: Any) -> VLLM:
    given: dict[str, Any] = {
        "max_new_tokens": 16,
        "tokens_per_batch": 100,
        "precision": "fp32",
        "python": python,
        "prompts_per_batch": 10,
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.1,
        "enforce_eager": True,
    }
    return VLLM(**{**given, **changes})


def answers(using: VLLM, folder: Path, prompts: Any = PROMPTS) -> list[list[Generation]]:
    with using.answering(folder, CPU, prompts, ENDS, words) as batches:
        return list(batches)


def alive(pid: int) -> bool:
    """Whether a process is there and not only waiting for its parent to look at how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(pids: list[int]) -> bool:
    until = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.02)
    return not any(map(alive, pids))


# --- with the stand-in -----------------------------------------------------------------------------------------------


def test_tokens_go_in_and_tokens_come_out(
    python: str, folder: Path, notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("PYTHONPATH", "/of/this/interpreter")
    found = answers(settings(python, max_new_tokens=6), folder)
    assert [len(batch) for batch in found] == [10, 10, 4]
    by_id = {one.prompt_id: one for batch in found for one in batch}
    for prompt_id, prompt in PROMPTS:
        expected = answer(prompt, seed=None, vocabulary=VOCABULARY, ends=sorted(ENDS), longest=6)
        ended = expected[-1] in ENDS
        text = words(expected[:-1] if ended else expected)
        assert by_id[prompt_id] == Generation(prompt_id, text, tuple(expected), "eos" if ended else "length")
    assert {one.stopped_by for one in by_id.values()} == {"eos", "length"}
    # Prompts that begin alike stand together.
    asked = [prompt for one in notes("prompts") for prompt in one["prompts"]]
    assert asked == sorted(list(prompt) for _, prompt in PROMPTS)
    sampling = {"max_tokens": 6, "stop_token_ids": sorted(ENDS), "ignore_eos": True, "detokenize": False}
    for one in notes("sampling"):
        assert all(how == {**sampling, "temperature": 0.0, "top_p": 1.0, "seed": None} for how in one["sampling"])
    assert notes("engine")[0]["engine"] == {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "tensor_parallel_size": 1,
        "dtype": "float32",
        "gpu_memory_utilization": 0.1,
        "enforce_eager": True,
        "load_format": "safetensors",
        "generation_config": "vllm",
        "max_model_len": max(len(prompt) for _, prompt in PROMPTS) + 6,
        "enable_prefix_caching": True,
    }
    environment = notes("environment")[0]["environment"]
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == "1"
    assert not {"RANK", "TORCHELASTIC_RUN_ID"} & environment.keys()
    assert "/of/this" not in environment["PYTHONPATH"]
    assert not list(tmp_path.glob("dppo-vllm-*"))  # the log of a process that did its work


def test_sampled_answers_have_a_seed_of_their_own(python: str, folder: Path, notes: Notes) -> None:
    sampled = decoding_of(settings(python), SamplingSettings(0.7, 0.9, 3))
    assert isinstance(sampled, VLLM)
    first = answers(sampled, folder)
    again = answers(dataclasses.replace(sampled, prompts_per_batch=3), folder, PROMPTS[::-1])
    assert {one.prompt_id: one for batch in first for one in batch} == {
        one.prompt_id: one for batch in again for one in batch
    }
    told = [how for one in notes("sampling") for how in one["sampling"]]
    assert {(how["temperature"], how["top_p"]) for how in told} == {(0.7, 0.9)}
    assert len({how["seed"] for how in told}) == len(PROMPTS) and all(0 <= how["seed"] < 2**53 for how in told)
    other = decoding_of(settings(python), SamplingSettings(0.7, 0.9, 4))
    assert isinstance(other, VLLM)
    assert answers(other, folder) != first


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_process_and_its_workers_end_with_the_block(
    error: type[BaseException], python: str, folder: Path, notes: Notes
) -> None:
    with pytest.raises(error), settings(python).answering(folder, CPU, PROMPTS, ENDS, words) as batches:
        next(batches)
        pids = notes("pids")[0]["pids"]
        assert all(map(alive, pids))
        raise error
    assert not any(map(alive, pids))  # at once: training wants the memory


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("refuse", r"ValueError: No available memory for the cache blocks\. Try increasing it\. \(vLLM's log: .*\)$"),
        ("die 2", r"its process was ended by SIGKILL, perhaps for want of memory \(vLLM's log: .*\)$"),
    ],
)
def test_what_goes_wrong_is_one_line(
    trouble: str,
    said: str,
    python: str,
    folder: Path,
    notes: Notes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_STAND_IN", trouble)
    with pytest.raises(UserError, match=f"^generation=vllm: {said}") as caught:
        answers(settings(python), folder)
    (log,) = tmp_path.glob("dppo-vllm-*")
    assert str(log) in str(caught.value)
    assert ("Traceback" if trouble == "refuse" else "vLLM says much") in log.read_text()
    assert all_end([pid for one in notes("pids") for pid in one["pids"]])


def test_answers_beyond_the_models_positions_are_refused_before_anything_starts(
    python: str, folder: Path, notes: Notes
) -> None:
    with pytest.raises(UserError, match=r"^generation\.max_new_tokens=13: the longest prompt has 500 tokens and the"):
        answers(settings(python, max_new_tokens=13), folder, [("a", [5] * 500), ("b", [5])])
    assert notes("engine") == []


def test_only_what_decides_texts_is_in_the_key(python: str, tmp_path: Path) -> None:
    key = settings(python).identity()
    assert key["vllm"] == "9.8.7+cpu"
    for same in ({"tokens_per_batch": 7}, {"prompts_per_batch": 7}, {"gpu_memory_utilization": 0.5}):
        assert settings(python, **same).identity() == key
    others: list[dict[str, Any]] = [
        {"max_new_tokens": 7},
        {"precision": "bf16"},
        {"tensor_parallel_size": 2},
        {"enforce_eager": False},
        {"python": installed(tmp_path, "9.8.8+cpu")},
    ]
    sampled = [decoding_of(settings(python), SamplingSettings(*how)) for how in ((1.0, 1.0, 0), (1.0, 1.0, 1))]
    keys = [key, *(settings(**{"python": python, **other}).identity() for other in others)]
    keys += [one.identity() for one in sampled] + [Greedy(16, 100, "fp32").identity()]
    assert len({json.dumps(one, sort_keys=True) for one in keys}) == len(keys)


def test_a_model_in_training_is_asked_by_our_own_decoding() -> None:
    using = settings(None)
    assert decoding_in_training(using, None) == Greedy(16, 100, "fp32")
    assert isinstance(decoding_in_training(using, SamplingSettings(1.0, 1.0, 0)), SampledOnce)


@pytest.mark.parametrize(
    ("version", "device", "said"),
    [
        ("9.0.0", "cpu", "this run is on cpu and vLLM 9.0.0 is built for GPUs; choose a machine with a CUDA device"),
        ("9.0.1+cpu", "cuda", r"this run is on cuda and vLLM 9.0.1\+cpu is built for the CPU; choose device=cpu"),
        ("9.0.2", "mps", "this run is on mps and vLLM 9.0.2 is built for GPUs"),
    ],
)
def test_vllm_for_another_device_is_refused(version: str, device: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^generation=vllm: {said}"):
        settings(installed(tmp_path, version)).check(torch.device(device))


def test_the_engine_gets_the_gpus_of_this_run(python: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    using = settings(installed(tmp_path, "9.0.0"), tensor_parallel_size=2)
    using.check(torch.device("cuda"))
    assert using._environment(torch.device("cuda", 1))["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert using._environment(torch.device("cuda"))["CUDA_VISIBLE_DEVICES"] == "2,5"
    with pytest.raises(UserError, match=r"^generation.tensor_parallel_size=2: this run has 1 GPUs from cuda:2 on"):
        using.check(torch.device("cuda", 2))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("none/python", r"generation.python=none/python: there is no such program; type python -m venv"),
        ("false", r"generation.python=.*/false: does not run as a Python interpreter"),
        ("echo", r"generation.python=.*/echo: does not run as a Python interpreter"),
    ],
)
def test_a_wrong_interpreter_is_named(given: str, said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        settings(given).check(CPU)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"prompts_per_batch": 0}, "prompts_per_batch=0: must be at least 1"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0: must be at least 1"),
        ({"gpu_memory_utilization": 1.2}, "gpu_memory_utilization=1.2: must be > 0 and <= 1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        settings(None, **change)


def test_without_vllm_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_module, "_installed", lambda python: None)  # wherever these tests run
    for words_ in (["generation=vllm"], ["generation=vllm", f"generation.python={sys.executable}"]):
        with pytest.raises(
            UserError, match=r"^generation=vllm: vLLM is not installed .*; type python -m venv vllm-env"
        ):
            run_small(tmp_path, "loss=dpo", *words_)
    assert not (tmp_path / "cache" / "sft").exists()


def test_a_whole_run(python: str, notes: Notes, tmp_path: Path) -> None:
    """Adapters, measured on the way: the engine gets merged models, interim answers are our own; all is cached."""
    chosen = (
        "loss=unll",
        "train=lora",
        "evaluation.interim.n_points=1",
        "evaluation.interim.n_prompts=4",
        "generation=vllm",
        f"generation.python={python}",
        "generation.prompts_per_batch=8",
    )
    found = run_small(tmp_path, *chosen)
    stages = {(item["stage"], item["fingerprint"]): item for item in found.result["timings"]["stages"]}
    assert [title for title, _ in stages].count("baseline") == 2  # of the engine, and of our own decoding
    assert len(notes("engine")) == 3  # y_gen, answers, baseline
    for one in notes("engine"):
        assert one["engine"]["dtype"] == "bfloat16"
        assert {"config.json", "model.safetensors"} <= set(one["files"]) and "adapter_config.json" not in one["files"]
        assert Path(one["engine"]["model"]).exists() == ("sft" in one["engine"]["model"])  # merged ones are gone
    (y_gen,) = [item for item in stages.values() if item["stage"] == "y_gen"]
    asked = [prompt for one in notes("prompts") for prompt in one["prompts"]][: y_gen["rows"]]
    (how,) = {json.dumps({**one, "seed": None}) for note in notes("sampling") for one in note["sampling"]}
    ends = json.loads(how)["stop_token_ids"]
    size = json.loads((Path(notes("engine")[0]["engine"]["model"]) / "config.json").read_text())["vocab_size"]
    made = [answer(prompt, seed=None, vocabulary=size, ends=ends, longest=8) for prompt in asked]
    assert y_gen["tokens"] == sum(map(len, made))
    assert y_gen["tokens_per_second"] > 0

    overrides = small(*chosen, f"cache.dir={tmp_path / 'cache'}", "device=cpu")
    assert plan(config.load(config.compose(overrides), overrides)).todo == []
    sampled = run_small(tmp_path, *chosen, "evaluation=sampled")
    assert "y_gen" not in sampled.built and {"answers", "baseline"} <= set(sampled.built)
    seeds = [how["seed"] for one in notes("sampling") for how in one["sampling"] if how["seed"] is not None]
    assert len(seeds) == 16 and len(set(seeds)) == 8  # both models answer a prompt with the same random numbers


# --- with real vLLM --------------------------------------------------------------------------------------------------

REAL = os.environ.get("DPPO_VLLM_PYTHON")
real = pytest.mark.skipif(REAL is None, reason="DPPO_VLLM_PYTHON names no environment with vLLM")


@real
@pytest.mark.parametrize("name", ["llama", "grouped", "gpt2"])
def test_real_vllm_answers_as_our_own_decoding(name: str, tmp_path: Path) -> None:
    """Token for token, in fp32, up to the first step whose two best tokens rounding can change."""
    wide: dict[str, Any] = {"dtype": torch.float32, "hidden_size": 128}  # heads of 32, the least that vLLM takes
    model: PreTrainedModel = {
        "llama": lambda: llama(**wide),
        "grouped": lambda: llama(**wide, num_key_value_heads=2, tie_word_embeddings=True),
        "gpt2": lambda: build(
            GPT2LMHeadModel,
            GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3),
            dtype=torch.float32,
        ),
    }[name]()
    model.save_pretrained(tmp_path)
    prompts = some_prompts(40)
    expected = {
        one.prompt_id: one for batch in Greedy(8, 10_000, "fp32").generate(model, prompts, ENDS, words) for one in batch
    }
    found = {
        one.prompt_id: one for batch in answers(settings(REAL, max_new_tokens=8), tmp_path, prompts) for one in batch
    }
    assert found.keys() == expected.keys()
    assert {one.stopped_by for one in found.values()} == {"eos", "length"}
    token_ids = dict(prompts)
    for key, one in found.items():
        pairs = zip(one.token_ids, expected[key].token_ids, strict=False)
        place = next((at for at, (left, right) in enumerate(pairs) if left != right), None)
        if place is None:
            assert one == expected[key]
            continue
        row = torch.tensor([[*token_ids[key], *one.token_ids[:place]]])
        best = model(input_ids=row).logits[0, -1].topk(2).values
        assert float(best[0] - best[1]) < 1e-3
    assert sum(found[key] == expected[key] for key in found) >= 38


@real
def test_real_vllm_samples_from_the_models_distribution(tmp_path: Path) -> None:
    model = llama(dtype=torch.float32, hidden_size=128, initializer_range=0.1)
    model.save_pretrained(tmp_path)
    prompts = [(f"p{number}", [5, 6, 7]) for number in range(2000)]
    using = decoding_of(settings(REAL, max_new_tokens=1, prompts_per_batch=1000), SamplingSettings(1.0, 1.0, 0))
    assert isinstance(using, VLLM)
    found = {one.prompt_id: one for batch in answers(using, tmp_path, prompts) for one in batch}
    again = {one.prompt_id: one for batch in answers(using, tmp_path, prompts[::-1][:50]) for one in batch}
    assert all(found[key] == one for key, one in again.items())
    counts = torch.bincount(torch.tensor([one.token_ids[0] for one in found.values()]), minlength=VOCABULARY).double()
    with torch.no_grad():
        shares = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double().softmax(-1)
    chi_square = float(((counts - 2000 * shares) ** 2 / (2000 * shares)).sum())
    assert chi_square < 110  # 60 degrees of freedom: 1 in 10,000 is above
