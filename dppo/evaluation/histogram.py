"""Histograms of several samples on the same bins, so that their bars can be compared one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dppo.evaluation.win_rates import Array

FEWEST, MOST = 8, 40
_LARGEST = 1e100  # what lies beyond overflows in the arithmetic of an axis


def shared_bins(*samples: Sequence[float] | Array) -> Array:
    """(B + 1,) ascending edges of at most ``MOST`` bins, for all ``samples`` (each (N,)) together.

    Few distinct values get a bin each (a gap between them may leave some empty), everything else at least ``FEWEST``
    equal bins about as wide as Freedman and Diaconis (1981) say, 2 IQR / N^(1/3). Their edges are multiples of a round
    number, so that 0 is one of them and no bin holds both signs. What is not finite, or too large to count with, is
    left out; raises ValueError where nothing else is there.
    """
    values = np.concatenate([_usable(sample) for sample in samples])
    if len(values) == 0:
        raise ValueError("no finite value to make bins for")
    if (own := _one_each(np.unique(values))) is not None:
        return own
    low, high = float(values.min()), float(values.max())
    quartiles = np.quantile(values, [0.25, 0.75])
    width = 2 * float(quartiles[1] - quartiles[0]) / len(values) ** (1 / 3)
    # Edges on a lattice may cost two bins more than fit into the range.
    width = _round_width(max(width, (high - low) / (MOST - 2)), (high - low) / FEWEST)
    return width * np.arange(math.floor(low / width), math.ceil(high / width) + 1, dtype=np.float64)


def shares(sample: Sequence[float] | Array, edges: Array) -> Array:
    """(B,) the share of a sample's usable values in each bin; the last bin includes its upper edge."""
    values = _usable(sample)
    counts, _ = np.histogram(values, edges)
    return counts / max(1, len(values))


def _usable(sample: Sequence[float] | Array) -> Array:
    values = np.asarray(sample, dtype=np.float64).ravel()
    return values[np.isfinite(values) & (np.abs(values) < _LARGEST)]


def _round_width(least: float, most: float) -> float:
    """The least of 1, 2, 2.5, 5, 10 ... that is at least ``least``, or else the greatest that is at most ``most``."""
    ten = math.floor(math.log10(most))
    found = [one * 10.0**power for power in (ten - 2, ten - 1, ten) for one in (1, 2, 2.5, 5)]
    fitting = [width for width in found if width <= most]
    return next((width for width in fitting if width >= least), fitting[-1])


def _one_each(distinct: Array) -> Array | None:
    """Edges with one bin a value, where the values lie on a lattice (such as 0, 1, 3) of at most ``MOST`` places."""
    if len(distinct) == 1:
        return np.asarray(distinct[0] + 0.5 * max(1.0, abs(float(distinct[0])) * 1e-6) * np.array([-1.0, 1.0]))
    step = float(np.diff(distinct).min())
    places = (distinct - distinct[0]) / step
    if places[-1] > MOST - 0.5 or np.abs(places - places.round()).max() > 1e-3:
        return None
    return np.asarray(distinct[0] + step * (np.arange(round(float(places[-1])) + 2) - 0.5))
