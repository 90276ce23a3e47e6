"""The preset of reward against KL: pairs labelled by the reward that is measured, and curves in the report."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from dppo import config
from dppo.config import SamplingSettings
from dppo.data.instructions import Instructions
from dppo.errors import UserError
from dppo.rewards.length import Length
from dppo.rewards.sentiment import Sentiment
from tests.conftest import Run, small
from tests.test_presets import jobs

PRESET = "experiment=sentiment_frontier"


def test_every_run_is_scored_by_what_labelled_its_pairs() -> None:
    found = jobs(PRESET)
    assert len(found) == 15
    for job in found[::3]:  # every loss
        experiment = config.load(config.compose(job), job)
        assert isinstance(experiment.dataset, Instructions)
        assert experiment.reward == experiment.dataset.labels == Sentiment()
        assert experiment.evaluation.interim.kl and experiment.evaluation.interim.n_points == 4
        assert experiment.evaluation.sampling == SamplingSettings(temperature=1.0, top_p=1.0, seed=0)
    over_beta = ("loss=dpo,kto,cpo,r_dpo", "beta=0.03,0.1,0.3,1", "train.learning_rate=1e-4")
    for job in jobs(PRESET, *over_beta)[::5]:
        (phase,) = config.load(config.compose(job), job).phases.values()
        assert f"beta={phase.loss.beta:g}" in job  # type: ignore[attr-defined]
    assert len(jobs(PRESET, *over_beta)) == 16


def test_the_more_positive_answer_is_chosen() -> None:
    data = config.from_words([PRESET, "dataset.n_pairs=200"]).dataset
    assert isinstance(data, Instructions)
    pairs = data.pairs("train")
    texts = [[response.text for response in pair.responses] for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    better, worse = (Sentiment().score(prompts, [pair[at] for pair in texts]) for at in (0, 1))
    assert len(pairs) == 200 and all(one > other for one, other in zip(better, worse, strict=True))
    assert [pair.responses[0].score for pair in pairs] == better
    longer = replace(data, labels=Length("characters")).pairs("train")
    assert all(len(pair.responses[0].text) > len(pair.responses[1].text) for pair in longer)
    assert replace(data, labels=Length("words")).identity() != data.identity()


@dataclass(frozen=True)
class Alike(Sentiment):
    """Finds all answers equally good."""

    def score(self, prompts: object, answers: object) -> list[float]:
        return [0.0, 0.0]


def test_labels_that_tell_no_answers_apart_are_refused() -> None:
    data = config.from_words([PRESET]).dataset
    assert isinstance(data, Instructions)
    with pytest.raises(UserError, match=r"dataset\.labels=Alike: scores 1,000 pairs of answers"):
        replace(data, labels=Alike()).pairs("train")


@pytest.mark.slow
def test_the_preset_runs_and_its_report_draws_both(dppo: Run, tmp_path: Path) -> None:
    words = ["loss=dpo,simpo", "train.learning_rate=1e-3", "report=true", "evaluation.interim.n_prompts=8"]
    limits = [word for word in small(*words)[len(words) :] if not word.startswith("hydra")]
    done = dppo("-m", PRESET, *words, *limits, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/result.json")]
    assert [one["status"] for one in results] == ["complete"] * 2
    for name, n_rows in (("frontier", 2), ("overoptimisation", 8)):
        assert (tmp_path / "sweep" / "report" / "figures" / f"{name}.png").exists()
        (table,) = (tmp_path / "sweep" / "report" / "tables").glob(f"{name}*.csv")
        with table.open() as file:
            assert len(list(csv.DictReader(file))) == n_rows
