"""Kills and signals at moments that are known, and a few random ones; ``python -m tests.chaos`` makes many."""

from __future__ import annotations

import json
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.__main__ import Tally, survive, undisturbed
from tests.chaos.outcomes import differences, leftovers, outcome, unsound
from tests.chaos.runs import CASES, Command, Ended, Fork, Strike, forking, run
from tests.conftest import once

_ROWS = 4
STAGES = ("sft", "y_gen", "preference", "answers")
ALL_STAGES = ("sft", "y_gen", "reference", "baseline", "scores", "preference", "answers", "drift", "compare")


@pytest.fixture(scope="module")
def starter() -> Iterator[Fork]:
    with forking() as found:
        yield found


@pytest.fixture(scope="module")
def whole(starter: Fork, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, dict[str, Any]]:
    """How an undisturbed run of the first case ended, and what it left."""
    folder = once(tmp_path_factory, "chaos", lambda root: starter_run(starter, root))
    log = next(folder.glob("*.log")).read_text()
    return Ended(0, log, False, 5.0), outcome(CASES["unll"], folder)


def starter_run(starter: Fork, root: Path) -> None:
    assert run(starter, CASES["unll"], root, None, _ROWS).status == 0


def test_random_kills_leave_what_an_undisturbed_run_leaves(
    starter: Fork, whole: tuple[Ended, dict[str, Any]], tmp_path: Path
) -> None:
    tally = Tally()
    survive(starter, CASES["unll"], tmp_path / "run", whole, random.Random(4), tally, ["kill"], most=3, rows=_ROWS)
    assert tally.failures == []
    assert tally.n_struck >= 1 and tally.runs["unll"] == 1


@pytest.mark.parametrize("stages", [STAGES, pytest.param(ALL_STAGES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_signal_in_any_stage_ends_it_cleanly_and_the_same_command_goes_on(
    stages: tuple[str, ...], starter: Fork, whole: tuple[Ended, dict[str, Any]], tmp_path: Path
) -> None:
    """One after another in one run: each stage is struck as it begins to change files, then goes on."""
    case, folder = CASES["unll"], tmp_path / "run"
    order = {signal.SIGTERM: 130, signal.SIGINT: 130, signal.SIGUSR1: 75, signal.SIGUSR2: 75}
    struck = []
    for nth, stage in enumerate(stages):
        number, status = list(order.items())[nth % len(order)]
        ended = run(starter, case, folder, Strike("line", number, line=f"build {stage} "), _ROWS)
        assert ended.status == status or (ended.status == 0 and not ended.struck), (stage, ended)
        assert "Traceback" not in ended.log and ended.seconds < 60
        if ended.status:
            struck.append(stage)
            assert re.search(r"^interrupted", ended.log, re.MULTILINE), ended.log
            assert json.loads((folder / "run" / "result.json").read_text())["status"] == "interrupted"
            # Checkpoints of the stage, what they are of, and its folder if the signal came before its first file.
            assert leftovers(folder) <= 3
    assert {"sft", "preference"} <= set(struck)
    assert run(starter, case, folder, None, _ROWS).status == 0
    assert differences(whole[1], outcome(case, folder)) == []
    assert unsound(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_more_kills(name: str, starter: Fork, tmp_path: Path) -> None:
    tally, case = Tally(), CASES[name]
    (tmp_path / "whole").mkdir()
    found = undisturbed(starter, case, tmp_path / "whole", _ROWS)
    for nth in range(3):
        survive(starter, case, tmp_path / str(nth), found, random.Random(nth), tally, ["kill", "term"], rows=_ROWS)
    assert tally.failures == [] and tally.n_struck >= 3


@pytest.mark.slow
def test_real_commands_are_killed_as_well(tmp_path: Path) -> None:
    tally, case = Tally(), CASES["unll"]
    (tmp_path / "whole").mkdir()
    found = undisturbed(Command(), case, tmp_path / "whole", 0)
    survive(Command(), case, tmp_path / "run", found, random.Random(1), tally, ["kill", "usr1"], most=4)
    assert tally.failures == [] and tally.n_struck >= 1


def test_what_is_lost_or_differs_is_seen(whole: tuple[Ended, dict[str, Any]]) -> None:
    """The comparison itself: a changed bit, a lost row and a new one are three lines."""
    expected = whole[1]
    weights = next(name for name in expected if name.endswith("model.safetensors"))
    row = next(name for name in expected if name.startswith("generate"))
    found = {**expected, weights: "0" * 16, "generate new": "0"}
    del found[row]
    lines = differences(expected, found)
    assert len(lines) == 3
    assert any(line.startswith(f"{weights}: ") for line in lines)
    assert f"{row} is lost" in lines and "generate new is new" in lines
