"""One experiment, as the method section would tell it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from dppo import __version__, on_policy, processes, results, sharding, threads
from dppo.artifacts import Cache
from dppo.artifacts.manifest import Manifest
from dppo.artifacts.stores import n_rows
from dppo.batches import batches, collate
from dppo.compiling import check_compiler
from dppo.config import Experiment, Phase, TrainSettings, key_of
from dppo.data import Dataset, examples_for
from dppo.data.encoding import ChatEncoder, EncodedSet
from dppo.data.ids import content_hash
from dppo.data.kept import Kept
from dppo.data.on_policy import OnPolicy
from dppo.data.shapes import one_row_per_prompt, with_answers_of_the_row_before, with_answers_to_other_prompts
from dppo.data.subsets import nested_subset
from dppo.data.tokenised import Tokenised
from dppo.errors import Pruned, UserError
from dppo.evaluation.edits import after_edit
from dppo.generation import OneAnswer, OwnAnswer, decoding_in_training, decoding_of
from dppo.loop import PERCENT, Interim, Interrupted, Metrics, ReferenceLogps, n_steps
from dppo.losses.penalised import PenalisedLoss
from dppo.losses.penalties import Expectile
from dppo.losses.unpaired import DESIRABLE, KTO
from dppo.rewards import PairwiseReward, Reward
from dppo.rewards.bradley_terry import BradleyTerry, TrainedReward
from dppo.stages.compare import compare
from dppo.stages.drift import drift
from dppo.stages.finished import finished_run
from dppo.stages.generate import generate
from dppo.stages.interim import interim_win_rate
from dppo.stages.preference import Trained, preference
from dppo.stages.reference import reference_logps
from dppo.stages.reward_model import ready_reward, reward_accuracy
from dppo.stages.scores import interim_rewards, judging, scores
from dppo.stages.sft import sft
from dppo.stages.training import METRICS, read_metrics
from dppo.stages.workbench import Workbench
from dppo.tracking import SHARED, Place, RunInfo, Silent, StageInfo, Status, Table, Tracker
from dppo.types import (
    Artifact,
    EncodedExample,
    Json,
    PreferenceExample,
    Prompt,
    ResponseLogps,
    Shape,
    Split,
    StatisticsObjective,
)

Verdict = Callable[[Metrics], str | None]
"""Why a run with this interim row is to end; None: it goes on."""

# Held-out pairs and evaluation prompts are the same for every seed, so that runs can be compared prompt by prompt.
FIXED = 0
ALONE = Place()
_PAIRS_PER_BATCH = 1024
# Parts of a configuration that decide where and how a run is made, and not what comes out.
_NO_INFLUENCE = ("cache", "device", "tracking", "dry_run", "rates", "report", "objectives", "allowed_targets")
# Words that a run's name shows in another form, or that say where and how it is made.
_NOT_IN_NAME = ("hydra", "loss", "penalty", "alpha", "beta", "zeta", "seed", *_NO_INFLUENCE)
_LONGEST_NAME = 100
_read: Kept[list[PreferenceExample]] = Kept(4)
_asked: Kept[list[Prompt]] = Kept(4)


def run(
    experiment: Experiment,
    directory: Path,
    *,
    resolved: Mapping[str, Json],
    overrides: Sequence[str],
    verdict: Verdict = lambda row: None,
    place: Place = ALONE,
) -> tuple[float, ...]:
    """Run an experiment, write its run directory and return the values of its objectives.

    ``resolved`` is the configuration as it is recorded, ``overrides`` the words that the user typed. ``verdict`` sees
    every interim row and may end the run with a reason: then, as beyond ``evaluation.interim.max_kl``, ``Pruned`` is
    raised. ``place`` says to a tracker where the run belongs. ``result.json`` says how it ended, unless by an error.
    """
    started = time.perf_counter()
    results.check_objectives(experiment.objectives)
    bench = _workbench(experiment)
    bench.cache.check_writable()
    record = results.RunDirectory(directory, resolved=resolved, overrides=overrides)
    if bench.is_main:
        record.open()
    bench.on_record = lambda: record.parents(bench) if bench.is_main else None
    for line in results.header(experiment, directory, overrides):
        bench.say(line)
    for notice in experiment.notices:
        bench.warn(notice)
    tracker = (
        experiment.tracking.start(_run_info(experiment, directory, resolved, overrides, place))
        if bench.is_main
        else Silent()
    )
    mirror = _Mirror(bench, record, tracker)
    status: Status = "failed"
    final: dict[str, float | int] = {}
    try:
        result = _stages(experiment, bench, record, mirror, verdict)
        result["timings"]["total_seconds"] = round(time.perf_counter() - started, 3)
        status = result["status"]
        final = results.final_scalars(result)
        if bench.is_main:
            record.result(result)
        for line in results.summary(result, directory):
            bench.say(line)
        if status == "pruned":
            raise Pruned(result["pruned"]["reason"])
        return results.objective_values(result, experiment.objectives)
    except (KeyboardInterrupt, Interrupted):
        status = "interrupted"
        if bench.is_main:
            record.result({"status": status, "timings": results.timings(bench)})
        raise
    finally:
        tracker.finish(status, final)


@dataclass
class _Mirror:
    """What a run shows while it goes on: every row of its phases once and in order, and the shared stages it uses.

    Only the main process shows anything.
    """

    bench: Workbench
    record: results.RunDirectory
    tracker: Tracker
    phase: str = ""
    offset: int = 0  # optimiser steps of the phases before
    n_rows: int = 0  # of this phase so far

    def begin(self, phase: str, offset: int) -> None:
        self.phase, self.offset, self.n_rows = phase, offset, 0

    def row(self, row: Metrics) -> None:
        """The next row of the phase; ``step`` counts from the phase's beginning."""
        self.n_rows += 1
        if self.bench.is_main:
            row = {**row, "step": int(row["step"]) + self.offset}
            self.record.metrics(self.phase, [row])
            self.tracker.log(row)

    def rest(self, rows: Sequence[Metrics]) -> None:
        """All rows of the phase, of which those at the end were not made by this process."""
        for row in rows[self.n_rows :]:
            self.row(row)

    def shared(self, title: str, made: Artifact) -> None:
        """A stage that other runs use as well; what is known of it lies with it, whoever built it."""
        if not self.bench.is_main:
            return
        path = Path(made.path)
        manifest = Manifest.read(path)
        seconds = {"seconds": manifest.timings["total"]} if "total" in manifest.timings else {}
        self.tracker.stage(
            StageInfo(
                title=title,
                stage=made.stage,
                fingerprint=made.fingerprint,
                home=self.bench.cache.root / SHARED,
                config={
                    "inputs": manifest.inputs,
                    "parents": list(manifest.parents),
                    "versions": dict(manifest.versions),
                    "git": manifest.git,
                    "created": manifest.created,
                },
                metrics=read_metrics(path / METRICS),
                final={**seconds, **({"rows": n_rows(path)} if manifest.kind != "artifact" else {})},
            )
        )


