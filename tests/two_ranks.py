"""Training runs that one process and two must do alike: ``torchrun --nproc_per_node 2 -m tests.two_ranks FOLDER``.

Each rank writes, for every scenario, what it ended with: ``SCENARIO-RANK.safetensors`` with the weights and the
gradients of the last step, ``SCENARIO-RANK.json`` with the outcome, the logged rows and whether each process held
only a part of every weight.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from dppo import loop
from dppo.config import TrainSettings
from dppo.errors import Pruned
from dppo.logps import ResponseScorer
from dppo.loop import Interim, Interrupted, Metrics, train
from dppo.losses.pairwise import DPO
from dppo.losses.penalised import UnLL
from dppo.losses.penalties import Quadratic
from dppo.losses.sft import SFT
from dppo.sharding import whole
from dppo.types import EncodedExample
from tests.running_margin import RunningMargin
from tests.tiny_models import gpt2, gradients, grouped_llama, llama, pairs, stored, train_settings

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
    return _interrupted(accelerator, folder, log, llama, train_settings(tokens_per_micro_batch=45))


def run_dropout(accelerator: Accelerator, folder: Path, log: Callable[[Metrics], None]) -> dict[str, Any]:
    settings = train_settings(tokens_per_micro_batch=45, dropout=0.3)
    return _train(SFT(), accelerator, folder, log, gpt2(), settings=settings)


def run_dropout_interrupted(accelerator: Accelerator, folder: Path, log: Callable[[Metrics], None]) -> dict[str, Any]:
    return _interrupted(accelerator, folder, log, gpt2, train_settings(tokens_per_micro_batch=45, dropout=0.3))


def _interrupted(
    accelerator: Accelerator,
    folder: Path,
    log: Callable[[Metrics], None],
    model: Callable[[], PreTrainedModel],
    settings: TrainSettings,
) -> dict[str, Any]:
    def stop(row: Metrics) -> None:
        log(row)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        _train(SFT(), accelerator, folder, stop, model(), settings=settings)
    except Interrupted:
        accelerator.wait_for_everyone()
        return _train(SFT(), accelerator, folder, log, model(), settings=settings)
    raise AssertionError("the signal did not stop the run")


def run_sharded(accelerator: Accelerator, folder: Path, log: Callable[[Metrics], None]) -> dict[str, Any]:
    """Everything that looks at weights or gradients; ended once on the way by what the main process has measured."""

    def measure(scorer: ResponseScorer) -> Metrics:
        with torch.inference_mode(), scorer.own_attention():
            logits = scorer.model(input_ids=torch.tensor([EXAMPLES[0].prompt_ids]), use_cache=False).logits
        return {"win_rate": float(logits.logsumexp(-1).sum())}

    interim = Interim({3: 50}, "win_rate", measure, lambda row: "enough")
    try:
        _sharded(accelerator, folder, log, interim)
    except Pruned:
        accelerator.wait_for_everyone()
        return _sharded(accelerator, folder, log, None)
    raise AssertionError("the run was not pruned")


def finish_sharded(accelerator: Accelerator, checkpoints: Path) -> dict[str, Tensor]:
    """The weights at the end of the run whose checkpoint at half of its steps two processes have left."""
    (best,) = checkpoints.glob("best-*.safetensors")
    best.unlink()
    rows: list[Metrics] = []
    found: dict[str, Tensor] = _sharded(accelerator, checkpoints, rows.append, None, save="last")["tensors"]
    assert rows[0]["step"] == 4
    return {name: value for name, value in found.items() if name.startswith("gradient.")}


def _sharded(
    accelerator: Accelerator,
    folder: Path,
    log: Callable[[Metrics], None],
    interim: Interim | None,
    save: Literal["last", "best"] = "best",
) -> dict[str, Any]:
    settings = train_settings(
        tokens_per_micro_batch=1,
        batch_size=3,
        steps=6,
        evaluate_every=2,
        save=save,
        activation_checkpointing=True,
        sharding="fsdp" if accelerator.num_processes > 1 else "none",
    )
    unll = UnLL(
        alpha=0.1,
        penalty=Quadratic(),
        base=_dpo(),
        margin="sum",
        detach=True,
        mask_shared_prefix=False,
        level="token_mean",
    )
    examples, held_out = ([_with_generated(one) for one in found] for found in (EXAMPLES, HELD_OUT))
    return _train(
        unll,
        accelerator,
        folder,
        log,
        grouped_llama(),
        examples,
        settings=settings,
        reference=stored(grouped_llama(seed=5), [*examples, *held_out]),
        held_out=held_out,
        interim=interim,
    )


SCENARIOS: dict[str, Run] = {
    "sft": run_sft,
    "dpo": run_dpo,
    "statistics": run_statistics,
    "one_micro_batch": run_one_micro_batch,
    "diverged": run_diverged,
    "interrupted": run_interrupted,
    "sharded": run_sharded,
}
# One process draws other masks than two, so that these have only each other to be compared with.
WITH_DROPOUT: dict[str, Run] = {"dropout": run_dropout, "dropout_interrupted": run_dropout_interrupted}


def _with_generated(pair: EncodedExample) -> EncodedExample:
    """The pair, its rejected answer read backwards as the generated one."""
    backwards = pair.response("rejected")
    assert backwards is not None
    own = dataclasses.replace(backwards, response_id="own", role="generated", token_ids=backwards.token_ids[::-1])
    return dataclasses.replace(pair, responses=(*pair.responses, own))


def _dpo() -> DPO:
    return DPO(beta=0.5, label_smoothing=0.0, sft_weight=0.0, nll="mean")


def _train(
    objective: Any,
    accelerator: Accelerator,
    folder: Path,
    log: Callable[[Metrics], None],
    model: PreTrainedModel | None = None,
    examples: Sequence[EncodedExample] = EXAMPLES,
    **given: Any,
) -> dict[str, Any]:
    model = model or llama()
    slopes: dict[str, Tensor] = {}
    divided: list[bool] = []
    step = loop._Run.step

    def watched(self: loop._Run, optimiser: Any, parameters: Any, weight: float) -> float:
        slopes.update({f"gradient.{name}": whole(value.grad).clone() for name, value in parameters.items()})
        divided.extend(_is_part(value) for value in parameters.values())
        return step(self, optimiser, parameters, weight)

    loop._Run.step = watched  # type: ignore[method-assign]
    try:
        outcome = train(
            model,
            objective,
            examples,
            seed=7,
            accelerator=accelerator,
            log=log,
            checkpoints=folder,
            **given,
        )
    finally:
        loop._Run.step = step  # type: ignore[method-assign]
        gradients(model)
    # Of divided weights the main process has all in the end, the others have none.
    weights = {name: value.detach() for name, value in model.named_parameters() if not hasattr(value, "full_tensor")}
    return {"outcome": outcome.to_json(), "tensors": {**weights, **slopes}, "divided": divided}


def _is_part(value: Tensor) -> bool:
    local = getattr(value, "to_local", None)
    return local is not None and local().numel() < value.numel()


def play(name: str, accelerator: Accelerator, folder: Path) -> None:
    """Run a scenario and write what this rank ended with."""
    rows: list[Metrics] = []
    found = (SCENARIOS | WITH_DROPOUT)[name](accelerator, folder / f"{name}-checkpoints", rows.append)
    rank = accelerator.process_index
    save_file(found["tensors"], folder / f"{name}-{rank}.safetensors")
    assert len(set(found["divided"])) == 1, "all weights are divided, or none"
    state = {
        "world": accelerator.num_processes,
        "outcome": found["outcome"],
        "rows": rows,
        "divided": found["divided"][0],
    }
    (folder / f"{name}-{rank}.json").write_text(json.dumps(state))


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes = Accelerator(cpu=True)
    for scenario in sys.argv[2:] or SCENARIOS | WITH_DROPOUT:
        play(scenario, processes, Path(sys.argv[1]))
    processes.end_training()
