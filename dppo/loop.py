"""The training loop, shared by SFT and every preference objective.

The optimiser batch is ``batch_size`` examples in an order fixed by seed and example ids, equal for all objectives and
layouts; the token budget only cuts it into micro-batches. Gradients of the summed loss are accumulated and divided
once by the weight of the whole optimiser batch over all ranks, so that neither packing nor accumulation nor the
number of processes changes the mean that is minimised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from dppo import sharding, stopping
from dppo.artifacts.files import hash_file, sync
from dppo.attention import Kernel
from dppo.batches import batches, collate, micro_batches
from dppo.config import TrainSettings
from dppo.errors import Pruned, is_out_of_memory
from dppo.logps import ResponseScorer
from dppo.losses.penalised import PenalisedLoss
from dppo.processes import broadcast, gather
from dppo.progress import Progress
from dppo.types import (
    Batch,
    EncodedExample,
    Json,
    LossContext,
    LossTerms,
    Objective,
    ResponseLogps,
    ResponseRewards,
    Role,
    StatisticsObjective,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

_log = logging.getLogger("dppo")

ReferenceLogps = Callable[[Sequence[tuple[str, str]]], Sequence[Tensor]]
"""Stored token log-probs, fp32, for (prompt_id, response_id) keys, in the order of the keys."""

Metrics = dict[str, float | int]

ScorerOf = Callable[["PreTrainedModel", Literal["packed", "padded"], Kernel], ResponseScorer]
"""Wraps a model for training in a layout, with what computes its attention."""


class Interrupted(Exception):
    """A signal asked for an end; a checkpoint was written after the step in progress."""

    def __init__(self, said: str, signum: int = signal.SIGINT) -> None:
        super().__init__(said, signum)
        self.said, self.signum = said, signum

    def __str__(self) -> str:
        return self.said


@dataclass
class Outcome:
    """How a training run ended; the model is changed in place."""

    status: Literal["complete", "diverged"]
    steps: int
    example_ids: tuple[str, ...] = ()  # of the batch that diverged
    best_step: int | None = None
    computed_tokens: int = 0
    notices: tuple[str, ...] = ()  # what the user was warned of

    def to_json(self) -> dict[str, Json]:
        return {**dataclasses.asdict(self), "example_ids": list(self.example_ids), "notices": list(self.notices)}


@dataclass(frozen=True)
class Interim:
    """What is measured at some steps of a run, and who may end it for that.

    ``percent_at`` maps optimiser steps to the percent of the run that is done then. ``measure`` gets the policy, in
    eval mode, in every process, and has a result in the main one; None where only held-out pairs are looked at.
    ``verdict`` is told every row with a percent, once each and in order, and gives the reason to end the run, or None.
    ``setup`` stands for what is measured, and on what: a stored row with another one tells this run nothing.
    """

    percent_at: Mapping[int, int]
    metric: Literal["win_rate", "accuracy"]
    measure: Callable[[ResponseScorer], Metrics] | None
    verdict: Callable[[Metrics], str | None]
    setup: int = 0

    def is_own(self, row: Metrics) -> bool:
        """Whether a stored row is one that this run would measure."""
        own = self.percent_at.get(int(row["step"]))
        return own is not None and row.get(PERCENT) == own and row.get(SETUP) == self.setup


PERCENT, INTERIM, SETUP = "interim/percent", "interim/value", "interim/setup"


@dataclass
class PenaltyWatch:
    """Notices, once each, a penalty that drowns the preference term: mean alpha f(r) > 5 over the first 20 steps.

    Or one that grows tenfold, to more than 1, between the first 20 steps and a later 20.
    """

    WINDOW: ClassVar[int] = 20
    HIGH: ClassVar[float] = 5.0
    GROWTH: ClassVar[float] = 10.0

    notices: tuple[str, ...] = ()
    first: float | None = None
    recent: tuple[float, ...] = ()
    grown: bool = False

    def see(self, sums: Accumulated) -> str | None:
        """The notice that this optimiser batch gives rise to."""
        parts = sums.distributions.get("weighted_penalty_strength")
        if parts is None:
            return None
        self.recent = (*self.recent, float(torch.cat(parts).mean()))[-self.WINDOW :]
        if len(self.recent) < self.WINDOW:
            return None
        mean = sum(self.recent) / self.WINDOW
        if self.first is None:
            self.first = mean
            if mean > self.HIGH:
                return f"mean alpha f(r) is {mean:.1f} over {self.WINDOW} steps: the penalty drowns the preference term"
        elif not self.grown and mean > max(1.0, self.GROWTH * self.first):
            self.grown = True
            return f"mean alpha f(r) grew from {self.first:.2g} to {mean:.2g}: the penalty takes over"
        return None


@dataclass
class _State:
    """What a checkpoint holds beside the model and the optimiser."""

    step: int = 0
    computed_tokens: int = 0
    statistics: Tensor | None = None
    best_loss: float = math.inf
    best_step: int | None = None
    saved_best: int | None = None  # the best step as the newest checkpoint has it
    start: Metrics = field(default_factory=dict)  # held-out log-probs before the first step
    watch: PenaltyWatch = field(default_factory=PenaltyWatch)


# --- how long, how fast --------------------------------------------------------------------------------------------


def n_steps(settings: TrainSettings, n_examples: int) -> int:
    """Optimiser steps of a run over ``n_examples``."""
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return settings.epochs * math.ceil(n_examples / settings.batch_size)


def learning_rate(settings: TrainSettings, step: int, steps: int) -> float:
    """The rate of optimiser step ``step`` (0-based) of ``steps``: linear warm-up, then the schedule down to 0."""
    warmup = math.ceil(round(settings.warmup_ratio * steps, 6))  # 0.07 * 100 is a little more than 7
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return settings.learning_rate * factor[settings.schedule]


# --- one optimiser batch -------------------------------------------------------------------------------------------


@dataclass
class Accumulated:
    """Sums over the micro-batches of one optimiser batch (or of an evaluation)."""

    value: float = 0.0
    weight: float = 0.0
    n_examples: int = 0
    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    distributions: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(
        self, terms: LossTerms, policy: ResponseLogps, reference: ResponseLogps | None, *, logged: bool = True
    ) -> None:
        """``logged``: with the columns that ``metrics`` shows."""
        self.value += float((terms.value.detach() * terms.weight).sum())
        self.weight += float(terms.weight.sum())
        self.n_examples += len(terms.value)
        for name, values in terms.distributions.items():
            self.distributions.setdefault(name, []).append(values.detach().double().cpu())
        if not logged:
            return
        columns = {**likelihoods(policy, reference), **terms.metrics}
        columns |= {f"rewards/{name}": reward for name, reward in terms.rewards.items()}
        if {"chosen", "rejected"} <= terms.rewards.keys():
            margin = terms.rewards["chosen"] - terms.rewards["rejected"]
            columns |= {"rewards/margins": margin, "rewards/accuracies": _share_positive(margin)}
        for name, values in columns.items():
            self.columns.setdefault(name, []).append(values.detach().double().cpu())

    def metrics(self) -> Metrics:
        """Means over the examples that have a value, and the 95th percentile of what is a distribution."""
        found: Metrics = {"loss": self.value / max(self.weight, 1e-30)}
        for name, parts in self.columns.items():
            if not math.isnan(mean := float(torch.cat(parts).nanmean())):
                found[name] = mean
        for name, parts in self.distributions.items():
            values = torch.cat(parts)
            found[f"{name}_mean"] = float(values.mean())
            found[f"{name}_p95"] = float(torch.quantile(values, 0.95))
        return found


def _share_positive(margin: Tensor) -> Tensor:
    """1 where positive, 1/2 at exactly 0, else 0; NaN stays."""
    return (torch.sign(margin) + 1) / 2


_LOGGED_ROLES: tuple[Role, ...] = ("chosen", "rejected", "generated", "ranked", "desirable", "undesirable")


def likelihoods(policy: ResponseLogps, reference: ResponseLogps | None) -> dict[str, Tensor]:
    """What is known of every loss's examples, each (M,): NaN where an example has no answer in a role.

    ``logps/<role>`` and ``log_ratio/<role>`` (over the reference) are sums over an answer's tokens, nats, with
    ``_per_token`` their means; several answers in a role are averaged. ``margin`` is chosen minus rejected,
    ``accuracy`` the share of positive margins, 1/2 at exactly 0; with ``_to_reference`` those of the log-ratios.
    Rewards are no likelihoods: of them there is nothing here.
    """
    if isinstance(policy, ResponseRewards):
        return {}
    columns: dict[str, Tensor] = {}
    logged = [role for role in _LOGGED_ROLES if role in policy.roles]
    for role in logged:
        kinds = {"logps": (policy.sum, policy.mean)}
        if reference is not None:
            kinds["log_ratio"] = (policy.sum - reference.sum, policy.mean - reference.mean)
        for kind, parts in kinds.items():
            for per, values in zip(("", "_per_token"), parts, strict=True):
                columns[f"{kind}/{role}{per}"] = policy.mean_by_example(values.detach(), (role,))
    if {"chosen", "rejected"} <= set(logged):
        for kind, compared in {"logps": "", "log_ratio": "_to_reference"}.items():
            for per in ("", "_per_token"):
                if f"{kind}/chosen" in columns:
                    margin = columns[f"{kind}/chosen{per}"] - columns[f"{kind}/rejected{per}"]
                    columns[f"margin{compared}{per}"] = margin
                    columns[f"accuracy{compared}{per}"] = _share_positive(margin)
    return columns


def stored_logps(lookup: ReferenceLogps, batch: Batch, like: ResponseLogps) -> ResponseLogps:
    """The reference's log-probs of a batch, from the store."""
    found = lookup(batch.response_keys)
    lengths = [len(row) for row in found]
    if lengths != like.lengths.tolist():
        raise ValueError("stored reference log-probs do not have the lengths of the batch's responses")
    tokens = torch.cat(list(found)).to(like.tokens.device, like.tokens.dtype)
    return ResponseLogps(tokens, like.lengths, like.example, like.roles, like.n_examples)


