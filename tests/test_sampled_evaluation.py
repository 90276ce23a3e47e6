"""evaluation=sampled: both models' answers are drawn, y_gen is not, and numbers of either kind are kept apart."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from dppo import config, export
from dppo.config import SamplingSettings
from dppo.data.encoding import ChatEncoder
from dppo.errors import UserError
from dppo.evaluation.comparison import compare_runs, configurations, standings
from dppo.evaluation.drift import exact_kl
from dppo.evaluation.head_to_head import head_to_head
from dppo.evaluation.runs import find_runs
from dppo.generation import Greedy, Sampled, decoding_of
from dppo.logps import ResponseScorer
from dppo.model_card import model_card
from dppo.models import load_saved, saved_tokenizer
from dppo.pipeline import answers_decoding, interim_decoding
from dppo.report import frontier, overoptimisation
from tests.conftest import small
from tests.report.made_runs import gathered
from tests.runs import Finished, run_small
from tests.test_drift import answered
from tests.test_plan import planned
from tests.tiny_models import gpt2, llama

BASE = ("loss=unll", "penalty=quadratic", "alpha=0.1", "train.learning_rate=0.03")
INTERIM = ("evaluation.interim.n_points=2", "evaluation.interim.n_prompts=4", "evaluation.interim.kl=true")
SAMPLED = "sampled (temperature 1, top-p 1, seed 0)"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished, Finished]:
    """A cache with a greedy run and the same with sampled answers, both measured on the way."""
    root = tmp_path_factory.mktemp("decodings")
    made = run_small(root, *BASE, *INTERIM), run_small(root, *BASE, *INTERIM, "evaluation=sampled")
    for run in made:  # with the whole configuration, as the command line records it
        place = run.directory / "config.yaml"
        composed = config.compose(yaml.safe_load(place.read_text())["overrides"])
        place.write_text(yaml.safe_dump(OmegaConf.to_container(composed, resolve=True)))
    return root, *made


def texts(run: Finished, who: str) -> dict[str, str]:
    return {row["prompt_id"]: row[f"{who}_answer"] for row in run.samples}


def decodings(root: Path, run: Finished) -> dict[str, Any]:
    """How each kind of answers of a run was decoded, by the stage's title."""
    return {
        item["stage"]: json.loads((root / "cache" / "generate" / item["fingerprint"] / "manifest.json").read_text())[
            "inputs"
        ]["decoding"]
        for item in run.result["timings"]["stages"]
        if item["stage"] in ("y_gen", "answers", "baseline")
    }


def test_both_models_are_sampled_and_y_gen_is_greedy(runs: tuple[Path, Finished, Finished]) -> None:
    root, greedy, sampled = runs
    assert {name: one["decoding"] for name, one in decodings(root, greedy).items()} == dict.fromkeys(
        ("y_gen", "answers", "baseline"), "greedy"
    )
    own = decodings(root, sampled)
    assert own.pop("y_gen") == decodings(root, greedy)["y_gen"]
    drawn = {"temperature": 1.0, "top_p": 1.0, "seed": 0, "n_answers": 1, "max_new_tokens": 8, "precision": "fp32"}
    assert own == {key: {"decoding": "sampled", "version": 1, **drawn} for key in ("answers", "baseline")}
    for who in ("policy", "reference"):
        assert texts(sampled, who) != texts(greedy, who)
    assert greedy.result["decoding"] == "greedy" and sampled.result["decoding"] == SAMPLED
    # The curve of a run is measured on such answers as its end is; so its policy is one of its own, equal in its bits.
    assert "preference" in sampled.built and "y_gen" not in sampled.built
    weights = [(root / "cache" / run.result["models"]["policy"] / "model.safetensors").read_bytes() for run in runs[1:]]
    assert weights[0] == weights[1]
    curves = [[row for row in run.metrics if "interim/kl_nats_per_answer" in row] for run in runs[1:]]
    assert [len(curve) for curve in curves] == [2, 2]
    assert all(
        one["interim/kl_nats_per_answer"] != two["interim/kl_nats_per_answer"] for one, two in zip(*curves, strict=True)
    )


