"""Ranked groups and labelled answers from files: shapes, splits, and what is left out."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dppo.data import Dataset, LabelledDataset, RankedDataset
from dppo.data.files import LabelledFile, RankedFile
from dppo.data.rows import LabelledColumns, RankedColumns
from dppo.errors import UserError

Row = dict[str, Any]


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SETTINGS: dict[str, Any] = {
    "test_path": None,
    "sft_path": None,
    "single_turn": True,
    "validation_share": 0.2,
    "test_share": 0.3,
    "seed": 0,
}


def ranked(path: Path, rows: Sequence[Row], **changed: Any) -> RankedFile:
    columns = changed.pop("columns", RankedColumns("prompt", "responses", "scores", None))
    return RankedFile(**SETTINGS | {"path": str(write(path, rows)), "columns": columns} | changed)


def labelled(path: Path, rows: Sequence[Row]) -> LabelledFile:
    columns = LabelledColumns("prompt", "completion", "label")
    return LabelledFile(**SETTINGS, path=str(write(path, rows)), columns=columns)


def group(number: int, responses: Sequence[Any] = ("a", "b", "c"), scores: Sequence[Any] = (1, 3, 2)) -> Row:
    return {"prompt": f"question {number}", "responses": list(responses), "scores": list(scores)}


GROUPS = [group(number) for number in range(60)]


def test_groups_keep_their_answers_and_scores(tmp_path: Path) -> None:
    data = ranked(tmp_path / "ranked.jsonl", GROUPS)
    assert isinstance(data, Dataset)
    assert isinstance(data, RankedDataset)
    assert not isinstance(data, LabelledDataset)
    found = [example for split in ("train", "validation", "test") for example in data.ranked(split)]
    assert len({example.prompt.prompt_id for example in found}) == 60
    assert [(one.role, one.text, one.score) for one in found[0].responses] == [
        ("ranked", "a", 1.0),
        ("ranked", "b", 3.0),
        ("ranked", "c", 2.0),
    ]
    of_test = {example.prompt.prompt_id for example in data.ranked("test")}
    assert of_test == {prompt.prompt_id for prompt in data.prompts("test")}


def test_best_and_worst_are_the_pair_and_the_best_is_the_demonstration(tmp_path: Path) -> None:
    rows = [*GROUPS, group(60, scores=(2, 2, 2)), group(61, scores=(5, 1, 5)), group(62, scores=(-1, 0.5, -1))]
    data = ranked(tmp_path / "ranked.jsonl", rows, test_share=0.001, validation_share=0.02)
    pairs = {one.prompt.messages[-1].content: [r.text for r in one.responses] for one in data.pairs("train")}
    chats = {one.prompt.messages[-1].content: [r.text for r in one.responses] for one in data.chats("train")}
    assert pairs["question 7"] == ["b", "a"]
    assert "question 60" not in pairs  # all tied: no pair, but a group and a demonstration
    assert (pairs["question 61"], pairs["question 62"]) == (["a", "b"], ["b", "a"])  # the first of equals
    assert (chats["question 60"], chats["question 61"]) == (["a"], ["a"])
    (chat,) = data.chats("train")[0].responses
    assert (chat.role, chat.score) == ("chosen", None)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (group(99, ["a"], [1]), "fewer than two different answers: 1"),
        (group(99, ["a", "a"], [1, 2]), "fewer than two different answers: 1"),
        (group(99, ["a", "b"], [1]), "scores and responses differ in number: 1"),
        (group(99, ["a", " "], [1, 2]), "empty answer: 1"),
        (group(99, ["a", "b"], [1, None]), "scores has a null: 1"),
        (group(99, ["a", "b"], [1, "best"]), "scores is not a number: 1"),
        ({**group(99), "responses": "a"}, "responses is not a list: 1"),
        ({**group(99), "scores": None}, "scores is not a list: 1"),
    ],
)
def test_a_group_that_cannot_be_used_is_left_out_and_counted(
    row: Row, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "dppo.data"):
        assert len(ranked(tmp_path / "ranked.jsonl", [*GROUPS, row]).ranked("train")) > 20
    assert f"left out 1 ({reason})" in caplog.text
    with pytest.raises(UserError, match=reason):
        ranked(tmp_path / "only.jsonl", [row]).ranked("train")


def test_a_column_of_earlier_turns_comes_before_the_prompt(tmp_path: Path) -> None:
    earlier = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    rows = [{**group(number), "context": earlier if number % 2 else []} for number in range(60)]
    columns = RankedColumns("prompt", "responses", "scores", "context")
    both = ranked(tmp_path / "ranked.jsonl", rows, columns=columns, single_turn=False)
    lengths = {len(one.prompt.messages) for one in both.ranked("train")}
    assert lengths == {1, 3}
    single = ranked(tmp_path / "ranked.jsonl", rows, columns=columns)
    assert {len(one.prompt.messages) for one in single.ranked("train")} == {1}


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scores"):
        ranked(tmp_path / "r.jsonl", [{"prompt": "q", "responses": ["a", "b"]}]).ranked("train")
    with pytest.raises(UserError, match="label"):
        labelled(tmp_path / "l.jsonl", [{"prompt": "q", "completion": "a"}]).labelled("train")


def answer(number: int, completion: str, label: Any) -> Row:
    return {"prompt": f"question {number}", "completion": completion, "label": label}


def test_labels_are_roles(tmp_path: Path) -> None:
    rows = [answer(number, f"answer {number}", number % 3 == 0) for number in range(60)]
    data = labelled(tmp_path / "labelled.jsonl", rows)
    assert isinstance(data, LabelledDataset)
    assert not isinstance(data, RankedDataset)
    for example in data.labelled("train"):
        (response,) = example.responses
        number = int(response.text.split()[1])
        assert response.role == ("desirable" if number % 3 == 0 else "undesirable")
    assert data.pairs("train") == []
    demonstrations = data.chats("train")
    assert demonstrations
    assert all(int(one.responses[0].text.split()[1]) % 3 == 0 for one in demonstrations)


def test_a_prompt_with_both_labels_makes_a_pair(tmp_path: Path) -> None:
    rows = [
        row
        for number in range(60)
        for row in (answer(number, "bad", 0), answer(number, "good", "true"), answer(number, "fine", 1))
    ]
    data = labelled(tmp_path / "labelled.jsonl", rows)
    assert {tuple(r.text for r in one.responses) for one in data.pairs("train")} == {("good", "bad")}
    assert len(data.labelled("train")) == 3 * len(data.pairs("train"))
    with pytest.raises(UserError, match="label is not true or false: 1"):
        labelled(tmp_path / "other.jsonl", [answer(0, "a", "perhaps")]).labelled("train")
    same = [answer(number, "same", number % 2 == 0) for number in [*range(60), *range(1, 61)]]
    assert labelled(tmp_path / "same.jsonl", same).pairs("train") == []
