"""Log-probs of every response under the reference model, once; one store serves all losses, alphas and betas."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dppo.batches import collate, micro_batches
from dppo.config import TrainSettings
from dppo.loop import ReferenceLogps
from dppo.progress import Progress
from dppo.stages.preflight import architecture_of, ready_to_score
from dppo.stages.training import autocast, saved_policy, scorer_like
from dppo.stages.workbench import Keep, Workbench
from dppo.types import Artifact, EncodedExample

if TYPE_CHECKING:
    from dppo.artifacts import Store, Tokens

VERSION = 1
# Without gradients a forward pass takes a fraction of a training step's memory.
_BUDGET_FACTOR = 4
_ROWS_PER_SHARD = 4096


def reference_store(bench: Workbench, model: str, settings: TrainSettings) -> Store[Tokens]:
    """Where the log-probs under the model with the fingerprint ``model`` lie, by ``response_keys``.

    Precision and layout are those of the training that uses them, so that the log-ratio at step 0 is 0.
    """
    content = {"version": VERSION, "numerics": bench.training_numerics(settings)}
    return bench.cache.token_store("reference", content, parents=[model])


def response_keys(examples: Sequence[EncodedExample]) -> list[str]:
    """The key of every response of the examples, each once."""
    keys = (_key(example.prompt_id, response.response_id) for example in examples for response in example.responses)
    return list(dict.fromkeys(keys))


def reference_logps(
    bench: Workbench, model: Artifact, examples: Sequence[EncodedExample], settings: TrainSettings
) -> tuple[Artifact, ReferenceLogps]:
    """The stored log-probs of all responses, as a lookup by (prompt_id, response_id)."""
    store = reference_store(bench, model.fingerprint, settings)
    keys = response_keys(examples)

    @torch.inference_mode()
    def compute(missing: list[str], keep: Keep[Tokens]) -> None:
        whole = sorted(_lacking(examples, set(missing)), key=lambda example: (example.n_tokens, example.example_id))
        todo = bench.share(whole)
        if not todo:
            return
        budget = settings.tokens_per_micro_batch * _BUDGET_FACTOR
        ready = ready_to_score(
            bench, architecture_of(bench, model), todo, settings, budget, title="reference", key="train"
        )
        with (
            ready.watched(bench, "reference", "train"),
            Progress("reference", len(todo), "example", of=len(whole)) as progress,
        ):
            scorer = scorer_like(bench, saved_policy(bench, model), settings).eval()
            for part in micro_batches(todo, ready.settings.tokens_per_micro_batch):
                batch = collate(part).to(bench.device)
                with autocast(bench, settings.precision):
                    found = scorer(batch)
                rows = found.tokens.cpu().split(found.lengths.tolist())
                keep({_key(*key): row.numpy().copy() for key, row in zip(batch.response_keys, rows, strict=True)})
                progress.advance(len(part))

    detail = f"{len(keys)} responses"
    artifact = bench.fill("reference", store, keys, detail, "to score", compute, rows_per_shard=_ROWS_PER_SHARD)
    rows = {key: torch.from_numpy(row.copy()) for key, row in zip(keys, store.get(keys), strict=True)}

    def lookup(wanted: Sequence[tuple[str, str]]) -> list[torch.Tensor]:
        return [rows[_key(prompt_id, response_id)] for prompt_id, response_id in wanted]

    return artifact, lookup


def _key(prompt_id: str, response_id: str) -> str:
    return f"{prompt_id}:{response_id}"


def _lacking(examples: Sequence[EncodedExample], missing: set[str]) -> list[EncodedExample]:
    """The examples with only those responses whose rows are missing; examples without one are left out.

    What several examples share is with the first of them alone: so the examples that a kill left to do are cut into
    the same micro-batches as without it, and their log-probs are the same to the bit.
    """
    todo = []
    left = set(missing)
    for example in examples:
        responses = tuple(
            response for response in example.responses if _key(example.prompt_id, response.response_id) in left
        )
        if responses:
            left.difference_update(_key(example.prompt_id, response.response_id) for response in responses)
            todo.append(dataclasses.replace(example, responses=responses))
    return todo