def test_every_answer_is_the_models_own_draw(runs: tuple[Path, Finished, Finished]) -> None:
    """Whatever the batch: each prompt alone, in another order, gives what the run wrote."""
    root, _, run = runs
    words = small(*BASE, "evaluation=sampled", f"cache.dir={root / 'cache'}", "device=cpu")
    experiment = config.load(config.compose(words), words)
    prompts = {one.prompt_id: one for one in experiment.dataset.prompts("test")}
    decoding = dataclasses.replace(interim_decoding(experiment), tokens_per_batch=1)
    for who in ("policy", "reference"):
        place = root / "cache" / run.result["models"][who]
        encoder = ChatEncoder(saved_tokenizer(place))
        expected = texts(run, who)
        queue = [(key, encoder.prompt_ids(prompts[key].messages)) for key in reversed(expected)]
        made = decoding.generate(load_saved(place), queue, encoder.end_of_turn_ids, encoder.decode)
        assert {one.prompt_id: one.text for part in made for one in part} == expected


def test_the_same_seed_gives_the_same_bits_and_another_one_other_answers(
    runs: tuple[Path, Finished, Finished], tmp_path: Path
) -> None:
    _, _, run = runs
    anew = run_small(tmp_path, *BASE, "evaluation=sampled")
    for name in ("samples.jsonl", "pairs.jsonl"):
        assert (anew.directory / name).read_bytes() == (run.directory / name).read_bytes()
    for name in ("win_rate", "kl", "held_out", "length"):
        assert anew.result[name] == run.result[name]
    other = run_small(tmp_path, *BASE, "evaluation=sampled", "evaluation.sampling.seed=1")
    assert other.built == ["answers", "baseline", "scores", "drift", "compare"]
    assert all(texts(other, who) != texts(run, who) for who in ("policy", "reference"))


def test_near_temperature_0_a_run_is_the_greedy_one(runs: tuple[Path, Finished, Finished]) -> None:
    root, greedy, _ = runs
    cold = run_small(root, *BASE, "evaluation=sampled", "evaluation.sampling.temperature=1e-4")
    assert cold.samples == greedy.samples
    # Drawn from another distribution than the model's own, a log-ratio is no estimate of KL.
    assert cold.result["kl"] == greedy.result["kl"] and "monte_carlo" not in cold.result["kl"]
    assert "evaluation.sampling" not in greedy.result["decoding"]


def test_a_model_against_itself_is_a_tie(tmp_path: Path) -> None:
    found = run_small(tmp_path, "loss=none", "evaluation=sampled").result
    assert found["win_rate"]["ties"] == found["win_rate"]["n"]
    assert found["kl"]["monte_carlo"] == {"value": 0.0, "ci_low": 0.0, "ci_high": 0.0}


def test_a_plan_is_what_the_run_does(runs: tuple[Path, Finished, Finished], tmp_path: Path) -> None:
    root, _, run = runs
    words = (*BASE, *INTERIM, "evaluation=sampled")
    before, after = planned(tmp_path, *words), planned(root, *words)
    assert after.todo == []
    parents = json.loads((run.directory / "parents.json").read_text())
    assert {(step.stage, step.fingerprint) for step in after.steps} == {
        (item["stage"], item["fingerprint"]) for item in parents
    }
    known = [(step.title, step.fingerprint) for step in before.steps if step.title != "drift"]
    assert known == [(step.title, step.fingerprint) for step in after.steps if step.title != "drift"]
    hotter = planned(root, *words, "evaluation.sampling.temperature=1.5")
    again = ["baseline", "scores", "preference", "answers", "drift", "compare"]
    assert list(dict.fromkeys(step.title for step in hotter.todo)) == again


def test_a_greedy_run_lies_where_it_always_lay() -> None:
    """Fingerprints are made of these; they hold nothing of sampling as long as there is none."""
    words = small(*BASE, *INTERIM, "device=cpu")
    experiment = config.load(config.compose(words), words)
    decoding = answers_decoding(experiment)
    assert decoding is experiment.generation
    assert decoding.identity() == {"decoding": "greedy", "max_new_tokens": 8, "precision": "fp32"}


# --- KL --------------------------------------------------------------------------------------------------------------


