"""What the training stages share: policies from artifacts, the loop with its metrics file, policies to artifacts."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dppo import startup, stopping
from dppo.artifacts import Build
from dppo.artifacts.manifest import NAME as MANIFEST
from dppo.config import LoraSettings, TrainSettings
from dppo.errors import Pruned, UserError
from dppo.logps import ResponseScorer
from dppo.loop import (
    Interim,
    Metrics,
    Outcome,
    ReferenceLogps,
    ScorerOf,
    checkpoint_step,
    drop_damaged_checkpoints,
    scorer_for,
    train,
)
from dppo.processes import broadcast
from dppo.types import Artifact, EncodedExample, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dppo.data.encoding import ChatEncoder
    from dppo.models import Model
    from dppo.stages.workbench import Workbench

METRICS = "metrics.jsonl"
# In a manifest: the step after which its build continued. Its seconds are those of the steps that followed.
CONTINUED = "continued_after"
# An artifact that holds adapters names the full model below them by its place in the cache.
_BASE = "base.json"
_ADAPTER = "adapter_config.json"


def autocast(bench: Workbench, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast on the run's device, or nothing."""
    import torch

    return torch.autocast(bench.device.type, torch.bfloat16, enabled=precision == "bf16")


def scorer_like(bench: Workbench, model: PreTrainedModel, settings: TrainSettings) -> ResponseScorer:
    """A model for log-probs that are compared with those of training with these settings."""
    return scorer_for(model, settings, bench.device)


def new_policy(bench: Workbench, model: Model, lora: LoraSettings | None, seed: int) -> PreTrainedModel:
    """The base model on the run's device, with fresh adapters if asked for."""
    base = model.load_model(seed)
    return _on_device(bench, _with_adapters(bench, base, lora, seed))


def saved_policy(bench: Workbench, artifact: Artifact) -> PreTrainedModel:
    """The model of an artifact on the run's device, for inference; adapters are merged."""
    return _on_device(bench, _full_model(bench, Path(artifact.path)))


def continued_policy(bench: Workbench, artifact: Artifact, lora: LoraSettings | None, seed: int) -> PreTrainedModel:
    """The model of an artifact, to be trained on: its own adapters go on, or fresh ones are put on a full model."""
    path = Path(artifact.path)
    if lora is not None and (path / _ADAPTER).exists():
        from peft import PeftModel

        base = _full_model(bench, full_model_root(bench, path))
        if lora.base_4bit:
            raise UserError("train.lora.base_4bit=true: a phase cannot continue the 4-bit adapters of another phase")
        return _on_device(bench, PeftModel.from_pretrained(base, path, is_trainable=True))
    return _on_device(bench, _with_adapters(bench, _full_model(bench, path), lora, seed))


def _on_device(bench: Workbench, model: Any) -> PreTrainedModel:
    startup.end()  # what is made from here on are batches
    return cast("PreTrainedModel", model.to(bench.device))


def _full_model(bench: Workbench, path: Path) -> PreTrainedModel:
    from dppo.models import load_saved

    if not (path / _ADAPTER).exists():
        return load_saved(path)
    from peft import PeftModel

    merged = PeftModel.from_pretrained(load_saved(full_model_root(bench, path)), path).merge_and_unload()
    return cast("PreTrainedModel", merged)


def full_model_root(bench: Workbench, path: Path) -> Path:
    """The folder of the full model that an artifact's folder holds, or whose adapters it holds."""
    if not (path / _ADAPTER).exists():
        return path
    place: dict[str, str] = json.loads((path / _BASE).read_text())
    return bench.cache.root / place["stage"] / place["fingerprint"]


def _with_adapters(bench: Workbench, model: PreTrainedModel, lora: LoraSettings | None, seed: int) -> PreTrainedModel:
    if lora is None:
        return model
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    if lora.base_4bit:
        if bench.device.type != "cuda":
            raise UserError(
                f"train.lora.base_4bit=true: 4-bit weights need a CUDA device, this run is on {bench.device.type}; "
                "choose train=lora"
            )
        model = _quantised(bench, model)
    torch.manual_seed(seed)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
    )
    try:
        adapted = get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"train.lora.target_modules={lora.target_modules}: {str(error).splitlines()[0]}") from None
    return cast("PreTrainedModel", adapted)


def _quantised(bench: Workbench, model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in 4-bit NF4 with bf16 arithmetic, by way of a folder that transformers can read."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with tempfile.TemporaryDirectory(dir=bench.cache.make(".building")) as folder:
        model.save_pretrained(folder)
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=settings, device_map={"": bench.device}, use_safetensors=True
            )
        except ImportError as error:
            raise UserError(f"train.lora.base_4bit=true: {str(error).splitlines()[0]}") from None
    return cast("PreTrainedModel", loaded)