def penalty_strength(experiment: Experiment) -> dict[str, float | int]:
    """What alpha multiplies at the start: the mean f(r), before alpha, over all training pairs under the SFT model.

    ``mean``, ``n_pairs``, and ``open``, the share of pairs that are ranked wrongly (r < 0). Of expectile it is the
    published shape's absolute value. Builds SFT and the pairs' reference log-probs if the cache lacks them. Raises
    UserError if no phase has a penalty.
    """
    phase = next((one for one in experiment.phases.values() if isinstance(one.loss, PenalisedLoss)), None)
    if phase is None:
        raise UserError("alpha=calibrated: no loss of this run has a penalty whose strength alpha weighs")
    loss = cast("PenalisedLoss", phase.loss)
    penalty = (
        dataclasses.replace(loss.penalty, form="absolute") if isinstance(loss.penalty, Expectile) else loss.penalty
    )
    bench = _workbench(experiment)
    bench.cache.check_writable()
    encoder = chat_encoder(experiment, bench.cache)
    if experiment.init_from is None:
        reference = start = sft(bench, experiment.model, experiment.dataset, experiment.sft, encoder)
    else:
        reference, start = finished_run(bench, experiment.init_from, encoder)
    if isinstance(experiment.dataset, OnPolicy):
        reward = ready_reward(bench, experiment.reward, experiment.model, experiment.dataset, reference, encoder)
        training = _answers_ranked(dataclasses.replace(experiment, reward=reward), bench, start, encoder).rows
    else:
        training = _training_rows(experiment)
    rows = nested_subset(rows_of_phase(experiment, phase, training), phase.train.n_examples, experiment.seed)
    examples = encoder.encode(rows, phase.train.max_length, key="train.max_length").examples
    _, lookup = reference_logps(bench, reference, examples, phase.train)
    margins = []
    for at in range(0, len(examples), _PAIRS_PER_BATCH):
        batch = collate(examples[at : at + _PAIRS_PER_BATCH])
        tokens = torch.cat(list(lookup(batch.response_keys)))
        own = ResponseLogps(tokens, batch.lengths, batch.example, batch.roles, batch.n_examples)
        margins.append(loss.ranking_margin(own, own).double())
    r = torch.cat(margins)
    strength = penalty(r, differentiable=False)
    return {"mean": float(strength.mean()), "n_pairs": len(r), "open": float((r < 0).double().mean())}


