"""What a run would do, without doing it: which stages it would build, how much work that is, and how long it takes.

Every place in the cache is made by the functions that the stages use themselves. Times and sizes are measured ones, of
similar stages in the same cache; where nothing similar has run they stay unknown. With ``rates`` of a machine that is
elsewhere they are reckoned from weights and tokens instead.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from dppo import on_policy, pipeline, results
from dppo.artifacts import Damaged, Manifest, ReadOnly, Slot, Store, fingerprint, maintenance, short
from dppo.artifacts.layout import Entry, Layout
from dppo.cache import size
from dppo.command_line import aligned, duration
from dppo.config import Experiment, Phase, TrainSettings
from dppo.data.encoding import ChatEncoder
from dppo.data.on_policy import OnPolicy
from dppo.loop import checkpoint_step, n_steps
from dppo.losses.sft import SFT
from dppo.memory import size as held
from dppo.models import Model, architecture, n_parameters
from dppo.rates import Assumed, computed_tokens, mean
from dppo.rewards import Reward
from dppo.rewards.bradley_terry import BradleyTerry, TrainedReward
from dppo.stages.compare import compare_slot
from dppo.stages.drift import drift_slot, n_responses
from dppo.stages.finished import finished_slots
from dppo.stages.generate import answers_store, candidates_store, stored_answers, stored_candidates
from dppo.stages.preference import preference_slot
from dppo.stages.preflight import expected_peak
from dppo.stages.reference import reference_store, response_keys
from dppo.stages.reward_model import (
    accuracy_pairs,
    accuracy_slot,
    measured_splits,
    reward_model_examples,
    reward_model_slot,
)
from dppo.stages.scores import pair_key, score_key, scores_store
from dppo.stages.sft import sft_examples, sft_slot
from dppo.stages.training import CONTINUED
from dppo.stages.workbench import WORK, Workbench
from dppo.types import Artifact, EncodedExample, EncodedResponse, Generation, PreferenceExample, Prompt

if TYPE_CHECKING:
    from dppo.types import Json

T = TypeVar("T")

# An estimate is the median of at most so many measurements, the latest ones.
_LATEST = 5
# Run directories that are looked at for what growing stores took, the latest ones.
_RUNS = 500
_BYTES_PER_WEIGHT = 4
# Stages whose work is the steps of the training loop.
_TRAINED = ("sft", "reward_model", "preference")
# What decides the time of a training step, besides model, numerics, loss and data.
_COSTLY = ("max_length", "batch_size", "dropout", "deterministic", "evaluate_every", "n_evaluation_examples")


@dataclass(frozen=True)
class Step:
    """One stage of a run, in the order in which it comes.

    ``title`` is what a run prints, ``stage`` where it lies in the cache. ``fingerprint`` is None where it depends on
    answers that are not there yet. ``work`` counts what is left to do, in ``unit``s: texts that are not there yet
    count as one response each, although equal ones are scored once. ``seconds`` and ``bytes`` are None if nothing like
    it was ever measured; ``basis`` says what they come from.
    """

    title: str
    stage: str
    fingerprint: str | None
    action: Literal["reuse", "build", "extend"]
    work: int
    unit: str
    seconds: float | None
    bytes: int | None
    basis: str
    memory: int | None = None  # bytes at the peak of a training step, if it can be estimated
    device_seconds: float = 0.0  # of all devices; 0 where times are measured ones


@dataclass(frozen=True)
class Plan:
    """The stages of one run; ``makes`` names what it would add to the cache, for ``also_built`` of the next plan."""

    steps: tuple[Step, ...]
    makes: frozenset[str]

    @property
    def todo(self) -> list[Step]:
        return [step for step in self.steps if step.action != "reuse"]

    @property
    def seconds(self) -> float:
        """The sum of the times that are known; starting Python and loading data come on top."""
        return sum(step.seconds or 0.0 for step in self.steps)

    @property
    def device_seconds(self) -> float:
        """Those of all devices, where rates were given."""
        return sum(step.device_seconds for step in self.steps)

    @property
    def bytes(self) -> int:
        """The sum of the sizes that are known."""
        return sum(step.bytes or 0 for step in self.steps)

    @property
    def without_time(self) -> list[str]:
        """Titles of the stages whose time is not known, each once."""
        return list(dict.fromkeys(step.title for step in self.steps if step.seconds is None))

    @property
    def without_size(self) -> list[str]:
        """Titles of the stages whose size is not known, each once."""
        return list(dict.fromkeys(step.title for step in self.steps if step.bytes is None))


def plan(experiment: Experiment, *, also_built: Collection[str] = ()) -> Plan:
    """What a run of ``experiment`` would build and reuse; loads no weights and changes nothing in the cache.

    ``also_built`` are the ``makes`` of plans whose runs come before this one. Raises UserError where the run would,
    as far as that can be known without running.
    """
    results.check_objectives(experiment.objectives)
    bench = pipeline._workbench(experiment)
    bench.cache = ReadOnly(bench.cache.root, bench.cache.verify)
    training = pipeline._training_rows(experiment)
    encoder = pipeline.chat_encoder(experiment, bench.cache)
    prompts = pipeline._evaluation_prompts(experiment)
    experiment.reward.check(prompts)
    experiment.generation.check(bench.device)
    planner = _Planner(experiment, bench, encoder, frozenset(also_built))
    _add_stages(planner, training, prompts)
    return Plan(tuple(planner.steps), frozenset(planner.makes))


def lines(found: Plan) -> list[str]:
    """A plan as a table with totals, and what is not known."""
    basis = "reckoned with" if found.device_seconds else "measured on"
    rows = [("stage", "id", "", "work", "time", "memory", "disk", basis)]
    for step in found.steps:
        todo = step.action != "reuse"
        rows.append(
            (
                step.title,
                short(step.fingerprint) if step.fingerprint else "?",
                step.action,
                f"{step.work:,} {step.unit}{'s' if step.work != 1 else ''}" if todo else "-",
                "-" if not todo else "?" if step.seconds is None else duration(step.seconds),
                "-" if step.memory is None else held(step.memory),
                "-" if not todo else "?" if step.bytes is None else size(step.bytes),
                step.basis,
            )
        )
    told = aligned(rows)
    if not found.todo:
        return [*told, "dry run: everything is in the cache, a run would build nothing"]
    told.append(
        f"dry run: {len(found.todo)} of {len(found.steps)} stages to build or extend, "
        f"{_total(duration(found.seconds), found.seconds > 0, found.without_time)} of time, "
        f"{_total(size(found.bytes), found.bytes > 0, found.without_size)} of disk" + device_hours(found.device_seconds)
    )
    for what, titles in (("time", found.without_time), ("size", found.without_size)):
        if titles:
            told.append(f"no {what} known for {', '.join(titles)}: nothing like it has run with this cache")
    return told


def device_hours(seconds: float) -> str:
    """The end of a line of totals; empty where no rates were given."""
    return f", {seconds / 3600:,.1f} device-hours" if seconds else ""


def _total(text: str, any_known: bool, unknown: Sequence[str]) -> str:
    if not unknown:
        return f"about {text}"
    return f"at least {text}" if any_known else "an unknown amount"


# --- the stages of a run, as in the pipeline -------------------------------------------------------------------------


@dataclass
class _Planner:
    """Collects the steps of one run; ``makes`` are fingerprints of artifacts and ``fingerprint:key`` of rows."""

    experiment: Experiment
    bench: Workbench
    encoder: ChatEncoder
    before: frozenset[str]
    steps: list[Step] = field(default_factory=list)
    makes: set[str] = field(default_factory=set)
    model: Json = None  # the identity of the model that all others in this run come from
    tokens_per_example: float = 0.0  # mean, of the latest phase

    @functools.cached_property
    def past(self) -> _Past:
        return _Past(self.bench.cache)

    @property
    def rates(self) -> Assumed | None:
        return self.experiment.rates if isinstance(self.experiment.rates, Assumed) else None

    @functools.cached_property
    def n_weights(self) -> int | None:
        """None where it is not known without the weights, as of GGUF that was not converted yet."""
        return n_parameters(self.experiment.model)

    def artifact(
        self,
        title: str,
        slot: Slot,
        work: int,
        unit: str,
        *,
        guessed: bool = False,
        memory: Callable[[], int | None] = lambda: None,
        reckon: Callable[[Assumed, int, int], float] = lambda rates, n_weights, n_units: 0.0,
    ) -> None:
        """Plan an artifact; ``guessed``: its fingerprint stands for one that is not known yet.

        ``memory`` estimates the peak of what is built, in bytes; ``reckon`` the seconds of so many units of its work by
        the rates of a machine and the model's number of weights.
        """
        known = None if guessed else slot.fingerprint
        if (not guessed and slot.complete()) or self._made(slot.fingerprint):
            self._reuse(title, slot, known, unit)
            return
        self.makes.add(slot.fingerprint)
        done = checkpoint_step(slot.work)
        kind, scale = _kind(slot.stage, slot.stage, slot.inputs, self.model)
        seconds, basis, device_seconds = self._seconds(kind, (work - done) * scale, self._reckoned(reckon, work - done))
        parts = [f"continues after step {done}"] if done else []
        parts += [basis] if basis else []
        found = self.past.size(kind)
        if found is None and self.rates is not None and slot.stage not in _TRAINED:
            found = self.rates.score_bytes(work)
        if found is None and slot.stage in _TRAINED and not _lora(slot.inputs):
            found = _model_bytes(self.experiment.model)
            parts += ["disk: the weights alone"] if found is not None else []
        size_ = None if found is None else round(found)
        told = "; ".join(parts)
        self.steps.append(
            Step(title, slot.stage, known, "build", work - done, unit, seconds, size_, told, memory(), device_seconds)
        )

    def _reckoned(self, reckon: Callable[[Assumed, int, int], T], n_units: int) -> T | None:
        """What rates make of so many units; None without rates, or where the number of weights is not known."""
        return None if self.rates is None or self.n_weights is None else reckon(self.rates, self.n_weights, n_units)

    def _seconds(self, kind: _Kind, work: float, reckoned: float | None) -> tuple[float | None, str, float]:
        """(estimate, what it is based on, the seconds of all devices if they are counted)."""
        rates = self.rates
        if rates is None:
            return *self.past.seconds(kind, work), 0.0
        if reckoned is None:
            return None, "the number of weights is not known", 0.0
        if kind.stage == "scores":
            basis = f"{rates.responses_per_second:g} responses/s, {rates.reward_devices} devices of the reward's own"
            return reckoned, basis, reckoned * (rates.n_devices + rates.reward_devices)
        return reckoned, str(rates), reckoned * rates.n_devices

    def store(
        self,
        title: str,
        store: Store[Any],
        keys: Sequence[str],
        unit: str,
        *,
        reckon: Callable[[Assumed, int, int], tuple[float, float]],
    ) -> None:
        """Plan the rows ``keys`` of a store; ``reckon`` gives seconds and bytes of so many rows, as for artifacts."""
        missing = [f"{store.fingerprint}:{key}" for key in store.missing(keys)]
        missing = [row for row in missing if not self._made(row)]
        if not missing:
            self._reuse(title, store, store.fingerprint, unit)
            return
        self.makes.update(missing)
        kind, _ = _kind(store.stage, title, store.inputs, self.model)
        own_seconds, own_bytes = self._reckoned(reckon, len(missing)) or (None, None)
        seconds, basis, device_seconds = self._seconds(kind, len(missing), own_seconds)
        found = self.past.size(kind)
        size_ = None if found is None else round(found * len(missing))
        if own_bytes is not None:
            size_ = round(own_bytes)
        self.steps.append(
            Step(
                title,
                store.stage,
                store.fingerprint,
                "extend" if store.n_rows() else "build",
                len(missing),
                unit,
                seconds,
                size_,
                basis,
                device_seconds=device_seconds,
            )
        )

    def _made(self, what: str) -> bool:
        return what in self.before or what in self.makes

    def _reuse(self, title: str, entry: Entry, known: str | None, unit: str) -> None:
        self.steps.append(Step(title, entry.stage, known, "reuse", 0, unit, 0.0, 0, ""))


def _add_stages(
    planner: _Planner, training: Mapping[Any, Sequence[PreferenceExample]], prompts: Sequence[Prompt]
) -> None:
    reference, policy = _add_start(planner)
    _add_reward_model(planner, reference)
    experiment, bench, encoder = planner.experiment, planner.bench, planner.encoder
    made_from: list[str] = []
    schedule = pipeline.schedule(experiment)
    for number, name, phase in schedule:
        if isinstance(experiment.dataset, OnPolicy) and phase is next(iter(experiment.phases.values())):
            training, made_from = _add_candidates(planner, experiment.dataset, policy)
        base = reference if phase.reference == "sft" else policy
        last = (number, name, phase) == schedule[-1]
        rows = pipeline.rows_of_phase(experiment, phase, training)
        slot = _add_phase(planner, phase, rows, made_from, policy, base, last=last)
        if slot.complete() and _outcome(slot.manifest()).get("status") == "diverged":
            planner.steps[-1] = dataclasses.replace(planner.steps[-1], basis="diverged: the run would end here")
            return
        policy = slot.fingerprint

    decoding = pipeline.answers_decoding(experiment)
    own = answers_store(bench, policy, decoding, encoder)
    other = answers_store(bench, reference, decoding, encoder)
    scored = _add_rewards(planner, {"answers": own, "baseline": other}, prompts)
    train, kl_prompts, pairs = pipeline.drift_data(experiment, prompts, encoder)
    there = _there(own, [prompt.prompt_id for prompt in kl_prompts])
    if guessed := len(there) < len(kl_prompts):
        ids = [prompt.prompt_id for prompt in kl_prompts]
    else:
        ids = [example.example_id for example in encoder.answers(kl_prompts, there)]
    sampled = pipeline.own_distribution(experiment)
    slot = drift_slot(bench, policy, reference, ids, pairs, train, own_distribution=sampled)
    planner.artifact(
        "drift",
        slot,
        n_responses(len(ids), pairs),
        "response",
        guessed=guessed,
        reckon=_scoring(2 * planner.tokens_per_example),  # by both models
    )
    parents = [own.fingerprint, other.fingerprint, scored.fingerprint]
    planner.artifact("compare", compare_slot(bench, prompts, parents, experiment.evaluation), len(prompts), "prompt")


def _add_start(planner: _Planner) -> tuple[str, str]:
    """The models that the run begins with: (reference, policy)."""
    experiment, bench, encoder = planner.experiment, planner.bench, planner.encoder
    if experiment.init_from is not None:
        found, policy = finished_slots(bench, experiment.init_from, encoder)
        planner.model = planner.past.model_of(found.manifest())
        planner.artifact(found.stage, found, 0, "step")
        planner.artifact("policy", policy, 0, "step")
        return found.fingerprint, policy.fingerprint
    train = experiment.sft.train
    slot = sft_slot(bench, experiment.model, experiment.dataset, experiment.sft, encoder)
    planner.model = cast("Mapping[str, Json]", slot.inputs)["model"]
    if train is None:
        planner.artifact("sft", slot, 1, "model")
        return slot.fingerprint, slot.fingerprint
    examples: Sequence[EncodedExample] = ()
    if not slot.complete() and slot.fingerprint not in planner.before:
        examples = sft_examples(experiment.dataset, train, experiment.sft.seed, encoder).examples

    def memory() -> int | None:
        return expected_peak(
            architecture(experiment.model), examples, train, SFT(), seed=experiment.sft.seed, evaluates=False
        )

    planner.artifact(
        "sft", slot, n_steps(train, len(examples)), "step", memory=memory, reckon=_training(train, examples)
    )
    return slot.fingerprint, slot.fingerprint


def _add_reward_model(planner: _Planner, reference: str) -> None:
    """A reward that the run trains; what comes behind it scores with the trained one."""
    experiment, bench, encoder = planner.experiment, planner.bench, planner.encoder
    settings, dataset = experiment.reward, experiment.dataset
    if not isinstance(settings, BradleyTerry):
        return
    slot = reward_model_slot(bench, settings, experiment.model, dataset, reference, encoder)
    examples: Sequence[EncodedExample] = ()
    # Only then their number or their lengths have a say.
    if not slot.complete() and (settings.train.steps is None or planner.rates is not None):
        examples = reward_model_examples(settings, dataset, encoder).examples
    n_examples = len(examples)
    planner.artifact(
        "reward", slot, n_steps(settings.train, n_examples), "step", reckon=_training(settings.train, examples)
    )
    made = Artifact(slot.stage, slot.fingerprint, str(slot.path), (), reused=slot.complete())
    reward = TrainedReward(settings, made, encoder)
    slot = accuracy_slot(bench, reward, dataset, experiment.evaluation)
    splits = measured_splits(experiment.evaluation.split)
    n_pairs = 0 if slot.complete() else sum(len(accuracy_pairs(reward, dataset, split)) for split in splits)
    each = mean(one.n_tokens for one in examples) / 2
    planner.artifact("accuracy", slot, 2 * n_pairs, "response", reckon=_scoring(each))
    planner.experiment = dataclasses.replace(experiment, reward=reward)


def _add_candidates(
    planner: _Planner, dataset: OnPolicy, model: str
) -> tuple[Mapping[Any, Sequence[PreferenceExample]], list[str]]:
    """The answers of a round and their ranking: (what the phases train on, the stores that it comes from).

    A prompt whose answers or scores are not there yet stands there with answers that nobody gave, so that it counts.
    """
    experiment, bench, encoder = planner.experiment, planner.bench, planner.encoder
    prompts = on_policy.answerable(pipeline.prompts_to_answer(experiment), dataset, encoder)
    store = candidates_store(bench, model, dataset.answers, encoder)
    keys = [prompt.prompt_id for prompt in prompts]
    planner.store("candidates", store, keys, "prompt", reckon=_decoding(dataset.answers.n_answers))
    missing = set(store.missing(keys))
    made = stored_candidates(store, [key for key in keys if key not in missing])
    mixed = dataset.own_answers("train") if dataset.mix_in else {}
    blanks = {}
    for key in keys:
        n_others = len(mixed.get(key, ()))
        n_blanks = max(2 - n_others, dataset.answers.n_answers)  # one answer alone is mixed with others
        blanks[key] = [_unknown(store, f"{key}:{number}") for number in range(n_blanks)] + list(mixed.get(key, ()))
    texts = {**blanks, **on_policy.different(dataset, made)}

    reward = pipeline.ranker(experiment)
    ranking = scores_store(bench, reward)
    names = on_policy.ranking_keys(reward, prompts, texts)
    unit = "response" if isinstance(reward, Reward) else "pair"
    planner.store("scores", ranking, [name for key in keys for name in names[key]], unit, reckon=_rewards)
    unranked = set(ranking.missing([name for key in keys for name in names[key]]))
    known = [key for key in keys if key not in missing and not unranked & set(names[key])]
    scores = {key: [float(place) for place, _ in enumerate(blank)] for key, blank in blanks.items()}
    scores |= on_policy.stored_scores(reward, ranking, {key: names[key] for key in known}, texts)
    texts |= {key: blanks[key] for key in set(keys).difference(known)}
    rows, _ = on_policy.examples(prompts, texts, scores)
    return rows, [store.fingerprint, ranking.fingerprint]


def _add_phase(
    planner: _Planner,
    phase: Phase,
    training: Sequence[PreferenceExample],
    made_from: Sequence[str],
    start: str,
    base: str,
    *,
    last: bool,
) -> Slot:
    """One preference phase; returns the place of its policy."""
    experiment, bench, encoder = planner.experiment, planner.bench, planner.encoder
    data = pipeline.phase_data(experiment, bench, phase, training, encoder)
    examples: tuple[EncodedExample, ...] = (*data.examples, *data.held_out)
    parents, unknown = list(made_from), []
    if "generated" in phase.loss.uses_roles:
        store = answers_store(bench, base, experiment.generation, encoder)
        keys = [prompt.prompt_id for prompt in data.prompts]
        planner.store("y_gen", store, keys, "answer", reckon=_decoding(1))
        parents.append(store.fingerprint)
        there = _there(store, keys)
        unknown = [_unknown(store, key) for key in keys if key not in there]
        answered = [example for example in examples if example.prompt_id in there]
        rest = [example for example in examples if example.prompt_id not in there]
        examples = (*encoder.add_generated(answered, there, data.max_length), *rest)
    if phase.loss.uses_reference:
        logps = reference_store(bench, base, phase.train)
        asked = [*response_keys(examples), *unknown]
        n_tokens = sum(_computed(planner, phase, one) for one in examples)
        planner.store("reference", logps, asked, "response", reckon=_scoring_rows(n_tokens / max(1, len(asked))))
        parents.append(logps.fingerprint)
    steps = n_steps(phase.train, len(data.examples))
    curve: Json = None
    if last:
        curve = pipeline.curve_identity(experiment)
        _, prompts = pipeline.interim_data(experiment, steps, data.held_out)
        if prompts:
            baseline = answers_store(bench, base, pipeline.interim_decoding(experiment), encoder)
            _add_rewards(planner, {"baseline": baseline}, prompts)
    data_identity = pipeline.training_data(experiment)
    slot = preference_slot(bench, phase, start, parents, data=data_identity, seed=experiment.seed, curve=curve)

    def memory() -> int | None:
        # An answer that is not there yet is as long as it may become.
        own = {one.example_id for one in data.examples}
        longest = EncodedResponse("", "generated", (0,) * experiment.generation.max_new_tokens)
        trained = [
            dataclasses.replace(one, responses=(*one.responses, longest))
            if "generated" in phase.loss.uses_roles and one.response("generated") is None
            else one
            for one in examples
            if one.example_id in own
        ]
        return expected_peak(
            architecture(experiment.model),
            trained,
            phase.train,
            phase.loss,
            seed=experiment.seed,
            evaluates=bool(data.held_out),
        )

    planner.tokens_per_example = mean(_computed(planner, phase, one) for one in data.examples)
    planner.artifact(
        "preference",
        slot,
        steps,
        "step",
        memory=memory,
        reckon=_steps(phase.train, planner.tokens_per_example),
    )
    return slot


def _add_rewards(planner: _Planner, stores: Mapping[str, Store[Json]], prompts: Sequence[Prompt]) -> Store[Json]:
    """Answers of models to ``prompts``, their stores by title, and the rewards of all; returns the rewards' store."""
    keys, texts = [prompt.prompt_id for prompt in prompts], []
    known = []
    for title, store in stores.items():
        planner.store(title, store, keys, "answer", reckon=_decoding(1))
        known.append((store, _there(store, keys)))
    reward = planner.experiment.reward
    scored = scores_store(planner.bench, reward)
    if isinstance(reward, Reward):
        for store, there in known:
            for prompt in prompts:
                answer = there.get(prompt.prompt_id)
                texts.append(_unknown(store, prompt.prompt_id) if answer is None else score_key(prompt, answer.text))
        planner.store("scores", scored, texts, "response", reckon=_rewards)
    elif len(known) == 2:  # a pairwise reward has nothing to say about one model alone
        planner.store("scores", scored, _pair_keys(known[0], known[1], prompts), "pair", reckon=_rewards)
    return scored


