"""Greedy answers of a model, once per prompt: y_gen for training, answers for evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from dppo.data.encoding import ChatEncoder
from dppo.generation import Greedy
from dppo.progress import Progress
from dppo.stages.training import saved_policy
from dppo.types import Artifact, Generation, Json, Prompt

if TYPE_CHECKING:
    from dppo.artifacts import Store
    from dppo.stages.workbench import Workbench

VERSION = 1
# Answers that a kill can cost: a shard is committed when it has so many rows or is so many seconds old.
_ROWS_PER_SHARD = 2048
_SECONDS_PER_SHARD = 30.0


def generate(
    bench: Workbench,
    title: str,
    model: Artifact,
    prompts: Sequence[Prompt],
    settings: Greedy,
    encoder: ChatEncoder,
) -> tuple[Artifact, dict[str, Generation]]:
    """The model's answers by ``prompt_id``; only those are computed that the store of this model lacks."""
    store: Store[Json] = bench.cache.json_store(
        "generate",
        {
            "version": VERSION,
            "decoding": settings.identity(),
            "template": encoder.template_text,
            "numerics": bench.numerics(settings.precision),
        },
        parents=[model.fingerprint],
    )
    keys = list(dict.fromkeys(prompt.prompt_id for prompt in prompts))
    with bench.alone() as main:
        if main:
            missing = store.missing(keys)
            detail = f"{len(keys)} answers, {len(missing)} to make" if missing else f"{len(keys)} answers"
            with bench.working(title, store, reuse=not missing, detail=detail):
                if missing:
                    with store.lock(bench.say):
                        _fill(bench, store, title, model, prompts, settings, encoder)
    rows = dict(zip(keys, store.get(keys), strict=True))
    return store.artifact(reused=not bench.is_main or not missing), {
        key: _from_json(key, cast("dict[str, Json]", row)) for key, row in rows.items()
    }


def _fill(
    bench: Workbench,
    store: Store[Json],
    title: str,
    model: Artifact,
    prompts: Sequence[Prompt],
    settings: Greedy,
    encoder: ChatEncoder,
) -> None:
    wanted = set(store.missing(prompt.prompt_id for prompt in prompts))  # others may have filled it meanwhile
    by_id = {prompt.prompt_id: prompt for prompt in prompts if prompt.prompt_id in wanted}
    if not by_id:
        return
    policy = saved_policy(bench, model)
    pending: dict[str, Json] = {}
    committed = time.monotonic()
    try:
        with Progress(title, len(by_id), "answer") as progress:
            queue = [(key, encoder.prompt_ids(prompt.messages)) for key, prompt in by_id.items()]
            for answers in settings.generate(policy, queue, frozenset(encoder.end_of_turn_ids), encoder.decode):
                pending |= {answer.prompt_id: _to_json(answer) for answer in answers}
                progress.advance(len(answers))
                if len(pending) >= _ROWS_PER_SHARD or time.monotonic() - committed > _SECONDS_PER_SHARD:
                    store.append(pending)
                    pending, committed = {}, time.monotonic()
    finally:
        if pending:  # also when interrupted: what is done is kept
            store.append(pending)


def _to_json(answer: Generation) -> Json:
    return {"text": answer.text, "token_ids": list(answer.token_ids), "stopped_by": answer.stopped_by}


def _from_json(key: str, row: dict[str, Json]) -> Generation:
    token_ids = cast("list[int]", row["token_ids"])
    stopped_by = "eos" if row["stopped_by"] == "eos" else "length"
    return Generation(key, str(row["text"]), tuple(token_ids), stopped_by)  # type: ignore[arg-type]