def _stages(
    experiment: Experiment,
    bench: Workbench,
    record: results.RunDirectory,
    mirror: _Mirror,
    verdict: Verdict,
) -> dict[str, Any]:
    training = _training_rows(experiment)
    for line in _kept_apart(experiment, training):
        bench.say(line)
    encoder = chat_encoder(experiment, bench.cache)
    evaluation = experiment.evaluation
    prompts = _evaluation_prompts(experiment)
    experiment.reward.check(prompts)
    experiment.generation.check(bench.device)
    for phase in experiment.phases.values():
        phase.train.kernel(bench.device.type)
        if phase.train.compile:
            check_compiler(bench.device.type)
        sharding.check(phase.train, bench.accelerator.num_processes, "train")

    if experiment.init_from is None:
        reference = sft(bench, experiment.model, experiment.dataset, experiment.sft, encoder)
        policy = reference
    else:
        reference, policy = finished_run(bench, experiment.init_from, encoder)
    mirror.shared(reference.stage, reference)
    reward = ready_reward(bench, experiment.reward, experiment.model, experiment.dataset, reference, encoder)
    measured: dict[str, Any] | None = None
    if isinstance(reward, TrainedReward):
        mirror.shared("reward", reward.model)
        measured = reward_accuracy(bench, reward, experiment.dataset, evaluation)
        experiment = dataclasses.replace(experiment, reward=reward)
    offset = 0
    trained_on: dict[str, dict[str, int]] = {}
    made_from: list[str] = []
    ranked: dict[str, dict[str, float | int]] = {}
    plan = schedule(experiment)
    for number, name, phase in plan:
        if isinstance(experiment.dataset, OnPolicy) and phase is next(iter(experiment.phases.values())):
            preferences = _answers_ranked(experiment, bench, policy, encoder)
            training, made_from = preferences.rows, preferences.parents
            ranked[f"round_{number}"] = preferences.counts
            mirror.shared("candidates", preferences.answered)
        base = reference if phase.reference == "sft" else policy
        last = (number, name, phase) == plan[-1]
        watch = functools.partial(_interim, experiment, bench, base, encoder, verdict) if last else None
        rows = rows_of_phase(experiment, phase, training)
        mirror.begin(name, offset)
        trained = _phase(experiment, bench, name, phase, rows, made_from, policy, base, encoder, watch, mirror)
        mirror.rest(trained.metrics)
        for notice in trained.outcome.get("notices", ()) if trained.reused else ():
            bench.warn(f"{name}: {notice}")
        if trained.policy is None:
            ended = results.pruned if trained.status == "pruned" else results.diverged
            return ended(trained, name, bench)
        trained_on[name] = {"n_examples": trained.n_examples, "steps": int(trained.outcome["steps"])}
        offset += int(trained.outcome["steps"])
        policy = trained.policy

    settings = answers_decoding(experiment)
    own_store, own = generate(bench, "answers", policy, prompts, settings, encoder)
    other_store, other = generate(bench, "baseline", reference, prompts, settings, encoder)
    scored, (own_rewards, other_rewards) = scores(bench, experiment.reward, prompts, [own, other])
    judged = judging(bench, experiment.reward, prompts, [own, other])
    train, kl_prompts, pairs = drift_data(experiment, prompts, encoder)
    _, moved, pair_rows = drift(
        bench,
        policy,
        reference,
        encoder.answers(kl_prompts, own),
        pairs,
        train,
        own_distribution=own_distribution(experiment),
    )
    _, compared = compare(
        bench,
        prompts,
        (own_store, own, own_rewards),
        (other_store, other, other_rewards),
        scored,
        evaluation,
    )
    if measured is not None:
        moved["reward_model"] = measured
    if ranked:
        moved["on_policy"] = ranked
    moved |= {**judged, "training": trained_on}
    moved["after_edit"] = after_edit(pair_rows, n_bootstrap=evaluation.n_bootstrap, seed=evaluation.bootstrap_seed)
    samples = results.samples(prompts, own, other, own_rewards, other_rewards)
    if bench.is_main:
        record.rows("samples.jsonl", samples)
        record.rows("pairs.jsonl", pair_rows)
        mirror.tracker.table("samples", Table(tuple(samples[0]), tuple(tuple(one.values()) for one in samples)))
        mirror.tracker.histograms(*results.reward_histograms(own_rewards, other_rewards))
    return results.complete(
        compared,
        moved,
        bench,
        split=evaluation.split,
        decoding=evaluation.decoding,
        policy=policy,
        reference=reference,
    )


