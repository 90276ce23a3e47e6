"""torch.compile for the layers of a model: fewer passes over memory for norms, rotations, activations and casts.

Only the repeated layers are compiled, each on its own, because they are the bulk of a step and share one compiled
form. What stays as it is: attention, whose calls depend on the lengths in a row, and the LM head. Compiled code rounds
differently, so whether it is used is part of the numerics that a policy and its reference share.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dppo.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("dppo")

_BACKEND = "inductor"


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers, by what transformers says must stay on one device; none where it says nothing."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer of ``model`` in place, for rows of any length; its parameters keep their names.

    Compiling happens at the first call. Raises UserError if the machine cannot compile, or if the model does not say
    which of its modules are layers.
    """
    check_compiler(next(model.parameters()).device.type)
    found = layers(model)
    if not found:
        raise UserError(
            f"train.compile=true: {type(model).__name__} does not say which of its modules are layers; "
            "choose train.compile=false"
        )
    _say_once()
    for layer in found:
        layer.compile(dynamic=True, backend=_BACKEND)


@cache
def _say_once() -> None:
    logger.info("  the layers are compiled in the first steps, which takes a minute or two")


@cache
def check_compiler(device: str) -> None:
    """Compile something small for a type of device. Raises UserError if that fails, most often for want of a compiler.

    Takes seconds, once a process.
    """

    def doubled(values: Tensor) -> Tensor:
        return values * 2

    try:
        torch.compile(doubled, backend=_BACKEND)(torch.ones(2, device=device))
    except Exception as error:  # whatever its back ends run into
        reason = first_line(error)
        hint = "install a C++ compiler (apt-get install g++)" if device == "cpu" else "see whether Triton is installed"
        raise UserError(
            f"train.compile=true: torch.compile fails on this machine ({reason}); {hint}, or choose train.compile=false"
        ) from None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what was compiled runs as it was before, for instance for decoding, whose shapes are others."""
    with torch.compiler.set_stance("force_eager"):
        yield