def save_policy(
    policy: PreTrainedModel, encoder: ChatEncoder, directory: Path, *, base: Artifact | None, bench: Workbench
) -> None:
    """Write a policy as a transformers folder with its tokenizer.

    Adapters are merged where there is no ``base`` (the SFT stage); otherwise they are saved alone, and the folder
    names the full model below them.
    """
    from dppo.models import save

    adapted = hasattr(policy, "get_base_model")
    if adapted and base is None:
        policy = cast("Any", policy).merge_and_unload()
        adapted = False
    if not adapted:
        save(policy, encoder.tokenizer, directory)
        return
    assert base is not None
    policy.save_pretrained(directory)
    encoder.tokenizer.save_pretrained(directory)
    path = Path(base.path)
    root = full_model_root(bench, path)
    (directory / _BASE).write_text(json.dumps({"stage": root.parent.name, "fingerprint": root.name}))


def write_model(bench: Workbench, artifact: Artifact, directory: Path) -> None:
    """Write the model of an artifact into a folder of its own, as transformers reads it; adapters are merged.

    The files are copies: whatever is done to them, the cache stays as it is.
    """
    from dppo.models import save, saved_tokenizer

    path = Path(artifact.path)
    if (path / _ADAPTER).exists():
        save(_full_model(bench, path), saved_tokenizer(path), directory)
        return
    for file in sorted(path.iterdir()):
        if file.is_file() and file.name not in (MANIFEST, METRICS):
            shutil.copyfile(file, directory / file.name)


@contextmanager
def full_model_folder(bench: Workbench, artifact: Artifact) -> Iterator[Path]:
    """A folder with the full model of an artifact, as transformers reads it, not to be changed.

    Where adapters have to be merged it is a temporary one, gone when the block is left.
    """
    path = Path(artifact.path)
    if not (path / _ADAPTER).exists():
        yield path
        return
    with tempfile.TemporaryDirectory(dir=bench.cache.make(".building")) as folder:
        write_model(bench, artifact, Path(folder))
        yield Path(folder)


def run_training(
    bench: Workbench,
    policy: PreTrainedModel,
    objective: Objective,
    examples: Sequence[EncodedExample],
    settings: TrainSettings,
    *,
    seed: int,
    started: Build,
    title: str,
    held_out: Sequence[EncodedExample] = (),
    reference: ReferenceLogps | None = None,
    interim: Interim | None = None,
    on_row: Callable[[Metrics], None] = lambda row: None,
    scorer_of: ScorerOf = ResponseScorer,
) -> Outcome:
    """Run the loop with its checkpoints and metrics in the stage's work directory; metrics end in the artifact.

    In the main process ``on_row`` is told every row, also those from before the checkpoint that is continued. A signal
    that comes when the last step is done waits until ``Workbench.artifact`` has committed the result.
    """
    journal = started.work / METRICS
    if bench.is_main:
        drop_damaged_checkpoints(started.work)
    bench.accelerator.wait_for_everyone()
    done = checkpoint_step(started.work)
    if done:
        bench.say(f"  {title}: continues after step {done}")
        started.extra[CONTINUED] = done
    # Without a checkpoint everything is done again, step 0 included.
    rows = [row for row in read_metrics(journal) if row["step"] <= done] if done else []
    if bench.is_main:
        _write_rows(journal, rows)
    replay(bench, rows, interim)
    if bench.is_main:
        for row in rows:
            on_row(row)

    def log(row: Metrics) -> None:
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        on_row(row)

    outcome = train(
        policy,
        objective,
        examples,
        settings,
        seed=seed,
        accelerator=bench.accelerator,
        log=log,
        checkpoints=started.work,
        reference=reference,
        held_out=held_out,
        interim=interim,
        title=title,
        scorer_of=scorer_of,
    )
    stopping.wait()  # with the policy in memory and its last checkpoint some steps old
    if bench.is_main:
        _write_rows(started.directory / METRICS, read_metrics(journal))
    return outcome


def replay(bench: Workbench, rows: Sequence[Metrics], interim: Interim | None) -> None:
    """Tell the verdict what was measured before this process began; raises ``Pruned`` where it says so.

    Rows that were measured otherwise, for instance with another reward, are left out.
    """
    pruned: str | None = None
    step = 0
    if interim is not None and bench.is_main:
        for row in filter(interim.is_own, rows):
            step = int(row["step"])
            if (pruned := interim.verdict(row)) is not None:
                break
    pruned, step = broadcast(bench.accelerator, [pruned, step])
    if pruned:
        raise Pruned(pruned, step)


def read_metrics(path: Path) -> list[Metrics]:
    """The rows of a metrics file; none if it is absent; a last line that a kill tore is left out."""
    rows: list[Metrics] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def _write_rows(path: Path, rows: Sequence[Metrics]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