def answers_decoding(experiment: Experiment) -> OneAnswer:
    """How both models give the answers that are compared at the end; y_gen is always greedy."""
    return decoding_of(experiment.generation, experiment.evaluation.sampling)


def interim_decoding(experiment: Experiment) -> OwnAnswer:
    """How both models give those that are compared on the way: the same, but never by an engine of its own."""
    return decoding_in_training(experiment.generation, experiment.evaluation.sampling)


def own_distribution(experiment: Experiment) -> bool:
    """Whether those answers are drawn from the models as they are."""
    sampling = experiment.evaluation.sampling
    return sampling is not None and sampling.unchanged


def _phase(
    experiment: Experiment,
    bench: Workbench,
    name: str,
    phase: Phase,
    training: Sequence[PreferenceExample],
    made_from: Sequence[str],
    start: Artifact,
    base: Artifact,
    encoder: ChatEncoder,
    watch: Callable[[int, Sequence[EncodedExample]], Interim | None] | None,
    mirror: _Mirror,
) -> Trained:
    """One preference phase: y_gen and reference log-probs if its loss uses them, then training.

    ``made_from`` are the stores that the rows in ``training`` come from, if this run made them. ``watch`` makes the
    interim measurements for a number of steps and the held-out examples.
    """
    train, seed = phase.train, experiment.seed
    data = phase_data(experiment, bench, phase, training, encoder)
    for note in data.notes:
        bench.say(f"  {name}: {note}")
    examples, held_out = data.examples, data.held_out
    parents = list(made_from)
    if "generated" in phase.loss.uses_roles:
        store, answers = generate(bench, "y_gen", base, data.prompts, experiment.generation, encoder)
        mirror.shared("y_gen", store)
        parents.append(store.fingerprint)
        examples = encoder.add_generated(examples, answers, data.max_length)
        held_out = encoder.add_generated(held_out, answers, data.max_length)
    lookup: ReferenceLogps | None = None
    if phase.loss.uses_reference:
        logps, lookup = reference_logps(bench, base, (*examples, *held_out), train)
        mirror.shared("reference", logps)
        parents.append(logps.fingerprint)
    return preference(
        bench,
        name,
        phase,
        start,
        examples,
        held_out,
        data=training_data(experiment),
        seed=seed,
        reference=lookup,
        parents=parents,
        encoder=encoder,
        curve=curve_identity(experiment) if watch is not None else None,
        interim=watch(n_steps(train, len(examples)), held_out) if watch is not None else None,
        on_row=mirror.row,
    )


