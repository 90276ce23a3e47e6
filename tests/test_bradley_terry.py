"""The reward model that a run trains itself: its loss, its head, its pairs, and what the pipeline makes of it."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from dppo import config, pipeline, plan
from dppo.batches import collate
from dppo.config import Experiment
from dppo.data.encoding import ChatEncoder
from dppo.data.ids import prompt_id
from dppo.errors import UserError
from dppo.evaluation.comparison import configurations, standings
from dppo.evaluation.runs import find_runs
from dppo.evaluation.win_rates import Interval
from dppo.loop import Interrupted
from dppo.losses.bradley_terry import PreferenceLikelihood
from dppo.report import rewards
from dppo.report.evidence import Group
from dppo.reward_heads import RewardScorer, add_head, as_classifier
from dppo.rewards import Reward
from dppo.rewards.bradley_terry import BradleyTerry, TrainedReward
from dppo.rewards.classifier import Classifier
from dppo.rewards.length import Length
from dppo.stages.reward_model import _answers, _by_prompt
from dppo.types import Artifact, LossContext, Message, PreferenceExample, Prompt, Response, ResponseRewards, Role
from tests.conftest import Run, small
from tests.data import chat_models
from tests.report.made_runs import gathered
from tests.runs import Finished, run_small
from tests.tiny_models import FAMILIES, mixed

# --- the loss --------------------------------------------------------------------------------------------------------


def value_of(
    loss: PreferenceLikelihood, chosen: float, rejected: float, scores: tuple[float, float] = (math.nan, math.nan)
) -> tuple[float, list[float]]:
    """The value of one pair, which stands rejected first, and its gradients to the (chosen, rejected) rewards."""
    rewards = torch.tensor([rejected, chosen], dtype=torch.float64, requires_grad=True)
    roles: tuple[Role, ...] = ("rejected", "chosen")
    found = ResponseRewards(rewards, torch.ones(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), roles, 1)
    none = torch.zeros(1, dtype=torch.int64)
    context = LossContext(torch.tensor(scores[::-1]), none, none.bool(), 1.0)
    terms = loss(found, None, context)
    terms.value.sum().backward()
    assert terms.weight.tolist() == [1.0]
    assert {name: one.tolist() for name, one in terms.rewards.items()} == {"chosen": [chosen], "rejected": [rejected]}
    assert rewards.grad is not None
    return float(terms.value.detach()), rewards.grad.tolist()[::-1]


def test_the_loss_is_that_of_bradley_and_terry() -> None:
    """r_w - r_l = 1/2: log(1 + e^-1/2) = .474077; its slope is -sigmoid(-1/2) = -.377541 to the chosen reward."""
    value, slopes = value_of(PreferenceLikelihood(margin=0.0, centring=0.0), 1.0, 0.5)
    assert value == pytest.approx(0.47407698418010669, abs=1e-15)
    assert slopes == pytest.approx([-0.37754066879814541, 0.37754066879814541], abs=1e-15)
    assert value_of(PreferenceLikelihood(0.0, 0.0), 3.25, 3.25)[0] == pytest.approx(math.log(2), abs=1e-15)


def test_the_margin_asks_for_a_larger_gap_where_scores_are_further_apart() -> None:
    """Scores 7 and 5, margin .2: the gap is .5 - .4 = .1, and log(1 + e^-.1) = .644397."""
    value, slopes = value_of(PreferenceLikelihood(margin=0.2, centring=0.0), 1.0, 0.5, (7.0, 5.0))
    assert value == pytest.approx(0.64439666007357084, abs=1e-7)  # scores are fp32
    assert slopes == pytest.approx([-0.47502081252106, 0.47502081252106], abs=1e-7)
    assert math.isnan(value_of(PreferenceLikelihood(margin=0.2, centring=0.0), 1.0, 0.5)[0])


def test_centring_draws_the_rewards_of_a_pair_to_0() -> None:
    """.01 (1 + .5)^2 = .0225 more, with slope 2 * .01 * 1.5 = .03 to both rewards."""
    value, slopes = value_of(PreferenceLikelihood(margin=0.0, centring=0.01), 1.0, 0.5)
    assert value == pytest.approx(0.47407698418010669 + 0.0225, abs=1e-15)
    assert slopes == pytest.approx([-0.37754066879814541 + 0.03, 0.37754066879814541 + 0.03], abs=1e-15)


# --- the head --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_is_read_at_the_last_token_whatever_stands_around_it(family: str, packing: Any) -> None:
    model: Any = FAMILIES[family]()
    add_head(model, seed=3)
    head = model.reward_head.weight[0].double()
    examples = mixed()
    expected = [
        float(model.base_model(torch.tensor([[*one.prompt_ids, *answer.token_ids]])).last_hidden_state[0, -1] @ head)
        for one in examples
        for answer in one.responses
    ]
    model.reward_head.double()
    scorer = RewardScorer(model, packing)
    found = scorer(collate(examples))
    assert found.sum.tolist() == pytest.approx(expected, abs=1e-9)
    assert len(set(expected)) == len(expected)
    assert found.lengths.tolist() == [1] * len(expected)
    backwards = scorer(collate(examples[::-1]))
    by_example = [list(part) for part in split(backwards.sum, [len(one.responses) for one in examples[::-1]])]
    assert [value for part in by_example[::-1] for value in part] == pytest.approx(expected, abs=1e-9)


def split(values: Tensor, sizes: list[int]) -> Iterable[list[float]]:
    return (part.tolist() for part in values.split(sizes))


def test_only_what_a_reward_depends_on_is_trained() -> None:
    """With an LM head of its own the model would leave a parameter without a gradient, which DDP refuses."""
    for name in ("llama", "grouped_llama"):
        model: Any = FAMILIES[name]()
        add_head(model, seed=0)
        model.reward_head.double()
        RewardScorer(model, "packed")(collate(mixed())).sum.sum().backward()
        for key, value in model.named_parameters():
            assert (value.grad is not None) == value.requires_grad, (name, key)
        assert model.get_output_embeddings().weight.requires_grad == (name == "grouped_llama")


def test_the_head_is_drawn_by_its_seed_and_in_fp32() -> None:
    heads = []
    for seed in (0, 0, 1):
        model: Any = FAMILIES["llama"](dtype=torch.bfloat16)
        state = torch.get_rng_state()
        add_head(model, seed)
        assert torch.equal(torch.get_rng_state(), state)
        assert model.reward_head.weight.dtype == torch.float32
        heads.append(model.reward_head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_model_without_a_classifier_in_transformers_is_refused() -> None:
    model: Any = FAMILIES["llama"]()
    type_of: Any = type("Unheard", (type(model.config),), {"model_type": "unheard-of"})
    model.config = type_of.from_dict({**model.config.to_dict(), "model_type": "unheard-of"})
    add_head(model, 0)
    with pytest.raises(UserError, match=r"reward=bradley_terry: transformers has no sequence classifier .*Llama"):
        as_classifier(model, None)


# --- reading whole conversations -------------------------------------------------------------------------------------

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "chatml": chat_models.chatml,
    "llama3": chat_models.llama3,
    "gemma": chat_models.gemma,
    "zephyr": chat_models.zephyr,
    # Behind a line break no token of the answer spans its beginning, which a template could not help.
    "no_end": lambda: chat_models.chatml(chat_models.NO_END.replace(": '", ":\n'")),
    "first_token": lambda: chat_models.zephyr(chat_models.NO_END.replace(": '", ":\n'")),
    "dated": lambda: chat_models.chatml(chat_models.DATED),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_saved_template_gives_a_conversation_the_ids_of_training(name: str) -> None:
    encoder = ChatEncoder(TOKENIZERS[name]())
    tokenizer = encoder.scoring_tokenizer()
    for turns in (["What is the capital of France?"], ["hello", "world", "and so on"]):
        messages = [Message("user" if place % 2 == 0 else "assistant", turn) for place, turn in enumerate(turns)]
        ids = [*encoder.prompt_ids(messages), *encoder.response_ids(messages, "Paris, and so on.")]
        chat = [{"role": one.role, "content": one.content} for one in messages]
        text = tokenizer.apply_chat_template(
            [*chat, {"role": "assistant", "content": "Paris, and so on."}], tokenize=False
        )
        assert tokenizer(str(text), add_special_tokens=False)["input_ids"] == ids
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert tokenizer(str(prompt), add_special_tokens=False)["input_ids"] == list(encoder.prompt_ids(messages))
    assert encoder.tokenizer.chat_template != tokenizer.chat_template, "the run's own is left alone"


# --- accuracies ------------------------------------------------------------------------------------------------------


def pair(question: str, chosen: str, rejected: str) -> PreferenceExample:
    prompt = Prompt(question, (Message("user", question),))
    return PreferenceExample(
        f"{question}{chosen}", prompt, (Response("rejected", rejected), Response("chosen", chosen))
    )


def test_ties_count_one_half_and_prompts_once() -> None:
    """By length: question a is right once and tied once, 3/4; b is wrong."""
    rows = [pair("a", "xxx", "x"), pair("b", "x", "xxx"), pair("a", "yy", "xx")]
    shares, ties = _by_prompt(Length("characters").score(*_answers(rows)), rows)
    assert shares.tolist() == [0.75, 0.0]
    assert ties == 1


# --- in the pipeline -------------------------------------------------------------------------------------------------

NOUNS = ["apple", "boat", "cat", "dog", "fox", "kite", "lamp", "map"]


def preferences(folder: Path) -> list[str]:
    """Overrides for pairs in which the chosen answer is about the boat, at equal lengths, or one word less."""
    rows = []
    for number in range(160):
        first, second = ("the boat", "the fox") if number % 3 else ("a boat near the lamp", "a fox near the boat lamp")
        rows.append({"prompt": f"Write about {NOUNS[number % 8]} {number}.", "chosen": first, "rejected": second})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["dataset=pairs_file", f"dataset.path={path}", "dataset.validation_share=0.25", "dataset.test_share=0.25"]
    return [*data, "train.max_length=null"]


N_DATA = 5  # overrides of ``preferences``
SHORT = (
    "reward=bradley_terry",
    "reward.train.steps=30",
    "reward.train.batch_size=8",
    "reward.train.learning_rate=2e-2",
    "reward.train.evaluate_every=null",
)


def experiment_of(root: Path, *words: str) -> Experiment:
    given = small(*words, f"cache.dir={root / 'cache'}", "device=cpu")
    return config.load(config.compose(given), given)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Finished]:
    root = tmp_path_factory.mktemp("reward")
    words = [*preferences(root), *SHORT]
    return root, words, run_small(root, "loss=dpo", *words)


def test_a_run_learns_an_obvious_preference_and_beats_length(warm: tuple[Path, list[str], Finished]) -> None:
    found = warm[2].result["reward_model"]
    assert set(found["splits"]) == {"validation", "test"}
    for measured in found["splits"].values():
        own, length = measured["reward_model"], measured["length"]
        assert own["value"] > 0.95
        assert own["ci_low"] > length["ci_high"]
        difference = length["difference"]
        assert difference["value"] == pytest.approx(own["value"] - length["value"])
        assert 0 < difference["ci_low"] < difference["value"] <= difference["ci_high"]
        assert measured["n_pairs"] == measured["n_prompts"] > 15
        assert measured["sentiment"] is None or "difference" in measured["sentiment"]
    assert found["model"].startswith("reward_model/")
    assert "reward_model" not in run_small_without(warm).result


def run_small_without(warm: tuple[Path, list[str], Finished]) -> Finished:
    return run_small(warm[0], "loss=dpo", *warm[1][:N_DATA], "reward=length")


def test_the_report_shows_how_good_it_is(warm: tuple[Path, list[str], Finished]) -> None:
    table = next(one for one in rewards.panel(groups(warm[2])[0]).tables if one.name == "reward_model")
    measured = warm[2].result["reward_model"]["splits"]
    rows = {(row[1], row[0]): row for row in table.rows}
    length = rows["test", "length"]
    assert length[2:4] == (measured["test"]["n_pairs"], measured["test"]["n_prompts"])
    assert cast("Interval", length[4]).low == measured["test"]["length"]["ci_low"]
    assert cast("Interval", length[6]).high == measured["test"]["length"]["difference"]["ci_high"]
    assert rows["validation", "reward_model"][6] is None


def groups(*found: Finished) -> tuple[Group, ...]:
    """As a report forms them; the runs differ in the seed of SFT, as the command line would have noted."""
    for number, one in enumerate(found):
        settings = {
            "seed": 0,
            "sft": {"seed": number},
            "reward": {"_target_": "dppo.rewards.bradley_terry.BradleyTerry"},
        }
        (one.directory / "config.yaml").write_text(yaml.safe_dump(settings))
    return gathered(*(one.directory for one in found)).groups


def test_rewards_of_two_reward_models_are_not_compared(warm: tuple[Path, list[str], Finished], tmp_path: Path) -> None:
    """The settings of the reward are the same; it starts from another SFT model."""
    other = run_small(warm[0], "loss=dpo", *warm[1], "sft.seed=1")
    assert other.result["reward_model"]["model"] != warm[2].result["reward_model"]["model"]
    assert len(groups(warm[2], other)) == 2
    assert len(groups(warm[2], run_small(warm[0], "loss=dpo", *warm[1]))) == 1
    with pytest.raises(UserError, match="scored by different rewards"):
        standings(configurations(find_runs([warm[2].directory, other.directory])))


def test_the_policy_trains_on_none_of_its_prompts_and_it_on_none_of_an_evaluation(
    warm: tuple[Path, list[str], Finished],
) -> None:
    found = experiment_of(warm[0], "loss=dpo", *warm[1])
    assert isinstance(found.reward, BradleyTerry)
    every = found.dataset.pairs("train")
    policy = {row.prompt.prompt_id for row in pipeline._training_rows(found)["pairs"]}
    own = {row.prompt.prompt_id for row in found.reward.own_pairs(every)}
    assert policy | own == {row.prompt.prompt_id for row in every}
    assert not policy & own
    assert 0.15 < len(own) / len(policy | own) < 0.45
    for split_ in ("validation", "test"):
        assert not own & {row.prompt.prompt_id for row in found.dataset.pairs(cast("Any", split_))}
    other = dataclasses.replace(found.reward, held_back_seed=1)
    assert {row.prompt.prompt_id for row in other.own_pairs(every)} != own
    both = dataclasses.replace(found.reward, held_back=None)
    assert len(both.own_pairs(every)) == len(every)
    assert len(pipeline._training_rows(dataclasses.replace(found, reward=both))["pairs"]) == len(every)
    manifest = json.loads(next((warm[0] / "cache" / "reward_model").rglob("manifest.json")).read_text())
    assert manifest["extra"]["n_pairs"] == len(own)
    seen = pipeline.phase_data(
        found,
        pipeline._workbench(found),
        found.phases["main"],
        pipeline._training_rows(found)["pairs"],
        ChatEncoder(found.model.load_tokenizer()),
    )
    assert {example.prompt_id for example in (*seen.examples, *seen.held_out)}.isdisjoint(own)
    # The same question in another spelling, or behind a system turn, is on the same side.
    system = Message("system", "Be brief.")
    for number in range(40):
        asked = [(Message("user", f"Question {number}?"),), (system, Message("user", f"question  {number}?"))]
        first, second = (found.reward.is_own(Prompt(prompt_id(one), one)) for one in asked)
        assert first == second


def test_a_curve_of_another_reward_model_is_another_curve(warm: tuple[Path, list[str], Finished]) -> None:
    found = experiment_of(warm[0], "loss=dpo", "evaluation.interim.kl=true", "evaluation.interim.n_points=1", *warm[1])
    assert isinstance(found.reward, BradleyTerry)
    encoder = ChatEncoder(found.model.load_tokenizer())
    curves = []
    for fingerprint in ("a", "a", "b"):
        made = Artifact("reward_model", fingerprint, "", (), reused=True)
        trained = dataclasses.replace(found, reward=TrainedReward(found.reward, made, encoder))
        curves.append(pipeline.curve_identity(trained))
    assert curves[0] == curves[1] != curves[2]


@pytest.mark.parametrize(
    ("change", "rebuilt"),
    [
        (["loss=unll", "alpha=0.3", "beta=0.5", "seed=4"], []),
        (["evaluation.split=validation"], ["accuracy"]),
        (["reward.precision=bf16"], ["accuracy"]),
        (["reward.tokens_per_batch=64"], []),
        (["reward.held_back_seed=5"], ["reward", "preference", "accuracy"]),
        (["reward.seed=5", "reward.centring=0.1"], ["reward", "accuracy"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_it_is_trained_again_only_for_what_decides_it(
    warm: tuple[Path, list[str], Finished], change: list[str], rebuilt: list[str]
) -> None:
    loss = [] if change[0].startswith("loss") else ["loss=dpo"]
    found = run_small(warm[0], *loss, *warm[1], *change)
    looked_at = {"sft", "reward", "accuracy"} | (set() if change[0].startswith("loss") else {"preference"})
    assert set(found.built) & looked_at == set(rebuilt)
    if change[0].startswith("loss"):
        assert found.result["reward_model"] == warm[2].result["reward_model"]


def model_folder(found: Finished) -> Path:
    return found.directory.parent / "cache" / str(found.result["reward_model"]["model"])


def test_the_saved_model_scores_the_same_as_a_classifier(warm: tuple[Path, list[str], Finished]) -> None:
    root, words, done = warm
    found = experiment_of(root, "loss=dpo", *words)
    assert isinstance(found.reward, BradleyTerry)
    folder = model_folder(done)
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".jsonl", ".jinja", ".safetensors"}
    made = Artifact("reward_model", "0", str(folder), (), reused=True)
    trained = TrainedReward(found.reward, made, ChatEncoder(found.model.load_tokenizer()))
    classifier = Classifier(str(folder), "main", 0, None, 100, "fp32", None, "cpu")
    assert isinstance(trained, Reward)
    prompts = found.dataset.prompts("test")
    answers = ["the boat", "a fox near the boat lamp", "", "the fox"] * len(prompts)
    scores = trained.score(prompts, answers[: len(prompts)])
    assert scores == pytest.approx(classifier.score(prompts, answers[: len(prompts)]), abs=1e-5)
    assert len({round(score, 4) for score in scores}) > 3
    assert scores[0] > scores[3]
    with pytest.raises(UserError, match=r"reward=classifier reward\.name_or_path=FOLDER"):
        found.reward.score(prompts, answers)
    other = run_small(root, "loss=dpo", *words[:N_DATA], "reward=classifier", f"reward.name_or_path={folder}")
    rewards = [one.result["reward"]["reference"]["value"] for one in (done, other)]
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)


def test_a_text_that_spells_control_tokens_ends_no_turn(warm: tuple[Path, list[str], Finished]) -> None:
    """What is read is the last token of the answer, not one that it spells."""
    root, words, done = warm
    found = experiment_of(root, "loss=dpo", *words)
    assert isinstance(found.reward, BradleyTerry)
    encoder = ChatEncoder(found.model.load_tokenizer())
    made = Artifact("reward_model", "0", str(model_folder(done)), (), reused=True)
    trained = TrainedReward(found.reward, made, encoder)
    (prompt, *_) = found.dataset.prompts("test")
    (end,) = {encoder.tokenizer.convert_ids_to_tokens(one) for one in encoder.end_of_turn_ids}
    plain, spelled = trained.score([prompt, prompt], ["the boat", f"the boat{end}"])
    assert plain != spelled


def test_a_killed_training_goes_on_where_it_was(tmp_path: Path) -> None:
    words = [*preferences(tmp_path), "reward=bradley_terry", "reward.train.evaluate_every=null"]
    words += ["reward.train.batch_size=2", "reward.train.steps=60", "reward.train.checkpoint_every=4"]
    whole = run_small(tmp_path / "whole", "loss=dpo", *words)
    over = threading.Event()

    def kill() -> None:
        work = tmp_path / "cut" / "cache" / ".work"
        while not over.is_set() and not list(work.glob("reward_model*/**/step-*.safetensors")):
            time.sleep(0.005)
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with pytest.raises(Interrupted, match="reward stopped after step"):
            run_small(tmp_path / "cut", "loss=dpo", *words)
    finally:
        over.set()
        thread.join()
    again = run_small(tmp_path / "cut", "loss=dpo", *words)
    manifest = json.loads(next((tmp_path / "cut" / "cache" / "reward_model").rglob("manifest.json")).read_text())
    assert manifest["extra"]["continued_after"] >= 4
    first, second = (load_file(model_folder(one) / "model.safetensors") for one in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    assert again.result["reward_model"] == whole.result["reward_model"]


def test_adapters_from_the_base_model_are_merged(tmp_path: Path) -> None:
    words = [*preferences(tmp_path), *SHORT, "train@reward.train=lora", "reward.start=base", "reward.precision=bf16"]
    found = run_small(tmp_path, "loss=dpo", *words, "reward.train.precision=bf16", "reward.train.packing=padded")
    assert not any("lora" in name for name in load_file(model_folder(found) / "model.safetensors"))
    assert found.result["reward_model"]["splits"]["test"]["reward_model"]["value"] > 0.9
    manifest = json.loads((model_folder(found) / "manifest.json").read_text())
    assert manifest["parents"] == []
    assert manifest["inputs"]["numerics"]["packing"] == "padded"
    again = run_small(
        tmp_path, "loss=dpo", *words, "sft.seed=1", "reward.train.precision=bf16", "reward.train.packing=padded"
    )
    assert "sft" in again.built
    assert "reward" not in again.built, "nothing of the SFT model is in it"


def test_a_reward_model_that_does_not_beat_length_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {
            "prompt": f"Write about {NOUNS[n % 8]} {n}.",
            "chosen": f"a {NOUNS[n % 7]} near the {NOUNS[n % 5]}",
            "rejected": f"the {NOUNS[n % 3]}",
        }
        for n in range(60)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["dataset=pairs_file", f"dataset.path={path}", "dataset.validation_share=0.25", "dataset.test_share=0.25"]
    with caplog.at_level(logging.INFO):
        found = run_small(tmp_path, "loss=dpo", *data, "reward=bradley_terry", "reward.train.steps=1")
    measured = found.result["reward_model"]["splits"]["test"]
    assert measured["length"]["value"] == 1.0
    assert measured["length"]["ci_high"] == 1.0
    assert measured["length"]["ci_low"] < 1.0, "Wilson's, where the bootstrap has no width"
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    of = f"{measured['n_pairs']} test pairs of {measured['n_prompts']} prompts"
    assert any(f"does not beat length on held-out pairs ({of}" in line for line in warnings)
    assert any(
        one.getMessage().startswith("  reward model ranks ") and of in one.getMessage() for one in caplog.records
    )


def test_the_plan_names_what_the_run_makes(tmp_path: Path) -> None:
    words = ["loss=dpo", *preferences(tmp_path), *SHORT]
    found = plan.plan(experiment_of(tmp_path, *words))
    done = run_small(tmp_path, *words)
    named = {step.title: step.fingerprint for step in found.steps}
    made = {item["stage"]: item["fingerprint"] for item in done.result["timings"]["stages"]}
    for title in ("sft", "reward", "accuracy", "reference", "preference", "answers", "baseline", "scores"):
        assert named[title] == made[title], title
    (step,) = (one for one in found.steps if one.title == "reward")
    assert (step.action, step.work, step.unit) == ("build", 30, "step")
    assert not plan.plan(experiment_of(tmp_path, *words)).todo


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reward.held_back=1.5"], r"reward\.held_back=1\.5: must be a share in \(0, 1\), or null"),
        (["reward.centring=-1"], r"reward\.centring=-1\.0: must be a number >= 0"),
        (["reward.start=other"], r"reward\.start=other: must be one of sft, base"),
        (["reward.n_pairs=0"], r"reward\.n_pairs=0: must be at least 1"),
        (["train@reward.train=lora_4bit"], r"reward\.train\.lora\.base_4bit=true: a reward model is saved with"),
        (["reward.held_back=0.00001"], r"reward=bradley_terry: the data set has \d+ training pairs, and none is held"),
        (["reward.held_back=0.99999"], r"reward\.held_back=0\.99999: leaves no training prompt to the policy"),
        (["reward.margin=0.5"], r"reward\.margin=0\.5: needs a score for every answer"),
    ],
    ids=lambda value: str(value[0]),
)
def test_what_cannot_be_is_one_line(words: list[str], said: str, warm: tuple[Path, list[str], Finished]) -> None:
    given = {word.partition("=")[0] for word in words}
    with pytest.raises(UserError, match=said) as raised:
        run_small(warm[0], "loss=dpo", *(word for word in warm[1] if word.partition("=")[0] not in given), *words)
    assert "\n" not in str(raised.value)


def test_labelled_answers_without_pairs_are_refused_before_sft(tmp_path: Path) -> None:
    path = tmp_path / "labelled.jsonl"
    rows = ({"prompt": f"Write {n}.", "completion": "a boat", "label": n % 2 > 0} for n in range(40))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["dataset=labelled_file", f"dataset.path={path}", "dataset.test_share=0.3", "dataset.validation_share=0.3"]
    with pytest.raises(UserError, match=r"reward=bradley_terry: the data set has 0 training pairs; choose"):
        run_small(tmp_path, "loss=kto", *data, "reward=bradley_terry")
    assert not list((tmp_path / "cache").glob("sft/*"))


def test_ranked_answers_make_its_pairs(tmp_path: Path) -> None:
    path = tmp_path / "ranked.jsonl"
    rows = ({"prompt": f"Write {n}.", "responses": ["a boat", "a fox", "a"], "scores": [3, 2, 1]} for n in range(60))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["dataset=ranked_file", f"dataset.path={path}", "dataset.test_share=0.3", "dataset.validation_share=0.3"]
    found = run_small(tmp_path, "loss=rrhf", *data, *SHORT, "reward.margin=0.1")
    measured = found.result["reward_model"]["splits"]["test"]
    assert measured["n_pairs"] > 5
    assert measured["reward_model"]["value"] > 0.9


@pytest.mark.slow
def test_two_processes_train_the_same_reward_model(dppo: Run, two_processes: Run, tmp_path: Path) -> None:
    words = small("loss=dpo", *preferences(tmp_path), *SHORT, "reward.train.tokens_per_micro_batch=60", "device=cpu")
    alone = dppo(*words, "hydra.run.dir=alone", "cache.dir=cache-alone")
    assert alone.returncode == 0, alone.stderr
    both = two_processes(*words, "hydra.run.dir=pair", "cache.dir=cache-pair")
    assert both.returncode == 0, both.stderr[-3000:]
    assert both.stdout.count("reward model ranks") == 2, "only the first process speaks, once a split"
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("alone", "pair")]
    one, two = (
        load_file(tmp_path / f"cache-{name}" / result["reward_model"]["model"] / "model.safetensors")
        for name, result in zip(("alone", "pair"), results, strict=True)
    )
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-3)