def mean_chosen_tokens(examples: Sequence[EncodedExample]) -> float:
    """Mean number of chosen tokens per example of an optimiser batch; 1 where no example has a chosen response."""
    lengths = [len(response.token_ids) for example in examples if (response := example.response("chosen"))]
    return sum(lengths) / len(lengths) if lengths else 1.0


def context_of(batch: Batch, mean_tokens: float, statistics: Tensor | None) -> LossContext:
    return LossContext(
        scores=batch.scores,
        shared_prefix=batch.shared_prefix,
        equal_to_chosen=batch.equal_to_chosen,
        mean_chosen_tokens=mean_tokens,
        statistics=statistics,
    )


# --- the loop --------------------------------------------------------------------------------------------------------


def scorer_for(
    model: PreTrainedModel, settings: TrainSettings, device: torch.device, scorer_of: ScorerOf = ResponseScorer
) -> ResponseScorer:
    """A model that computes, in layout, attention and compiled layers, as training with these settings does."""
    scorer = scorer_of(model, settings.packing, settings.kernel(device.type))
    if settings.compile:
        scorer.compile_layers()
    return scorer


def train(
    model: PreTrainedModel,
    objective: Objective,
    examples: Sequence[EncodedExample],
    settings: TrainSettings,
    *,
    seed: int,
    accelerator: Accelerator,
    log: Callable[[Metrics], None],
    checkpoints: Path,
    reference: ReferenceLogps | None = None,
    held_out: Sequence[EncodedExample] = (),
    interim: Interim | None = None,
    title: str = "train",
    scorer_of: ScorerOf = ResponseScorer,
) -> Outcome:
    """Minimise ``objective`` over ``examples``; changes ``model`` in place.

    ``scorer_of`` makes of the model what the objective looks at: log-probs, or rewards.
    ``log`` receives one flat mapping per logged step, with the 1-based ``step``. ``checkpoints`` is a directory of
    this run's own; a checkpoint found there is continued, see ``drop_damaged_checkpoints``. Raises ``Interrupted``
    after a signal that asks for an end, ``Pruned`` where ``interim`` says so; both leave a checkpoint.
    """
    torch.use_deterministic_algorithms(settings.deterministic)
    # Filling every new tensor before an operation writes its result there takes time and changes no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    set_dropout(model, settings.dropout)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    scorer = scorer_for(model, settings, accelerator.device, scorer_of)
    prepared = sharding.prepare(accelerator, scorer, settings)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimiser = torch.optim.AdamW(
        _decay_groups(parameters, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=accelerator.device.type in ("cpu", "cuda"),
    )
    state = _State()
    if objective.uses_statistics:
        assert isinstance(objective, StatisticsObjective)
        state.statistics = objective.initial_statistics()
    _restore(checkpoints, parameters, optimiser, state)
    if state.statistics is not None:
        state.statistics = state.statistics.to(accelerator.device)
    steps = n_steps(settings, len(examples))
    run = _Run(prepared, scorer.packing, objective, reference, accelerator, settings)
    main = accelerator.is_main_process
    if state.step == 0 and settings.evaluate_every and held_out:
        found = run.evaluate(held_out, state.statistics)
        state.start = {name: value for name, value in found.items() if name.startswith("logps/")}
        if main:
            log({"step": 0} | {f"eval/{name}": value for name, value in found.items()})
    with Progress(title, steps, "step", start=state.step) as progress, _stop_signal() as stopped:
        for number, batch in enumerate(batches(examples, settings.batch_size, steps, seed)):
            if number < state.step:
                continue  # done before the checkpoint
            started = time.perf_counter()
            rate = learning_rate(settings, number, steps)
            for group in optimiser.param_groups:
                group["lr"] = rate
            before = state.statistics
            draws = seed_of_draws(seed, number, accelerator.process_index)
            last = number + 1 == steps
            logged = (number + 1) % settings.log_every == 0 or number == 0 or last
            evaluates = bool(
                settings.evaluate_every and held_out and ((number + 1) % settings.evaluate_every == 0 or last)
            )
            try:
                sums, state.statistics, tokens, bad = run.accumulate(batch, before, draws, logged=logged)
            except (RuntimeError, MemoryError) as error:
                alone = not sharding.shards(settings)  # without the other processes nothing can be put together
                if main and alone and state.step and is_out_of_memory(error):
                    # Model and optimiser are as the step before left them.
                    optimiser.zero_grad(set_to_none=True)
                    with contextlib.suppress(RuntimeError, MemoryError, OSError):
                        _save(checkpoints, parameters, optimiser, state, accelerator)
                raise
            grad_norm, beside = math.nan, {}
            if not bad:
                if evaluates and settings.penalty_gradient_ratio and isinstance(objective, PenalisedLoss):
                    ratio = run.penalty_gradient_ratio(objective, batch, before, draws, parameters)
                    beside = {"train/penalty_gradient_ratio": ratio} if math.isfinite(ratio) else {}
                grad_norm = run.step(optimiser, parameters, sums.weight)
            if bad or not math.isfinite(grad_norm):
                ids = bad or tuple(item.example_id for item in batch)
                return Outcome("diverged", number, ids, state.best_step, state.computed_tokens, state.watch.notices)
            state.step = number + 1
            state.computed_tokens += tokens
            if (notice := state.watch.see(sums)) is not None:
                notice += run.remedy(batch, state.statistics)
                state.watch.notices += (notice,)
                if main:
                    progress.clear()
                    _log.warning("warning: %s step %d: %s", title, state.step, notice)
            if main and logged:
                elapsed = time.perf_counter() - started
                found = sums.metrics()
                log(
                    {"step": state.step}
                    | {f"train/{name}": value for name, value in found.items()}
                    | {
                        "train/learning_rate": rate,
                        "train/grad_norm": grad_norm,
                        "train/seconds_per_step": elapsed,
                        "train/tokens_per_second": tokens / elapsed,
                        "train/computed_tokens": state.computed_tokens,
                    }
                )
                progress.note(f"loss {found['loss']:.4f}")
            progress.advance()
            if evaluates:
                found = run.evaluate(held_out, state.statistics)
                change = {f"logps_change/{name[6:]}": found[name] - value for name, value in state.start.items()}
                if main:
                    evaluated = {f"eval/{name}": value for name, value in (found | change).items()}
                    log({"step": state.step} | beside | evaluated)
                if found["loss"] < state.best_loss:
                    state.best_loss, state.best_step = float(found["loss"]), state.step
                    if settings.save == "best":
                        best = sharding.whole_in_main(parameters, accelerator)
                        if main:
                            _save_best(checkpoints, best, state)
            pruned: str | None = None
            if interim is not None and state.step in interim.percent_at:
                row = run.interim(interim, scorer, held_out, state)
                if main:
                    log(row)
                    pruned = interim.verdict(row)
                (pruned,) = broadcast(accelerator, [pruned])
            due = settings.checkpoint_every is not None and state.step % settings.checkpoint_every == 0
            ending = run.any_rank(stopped.is_set())
            if pruned or ending or (due and not last):
                _save(checkpoints, parameters, optimiser, state, accelerator)
            if pruned:
                raise Pruned(pruned, state.step)
            if ending:
                said = f"{title} stopped after step {state.step} of {steps}; a checkpoint was written"
                raise Interrupted(said, stopped.signum or signal.SIGTERM)
    if settings.save == "best" and state.best_step is not None:
        accelerator.wait_for_everyone()
        _load_tensors(_best(checkpoints, state.best_step)[-1], parameters)
    sharding.undivide(prepared, accelerator)
    return Outcome("complete", state.step, (), state.best_step, state.computed_tokens, state.watch.notices)


@dataclass
class _Run:
    scorer: nn.Module
    packing: Literal["packed", "padded"]
    objective: Objective
    reference: ReferenceLogps | None
    accelerator: Accelerator
    settings: TrainSettings

    def _share(self, examples: Sequence[EncodedExample]) -> list[tuple[list[EncodedExample], float]]:
        """The micro-batches of this rank; every rank has equally many, the surplus ones count nothing."""
        parts = micro_batches(examples, self.settings.tokens_per_micro_batch)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = [(part, 1.0) for part in parts[rank::world]]
        missing = math.ceil(len(parts) / world) - len(mine)
        return mine + [(parts[0], 0.0)] * missing

    def _forward(
        self, part: Sequence[EncodedExample], mean_tokens: float, statistics: Tensor | None
    ) -> tuple[Batch, ResponseLogps, ResponseLogps | None, LossContext]:
        batch = collate(part).to(self.accelerator.device)
        with torch.autocast(batch.token_ids.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            policy = self.scorer(batch)
        reference = stored_logps(self.reference, batch, policy) if self.reference is not None else None
        return batch, policy, reference, context_of(batch, mean_tokens, statistics)

    def accumulate(
        self, examples: Sequence[EncodedExample], statistics: Tensor | None, draws: int, *, logged: bool = True
    ) -> tuple[Accumulated, Tensor | None, int, tuple[str, ...]]:
        """Gradients of the summed loss over one optimiser batch; ``draws`` seeds what dropout draws.

        Returns the sums, the new statistics, the tokens computed by all ranks, and the ids of the examples of the
        first micro-batch whose loss is not finite (empty if all are).
        """
        torch.manual_seed(draws)
        mean_tokens = mean_chosen_tokens(examples)
        scope = _scope(self.objective)
        if statistics is not None and scope == "optimiser_batch":
            assert isinstance(self.objective, StatisticsObjective)
            looked_at = set(self.objective.statistics_roles)
            with torch.no_grad():
                totals = [
                    self._partial_statistics(*self._forward(part, mean_tokens, statistics)[1:], counts)
                    for part, counts in self._share(_in_roles(examples, looked_at.__contains__))
                ]
            statistics = self._update_statistics(statistics, totals)
        parts = self._share(with_gradient(self.objective, examples))
        sums = Accumulated()
        tokens = 0
        bad: tuple[str, ...] = ()
        for number, (part, counts) in enumerate(parts):
            last = number == len(parts) - 1
            # Divided gradients are added up as such: on its own each process would need room for all of them.
            adds_up = last or sharding.shards(self.settings)
            with contextlib.nullcontext() if adds_up else self.accelerator.no_sync(self.scorer):
                batch, policy, reference, context = self._forward(part, mean_tokens, statistics)
                if statistics is not None and scope == "micro_batch":
                    # A copy, because log-probs remember their sums, here those without gradients.
                    detached = dataclasses.replace(policy, tokens=policy.tokens.detach())
                    totals = [self._partial_statistics(detached, reference, context, counts)]
                    statistics = self._update_statistics(statistics, totals)
                    context = dataclasses.replace(context, statistics=statistics)
                terms = self.objective(policy, reference, context)
                total = (terms.value * terms.weight).sum() * counts
                if not torch.isfinite(total):
                    bad = bad or batch.example_ids
                self.accelerator.backward(total)
            if counts:
                tokens += computed_tokens(batch, self.packing)
                sums.add(terms, policy, reference, logged=logged)
        return self._over_ranks(sums), statistics, int(self._total(float(tokens))), self._first_bad(bad)

    def _partial_statistics(
        self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext, counts: float
    ) -> Tensor:
        assert isinstance(self.objective, StatisticsObjective)
        return self.objective.partial_statistics(policy, reference, context) * counts

    def _update_statistics(self, statistics: Tensor, totals: Sequence[Tensor]) -> Tensor:
        """The state after micro-batches with these totals on this rank, and theirs on the others."""
        assert isinstance(self.objective, StatisticsObjective)
        whole = torch.stack(list(totals)).sum(0)
        if self.accelerator.num_processes > 1:
            whole = self.accelerator.reduce(whole, reduction="sum")
        return self.objective.update_statistics(statistics, whole)

    def penalty_gradient_ratio(
        self,
        objective: PenalisedLoss,
        examples: Sequence[EncodedExample],
        statistics: Tensor | None,
        draws: int,
        parameters: Mapping[str, nn.Parameter],
    ) -> float:
        """Norm of the penalty's gradient over that of the base's, on a batch whose whole gradients are there.

        ``statistics`` is the state before that batch, ``draws`` its seed. Gradients are left as they were found.
        """
        whole = {name: value.grad for name, value in parameters.items()}
        for value in parameters.values():
            value.grad = None
        base = dataclasses.replace(self, objective=dataclasses.replace(objective, alpha=0.0))
        base.accumulate(examples, statistics, draws, logged=False)
        squares = torch.zeros(2, dtype=torch.float64)
        for name, value in parameters.items():
            ours, own = whole[name], value.grad
            if ours is not None and own is not None:
                both = (ours - own).square().sum(), own.square().sum()
                squares += torch.stack([sharding.whole(one) for one in both]).double().cpu()
            value.grad = ours
        penalty_norm, base_norm = squares.sqrt().tolist()
        return penalty_norm / base_norm if base_norm > 0 else math.inf

    def step(self, optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], weight: float) -> float:
        """Divide the summed gradients by the batch's weight, clip, step. Returns the norm before clipping."""
        gradients = [value.grad for value in parameters.values() if value.grad is not None]
        # DDP and FSDP2 have averaged over ranks: times their number gives the sum again.
        torch._foreach_mul_(gradients, self.accelerator.num_processes / weight)
        norm = sharding.whole(torch.nn.utils.clip_grad_norm_(list(parameters.values()), self.settings.max_grad_norm))
        if torch.isfinite(norm):
            optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(norm)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[EncodedExample], statistics: Tensor | None) -> Metrics:
        """The objective and its metrics on held-out examples, statistics frozen."""
        sums = Accumulated()
        training = self.scorer.training
        self.scorer.eval()
        mean_tokens = mean_chosen_tokens(examples)
        for part, counts in self._share(with_gradient(self.objective, examples)):
            _, policy, reference, context = self._forward(part, mean_tokens, statistics)
            terms = self.objective(policy, reference, context)
            if counts:
                sums.add(terms, policy, reference)
        self.scorer.train(training)
        return self._over_ranks(sums).metrics()

    def interim(
        self, interim: Interim, scorer: ResponseScorer, held_out: Sequence[EncodedExample], state: _State
    ) -> Metrics:
        """What is measured after a step; only the main process's row holds what was decoded."""
        started = time.perf_counter()
        row: Metrics = {}
        if interim.measure is not None:
            training = scorer.training
            scorer.eval()
            with sharding.held_whole(self.scorer):
                row = {f"interim/{name}": value for name, value in interim.measure(scorer).items()}
            scorer.train(training)
        if interim.metric == "accuracy":
            row["interim/accuracy"] = self.evaluate(held_out, state.statistics)["accuracy"]
        return {
            "step": state.step,
            PERCENT: interim.percent_at[state.step],
            **({INTERIM: row[f"interim/{interim.metric}"]} if self.accelerator.is_main_process else {}),
            **row,
            SETUP: interim.setup,
            "interim/seconds": time.perf_counter() - started,
        }

    @torch.no_grad()
    def remedy(self, examples: Sequence[EncodedExample], statistics: Tensor | None) -> str:
        """What to type instead: a smaller alpha, or the per-token margin with alpha re-scaled to this batch."""
        advice = "; use a smaller alpha"
        if isinstance(self.objective, PenalisedLoss) and self.objective.margin == "sum":
            per_token = dataclasses.replace(self.objective, margin="mean")
            mean_tokens = mean_chosen_tokens(examples)
            own = other = 0.0
            for part, counts in self._share(examples):
                _, policy, reference, context = self._forward(part, mean_tokens, statistics)
                own += counts * float(self.objective.strength(policy, reference, context).sum())
                other += counts * float(per_token.strength(policy, reference, context).sum())
            own, other = self._total(own), self._total(other)
            advice += ", or loss.margin=mean"
            if own > 0 and other > 0:
                advice += f" with alpha times {own / other:.0f}"
        return advice

    def _total(self, value: float) -> float:
        if self.accelerator.num_processes == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(tensor, reduction="sum"))

    def any_rank(self, flag: bool) -> bool:
        return self._total(float(flag)) > 0

    def _over_ranks(self, sums: Accumulated) -> Accumulated:
        if self.accelerator.num_processes == 1:
            return sums
        whole = Accumulated()
        for part in gather(self.accelerator, sums):
            whole.value += part.value
            whole.weight += part.weight
            whole.n_examples += part.n_examples
            for name, values in part.columns.items():
                whole.columns.setdefault(name, []).extend(values)
            for name, values in part.distributions.items():
                whole.distributions.setdefault(name, []).extend(values)
        return whole

    def _first_bad(self, bad: tuple[str, ...]) -> tuple[str, ...]:
        return next((ids for ids in gather(self.accelerator, bad) if ids), ())