def _interim(
    experiment: Experiment,
    bench: Workbench,
    base: Artifact,
    encoder: ChatEncoder,
    verdict: Verdict,
    steps: int,
    held_out: Sequence[EncodedExample],
) -> Interim | None:
    """What is measured on the way to the last step: answers to fixed validation prompts against the reference's."""
    settings = experiment.evaluation.interim
    percent_at, prompts = interim_data(experiment, steps, held_out)
    if not percent_at:
        return None
    measure = None
    measured: list[Json] = [example.example_id for example in held_out]
    if prompts:
        decoding = interim_decoding(experiment)
        answered, answers = generate(bench, "baseline", base, prompts, decoding, encoder)
        scored, rewards = interim_rewards(bench, experiment.reward, prompts, answers)
        if settings.metric == "win_rate":
            measured = [answered.fingerprint, scored, *(prompt.prompt_id for prompt in prompts)]
        train = list(experiment.phases.values())[-1].train
        kl = settings.measures_kl
        measure = interim_win_rate(bench, base, prompts, rewards, decoding, encoder, train, kl=kl)

    def within_limits(row: Metrics) -> str | None:
        kl = row.get("interim/kl_nats_per_token")
        if settings.max_kl is not None and kl is not None and not kl <= settings.max_kl:
            return (
                f"KL to the reference is {kl:.3g} nats a token after {row[PERCENT]:.0f} % of training, above "
                f"evaluation.interim.max_kl={settings.max_kl:g}"
            )
        return verdict(row)

    return Interim(
        percent_at, settings.metric, measure, within_limits, int(content_hash([settings.metric, measured])[:8], 16)
    )


def curve_identity(experiment: Experiment) -> Json:
    """What decides the curve of reward against KL that the last phase leaves; None: it leaves none.

    A policy from the cache can't be measured on its way any more, so one with a curve is another artifact.
    """
    settings = experiment.evaluation.interim
    if not settings.kl:
        return None
    return {
        "n_points": settings.n_points,
        "n_prompts": settings.n_prompts,
        "reward": experiment.reward.identity(),
        "decoding": interim_decoding(experiment).identity(),
    }


def interim_data(
    experiment: Experiment, steps: int, held_out: Sequence[EncodedExample]
) -> tuple[dict[int, int], list[Prompt]]:
    """({step: percent of training}, prompts that are answered at each). Raises UserError for data that has none."""
    settings = experiment.evaluation.interim
    shares = [(place + 1) / (settings.n_points + 1) for place in range(settings.n_points)]
    shares.sort(key=lambda share: -abs(round(share * steps) - share * steps))  # of several at a step the nearest counts
    found = {round(share * steps): round(100 * share) for share in shares if 0 < round(share * steps) < steps}
    percent_at = dict(sorted(found.items()))
    if not percent_at:
        return {}, []
    pairs = any(example.response("chosen") and example.response("rejected") for example in held_out)
    if settings.metric == "accuracy" and not pairs:
        raise UserError(
            "evaluation.interim.metric=accuracy: there are no held-out pairs to rank; choose win_rate, or a data set "
            "with validation pairs"
        )
    if settings.metric == "accuracy" and not settings.measures_kl:
        return percent_at, []
    prompts = nested_subset(_prompts(experiment.dataset, "validation"), settings.n_prompts, FIXED)
    if not prompts:
        raise UserError("evaluation.interim.n_points: the data set has no validation prompts; set it to 0")
    experiment.reward.check(prompts)
    return percent_at, prompts


def _rows(dataset: Dataset, shape: Shape, split: Split) -> list[PreferenceExample]:
    """The data set's examples that a loss of this shape trains on; kept from one run to the next."""
    if isinstance(dataset, OnPolicy):
        dataset = dataset.source
    served, read = examples_for(dataset, shape, split)
    return _read.get((json.dumps(dataset.identity(), sort_keys=True), served, split), read)


def _prompts(dataset: Dataset, split: Split) -> list[Prompt]:
    return _asked.get((json.dumps(dataset.identity(), sort_keys=True), split), lambda: dataset.prompts(split))


@dataclass(frozen=True)
class PhaseData:
    """What a phase trains on and evaluates, without y_gen; ``prompts`` are those that y_gen answers."""

    examples: tuple[EncodedExample, ...]
    held_out: tuple[EncodedExample, ...]
    prompts: list[Prompt]
    max_length: int | None
    notes: tuple[str, ...]


