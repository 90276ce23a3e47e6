"""What a search would cost, from the plans of its runs; nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dppo.cache import size
from dppo.command_line import aligned, duration
from dppo.config import Experiment
from dppo.plan import Plan, device_hours, lines, plan


@dataclass(frozen=True)
class Kind:
    """Runs that cost alike: ``experiment`` composes one with a seed."""

    title: str
    n_runs: int
    experiment: Callable[[int], Experiment]


def forecast(kinds: Sequence[Kind], n_jobs: int) -> list[str]:
    """Tables of the first run's stages and of all runs, with times and sizes as far as they are known."""
    made: set[str] = set()
    rows = [("runs", "number", "stages to build", "time of the first", "of a further one", "disk")]
    told: list[str] = []
    seconds, disk, of_devices, unknown = 0.0, 0.0, 0.0, False
    for kind in kinds:
        if kind.n_runs == 0:
            continue
        # Seeds that no run has: a trial's own stages are then never found in the cache.
        first, further = (_plan(kind, seed, made) for seed in (10**6, 10**6 + 1))
        told = told or ["first run:", *lines(first)]
        seconds += first.seconds + (kind.n_runs - 1) * further.seconds
        of_devices += first.device_seconds + (kind.n_runs - 1) * further.device_seconds
        disk += first.bytes + (kind.n_runs - 1) * further.bytes
        unknown = unknown or bool(first.without_time or further.without_time)
        rows.append(
            (
                kind.title,
                str(kind.n_runs),
                str(len(first.todo)),
                _shown(first),
                _shown(further) if kind.n_runs > 1 else "",
                size(round(first.bytes + (kind.n_runs - 1) * further.bytes)),
            )
        )
    beside = f" in {n_jobs} processes, if each is as fast as one alone" if n_jobs > 1 else ""
    least = "at least " if unknown else "about "
    n_runs = sum(kind.n_runs for kind in kinds)
    return [
        *told,
        "",
        *aligned(rows),
        f"dry run: {n_runs} runs, {least}{duration(seconds / n_jobs)}{beside}, {least}{size(round(disk))} of disk"
        f"{device_hours(of_devices)}; "
        "start-up comes on top, pruning saves",
    ]


def _plan(kind: Kind, seed: int, made: set[str]) -> Plan:
    found = plan(kind.experiment(seed), also_built=made)
    made |= found.makes
    return found


def _shown(found: Plan) -> str:
    if not found.without_time:
        return duration(found.seconds)
    return f">= {duration(found.seconds)}" if found.seconds > 0 else "?"
