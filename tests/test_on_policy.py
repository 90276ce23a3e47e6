"""dataset=on_policy: the run's own answers, ranked, become what it trains on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dppo import config, pipeline
from dppo.artifacts import Cache
from dppo.config import compose, load
from dppo.data.encoding import ChatEncoder
from dppo.data.on_policy import OnPolicy, best_and_worst, contests, ranked_group, shares_won, unique
from dppo.errors import UserError
from dppo.generation import Sampled
from dppo.generation.decoding import Decoding
from dppo.on_policy import different, examples, in_slots, preferences
from dppo.rewards import PairwiseReward, Reward
from dppo.rewards.bradley_terry import BradleyTerry
from dppo.types import Artifact, Generation, Json, Message, PreferenceExample, Prompt
from tests.conftest import small
from tests.runs import Finished, run_small
from tests.test_plan import planned, todo

BASE = ("dataset=on_policy", "loss=dpo", "evaluation.n_prompts=4")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs."""
    return tmp_path_factory.mktemp("on_policy")


@pytest.fixture(scope="module")
def first(root: Path) -> Finished:
    return run_small(root, *BASE)


def experiment_of(root: Path, *overrides: str) -> config.Experiment:
    words = small(*BASE, *overrides, f"cache.dir={root / 'cache'}", "device=cpu")
    return load(compose(words), words)


def prints(found: Finished, title: str) -> list[str]:
    return [item["fingerprint"] for item in found.result["timings"]["stages"] if item["stage"] == title]


def parents(root: Path, stage: str, identifier: str) -> list[str]:
    return list(Cache(root / "cache").existing(stage, identifier).manifest().parents)


def artifact(root: Path, name: str) -> Artifact:
    stage, _, identifier = name.partition("/")
    return Cache(root / "cache").existing(stage, identifier).artifact(reused=True)


def made_again(root: Path, experiment: config.Experiment, model: Artifact) -> dict[str, list[PreferenceExample]]:
    """The preferences of a round, from the stores."""
    bench = pipeline._workbench(experiment)
    assert isinstance(experiment.dataset, OnPolicy)
    encoder = ChatEncoder(experiment.model.load_tokenizer())
    prompts = pipeline.prompts_to_answer(experiment)
    found = preferences(bench, experiment.dataset, pipeline.ranker(experiment), prompts, model, encoder)
    assert all(record.reused for record in bench.records)
    return {str(shape): rows for shape, rows in found.rows.items()}


# --- from answers to examples -----------------------------------------------------------------------------------------


def prompt(name: str) -> Prompt:
    return Prompt(name, (Message("user", name),))


def test_best_and_worst_are_the_pair_and_the_first_of_equals_counts() -> None:
    group = ranked_group(prompt("p"), ["a", "b", "c", "d", "e"], [1.0, 3.0, -2.0, 3.0, -2.0])
    assert [(one.role, one.text, one.score) for one in group.responses[:2]] == [
        ("ranked", "a", 1.0),
        ("ranked", "b", 3.0),
    ]
    pair = best_and_worst(group)
    assert [(one.role, one.text, one.score) for one in pair.responses] == [
        ("chosen", "b", 3.0),
        ("rejected", "c", -2.0),
    ]
    assert pair.prompt == group.prompt and pair.example_id != group.example_id


