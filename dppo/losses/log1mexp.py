"""log(1 - e^u) for u <= 0, without loss of precision and without NaN in value or gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Above it log(1 - e^u) is held constant: greedy tokens start near probability 1, where it runs to -infinity.
LARGEST_LOGP = -1e-6


def log1mexp(u: Tensor) -> Tensor:
    """log(1 - e^u), elementwise; ``u`` is a log-probability in nats, any shape.

    ``u`` is clamped to at most -1e-6 first, where the result is -13.8155 and the gradient 0. The two branches meet
    at -ln 2 (Maechler 2012, "Accurately computing log(1 - exp(-|a|))", eq. 7). Both are finite with a finite
    gradient on the whole clamped range; ``torch.where`` would otherwise turn an infinity of the branch that is not
    taken into a NaN gradient.
    """
    u = u.clamp(max=LARGEST_LOGP)
    return torch.where(u > -math.log(2.0), torch.log(-torch.expm1(u)), torch.log1p(-torch.exp(u)))


def is_clamped(u: Tensor) -> Tensor:
    """Where ``log1mexp`` holds its argument: bool, the shape of ``u``."""
    return u > LARGEST_LOGP
