"""The benchmarks' own arithmetic; what they measure is never asserted."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import growth, overhead, steps
from benchmarks.__main__ import main
from benchmarks.against_trl import _command
from benchmarks.rows import alternate_all, compared
from benchmarks.setting import Setting, examples, experiment, in_order, texts, with_third
from benchmarks.steps import flops
from benchmarks.turns import as_dppo_has_it, started
from dppo.batches import collate
from dppo.logps import ResponseScorer


def test_a_ratio_says_how_many_times_the_firsts_time_the_second_takes() -> None:
    """By hand: 6/2, 6/3 and 9/1 on the clock, 4/1, 4/2 and 4/4 of the cores."""
    own, other = [(2.0, 1.0), (3.0, 2.0), (1.0, 4.0)], [(6.0, 4.0), (6.0, 4.0), (9.0, 4.0)]
    row = compared("step", ("own", own), ("other", other), "note")
    assert (row.first_best, row.first_median, row.second_best, row.second_median) == (1.0, 2.0, 6.0, 6.0)
    assert (row.ratio_median, row.ratio_best, row.ratio_cpu, row.rounds) == (3.0, 6.0, 2.0, 3)
    assert row.noted("more").note == "note; more"


def test_contenders_take_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    actions = [(name, lambda name=name: calls.append(name)) for name in ("a", "b", "c")]
    rows = alternate_all("turns", actions[:2], actions[2], 3)
    assert calls == ["a", "b", "c"] * 4
    assert [(row.first, row.second, row.rounds) for row in rows] == [("a", "c", 3), ("b", "c", 3)]


def test_made_up_pairs_and_the_operations_of_a_step(tmp_path: Path) -> None:
    """By hand: 2 for a weight and token forward, 4 backward; the head, which is the embedding, at answer tokens.

    And 2 for a product with a key and 2 for its value's share, backward twice; queries see prompt and themselves.
    """
    setting = Setting("tiny", None, 200, str(tmp_path))
    pairs = examples(setting, 6)
    assert all(
        len(pair.prompt_ids) + max(len(one.token_ids) for one in pair.responses) <= 200 and len(pair.responses) == 2
        for pair in pairs
    )
    assert sorted(one.example_id for one in in_order(setting, 6)) == sorted(one.example_id for one in pairs)
    three = with_third(pairs)
    assert [one.role for one in three[0].responses] == ["chosen", "rejected", "generated"]
    hidden, inner, n_layers, kv, vocabulary = 192, 512, 2, 192, 719
    layer = hidden * (2 * hidden + 2 * kv) + 3 * hidden * inner + 2 * hidden
    n_tokens = sum(pair.n_tokens for pair in pairs)
    n_answer = sum(len(one.token_ids) for pair in pairs for one in pair.responses)
    expected = 6 * ((n_layers * layer + hidden) * n_tokens + hidden * vocabulary * n_answer)
    seen = 0
    for pair in pairs:
        prompt = len(pair.prompt_ids)
        seen += sum(range(1, prompt + 1))
        seen += sum(sum(range(prompt + 1, prompt + len(one.token_ids) + 1)) for one in pair.responses)
    assert flops(setting, pairs) == expected + 12 * seen * hidden * n_layers


def test_the_textbook_step_has_the_log_probs_of_the_scorer(tmp_path: Path) -> None:
    setting = Setting("tiny", None, 120, str(tmp_path))
    model = experiment(setting).model.load_model(0)
    batch = collate(with_third(examples(setting, 3)))
    with torch.no_grad():
        torch.testing.assert_close(steps._Textbook(model)(batch).tokens, ResponseScorer(model, "packed")(batch).tokens)


def test_balanced_pairs_and_long_ones(tmp_path: Path) -> None:
    """Of balanced pairs the shorter answer has nine tenths of the longer; made-up pairs grow with the limit."""
    balanced = examples(Setting("tiny", None, 200, str(tmp_path), balanced=True), 8)
    lengths = [sorted(len(one.token_ids) for one in pair.responses) for pair in balanced]
    assert len(balanced) == 8 and all(10 * shorter >= 9 * longer for shorter, longer in lengths)
    long = examples(Setting("tiny", None, 480, str(tmp_path)), 8)
    assert 200 < max(len(pair.prompt_ids) + max(len(one.token_ids) for one in pair.responses) for pair in long) <= 480


def test_a_setting_is_what_its_options_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is absent is said, and pairs are made up; too few pairs end the run in one line."""
    parser = argparse.ArgumentParser()
    Setting.add_options(parser)
    chosen = Setting("tiny", tmp_path, 99, "cache", True, 2, ("fp32",))
    for setting in (chosen, Setting("smollm2_135m", None, 160, "cache")):
        assert Setting.of(parser.parse_args(setting.options)) == setting
    absent = tmp_path / "absent"
    setting = Setting.of(parser.parse_args(["--pairs", str(absent), "--max-length", "5"]))
    assert setting.pairs is None
    assert f"--pairs {absent}: no such folder, pairs are made up instead" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0 such pairs, 1 are needed; raise --max-length"):
        texts(setting, 1)


