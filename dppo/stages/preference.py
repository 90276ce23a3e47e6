"""One preference phase: from the SFT model, or the previous phase's policy, to a new policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dppo.artifacts import Build, Slot
from dppo.config import Phase
from dppo.errors import Pruned
from dppo.loop import Interim, Metrics, ReferenceLogps
from dppo.stages.preflight import architecture_of, ready_to_train
from dppo.stages.training import METRICS, continued_policy, read_metrics, replay, run_training, save_policy
from dppo.types import Artifact, EncodedExample, Json

if TYPE_CHECKING:
    from dppo.data.encoding import ChatEncoder
    from dppo.stages.workbench import Workbench

VERSION = 3


@dataclass(frozen=True)
class Trained:
    """A policy, or the record of a run that diverged or was pruned and left none; it saw ``n_examples``.

    ``outcome`` is that of the loop, with ``status`` complete or diverged; a pruned one has ``status``, ``reason`` and
    ``steps`` alone.
    """

    policy: Artifact | None
    reused: bool
    outcome: dict[str, Any]
    metrics: list[Metrics]
    n_examples: int

    @property
    def status(self) -> str:
        return str(self.outcome["status"])


def preference_slot(
    bench: Workbench, phase: Phase, start: str, parents: Sequence[str], *, data: Json, seed: int, curve: Json = None
) -> Slot:
    """The place of a phase's policy; ``start`` is the fingerprint of the model that it trains from.

    ``curve`` says how reward and KL are measured along training, where that is to lie with the policy.
    """
    train = phase.train
    return bench.cache.artifact(
        "preference",
        {
            "version": VERSION,
            "loss": phase.loss,
            "settings": train.identity(),
            "seed": seed,
            "data": data,
            "numerics": bench.training_numerics(train),
            **_cut(bench, phase),
            **({} if curve is None else {"curve": curve}),
        },
        parents=[start, *parents],
    )


def preference(
    bench: Workbench,
    name: str,
    phase: Phase,
    start: Artifact,
    examples: Sequence[EncodedExample],
    held_out: Sequence[EncodedExample],
    *,
    data: Json,
    seed: int,
    reference: ReferenceLogps | None,
    parents: Sequence[str],
    encoder: ChatEncoder,
    curve: Json = None,
    interim: Interim | None = None,
    on_row: Callable[[Metrics], None] = lambda row: None,
) -> Trained:
    """Train ``phase.loss`` from the model ``start``; ``parents`` are the stores that the examples came from.

    ``on_row`` is told the rows of its metrics while it trains, those before a checkpoint first; of a run that is found
    in the cache it is told none.

    A run that is found in the cache tells its interim values again, and is pruned as it would be while it runs.
    """
    train = phase.train
    slot = preference_slot(bench, phase, start.fingerprint, parents, data=data, seed=seed, curve=curve)

    def build(started: Build) -> None:
        ready = ready_to_train(
            bench,
            architecture_of(bench, start),
            examples,
            train,
            phase.loss,
            seed=seed,
            evaluates=bool(held_out),
            title=name,
            key="train",
        )
        with ready.watched(bench, name, "train"):
            policy = continued_policy(bench, start, train.lora, seed)
            outcome = run_training(
                bench,
                policy,
                phase.loss,
                examples,
                ready.settings,
                seed=seed,
                started=started,
                held_out=held_out,
                reference=reference,
                interim=interim,
                title=name,
                on_row=on_row,
            )
        if bench.is_main:
            if outcome.status == "complete":
                save_policy(policy, encoder, started.directory, base=start, bench=bench)
            started.extra["outcome"] = outcome.to_json()

    try:
        artifact = bench.artifact("preference", slot, f"{name}: {phase.loss.name}, seed {seed}", build)
        outcome, metrics = _outcome(slot), read_metrics(slot.path / METRICS)
        if artifact.reused:
            replay(bench, metrics, interim)
            if interim is not None and outcome["status"] == "complete":
                there = {int(row["step"]) for row in metrics if interim.is_own(row)}
                if there != set(interim.percent_at):
                    bench.say(f"  {name}: was trained without these interim measurements, so they cannot end it")
    except Pruned as stop:
        bench.say(f"  {name}: pruned, {stop}")
        found = read_metrics((slot.path if slot.complete() else slot.work) / METRICS)
        metrics = [row for row in found if row["step"] <= stop.step]  # a longer run may have been there already
        ended = {"status": "pruned", "reason": str(stop), "steps": stop.step}
        return Trained(None, slot.complete(), ended, metrics, len(examples))
    trained = artifact if outcome["status"] == "complete" else None
    return Trained(trained, artifact.reused, outcome, metrics, len(examples))


def _outcome(slot: Slot) -> dict[str, Any]:
    found = slot.manifest().extra["outcome"]
    assert isinstance(found, dict)
    return found


def _cut(bench: Workbench, phase: Phase) -> dict[str, Json]:
    """How a batch is cut, which decides the result only of a loss with statistics of each micro-batch."""
    loss = phase.loss
    if not loss.uses_statistics or getattr(loss, "statistics_scope", "") != "micro_batch":
        return {}
    processes = int(bench.accelerator.num_processes)
    return {"tokens_per_micro_batch": phase.train.tokens_per_micro_batch, "processes": processes}
