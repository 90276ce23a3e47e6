"""Whole searches: pruned, killed and resumed, with workers, replicates, baselines and results."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from optuna.trial import TrialState

from dppo.search import study as studies
from tests.conftest import outside, small
from tests.forks import Forks
from tests.memory_limits import n_killed, starving
from tests.searches import until
from tests.test_command_line import typed
from tests.test_sweeper import counted, load, rows

# Longer answers win: a matter of the learning rate, so that trials differ and bad ones are seen early.
SEARCH = ["-m", "hydra/sweeper=optuna", "reward=length", "evaluation.split=validation", *small("train.steps=20")]
PRUNED = [
    *SEARCH,
    "loss=dpo",
    "train.learning_rate=tag(log,interval(1e-4,1e-1))",
    "hydra.sweeper.pruner.n_startup_trials=3",
    "hydra.sweeper.sampler.n_startup_trials=3",
]


def outcome(study: optuna.Study) -> list[Any]:
    return [
        (trial.params, trial.state, trial.value, trial.intermediate_values, trial.user_attrs.get(studies.WHY))
        for trial in counted(study)
    ]


def begun(directory: Path) -> int:
    return len(list(directory.glob("[0-9]*/config.yaml")))


def logs(directory: Path) -> str:
    """What the workers of a search have said."""
    return "".join(path.read_text() for path in (directory / "workers").glob("*.log"))


def test_a_pruned_search_killed_at_random_ends_as_an_undisturbed_one(
    forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    budget = "hydra.sweeper.n_trials=8"
    status, whole = typed(monkeypatch, tmp_path, *PRUNED, budget), capfd.readouterr()
    assert status == 0, whole.err
    undisturbed = outcome(load(tmp_path, "search"))
    states = [state for _, state, *_ in undisturbed]
    assert states.count(TrialState.PRUNED) >= 2
    assert states.count(TrialState.PRUNED) + states.count(TrialState.COMPLETE) == 8
    directory = tmp_path / "outputs" / "sweeps" / "search"
    (pruned, *_) = [trial for trial in counted(load(tmp_path, "search")) if trial.state == TrialState.PRUNED]
    result = json.loads((directory / str(pruned.number) / "result.json").read_text())
    assert result["status"] == "pruned"
    assert [row["percent"] for row in result["interim"]] == list(pruned.intermediate_values)
    assert pruned.user_attrs[studies.WHY] == result["pruned"]["reason"]
    assert "median pruner" in result["pruned"]["reason"]
    assert not (directory / str(pruned.number) / "samples.jsonl").exists()
    assert f"trial {pruned.number} pruned: " in whole.out
    assert "interim and final ranking agree (Spearman" in whole.out

    chance = random.Random(0)
    words = [*PRUNED, budget, "hydra.sweeper.study_name=other", "cache.dir=other", "hydra.sweeper.resume=true"]
    directory = tmp_path / "outputs" / "sweeps" / "other"
    for more in (1, 2):
        target = begun(directory) + more
        process = forks.start("dppo", words, cwd=tmp_path, env=outside())
        until(lambda target=target: begun(directory) >= target, process)  # type: ignore[misc]
        time.sleep(chance.uniform(0, 0.8))
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in directory.glob("[0-9]*/**/*") if path.is_file()}
    status, resumed = typed(monkeypatch, tmp_path, *words), capfd.readouterr()
    assert status == 0, resumed.err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "no directory is overwritten"
    study = load(tmp_path, "other")
    assert outcome(study) == undisturbed
    assert len({str(trial.params) for trial in counted(study)}) == 8
    abandoned = [trial for trial in study.get_trials() if studies.ABANDONED in trial.user_attrs]
    assert len(study.get_trials()) == 8 + len(abandoned)
    for trial in abandoned:
        assert f"trial {trial.number} was abandoned" in resumed.out

    # What a search leaves.
    trials = counted(study)
    table = rows(directory / "trials.csv")
    assert [int(row["trial"]) for row in table] == [trial.number for trial in trials]
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    winner = max(complete, key=lambda trial: trial.values[0])
    line = winner.user_attrs[studies.COMMAND]
    assert f"best trial {winner.number}: win_rate.value" in resumed.out
    assert line in resumed.out
    assert line + "\n" == (directory / str(winner.number) / "command.txt").read_text()
    best = yaml.safe_load((directory / "best.yaml").read_text())
    assert best["train"]["learning_rate"] == winner.params["train.learning_rate"]
    assert typed(monkeypatch, tmp_path, *shlex.split(line)[3:], "hydra.run.dir=pasted", "cache.dir=other") == 0
    assert "build " not in capfd.readouterr().out, "the line makes the same run"
    assert typed(monkeypatch, tmp_path, *words) == 0
    assert outcome(load(tmp_path, "other")) == undisturbed, "n_trials is the total"


def test_three_workers_build_each_stage_once_and_one_that_is_killed_loses_only_its_trial(
    forks: Forks, tmp_path: Path
) -> None:
    words = [*SEARCH, "loss=dpo", "train.learning_rate=tag(log,interval(1e-4,1e-1))", "hydra/sweeper/pruner=none"]
    words += ["hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=3", 'hydra.sweeper.baselines=["loss=none"]']
    log = tmp_path / "log"
    with log.open("w") as file:
        process = forks.start("dppo", words, cwd=tmp_path, env=outside(), stdout=file.fileno(), stderr=file.fileno())
    directory = tmp_path / "outputs" / "sweeps" / "search"
    # What the trials share is built by then: whatever was under way would be begun twice.
    until(lambda: begun(directory) >= 2 and "build preference" in logs(directory), process)
    running = [trial for trial in load(tmp_path, "search").get_trials() if trial.state == TrialState.RUNNING]
    victim = running[0]
    pid = victim.user_attrs[studies.OWNER]["pid"]
    with starving(pid) as starved:  # the system kills it for want of memory, where we may say how much it has
        if not starved:
            os.kill(pid, signal.SIGKILL)
        assert process.wait(timeout=240) == 0, log.read_text()
        assert n_killed(pid) == starved
    study = load(tmp_path, "search")
    trials = counted(study)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 6
    assert len({trial.params["train.learning_rate"] for trial in trials}) == 6
    abandoned = [trial for trial in study.get_trials() if studies.ABANDONED in trial.user_attrs]
    assert [trial.number for trial in abandoned] == [victim.number]
    for stage in ("sft", "reference"):
        assert logs(directory).count(f"the first {stage}") == 1, f"{stage} is built once"
    assert len({trial.user_attrs[studies.OWNER]["pid"] for trial in trials}) > 1
    shown = log.read_text()
    assert "was killed by signal 9" in shown
    assert "[worker " in shown
    assert "result" not in shown.partition("\ntrial  ")[0]
    assert len(rows(directory / "trials.csv")) == 7


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    words = [*PRUNED, "hydra.sweeper.n_trials=50", "hydra.sweeper.n_jobs=2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dppo", *words], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until(lambda: begun(tmp_path / "outputs" / "sweeps" / "search") >= 2, process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_replicates_baselines_constraints_and_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [
        *SEARCH,
        "loss=unll",
        "alpha=choice(0.001,1.0)",
        "train.learning_rate=choice(1e-4,0.08)",
        "+hydra.sweeper.labels={alpha:scientific}",
        "hydra/sweeper/pruner=none",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.replicates=2",
        "hydra.sweeper.test_seeds=2",
        'hydra.sweeper.baselines=["loss=none","loss=dpo beta=0.5"]',
        'hydra.sweeper.enqueue=["alpha=1.0 train.learning_rate=1e-4","alpha=1.0 train.learning_rate=0.08"]',
        'hydra.sweeper.constraints=["kl.nats_per_token<=1e-3"]',
    ]
    assert typed(monkeypatch, tmp_path, *words) == 0
    printed = capfd.readouterr().out
    directory = tmp_path / "outputs" / "sweeps" / "search"
    study = load(tmp_path, "search")
    trials = counted(study)
    assert trials[0].params == {"alpha": 1.0, "train.learning_rate": 1e-4}
    assert [trial.params["alpha"] for trial in trials[1:]] == [1.0, 0.001, 1.0], "then every choice in turn"
    for trial in trials:
        seeds = trial.user_attrs[studies.SEEDS]
        assert list(seeds) == ["0", "1"]
        found = [
            json.loads((directory / str(trial.number) / f"seed={seed}" / "result.json").read_text()) for seed in seeds
        ]
        assert trial.value == pytest.approx(sum(one["win_rate"]["value"] for one in found) / 2)
        kl = sum(one["kl"]["nats_per_token"] for one in found) / 2
        assert trial.constraints["kl.nats_per_token<=1e-3"] == pytest.approx(kl - 1e-3)
        config = yaml.safe_load((directory / str(trial.number) / "seed=1" / "config.yaml").read_text())
        assert config["seed"] == 1
    fast = [trial for trial in trials if trial.params["train.learning_rate"] == 0.08]
    assert fast and all(trial.constraints["kl.nats_per_token<=1e-3"] > 0 for trial in fast)
    table = rows(directory / "trials.csv")
    assert [row["trial"] for row in table[:2]] == ["loss=none", "loss=dpo beta=0.5"]
    assert float(table[0]["win_rate.value"]) == 0.5
    assert {row["feasible"] for row in table[2:]} == {"true", "false"}
    assert "violates kl.nats_per_token<=1e-3" in printed
    winners = [line for line in printed.splitlines() if re.match(r"best alpha=\S+ trial \d+: win_rate", line)]
    assert winners
    for line in winners:
        number = int(line.partition(" trial ")[2].partition(":")[0])
        assert study.get_trials()[number].constraints["kl.nats_per_token<=1e-3"] <= 0
    # Results: seeds that no trial had, test prompts.
    with (directory / "results.csv").open() as file:
        results = list(csv.DictReader(file))
    assert {"loss=none", "loss=dpo beta=0.5"} < {row["configuration"] for row in results}
    for place in directory.glob("results/*/*"):
        config = yaml.safe_load((place / "config.yaml").read_text())
        assert config["seed"] in (2, 3)
        assert config["evaluation"]["split"] == "test"
        assert json.loads((place / "result.json").read_text())["split"] == "test"
    assert len(list(directory.glob("results/*/*/result.json"))) == 2 * len(results)
    assert "noise between seeds: standard deviation" in printed
    assert "result: fresh seeds, 8 test prompts" in printed
    assert {path.name for path in (directory / "plots").glob("*.png")} >= {"history.png", "slices.png", "timeline.png"}


def test_a_study_that_goes_on_has_results_of_its_new_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*SEARCH, "loss=dpo", "train.learning_rate=choice(1e-4,0.08)", "hydra/sweeper/sampler=grid"]
    words += ["hydra/sweeper/pruner=none", "hydra.sweeper.test_seeds=1", "hydra.sweeper.storage=null"]
    words += ["evaluation.interim.n_points=1", "evaluation.interim.max_kl=100.0"]  # results are not measured on the way
    assert typed(monkeypatch, tmp_path, *words, "hydra.sweeper.n_trials=1") == 0
    assert re.search(r"^best trial 0 +1 +0\.", capfd.readouterr().out, re.MULTILINE)
    assert typed(monkeypatch, tmp_path, *words, "hydra.sweeper.n_trials=2", "hydra.sweeper.resume=true") == 0
    printed = capfd.readouterr().out
    assert re.search(r"^best trial 1 +1 +1\.", printed, re.MULTILINE)
    assert not re.search(r"^best trial 0 +1 ", printed, re.MULTILINE)
    folders = sorted(path.name for path in (tmp_path / "outputs" / "sweeps" / "search" / "results").iterdir())
    assert folders == ["best,trial,0", "best,trial,1"]


def test_no_further_seed_for_a_trial_that_is_worse_than_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*SEARCH, "loss=dpo", "train.learning_rate=choice(0.08,1e-4)", "hydra/sweeper/sampler=grid"]
    words += ["hydra/sweeper/pruner=wilcoxon", "hydra.sweeper.replicates=2", "hydra.sweeper.value=lower_bound"]
    assert typed(monkeypatch, tmp_path, *words) == 0
    directory = tmp_path / "outputs" / "sweeps" / "search"
    best, worse = load(tmp_path, "search").get_trials()
    assert best.state == TrialState.COMPLETE
    mean, low, _ = best.user_attrs[studies.INTERVALS][0]
    assert (best.value, mean) == (low, 1.0)
    assert low < 1, "the sampler is told the lower end"
    assert worse.state == TrialState.PRUNED
    assert [path.name for path in sorted((directory / "1").glob("seed=*"))] == ["seed=0"]
    assert json.loads((directory / "1" / "seed=0" / "result.json").read_text())["status"] == "complete"
    assert "worse than the best trial after 1 of 2 seeds" in capfd.readouterr().out


def test_a_function_may_suggest_further_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_space.py").write_text(
        "def suggest(config, trial):\n"
        "    steps = trial.params['train.steps']\n"
        "    assert config.train.batch_size == 4\n"
        "    trial.suggest_float('train.weight_decay', 0.0, 0.1 * steps)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [word for word in SEARCH if not word.startswith("train.steps")]
    words += ["loss=dpo", "train.steps=choice(2,3)", "hydra.sweeper.n_trials=2", "hydra/sweeper/pruner=none"]
    words += ["allowed_targets=[my_space]", "hydra.sweeper.custom_search_space=my_space.suggest"]
    assert typed(monkeypatch, tmp_path, *words) == 0
    for trial in load(tmp_path, "search").get_trials():
        place = tmp_path / "outputs" / "sweeps" / "search" / str(trial.number)
        config = yaml.safe_load((place / "config.yaml").read_text())
        assert config["train"]["weight_decay"] == trial.params["train.weight_decay"]
        assert trial.distributions["train.weight_decay"].high == 0.1 * trial.params["train.steps"]  # type: ignore[attr-defined]
    assert "train.weight_decay" in capfd.readouterr().out


def test_a_trial_without_memory_is_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    words = ["-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra/sweeper/pruner=none", "loss=dpo"]
    words += ["model.hidden_size=choice(65536,16)", *[word for word in small() if "model.hidden_size" not in word]]
    done = subprocess.run(
        [sys.executable, "-m", "dppo", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30)),
    )
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "outputs" / "sweeps" / "search"
    assert [row["state"] for row in rows(directory / "trials.csv")] == ["failed", "complete"]
    (failed, _) = load(tmp_path, "search").get_trials()
    assert "memory" in failed.user_attrs[studies.ERROR]


def test_alpha_is_calibrated_by_the_strength_of_the_penalty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "+sweep=alpha_zeta", "hydra.sweeper.n_trials=1", "hydra.sweeper.baselines=[]", *small()]
    words.append("hydra.sweeper.test_seeds=0")
    assert typed(monkeypatch, tmp_path, *words) == 0
    printed = capfd.readouterr().out
    directory = tmp_path / "outputs" / "sweeps" / "alpha_zeta"
    strength = json.loads((directory / "calibration" / "strength.json").read_text())
    assert strength["n_pairs"] == 32
    study = load(tmp_path, "alpha_zeta")
    distribution = study.get_trials()[0].distributions["alpha"]
    assert isinstance(distribution, optuna.distributions.FloatDistribution)
    assert distribution.low == pytest.approx(0.003 / strength["mean"], rel=5e-3)
    assert distribution.high == pytest.approx(10 / strength["mean"], rel=5e-3)
    assert "F = " in printed
    # Stored with the study: a resumed one does not measure it again.
    (directory / "calibration" / "strength.json").write_text(json.dumps({**strength, "mean": strength["mean"] * 2}))
    assert typed(monkeypatch, tmp_path, *words, "hydra.sweeper.resume=true") == 2
    assert "its trials were made with something else: alpha: tag(log, " in capfd.readouterr().err