def test_growth_has_a_row_for_each_size_and_times_equal_sizes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the prompt once for all answers when packed, once for each when padded."""
    monkeypatch.setattr(growth, "_USUAL", {"prompt": 4, "answer": 4, "answers": 2})
    monkeypatch.setattr(growth, "_SWEEPS", {"prompt": (4, 8), "answers": (2, 3)})
    rows = growth.growth(Setting("tiny", None, 160, str(tmp_path), batch_size=1), 1)
    assert [row.name for row in rows] == ["prompt 4, 2 x 4", "prompt 8, 2 x 4", "prompt 4, 2 x 4", "prompt 4, 3 x 4"]
    told = [row.note.split("; ")[0] for row in rows]
    tokens = [(12, 16), (16, 24), (12, 16), (16, 24)]
    assert told == [f"{packed} and {padded} tokens an example" for packed, padded in tokens]
    assert rows[0] == rows[2] and rows[0].note.endswith("1.00 of the usual step")


def test_what_a_loop_takes_is_a_part_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both loops pass the same hooks: every step has an end, and less is outside than a whole step takes."""
    monkeypatch.setattr(overhead, "_STEPS", 6)
    monkeypatch.setattr(overhead, "_WARM_UP", 2)
    setting = Setting("tiny", None, 120, str(tmp_path), batch_size=2)
    drawn = examples(setting, 12)
    for run in (overhead._dppo, overhead._trainer):
        stopwatch = overhead._Stopwatch()
        folder = tmp_path / run.__name__
        folder.mkdir()
        run(setting, drawn, None, stopwatch, folder)
        assert len(stopwatch._marks) == 6 and not stopwatch._begun
        assert 0 < stopwatch.outside()[0] < stopwatch.step()


def test_a_contender_takes_a_step_when_it_is_told_to(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The first step is the warm-up; between two turns the process does nothing, and one that fails is named."""
    setting = Setting("tiny", None, 100, str(tmp_path), batch_size=2, precisions=("fp32",))
    with started("own", _command(setting, "dppo fp32", 2), as_dppo_has_it()) as contender:
        contender.step()
        process = psutil.Process(contender._process.pid)
        before = process.cpu_times()
        time.sleep(0.5)
        after = process.cpu_times()
        assert after.user + after.system - before.user - before.system < 0.2
        contender.step()
        losses = contender.end()
    assert len(contender.timings) == 2 and all(min(timing) > 0 for timing in contender.timings)
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    impossible = dataclasses.replace(setting, max_length=5)
    with (
        pytest.raises(SystemExit, match="own ended with status 1"),
        started("own", _command(impossible, "dppo fp32", 1), as_dppo_has_it()),
    ):
        pass
    assert "raise --max-length" in capfd.readouterr().err


def test_a_step_is_compared_with_both_padded_ones(tmp_path: Path) -> None:
    rows = steps.step(Setting("tiny", None, 100, str(tmp_path), batch_size=2, precisions=("fp32",)), 1)
    padded, textbook = "padded, with reference", "textbook, with reference"
    assert [(row.name, row.first, row.second) for row in rows] == [
        (f"step, {n_answers} answers", "packed fp32", beside) for n_answers in (2, 3) for beside in (padded, textbook)
    ]
    assert all("GFLOP/s in fp32" in row.note for row in rows)


def test_the_table_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert main(["--only", "generation", "--rounds", "1", "--max-length", "120", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["machine"]["torch"] and written["arguments"]["model"] == "tiny"
    rows = {(row["first"], row["second"]): row for row in written["rows"]}
    exact = rows["dppo fp32", "generate fp32"]
    assert "16 of 16 texts equal" in exact["note"]
    assert exact["ratio_median"] == pytest.approx(exact["second_median"] / exact["first_median"])
    assert "generation: tiny, made-up pairs, at most 120 tokens, 4 a step" in capsys.readouterr().out
