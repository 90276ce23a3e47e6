"""Training runs that one process and two must do alike: ``torchrun --nproc_per_node 2 -m tests.two_ranks FOLDER``.

Each rank writes, for every scenario, what it ended with: ``SCENARIO-RANK.safetensors`` with the weights and the
gradients of the last step, ``SCENARIO-RANK.json`` with the outcome and the logged rows.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from dppo import loop
from dppo.loop import Interrupted, Metrics, train
from dppo.losses.pairwise import DPO
from dppo.losses.sft import SFT
from tests.running_margin import RunningMargin
from tests.tiny_models import gradients, llama, pairs, stored, train_settings

EXAMPLES = pairs(10)
HELD_OUT = pairs(3, seed=1)  # an odd number: one rank gets a micro-batch that counts nothing
BAD = EXAMPLES[3]  # its reference log-probs are NaN in the scenario "diverged"

Run = Callable[[Accelerator, Path, Callable[[Metrics], None]], dict[str, Any]]


def run_sft(accelerator: Accelerator, folder: Path, log: Callable[[Metrics], None]) -> dict[str, Any]:
    settings = train_settings(tokens_per_micro_batch=45, batch_size=5)
    return _train(SFT(), accelerator, folder, log, settings=settings)


def run_dpo(accelerator: Accelerator, folder: Path, log: Callable[[Metrics], None]) -> dict[str, Any]:
    settings = train_settings(
        tokens_per_micro_batch=1, batch_size=3, evaluate_every=1, save="best", steps=8, learning_rate=3e-3
    )
    reference = stored(llama(seed=5), [*EXAMPLES, *HELD_OUT])
    return _train(_dpo(), accelerator, folder, log, settings=settings, reference=reference, held_out=HELD_OUT)


def run_statistics(accelerator: Accelerator, folder: Path, log: Callable[[Metrics], None]) -> dict[str, Any]:
    settings = train_settings(tokens_per_micro_batch=1, evaluate_every=5)
    return _train(RunningMargin(), accelerator, folder, log, settings=settings, held_out=HELD_OUT)


def run_one_micro_batch(accelerator: Accelerator, folder: Path, log: Callable[[Metrics], None]) -> dict[str, Any]:
    """The second rank has nothing to do but must take part."""
    return _train(SFT(), accelerator, folder, log, settings=train_settings())


def run_diverged(accelerator: Accelerator, folder: Path, log: Callable[[Metrics], None]) -> dict[str, Any]:
    rows = stored(llama(seed=5), EXAMPLES)

    def reference(keys: Sequence[tuple[str, str]]) -> list[Tensor]:
        return [row * math.nan if key[0] == BAD.prompt_id else row for key, row in zip(keys, rows(keys), strict=True)]

    settings = train_settings(tokens_per_micro_batch=1)
    return _train(_dpo(), accelerator, folder, log, settings=settings, reference=reference)


def run_interrupted(accelerator: Accelerator, folder: Path, log: Callable[[Metrics], None]) -> dict[str, Any]:
    """One process alone gets a signal after step 2; all stop, and all continue when the run is started again."""

    def stop(row: Metrics) -> None:
        log(row)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = train_settings(tokens_per_micro_batch=45)
    try:
        _train(SFT(), accelerator, folder, stop, settings=settings)
    except Interrupted:
        accelerator.wait_for_everyone()
        return _train(SFT(), accelerator, folder, log, settings=settings)
    raise AssertionError("the signal did not stop the run")


SCENARIOS: dict[str, Run] = {
    "sft": run_sft,
    "dpo": run_dpo,
    "statistics": run_statistics,
    "one_micro_batch": run_one_micro_batch,
    "diverged": run_diverged,
    "interrupted": run_interrupted,
}


def _dpo() -> DPO:
    return DPO(beta=0.5, label_smoothing=0.0, sft_weight=0.0, nll="mean")


def _train(
    objective: Any, accelerator: Accelerator, folder: Path, log: Callable[[Metrics], None], **given: Any
) -> dict[str, Any]:
    model = llama()
    slopes: dict[str, Tensor] = {}
    step = loop._Run.step

    def watched(self: loop._Run, optimiser: Any, parameters: Any, weight: float) -> float:
        slopes.update({f"gradient.{name}": value.grad.clone() for name, value in parameters.items()})
        return step(self, optimiser, parameters, weight)

    loop._Run.step = watched  # type: ignore[method-assign]
    try:
        outcome = train(
            model,
            objective,
            EXAMPLES,
            seed=7,
            accelerator=accelerator,
            log=log,
            checkpoints=folder,
            **given,
        )
    finally:
        loop._Run.step = step  # type: ignore[method-assign]
        gradients(model)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    return {"outcome": outcome.to_json(), "tensors": {**weights, **slopes}}


def play(name: str, accelerator: Accelerator, folder: Path) -> None:
    """Run a scenario and write what this rank ended with."""
    rows: list[Metrics] = []
    found = SCENARIOS[name](accelerator, folder / f"{name}-checkpoints", rows.append)
    rank = accelerator.process_index
    save_file(found["tensors"], folder / f"{name}-{rank}.safetensors")
    state = {"world": accelerator.num_processes, "outcome": found["outcome"], "rows": rows}
    (folder / f"{name}-{rank}.json").write_text(json.dumps(state))


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = Accelerator(cpu=True)
    for scenario in SCENARIOS:
        play(scenario, processes, Path(sys.argv[1]))
    processes.end_training()
