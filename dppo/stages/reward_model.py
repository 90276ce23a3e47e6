"""The reward model: trained on preference pairs of its own, measured on held-out ones beside what it must beat."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dppo.artifacts import Build, Slot
from dppo.config import EvaluationSettings
from dppo.data import Dataset
from dppo.data.subsets import nested_subset
from dppo.errors import UserError
from dppo.evaluation.win_rates import Array, Interval, crossed_rate, outcomes, paired_difference
from dppo.losses.bradley_terry import PreferenceLikelihood
from dppo.processes import gather
from dppo.rewards.bradley_terry import BradleyTerry, TrainedReward
from dppo.rewards.length import Length
from dppo.rewards.sentiment import Sentiment
from dppo.stages.preflight import architecture_of, ready_to_train
from dppo.stages.training import continued_policy, new_policy, run_training
from dppo.stages.workbench import WORK, Workbench
from dppo.types import Artifact, Json, PreferenceExample, Prompt, Split

if TYPE_CHECKING:
    from dppo.data.encoding import ChatEncoder, EncodedSet
    from dppo.models import Model
    from dppo.rewards import PairwiseReward, Reward

VERSION = 2
MEASURED_VERSION = 1
# The same held-out pairs whatever the seeds, so that reward models can be compared.
_FIXED = 0
_MEASURED = "accuracy.json"
_CONTROLS: Mapping[str, Reward] = {"length": Length("characters"), "sentiment": Sentiment()}


def ready_reward(
    bench: Workbench,
    reward: Reward | PairwiseReward,
    model: Model,
    dataset: Dataset,
    reference: Artifact,
    encoder: ChatEncoder,
) -> Reward | PairwiseReward:
    """A reward that can score: one that is to be trained is trained, or taken from the cache; others are themselves.

    ``reference`` is the run's SFT model, ``model`` what that came from. Every process of the run enters.
    """
    if not isinstance(reward, BradleyTerry):
        return reward
    return TrainedReward(reward, _reward_model(bench, reward, model, dataset, reference, encoder), encoder)


# --- training ---------------------------------------------------------------------------------------------------------


def reward_model_slot(
    bench: Workbench, settings: BradleyTerry, model: Model, dataset: Dataset, reference: str, encoder: ChatEncoder
) -> Slot:
    """The place of the reward model; ``reference`` is the fingerprint of the SFT model."""
    base = settings.start == "base"
    return bench.cache.artifact(
        "reward_model",
        {
            "version": VERSION,
            "reward": settings.identity(),
            "settings": settings.train.identity(),
            "data": dataset.identity(),
            "template": encoder.template_text,
            "numerics": bench.training_numerics(settings.train),
            **({"model": model.identity()} if base else {}),
        },
        parents=[] if base else [reference],
    )


def reward_model_examples(settings: BradleyTerry, dataset: Dataset, encoder: ChatEncoder) -> EncodedSet:
    """The pairs that the reward model trains on. Raises UserError if there are none, or they lack scores it needs."""
    pairs = nested_subset(settings.own_pairs(dataset.pairs("train")), settings.train.n_examples, settings.seed)
    if settings.margin and any(one.score is None for pair in pairs for one in pair.responses):
        raise UserError(
            f"reward.margin={settings.margin:g}: needs a score for every answer, which these pairs do not have; "
            "set it to 0"
        )
    return encoder.encode(pairs, settings.train.max_length, key="reward.train.max_length")


def _reward_model(
    bench: Workbench, settings: BradleyTerry, model: Model, dataset: Dataset, reference: Artifact, encoder: ChatEncoder
) -> Artifact:
    train = settings.train
    slot = reward_model_slot(bench, settings, model, dataset, reference.fingerprint, encoder)

    def build(started: Build) -> None:
        from dppo.models import architecture, save
        from dppo.reward_heads import RewardScorer, add_head, as_classifier, check_classifier

        encoded = reward_model_examples(settings, dataset, encoder)
        held_out = nested_subset(dataset.pairs("validation"), train.n_evaluation_examples, _FIXED)
        for note in encoded.notes:
            bench.say(f"  reward model: {note}")
        objective = PreferenceLikelihood(settings.margin, settings.centring)
        from_sft = settings.start == "sft"
        ready = ready_to_train(
            bench,
            architecture_of(bench, reference) if from_sft else architecture(model),
            encoded.examples,
            train,
            objective,
            seed=settings.seed,
            evaluates=bool(held_out),
            title="reward",
            key="reward.train",
            scorer_of=RewardScorer,
            prepare=functools.partial(add_head, seed=settings.seed),
        )
        with ready.watched(bench, "reward", "reward.train"):
            if from_sft:
                policy = continued_policy(bench, reference, train.lora, settings.seed)
            else:
                policy = new_policy(bench, model, train.lora, settings.seed)
            check_classifier(policy)
            add_head(policy, settings.seed)
            outcome = run_training(
                bench,
                policy,
                objective,
                encoded.examples,
                ready.settings,
                seed=settings.seed,
                started=started,
                held_out=encoder.encode(held_out, encoded.max_length).examples if held_out else (),
                title="reward",
                scorer_of=RewardScorer,
            )
        if outcome.status == "diverged":
            raise UserError(
                f"reward.train.learning_rate={train.learning_rate}: the reward model diverged at step "
                f"{outcome.steps + 1} (examples {', '.join(outcome.example_ids[:3])}); lower the learning rate"
            )
        if bench.is_main:
            merged: Any = policy
            if hasattr(policy, "get_base_model"):
                merged = merged.merge_and_unload()
            tokenizer = encoder.scoring_tokenizer()
            padding = tokenizer.pad_token_id
            outside = None if padding in encoder.end_of_turn_ids else padding
            save(as_classifier(merged, outside), tokenizer, started.directory)
            started.extra["outcome"] = outcome.to_json()
            started.extra["n_pairs"] = len(encoded.examples)

    start = f"from the {'SFT' if settings.start == 'sft' else 'base'} model, seed {settings.seed}"
    return bench.artifact("reward", slot, start, build)


# --- measuring --------------------------------------------------------------------------------------------------------


def measured_splits(split: Split) -> tuple[Split, ...]:
    """Where the accuracy is measured: on the validation pairs, and on those of the evaluation."""
    return ("validation",) if split == "validation" else ("validation", split)


def accuracy_slot(bench: Workbench, reward: TrainedReward, dataset: Dataset, evaluation: EvaluationSettings) -> Slot:
    """The place of the measured accuracies."""
    return bench.cache.artifact(
        "accuracy",
        {
            "version": MEASURED_VERSION,
            "reward": reward.identity(),
            "controls": {name: control.identity() for name, control in _available().items()},
            "data": dataset.identity(),
            "splits": list(measured_splits(evaluation.split)),
            "n_pairs": reward.settings.n_pairs,
            "n_bootstrap": evaluation.n_bootstrap,
            "bootstrap_seed": evaluation.bootstrap_seed,
        },
        parents=[reward.model.fingerprint],
    )


def accuracy_pairs(reward: TrainedReward, dataset: Dataset, split: Split) -> list[PreferenceExample]:
    """The held-out pairs of a split that the reward model is measured on."""
    return nested_subset(dataset.pairs(split), reward.settings.n_pairs, _FIXED)


def reward_accuracy(
    bench: Workbench, reward: TrainedReward, dataset: Dataset, evaluation: EvaluationSettings
) -> dict[str, Any]:
    """How often held-out pairs are ranked right, by the reward model and by the controls; says so, and warns.

    {model: "stage/fingerprint", splits: {split: {n_pairs, n_prompts, reward_model, length, sentiment}}}, each accuracy
    {value (ties = 1/2), ci_low, ci_high, ties}; a control's has ``difference`` {value, ci_low, ci_high}, that of the
    reward model minus its own on the same pairs, or is None where its package is missing.
    Every prompt counts once: pairs of one prompt are averaged. Intervals are 95 %, by bootstrap of prompts.
    """
    slot = accuracy_slot(bench, reward, dataset, evaluation)

    def build(started: Build) -> None:
        found: dict[str, Json] = {}
        n_scored = 0
        for split in measured_splits(evaluation.split):
            if pairs := accuracy_pairs(reward, dataset, split):
                scores = _scored_together(bench, reward, pairs)
                n_scored += len(scores)
                if bench.is_main:
                    found[split] = _measure(scores, pairs, evaluation)
        if not bench.is_main:
            return
        (started.directory / _MEASURED).write_text(json.dumps(found))
        started.extra[WORK] = n_scored

    splits = " and ".join(measured_splits(evaluation.split))
    artifact = bench.artifact("accuracy", slot, f"of the reward model on {splits} pairs", build)
    found: dict[str, Any] = json.loads((Path(artifact.path) / _MEASURED).read_text())
    for split, measured in found.items():
        for line, is_warning in _told(split, measured):
            (bench.warn if is_warning else bench.say)(line)
    if not found:
        bench.warn("reward model: there are no held-out pairs, so nothing is known of its accuracy")
    return {"model": f"{reward.model.stage}/{reward.model.fingerprint}", "splits": found}


def _available() -> dict[str, Reward]:
    missing = importlib.util.find_spec("vaderSentiment") is None
    return {name: control for name, control in _CONTROLS.items() if not (missing and name == "sentiment")}


def _measure(scores: Sequence[float], pairs: Sequence[PreferenceExample], evaluation: EvaluationSettings) -> Json:
    """``scores`` are the reward model's, of all chosen and then all rejected answers."""

    def rate(right: Array) -> dict[str, Json]:
        n_bootstrap, seed = evaluation.n_bootstrap, evaluation.bootstrap_seed
        return _bounds(crossed_rate(right[None], n_bootstrap=n_bootstrap, seed=seed))

    own, ties = _by_prompt(scores, pairs)
    measured: dict[str, Json] = {
        "n_pairs": len(pairs),
        "n_prompts": len(own),
        "reward_model": {**rate(own), "ties": ties},
    }
    available = _available()
    for name in _CONTROLS:
        if name not in available:
            measured[name] = None
            continue
        other, tied = _by_prompt(available[name].score(*_answers(pairs)), pairs)
        difference, _ = paired_difference(
            own[None], other[None], n_bootstrap=evaluation.n_bootstrap, seed=evaluation.bootstrap_seed
        )
        measured[name] = {**rate(other), "ties": tied, "difference": _bounds(difference)}
    return measured


