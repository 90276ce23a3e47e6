"""What is refused before several processes begin; what they do: test_loop.py and test_two_processes.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from dppo import processes, sharding
from dppo.config import LoraSettings
from dppo.errors import UserError, lost_process
from tests.runs import run_small
from tests.tiny_models import train_settings

DIVIDED = train_settings(sharding="fsdp")


def test_one_process_has_nothing_to_divide(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^train\.sharding=fsdp: the run is one process.* torchrun"):
        run_small(tmp_path, "train=fsdp")
    assert not (tmp_path / "cache" / "sft").exists(), "refused before anything is trained"
    with pytest.raises(UserError, match=r"^sft\.train\.sharding=fsdp: the run is one process"):
        run_small(tmp_path, "sft.train.sharding=fsdp")
    sharding.check(DIVIDED, 2, "train")
    sharding.check(train_settings(), 1, "train")


def test_four_bits_and_compiled_layers_are_not_divided() -> None:
    lora = LoraSettings(8, 16.0, 0.0, "all-linear", base_4bit=True)
    with pytest.raises(UserError, match=r"^train\.lora\.base_4bit=true: .*sharding=none"):
        sharding.check(train_settings(sharding="fsdp", lora=lora), 2, "train")
    sharding.check(train_settings(lora=lora), 2, "train")
    with pytest.raises(UserError, match=r"^train\.compile=true: .*compile=false"):
        sharding.check(train_settings(sharding="fsdp", compile=True), 2, "train")


def test_how_a_run_is_divided_is_no_part_of_its_identity() -> None:
    assert DIVIDED.identity() == train_settings().identity()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DEEPSPEED.*fsdp2.yaml"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for MEGATRON_LM"),
        ({"ACCELERATE_USE_FSDP": "true"}, "write fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_what_accelerate_launch_cannot_ask_for(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        processes.accelerator(cpu=True)


def test_precision_and_accumulation_are_not_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    found = processes.accelerator(cpu=True)
    assert (found.mixed_precision, found.gradient_accumulation_steps) == ("no", 1)


def test_the_loss_of_a_process_is_told_from_other_errors() -> None:
    assert lost_process(RuntimeError("[pair.cc:538] Connection closed by peer [127.0.0.1]:17286"))
    assert not lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not lost_process(ValueError("Connection closed by peer"))