def _scope(objective: Objective) -> Literal["optimiser_batch", "micro_batch"] | None:
    return objective.statistics_scope if isinstance(objective, StatisticsObjective) else None


def with_gradient(objective: Objective, examples: Sequence[EncodedExample]) -> Sequence[EncodedExample]:
    """The examples without answers that only the statistics of the whole optimiser batch look at."""
    if _scope(objective) == "micro_batch":
        return examples
    return _in_roles(examples, lambda role: role != "mismatched")


def _in_roles(examples: Sequence[EncodedExample], keep: Callable[[Role], bool]) -> list[EncodedExample]:
    """The examples with only those responses whose role is kept."""
    return [
        example
        if all(keep(response.role) for response in example.responses)
        else dataclasses.replace(example, responses=tuple(one for one in example.responses if keep(one.role)))
        for example in examples
    ]


def computed_tokens(batch: Batch, packing: Literal["packed", "padded"]) -> int:
    """Tokens that the model's body computes for a batch, padding included."""
    if packing == "packed":
        return len(batch.token_ids)
    rows = batch.prompt_length[batch.example] + batch.lengths
    return int(rows.max()) * len(rows)


def seed_of_draws(seed: int, step: int, rank: int) -> int:
    """The seed of what one process draws in one optimiser step.

    As it follows from the step, a run that continues draws what it would have drawn, on any device and number of
    processes, and no generator's state has to be kept.
    """
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of a model, modules and functional ones; 0 makes train and eval mode the same function.

    Dropout of adapters is left alone: ``lora.dropout`` sets it.
    """
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = probability
        # Functional dropout reads an attribute of the layer: attention_dropout, hidden_dropout, dropout, ...
        for key, value in vars(module).items():
            if "dropout" in key and isinstance(value, float):
                setattr(module, key, probability)


def _decay_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """No decay on biases and norms: everything with fewer than two dimensions."""
    decayed = [value for value in parameters.values() if value.ndim >= 2]
    others = [value for value in parameters.values() if value.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


# --- stopping and checkpoints --------------------------------------------------------------------------------------


class _Flag:
    """The signal that came, if one did."""

    signum: int | None = None

    def is_set(self) -> bool:
        return self.signum is not None


@contextlib.contextmanager
def _stop_signal() -> Iterator[_Flag]:
    """The first signal that asks for an end sets a flag, so that a step is never cut in half; a second acts at once."""
    flag = _Flag()
    previous: dict[int, Any] = {}

    def on_signal(number: int, frame: Any) -> None:
        flag.signum = number
        stopping.restore(previous)

    previous = stopping.handlers(on_signal)
    try:
        yield flag
    finally:
        stopping.restore(previous)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write atomically: a reader finds the whole file or none. ``#`` in its name becomes its sha256; returns it."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob("*.partial-*"):
        leftover.unlink(missing_ok=True)  # of a process that died: this directory is of one run alone
    partial = path.with_suffix(f".partial-{os.getpid()}")
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial, dict(metadata))
        sync(partial)
        path = path.with_name(path.name.replace("#", hash_file(partial)))
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)
    return path


def _load_tensors(path: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    from safetensors.torch import load_file

    found = load_file(path)
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(sharding.divided(found[name], value))


def _saved(directory: Path) -> list[Path]:
    """The checkpoints of a run, the newest last; each is named by its step and its sha256."""
    return sorted(directory.glob("step-*.safetensors"))


def drop_damaged_checkpoints(directory: Path) -> None:
    """Delete checkpoints that are not as they were written, with a warning; an older one, or none, is continued then.

    Without the best weights so far every step is done again. For one process to call before ``train``.
    """
    best = [_is_sound(path) for path in _best(directory)]
    for path in reversed(_saved(directory)):
        if all(best) and _is_sound(path):
            return
        path.unlink(missing_ok=True)


def _is_sound(path: Path) -> bool:
    """Whether a file has the sha256 that it is named by; one that has not is deleted with a warning."""
    with contextlib.suppress(OSError):  # what cannot be read is damaged as well
        if hash_file(path) == path.stem.rpartition("-")[2]:
            return True
    _log.warning("warning: %s is damaged and deleted; its steps are done again", path)
    path.unlink(missing_ok=True)
    return False


def _best(directory: Path, step: int | None = None) -> list[Path]:
    """The weights of the lowest held-out losses, by step; with ``step`` those of that one."""
    return sorted(directory.glob(f"best-{'*' if step is None else f'{step:09d}'}-*.safetensors"))


def _save_best(directory: Path, parameters: Mapping[str, Tensor], state: _State) -> None:
    """Keep the weights of this step, and until the next checkpoint those that the last one counts on."""
    kept = [] if state.saved_best is None else _best(directory, state.saved_best)
    kept.append(_write_tensors(directory / f"best-{state.step:09d}-#.safetensors", parameters, {}))
    for path in _best(directory):
        if path not in kept:
            path.unlink(missing_ok=True)


def _save(
    directory: Path,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    state: _State,
    accelerator: Accelerator,
) -> None:
    """One file with model, optimiser and statistics; the previous one goes after it is complete.

    The main process writes it, whole, so that any number of processes can go on from it; all enter.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in parameters.items():
        tensors[f"parameter.{name}"] = value
        for key, part in optimiser.state.get(value, {}).items():
            tensors[f"{key}.{name}"] = part if isinstance(part, Tensor) else torch.tensor(part)
    tensors = sharding.whole_in_main(tensors, accelerator)
    if not accelerator.is_main_process:
        return
    if state.statistics is not None:
        tensors["statistics"] = state.statistics
    metadata = {
        "state": json.dumps(
            {
                "step": state.step,
                "computed_tokens": state.computed_tokens,
                "best_loss": state.best_loss if math.isfinite(state.best_loss) else None,
                "best_step": state.best_step,
                "start": state.start,
                "watch": dataclasses.asdict(state.watch),
            }
        )
    }
    older = _saved(directory)
    written = _write_tensors(directory / f"step-{state.step:09d}-#.safetensors", tensors, metadata)
    for path in older:
        if path != written:
            path.unlink(missing_ok=True)
    state.saved_best = state.best_step