def phase_data(
    experiment: Experiment, bench: Workbench, phase: Phase, training: Sequence[PreferenceExample], encoder: ChatEncoder
) -> PhaseData:
    """The data of a phase, tokenised. Raises UserError if nothing fits into ``train.max_length``."""
    train, seed = phase.train, experiment.seed
    rows = nested_subset(training, train.n_examples, seed)
    held_out_rows = nested_subset(
        _rows(experiment.dataset, phase.loss.trains_on, "validation"), train.n_evaluation_examples, FIXED
    )
    encoded = encoder.encode(rows, train.max_length, key="train.max_length")
    examples = _seen(_shaped(encoded, phase, seed, bench), phase, seed)
    held_out: tuple[EncodedExample, ...] = ()
    if held_out_rows and (train.evaluate_every is not None or experiment.evaluation.interim.metric == "accuracy"):
        held_out = encoder.encode(held_out_rows, encoded.max_length, key="train.max_length").examples
    wanted = {example.prompt_id for example in (*examples, *held_out)}
    asked = {pair.prompt.prompt_id: pair.prompt for pair in (*rows, *held_out_rows)}
    prompts = [prompt for key, prompt in asked.items() if key in wanted]
    return PhaseData(examples, held_out, prompts, encoded.max_length, encoded.notes)


def drift_data(
    experiment: Experiment, prompts: Sequence[Prompt], encoder: ChatEncoder
) -> tuple[TrainSettings, list[Prompt], Sequence[EncodedExample]]:
    """(training settings for numerics, prompts whose answers KL is measured on, held-out pairs)."""
    evaluation = experiment.evaluation
    train = next(iter(experiment.phases.values())).train if experiment.phases else experiment.sft.train
    assert train is not None  # the door refuses a run that trains nothing
    pairs = nested_subset(_rows(experiment.dataset, "pairs", evaluation.split), evaluation.n_pairs, FIXED)
    kl_prompts = nested_subset(prompts, evaluation.n_kl_prompts, FIXED)
    return train, kl_prompts, encoder.encode(pairs, None).examples if pairs else ()


def _training_rows(experiment: Experiment) -> dict[Shape, list[PreferenceExample]]:
    """What the phases train on, read before anything is trained.

    Nothing yet if they train on the model's own answers. Raises UserError if the data set lacks what a phase's loss
    needs.
    """
    if isinstance(experiment.dataset, OnPolicy):
        if isinstance(experiment.dataset.ranker, BradleyTerry):
            raise UserError(
                "dataset.ranker=bradley_terry: a run trains the reward that evaluates it only; type "
                "reward=bradley_terry, or reward@dataset.ranker=classifier with a trained model's folder"
            )
        if isinstance(experiment.reward, BradleyTerry):
            experiment.reward.own_pairs(_rows(experiment.dataset, "pairs", "train"))
        prompts = _prompts_left(experiment)
        if not prompts:
            raise UserError("dataset.source: has no training prompts for the model to answer; choose another one")
        ranker(experiment).check(prompts)
        return {}
    found: dict[Shape, list[PreferenceExample]] = {}
    for name, phase in experiment.phases.items():
        shape = phase.loss.trains_on
        if shape not in found:
            found[shape] = _rows(experiment.dataset, shape, "train")
        if not found[shape]:
            raise UserError(
                f"dataset={type(experiment.dataset).__name__}: has no prompt with a better and a worse answer, which "
                f"phase {name} needs for loss={phase.loss.name}; choose loss=kto for labelled or loss=rrhf for ranked "
                "answers, loss=none for chats alone, or a data set of pairs"
            )
    reward = experiment.reward
    if isinstance(reward, BradleyTerry):
        reward.own_pairs(_rows(experiment.dataset, "pairs", "train"))
        for shape, rows in found.items():
            found[shape] = [row for row in rows if reward.is_left(row.prompt)]
            if not found[shape]:
                raise UserError(
                    f"reward.held_back={reward.held_back}: leaves no training prompt to the policy; lower it, or set "
                    "it to null"
                )
    return found


