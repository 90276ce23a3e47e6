"""Whether a stage's steps fit into memory, found out before a weight is loaded: the token budget, or why nothing fits.

Smaller micro-batches change no result but rounding, so the budget is lowered without being asked, and said.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dppo import sharding
from dppo.batches import batches
from dppo.config import TrainSettings
from dppo.errors import UserError, is_out_of_memory
from dppo.logps import ResponseScorer
from dppo.loop import ScorerOf, n_steps, with_gradient
from dppo.losses.penalised import PenalisedLoss
from dppo.memory import Fit, Meter, Peak, Step, fit, room, size
from dppo.processes import gather
from dppo.stages.training import full_model_root
from dppo.types import Artifact, EncodedExample, Objective, StatisticsObjective

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from dppo.stages.workbench import Workbench

_log = logging.getLogger("dppo")


@dataclass(frozen=True)
class Ready:
    """A stage that may begin. ``settings`` has the token budget to use; ``peak`` is None where it is not known."""

    settings: TrainSettings
    peak: Peak | None
    meter: Meter

    @contextlib.contextmanager
    def watched(self, bench: Workbench, title: str, key: str) -> Iterator[None]:
        """Notes the peak that is measured; raises UserError in one line where there was not enough memory."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            budget = self.settings.tokens_per_micro_batch
            expected = f", about {size(self.peak.total)} were expected ({self.peak})" if self.peak else ""
            raise UserError(
                f"{title}: out of memory on {bench.device.type}{expected}; type "
                f"{key}.tokens_per_micro_batch={max(1, budget // 2)} (now {budget}, same result), then "
                f"{_knobs(self.settings, key)}; the same command then goes on from the last checkpoint"
            ) from None
        bench.memory = {
            "estimated": None if self.peak is None else self.peak.total,
            "measured": self.meter.peak(),
            "tokens_per_micro_batch": self.settings.tokens_per_micro_batch,
        }


def architecture_of(bench: Workbench, artifact: Artifact) -> PretrainedConfig | None:
    """The configuration of an artifact's full model."""
    from dppo.models import saved_architecture

    return saved_architecture(full_model_root(bench, Path(artifact.path)))


def ready_to_train(
    bench: Workbench,
    architecture: PretrainedConfig | None,
    examples: Sequence[EncodedExample],
    settings: TrainSettings,
    objective: Objective,
    *,
    seed: int,
    evaluates: bool,
    title: str,
    key: str,
    scorer_of: ScorerOf = ResponseScorer,
    prepare: Callable[[PreTrainedModel], None] = lambda model: None,
) -> Ready:
    """Look at a training run before its model is loaded. Raises UserError if not even one example fits.

    ``evaluates``: there are held-out examples. ``key`` is where its settings are in the configuration, such as
    ``sft.train``. Every process of the run enters.
    """
    sharding.check(settings, bench.accelerator.num_processes, key)
    free = _least(bench, room(bench.device))
    counted = None
    with _quietly():
        if architecture is not None:
            counted = _counted(
                architecture,
                examples,
                settings,
                objective,
                free,
                seed=seed,
                evaluates=evaluates,
                processes=bench.accelerator.num_processes,
                scorer_of=scorer_of,
                prepare=prepare,
            )
    budget = f"{key}.tokens_per_micro_batch"
    return _ready(bench, counted, free, settings, title=title, key=key, budget=budget, objective=objective)


def ready_to_score(
    bench: Workbench,
    architecture: PretrainedConfig | None,
    examples: Sequence[EncodedExample],
    settings: TrainSettings,
    budget: int,
    *,
    title: str,
    key: str,
) -> Ready:
    """The same for forward passes without gradients over all examples; ``budget`` is their token budget."""
    free = room(bench.device)
    scoring = dataclasses.replace(settings, tokens_per_micro_batch=budget)
    counted = None
    with _quietly():
        if architecture is not None and examples:
            step = Step(architecture, scoring, ResponseScorer, trains=False)
            counted = step, fit(step, [examples], budget, _unless_known(free))
    return _ready(bench, counted, free, scoring, title=title, key=key, budget="its token budget")


def expected_peak(
    architecture: PretrainedConfig | None,
    examples: Sequence[EncodedExample],
    settings: TrainSettings,
    objective: Objective,
    *,
    seed: int,
    evaluates: bool,
) -> int | None:
    """Bytes at the peak of a training run with the budget that was asked for; None where that is not known."""
    if architecture is None or not examples:
        return None
    with _quietly():
        _, found = _counted(architecture, examples, settings, objective, None, seed=seed, evaluates=evaluates)
        return found.asked.total
    return None