def _pair_keys(
    own: tuple[Store[Json], dict[str, Generation]],
    other: tuple[Store[Json], dict[str, Generation]],
    prompts: Sequence[Prompt],
) -> list[str]:
    """The keys of the pairs that are to be compared; equal answers, such as those of one model, are not."""
    if own[0].fingerprint == other[0].fingerprint:
        return []
    keys = []
    for prompt in prompts:
        one, two = own[1].get(prompt.prompt_id), other[1].get(prompt.prompt_id)
        if one is None or two is None:
            keys.append(f"{_unknown(own[0], prompt.prompt_id)}:{other[0].fingerprint}")
        elif (key := pair_key(prompt, one.text, two.text)) is not None:
            keys.append(key)
    return keys


def _there(store: Store[Json], keys: Sequence[str]) -> dict[str, Generation]:
    """The answers among ``keys`` that the store has."""
    missing = set(store.missing(keys))
    return stored_answers(store, [key for key in keys if key not in missing])


def _unknown(store: Store[Json], prompt_id: str) -> str:
    """Stands for the key of an answer that is not there yet; no real key has a question mark."""
    return f"?{store.fingerprint}:{prompt_id}"


def _model_bytes(model: Model) -> int | None:
    weights = n_parameters(model)
    return None if weights is None else weights * _BYTES_PER_WEIGHT


