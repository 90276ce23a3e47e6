"""Weights of linear layers in the form in which decoding multiplies by them fastest.

A step of decoding multiplies a few rows by every weight of the model: what it costs is reading the weights.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Packed weights lie beside the model's own; larger models keep theirs alone.
_MOST_PACKED = 4 << 30


@contextmanager
def linear_weights_in_bf16(model: nn.Module) -> Iterator[None]:
    """What autocast would make of the fp32 weights of linear layers, made once.

    Without gradients autocast keeps nothing, and casts every weight anew for every token. Embeddings that share a
    weight with a linear layer keep it.
    """
    from transformers.pytorch_utils import Conv1D

    originals: list[tuple[nn.Module, str, nn.Parameter]] = []
    cast: dict[int, nn.Parameter] = {}
    try:
        for module in model.modules():
            if type(module) not in (nn.Linear, Conv1D):
                continue
            for name, value in list(module.named_parameters(recurse=False)):
                if value.dtype == torch.float32:
                    if id(value) not in cast:
                        cast[id(value)] = nn.Parameter(value.to(torch.bfloat16), requires_grad=False)
                    originals.append((module, name, value))
                    setattr(module, name, cast[id(value)])
        yield
    finally:
        for module, name, value in originals:
            setattr(module, name, value)


@contextmanager
def linear_weights_packed(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers with fp32 weights on an x86 processor multiply by a copy that oneDNN has laid out.

    For a few rows at a time that is up to three times as fast as a matrix product with the weight as it is, and as
    fast for hundreds; it rounds differently. Not for gradients. Weights above 4 GiB together stay as they are.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)] if _onednn_packs() else []
    found = [module for module in linear if _can_be_packed(module)]
    # Several layers may share a weight.
    weights = {id(module.weight): module.weight.detach() for module in found}
    if sum(weight.numel() * weight.element_size() for weight in weights.values()) > _MOST_PACKED:
        found, weights = [], {}
    packed = {key: torch.ops.mkldnn._reorder_linear_weight(weight) for key, weight in weights.items()}
    try:
        for module in found:
            setattr(module, "forward", _times(packed[id(module.weight)], module.bias))  # noqa: B010
        yield
    finally:
        for module in found:
            vars(module).pop("forward", None)  # the class's own is behind it; a signal may come before all are set


def _can_be_packed(module: nn.Linear) -> bool:
    return (
        type(module) is nn.Linear  # others may compute something else
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and module.weight.numel() > 0
        and "forward" not in vars(module)  # somebody else has put his own there
    )


def _onednn_packs() -> bool:
    """Whether this torch has the operations by which its own compiler packs weights; measured on x86 only."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _times(packed: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    def forward(given: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(given, packed, bias, "none", [], "")
        return found

    return forward