def test_log_ratios_are_those_of_whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference, answers = llama(), gpt2(), answered()
    monkeypatch.setattr("dppo.logps._LOGITS_PER_CHUNK", 300)  # a few positions, so that answers lie in several chunks
    found = exact_kl(ResponseScorer(policy, "packed"), ResponseScorer(reference, "packed"), answers, 40).log_ratios
    expected = []
    for item in answers:
        (response,) = item.responses
        ids = torch.tensor([[*item.prompt_ids, *response.token_ids]])
        with torch.no_grad():
            own, other = (model(ids).logits[0].log_softmax(-1) for model in (policy, reference))
        places = range(len(item.prompt_ids) - 1, ids.shape[1] - 1)
        pairs = zip(places, response.token_ids, strict=True)
        expected.append(math.fsum(float(own[at, token] - other[at, token]) for at, token in pairs))
    assert sorted(found) == pytest.approx(sorted(expected), rel=1e-9)


def test_on_a_models_own_draws_both_estimate_the_same_and_on_others_they_do_not() -> None:
    policy, reference = llama(dtype=torch.float32), llama(dtype=torch.float32, seed=1)
    scorers = ResponseScorer(policy, "packed"), ResponseScorer(reference, "packed")

    def measured(temperature: float) -> tuple[float, float, float]:
        prompts = [(f"{number}", [5, 6, 7]) for number in range(1500)]
        decoding = Sampled(4, 100_000, "fp32", 1, temperature, 1.0, 0)
        made = [one for part in decoding.generate(policy, prompts, frozenset({1}), str) for one in part]
        (bare,) = answered(1)
        answers = [
            dataclasses.replace(
                bare,
                example_id=one.prompt_id,
                prompt_id=one.prompt_id,
                prompt_ids=(5, 6, 7),
                responses=(dataclasses.replace(bare.responses[0], token_ids=one.token_ids),),
            )
            for one in made
        ]
        found = exact_kl(*scorers, answers, 20_000)
        error = float(np.std(found.log_ratios) / math.sqrt(len(answers)))
        return found.nats_per_answer, float(np.mean(found.log_ratios)), error

    kl, ratio, error = measured(1.0)
    assert kl > 8 * error and abs(ratio - kl) < 4 * error
    kl, ratio, error = measured(0.5)
    assert abs(ratio - kl) > 8 * error


def test_the_estimate_of_a_run_has_an_interval(runs: tuple[Path, Finished, Finished]) -> None:
    _, greedy, sampled = runs
    assert "monte_carlo" not in greedy.result["kl"]
    found = sampled.result["kl"]["monte_carlo"]
    assert found["ci_low"] < found["value"] < found["ci_high"]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_runs_decoded_differently_are_no_group(runs: tuple[Path, Finished, Finished]) -> None:
    _, greedy, sampled = runs
    groups = gathered(greedy.directory, sampled.directory).groups
    assert sorted(group.title for group in groups) == [
        f"8 test prompts, answers {SAMPLED}, scored by Verifiable",
        "8 test prompts, scored by Verifiable",
    ]
    first, second = find_runs([greedy.directory, sampled.directory])
    found = configurations([first, second])
    for metric in ("win_rate", "reward", "reward_gain"):
        with pytest.raises(UserError, match=r"decoded differently \(evaluation\.sampling\)"):
            compare_runs(found, metric=metric, baseline=None, n_bootstrap=100, seed=0)
    assert len(compare_runs(found, metric="accuracy", baseline=None, n_bootstrap=100, seed=0)) == 2
    with pytest.raises(UserError, match=r"ranking: the answers of these runs were decoded differently"):
        standings(found)
    notes = head_to_head(first, second, n_samples=1, n_bootstrap=100, seed=0).notes
    assert any(f"A greedy, B {SAMPLED}" in note for note in notes)
    for one, lead in ((first, "Greedy answers to 8"), (second, f"Answers, {SAMPLED}, to 8")):
        assert lead in model_card(one, "policy", "mine")