# --- what a machine that is elsewhere would take ---------------------------------------------------------------------


def _computed(planner: _Planner, phase: Phase, example: EncodedExample) -> int:
    """Tokens of an example in a forward pass of a phase, with those of an answer that is not there yet."""
    lacks = "generated" in phase.loss.uses_roles and example.response("generated") is None
    unwritten = planner.rates.tokens_per_answer if planner.rates is not None and lacks else 0
    return computed_tokens(example, packed=phase.train.packing == "packed", unwritten=unwritten)


def _training(train: TrainSettings, examples: Sequence[EncodedExample]) -> Callable[[Assumed, int, int], float]:
    packed = train.packing == "packed"
    return _steps(train, mean(computed_tokens(one, packed=packed) for one in examples))


def _steps(train: TrainSettings, tokens_per_example: float) -> Callable[[Assumed, int, int], float]:
    """Optimiser steps, with their evaluations."""

    def reckon(rates: Assumed, n_weights: int, n_steps_: int) -> float:
        tokens = n_steps_ * train.batch_size * tokens_per_example
        n_evaluations = 1 + n_steps_ // train.evaluate_every if train.evaluate_every else 0
        looked_at = n_evaluations * train.n_evaluation_examples * tokens_per_example
        spent = rates.training(
            n_weights, tokens, adapters=train.lora is not None, checkpointing=train.activation_checkpointing
        )
        return spent + rates.scoring(n_weights, looked_at)

    return reckon