def _kept_apart(experiment: Experiment, training: Mapping[Shape, Sequence[PreferenceExample]]) -> list[str]:
    """Lines that say what the phases do not train on."""
    reward = experiment.reward
    if not isinstance(reward, BradleyTerry) or not training:
        return []
    if reward.held_back is None:
        return ["reward model: trains on the pairs of all training prompts, those of the phases too"]
    left = {row.prompt.prompt_id for rows in training.values() for row in rows}
    own = f"{reward.held_back:.0%} of the training prompts are its own"
    return [f"reward model: {own}, the phases train on the other {len(left):,}"]


def training_data(experiment: Experiment) -> Json:
    """What decides the rows that the phases train on: the data set, without what a reward model keeps to itself.

    Rows that are made from answers also depend on the stores that hold them.
    """
    dataset, keeper = experiment.dataset, _keeper(experiment)
    identity = dataset.preferences_identity() if isinstance(dataset, OnPolicy) else dataset.identity()
    if keeper is not None and keeper.held_back is not None:
        return {**identity, "left_out": keeper.rows_identity()}
    return identity


def schedule(experiment: Experiment) -> list[tuple[int, str, Phase]]:
    """(round, name, phase) in the order of training: all phases, and once more in every further round."""
    rounds = experiment.dataset.rounds if isinstance(experiment.dataset, OnPolicy) else 1
    return [
        (number, name if number == 1 else f"{name} round {number}", phase)
        for number in range(1, rounds + 1)
        for name, phase in experiment.phases.items()
    ]


def ranker(experiment: Experiment) -> Reward | PairwiseReward:
    """What ranks the model's own answers: a reward of its own, or the one that evaluates the run."""
    assert isinstance(experiment.dataset, OnPolicy)
    return experiment.reward if experiment.dataset.ranker is None else experiment.dataset.ranker


def prompts_to_answer(experiment: Experiment) -> list[Prompt]:
    """The training prompts that a phase of this run may see, the same in every round."""
    sizes = [phase.train.n_examples for phase in experiment.phases.values()]
    most = None if None in sizes else max(size for size in sizes if size is not None)
    return nested_subset(_prompts_left(experiment), most, experiment.seed)


def _prompts_left(experiment: Experiment) -> list[Prompt]:
    """The training prompts, without those that a reward model keeps to itself."""
    keeper, prompts = _keeper(experiment), _prompts(experiment.dataset, "train")
    return prompts if keeper is None else [one for one in prompts if keeper.is_left(one)]


def _keeper(experiment: Experiment) -> BradleyTerry | None:
    """The settings of a reward model that may keep training prompts to itself, before and after it was trained."""
    reward = experiment.reward
    settings = reward.settings if isinstance(reward, TrainedReward) else reward
    return settings if isinstance(settings, BradleyTerry) else None


def _answers_ranked(
    experiment: Experiment, bench: Workbench, model: Artifact, encoder: ChatEncoder
) -> on_policy.Preferences:
    dataset = experiment.dataset
    assert isinstance(dataset, OnPolicy)
    return on_policy.preferences(bench, dataset, ranker(experiment), prompts_to_answer(experiment), model, encoder)


def rows_of_phase(
    experiment: Experiment, phase: Phase, training: Mapping[Shape, Sequence[PreferenceExample]]
) -> Sequence[PreferenceExample]:
    """The rows that a phase may train on, in the shape of its loss."""
    rows = training[phase.loss.trains_on]
    if not isinstance(experiment.dataset, OnPolicy):
        return rows
    # A limit counts prompts here: what a phase sees of them must not depend on what other phases ask for.
    asked = nested_subset(_prompts_left(experiment), phase.train.n_examples, experiment.seed)
    wanted = {prompt.prompt_id for prompt in asked}
    return [row for row in rows if row.prompt.prompt_id in wanted]


