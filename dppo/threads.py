"""With how many threads a process computes and tokenises, where several share the machine, and how they count.

What a user says in OMP_NUM_THREADS, RAYON_NUM_THREADS and TOKENIZERS_PARALLELISM always counts. These are set here for
tokenizers, which have no other way, and never for torch: processes that this one starts would take them for the user's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How many processes of a search share this process's memory.
SHARING = "DPPO_MEMORY_SHARED_BY"
_CGROUP = Path("/sys/fs/cgroup")
# What this process has set itself, by name.
_own: dict[str, str] = {}


def settle() -> None:
    """Give torch and tokenizers of this process their share of the cores; call it before anything is computed.

    The processes of a distributed run on this machine share the cores evenly. torchrun limits each of several to one
    thread, however many cores there are; other launchers let each have all of them. A process alone keeps torch's own
    choice, unless its container grants less.
    """
    import torch

    share = _share(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    limited = _limited_by_torchrun()
    if limited or (given("OMP_NUM_THREADS") is None and torch.get_num_threads() > share):
        torch.set_num_threads(share)
    for_tokenizers(torch.get_num_threads())


def for_tokenizers(n_threads: int) -> None:
    """Let tokenizers work with so many threads; to be called before the first one is used."""
    # Named in both cases: tokenizers warn of forks where nothing was said.
    for name, value in (("RAYON_NUM_THREADS", n_threads), ("TOKENIZERS_PARALLELISM", str(n_threads > 1).lower())):
        if given(name) is None:
            os.environ[name] = _own[name] = str(value)


def environment(n_processes: int) -> dict[str, str]:
    """What each of so many processes that share this machine is to have in its environment."""
    compute = given("OMP_NUM_THREADS") or str(_share(n_processes))
    return {"OMP_NUM_THREADS": compute, "RAYON_NUM_THREADS": given("RAYON_NUM_THREADS") or compute}


@contextmanager
def denormals_are_zero() -> Iterator[None]:
    """Numbers below 1e-38 count as 0, in this thread and in torch's, if they have not begun to work.

    AdamW's means of what gets no gradient any more, as of words that do not occur, shrink step by step into numbers
    that a processor multiplies ten times as slowly.
    """
    import torch

    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def given(name: str) -> str | None:
    """What the user said in the environment; None for what is not there, or was set here."""
    value = os.environ.get(name)
    return None if value is None or value == _own.get(name) else value


def cores() -> int:
    """The cores that this process may use: those it is bound to, but no more than its container grants."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = _granted(_CGROUP)
    return bound if granted is None else max(1, min(bound, int(granted)))


def _share(n_processes: int) -> int:
    return max(1, cores() // n_processes)


def _granted(cgroup: Path) -> float | None:
    """The cores' worth of time that a container gets, of cgroups version 2 or 1; None where there is no limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            return float(quota) / float(period) if float(quota) > 0 else None
        except (OSError, ValueError):  # not this version, or "max"
            continue
    return None


def _limited_by_torchrun() -> bool:
    """Whether OMP_NUM_THREADS is torchrun's own 1, which its environment did not have when it was started."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or given("OMP_NUM_THREADS") != "1":
        return False
    import psutil

    try:
        return "OMP_NUM_THREADS" not in psutil.Process(os.getppid()).environ()
    except psutil.Error:
        return False
