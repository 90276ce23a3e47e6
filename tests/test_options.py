"""Every option of every group runs on the tiny model; one cache serves them all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dppo.config import CONF_DIR
from tests.runs import run_small


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options")


RUNS = [
    *(f"loss={name}" for name in options("loss")),
    # conll needs a base with a log-ratio logit; the others take every base.
    *(f"loss={family} loss/base={base}" for family, base in zip(
        ["unll", "minll", "simnpo", "npo", "conll", "conll", "unll", "minll", "conll"],
        options("loss/base"),
        strict=True,
    ) if not (family == "conll" and base in ("ipo", "slic", "cpo", "orpo"))),
    *(f"loss={family} penalty={name}" for family in ("unll", "minll", "conll") for name in options("penalty")),
    "loss=unll penalty=expectile zeta=0.2 loss.margin=mean",
    "loss=unll loss.margin=implicit",
    "loss=unll loss.level=token_sum loss.mask_shared_prefix=true",
    "loss=minll loss.reduction=sum loss.floor=null",
    "loss=dpo train=lora",
    "loss=unll train=lora train.save=best",
    "loss=dpo train.precision=bf16",
    "loss=dpo train.activation_checkpointing=true",
    "loss=dpo train.dropout=0.1 train.deterministic=false",
    "loss=dpo train.schedule=linear train.steps=null train.epochs=1",
    "loss=dpo train.save=best train.evaluate_every=2",
    "loss=dpo generation.precision=bf16",
    "loss=dpo evaluation.split=validation",
    "loss=dpo sft.train.n_examples=8 sft.train.steps=null sft.train.epochs=2",
    "loss=dpo dataset=arithmetic",
    "loss=unll dataset=arithmetic loss.mask_shared_prefix=true",
    *(f"loss=dpo reward={name}" for name in options("reward")),
    *(f"loss=dpo tracking={name}" for name in options("tracking")),
]  # fmt: skip


@pytest.mark.parametrize("words", RUNS)
def test_the_option_runs(words: str, root: Path) -> None:
    found = run_small(root, *words.split())
    result = found.result
    assert result["status"] == "complete"
    assert 0 <= found.values[0] <= 1
    losses = [row["train/loss"] for row in found.metrics if "train/loss" in row]
    assert all(math.isfinite(loss) for loss in losses)
    if words != "loss=none":
        assert losses
        assert found.metrics[0]["step"] == 1


def test_packed_runs_compute_fewer_tokens_for_the_same_trajectory(root: Path) -> None:
    packed = run_small(root, "loss=unll", "seed=5").metrics
    padded = run_small(root, "loss=unll", "seed=5", "train.packing=padded").metrics
    for left, right in zip(packed, padded, strict=True):
        if "train/loss" in left:
            assert left["train/loss"] == pytest.approx(right["train/loss"], rel=1e-4)
            assert left["train/computed_tokens"] < right["train/computed_tokens"]


def test_accumulation_and_batch_order_do_not_change_the_run(root: Path) -> None:
    """1 x 4 equals 4 x 1, through the whole pipeline."""
    whole = run_small(root, "loss=unll", "seed=6").metrics
    # The same fingerprint would only be read again: a cache of its own makes it train.
    apart = run_small(root / "apart", "loss=unll", "seed=6", "train.tokens_per_micro_batch=1").metrics
    for left, right in zip(whole, apart, strict=True):
        for key in ("train/loss", "train/grad_norm", "eval/loss"):
            if key in left:
                assert left[key] == pytest.approx(right[key], rel=2e-4), (left["step"], key)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path) -> None:
    first = run_small(tmp_path / "a", "loss=unll", "seed=7")
    second = run_small(tmp_path / "b", "loss=unll", "seed=7")
    other = run_small(tmp_path / "a", "loss=unll", "seed=8")

    def trajectory(metrics: list[dict[str, float]]) -> list[float]:
        return [row["train/loss"] for row in metrics if "train/loss" in row]

    assert trajectory(first.metrics) == trajectory(second.metrics)
    assert first.samples == second.samples
    assert trajectory(first.metrics) != trajectory(other.metrics)
