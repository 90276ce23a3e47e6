"""A DPO step and its memory against TRL's DPOTrainer. Needs ``pip install -c constraints.txt '.[trl]'``."""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row, Timing, compared, now, since
from benchmarks.setting import SEED, Setting, encoder_of, experiment, in_order
from benchmarks.turns import all_started, as_dppo_has_it, as_scripts_have_it, tell, wait

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dppo.types import EncodedExample, PreferenceExample

# TRL's own settings, and the fastest that its documentation offers with the same numbers.
TRL: dict[str, Mapping[str, Any]] = {
    "TRL default": {},
    "TRL best": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
    "TRL best, fp32": {"bf16": False, "gradient_checkpointing": False, "precompute_ref_log_probs": True},
    "TRL default, fp32": {"bf16": False},  # where bf16 is not measured
}


def _others(setting: Setting) -> list[str]:
    with_bf16 = [name for name in TRL if name != "TRL default, fp32"]
    return with_bf16 if "bf16" in setting.precisions else [name for name in TRL if name.endswith("fp32")]


def _own(setting: Setting) -> list[str]:
    return [f"dppo {precision}" for precision in setting.precisions]


def trl(setting: Setting, rounds: int) -> list[Row]:
    """The steps of TRL's DPOTrainer and of dppo's loop, in turn, on the same batches of one training run each."""
    rows = []
    for name in _others(setting):
        series, losses = _steps_in_turn(setting, name, rounds)
        for label in _own(setting):
            worst = max(abs(a - b) / abs(b) for a, b in zip(losses[label], losses[name], strict=True))
            note = f"losses differ by at most {worst:.0e}"
            rows.append(compared("DPO step", (label, series[label]), (name, series[name]), note))
    return rows


def _steps_in_turn(setting: Setting, name: str, rounds: int) -> tuple[dict[str, list[Timing]], dict[str, list[float]]]:
    """Seconds and losses of every step behind the first one, by contender.

    All train the same model from the same weights, each in a process of its own that has what its own command would
    give it; they stand still while it is not their turn.
    """
    names = (name, *_own(setting))
    with all_started([(one, _command(setting, one, rounds), _environment(one)) for one in names]) as contenders:
        for _ in range(rounds):
            for one in contenders:
                one.step()
        losses = {one.name: one.end() for one in contenders}
    return {one.name: one.timings for one in contenders}, losses


def _command(setting: Setting, name: str, rounds: int) -> list[str]:
    return ["benchmarks.against_trl", "--steps-of", name, "--rounds", str(rounds), *setting.options]


def _environment(name: str) -> dict[str, str]:
    return as_scripts_have_it() if name in TRL else as_dppo_has_it()


def _steps_of(setting: Setting, name: str, rounds: int) -> None:
    """A contender: says how long each step took, and waits for a line before the next."""
    pairs = in_order(setting, setting.batch_size * (rounds + 1))
    if name in TRL:
        tell(_trl_steps(setting, pairs, name))
        return
    losses: list[float] = []
    begun: list[Timing] = []

    def step(row: Mapping[str, float]) -> None:
        tell(since(begun.pop()) if begun else None)
        losses.append(row["train/loss"])
        wait()
        begun.append(now())

    _dppo_run(setting, pairs, name.removeprefix("dppo "), step)
    tell(losses)


def _trl_steps(setting: Setting, pairs: Sequence[PreferenceExample], name: str) -> list[float]:
    from transformers import TrainerCallback

    class InTurn(TrainerCallback):
        begun: Timing | None = None

        def on_step_begin(self, *arguments: object, **keywords: object) -> None:
            if self.begun is not None:
                wait()
            self.begun = now()

        def on_step_end(self, *arguments: object, **keywords: object) -> None:
            assert self.begun is not None
            tell(since(self.begun))

    with tempfile.TemporaryDirectory() as folder:
        trainer = _trl_trainer(setting, pairs, name, Path(folder))
        trainer.add_callback(InTurn())
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "grad_norm" in entry]


