"""docs/reliability.md: what it names exists, and what a run records."""

from __future__ import annotations

import ast
import random
import re
from pathlib import Path

import numpy as np
import pytest

from dppo.results import versions
from tests.runs import run_small

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()


def test_every_test_that_the_page_names_exists() -> None:
    defined = {
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 20
    assert named - defined == set()


def test_every_fault_has_what_happens_what_is_lost_and_a_test() -> None:
    rows = [line for line in PAGE.partition("| fault |")[2].partition("\n\n")[0].splitlines()[2:]]
    assert len(rows) > 20
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4 and all(cells) and "`test_" in cells[3], row


def test_software_and_hardware_are_recorded() -> None:
    found = versions()
    assert {"python", "dppo", "torch", "git", "platform", "cpu", "cpu_count", "threads", "processes", "gpus"} <= set(
        found
    )
    assert found["cpu"] and found["platform"]


def test_a_run_draws_nothing_from_generators_that_the_process_shares(tmp_path: Path) -> None:
    """So a checkpoint need not hold them."""
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    run_small(tmp_path, "loss=unll", "alpha=0.1")
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]  # noqa: NPY002


@pytest.mark.slow
def test_two_runs_with_empty_caches_are_equal_to_the_bit(tmp_path: Path) -> None:
    from tests.chaos.outcomes import cached, differences

    run_small(tmp_path / "a", "loss=kto", "train.dropout=0.1", "seed=3")
    run_small(tmp_path / "b", "loss=kto", "train.dropout=0.1", "seed=3")
    first, second = (cached(tmp_path / name / "cache") for name in "ab")
    assert differences(first, second) == []
    assert any(name.startswith("preference") and name.endswith("model.safetensors") for name in first)
