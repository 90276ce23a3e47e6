"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import sys

import pytest

from dppo import progress
from dppo.progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def test_without_a_terminal_a_line_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten steps were done before; 6 more in 30 s are 0.2 a second, so that 84 steps take 420 s."""
    with Progress("train", 100, "step", start=10) as bar:
        bar.advance(3)
        clock.now += 29
        bar.advance()
        assert capsys.readouterr().err == ""
        bar.note("loss 0.5")
        clock.now += 1
        bar.advance(2)
        assert capsys.readouterr().err == "  train: 16/100 steps, 0.20/s, 420 s left  loss 0.5\n"
        clock.now += 10
        bar.advance()
        assert capsys.readouterr().err == ""
        clock.now += 20
        bar.note("")
        bar.advance(5)
        assert capsys.readouterr().err == "  train: 22/100 steps, 0.20/s, 390 s left\n"
    assert capsys.readouterr().err == ""


def test_the_share_of_a_process_stands_for_all(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes, 30 s: 4 of its own 5 answers are 7 of both processes' 9, 0.23 a second; 2 are left, 9 s."""
    with Progress("y_gen", 5, "answer", of=9) as bar:
        bar.advance(3)
        clock.now += 30
        bar.advance()
        assert capsys.readouterr().err == "  y_gen: 7/9 answers, 0.23/s, 9 s left\n"
        clock.now += 30
        bar.advance()
        assert "9/9" in capsys.readouterr().err


def test_of_several_processes_the_first_one_speaks(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("train", 3, "step") as bar:
        clock.now += 60
        bar.note("loss 0.5")
        bar.advance()
    assert capsys.readouterr().err == ""


def test_short_work_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 3, "step") as bar:
        for _ in range(3):
            bar.advance()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_on_a_terminal_a_bar_that_is_gone_afterwards(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("train", 4, "step", start=2) as bar:
        bar.note("loss 0.5")
        bar.advance()
        bar._bar.refresh()
        shown = capsys.readouterr().err
    assert "train" in shown and "3/4" in shown and "step" in shown and "loss 0.5" in shown and "75%" in shown
    assert "3/4" not in capsys.readouterr().err.rpartition("\r")[2]


def test_a_line_can_be_printed_where_the_bar_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("train", 100, "step") as bar:
        bar.advance(40)
        capsys.readouterr()
        bar.clear()
        cleared = capsys.readouterr().err
        assert cleared.endswith("\r")  # the cursor is at the start of an empty line
        assert cleared.strip() == ""
