"""Measurements during the last phase: they change nothing, are what they say, and may end a run that can go on."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dppo import compare, config, loop, pipeline
from dppo.artifacts import Cache
from dppo.config import Experiment, InterimSettings
from dppo.data.encoding import ChatEncoder
from dppo.errors import UserError
from dppo.evaluation.runs import find_runs
from dppo.loop import Interim, Metrics
from dppo.losses.penalised import PenalisedLoss
from dppo.losses.penalties import Expectile
from dppo.models import load_saved
from dppo.types import Json
from tests.conftest import Run, small
from tests.forks import Forks
from tests.runs import Finished, run_pruned, run_small
from tests.test_weights_and_biases import offline
from tests.tiny_models import own_log_probs

POINTS = "evaluation.interim.n_points=3"  # of 8 steps: after 2, 4 and 6
# Steep enough that answers differ from the SFT model's, and a rate that does not depend on the number of steps.
STEEP = (
    "loss=dpo",
    "sft.train.steps=40",
    "sft.train.evaluate_every=20",
    "sft.train.learning_rate=0.01",
    "train.learning_rate=0.03",
    "train.schedule=constant",
    "train.warmup_ratio=0",
)


@dataclasses.dataclass
class Told:
    """A verdict that notes what it is told, and ends the run at the row of number ``at``."""

    at: int | None = None
    rows: list[Metrics] = dataclasses.field(default_factory=list)

    def __call__(self, row: Metrics) -> str | None:
        self.rows.append(row)
        return "too little" if len(self.rows) == self.at else None

    @property
    def percents(self) -> list[float]:
        return [row["interim/percent"] for row in self.rows]


def policy(root: Path) -> Path:
    """The one artifact of preference training in the cache."""
    (found,) = (root / "cache" / "preference").iterdir()
    return found


def weights(root: Path) -> bytes:
    (path,) = policy(root).glob("*model.safetensors")  # of adapters: adapter_model.safetensors
    return path.read_bytes()


def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those of interim measurements and without what a clock says."""
    clocks = ("train/seconds_per_step", "train/tokens_per_second")
    return [
        {name: value for name, value in row.items() if name not in clocks}
        for row in rows
        if "interim/percent" not in row
    ]


