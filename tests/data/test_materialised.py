"""What only the ``datasets`` library can read: made once by content, never served under a folder's name."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from dppo.data.sources import Published
from dppo.data.tables import read_rows
from dppo.errors import UserError

README = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: rows/part-*}
  - {split: test, path: held/part-*}
---
"""


def folder(path: Path, word: str) -> Path:
    """Rows in files whose names say nothing about splits; the README does."""
    for part, name in (("rows", "train"), ("held", "test")):
        (path / part).mkdir(parents=True, exist_ok=True)
        rows = [{"messages": [{"role": "user", "content": f"{name} {word} {n}"}]} for n in range(3)]
        (path / part / "part-a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "README.md").write_text(README)
    return path


def source(path: Path, cache: Path, **changed: Any) -> Published:
    settings = {"config": None, "train_split": "train", "validation_split": None, "test_split": "test"} | changed
    return Published("dataset.path", str(path), "main", cache_dir=str(cache), **settings)


def words(found: Published, split: Any = "test") -> list[str]:
    rows = read_rows(found.files(split), ["messages"])
    return [row["messages"][0]["content"] for row in rows]  # type: ignore[index]


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place where ``datasets`` would keep things by folder name, if it were asked to."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "hf_modules"))


def test_two_folders_of_one_name_and_a_rewritten_one_are_told_apart(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ours = source(folder(tmp_path / "a" / "same", "ours"), cache)
    theirs = source(folder(tmp_path / "b" / "same", "theirs"), cache)
    assert words(ours) == [f"test ours {n}" for n in range(3)]
    assert words(theirs) == [f"test theirs {n}" for n in range(3)]
    assert words(ours, "train") == [f"train ours {n}" for n in range(3)]
    before = ours.identity()
    assert before != theirs.identity()
    folder(tmp_path / "a" / "same", "anew")
    assert words(ours) == [f"test anew {n}" for n in range(3)]
    assert ours.identity() != before
    assert not (tmp_path / "hf").exists()


def test_the_trap_is_there(tmp_path: Path) -> None:
    """Without a cache directory of its own ``datasets`` serves one folder as the other: if not, this can be simpler."""
    import datasets

    datasets.disable_progress_bars()
    shared = str(tmp_path / "shared")
    served = [
        datasets.load_dataset(str(folder(tmp_path / place / "same", place)), split="test", cache_dir=shared)[0]
        for place in ("a", "b")
    ]
    assert served[0] == served[1]


def test_a_split_is_made_once_and_identity_does_not_know_where(tmp_path: Path) -> None:
    path = folder(tmp_path / "data", "x")
    (made,) = source(path, tmp_path / "cache").files("test")
    stamp = made.stat().st_mtime_ns
    assert source(path, tmp_path / "cache").files("test") == [made]
    assert made.stat().st_mtime_ns == stamp
    assert made.is_relative_to(tmp_path / "cache")
    assert source(path, tmp_path / "cache").identity() == source(path, tmp_path / "elsewhere").identity()
    (path / "rows" / "part-a.jsonl").rename(path / "rows" / "part-b.jsonl")  # a name is content: patterns go by it
    assert source(path, tmp_path / "cache").files("test") != [made]


def _read(path: Path, cache: Path, answers: Any, both: Any) -> None:
    both.wait(120)
    answers.put((os.getpid(), words(source(path, cache)), str(source(path, cache).files("test")[0])))


def test_two_processes_at_once_make_one(tmp_path: Path) -> None:
    path = folder(tmp_path / "data", "x")
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    given = (path, tmp_path / "cache", answers, context.Barrier(2))
    process = context.Process(target=_read, args=given)
    process.start()
    _read(*given)
    found = [answers.get(timeout=120) for _ in range(2)]
    process.join(60)
    assert process.exitcode == 0
    assert found[0][0] != found[1][0]
    assert found[0][1:] == found[1][1:] == ([f"test x {n}" for n in range(3)], found[0][2])
    assert len(list((tmp_path / "cache" / "data").iterdir())) == 1
    assert not list((tmp_path / "cache" / ".building").iterdir())


def test_what_cannot_be_read_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    path = folder(tmp_path / "data", "x")
    with pytest.raises(UserError, match=r"dataset\.path=.*: its split valid cannot be read \(.*valid") as caught:
        source(path, tmp_path / "cache", test_split="valid").files("test")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("data/*"))
    (path / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(UserError, match=r"has no split test \(data/test-\* or test-\*.*found held/part-a\.jsonl"):
        source(path, tmp_path / "cache").files("test")


def test_files_that_name_their_split_are_read_where_they_are(tmp_path: Path) -> None:
    path = folder(tmp_path / "data", "x")
    (path / "test.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "by name"}]}) + "\n")
    assert words(source(path, tmp_path / "cache")) == ["by name"]
    (path / "data" / "other").mkdir(parents=True)
    (path / "data" / "other" / "test-00000-of-00001.jsonl").write_text('{"messages": [{"content": "of a config"}]}\n')
    assert words(source(path, tmp_path / "cache", config="other")) == ["of a config"]
    (path / "test.jsonl").unlink()
    (path / "test").mkdir()
    (path / "test" / "0000.jsonl").write_text('{"messages": [{"content": "in a folder"}]}\n')
    assert words(source(path, tmp_path / "cache")) == ["in a folder"]
    assert not (tmp_path / "cache").exists()
