"""Which few of many configurations a panel shows, and what to run where there are none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dppo.evaluation.win_rates import Array
from dppo.report.evidence import Entry, Group, words_without
from dppo.results import command_line


def choose(features: Mapping[Entry, Array], baseline: Entry, most: int) -> list[Entry]:
    """At most ``most`` of the entries, in their order: the best, the baseline, then those unlike all chosen before.

    ``features`` (F,) hold what is drawn of each entry, NaN where there is nothing; entries come best first.
    """
    left = list(features)
    chosen = [left.pop(0)] if left else []
    if baseline in left and len(chosen) < most:
        left.remove(baseline)
        chosen.append(baseline)
    while left and len(chosen) < most:
        far = [min(_distance(features[entry], features[other]) for other in chosen) for entry in left]
        chosen.append(left.pop(int(np.argmax(far))))
    return sorted(chosen, key=lambda entry: entry.place)


def how_chosen(shown: int, of: int) -> str:
    """A sentence for a lead, if not all are shown."""
    if shown == of:
        return ""
    return f" {shown} of {of} configurations are shown: the best, the baseline and those that differ most."


def trained(group: Group) -> list[Entry]:
    """The entries that were trained on preferences and measured, the best first."""
    return [entry for entry in group.entries if not entry.is_sft and entry.measured]


def none_trained(group: Group) -> tuple[str, str]:
    """Why ``trained`` has none, and what to run instead."""
    command = command_line([*words_without(group.baseline.run.words, "loss", "alpha"), "loss=dpo"])
    if all(entry.is_sft for entry in group.entries):
        return "no run was trained on preferences", command
    return "every run that was trained on preferences diverged", command


def _distance(one: Array, other: Array) -> float:
    apart = np.abs(one - other)
    known = apart[np.isfinite(apart)]
    return float(np.sqrt(np.mean(known**2))) if len(known) else 0.0