# --- it changes nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["loss=unll", "alpha=0.1", "train.dropout=0.1", "evaluation.interim.max_kl=1e9"],
        ["loss=dpo", "train.packing=padded"],
        ["loss=dpo", "train=lora", "train.lora.dropout=0.1", "evaluation.interim.max_kl=1e9"],
        ["loss=kto", "evaluation.interim.metric=accuracy"],
    ],
    ids=["packed", "padded", "lora", "accuracy"],
)
def test_measuring_changes_nothing(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a weight, not an answer, not a row; the model is as it was, drawn numbers included."""
    plain = run_small(tmp_path / "plain", *[word for word in words if not word.startswith("evaluation.interim.")])
    measure, seen = loop._Run.interim, []

    def state(run: loop._Run, scorer: Any) -> list[Any]:
        modes = [module.training for module in run.scorer.modules()]
        return [modes, scorer.packing, scorer._base.config._attn_implementation, torch.get_rng_state().tolist()]

    def watched(self: loop._Run, interim: Interim, scorer: Any, *rest: Any) -> Metrics:
        before = state(self, scorer)
        found = measure(self, interim, scorer, *rest)
        assert state(self, scorer) == before
        seen.append(before)
        return found

    monkeypatch.setattr(loop._Run, "interim", watched)
    measured = run_small(tmp_path / "measured", *words, POINTS)
    assert weights(tmp_path / "measured") == weights(tmp_path / "plain")
    assert measured.samples == plain.samples
    assert measured.values == plain.values
    assert steady(measured.metrics) == steady(plain.metrics)
    assert len(seen) == 3
    for modes, packing, attention, _ in seen:
        assert all(modes)
        assert (attention == "dppo_shared_prompt") == (packing == "packed") == ("train.packing=padded" not in words)


# --- what is measured ------------------------------------------------------------------------------------------------


def test_a_row_is_what_the_run_would_have_been_worth_there(tmp_path: Path) -> None:
    """Trained for half of the steps: the same win rate and KL, on the same twelve prompts."""
    limits = ("evaluation.interim.n_prompts=12", "evaluation.interim.max_kl=1e9")
    whole = run_small(tmp_path, *STEEP, POINTS, *limits)
    rows = [row for row in whole.metrics if "interim/percent" in row]
    assert [(row["step"], row["interim/percent"]) for row in rows] == [(2, 25), (4, 50), (6, 75)]
    validation = ("evaluation.split=validation", "evaluation.n_prompts=12", "evaluation.n_kl_prompts=null")
    moved = []
    for row in rows[:2]:
        half = run_small(tmp_path, *STEEP, *validation, f"train.steps={row['step']}")
        points = {"win": 1.0, "tie": 0.5, "loss": 0.0}
        by_hand = [
            (sample["policy_reward"] > sample["reference_reward"])
            + 0.5 * (sample["policy_reward"] == sample["reference_reward"])
            for sample in half.samples
        ]
        assert by_hand == [points[sample["outcome"]] for sample in half.samples]
        assert row["interim/win_rate"] == row["interim/value"] == sum(by_hand) / 12 == half.values[0]
        assert row["interim/n_prompts"] == 12 == half.result["kl"]["n_answers"]
        assert row["interim/reward"] == pytest.approx(half.result["reward"]["policy"]["value"])
        assert row["interim/tokens"] == half.result["length"]["policy"]["tokens"]
        assert row["interim/kl_nats_per_token"] == pytest.approx(half.result["kl"]["nats_per_token"], rel=1e-6)
        moved.append(half.values[0])
    assert moved[0] != moved[1]
    assert all(math.isfinite(value) for row in rows for name, value in row.items() if name != "phase")
    assert all(row["interim/kl_nats_per_token"] > 0.01 for row in rows)


def test_reward_and_kl_along_training_lie_with_the_policy(tmp_path: Path) -> None:
    """The same training with and without a curve, each in its own artifact; intervals and KL of what was answered."""
    without = run_small(tmp_path, *STEEP, POINTS)
    curve = (*STEEP, POINTS, "evaluation.interim.kl=true", "evaluation.interim.n_prompts=12")
    found = run_small(tmp_path, *curve)
    assert "preference" in found.built and found.samples == without.samples
    rows = [row for row in found.metrics if "interim/percent" in row]
    assert len(rows) == 3
    for row in rows:
        assert 0 < row["interim/kl_nats_per_token"] <= row["interim/kl_nats_per_answer"]
        tokens = row["interim/kl_nats_per_answer"] / row["interim/kl_nats_per_token"]
        assert tokens == pytest.approx(row["interim/tokens"])
        assert row["interim/gain_ci_low"] <= row["interim/gain"] <= row["interim/gain_ci_high"]
        assert row["interim/win_rate_ci_low"] <= row["interim/win_rate"] <= row["interim/win_rate_ci_high"]
    baseline = [row["interim/reward"] - row["interim/gain"] for row in rows]
    assert baseline == pytest.approx([baseline[0]] * 3)
    again = run_small(tmp_path, *curve)  # from the cache, with the same rows
    assert again.built == [] and [row for row in again.metrics if "interim/percent" in row] == rows
    assert not any("kl_nats" in name for row in without.metrics for name in row)
    more = run_small(tmp_path, *curve, "evaluation.interim.n_points=1")
    assert "preference" in more.built


def test_accuracy_is_that_of_the_held_out_pairs(tmp_path: Path) -> None:
    found = run_small(
        tmp_path, *STEEP, POINTS, "evaluation.interim.metric=accuracy", "train.evaluate_every=2", "train.steps=8"
    )
    rows = [row for row in found.metrics if "interim/percent" in row]
    evaluated = {row["step"]: row["eval/accuracy"] for row in found.metrics if "eval/accuracy" in row}
    assert [row["interim/accuracy"] for row in rows] == [evaluated[step] for step in (2, 4, 6)]
    assert [row["interim/value"] for row in rows] == [row["interim/accuracy"] for row in rows]
    assert "interim/win_rate" not in rows[0]


def loaded(*words: str) -> Experiment:
    typed = small(*words, "device=cpu")
    return config.load(config.compose(typed), typed)


@pytest.fixture(scope="module")
def plain() -> Experiment:
    return loaded("loss=dpo")


@pytest.mark.parametrize(
    ("steps", "n_points", "expected"),
    [
        (8, 3, {2: 25, 4: 50, 6: 75}),
        (100, 4, {20: 20, 40: 40, 60: 60, 80: 80}),
        (8, 4, {2: 20, 3: 40, 5: 60, 6: 80}),
        (4, 99, {1: 25, 2: 50, 3: 75}),
        (3, 20, {1: 33, 2: 67}),
        (2, 9, {1: 50}),
        (1, 3, {}),
        (8, 0, {}),
    ],
)
def test_where_it_is_measured(steps: int, n_points: int, expected: dict[int, int], plain: Experiment) -> None:
    """Distinct steps in order, neither the first state nor the last one; of several shares at a step the nearest."""
    interim = dataclasses.replace(plain.evaluation.interim, n_points=n_points)
    experiment = dataclasses.replace(plain, evaluation=dataclasses.replace(plain.evaluation, interim=interim))
    percent_at, prompts = pipeline.interim_data(experiment, steps, ())
    assert list(percent_at.items()) == list(expected.items())
    assert len(prompts) == (16 if expected else 0)  # all that the data set has, of 64


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"n_points": 0, "max_kl": 0.1}, "max_kl=0.1: is looked at during training: set n_points as well"),
        ({"n_points": 0, "kl": True}, "kl=true: is measured during training: set n_points as well"),
        ({"max_kl": 0.0}, "max_kl=0.0: must be > 0 nats a token, or null"),
        ({"n_points": 100}, "n_points=100: must be a number from 0 to 99"),
        ({"n_prompts": 0}, "n_prompts=0: must be at least 1"),
        ({"metric": "reward"}, "metric=reward: must be one of win_rate, accuracy."),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, Any], said: str) -> None:
    usual = {"n_points": 3, "n_prompts": 64, "metric": "win_rate", "kl": False, "max_kl": None}
    with pytest.raises(UserError) as error:
        config.typed(InterimSettings, {**usual, **given}, "evaluation.interim")
    assert str(error.value) == f"evaluation.interim.{said}"


@pytest.mark.parametrize("loss", ["loss=kto", "loss=dpo"])
def test_accuracy_needs_pairs_to_rank(loss: str, tmp_path: Path) -> None:
    """Desirable answers alone, or pairs among the training prompts only."""
    rows = [{"prompt": f"question {at}", "completion": f"answer {at}", "label": True} for at in range(40)]
    rows += [{**rows[0], "completion": "no", "label": False}]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["dataset=labelled_file", f"dataset.path={path}", "reward=length", "dataset.validation_share=0.2", loss]
    words += ["sft=none", POINTS, "evaluation.interim.metric=accuracy", "train.evaluate_every=null"]
    with pytest.raises(UserError, match=r"evaluation\.interim\.metric=accuracy: there are no held-out pairs to rank"):
        run_small(tmp_path, *words)


# --- ended early -----------------------------------------------------------------------------------------------------


def test_a_verdict_ends_a_run_that_the_same_command_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alone = run_small(tmp_path / "alone", *STEEP, POINTS)
    root = tmp_path / "pruned"
    told = Told(at=2)
    pruned = run_pruned(root, *STEEP, POINTS, verdict=told)
    assert told.percents == [25, 50]
    assert pruned.result["status"] == "pruned"
    assert pruned.result["pruned"] == {"phase": "main", "step": 4, "reason": "too little"}
    expected = [row for row in alone.metrics if "interim/percent" in row]
    assert [(one["step"], one["percent"], one["value"]) for one in pruned.result["interim"]] == [
        (row["step"], row["interim/percent"], row["interim/value"]) for row in expected[:2]
    ]
    assert set(pruned.result["interim"][0]) == {
        "step", "percent", "value", "win_rate", "n_prompts", "reward", "tokens", "seconds",
    }  # fmt: skip
    assert pruned.metrics[-1]["step"] == 4
    assert steady(pruned.metrics) == steady([row for row in alone.metrics if row["step"] <= 4])
    assert not (pruned.directory / "samples.jsonl").exists()
    assert not (root / "cache" / "preference").exists()
    assert [path.name.rpartition("-")[0] for path in root.glob("cache/.work/*/step-*")] == ["step-000000004"]

    # Another verdict hears of the rows before the checkpoint, once each and in order, and then of the others.
    strict = Told(at=1)
    again = run_pruned(root, *STEEP, POINTS, verdict=strict)
    assert strict.percents == [25]
    assert again.result["pruned"]["step"] == 2
    assert [one["percent"] for one in again.result["interim"]] == [25]
    assert again.metrics[-1]["step"] == 2
    later = Told(at=3)
    assert run_pruned(root, *STEEP, POINTS, verdict=later).result["pruned"]["step"] == 6
    assert later.percents == [25, 50, 75]

    # Without a verdict it goes on, and ends as if nothing had been.
    heard = Told()
    whole = run_small(root, *STEEP, POINTS, verdict=heard)
    assert heard.percents == [25, 50, 75]
    assert json.loads((policy(root) / "manifest.json").read_text())["extra"]["continued_after"] == 6
    assert weights(root) == weights(tmp_path / "alone")
    assert whole.samples == alone.samples
    assert steady(whole.metrics) == steady(alone.metrics)
    assert len([row for row in whole.metrics if "interim/percent" in row]) == 3

    # The finished policy is pruned as it would be while it is trained, without training.
    cached = Told(at=2)
    short = run_pruned(root, *STEEP, POINTS, verdict=cached)
    assert cached.percents == [25, 50]
    assert cached.rows[1]["interim/value"] == expected[1]["interim/value"]
    assert "preference" not in short.built
    assert short.result["pruned"] == pruned.result["pruned"]
    assert [row["step"] for row in short.metrics] == [row["step"] for row in pruned.metrics]
    assert [one["percent"] for one in short.result["interim"]] == [25, 50]
    assert not (short.directory / "samples.jsonl").exists()
    assert policy(root).exists()

    # What was measured otherwise says nothing about this run.
    said = "  main: was trained without these interim measurements, so they cannot end it"
    caplog.set_level(logging.INFO, logger="dppo")
    run_small(root, *STEEP, POINTS)
    assert said not in caplog.messages
    for word in ("reward=length", "evaluation.interim.n_prompts=4", "generation.max_new_tokens=7"):
        other = Told(at=1)
        found = run_small(root, *STEEP, POINTS, word, verdict=other)
        assert found.result["status"] == "complete"
        assert other.percents == []
    assert caplog.messages.count(said) == 3
    fewer = Told()
    run_small(root, *STEEP, "evaluation.interim.n_points=1", verdict=fewer)
    assert fewer.percents == [50]


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    def dies(row: Metrics) -> str | None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run_small(tmp_path, "loss=dpo", POINTS, verdict=dies)
    heard = Told()
    found = run_small(tmp_path, "loss=dpo", POINTS, verdict=heard)
    assert heard.percents == [25, 50, 75]
    steps = [row["step"] for row in found.metrics if "train/loss" in row]
    assert steps == list(range(1, 9))
    assert [row["step"] for row in found.metrics if "eval/loss" in row] == [0, 5, 8]


def test_the_command_line_says_why_and_ends_well(
    forks: Forks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = small("loss=dpo", "device=cpu", f"cache.dir={tmp_path / 'cache'}")
    limit = [POINTS, "evaluation.interim.max_kl=1e-9", "tracking=wandb"]
    (tmp_path / "home").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
    environment = {**kept, "HOME": str(tmp_path / "home")}
    limited = [*words, *limit, "hydra.run.dir=runs/pruned"]
    done = forks.run("dppo", limited, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    directory = tmp_path / "runs" / "pruned"
    result = Finished(directory, ()).result
    (row,) = result["interim"]
    kl = row["kl_nats_per_token"]
    reason = f"KL to the reference is {kl:.3g} nats a token after 25 % of training, above "
    reason += "evaluation.interim.max_kl=1e-09"
    assert result["pruned"] == {"phase": "main", "step": 2, "reason": reason}
    lines = done.stdout.splitlines()
    assert f"pruned in phase main after step 2: {reason}" in lines
    assert not (directory / "samples.jsonl").exists()

    # W&B shows a run that ended as it should.
    _, summary, history, code = offline(directory)
    assert code == 0
    assert summary["status"] == "pruned"
    assert summary["final/pruned.step"] == 2
    assert [row["interim/percent"] for row in history if "interim/percent" in row] == [25]

    # Comparisons look at finished runs; nothing goes on from this one.
    with pytest.raises(UserError, match=r"no finished run \(result\.json\) in there"):
        find_runs([tmp_path / "runs"])
    with pytest.raises(UserError) as error:
        run_small(tmp_path, "loss=dpo", f"init_from={directory}")
    assert str(error.value).startswith(f"init_from={directory}: that run is pruned; finish it first: python -m dppo ")
    assert "\n" not in str(error.value)
    composed = config.compose(words)
    resolved: dict[str, Json] = {"seed": 0, "loss": "dpo"}
    pipeline.run(config.load(composed, words), tmp_path / "runs" / "whole", resolved=resolved, overrides=words)
    assert [run.path.name for run in find_runs([tmp_path / "runs"])] == ["whole"]
    assert cast("Callable[[list[str]], int]", compare.main)([str(tmp_path / "runs"), "--n-bootstrap", "100"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "pruned" in line] == [line for line in said if line.startswith("left out: ")]


def test_two_processes_end_together(two_processes: Run, tmp_path: Path) -> None:
    """Pruned while training, after a checkpoint, never, and from the cache."""
    limits = "evaluation.interim.max_kl=1e-9,2e-9,1e9,3e-9"
    words = small("loss=dpo", "device=cpu", "train.tokens_per_micro_batch=100", "evaluation.interim.n_points=1")
    done = two_processes("-m", *words, limits, "hydra.sweep.dir=runs", "cache.dir=cache", timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    jobs = [Finished(tmp_path / "runs" / str(number), ()) for number in range(4)]
    assert [job.result["status"] for job in jobs] == ["pruned", "pruned", "complete", "pruned"]
    assert [job.result["pruned"]["step"] for job in (jobs[0], jobs[1], jobs[3])] == [4, 4, 4]
    assert [len(job.result["interim"]) for job in (jobs[0], jobs[1], jobs[3])] == [1, 1, 1]
    assert done.stdout.count("pruned in phase main after step 4") == 3, "only the first process speaks"
    assert "continues after step 4" in done.stdout


# --- the strength of a penalty, for alpha=calibrated -----------------------------------------------------------------


WHOLE = "train.max_length=null"  # no answer is cut


@pytest.fixture(scope="module")
def margins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A cache with an SFT model, and the margins (32,) of all training pairs under it, computed plainly in fp64."""
    root = tmp_path_factory.mktemp("strength")
    experiment = loaded("loss=unll", "alpha=1", WHOLE, f"cache.dir={root / 'cache'}")
    pipeline.penalty_strength(experiment)
    (found,) = Cache(root / "cache").root.glob("sft/*")
    model = load_saved(found).double()
    encoder = ChatEncoder(experiment.model.load_tokenizer())
    examples = encoder.encode(experiment.dataset.pairs("train"), None).examples
    assert len(examples) == 32
    with torch.no_grad():
        rows = own_log_probs(model, examples)
    sizes = [len(answer.token_ids) for example in examples for answer in example.responses]
    sums = torch.stack([part.sum() for part in rows.split(sizes)]).view(-1, 2)
    roles = [tuple(answer.role for answer in example.responses) for example in examples]
    assert set(roles) == {("chosen", "rejected")}
    return root, sums[:, 0] - sums[:, 1]


@pytest.mark.parametrize(
    ("words", "f"),
    [
        (["penalty=quadratic"], lambda r: r**2 if r < 0 else 0.0),
        (["penalty=sqrt"], lambda r: math.sqrt(-r) if r < 0 else 0.0),
        (["penalty=constant"], lambda r: 1.0 if r < 0 else 0.0),
        (["penalty=expectile", "zeta=0.5"], lambda r: 0.5 * r**2),
        (["penalty=expectile", "zeta=0.2"], lambda r: (0.8 if r < 0 else 0.2) * r**2),
        (["penalty=expectile", "zeta=0.2", "penalty.form=literal"], lambda r: (0.8 if r < 0 else 0.2) * r**2),
    ],
)
def test_strength_by_hand(words: list[str], f: Callable[[float], float], margins: tuple[Path, torch.Tensor]) -> None:
    root, r = margins
    found = pipeline.penalty_strength(loaded("loss=unll", "alpha=1", *words, WHOLE, f"cache.dir={root / 'cache'}"))
    assert found["n_pairs"] == 32
    assert found["mean"] == pytest.approx(sum(map(f, r.tolist())) / 32, rel=1e-4)
    assert found["open"] == float((r < 0).double().mean())
    assert 0 < found["open"] < 1


def test_strength_is_looked_at_in_the_penalised_phase_before_alpha(margins: tuple[Path, torch.Tensor]) -> None:
    root, _ = margins
    cache = f"cache.dir={root / 'cache'}"
    whole = pipeline.penalty_strength(loaded("loss=unll", "alpha=0.001", cache))
    assert whole == pipeline.penalty_strength(loaded("loss=minll", "alpha=1", cache))
    chained = loaded("+experiment=unll_then_dpo", "alpha=0.1", cache)
    assert isinstance(next(iter(chained.phases.values())).loss, PenalisedLoss)
    assert pipeline.penalty_strength(chained) == whole
    some = pipeline.penalty_strength(loaded("loss=unll", "alpha=1", "train.n_examples=8", cache))
    assert some["n_pairs"] == 8
    literal = loaded("loss=unll", "alpha=1", "penalty=expectile", "zeta=0.3", "penalty.form=literal", cache)
    (phase,) = literal.phases.values()
    assert isinstance(phase.loss, PenalisedLoss)
    assert isinstance(phase.loss.penalty, Expectile)
    assert phase.loss.penalty.form == "literal", "the run itself keeps it"


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_strength_without_a_penalty_is_refused(loss: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="alpha=calibrated: no loss of this run has a penalty"):
        pipeline.penalty_strength(loaded(f"loss={loss}", f"cache.dir={tmp_path / 'cache'}"))
    assert not (tmp_path / "cache").exists()
