"""A finished run as the start of another: its policy, and the SFT model that was its reference."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dppo.artifacts import Damaged, Slot
from dppo.errors import UserError
from dppo.hub import typed_path
from dppo.types import Artifact

if TYPE_CHECKING:
    from dppo.data.encoding import ChatEncoder
    from dppo.stages.workbench import Workbench


def finished_slots(bench: Workbench, run: str, encoder: ChatEncoder) -> tuple[Slot, Slot]:
    """The places of (reference, policy) of the run directory ``run``.

    Raises UserError if there is no complete run, if the cache has lost its models, or if they have another tokenizer
    or chat template than ``encoder``.
    """
    path = typed_path(run) / "result.json"
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
            raise UserError(f"init_from={run}: its result.json is no file")
        result = json.loads(path.read_text(encoding="utf-8"))
        status, command = result["status"], result["command"]
    except FileNotFoundError:
        raise UserError(f"init_from={run}: has no result.json; give the directory of a finished run") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"init_from={run}: its result.json cannot be read ({type(error).__name__})") from None
    if status != "complete":
        raise UserError(f"init_from={run}: that run is {status}; finish it first: {command}")
    remedy = f"set cache.dir to that run's, or run it again: {command}"
    reference, policy = (
        model_slot(bench, title, result["models"][title], f"init_from={run}", remedy)
        for title in ("reference", "policy")
    )
    _check_tokenizer(run, policy, encoder)
    return reference, policy


def model_slot(bench: Workbench, title: str, model: str, run: str, remedy: str) -> Slot:
    """The place of a run's model, "stage/fingerprint" in its result.json.

    Raises UserError that begins with ``run`` and ends with ``remedy`` if the cache has lost it.
    """
    stage, _, fingerprint = model.partition("/")
    try:
        return bench.cache.existing(stage, fingerprint)
    except Damaged as problem:
        raise UserError(
            f"{run}: its {title} {stage} {fingerprint[:4]} is not in {bench.cache.root} ({problem}); {remedy}"
        ) from None


def finished_run(bench: Workbench, run: str, encoder: ChatEncoder) -> tuple[Artifact, Artifact]:
    """(reference, policy) of the run directory ``run``, from the cache; raises UserError as ``finished_slots`` does."""
    reference, policy = finished_slots(bench, run, encoder)
    found = []
    for title, slot in ((reference.stage, reference), ("policy", policy)):
        with bench.working(title, slot, reuse=True, detail=f"from {run}"):
            found.append(slot.artifact(reused=True))
    return found[0], found[1]


def _check_tokenizer(run: str, policy: Slot, encoder: ChatEncoder) -> None:
    from dppo.models import saved_tokenizer

    theirs, ours = saved_tokenizer(policy.path), encoder.tokenizer
    for what, equal in {
        "vocabulary": theirs.get_vocab() == ours.get_vocab(),
        "chat template": theirs.get_chat_template() == ours.get_chat_template(),
    }.items():
        if not equal:
            raise UserError(f"init_from={run}: its model has another {what} than model=; choose that run's model")