def _dppo_run(
    setting: Setting, pairs: Sequence[PreferenceExample], precision: str, step: Callable[[Mapping[str, float]], None]
) -> None:
    from accelerate import Accelerator

    from dppo.allocator import freed_memory_is_kept
    from dppo.config import compose, load
    from dppo.loop import train
    from dppo.threads import denormals_are_zero

    words = [f"train.precision={precision}", "train.deterministic=false", f"train.batch_size={setting.batch_size}"]
    words += ["loss=dpo", "beta=0.1", "train.steps=null", "train.epochs=1", "train.learning_rate=1e-6"]
    words += ["train.schedule=constant", "train.warmup_ratio=0", "train.evaluate_every=null", "train.max_length=null"]
    words += ["train.log_every=1", "train.checkpoint_every=null"]
    phase = load(compose(words), words).phases["main"]
    encoded = encoder_of(setting).encode(pairs, None).examples
    model = experiment(setting).model.load_model(0)
    with tempfile.TemporaryDirectory() as folder, denormals_are_zero(), freed_memory_is_kept():
        train(
            model,
            phase.loss,
            encoded,
            phase.train,
            seed=SEED,
            accelerator=Accelerator(cpu=True),
            log=step,
            checkpoints=Path(folder),
            reference=_reference(model, encoded, setting.batch_size, precision),
        )


def _reference(model: PreTrainedModel, encoded: Sequence[EncodedExample], batch_size: int, precision: str) -> Any:
    """Log-probs of the answers under ``model`` as it is, as the reference stage stores them."""
    import torch

    from dppo.batches import collate
    from dppo.logps import ResponseScorer

    scorer = ResponseScorer(model, "packed")
    stored: dict[tuple[str, str], Any] = {}
    for at in range(0, len(encoded), batch_size):
        batch = collate(encoded[at : at + batch_size])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found = scorer(batch)
        stored.update(zip(batch.response_keys, found.tokens.split(found.lengths.tolist()), strict=True))
    return lambda keys: [stored[key] for key in keys]


def _trl_trainer(setting: Setting, pairs: Sequence[PreferenceExample], name: str, folder: Path) -> Any:
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

    disable_progress_bars()
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": setting.batch_size,
        "train_sampling_strategy": "sequential",
        "max_length": setting.max_length,  # its own default would cut longer pairs
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        **TRL[name],
    }
    model = experiment(setting).model.load_model(0)
    given = {"model": model} | ({} if "precompute_ref_log_probs" in TRL[name] else {"ref_model": copy.deepcopy(model)})
    trainer = DPOTrainer(
        **given,
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list([_row(pair) for pair in pairs]),
        processing_class=experiment(setting).model.load_tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _row(pair: PreferenceExample) -> dict[str, Any]:
    """A pair as a conversation in TRL's columns."""
    turns = [{"role": turn.role, "content": turn.content} for turn in pair.prompt.messages]
    answers: dict[str, Any] = {one.role: [{"role": "assistant", "content": one.text}] for one in pair.responses}
    return {"prompt": turns, **answers}


def memory(setting: Setting, rounds: int) -> list[Row]:
    """How far three steps raise a fresh process above what it held before the model was loaded, MiB."""
    del rounds  # the same every time
    found = {}
    for name in (*_others(setting), *_own(setting)):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.against_trl", "--memory-of", name, *setting.options],
            capture_output=True,
            text=True,
            check=True,
            env=_environment(name),
        )
        found[name] = float(done.stdout.split()[-1])
    return [
        Row(
            "peak memory",
            own,
            name,
            first_best=found[own],
            first_median=found[own],
            second_best=found[name],
            second_median=found[name],
            ratio_median=found[name] / found[own],
            ratio_best=found[name] / found[own],
            ratio_cpu=None,
            rounds=1,
            unit="MiB",
        )
        for own in _own(setting)
        for name in _others(setting)
    ]


def _memory_of(setting: Setting, name: str) -> float:
    pairs = in_order(setting, 3 * setting.batch_size)
    if name in TRL:
        import trl  # noqa: F401  its import is not a step
    import accelerate  # noqa: F401
    import torch

    from dppo.memory import Meter

    meter = Meter(torch.device("cpu"))
    if name in TRL:
        with tempfile.TemporaryDirectory() as folder:
            _trl_trainer(setting, pairs, name, Path(folder)).train()
    else:
        _dppo_run(setting, pairs, name.removeprefix("dppo "), lambda row: None)
    found = meter.peak()
    if found is None:
        raise SystemExit("this kernel does not tell how much memory a process has; that is measured on Linux only")
    return found / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """One contender in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_trl", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    contenders = [*TRL, "dppo fp32", "dppo bf16"]
    what.add_argument("--memory-of", choices=contenders, help="MiB of three steps")
    what.add_argument("--steps-of", choices=contenders, help="one step for each line of standard input")
    parser.add_argument("--rounds", type=int, default=5)
    Setting.add_options(parser)
    chosen = parser.parse_args(argv)
    if chosen.steps_of is not None:
        _steps_of(Setting.of(chosen), chosen.steps_of, chosen.rounds)
    else:
        print(_memory_of(Setting.of(chosen), chosen.memory_of))
    return 0


if __name__ == "__main__":
    sys.exit(main())