def test_a_round_robin_gives_shares_of_wins() -> None:
    assert contests(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    # 0 beats 1 and 2 and ties with 3; 2 beats 1; 3 beats 1; 2 and 3 tie.
    assert shares_won(4, [1, 1, 0.5, 0, 0, 0.5]) == [2.5 / 3, 0.0, 1.5 / 3, 2 / 3]
    assert shares_won(2, [0.25]) == [0.25, 0.75]  # a judge of two minds
    assert shares_won(1, []) == [0.0]


def test_prompts_without_a_better_answer_are_left_out_and_counted() -> None:
    prompts = [prompt(name) for name in ("good", "one", "tied", "also good")]
    texts = {"good": ["x", "y", "z"], "one": ["x"], "tied": ["x", "y"], "also good": ["y", "x"]}
    scores = {"good": [1.0, 2.0, 1.0], "one": [5.0], "tied": [4.0, 4.0], "also good": [0.0, -1.0]}
    rows, counts = examples(prompts, texts, scores)
    assert [row.prompt.prompt_id for row in rows["ranked"]] == ["good", "also good"]
    assert [[one.text for one in row.responses] for row in rows["pairs"]] == [["y", "x"], ["y", "x"]]
    assert rows["labelled"] == rows["pairs"]
    assert counts == {
        "n_prompts": 4, "n_examples": 2, "n_one_answer": 1, "n_tied": 1, "different_answers": 2.0, "best": 1.0,
        "worst": 0.0,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Source:
    """Two prompts, three answers."""

    def identity(self) -> dict[str, Json]:
        return {"dataset": "source"}

    def chats(self, split: str) -> list[PreferenceExample]:
        return []

    def prompts(self, split: str) -> list[Prompt]:
        return [prompt("p"), prompt("q")]

    def pairs(self, split: str) -> list[PreferenceExample]:
        assert split == "train"
        group = ranked_group(prompt("p"), ["own best", "said"], [2.0, 1.0])
        return [best_and_worst(group), best_and_worst(ranked_group(prompt("p"), ["own best", "third"], [2.0, 0.0]))]


def given(prompt_id: str, *texts: str) -> list[Generation]:
    return [Generation(prompt_id, text, (1,), "eos") for text in texts]


def test_equal_answers_count_once_and_the_sources_are_mixed_in() -> None:
    assert unique(["b", "a", "b", "c", "a"]) == ["b", "a", "c"]
    answers = {"p": given("p", "said", "more", "said"), "q": given("q", "only", "only")}
    dataset = OnPolicy(Source(), Sampled(8, 100, "fp32", 3, 1.0, 1.0, 0), None, False, 1)
    assert different(dataset, answers) == {"p": ["said", "more"], "q": ["only"]}
    mixed = different(dataclasses.replace(dataset, mix_in=True), answers)
    assert mixed == {"p": ["said", "more", "own best", "third"], "q": ["only"]}
    slots = list(in_slots([prompt("p"), prompt("q")], mixed))
    assert [slot["p"].text for slot in slots] == mixed["p"]
    assert {slot["q"].text for slot in slots} == {"only"}


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_trains_on_the_best_and_the_worst_of_its_own_answers(root: Path, first: Finished) -> None:
    counts = first.result["on_policy"]["round_1"]
    assert counts["n_prompts"] == 32 and counts["n_unanswerable"] == 0
    assert counts["n_examples"] + counts["n_one_answer"] + counts["n_tied"] == 32
    assert first.result["training"]["main"] == {"n_examples": counts["n_examples"], "steps": 8}
    assert counts["best"] > counts["worst"] and 1 < counts["different_answers"] <= 5

    experiment = experiment_of(root)
    assert isinstance(experiment.dataset, OnPolicy)
    rows = made_again(root, experiment, artifact(root, first.result["models"]["reference"]))
    assert len(rows["pairs"]) == counts["n_examples"]
    asked = {one.prompt_id: one for one in experiment.dataset.source.prompts("train")}
    store = Cache(root / "cache").existing("candidates", prints(first, "candidates")[0]).path
    lines = [json.loads(line) for path in store.glob("shards/*") for line in path.read_text().splitlines()]
    texts = {line["key"]: [one["text"] for one in line["row"]] for line in lines}
    assert texts.keys() == asked.keys() and {len(given) for given in texts.values()} == {5}
    own = {one.text for row in experiment.dataset.source.pairs("train") for one in row.responses}
    assert isinstance(experiment.reward, Reward)
    for pair in rows["pairs"]:
        scored = {text: experiment.reward.score([pair.prompt], [text])[0] for text in texts[pair.prompt.prompt_id]}
        chosen, rejected = pair.responses
        assert chosen.score == scored[chosen.text] == max(scored.values())
        assert rejected.score == scored[rejected.text] == min(scored.values())
        assert not {chosen.text, rejected.text} & own


def test_the_sft_model_is_that_of_the_source(root: Path, first: Finished) -> None:
    plain = run_small(root, "loss=dpo", "evaluation.n_prompts=4")
    assert plain.built[0] != "sft" and prints(plain, "sft") == prints(first, "sft")
    assert prints(plain, "baseline") == prints(first, "baseline")
    assert prints(plain, "preference") != prints(first, "preference")
    assert "on_policy" not in plain.result


def test_seeds_share_the_answers_and_what_decides_the_preferences_does_not(root: Path, first: Finished) -> None:
    again = run_small(root, *BASE, "seed=1")
    assert {"sft", "candidates", "reference"}.isdisjoint(again.built)
    assert prints(again, "candidates") == prints(first, "candidates")
    preference = prints(first, "preference")
    for words, also_new in (
        (["dataset.mix_in=true"], False),
        (["dataset.answers.temperature=0.5"], True),
        (["dataset.answers.seed=1"], True),
        (["dataset.answers.n_answers=4"], True),
    ):
        other = planned(root, *BASE, *words)
        steps = {step.title: step for step in other.steps}
        assert steps["preference"].fingerprint not in preference
        assert (steps["candidates"].fingerprint != prints(first, "candidates")[0]) == also_new
    ranked = {step.title: step for step in planned(root, *BASE, "reward@dataset.ranker=length").steps}
    assert ranked["preference"].fingerprint not in preference
    assert ranked["candidates"].action == "reuse"


@pytest.mark.parametrize(
    "words",
    [
        "loss=rrhf dataset.mix_in=true",
        "loss=kto dataset/answers=diverse_beam",
        "loss=unll dataset/answers=beam reward@dataset.ranker=length",
        "loss=dpo dataset.answers.n_answers=1 dataset.mix_in=true train.n_examples=12",
        "loss=dpo dataset.rounds=2 evaluation.interim.n_points=1 evaluation.interim.n_prompts=4",
        "loss=none",
        "+experiment=unll_then_dpo phases.unll.train.n_examples=10 phases.dpo.train.steps=2 phases.unll.train.steps=2",
        "+experiment=iterated_dpo dataset.rounds=2 phases.main.train.steps=2",
        "loss=dpo reward=bradley_terry reward.train.steps=2",
    ],
)
def test_a_run_builds_exactly_what_was_planned(words: str, root: Path, first: Finished) -> None:
    given = [*BASE[:1], *BASE[2:], *words.split()]
    before = planned(root, *given)
    found = run_small(root, *given)
    assert found.result["status"] == "complete"
    assert [step.title for step in before.steps] == found.stages
    assert set(todo(before)) - {"scores"} == set(found.built) - {"scores"}
    for step, item in zip(before.steps, found.result["timings"]["stages"], strict=True):
        assert step.work >= (item["rows"] or 0)
    after = planned(root, *given)
    assert after.todo == []
    assert [step.fingerprint for step in after.steps] == [
        item["fingerprint"] for item in found.result["timings"]["stages"]
    ]
    losses = [row["train/loss"] for row in found.metrics if "train/loss" in row]
    assert all(abs(loss) < 1e6 for loss in losses) and (losses or words == "loss=none")
    if "rrhf" in words:
        assert found.result["on_policy"]["round_1"]["different_answers"] > 5
        assert max(row.get("train/n_ranked_pairs", 0) for row in found.metrics) > 10  # C(7, 2) without ties is 21
    if "unll_then_dpo" in words:
        assert found.result["training"]["unll"]["n_examples"] <= 10 < found.result["training"]["dpo"]["n_examples"]
    if "bradley_terry" in words:  # half of the prompts are the reward model's
        experiment = experiment_of(root, "reward=bradley_terry")
        asked = {one.prompt_id for one in pipeline.prompts_to_answer(experiment)}
        assert isinstance(experiment.reward, BradleyTerry)
        held_back = {pair.prompt.prompt_id for pair in experiment.reward.own_pairs(experiment.dataset.pairs("train"))}
        assert found.result["on_policy"]["round_1"]["n_prompts"] == len(asked) == 32 - len(held_back)
        assert not asked & held_back
    if "train.n_examples=12" in words:
        assert found.result["on_policy"]["round_1"]["n_prompts"] == 12


def test_a_limit_of_a_phase_counts_prompts_whatever_other_phases_ask_for(root: Path, first: Finished) -> None:
    model = artifact(root, first.result["models"]["reference"])
    experiment = experiment_of(root)
    (phase,) = experiment.phases.values()
    limited = dataclasses.replace(phase, train=dataclasses.replace(phase.train, n_examples=10))
    alone = dataclasses.replace(experiment, phases={"main": limited})
    both = dataclasses.replace(experiment, phases={"main": limited, "more": phase})
    assert len(pipeline.prompts_to_answer(alone)) == 10 and len(pipeline.prompts_to_answer(both)) == 32
    rows = [
        {row.example_id for row in pipeline.rows_of_phase(one, limited, made_again(root, one, model))}  # type: ignore[arg-type]
        for one in (alone, both)
    ]
    assert rows[0] == rows[1] and 0 < len(rows[0]) <= 10


def test_later_rounds_start_from_the_policy_and_share_the_first(root: Path, first: Finished) -> None:
    found = run_small(root, *BASE, "dataset.rounds=2")
    assert found.stages.count("candidates") == found.stages.count("preference") == 2
    policies = prints(found, "preference")
    assert policies[0] == prints(first, "preference")[0]
    assert next(item["reused"] for item in found.result["timings"]["stages"] if item["stage"] == "preference")
    sft = prints(found, "sft")[0]
    assert [parents(root, "candidates", one) for one in prints(found, "candidates")] == [[sft], [policies[0]]]
    start, *stores = parents(root, "preference", policies[1])
    assert start == policies[0]
    # Its own answers, the scores of all rounds, and log-probs under the SFT model, which `reference: sft` keeps.
    assert stores == [prints(found, "candidates")[1], prints(found, "scores")[1], prints(found, "reference")[1]]
    assert prints(found, "reference")[0] == prints(found, "reference")[1]
    assert set(found.result["on_policy"]) == {"round_1", "round_2"}
    assert set(found.result["training"]) == {"main", "main round 2"}
    steps = [row["step"] for row in found.metrics if "train/loss" in row]
    assert steps == list(range(1, 17))
    assert [row["phase"] for row in found.metrics if "train/loss" in row] == ["main"] * 8 + ["main round 2"] * 8
    assert found.result["models"]["policy"] == f"preference/{policies[1]}"
    assert found.result["models"]["reference"] == f"sft/{sft}"


def test_the_reference_of_a_round_can_be_its_start(root: Path, first: Finished) -> None:
    words = (BASE[0], BASE[2], "+experiment=iterated_dpo", "phases.main.train.steps=2")
    found = run_small(root, *words, "dataset.rounds=2")
    references = [parents(root, "reference", one) for one in prints(found, "reference")]
    assert references == [[prints(found, "sft")[0]], [prints(found, "preference")[0]]]
    with pytest.raises(UserError, match=r"^reference=previous: the first phase starts from the SFT model"):
        planned(root, *words, "dataset.rounds=1")


def test_a_run_from_a_finished_one_asks_its_policy(root: Path, first: Finished) -> None:
    found = run_small(root, *BASE, f"init_from={first.directory}")
    (store,) = prints(found, "candidates")
    assert parents(root, "candidates", store) == [first.result["models"]["policy"].partition("/")[2]]


def test_an_interrupted_run_makes_only_the_answers_that_are_missing(
    root: Path, first: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Decoding.generate

    def stopped(self: Decoding, *arguments: Any) -> Iterator[list[Generation]]:
        for number, batch in enumerate(generate(self, *arguments)):
            if isinstance(self, Sampled) and number == 2:
                raise KeyboardInterrupt
            yield batch

    words = (*BASE, "dataset.answers.tokens_per_batch=1200")
    with monkeypatch.context() as patch:
        patch.setattr(Decoding, "generate", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_small(tmp_path, *words)
    (left,) = [step for step in planned(tmp_path, *words).steps if step.title == "candidates"]
    assert left.action == "extend" and 0 < left.work < 32
    found = run_small(tmp_path, *words)
    rows = {item["stage"]: item["rows"] for item in found.result["timings"]["stages"]}
    assert rows["candidates"] == left.work
    # Another cache, other batches, an interruption: the same answers, and with them the same training.
    assert prints(found, "candidates") == prints(first, "candidates")
    assert found.result["on_policy"] == first.result["on_policy"]
    assert found.samples == first.samples


# --- rankers ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Longer:
    """Prefers the longer answer; those of about equal length tie."""

    margin: int

    def identity(self) -> dict[str, Json]:
        return {"reward": "longer", "margin": self.margin}

    def check(self, prompts: Sequence[Prompt]) -> None:
        assert len(prompts) == 32

    def compare(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        gaps = [len(one) - len(other) for one, other in zip(first, second, strict=True)]
        return [0.5 if abs(gap) <= self.margin else float(gap > 0) for gap in gaps]


def test_a_pairwise_ranker_ranks_by_its_verdicts(root: Path, first: Finished) -> None:
    assert isinstance(Longer(0), PairwiseReward) and not isinstance(Longer(0), Reward)
    words = (*BASE, "allowed_targets=[tests]", "dataset.ranker={_target_:tests.test_on_policy.Longer,margin:0}")
    before = planned(root, *words)
    found = run_small(root, *words)
    assert [step.title for step in before.steps] == found.stages
    assert found.stages[:4] == ["sft", "candidates", "scores", "reference"]
    assert set(todo(before)) - {"scores"} == set(found.built) - {"scores"}
    mixed = planned(root, *words, "dataset.mix_in=true", "dataset.answers.n_answers=3")
    asked = next(step.work for step in mixed.steps if step.title == "scores")
    assert asked == 32 * 10, "the source's two answers take part before there are any others"
    rows = made_again(
        root, experiment_of(root, *words[len(BASE) :]), artifact(root, found.result["models"]["reference"])
    )
    assert rows["pairs"]
    for group, pair in zip(rows["ranked"], rows["pairs"], strict=True):
        chosen, rejected = pair.responses
        lengths = [len(one.text) for one in group.responses]
        assert len(chosen.text) == max(lengths) and len(rejected.text) == min(lengths)
        assert all(one.score is not None and 0 <= one.score <= 1 for one in group.responses)
    # A judge to whom all is equal leaves nothing to train on.
    wide = words[-1].replace("margin:0", "margin:1000")
    with pytest.raises(UserError, match=r"^dataset=on_policy: of 32 prompts none has a better and a worse answer \(0 "):
        run_small(root, *words[:-1], wide)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("dataset.rounds=0", "dataset.rounds=0: must be at least 1"),
        ("dataset.answers.n_answers=1", "dataset.answers.n_answers=1: one answer cannot be ranked"),
        ("dataset.answers.temperature=0", "dataset.answers.temperature=0.0: must be > 0"),
        ("+generation@dataset.answers=greedy", "dataset.answers"),
        ("dataset.ranker={_target_:dppo.data.on_policy.OnPolicy}", "dataset.ranker"),
        ("reward@dataset.ranker=bradley_terry", "dataset.ranker=bradley_terry: a run trains the reward that evaluates"),
        (
            "dataset/answers=diverse_beam dataset.answers.n_groups=2",
            "dataset.answers.n_groups=2: must be at least 2 and",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(words: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        pipeline._training_rows(experiment_of(tmp_path, *words.split()))
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_ranker_that_cannot_score_the_training_prompts_is_refused_before_sft(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": "No."} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "dataset=on_policy",
        "dataset@dataset.source=pairs_file",
        f"dataset.source.path={tmp_path / 'pairs.jsonl'}",
    ]
    with pytest.raises(UserError, match="verifiable"):
        run_small(tmp_path, *words, "loss=dpo", "reward=length", "reward@dataset.ranker=verifiable")
    assert not (tmp_path / "cache" / "sft").exists()
    found = run_small(
        tmp_path, *words, "loss=dpo", "reward=length", "dataset.source.test_share=0.3", "dataset.mix_in=true"
    )
    assert found.result["status"] == "complete"


def test_alpha_can_be_calibrated_on_the_models_own_answers(root: Path, first: Finished) -> None:
    strength = pipeline.penalty_strength(experiment_of(root, "loss=unll"))
    assert strength["n_pairs"] == first.result["on_policy"]["round_1"]["n_examples"]
    assert strength["mean"] > 0
