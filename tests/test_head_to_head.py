"""Two runs head to head: values worked out by hand, what can't be compared, and answers that would do harm."""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from dppo import compare
from dppo.evaluation.comparison import SettingDifference, differences_of_settings
from dppo.evaluation.head_to_head import HeadToHead, MetricLine, head_to_head
from dppo.evaluation.runs import read_runs
from dppo.evaluation.win_rates import wilson
from dppo.terminal import shown_width
from tests.runs import write_run

UNLL = {"loss": {"_target_": "dppo.losses.penalised.UnLL", "alpha": 0.1}, "alpha": 0.1}
DPO = {"loss": {"_target_": "dppo.losses.pairwise.DPO"}, "cache": {"dir": "elsewhere"}}


def pair(path: Path, **second: Any) -> tuple[Path, Path]:
    """Two runs on four prompts whose SFT model has reward 0 everywhere."""
    write_run(path / "a", "loss=dpo", seed=0, rewards=[3, 1, -1, 0], settings=DPO)
    chosen = {"rewards": [1, 2, -1, 0], "settings": UNLL, **second}
    write_run(path / "b", "loss=unll", "alpha=0.1", seed=1, **chosen)
    return path / "a", path / "b"


def fought(paths: tuple[Path, Path], n_samples: int = 2) -> HeadToHead:
    runs = {run.path: run for run in read_runs(paths)[0]}
    return head_to_head(runs[paths[0]], runs[paths[1]], n_samples=n_samples, n_bootstrap=500, seed=0)


def line(found: HeadToHead, name: str) -> MetricLine:
    return next(one for one in found.metrics if one.name == name)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert compare.main([*words, "--n-bootstrap", "200"]) == 0
    return capsys.readouterr().out


def test_values_by_hand(tmp_path: Path) -> None:
    """A: 3, 1, -1, 0 against SFT's 0: 2.5 / 4. B: 1, 2, -1, 0. A against B: a win, a loss, two ties."""
    found = fought(pair(tmp_path))
    rate = line(found, "win rate against SFT")
    assert rate.first is not None and rate.second is not None and rate.difference is not None
    assert (rate.first.value, rate.second.value, rate.difference.value, rate.p) == (0.625, 0.625, 0.0, 1.0)
    strict = line(found, "strict win rate")
    assert strict.first is not None
    assert (strict.first.value, strict.first.low, strict.first.high, strict.first.n) == (0.5, *wilson(2, 4), 4)
    reward = line(found, "reward")
    assert reward.difference is not None and reward.p is not None
    assert (reward.difference.value, reward.n_common) == ((3 + 1 - 1 - (1 + 2 - 1)) / 4, 4)
    assert reward.difference.low <= 0.25 <= reward.difference.high
    gain = line(found, "reward gain over SFT")
    assert gain.first is not None
    assert (gain.first.value, gain.difference, gain.p) == (0.75, None, None)  # the same test as the reward's
    negative = line(found, "negative rewards")
    assert negative.first is not None
    assert negative.first.value == 0.25
    # log-probs of chosen: -2 + reward against -2: the held-out pairs of write_run.
    accuracy = line(found, "held-out accuracy")
    assert accuracy.first is not None and accuracy.second is not None
    assert accuracy.first.value == accuracy.second.value == (1 + 1 + 0 + 0.5) / 4
    behind = line(found, "log p behind edit")
    assert behind.first is not None and behind.n_common == 3
    assert behind.first.value == pytest.approx(-1 + (1 - 1 + 0) / 3)
    assert line(found, "KL, nats an answer").first is not None
    assert found.duel is not None
    assert (found.duel.rate.value, found.duel.wins, found.duel.ties, found.duel.losses) == (0.5, 1, 2, 1)
    assert found.n_tests == 8  # win rate, strict, reward, negative, characters, accuracy, behind edit, the duel
    assert found.notes == ()


def test_p_values_are_adjusted_over_all_tests_of_the_page(tmp_path: Path) -> None:
    """A wins everywhere: the smallest p value is that of tests whose resamples all agree, 2 / 501, times 8 of them."""
    write_run(tmp_path / "a", "loss=dpo", seed=0, rewards=[1.0] * 40, answers=["x"] * 40)
    write_run(tmp_path / "b", "loss=unll", seed=0, rewards=[-1.0] * 40, answers=["x"] * 40)
    found = fought((tmp_path / "a", tmp_path / "b"))
    assert found.duel is not None
    assert found.duel.p == pytest.approx(8 * 2 / 501)
    assert line(found, "answer characters").p == 1.0
    assert line(found, "reward").p == pytest.approx(8 * 2 / 501)


def test_differences_of_settings() -> None:
    first = {"seed": 0, "device": "cpu", "beta": 1, "hydra": {"x": 1}, "dry_run": True, "train": {"steps": 9, "n": [1]}}
    second = {**first, "device": "cuda", "beta": 2, "hydra": None, "train": {"steps": 8, "n": [1], "lora": None}}
    assert differences_of_settings(first | DPO, second | UNLL) == [
        SettingDifference("train.steps", "9", "8"),
        SettingDifference("loss", "DPO", "UnLL"),
        SettingDifference("train.lora", None, "null"),
        SettingDifference("loss.alpha", None, "0.1"),
    ]
    assert differences_of_settings(first, first) == []


