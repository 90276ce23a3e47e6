"""Freed memory stays with a process while it computes and is the system's afterwards; what the user says counts."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dppo import allocator
from tests.conftest import outside

# Two blocks above glibc's own 32 MiB, freed and made again: page faults of a late round and MiB resident inside, and
# MiB resident afterwards. The first rounds differ: an aligned block needs a little more room than the one before it.
CODE = """
import resource
from pathlib import Path
from dppo import allocator
import torch

def resident():
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) // 1024

def once():
    blocks = [torch.ones(12_000_000) for _ in range(2)]

once()
before = resident()
with allocator.freed_memory_is_kept():
    for _ in range(20):
        once()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    once()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    kept = resident() - before
print(faults, kept, resident() - before)
"""

pytestmark = pytest.mark.skipif(allocator._glibc() is None, reason="not glibc")


def measured(**said: str) -> tuple[int, int, int]:
    environment = {**outside(), **said, "THP_MEM_ALLOC_ENABLE": "0"}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    faults, kept, after = map(int, done.stdout.split())
    return faults, kept, after


def test_freed_memory_is_used_again_and_given_back_in_the_end() -> None:
    faults, kept, after = measured()
    assert faults < 1000  # 92 MiB are 23,000 pages
    assert kept > 80
    assert after < 20


@pytest.mark.parametrize(
    "said", [{"MALLOC_MMAP_MAX_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}], ids=["old", "new"]
)
def test_what_the_user_says_of_the_allocator_counts(said: dict[str, str]) -> None:
    faults, kept, _ = measured(**said)
    assert faults > 20_000
    assert kept < 20
