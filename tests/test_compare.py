"""Comparisons of finished runs: by hand on run directories written here, and on real runs through the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dppo import compare
from dppo.errors import UserError
from dppo.evaluation.comparison import Line, compare_runs, configurations
from dppo.evaluation.runs import find_runs
from dppo.evaluation.win_rates import holm, paired_difference
from tests.conftest import small
from tests.runs import write_run
from tests.test_command_line import typed


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """dpo with two seeds, unll with three of which one diverged; win, loss, tie as 1, -1, 0."""
    for seed in (0, 1):
        write_run(tmp_path / f"dpo-{seed}", "loss=dpo", "train.steps=9", seed=seed, rewards=[1, 1, -1, 0])
    write_run(tmp_path / "unll-0", "loss=unll", "alpha=0.1", "train.steps=9", seed=0, rewards=[1, -1, -1, 0])
    write_run(tmp_path / "unll-1", "loss=unll", "alpha=0.1", "train.steps=9", seed=1, rewards=[-1, -1, -1, 0])
    write_run(tmp_path / "unll-2", "loss=unll", "alpha=0.1", "train.steps=9", seed=2, status="diverged")
    write_run(tmp_path / "stopped", "loss=unll", "alpha=0.1", "train.steps=9", seed=3, status="interrupted")
    return tmp_path


def compared(path: Path, metric: str = "win_rate", baseline: str | None = "loss=dpo") -> list[Line]:
    return compare_runs(configurations(find_runs([path])), metric=metric, baseline=baseline, n_bootstrap=500, seed=0)


def test_seeds_are_grouped_and_shared_words_are_left_out(runs: Path) -> None:
    dpo, unll = compared(runs)
    assert (dpo.label, unll.label) == ("loss=dpo", "loss=unll alpha=0.1")
    assert (dpo.seeds, unll.seeds, unll.diverged) == ((0, 1), (0, 1, 2), (2,))
    assert dpo.difference is None


def test_a_preset_is_named_only_where_nothing_else_tells(runs: Path) -> None:
    for name, words in (("x", ["experiment=one", "loss=ipo"]), ("y", ["experiment=two"])):
        write_run(runs / name, *words, "train.steps=9", seed=0, rewards=[1, 1, -1, 0])
    # A whole label is meant before a word of others.
    write_run(runs / "z", "loss=ipo", "beta=2", "train.steps=9", seed=0, rewards=[-1, -1, -1, 0])
    assert compared(runs, baseline="loss=ipo")[0].value.value == 0.625
    shutil.rmtree(runs / "z")
    labels = [one.label for one in configurations(find_runs([runs]))]
    assert sorted(labels) == ["experiment=two", "loss=dpo", "loss=ipo", "loss=unll alpha=0.1"]


def test_values_and_paired_differences_by_hand(runs: Path) -> None:
    """dpo: (1 + 1 + 0 + 1/2) / 4 in both seeds. unll: 1.5/4, 0.5/4, and a diverged run that lost everywhere: 2/12."""
    dpo, unll = compared(runs)
    assert dpo.value.value == pytest.approx(0.625)
    assert unll.value.value == pytest.approx(2 / 12)
    assert unll.difference is not None
    assert unll.difference.value == pytest.approx((1.5 + 0.5) / 8 - 0.625)  # over the common seeds 0 and 1
    assert (unll.n_common, dpo.n) == (2, 4)
    assert unll.difference.low <= unll.difference.value <= unll.difference.high
    assert unll.p is not None
    assert dpo.means["kl_nats_per_answer"] == 2.5
    rewards = compared(runs, "reward")
    assert [line.seeds for line in rewards] == [(0, 1), (0, 1)]  # a diverged run has no reward
    assert rewards[1].value.value == pytest.approx((-0.25 - 0.75) / 2)
    behind = compared(runs, "after_edit")
    assert behind[0].n == 3
    assert behind[0].value.value == pytest.approx(-1.0)
    ratios = compared(runs, "chosen_log_ratio")
    assert ratios[0].value.value == pytest.approx(1.25)
    assert compared(runs, "accuracy")[0].value.value == pytest.approx((1 + 1 + 0 + 0.5) / 4)


def test_the_newest_run_of_a_seed_counts(runs: Path) -> None:
    write_run(runs / "again", "loss=dpo", "train.steps=9", seed=1, rewards=[-1, -1, -1, -1])
    assert compared(runs)[0].value.value == pytest.approx((2.5 + 0) / 8)


def test_what_cannot_be_compared_is_one_line(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"matches no configuration of: loss=dpo; loss=unll alpha=0\.1"):
        compared(runs, baseline="loss=ipo")
    with pytest.raises(UserError, match="matches 2 configurations"):
        compared(runs, baseline="loss=")
    write_run(runs / "other", "loss=ipo", seed=0, rewards=[1, 1, -1, 0], first_prompt=7)
    with pytest.raises(UserError, match="different prompts or pairs"):
        compared(runs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished run"):
        find_runs([tmp_path / "empty"])
    (runs / "other" / "config.yaml").write_text("[")
    with pytest.raises(UserError, match="other: is not a run that can be read"):
        find_runs([runs])


def test_p_values_are_adjusted_as_holm_did() -> None:
    """0.01 * 3, max(0.03, 0.02 * 2), max(0.04, 0.04 * 1); and never above 1 or out of order."""
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


def test_simultaneous_intervals_are_wider() -> None:
    values = np.random.default_rng(0).normal(size=(1, 50))
    one, five = (
        paired_difference(values, np.zeros((1, 50)), n_bootstrap=4000, seed=0, comparisons=m)[0] for m in (1, 5)
    )
    ratio = (five.high - five.low) / (one.high - one.low)
    assert ratio == pytest.approx(2.576 / 1.960, rel=0.08)  # quantiles .995 and .975 of the normal distribution


def test_the_command_on_real_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, tmp_path, "-m", "loss=dpo,unll", "seed=0,1", *small(), "hydra.sweep.dir=sweep") == 0
    command = [sys.executable, "-m", "dppo.compare", "sweep", "--n-bootstrap", "200"]
    done = subprocess.run(
        [*command, "--baseline", "loss=dpo", "--json", "out.json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    head, rule, dpo, unll, _, *notes = done.stdout.splitlines()
    assert set(rule) == {"-"}
    assert head.split()[:3] == ["configuration", "seeds", "win_rate"]
    assert dpo.startswith("loss=dpo ")
    assert "baseline" in dpo
    assert unll.startswith("loss=unll ")
    assert "n = 8" in notes[0]
    found = json.loads((tmp_path / "out.json").read_text())
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/result.json"))]
    for line, word in zip(found["lines"], ("loss=dpo", "loss=unll"), strict=True):
        own = [result["win_rate"]["value"] for result in results if word in result["command"]]
        assert line["value"]["value"] == pytest.approx(sum(own) / 2)
    capsys.readouterr()
    assert compare.main([*command[3:], "--metric", "after_edit"]) == 0
    assert f"The SFT model: {results[0]['after_edit']['reference']['value']:.3f}." in capsys.readouterr().out
    check_head_to_head(tmp_path / "sweep" / "0", tmp_path / "sweep" / "2", tmp_path / "two.json", capsys)
    for wrong in (["nowhere"], ["sweep", "--baseline", "nope"], ["sweep", "--metric", "nope"]):
        assert compare.main(wrong) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")


def check_head_to_head(first: Path, second: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page of two real runs: no colour where nobody looks, and the numbers that the runs told themselves."""
    assert compare.main([str(first), str(second), "--json", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "\x1b" not in said.out
    found = json.loads(out.read_text())
    by_name = {one["name"]: one for one in found["metrics"]}
    rows = []
    for side, path in (("first", first), ("second", second)):
        own = {name: one[side] for name, one in by_name.items()}
        result = json.loads((path / "result.json").read_text())
        assert own["win rate against SFT"]["value"] == pytest.approx(result["win_rate"]["value"])
        assert own["strict win rate"]["low"] == pytest.approx(result["win_rate"]["strict_ci_low"])
        assert own["reward gain over SFT"]["value"] == pytest.approx(result["reward"]["delta"]["value"])
        assert own["negative rewards"]["value"] == result["reward"]["negative_share"]["policy"]
        assert own["answer characters"]["value"] == pytest.approx(result["length"]["policy"]["characters"])
        assert own["held-out accuracy"]["value"] == pytest.approx(result["held_out"]["accuracy"])
        assert own["log p behind edit"]["value"] == pytest.approx(result["after_edit"]["policy"]["value"])
        assert own["ended by itself"]["n"] == 8
        rows.append([json.loads(line)["policy_reward"] for line in (path / "samples.jsonl").read_text().splitlines()])
    assert found["duel"]["wins"] == sum(own > other for own, other in zip(*rows, strict=True))
    assert found["duel"]["ties"] == sum(own == other for own, other in zip(*rows, strict=True))
    assert "loss" in [one["key"] for one in found["settings"]]


def test_one_seed_is_said_to_say_little(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs / "ipo-0", "loss=ipo", "train.steps=9", seed=0, rewards=[1, -1, 1, 0])
    paths = [str(runs / name) for name in ("dpo-0", "unll-0", "ipo-0")]
    for words in ([], ["--ranking"]):
        assert compare.main([*paths, *words, "--n-bootstrap", "200"]) == 0
        assert "One seed each" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", [["dppo.cache", "ls"], ["dppo.compare", "outputs"], ["dppo.methods"]])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(command: list[str], tmp_path: Path) -> None:
    write_run(tmp_path / "outputs" / "run", "loss=dpo", seed=0, rewards=[1, -1])
    (tmp_path / "outputs" / "cache").mkdir()
    started = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    started.stdout.close()
    _, said = started.communicate(timeout=60)
    assert (started.returncode, said) == (0, "")
