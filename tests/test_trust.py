"""What a search says about itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from dppo.evaluation.win_rates import Interval
from dppo.search import study as studies
from dppo.search import trust
from dppo.search.overview import BaselineLine
from dppo.search.report import overview
from dppo.search.samplers import sampler_from
from dppo.search.space import Space
from tests.test_sweeper import ALPHA, MAXIMIZE, search_settings, settings_of


def test_rank_correlation_shares_ties() -> None:
    stats = pytest.importorskip("scipy.stats")
    for first, second in (
        ([1, 2, 3, 4, 5], [1, 2, 4, 3, 5]),
        ([0.1, 0.1, 0.5, 0.3, 0.9, 0.5], [3, 1, 4, 1, 5, 9]),
        ([3, 2, 1, 0], [1, 2, 2, 4]),
    ):
        found = trust.rank_correlation(first, second)
        assert found.value == pytest.approx(stats.spearmanr(first, second).statistic)
        assert found.low < found.value < found.high
    assert math.isnan(trust.rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]).value)
    perfect = trust.rank_correlation([1, 2, 3], [2, 4, 9])
    assert perfect.value == pytest.approx(1.0)
    assert math.isnan(perfect.low)


def finished(folder: Path, trials: list[dict[str, Any]]) -> studies.Study:
    """A study whose trials have these seeds' values and interim values."""
    settings = search_settings(n_trials=len(trials))
    found = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler())
    for index, one in enumerate(trials):
        mean = sum(one["seeds"]) / len(one["seeds"])
        found.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=mean,
                params={"alpha": 0.1},
                distributions={"alpha": ALPHA.distribution()},
                intermediate_values=one.get("interim", {}),
                user_attrs={
                    studies.INDEX: index,
                    studies.STATUS: "complete",
                    studies.COMMAND: "python -m dppo",
                    studies.OWNER: {"host": "here", "pid": 1},
                    studies.SEEDS: {str(seed): [value] for seed, value in enumerate(one["seeds"])},
                },
            )
        )
    sampler = sampler_from(settings_of("random"), MAXIMIZE)
    return studies.Study(found, settings, Space((ALPHA,), {}, {}), sampler, folder, [])


def test_how_well_interim_values_foretold_the_final_ones(tmp_path: Path) -> None:
    study = finished(
        tmp_path,
        [
            {"seeds": [value], "interim": {20: guess, 80: value}}
            for value, guess in ((0.5, 3), (0.6, 2), (0.7, 1), (0.8, 0))
        ],
    )
    (line,) = trust.foretold(overview(study, ["win_rate.value"]))
    assert "4 complete trials" in line
    assert "-1.00 at 20 %" in line
    assert "1.00 at 80 %" in line
    assert trust.foretold(overview(finished(tmp_path, [{"seeds": [0.5]}] * 4), ["win_rate.value"])) == []


def test_the_noise_between_seeds_is_pooled_over_configurations(tmp_path: Path) -> None:
    study = finished(tmp_path, [{"seeds": [0.5, 0.6]}, {"seeds": [0.8, 0.82, 0.84]}])
    (line,) = trust.noise(study, overview(study, ["win_rate.value"]))
    pooled = math.sqrt((0.005 + 0.0008) / 3)
    assert f"standard deviation {pooled:.4f} (3 degrees of freedom)" in line
    study = finished(tmp_path, [{"seeds": [0.5]}])
    (line,) = trust.noise(study, overview(study, ["win_rate.value"]))
    assert "unknown" in line
    assert trust.noise(study, overview(study, ["kl.nats_per_token"])) == []


def test_what_it_takes_to_see_a_small_gain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = finished(tmp_path, [{"seeds": [0.8, 0.82]}])
    base = BaselineLine("loss=dpo", (Interval(0.7, 0.6, 0.8),), (0,), "python -m dppo")
    found = overview(study, ["win_rate.value"])
    monkeypatch.setattr(trust, "_difference_variance", lambda *given: 0.25)
    lines = trust.noise(study, type(found)(**{**vars(found), "baselines": (base,)}))
    assert "the best trial leads loss=dpo by 0.110, chosen among 1" in lines[0]
    ahead = BaselineLine("loss=dpo", (Interval(0.9, 0.8, 1.0),), (0,), "python -m dppo")
    assert "is 0.090 behind loss=dpo" in trust.noise(study, type(found)(**{**vars(found), "baselines": (ahead,)}))[0]
    # 2 (1.96 + 0.84)^2 0.25 / 0.02^2 prompts; 4 (1.96 + 0.84)^2 0.0002 / 0.02^2 seeds.
    assert "9,812 prompts and 16 seeds of each" in lines[1]
