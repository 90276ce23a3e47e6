"""Generation as a stage: what a kill costs, and how fast it says it was."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dppo.generation import Greedy
from dppo.progress import Progress
from dppo.results import summary, timings
from tests.answered import PROMPTS, answered, settings, write_model
from tests.conftest import outside
from tests.test_vllm import alive, all_end
from tests.vllm_stand_in import installed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    write_model(found)
    return found


@pytest.mark.parametrize("engine", ["own", "vllm"])
def test_kill_9_costs_no_finished_batch(
    engine: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the ninth answer; the same stage then makes the last four, and all are as ever.

    The engine's process and its workers end too, although nobody told them.
    """
    python = "none" if engine == "own" else installed(tmp_path, "9.8.7+cpu")
    notes = tmp_path / "notes.jsonl"
    notes.touch()
    monkeypatch.setenv("VLLM_STAND_IN_NOTES", str(notes))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def told(kind: str) -> list[dict[str, list[int]]]:
        return [row for row in map(json.loads, notes.read_text().splitlines()) if kind in row]

    killed = subprocess.Popen(
        [sys.executable, "-m", "tests.answered", str(tmp_path / "cache"), str(folder), python],
        env={**outside(), "VLLM_STAND_IN": "stall 3", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if engine == "own":
            assert killed.stdout is not None and killed.stdout.readline() == "stuck\n"
        else:
            until = time.monotonic() + 60
            while len(told("prompts")) < 3 and time.monotonic() < until:
                time.sleep(0.05)
            assert all(map(alive, told("pids")[0]["pids"]))
    finally:
        killed.kill()
        killed.communicate()
    if engine == "vllm":
        assert len(told("prompts")) == 3
        assert all_end(told("pids")[0]["pids"])

    bench, found = answered(tmp_path / "cache", folder, settings(python))
    assert bench.records[0].rows == 4
    if engine == "vllm":
        assert [len(one["prompts"]) for one in told("prompts")[3:]] == [4]
    undisturbed, expected = answered(tmp_path / "apart", folder, settings(python))
    assert undisturbed.records[0].rows == 12
    assert found == expected and list(found) == [prompt.prompt_id for prompt in PROMPTS]


def test_a_stage_says_how_fast_the_model_wrote(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: shown.append(text))
    bench, found = answered(tmp_path, folder, Greedy(8, 1, "fp32"))
    n_tokens = sum(len(one.token_ids) for one in found.values())
    assert len(shown) == 12 and all(text.endswith(" tokens/s") for text in shown)
    pace = bench.records[0].pace
    assert pace is not None and pace.tokens == n_tokens
    assert 0 < pace.seconds < bench.records[0].seconds  # without loading the model
    (row,) = timings(bench)["stages"]
    assert row["rows"] == 12 and row["tokens"] == n_tokens
    assert row["tokens_per_second"] == pytest.approx(n_tokens / pace.seconds, abs=0.06)

    again, _ = answered(tmp_path, folder, Greedy(8, 1, "fp32"))
    (row,) = timings(again)["stages"]
    assert row["tokens"] is None and row["tokens_per_second"] is None

    result = {"status": "diverged", "diverged": {"phase": "main", "step": 1, "example_ids": ["a"]}}
    ended = {**result, "timings": {**timings(bench), "total_seconds": 1.0}}
    assert f"  tokens/s (tokens)     y_gen {round(pace.tokens_per_second, 1):,.0f} ({n_tokens:,})" in summary(
        ended, tmp_path
    )
    ended = {**result, "timings": {**timings(again), "total_seconds": 1.0}}
    assert not any("tokens/s" in line for line in summary(ended, tmp_path))