def _answers(pairs: Sequence[PreferenceExample]) -> tuple[list[Prompt], list[str]]:
    """Prompts and answers of pairs: all chosen ones, then all rejected ones."""
    prompts = [pair.prompt for pair in pairs]
    answers = [{one.role: one.text for one in pair.responses} for pair in pairs]
    return [*prompts, *prompts], [one[role] for role in ("chosen", "rejected") for one in answers]


def _scored_together(bench: Workbench, reward: Reward, pairs: Sequence[PreferenceExample]) -> list[float]:
    """The scores of those answers, of which every process makes its share."""
    prompts, answers = _answers(pairs)
    mine = bench.share(sorted(range(len(answers)), key=lambda place: len(answers[place])))
    own = reward.score([prompts[place] for place in mine], [answers[place] for place in mine])
    scored = dict(pair for part in gather(bench.accelerator, list(zip(mine, own, strict=True))) for pair in part)
    return [scored[place] for place in range(len(answers))]


def _by_prompt(scores: Sequence[float], pairs: Sequence[PreferenceExample]) -> tuple[Array, int]:
    """(share of its pairs that are ranked right by prompt (P,), exact ties counting 1/2; number of ties)."""
    right = outcomes(scores[: len(pairs)], scores[len(pairs) :])
    shares: dict[str, list[float]] = {}
    for pair, outcome in zip(pairs, right.tolist(), strict=True):
        shares.setdefault(pair.prompt.prompt_id, []).append(outcome)
    return np.array([np.mean(own) for own in shares.values()]), int((right == 0.5).sum())


def _bounds(found: Interval) -> dict[str, Json]:
    return {"value": found.value, "ci_low": found.low, "ci_high": found.high}


def _told(split: str, measured: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Lines for the user, and whether each is a warning."""
    of = f"{measured['n_pairs']:,} {split} pairs of {measured['n_prompts']:,} prompts"
    lines = [(f"  reward model ranks {_shown(measured['reward_model'])} of {of} right", False)]
    for name in _CONTROLS:
        control = measured[name]
        if control is None:
            lines.append((f"  {name:<12} not measured, its package is missing: pip install 'dppo[{name}]'", False))
            continue
        difference = control["difference"]
        told = f"{_shown(control)} right; the reward model is {_shown(difference, '+')} better"
        lines.append((f"  {name:<12} ranks {told}", False))
        if difference["ci_low"] <= 0:
            told = f"({of}, difference {_shown(difference, '+')})"
            lines.append((f"reward model: does not beat {name} on held-out pairs {told}", True))
    return lines


def _shown(found: Mapping[str, float], sign: str = "") -> str:
    return f"{found['value']:{sign}.3f} [{found['ci_low']:{sign}.3f}, {found['ci_high']:{sign}.3f}]"
