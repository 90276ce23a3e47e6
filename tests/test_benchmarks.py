"""The benchmarks' own arithmetic; what they measure is never asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.rows import alternate_all, compared
from benchmarks.setting import Setting, examples, in_order, with_third
from benchmarks.steps import flops


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
    """By hand: 2 for a weight and token forward, 4 backward; the head, which is the embedding, at answer tokens."""
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
    assert flops(setting, pairs) == expected


def test_the_table_and_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert main(["--only", "generation", "--rounds", "1", "--max-length", "120", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["machine"]["torch"] and written["arguments"]["model"] == "tiny"
    rows = {(row["first"], row["second"]): row for row in written["rows"]}
    exact = rows["dppo fp32", "generate fp32"]
    assert "16 of 16 texts equal" in exact["note"]
    assert exact["ratio_median"] == pytest.approx(exact["second_median"] / exact["first_median"])
    assert "generation: made-up pairs, at most 120 tokens" in capsys.readouterr().out
