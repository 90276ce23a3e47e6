"""What a training loop takes beside its passes and its optimiser: dppo's against transformers' Trainer."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from benchmarks.rows import Row, Timing, compared, now, since
from benchmarks.setting import SEED, Setting, examples, experiment, in_training_order

if TYPE_CHECKING:
    from torch import nn

    from dppo.types import EncodedExample

_STEPS, _WARM_UP = 60, 10


def loop(setting: Setting, rounds: int) -> list[Row]:
    """Seconds of an SFT step outside forward pass, loss, backward pass, clipping and AdamW, the mean of 50 steps.

    Both train the same model on the same batches in the same order, in fp32. Logging as each does it by default, and
    at every step. The Trainer gets its rows from a list, which is faster than from a table on disk.
    """
    drawn = in_training_order(setting, [_demonstration(one) for one in examples(setting, setting.batch_size * _STEPS)])
    rows = []
    for log_every in (None, 1):
        series: dict[str, list[Timing]] = {"dppo": [], "Trainer": []}
        whole: dict[str, list[float]] = {"dppo": [], "Trainer": []}
        for number in range(rounds + 1):
            for name, run in (("dppo", _dppo), ("Trainer", _trainer)):
                stopwatch = _Stopwatch()
                with tempfile.TemporaryDirectory() as folder:
                    run(setting, drawn, log_every, stopwatch, Path(folder))
                if number:
                    series[name].append(stopwatch.outside())
                    whole[name].append(stopwatch.step())
        took = " and ".join(f"{1000 * statistics.median(times):.1f} ms" for times in whole.values())
        logged = "logging by default" if log_every is None else "every step logged"
        own, other = series.items()
        rows.append(compared(f"loop, {logged}", own, other, f"whole steps {took}"))
    return rows


def _demonstration(pair: EncodedExample) -> EncodedExample:
    from dppo.types import EncodedExample

    return EncodedExample(pair.example_id, pair.prompt_id, pair.prompt_ids, pair.responses[:1])


class _Stopwatch:
    """Where the time between the ends of two steps of the optimiser goes; both loops call torch for what is inside."""

    def __init__(self) -> None:
        self._begun: list[Timing] = []
        self._inside = (0.0, 0.0)
        self._marks: list[tuple[Timing, Timing]] = []  # at the ends of steps: the time, and what was inside so far

    def begin(self, *_: object) -> None:
        self._begun.append(now())

    def end(self, *_: object) -> None:
        took = since(self._begun.pop())
        if not self._begun:  # else what is timed has called something that is timed too
            self._inside = (self._inside[0] + took[0], self._inside[1] + took[1])

    def mark(self, *_: object) -> None:
        self.end()
        self._marks.append((now(), self._inside))

    def around(self, function: Any) -> Any:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            self.begin()
            try:
                return function(*arguments, **keywords)
            finally:
                self.end()

        return timed

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Time backward passes, clipping and optimiser steps of the run inside, and keep what it shows to itself."""
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        hooks = [register_optimizer_step_pre_hook(self.begin), register_optimizer_step_post_hook(self.mark)]
        try:
            with (
                mock.patch.object(torch.autograd, "backward", self.around(torch.autograd.backward)),
                mock.patch.object(torch.nn.utils, "clip_grad_norm_", self.around(torch.nn.utils.clip_grad_norm_)),
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def watch(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.begin)
        module.register_forward_hook(self.end)

    def outside(self) -> Timing:
        """Of a step, behind the warm-up: what was not inside."""
        (first, spent), (last, spent_later) = self._marks[_WARM_UP - 1], self._marks[-1]
        n = len(self._marks) - _WARM_UP
        wall, cpu = (
            (end - start - (later - before)) / n
            for start, end, before, later in zip(first, last, spent, spent_later, strict=True)
        )
        return wall, cpu

    def step(self) -> float:
        """Seconds of a whole step on the clock."""
        return (self._marks[-1][0][0] - self._marks[_WARM_UP - 1][0][0]) / (len(self._marks) - _WARM_UP)


def _dppo(
    setting: Setting, drawn: Sequence[EncodedExample], log_every: int | None, stopwatch: _Stopwatch, folder: Path
) -> None:
    """The loop as the SFT stage runs it, its rows written to a file."""
    from accelerate import Accelerator

    from dppo.config import compose, load
    from dppo.logps import ResponseScorer
    from dppo.loop import train
    from dppo.losses.sft import SFT

    words = [f"sft.train.batch_size={setting.batch_size}", "sft.train.steps=null", "sft.train.epochs=1"]
    words += ["sft.train.learning_rate=1e-5", "sft.train.evaluate_every=null", "sft.train.max_length=null"]
    words += [] if log_every is None else [f"sft.train.log_every={log_every}"]
    settings = load(compose(words), words).sft.train
    assert settings is not None

    class Timed(SFT):
        __call__ = stopwatch.around(SFT.__call__)

    def scorer_of(*arguments: Any) -> ResponseScorer:
        scorer = ResponseScorer(*arguments)
        stopwatch.watch(scorer)
        return scorer

    def log(row: Any) -> None:
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    model = experiment(setting).model.load_model(0)
    accelerator = Accelerator(cpu=True)
    with stopwatch.running():
        train(
            model,
            Timed(),
            drawn,
            settings,
            seed=SEED,
            accelerator=accelerator,
            log=log,
            checkpoints=folder,
            scorer_of=scorer_of,
        )


def _trainer(
    setting: Setting, drawn: Sequence[EncodedExample], log_every: int | None, stopwatch: _Stopwatch, folder: Path
) -> None:
    """The Trainer with its own defaults, but for the order and the end."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rows = []
    for one in drawn:
        answer = one.responses[0].token_ids
        labels = [-100] * len(one.prompt_ids) + list(answer)
        rows.append({"input_ids": [*one.prompt_ids, *answer], "labels": labels})
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": setting.batch_size,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-5,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "seed": SEED,
    }
    arguments |= {} if log_every is None else {"logging_steps": log_every}
    model = experiment(setting).model.load_model(0)
    stopwatch.watch(model)
    trainer = Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(experiment(setting).model.load_tokenizer()),
    )
    with stopwatch.running():
        trainer.train()