def _restore(
    directory: Path, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer, state: _State
) -> None:
    """Continue from the newest checkpoint in ``directory``, if there is one."""
    from safetensors import safe_open

    paths = _saved(directory)
    if not paths:
        return
    with safe_open(paths[-1], framework="pt") as file:
        saved = json.loads(file.metadata()["state"])
        names = set(file.keys())
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(sharding.divided(file.get_tensor(f"parameter.{name}"), value))
                found = {
                    key: file.get_tensor(f"{key}.{name}")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in names
                }
                if found:
                    optimiser.state[value] = {
                        key: part.to(value.device) if key == "step" else sharding.divided(part, value)
                        for key, part in found.items()
                    }
        if "statistics" in names:
            state.statistics = file.get_tensor("statistics")
    state.step = saved["step"]
    state.computed_tokens = saved["computed_tokens"]
    state.best_loss = math.inf if saved["best_loss"] is None else saved["best_loss"]
    state.best_step = state.saved_best = saved["best_step"]
    state.start = saved["start"]
    watch = saved["watch"]
    state.watch = PenaltyWatch(tuple(watch["notices"]), watch["first"], tuple(watch["recent"]), watch["grown"])


def checkpoint_step(directory: Path) -> int:
    """The step of the checkpoint that ``train`` would continue from; 0 without one."""
    paths = _saved(directory)
    return int(paths[-1].stem.split("-")[1]) if paths else 0
