"""Signals that ask for an end: at once, later, twice, and those that a launcher has taken."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from dppo import stopping
from dppo.stopping import REQUESTS, Resumable, Stopped, go_on, later, on_request, raise_again, status, wait


@pytest.fixture(autouse=True)
def handlers_are_restored() -> Iterator[None]:
    before = [signal.getsignal(number) for number in REQUESTS]
    yield
    assert [signal.getsignal(number) for number in REQUESTS] == before


@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75)],
)
def test_a_signal_stops_at_once_and_its_status_says_whether_to_requeue(number: signal.Signals, expected: int) -> None:
    with pytest.raises(Stopped) as stopped, on_request():
        signal.raise_signal(number)
        pytest.fail("goes on")
    assert stopped.value.signum == number
    assert status(stopped.value) == status(Resumable("this continues", number)) == expected
    assert status(KeyboardInterrupt()) == 130


def test_what_must_not_be_cut_is_finished_first() -> None:
    done = []
    with pytest.raises(Stopped), on_request():
        with later():
            signal.raise_signal(signal.SIGTERM)
            done.append("written")
        pytest.fail("goes on")
    with pytest.raises(Stopped), on_request():
        wait()
        signal.raise_signal(signal.SIGUSR1)
        done.append("committed")
        go_on()
    assert done == ["written", "committed"]
    with on_request(), later():
        pass
    go_on()  # outside of any block there is nothing to wait for


def test_a_second_signal_acts_as_it_would_have(sigint_as_in_a_terminal: None) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped, on_request():
        wait()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("goes on")
    assert not isinstance(stopped.value, Stopped)


def test_what_somebody_made_of_it_is_a_stop_again() -> None:
    with on_request():
        raise_again()
    with pytest.raises(Stopped) as stopped, on_request():
        try:
            signal.raise_signal(signal.SIGUSR1)
        except BaseException:
            raise_again()
    assert stopped.value.signum == signal.SIGUSR1


def test_a_block_within_another_changes_nothing() -> None:
    with on_request():
        outer = [signal.getsignal(number) for number in REQUESTS]
        with on_request():
            assert [signal.getsignal(number) for number in REQUESTS] == outer
        assert [signal.getsignal(number) for number in REQUESTS] == outer


def test_the_signal_of_a_launcher_is_handed_on_when_all_is_stored() -> None:
    """As submitit has it: SIGTERM is let pass, and the other one requeues the job."""
    told: list[Any] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    signal.signal(signal.SIGTERM, lambda number, frame: told.append("let pass"))
    signal.signal(signal.SIGUSR2, lambda number, frame: told.append("requeued"))
    try:
        with pytest.raises(Stopped), on_request():
            signal.raise_signal(signal.SIGTERM)
            try:
                signal.raise_signal(signal.SIGUSR2)
            finally:
                told.append("stored")
        assert told == ["let pass", "stored", "requeued"]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ignored_signals_and_other_threads_are_left_alone() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with on_request():
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(stopping.handlers(lambda number, frame: None)))
    thread.start()
    thread.join()
    assert found == [{}]


def test_it_can_be_sent_between_processes() -> None:
    sent = copy.copy(Stopped("after step 3", signal.SIGTERM))  # is made anew, as behind a pipe
    assert (str(sent), sent.signum) == ("after step 3", signal.SIGTERM)