def _counted(
    architecture: PretrainedConfig,
    examples: Sequence[EncodedExample],
    settings: TrainSettings,
    objective: Objective,
    free: int | None,
    *,
    seed: int,
    evaluates: bool,
    processes: int = 1,
    scorer_of: ScorerOf = ResponseScorer,
    prepare: Callable[[PreTrainedModel], None] = lambda model: None,
) -> tuple[Step, Fit]:
    """The step of a training run, and what was found for its optimiser batches as their gradients see them."""
    compares = settings.penalty_gradient_ratio and settings.evaluate_every is not None and evaluates
    shards = processes if sharding.shards(settings) else 1
    copies = int(compares and isinstance(objective, PenalisedLoss)) + int(processes > shards)
    step = Step(architecture, settings, scorer_of, trains=True, copies=copies, shards=shards, prepare=prepare)
    steps = n_steps(settings, len(examples))
    whole = [with_gradient(objective, batch) for batch in batches(examples, settings.batch_size, steps, seed)]
    return step, fit(step, whole, settings.tokens_per_micro_batch, _unless_known(free))


def _unless_known(free: int | None) -> float:
    return float("inf") if free is None else free


def _ready(
    bench: Workbench,
    counted: tuple[Step, Fit] | None,
    free: int | None,
    settings: TrainSettings,
    *,
    title: str,
    key: str,
    budget: str,
    objective: Objective | None = None,
) -> Ready:
    """What the count leads to. ``budget`` names the token budget that ``settings`` hold."""
    if counted is None:
        return Ready(settings, None, Meter(bench.device))
    step, found = counted
    if free is None or found.asked.total <= free:
        return Ready(settings, found.asked, Meter(bench.device))
    _check(found, free, step, settings, title, key)
    asked = settings.tokens_per_micro_batch
    if isinstance(objective, StatisticsObjective) and objective.statistics_scope == "micro_batch":
        raise UserError(
            f"{budget}={asked}: {title} needs about {size(found.asked.total)} and {size(free)} may be used; with "
            f"loss={objective.name} the budget is part of the result, so choose it yourself: "
            f"{budget}={found.budget} fits"
        )
    bench.say(_lowered(title, budget, found, free, asked))
    return Ready(dataclasses.replace(settings, tokens_per_micro_batch=found.budget), found.peak, Meter(bench.device))


def _lowered(title: str, budget: str, found: Fit, free: int, asked: int) -> str:
    now = "one example at a time" if found.budget == 1 else f"{found.budget} ({size(found.peak.total)})"
    return (
        f"  {title}: needs about {size(found.asked.total)} and {size(free)} of memory may be used: {budget} is lowered "
        f"from {asked} to {now}, with the same result"
    )


def _check(found: Fit, free: int, step: Step, settings: TrainSettings, title: str, key: str) -> None:
    """Raise UserError if not even the longest example alone fits."""
    alone = found.alone
    if alone is None or alone.total <= free:
        return
    beside = ""
    if step.trains and not settings.activation_checkpointing:
        with _quietly():
            longest = max(found.longest, key=lambda one: one.n_tokens)
            lean = dataclasses.replace(step, settings=dataclasses.replace(settings, activation_checkpointing=True))
            beside = f" (then {size(lean.peak([longest], accumulates=True).total)})"
    raise UserError(
        f"{title}: needs about {size(alone.total)} for the longest example alone ({alone.tokens} tokens) and "
        f"{size(free)} of memory may be used: {alone}; type {_knobs(settings, key, beside)}"
    )


def _knobs(settings: TrainSettings, key: str, after_checkpointing: str = "") -> str:
    """What to type, the cheapest first."""
    words = []
    if not settings.activation_checkpointing:
        words.append(f"{key}.activation_checkpointing=true{after_checkpointing}")
    words.append(f"a smaller {key}.max_length")
    if settings.lora is None:
        words.append("train=lora" if key == "train" else f"train@{key}=lora")
    if settings.precision == "fp32":
        words.append(f"{key}.precision=bf16")
    return ", ".join(words[:-1]) + f" or {words[-1]}" if len(words) > 1 else words[0]


def _least(bench: Workbench, free: int | None) -> int | None:
    """The room of the process that has least, so that all cut their batches alike."""
    found = [one for one in gather(bench.accelerator, free) if one is not None]
    return min(found) if len(found) == bench.accelerator.num_processes else None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """A step whose memory cannot be counted is a step about which nothing is said."""
    try:
        yield
    except Exception as error:  # whatever an architecture without content runs into
        _log.debug("the memory of a step is not known: %s", error)
