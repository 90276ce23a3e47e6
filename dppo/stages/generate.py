"""Answers of a model, once per prompt: y_gen for training, answers for evaluation, candidates to be ranked."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from dppo.data.encoding import ChatEncoder
from dppo.generation import VLLM, OneAnswer, Several
from dppo.progress import Progress
from dppo.stages.training import full_model_folder, saved_policy
from dppo.stages.workbench import Keep, Pace, Workbench
from dppo.types import Artifact, Generation, Json, Prompt

if TYPE_CHECKING:
    from dppo.artifacts import Store

VERSION = 1
_ROWS_PER_SHARD = 2048
_PROMPTS_PER_SHARD = 256  # of several answers each


def answers_store(bench: Workbench, model: str, settings: OneAnswer, encoder: ChatEncoder) -> Store[Json]:
    """Where the answers of the model with the fingerprint ``model`` lie, by ``prompt_id``."""
    return _store(bench, "generate", model, settings, encoder)


def _store(
    bench: Workbench, stage: str, model: str, settings: OneAnswer | Several, encoder: ChatEncoder
) -> Store[Json]:
    return bench.cache.json_store(
        stage,
        {
            "version": VERSION,
            "decoding": settings.identity(),
            "template": encoder.template_text,
            "numerics": bench.numerics(settings.precision),
        },
        parents=[model],
    )


def stored_answers(store: Store[Json], keys: Sequence[str]) -> dict[str, Generation]:
    """Answers from their store, by ``prompt_id``; raises MissingRows if there are holes."""
    rows = zip(keys, store.get(keys), strict=True)
    return {key: _from_json(key, cast("dict[str, Json]", row)) for key, row in rows}


def generate(
    bench: Workbench,
    title: str,
    model: Artifact,
    prompts: Sequence[Prompt],
    settings: OneAnswer,
    encoder: ChatEncoder,
) -> tuple[Artifact, dict[str, Generation]]:
    """The model's answers by ``prompt_id``; only those are computed that the store of this model lacks."""
    store = answers_store(bench, model.fingerprint, settings, encoder)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    keys = list(by_id)

    alone = isinstance(settings, VLLM)  # the engine has all GPUs that it wants

    def compute(missing: list[str], keep: Keep[Json]) -> Pace | None:
        queue = _queue(bench, [by_id[key] for key in missing], encoder, alone=alone)
        if not queue:
            return None
        with (
            _answering(bench, model, settings, queue, encoder) as batches,
            Progress(title, len(queue), "answer", of=len(missing)) as progress,
        ):
            pace = _Stopwatch(progress, len(missing) / len(queue))
            for answers in batches:
                keep({answer.prompt_id: _to_json(answer) for answer in answers})
                pace.add(answers, len(answers))
            return pace.so_far()

    per_shard = settings.prompts_per_batch if isinstance(settings, VLLM) else _ROWS_PER_SHARD
    detail = f"{len(keys)} answers"
    artifact = bench.fill(title, store, keys, detail, "to make", compute, rows_per_shard=per_shard, alone=alone)
    return artifact, stored_answers(store, keys)


def candidates_store(bench: Workbench, model: str, settings: Several, encoder: ChatEncoder) -> Store[Json]:
    """Where several answers of the model with the fingerprint ``model`` lie, those to a prompt by its ``prompt_id``."""
    return _store(bench, "candidates", model, settings, encoder)


def stored_candidates(store: Store[Json], keys: Sequence[str]) -> dict[str, list[Generation]]:
    """All answers to each prompt from their store, by ``prompt_id``; raises MissingRows if there are holes."""
    rows = zip(keys, store.get(keys), strict=True)
    return {key: [_from_json(key, one) for one in cast("list[dict[str, Json]]", row)] for key, row in rows}


def candidates(
    bench: Workbench,
    model: Artifact,
    prompts: Sequence[Prompt],
    settings: Several,
    encoder: ChatEncoder,
) -> tuple[Artifact, dict[str, list[Generation]]]:
    """Several answers of the model to each prompt by ``prompt_id``; only what the store of this model lacks is made."""
    store = candidates_store(bench, model.fingerprint, settings, encoder)
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    keys = list(by_id)

    def compute(missing: list[str], keep: Keep[Json]) -> Pace | None:
        queue = _queue(bench, [by_id[key] for key in missing], encoder)
        if not queue:
            return None
        with (
            _answering(bench, model, settings, queue, encoder) as batches,
            Progress("candidates", len(queue), "prompt", of=len(missing)) as progress,
        ):
            pace = _Stopwatch(progress, len(missing) / len(queue))
            for answers in batches:
                found: dict[str, list[Json]] = {}
                for answer in answers:
                    found.setdefault(answer.prompt_id, []).append(_to_json(answer))
                keep(found)
                pace.add(answers, len(found))
            return pace.so_far()

    detail = f"{settings.n_answers} answers to each of {len(keys)} prompts"
    artifact = bench.fill("candidates", store, keys, detail, "to make", compute, rows_per_shard=_PROMPTS_PER_SHARD)
    return artifact, stored_candidates(store, keys)


def _queue(
    bench: Workbench, prompts: Sequence[Prompt], encoder: ChatEncoder, *, alone: bool = False
) -> Sequence[tuple[str, Sequence[int]]]:
    """(prompt_id, token ids) of the prompts that this process answers."""
    queue = [(prompt.prompt_id, encoder.prompt_ids(prompt.messages)) for prompt in prompts]
    return queue if alone else bench.share(sorted(queue, key=lambda prompt: (len(prompt[1]), prompt[0])))


@contextmanager
def _answering(
    bench: Workbench,
    model: Artifact,
    settings: OneAnswer | Several,
    queue: Sequence[tuple[str, Sequence[int]]],
    encoder: ChatEncoder,
) -> Iterator[Iterator[list[Generation]]]:
    """The model's answers to (prompt_id, token ids), batch by batch; it is loaded when the block is entered."""
    ends, decode = encoder.end_of_turn_ids, encoder.decode
    if isinstance(settings, VLLM):
        with (
            full_model_folder(bench, model) as folder,
            settings.answering(folder, bench.device, queue, ends, decode) as batches,
        ):
            yield batches
    else:
        yield settings.generate(saved_policy(bench, model), queue, ends, decode)


class _Stopwatch:
    """The pace of answers from now on, shown behind the progress; all processes are ``times`` as fast as this one."""

    def __init__(self, progress: Progress, times: float) -> None:
        self._progress, self._times, self._tokens, self._started = progress, times, 0, time.perf_counter()

    def add(self, answers: Sequence[Generation], n: int) -> None:
        """These answers are there: ``n`` of the units that the progress counts."""
        self._tokens += sum(len(answer.token_ids) for answer in answers)
        self._progress.note(f"{self._times * self.so_far().tokens_per_second:,.0f} tokens/s")
        self._progress.advance(n)

    def so_far(self) -> Pace:
        return Pace(self._tokens, time.perf_counter() - self._started)


def _to_json(answer: Generation) -> Json:
    return {"text": answer.text, "token_ids": list(answer.token_ids), "stopped_by": answer.stopped_by}


def _from_json(key: str, row: dict[str, Json]) -> Generation:
    token_ids = cast("list[int]", row["token_ids"])
    stopped_by = "eos" if row["stopped_by"] == "eos" else "length"
    return Generation(key, str(row["text"]), tuple(token_ids), stopped_by)  # type: ignore[arg-type]
