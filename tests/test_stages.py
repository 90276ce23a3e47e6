"""The cache's promise through the whole pipeline: change X, and exactly these stages are built again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dppo.results import NUMBERS, final_scalars
from tests.runs import Finished, run_small

BASE = ("loss=unll", "penalty=quadratic", "alpha=0.1")
TRAINING = ["preference", "answers", "scores", "drift", "compare"]
# Another policy may give the same short answers; then there is nothing new to score.
SCORES_MAY_HIT = {"scores"}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    root = tmp_path_factory.mktemp("warm")
    return root, run_small(root, *BASE)


def copy_of(root: Path, target: Path) -> Path:
    shutil.copytree(root / "cache", target / "cache")
    return target


def test_a_cold_run_builds_every_stage(warm: tuple[Path, Finished]) -> None:
    stages = ["sft", "y_gen", "reference", "preference", "answers", "baseline", "scores", "drift", "compare"]
    assert warm[1].stages == stages
    assert warm[1].built == stages


def test_the_same_run_builds_nothing_and_replays_its_metrics(warm: tuple[Path, Finished], tmp_path: Path) -> None:
    again = run_small(copy_of(warm[0], tmp_path), *BASE)
    assert again.built == []
    assert again.metrics == warm[1].metrics
    assert again.values == warm[1].values
    assert again.samples == warm[1].samples


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        (["alpha=0.2"], TRAINING),
        (["beta=0.3"], TRAINING),
        (["penalty=linear"], TRAINING),
        (["penalty=expectile", "zeta=0.3"], TRAINING),
        (["loss=minll"], TRAINING),
        (["loss=dpo"], TRAINING),
        (["train.learning_rate=1e-3"], TRAINING),
        (["seed=1"], TRAINING),
        (["train.n_examples=12"], TRAINING),
        (["reward.surplus_word=0.3"], ["scores", "compare"]),
        (["evaluation.n_bootstrap=200"], ["compare"]),
        (["train.tokens_per_micro_batch=64"], []),
        (["train.log_every=3"], []),
        (["generation.tokens_per_batch=100"], []),
        (["objectives=[kl.nats_per_token]"], []),
        (["evaluation.n_prompts=6"], ["compare"]),
        (["evaluation.n_kl_prompts=3"], ["drift"]),
        (
            ["generation.max_new_tokens=6"],
            ["y_gen", "reference", "preference", "answers", "baseline", "scores", "drift", "compare"],
        ),
        (
            ["sft.train.steps=3"],
            ["sft", "y_gen", "reference", "preference", "answers", "baseline", "scores", "drift", "compare"],
        ),
        (
            ["sft.seed=1"],
            ["sft", "y_gen", "reference", "preference", "answers", "baseline", "scores", "drift", "compare"],
        ),
        (["train.packing=padded"], ["reference", "preference", "answers", "scores", "drift", "compare"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_a_change_rebuilds_exactly_what_depends_on_it(
    warm: tuple[Path, Finished], tmp_path: Path, change: list[str], rebuilt: list[str]
) -> None:
    given = {word.partition("=")[0] for word in change}
    kept = [word for word in BASE if word.partition("=")[0] not in given]
    if "loss=dpo" in change:
        kept = []
    found = run_small(copy_of(warm[0], tmp_path), *kept, *change)
    assert set(found.built) - SCORES_MAY_HIT == set(rebuilt) - SCORES_MAY_HIT
    if "scores" not in rebuilt:
        assert "scores" not in found.built


def test_y_gen_and_log_probs_are_added_for_new_pairs_only(warm: tuple[Path, Finished], tmp_path: Path) -> None:
    """Other seeds visit other pairs of a subset: the stores grow by exactly those."""
    root = tmp_path
    first = run_small(root, *BASE, "train.n_examples=8", "seed=0")
    smaller = run_small(root, *BASE, "train.n_examples=6", "seed=0")
    assert {"y_gen", "reference"} <= set(first.built)
    assert not {"y_gen", "reference"} & set(smaller.built), "6 pairs lie within 8"
    larger = run_small(root, *BASE, "train.n_examples=16", "seed=0")
    assert {"y_gen", "reference"} <= set(larger.built)
    stores = list((root / "cache" / "generate").iterdir())
    assert len(stores) > 1, "the SFT model's and each policy's"
    for store in stores:
        lines = "".join(path.read_text() for path in store.rglob("*.jsonl")).splitlines()
        keys = [json.loads(line)["key"] for line in lines]
        assert keys
        assert len(keys) == len(set(keys)), "no answer was made twice"


def test_a_loss_runs_only_the_stages_that_it_needs(tmp_path: Path) -> None:
    assert not {"y_gen", "baseline"} & set(run_small(tmp_path, "loss=dpo").stages[:3])
    assert "y_gen" not in run_small(tmp_path, "loss=dpo").stages
    free = run_small(tmp_path, "loss=sft").stages
    assert "y_gen" not in free
    assert "reference" not in free


def test_the_cut_of_a_batch_counts_only_for_statistics_of_each_micro_batch(tmp_path: Path) -> None:
    words = ["loss=alpha_dpo", "loss.stats_scope=micro_batch"]
    run_small(tmp_path, *words)
    assert "preference" in run_small(tmp_path, *words, "train.tokens_per_micro_batch=100").built
    assert run_small(tmp_path, *words).built == []


def test_sft_against_itself_is_a_tie_everywhere(tmp_path: Path) -> None:
    found = run_small(tmp_path, "loss=none").result
    rate = found["win_rate"]
    assert (rate["value"], rate["ci_low"], rate["ci_high"]) == (0.5, 0.5, 0.5)
    assert (rate["strict"], rate["wins"], rate["ties"]) == (0.0, 0, rate["n"])
    assert found["kl"]["nats_per_token"] == 0.0
    assert found["reward"]["delta"]["value"] == 0.0


def test_every_number_of_a_result_can_be_an_objective_and_no_other(warm: tuple[Path, Finished]) -> None:
    result = warm[1].result
    # How long it trained, and on how many processes, is no outcome.
    numbers = {name for name in final_scalars(result) if not name.startswith(("schema", "training.", "processes"))}
    assert numbers == NUMBERS


def test_a_result_says_what_each_phase_trained_on(warm: tuple[Path, Finished], tmp_path: Path) -> None:
    assert warm[1].result["training"] == {"main": {"n_examples": 32, "steps": 8}}
    assert run_small(warm[0], "train.n_examples=12").result["training"] == {"main": {"n_examples": 12, "steps": 8}}
    assert run_small(warm[0], "loss=none").result["training"] == {}


def test_several_objectives_are_a_tuple_in_their_order(warm: tuple[Path, Finished], tmp_path: Path) -> None:
    found = run_small(copy_of(warm[0], tmp_path), *BASE, "objectives=[win_rate.value,kl.nats_per_answer]")
    assert found.values == (found.result["win_rate"]["value"], found.result["kl"]["nats_per_answer"])


def test_alpha_0_is_the_base_loss(warm: tuple[Path, Finished], tmp_path: Path) -> None:
    root = copy_of(warm[0], tmp_path)
    without = run_small(root, "loss=dpo").metrics
    zero = run_small(root, "loss=unll", "alpha=0").metrics
    assert [row["train/loss"] for row in zero if "train/loss" in row] == pytest.approx(
        [row["train/loss"] for row in without if "train/loss" in row], rel=1e-5
    )


def test_a_diverged_run_is_a_result_with_the_worst_objective(tmp_path: Path) -> None:
    found = run_small(tmp_path, "loss=dpo", "train.learning_rate=1e30", "objectives=[win_rate.value,kl.nats_per_token]")
    assert found.result["status"] == "diverged"
    assert found.result["diverged"]["example_ids"]
    assert found.values == (0.0, float("inf"))
    again = run_small(tmp_path, "loss=dpo", "train.learning_rate=1e30")
    assert again.built == [], "a diverged run is not tried again"


def test_phases_chain_and_previous_makes_a_new_reference(tmp_path: Path) -> None:
    words = ["+experiment=unll_then_dpo", "phases.unll.train.steps=3", "phases.dpo.train.steps=2"]
    one = run_small(tmp_path, *words)
    assert [item["stage"] for item in one.result["timings"]["stages"]].count("preference") == 2
    steps = [row["step"] for row in one.metrics if "train/loss" in row]
    assert steps == sorted(steps)
    assert {row["phase"] for row in one.metrics} == {"unll", "dpo"}
    fresh = run_small(tmp_path, *words, "phases.dpo.reference=previous")
    assert "reference" in fresh.built
    assert fresh.built.count("preference") == 1, "the first phase is reused"