def _scoring(tokens_each: float) -> Callable[[Assumed, int, int], float]:
    return lambda rates, n_weights, n_units: rates.scoring(n_weights, n_units * tokens_each)


def _scoring_rows(tokens_each: float) -> Callable[[Assumed, int, int], tuple[float, float]]:
    """Log-probs that are kept; the tokens of prompts are computed with them, and counted as if they were kept."""
    return lambda rates, n_weights, n_rows: (
        rates.scoring(n_weights, n_rows * tokens_each),
        rates.logp_bytes(n_rows, n_rows * tokens_each),
    )


def _decoding(n_answers_each: int) -> Callable[[Assumed, int, int], tuple[float, float]]:
    return lambda rates, n_weights, n_rows: (
        rates.decoding(n_weights, n_rows * n_answers_each),
        rates.answer_bytes(n_rows * n_answers_each),
    )


def _rewards(rates: Assumed, n_weights: int, n_rows: int) -> tuple[float, float]:
    return rates.rewards(n_rows), rates.score_bytes(n_rows)


# --- what earlier runs took ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """What a measurement is a measurement of; hashes, to be compared.

    ``subject`` must agree for it to say anything: the model with its numerics and adapters, for scores the reward. The
    nearer in ``settings`` and ``title`` the better.
    """

    stage: str
    title: str
    subject: str | None  # None: not known any more
    settings: str


def _kind(stage: str, title: str, inputs: Json, model: Json) -> tuple[_Kind, float]:
    """The kind of a stage, and by how much one unit of its work counts, so that other batch sizes compare."""
    content = cast("Mapping[str, Any]", inputs)
    subject: str | None
    settings: Json = None
    scale = 1.0
    if stage == "scores":
        subject = fingerprint(content["reward"])
    elif stage == "compare":
        subject, scale = "", float(content["n_bootstrap"])
    else:
        numerics = {key: value for key, value in (content.get("numerics") or {}).items() if key != "torch"}
        settings = content.get("decoding")
        engine = (content.get("decoding") or {}).get("engine")
        subject = None if model is None else fingerprint([model, numerics, _lora(inputs), engine])
    if stage in _TRAINED and (train := content["settings"]) is not None:
        scale = float(train["batch_size"])
        settings = {
            "loss": _without_numbers(content.get("loss")),
            "data": content["data"],
            "train": {key: train[key] for key in _COSTLY},
        }
    return _Kind(stage, title, subject, fingerprint(settings)), scale


def _lora(inputs: Json) -> Json:
    settings = cast("Mapping[str, Any]", inputs).get("settings")
    return None if settings is None else cast("Json", settings["lora"])


def _without_numbers(value: Json) -> Json:
    """A loss without its strengths and temperatures, which cost nothing."""
    if isinstance(value, Mapping):
        return {key: _without_numbers(item) for key, item in value.items() if not isinstance(item, float)}
    return value


@dataclass(frozen=True)
class _Took:
    """The seconds that a finished stage took before its first unit of work, and for each.

    ``tokens_per_second`` is what a model wrote, None where none did.
    """

    before: float
    each: float
    tokens_per_second: float | None = None


@dataclass
class _Past:
    """Measurements of finished stages, oldest first: seconds, and bytes per artifact or row."""

    layout: Layout
    times: list[tuple[_Kind, _Took]] = field(default_factory=list)
    sizes: list[tuple[_Kind, float]] = field(default_factory=list)
    manifests: dict[str, Manifest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        items = [item for item in maintenance.contents(self.layout) if item.kind not in ("unfinished", "damaged")]
        for item in items:
            with suppress(Damaged):  # removed or altered since
                self.manifests[item.fingerprint] = Manifest.read(item.path)
        items = [item for item in items if item.fingerprint in self.manifests]
        for item in sorted(items, key=lambda item: self.manifests[item.fingerprint].created):
            manifest = self.manifests[item.fingerprint]
            kind, scale = _kind(item.stage, item.stage, manifest.inputs, self.model_of(manifest))
            if item.rows is None:
                self.sizes.append((kind, item.bytes))
                if work := _work(manifest):
                    self.times.append((kind, _Took(0.0, manifest.timings["total"] / (work * scale))))
            elif item.rows:
                self.sizes.append((kind, item.bytes / item.rows))
        for record in _records(self.layout):
            manifest_ = self.manifests.get(record["fingerprint"])
            if manifest_ is not None and record.get("rows"):
                kind, _ = _kind(manifest_.stage, record["stage"], manifest_.inputs, self.model_of(manifest_))
                pace = record.get("tokens_per_second")
                # Loading a model or starting an engine takes as long for one answer as for all.
                busy = record["tokens"] / pace if pace else record["seconds"]
                self.times.append((kind, _Took(record["seconds"] - busy, busy / record["rows"], pace)))

    def model_of(self, manifest: Manifest) -> Json:
        """The identity of the model that something was made with; None if the cache has lost it."""
        found: Manifest | None = manifest
        while found is not None and found.stage != "sft":
            found = self.manifests.get(found.parents[0]) if found.parents else None
        return None if found is None else cast("Mapping[str, Json]", found.inputs)["model"]

    def seconds(self, kind: _Kind, work: float) -> tuple[float | None, str]:
        """(estimate, what it is based on); (None, "") without a measurement of anything like it."""
        found, exact = _nearest(self.times, kind)
        if not found:
            return None, ""
        runs = f"{len(found)} earlier run{'s' if len(found) != 1 else ''}"
        of = {"scores": " of this reward", "compare": ""}.get(kind.stage, " of this model")
        paces = [one.tokens_per_second for one in found if one.tokens_per_second]
        pace = f", {median(paces):,.0f} tokens/s" if paces else ""
        seconds = median(one.before + one.each * work for one in found)
        return seconds, f"{runs}{of}{'' if exact else ' with other settings'}{pace}"

    def size(self, kind: _Kind) -> float | None:
        sizes, _ = _nearest(self.sizes, kind)
        return median(sizes) if sizes else None


def _nearest(past: Sequence[tuple[_Kind, T]], kind: _Kind) -> tuple[list[T], bool]:
    """The latest measurements of the nearest kind, and whether their settings are the same."""
    same = [(one, value) for one, value in past if (one.stage, one.subject) == (kind.stage, kind.subject)]
    if kind.subject is None or not same:
        return [], False
    alike = [(one, value) for one, value in same if one.settings == kind.settings]
    titled = [(one, value) for one, value in alike if one.title == kind.title]
    return [value for _, value in (titled or alike or same)[-_LATEST:]], bool(alike)


def _work(manifest: Manifest) -> int:
    """The units of work that the seconds of an artifact were spent on; 0 if it does not say."""
    extra = cast("Mapping[str, Any]", manifest.extra)
    if manifest.stage in _TRAINED:
        if cast("Mapping[str, Any]", manifest.inputs)["settings"] is None:
            return 1
        return int(_outcome(manifest).get("steps", 0)) - int(extra.get(CONTINUED, 0))
    return int(extra.get(WORK, 0))


def _outcome(manifest: Manifest) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", manifest.extra.get("outcome") or {})


def _records(layout: Layout) -> Iterator[Mapping[str, Any]]:
    """What the latest runs that used the cache noted about their stages, oldest first."""
    found = []
    for note in (layout.root / ".runs").glob("*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            path = Path(json.loads(note.read_bytes())["run"]) / "result.json"
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found)[-_RUNS:]:
        with suppress(OSError, ValueError, KeyError, TypeError):
            yield from json.loads(path.read_bytes())["timings"]["stages"]