def _shaped(encoded: EncodedSet, phase: Phase, seed: int, bench: Workbench) -> Sequence[EncodedExample]:
    """The examples as a loss of labelled answers wants them: one row a prompt, and answers to other prompts."""
    loss, examples = phase.loss, encoded.examples
    if isinstance(loss, KTO):
        if loss.one_per_prompt:
            examples = one_row_per_prompt(examples, FIXED)
        kinds = [response.role in DESIRABLE for example in examples for response in example.responses]
        if notice := loss.balance(sum(kinds), len(kinds) - sum(kinds)):
            bench.warn(notice)
    if not (isinstance(loss, StatisticsObjective) and loss.uses_statistics and "mismatched" in loss.statistics_roles):
        return examples
    if loss.statistics_scope == "micro_batch":
        first_epoch = batches(examples, phase.train.batch_size, math.ceil(len(examples) / phase.train.batch_size), seed)
        return with_answers_of_the_row_before(examples, first_epoch, encoded.max_length)
    return with_answers_to_other_prompts(examples, encoded.max_length, FIXED)


def _seen(examples: Sequence[EncodedExample], phase: Phase, seed: int) -> tuple[EncodedExample, ...]:
    """The examples that this phase's steps reach: y_gen and log-probs of the others would never be used."""
    steps = n_steps(phase.train, len(examples))
    if steps * phase.train.batch_size >= len(examples):
        return tuple(examples)
    seen = {example.example_id for batch in batches(examples, phase.train.batch_size, steps, seed) for example in batch}
    return tuple(example for example in examples if example.example_id in seen)


def _evaluation_prompts(experiment: Experiment) -> list[Prompt]:
    evaluation = experiment.evaluation
    prompts = nested_subset(_prompts(experiment.dataset, evaluation.split), evaluation.n_prompts, FIXED)
    if not prompts:
        raise UserError(f"evaluation.split={evaluation.split}: the data set has no prompts in this split")
    return prompts


def chat_encoder(experiment: Experiment, cache: Cache) -> ChatEncoder:
    """The encoder of a run, with the tokenised data that the cache has of its data set."""
    return ChatEncoder(experiment.model.load_tokenizer(), Tokenised(cache, experiment.dataset.identity()))


def _workbench(experiment: Experiment) -> Workbench:
    return workbench(experiment.cache.dir, experiment.device, verify=experiment.cache.verify)


def workbench(cache_dir: str, device: str, *, verify: bool = False) -> Workbench:
    """The cache and the device of a run; makes no directory. Raises UserError for a device that is not there."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device={device}: this machine has no CUDA device; choose device=cpu or device=auto")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: not available on this machine; choose device=cpu or device=auto")
    if device.startswith("xpu") and not torch.xpu.is_available():
        raise UserError(f"device={device}: this machine has no XPU device; choose device=cpu or device=auto")
    threads.settle()
    if ":" in device:
        getattr(torch, device.partition(":")[0]).set_device(int(device.partition(":")[2]))
    return Workbench(Cache(Path(cache_dir), verify), processes.accelerator(cpu=device == "cpu"))


def _run_info(
    experiment: Experiment, directory: Path, resolved: Mapping[str, Json], overrides: Sequence[str], place: Place
) -> RunInfo:
    losses = [results.describe_loss(phase.loss) for phase in experiment.phases.values()] or ["none"]
    methods = [loss.partition("(")[0] for loss in losses]
    decides = {key: value for key, value in resolved.items() if key not in _NO_INFLUENCE}
    telling = [word for word in overrides if re.split(r"[./@]", key_of(word))[0] not in _NOT_IN_NAME]
    configuration = " ".join([" > ".join(losses), *telling])
    name = [*filter(None, [place.label]), " > ".join(losses), *telling, f"seed={experiment.seed}"]
    while telling and len(" ".join(name)) > _LONGEST_NAME:
        # What varies stays longest; a search adds it last.
        dropped = next((word for word in telling if word not in place.varied), telling[0])
        telling.remove(dropped)
        name.remove(dropped)
    return RunInfo(
        id=content_hash([str(directory.resolve()), json.dumps(decides, sort_keys=True)])[:16],
        name=" ".join(name),
        group=place.group,
        job_type=place.job_type,
        tags=tuple(sorted({*methods, *place.presets})),
        directory=directory,
        config={
            **resolved,
            "method": " > ".join(methods),
            "configuration": configuration,
            "choices": dict(place.choices),
            "overrides": list(overrides),
            "dppo": __version__,
        },
    )
