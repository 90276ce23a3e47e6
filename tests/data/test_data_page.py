"""docs/data.md: its commands compose, its table has every option, its example of a schema works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from dppo.config import CONF_DIR, compose, load
from dppo.data import Dataset
from dppo.data.rows import Columns, Row, UnusableRow, make_example
from dppo.types import Message, PreferenceExample, Response

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str) -> None:
    words = shlex.split(command)[3:]
    experiment = load(compose(words), words)
    assert isinstance(experiment.dataset, Dataset)


def test_every_option_is_in_the_table() -> None:
    named = {name for line in PAGE.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)}
    assert {path.stem for path in (CONF_DIR / "dataset").glob("*.yaml")} - {"on_policy"} <= named


def test_the_schema_of_the_page_makes_examples() -> None:
    from dataclasses import dataclass

    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {
        one.__name__: one
        for one in (Columns, UnusableRow, make_example, Message, PreferenceExample, Response, dataclass)
    }
    names["Row"] = Row
    exec(compile(code, "docs/data.md", "exec"), names)
    columns = names["VersesColumns"]("verse", "better", "worse")
    assert isinstance(columns, Columns)
    example = columns.example({"verse": "a", "better": "b", "worse": "c"}, True)
    assert [response.text for response in example.responses] == ["b", "c"]
    with pytest.raises(UnusableRow, match="a line is missing"):
        columns.example({"verse": "a", "better": None, "worse": "c"}, True)