def test_captions_say_how_answers_were_decoded(runs: tuple[Path, Finished, Finished], tmp_path: Path) -> None:
    _, greedy, sampled = runs
    told = {}
    for name, run in (("greedy", greedy), ("sampled", sampled)):
        (group,) = gathered(run.directory).groups
        made = frontier.panel(group)
        told[name] = [made.lead, made.tables[0].note, overoptimisation.panel(group).tables[0].note]
    assert all("greedy answers of the policy" in text for text in told["greedy"])
    assert all(f"answers of the policy, {SAMPLED}" in text and "greedy" not in text for text in told["sampled"])
    assert "on 4 answers of the policy" in told["sampled"][0] and "an estimate of the KL" in told["sampled"][0]
    # The same without the estimate, as at another temperature.
    shutil.copytree(sampled.directory, tmp_path / "warm")
    result = {**sampled.result, "decoding": "sampled (temperature 0.7, top-p 1, seed 0)"}
    del result["kl"]["monte_carlo"]
    (tmp_path / "warm" / "result.json").write_text(json.dumps(result))
    lead = frontier.panel(gathered(tmp_path / "warm").groups[0]).lead
    assert "temperature 0.7" in lead and "not those that the policy as it is would give" in lead


def test_a_diverged_run_stands_beside_those_of_its_decoding(
    runs: tuple[Path, Finished, Finished], tmp_path: Path
) -> None:
    _, greedy, sampled = runs
    for name, run in (("greedy", greedy), ("sampled", sampled)):
        for place in (tmp_path / name, tmp_path / f"{name} diverged"):
            shutil.copytree(run.directory, place)
        settings = yaml.safe_load((run.directory / "config.yaml").read_text())
        if name == "greedy":
            del settings["evaluation"]["sampling"]  # as runs were recorded before it could be chosen
        (place / "config.yaml").write_text(yaml.safe_dump({**settings, "seed": 1}))
        diverged = {"schema": run.result["schema"], "status": "diverged", "win_rate": {"value": 0.0}}
        (place / "result.json").write_text(json.dumps(diverged))
    found = gathered(tmp_path)
    assert not found.left_out
    homes = [{run.path.name for run in entry.configuration.runs.values()} for entry in found.entries]
    assert sorted(map(sorted, homes)) == [["greedy", "greedy diverged"], ["sampled", "sampled diverged"]]


def test_answers_for_a_benchmark_are_sampled_as_the_runs_own(
    runs: tuple[Path, Finished, Finished], tmp_path: Path
) -> None:
    """Asked the run's own prompts, its model repeats its answers: the draws depend on seed and prompt alone."""
    _, greedy, sampled = runs
    for run in (greedy, sampled):
        name = run.directory.name
        questions = tmp_path / f"{name}.json"
        asked = [{"instruction": row["prompt"]} for row in run.samples]
        questions.write_text(json.dumps(asked))
        place = tmp_path / f"{name}-answers.json"
        assert export.main([str(run.directory), "--alpaca-eval", str(place), "--questions", str(questions)]) == 0
        written = [row["output"] for row in json.loads(place.read_text())]
        assert written == [row["policy_answer"] for row in run.samples]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluation.sampling.temperature=0"], r"^evaluation\.sampling\.temperature=0\.0: must be > 0; greedy"),
        (["evaluation.sampling.top_p=1.5"], r"^evaluation\.sampling\.top_p=1\.5: must be > 0 and <= 1"),
        (["evaluation.sampling.seed=-1"], r"^evaluation\.sampling\.seed=-1: must be >= 0"),
        (["evaluation.sampling.temperature=hot"], r"^evaluation\.sampling\.temperature=hot: must be a number"),
        (["+evaluation.sampling.top_k=5"], r"^evaluation\.sampling\.top_k=5: unknown key"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.from_words(["evaluation=sampled", *words])


def test_sampling_can_be_written_in_one_word_and_taken_back() -> None:
    whole = config.from_words(["evaluation.sampling={temperature:0.7,top_p:0.9,seed:3}"])
    assert answers_decoding(whole) == decoding_of(whole.generation, SamplingSettings(0.7, 0.9, 3))
    assert whole.evaluation.decoding == "sampled (temperature 0.7, top-p 0.9, seed 3)"
    assert config.from_words(["evaluation=sampled", "evaluation.sampling=null"]).evaluation.decoding == "greedy"


def test_an_answer_too_long_for_the_model_names_generation() -> None:
    decoding = decoding_of(Greedy(4096, 100_000, "fp32"), SamplingSettings(1.0, 1.0, 0))
    with pytest.raises(UserError, match=r"^generation\.max_new_tokens=4096: the longest prompt"):
        list(decoding.generate(llama(max_position_embeddings=64), [("a", [5, 6])], frozenset({1}), str))
