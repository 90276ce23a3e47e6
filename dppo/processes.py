"""What the processes of one run tell one another: torchrun, ``accelerate launch`` or srun has started several."""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dppo.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

# The others wait while one process works alone: for a reward behind an endpoint, for another run's lock. A process
# that dies is noticed by whatever started them.
_PATIENCE = timedelta(days=7)

T = TypeVar("T")


def rank() -> int:
    """The number of this process among those of its run, before they know one another; 0 speaks and writes logs."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the launcher has started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def asked(engine: str) -> bool:
    """Whether the configuration that ``accelerate launch`` was given asks for an engine, such as FSDP."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def accelerator(*, cpu: bool) -> Accelerator:
    """The place of this process among those of the run, and its device.

    Raises UserError for what ``accelerate launch`` was told and the loop cannot do.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.utils import GradientAccumulationPlugin

    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if asked(engine):
            raise UserError(
                f"accelerate launch: its configuration asks for {engine}, which would take the optimiser's step out of "
                "the loop; use docs/accelerate/fsdp2.yaml, which divides what ZeRO-3 does"
            )
    if asked("FSDP") and os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise UserError("accelerate launch: fsdp_offload_params=true was never tried here; write false")
    if asked("FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate launch: its configuration has the first version of FSDP; write fsdp_version: 2")
    together = [InitProcessGroupKwargs(timeout=_PATIENCE)] if world_size() > 1 else []
    # Precision and accumulation are the loop's own, whatever the launcher's configuration says.
    once = GradientAccumulationPlugin(num_steps=1)
    return Accelerator(cpu=cpu, mixed_precision="no", gradient_accumulation_plugin=once, kwargs_handlers=together)


def broadcast(accelerator: Accelerator, values: list[Any]) -> list[Any]:
    """The main process's values, in every process."""
    if accelerator.num_processes > 1:
        from torch.distributed import broadcast_object_list

        broadcast_object_list(values, src=0, group=_over_the_cpu())
    return values


def gather(accelerator: Accelerator, value: T) -> list[T]:
    """Every process's value, in every process, in the order of their numbers."""
    if accelerator.num_processes == 1:
        return [value]
    from torch.distributed import all_gather_object

    found: list[Any] = [None] * accelerator.num_processes
    all_gather_object(found, value, group=_over_the_cpu())
    return found


@functools.cache
def _over_the_cpu() -> Any:
    """The processes as a group in which one can wait for another for hours and keep no GPU busy; None: they all are.

    To be called by every process in the same place for the first time.
    """
    import torch.distributed as dist

    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", timeout=_PATIENCE)
