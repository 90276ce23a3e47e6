"""Every option of every group runs on the tiny model; one cache serves them all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from dppo.config import CONF_DIR
from dppo.errors import UserError
from tests.runs import run_small


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options")


RUNS = [
    # losses, penalties and bases: tests/test_methods.py
    "loss=none",
    "loss=unll penalty=expectile zeta=0.2 loss.margin=mean",
    "loss=unll loss.margin=implicit",
    "loss=unll loss.level=token_sum loss.mask_shared_prefix=true",
    "loss=minll loss.reduction=sum loss.floor=null",
    "loss=kto loss.z_scope=micro_batch",
    "loss=kto loss.one_per_prompt=true loss.value=log_sigmoid",
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
    # models and servers: tests/test_classifier_reward.py, test_nemotron.py, test_endpoints.py, test_judge.py
    *(f"loss=dpo reward={name}" for name in ("verifiable", "length", "sentiment")),
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
        assert next(row["step"] for row in found.metrics if "train/loss" in row) == 1
        assert found.metrics[0]["step"] == 0  # held-out pairs before the first step


QUESTIONS = [f"Write a sentence about {thing} {number}." for number in range(20) for thing in ("a boat", "a fox")]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ranked_file(folder: Path) -> Path:
    answers, scores = ["a boat", "a boat near", "the fox", "a"], [2, 1, 3, 2]
    rows = (
        {"prompt": question, "responses": answers[: 2 + n % 3], "scores": scores[: 2 + n % 3]}
        for n, question in enumerate(QUESTIONS)
    )
    return write_jsonl(folder / "ranked.jsonl", rows)


def labelled_file(folder: Path) -> Path:
    rows = (
        {"prompt": question, "completion": "a boat" if n % 3 else "a fox", "label": n % 3 > 0}
        for n, question in enumerate(QUESTIONS)
    )
    return write_jsonl(folder / "labelled.jsonl", rows)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("ranked", "loss=rrhf"),
        ("ranked", "loss=dpo"),
        ("ranked", "loss=unll"),
        ("labelled", "loss=kto"),
        ("labelled", "loss=kto loss.z_scope=micro_batch"),
        ("labelled", "loss=kto loss.z0=zero train.batch_size=3"),
        ("labelled", "loss=kto loss.one_per_prompt=true train.batch_size=1"),
    ],
)
def test_ranked_and_labelled_answers_train_from_a_file(kind: str, words: str, tmp_path: Path) -> None:
    path = {"ranked": ranked_file, "labelled": labelled_file}[kind](tmp_path)
    data = (f"dataset={kind}_file", f"dataset.path={path}", "dataset.test_share=0.3", "dataset.validation_share=0.3")
    found = run_small(tmp_path, *words.split(), *data, "reward=length")
    assert found.result["status"] == "complete"
    losses = [row["train/loss"] for row in found.metrics if "train/loss" in row]
    assert len(losses) == 8
    assert all(math.isfinite(loss) for loss in losses)
    last = found.metrics[-2]
    if words == "loss=rrhf":
        assert last["train/n_ranked_pairs"] >= 1
        assert 0 <= last["train/ranked_accuracy"] <= 1
    if words == "loss=kto":
        assert {"train/logps/desirable", "train/kl", "train/rewards/chosen"} <= last.keys()
        assert found.result["held_out"] == {"n_pairs": 0}
        with pytest.raises(UserError, match=r"held_out\.accuracy"):
            run_small(tmp_path, *words.split(), *data, "reward=length", "objectives=[held_out.accuracy]")


@pytest.mark.parametrize("loss", ["dpo", "unll", "rrhf"])
def test_labelled_answers_without_pairs_are_refused_before_sft(loss: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"which phase main needs for loss={loss}"):
        run_small(
            tmp_path,
            f"loss={loss}",
            "dataset=labelled_file",
            f"dataset.path={labelled_file(tmp_path)}",
            "reward=length",
        )
    assert not (tmp_path / "cache" / "sft").exists()


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
