"""Weights, gradients and moments of a training run divided over its processes: FSDP2, by way of Accelerate.

Every process loads the whole model; from ``prepare`` on each holds a part of every weight. A layer's weights are put
together where it computes and let go after it. What has no parts goes through these functions unchanged, so that the
loop reads the same for one process, for DDP and for FSDP2. What says "together" is for all processes to enter.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dppo.compiling import layers
from dppo.config import TrainSettings
from dppo.errors import UserError
from dppo.processes import asked

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dppo.logps import ResponseScorer


def shards(settings: TrainSettings) -> bool:
    """Whether a training run is to be divided: its settings say so, or ``accelerate launch``'s configuration does."""
    return settings.sharding == "fsdp" or asked("FSDP")


def check(settings: TrainSettings, n_processes: int, key: str) -> None:
    """Raise UserError where a run cannot be divided; ``key`` is where its settings are, such as ``sft.train``."""
    if not shards(settings):
        return
    if n_processes == 1:
        raise UserError(
            f"{key}.sharding=fsdp: the run is one process, with nothing to divide; start it with "
            "torchrun --nproc_per_node N -m dppo, or choose none"
        )
    if settings.compile:
        raise UserError(f"{key}.compile=true: is not for divided weights; choose {key}.compile=false, or sharding=none")
    if settings.lora is not None and settings.lora.base_4bit:
        raise UserError(f"{key}.lora.base_4bit=true: 4-bit weights cannot be divided; choose {key}.sharding=none")


def prepare(accelerator: Accelerator, scorer: ResponseScorer, settings: TrainSettings) -> nn.Module:
    """What the loop calls: the scorer itself, DDP's wrapper of it, or the scorer with its weights divided."""
    if shards(settings):
        with _accelerate_shards(accelerator, scorer):
            # Accelerate wants an optimiser beside the model; ours is made of the divided weights afterwards.
            prepared, _ = accelerator.prepare(scorer, torch.optim.SGD(scorer.parameters()))
    else:
        prepared = accelerator.prepare(scorer)
    accelerator.free_memory()  # it would keep every model that it has seen
    module: nn.Module = prepared
    return module


def whole(value: Tensor) -> Tensor:
    """All of a tensor; together."""
    together = getattr(value, "full_tensor", None)
    return value if together is None else together()


def whole_in_main(tensors: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """All of every tensor, on the CPU if it had parts, in the main process alone; together."""
    found = {}
    for name, value in tensors.items():
        full = whole(value)
        if accelerator.is_main_process:
            found[name] = full if full is value else full.cpu()
    return found


def divided(value: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, on the device of ``like`` and divided as it is."""
    mesh: Any = getattr(like, "device_mesh", None)
    if mesh is None:
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    placements: Any = getattr(like, "placements")  # noqa: B009
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


@contextlib.contextmanager
def held_whole(scorer: nn.Module) -> Iterator[None]:
    """Every process holds all weights within the block, and may compute there without the others; together."""
    parts = _parts(scorer)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not scorer and _let_go(), recurse=False)
            part.reshard()


def undivide(scorer: nn.Module, accelerator: Accelerator) -> None:
    """Give the main process's model all of its weights back, on the CPU: it can be saved, and not run; together."""
    for part in _parts(scorer):
        part.reshard()
    placed: dict[int, nn.Parameter] = {}
    for module in scorer.modules():
        for name, value in list(module._parameters.items()):
            if value is None or not hasattr(value, "full_tensor"):
                continue
            if id(value) not in placed:
                full = whole(value.detach())
                kept = full.cpu() if accelerator.is_main_process else torch.empty(0)
                placed[id(value)] = nn.Parameter(kept, requires_grad=value.requires_grad)
            if accelerator.is_main_process:
                module._parameters[name] = placed[id(value)]


def _parts(scorer: nn.Module) -> list[Any]:
    """The modules whose weights are put together at once, the scorer itself for what is in no layer."""
    return [module for module in scorer.modules() if hasattr(module, "unshard")]


def _let_go() -> bool:
    """Whether a layer's weights are let go after its forward pass; ``accelerate launch`` may say no."""
    return os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"


@contextlib.contextmanager
def _accelerate_shards(accelerator: Accelerator, scorer: ResponseScorer) -> Iterator[None]:
    """What Accelerate prepares in the block is divided layer by layer.

    Its own switch is for the whole run and for GPUs alone; torch divides on the CPU as well.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    model: Any = scorer.model
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted({type(layer).__name__ for layer in layers(base)}),
        cpu_ram_efficient_loading=False,
        reshard_after_forward=_let_go(),
    )
    state = accelerator.state
    before = {name: getattr(state, name, None) for name in ("distributed_type", "fsdp_plugin")}
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(state, name, value)
