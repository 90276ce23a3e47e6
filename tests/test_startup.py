from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from dppo import startup


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_between_begin_and_end() -> None:
    startup.begin()
    assert not gc.isenabled()
    startup.end()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


def test_end_alone_freezes_nothing() -> None:
    gc.unfreeze()
    startup.end()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