def test_samples_are_the_largest_gains_both_ways_and_one_of_equal_rewards(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "loss=dpo", seed=0, rewards=[5, 1, 0, -1, 2, 2], answers=list("abcdef"))
    write_run(tmp_path / "b", "loss=unll", seed=0, rewards=[0, 0, 4, 0, 2, 2], answers=["", "", "", "", "e", "F"])
    found = fought((tmp_path / "a", tmp_path / "b"), n_samples=1)
    assert [(one.prompt_id, one.gain) for one in found.samples] == [("p0", 5), ("p2", -4), ("p5", 0)]
    assert (found.samples[0].first, found.samples[0].second, found.samples[0].reference) == ("a", "", "none")
    many = fought((tmp_path / "a", tmp_path / "b"), n_samples=9)
    assert [one.prompt_id for one in many.samples] == ["p0", "p1", "p2", "p3", "p5"]
    assert fought((tmp_path / "a", tmp_path / "b"), n_samples=0).samples == ()


# --- what cannot be compared ------------------------------------------------------------------------------------------


def test_other_prompts_are_said_and_pairs_compared_still(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = pair(tmp_path, first_prompt=9)
    found = fought(paths)
    assert found.duel is None and found.samples == ()
    assert line(found, "reward").difference is None
    assert line(found, "held-out accuracy").difference is not None
    text = shown(capsys, *map(str, paths))
    assert "different prompts: A answered 4, B 4, none in common" in text
    assert "over the 2 tests" in " ".join(text.split())


def test_some_common_prompts_are_compared(tmp_path: Path) -> None:
    """A's p2 and p3 (-1, 0) against B's first two (1, 2): two losses."""
    found = fought(pair(tmp_path, first_prompt=2))
    assert found.duel is not None
    assert (found.duel.n, found.duel.losses) == (2, 2)
    assert line(found, "reward").n_common == 2
    assert "differences are over the 2 in common" in found.notes[0]


def test_other_rewards_are_not_paired(tmp_path: Path) -> None:
    found = fought(pair(tmp_path, settings={"reward": {"_target_": "dppo.rewards.length.Length"}}))
    assert found.duel is None and found.samples == ()
    assert line(found, "win rate against SFT").difference is None
    assert line(found, "answer characters").difference is not None
    assert found.notes[0].startswith("different rewards")


def test_another_sft_model_is_said_and_the_gain_tested(tmp_path: Path) -> None:
    paths = pair(tmp_path)
    rows = [json.loads(row) for row in (paths[1] / "samples.jsonl").read_text().splitlines()]
    rows[0]["reference_reward"] = 7.0
    (paths[1] / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = fought(paths)
    assert line(found, "reward gain over SFT").difference is not None
    assert found.notes[0].startswith("different SFT answers")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("diverged", "diverged; counts as losing every prompt, has no answers"),
        ("pruned", "pruned; has no numbers to compare"),
        ("interrupted", "interrupted; has no numbers to compare"),
        ("unfinished", "unfinished: no result.json (failed, killed or still running); has no numbers to compare"),
    ],
)
def test_runs_without_numbers_have_a_line(
    status: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    paths = pair(tmp_path, status=status, rewards=())
    if status == "unfinished":
        (paths[1] / "result.json").unlink()
    text = shown(capsys, *map(str, paths))
    assert f"   {said}" in text.splitlines()
    assert "loss        DPO  UnLL" in text
    assert "strict win rate" in text and "A - B" not in text


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_page_keeps_to_the_width_and_harmful_answers_to_their_place(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    evil = ["\x1b[2J\x1b[31mgone", "a\r\u202egnol" + "x" * 5000, "\x9b1A\x08\x08" + "日本" * 60, "l1\nl2\u2028l3"]
    paths = pair(tmp_path, answers=evil)
    text = shown(capsys, *map(str, paths), "--samples", "4")
    assert "␛[2J␛[31mgone" in text
    assert r"a␍\u202egnol" in "".join(text.split())
    assert "(800of5007characters)" in "".join(text.split())
    room = max(width, 80)  # tables need that much
    for row in text.splitlines():
        assert shown_width(row) <= room, row
        assert not any(unicodedata.category(sign) in ("Cc", "Cf", "Zl", "Zp") for sign in row), row


def test_names_are_as_harmless_as_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels come from command.txt, paths from the disk: both may be somebody else's."""
    first, _ = pair(tmp_path)
    odd = write_run(tmp_path / "c\x1b[2J", "loss=ipo", seed=0, rewards=[0, 1, 1, 0], settings={"loss": "x\x1b[0m"})
    (odd / "command.txt").write_text("python -m dppo 'loss=\x1b[31mipo' seed=0")
    for words in ([str(tmp_path)], [str(tmp_path), "--ranking"], [str(first), str(odd)]):
        text = shown(capsys, *words)
        assert "loss=␛[31mipo" in text and "\x1b" not in text
    (odd / "result.json").write_text("{")
    assert "c␛[2J: result.json is not JSON" in shown(capsys, str(tmp_path))
    assert compare.main([str(odd)]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_one_configuration_is_ranked_against_sft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", "loss=dpo", seed=0, rewards=[1, 1, 1, -1])
    text = shown(capsys, str(tmp_path), "--ranking")
    assert "1 loss=dpo" in text and "75.0" in text and "over 1 comparison." in text


def test_numbers_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = pair(tmp_path)
    shown(capsys, *map(str, paths), "--json", str(tmp_path / "two.json"))
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["A"] == {
        "path": str(paths[0]),
        "words": ["loss=dpo", "seed=0", "cache.dir=x"],
        "seed": 0,
        "ending": "complete",
    }
    assert two["duel"]["rate"]["value"] == 0.5
    assert {"key": "seed", "first": "0", "second": "1"} in two["settings"]
    shown(capsys, str(tmp_path), "--ranking", "--json", str(tmp_path / "many.json"))
    many = json.loads((tmp_path / "many.json").read_text())
    assert many["labels"] == ["SFT", "loss=dpo", "loss=unll alpha=0.1"]
    assert many["ranking"]["rate"][1] == [0.625, 0.5, 0.5]
    assert many["ranking"]["common_seeds"][1][2] == 0


def test_the_ranking_is_printed_best_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        write_run(tmp_path / f"good-{seed}", "loss=dpo", seed=seed, rewards=[1.0, 2.0, 0.0] * 20)
        write_run(tmp_path / f"bad-{seed}", "loss=unll", seed=seed, rewards=[-1.0, -2.0, 3.0] * 20)
    write_run(tmp_path / "bad-2", "loss=unll", seed=2, status="diverged")
    assert compare.main([str(tmp_path), "--ranking"]) == 0
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["configuration", "seeds", "rating,", "nats", "Elo", "beats", "loses", "to"]
    assert [row.split()[1] for row in rows[:3]] == ["loss=dpo", "SFT", "loss=unll"]
    assert rows[0].split()[-2:] == ["2", "0"]
    assert "0 by definition" in rows[1]
    assert "3 (1 diverged)" in rows[2]
    assert not any("…" in row for row in rows)
    # dpo against SFT: two wins and a tie of three; SFT against unll: as many wins, and all of the diverged run's.
    matrix = "\n".join(rows)
    assert "83.3*" in matrix and "77.8*" in matrix


def test_many_configurations_with_long_labels_keep_to_the_width(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for place in range(12):
        words = ("loss=unll", f"train.learning_rate=0.00{place:03}")
        write_run(tmp_path / str(place), *words, seed=0, rewards=[place, place % 3, -place, 1])
    text = shown(capsys, str(tmp_path), "--ranking").splitlines()
    assert max(map(len, text)) <= 80
    assert text[2].startswith("1 ") and text[2].count("…") == 1
    whole = [row for row in text if re.fullmatch(r"\d+: train\.learning_rate=0\.000\d\d", row)]
    assert len(whole) == 12  # what the tables cut off is below the first
    assert sum(row.split()[:2] == ["1", "2"] for row in text) == 1  # columns in blocks
    assert any(row.split() and row.split()[-1] == "13" for row in text)
    # 200 resamples can't tell 78 comparisons apart: what could is said.
    assert "--n-bootstrap 4000" in " ".join(text)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ranking", "--metric", "accuracy"], "--metric accuracy: a ranking is by rewards"),
        (["--samples", "-1"], "-1: must be a whole number, at least 0"),
        (["--n-bootstrap", "7"], "7: must be a whole number, at least 100"),
        (["--ranking", "--baseline", "nope"], "--baseline nope: matches no configuration"),
    ],
)
def test_what_the_user_must_mend_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = pair(tmp_path)
    assert compare.main([*map(str, paths), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_what_cannot_be_ranked_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = pair(tmp_path, first_prompt=9)
    assert compare.main([str(tmp_path), "--ranking"]) == 2
    assert "no prompt was answered by all" in capsys.readouterr().err
    write_run(tmp_path / "c", "loss=ipo", seed=0, rewards=[1, 1, 1, 1], settings={"reward": "other"})
    assert compare.main([str(first), str(tmp_path / "c"), "--ranking"]) == 2
    assert "different rewards" in capsys.readouterr().err
    assert compare.main([str(first), str(first)]) == 2
    assert "are one and the same run" in capsys.readouterr().err
    lost = write_run(tmp_path / "d", "loss=ipo", seed=0, status="diverged")
    assert compare.main([str(lost), "--ranking"]) == 2
    assert "none of these runs has answers" in capsys.readouterr().err
    assert second.exists()


def test_a_terminal_without_the_signs_shows_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = pair(tmp_path, answers=["\x1b", "é", "日", "x"])
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    assert compare.main([*map(str, paths), "--n-bootstrap", "100"]) == 0
    assert rb"\u241b" in buffer.getvalue() and b"\x1b" not in buffer.getvalue()
