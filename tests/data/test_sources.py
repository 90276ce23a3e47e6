"""Preference pairs and chats from files: splits, layouts, and what is said about rows and files that don't fit."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dppo.data import Dataset, chats_identity
from dppo.data.files import PairsFile
from dppo.data.published import PublishedPairs
from dppo.data.rows import PairColumns
from dppo.data.subsets import nested_subset
from dppo.data.tables import read_rows
from dppo.errors import UserError
from dppo.types import Message, PreferenceExample

Row = dict[str, Any]


def turn(role: str, content: str | None) -> dict[str, str | None]:
    return {"role": role, "content": content}


def pair_row(question: str, chosen: str = "yes", rejected: str = "no") -> Row:
    return {
        "prompt": question,
        "prompt_id": "made elsewhere",
        "chosen": [turn("user", question), turn("assistant", chosen)],
        "rejected": [turn("user", question), turn("assistant", rejected)],
        "messages": [turn("user", question), turn("assistant", chosen)],
        "score_chosen": 8.0,
        "score_rejected": 3.5,
    }


def chat_row(question: str, answer: str = "yes") -> Row:
    return {"messages": [turn("user", question), turn("assistant", answer)], "source": "made"}


def write(folder: Path, files: Mapping[str, Sequence[Row]]) -> Path:
    for name, rows in files.items():
        path = folder / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return folder


def preferences(folder: Path, train: Sequence[Row], test: Sequence[Row]) -> Path:
    return write(folder, {"train_prefs-00000-of-00001": train, "test_prefs-00000-of-00001": test})


def chats(folder: Path, train: Sequence[Row], test: Sequence[Row]) -> Path:
    return write(folder, {"all/train-00000-of-00001": train, "all/test-00000-of-00001": test})


def ultrafeedback(path: Path, sft_path: Path | None = None, **changed: Any) -> PublishedPairs:
    settings: dict[str, Any] = {
        "path": str(path),
        "revision": "main",
        "config": None,
        "train_split": "train_prefs",
        "validation_split": None,
        "test_split": "test_prefs",
        "columns": PairColumns(None, "chosen", "rejected", "score_chosen", "score_rejected", None),
        "sft_path": str(sft_path or path),
        "sft_revision": "main",
        "sft_config": "all",
        "sft_train_split": "train",
        "sft_test_split": "test",
        "sft_single_turn": True,
        "single_turn": True,
        "validation_share": 0.2,
        "test_share": 0.1,
        "seed": 0,
        "cache_dir": str(path.parent / "cache"),
    }
    return PublishedPairs(**settings | changed)


def pairs_file(path: Path, **changed: Any) -> PairsFile:
    settings: dict[str, Any] = {
        "path": str(path),
        "test_path": None,
        "sft_path": None,
        "columns": PairColumns("prompt", "chosen", "rejected", None, None, None),
        "single_turn": True,
        "validation_share": 0.2,
        "test_share": 0.3,
        "seed": 0,
    }
    return PairsFile(**settings | changed)


def questions(examples: Sequence[PreferenceExample]) -> list[str]:
    return [example.prompt.messages[-1].content for example in examples]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train = [pair_row(f"question {n}") for n in range(60)]
    return preferences(tmp_path / "preferences", train, [pair_row("test a"), pair_row("test b")])


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    return chats(tmp_path / "chats", [chat_row(f"chat {n}") for n in range(60)], [chat_row("chat test")])


def test_pairs_hold_prompt_answers_and_scores(folder: Path) -> None:
    data = ultrafeedback(folder)
    assert isinstance(data, Dataset)
    (first, _) = data.pairs("test")
    assert first.prompt.messages == (Message("user", "test a"),)
    assert [(one.role, one.text, one.score) for one in first.responses] == [
        ("chosen", "yes", 8.0),
        ("rejected", "no", 3.5),
    ]


def test_training_prompts_are_cut_into_train_and_validation(folder: Path) -> None:
    data = ultrafeedback(folder)
    train, validation = data.pairs("train"), data.pairs("validation")
    assert sorted(questions([*train, *validation])) == sorted(f"question {n}" for n in range(60))
    assert 4 <= len(validation) <= 20  # 12 expected of 60
    assert questions(ultrafeedback(folder, seed=1).pairs("validation")) != questions(validation)
    larger = ultrafeedback(folder, validation_share=0.5).pairs("validation")
    assert set(questions(validation)) < set(questions(larger))


def test_splits_of_the_same_rows_read_and_report_them_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dppo.data")
    data = ultrafeedback(folder)
    for split in ("train", "validation", "train"):
        data.pairs(split)
    assert caplog.text.count("train_prefs: 60 of 60 rows") == 1


def test_all_pairs_of_a_prompt_are_in_one_split(tmp_path: Path) -> None:
    rows = [pair_row(f"question {n}", chosen=f"answer {k}") for n in range(20) for k in range(3)]
    data = ultrafeedback(preferences(tmp_path, rows, [pair_row("test")]))
    train, validation = questions(data.pairs("train")), questions(data.pairs("validation"))
    assert len(train) + len(validation) == 60
    assert not set(train) & set(validation)
    assert len(data.prompts("validation")) == len(set(validation))


def test_a_test_prompt_is_not_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dppo.data")
    rows = [pair_row(f"question {n}") for n in range(20)]
    data = ultrafeedback(preferences(tmp_path, rows, [pair_row("question 3", "other answer")]))
    assert "question 3" not in questions([*data.pairs("train"), *data.pairs("validation")])
    assert "19 of 20 rows; left out 1 (prompt is in the test split: 1)" in caplog.text


def test_chats_are_demonstrations_of_their_last_answer(chat_folder: Path, folder: Path) -> None:
    data = ultrafeedback(folder, chat_folder)
    (test,) = data.chats("test")
    assert [(one.role, one.text) for one in test.responses] == [("chosen", "yes")]
    assert len(data.chats("train")) + len(data.chats("validation")) == 60


def test_single_turn_leaves_out_conversations_and_keeps_system_turns(tmp_path: Path, folder: Path) -> None:
    long = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    with_system = [turn("system", "s"), turn("user", "e"), turn("assistant", "f")]
    rows = [{"messages": long}, {"messages": with_system}]
    data = ultrafeedback(folder, chats(tmp_path / "chats", [chat_row("x")], rows))
    (only,) = data.chats("test")
    assert only.prompt.messages == (Message("system", "s"), Message("user", "e"))
    conversation, _ = replace(data, sft_single_turn=False).chats("test")
    assert [one.content for one in conversation.prompt.messages] == ["a", "b", "c"]
    assert conversation.responses[0].text == "d"


def test_files_of_a_split_are_read_in_order_and_several_shards_are_one(tmp_path: Path) -> None:
    files = {f"train_prefs-0000{n}-of-00003": [pair_row(f"shard {n}")] for n in (2, 0, 1)}
    write(tmp_path, {**files, "test_prefs-00000-of-00001": [pair_row("test")]})
    write(tmp_path, {"train_prefs_other-00000-of-00001": [pair_row("of another split")]})
    data = ultrafeedback(tmp_path, validation_share=1e-9)
    assert questions(data.pairs("train")) == ["shard 0", "shard 1", "shard 2"]


def test_two_folders_of_one_name_and_a_rewritten_one_are_told_apart(tmp_path: Path) -> None:
    # datasets.load_dataset serves one folder's rows for the other when a README declares their configuration.
    readme = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: test_prefs, path: data/test_prefs-*}\n---\n"
    )
    ours = preferences(tmp_path / "a" / "same", [pair_row("train")], [pair_row("ours")])
    theirs = preferences(tmp_path / "b" / "same", [pair_row("train")], [pair_row("theirs")])
    for place in (ours, theirs):
        (place / "README.md").write_text(readme)
    first, second = ultrafeedback(ours), ultrafeedback(theirs)
    assert (questions(first.pairs("test")), questions(second.pairs("test"))) == (["ours"], ["theirs"])
    assert first.preferences.identity() != second.preferences.identity()
    before = first.preferences.identity()
    preferences(ours, [pair_row("train")], [pair_row("rewritten")])
    assert questions(first.pairs("test")) == ["rewritten"]
    assert first.preferences.identity() != before


def test_identity_is_the_content_wherever_it_lies(folder: Path, chat_folder: Path, tmp_path: Path) -> None:
    data = ultrafeedback(folder, chat_folder)
    before = data.identity()
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    for file in moved.rglob("*.parquet"):
        os.utime(file, (0, 0))
    assert ultrafeedback(moved, chat_folder).identity() == before
    json.dumps(before)
    changed: list[Any] = [{"seed": 1}, {"validation_share": 0.3}, {"single_turn": False}]
    assert all(replace(data, **change).identity() != before for change in changed)


def test_exact_repetitions_are_left_out(tmp_path: Path) -> None:
    rows = [pair_row("a"), pair_row("a"), pair_row("a", "other")]
    data = ultrafeedback(preferences(tmp_path, rows, [pair_row("test")]), validation_share=1e-9)
    assert len({example.example_id for example in data.pairs("train")}) == len(data.pairs("train")) == 2


SPOILT: list[tuple[str, Callable[[Row], object]]] = [
    ("chosen is null", lambda row: row.update(chosen=None)),
    ("rejected is null", lambda row: row.update(rejected=None)),
    ("no assistant turn", lambda row: row["chosen"].pop()),
    ("no prompt", lambda row: row["chosen"].pop(0)),
    ("empty answer", lambda row: row["rejected"][1].update(content=" \n")),
    ("empty prompt", lambda row: [row[key][0].update(content="") for key in ("chosen", "rejected")]),
    ("chosen has a turn whose content is null", lambda row: row["chosen"][1].update(content=None)),
    ("chosen has a turn of role tool", lambda row: row["chosen"][0].update(role="tool")),
    ("no user turn before the answer", lambda row: [row[key].insert(1, turn("system", "s")) for key in ("chosen",)]),
    ("chosen and rejected are equal", lambda row: row["rejected"][1].update(content="yes")),
    ("chosen and rejected answer different prompts", lambda row: row["rejected"][0].update(content="other")),
    ("score_chosen is not finite", lambda row: row.update(score_chosen=float("inf"))),
]


@pytest.mark.parametrize(("reason", "spoil"), SPOILT, ids=[reason for reason, _ in SPOILT])
def test_an_unusable_row_is_counted_and_only_such_rows_are_an_error(
    reason: str, spoil: Callable[[Row], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dppo.data")
    spoilt = pair_row("spoilt")
    spoil(spoilt)
    data = ultrafeedback(preferences(tmp_path, [pair_row("train")], [pair_row("good"), spoilt]))
    assert questions(data.pairs("test")) == ["good"]
    assert f"test_prefs: 1 of 2 rows; left out 1 ({reason}: 1)" in caplog.text
    preferences(tmp_path, [pair_row("train")], [spoilt, {**spoilt, "prompt_id": "again"}])
    with pytest.raises(UserError, match=f"test_prefs: none of its 2 rows can be used.*{reason}"):
        data.pairs("test")


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.path=.*nowhere: there is no such folder"):
        ultrafeedback(tmp_path / "nowhere").pairs("test")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: unknown format \(no ending\)"):
        ultrafeedback(preferences(tmp_path, [pair_row("a")], [pair_row("b")]), tmp_path / "file").chats("test")


def test_a_missing_split_says_what_is_there(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"has no split test \(data/test-\* or .*found data/test_prefs-00000-of-00001\.parquet"
    ):
        ultrafeedback(folder, test_split="test").pairs("test")
    with pytest.raises(UserError, match=r"dataset\.sft_path=.*has no split train \(data/all/train-\* or all/train-\*"):
        ultrafeedback(folder).identity()


def test_a_missing_column_says_what_was_found(tmp_path: Path, folder: Path) -> None:
    preferences(folder, [{"prompt": "a", "answer_a": "b"}], [pair_row("test")])
    with pytest.raises(
        UserError, match=r"train_prefs-.*parquet: has no column chosen, rejected; found prompt, answer_a"
    ):
        ultrafeedback(folder).pairs("train")
    preferences(folder, [pair_row("train")], [pair_row("test")])
    with pytest.raises(UserError, match=r"has no column messages; found question"):
        ultrafeedback(folder, chats(tmp_path / "chats", [chat_row("a")], [{"question": "a"}])).chats("test")


def test_unreadable_files_are_one_line(folder: Path) -> None:
    file = folder / "data" / "test_prefs-00000-of-00001.parquet"
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"test_prefs.*: is empty"):
        ultrafeedback(folder).pairs("test")
    file.write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"test_prefs.*: is not a readable parquet file"):
        ultrafeedback(folder).pairs("test")
    pq.write_table(pa.Table.from_pylist([pair_row("a")]).slice(0, 0), file)
    with pytest.raises(UserError, match=r"test_prefs.*: has no rows"):
        ultrafeedback(folder).pairs("test")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_shares_are_between_0_and_1(share: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"validation_share={share}: must be above 0 and below 1"):
        ultrafeedback(tmp_path, validation_share=share)
    with pytest.raises(UserError, match=f"test_share={share}"):
        pairs_file(tmp_path, test_share=share)


def test_shares_leave_something_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"test_share=0\.5: leaves nothing to train on"):
        pairs_file(tmp_path, test_share=0.5, validation_share=0.5)


def test_a_share_too_small_for_the_data_is_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.validation_share=1e-09: leaves no validation row of 60"):
        ultrafeedback(folder, validation_share=1e-9).pairs("validation")


# --- the user's own file -------------------------------------------------------------------------------------------

FLAT = [{"prompt": f"question {n}", "chosen": "yes", "rejected": "no"} for n in range(60)]


def write_jsonl(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[Row]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


FORMATS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_is_read_alike_in_every_format(ending: str, tmp_path: Path) -> None:
    rows = [*FLAT, {"prompt": 'with "quotes",\nlines and é', "chosen": "42", "rejected": "007"}]
    data = pairs_file(FORMATS[ending](tmp_path / f"pairs.{ending}", rows))
    assert isinstance(data, Dataset)
    found = [*data.pairs("train"), *data.pairs("validation"), *data.pairs("test")]
    assert sorted(questions(found)) == sorted(row["prompt"] for row in rows)
    (special,) = [one for one in found if "quotes" in one.prompt.messages[0].content]
    assert [one.text for one in special.responses] == ["42", "007"]


def test_a_file_splits_by_prompt(tmp_path: Path) -> None:
    data = pairs_file(write_jsonl(tmp_path / "pairs.jsonl", FLAT))
    sizes = {split: len(data.pairs(split)) for split in ("train", "validation", "test")}
    assert sizes["test"] == pytest.approx(18, abs=10)
    assert sizes["validation"] == pytest.approx(12, abs=8)
    assert [one.prompt for one in data.pairs("test")] == data.prompts("test")


def test_the_chosen_answers_are_the_demonstrations(tmp_path: Path) -> None:
    rows = [{**row, "rejected": other} for row in FLAT for other in ("no", "never")]
    data = pairs_file(write_jsonl(tmp_path / "pairs.jsonl", rows))
    train = data.chats("train")
    assert len(train) == len({one.example_id for one in train}) == len(data.pairs("train")) / 2
    assert {response.role for one in train for response in one.responses} == {"chosen"}
    assert not set(questions(train)) & set(questions(data.chats("test")))


def test_chats_of_their_own_share_no_prompt_with_the_test_pairs(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", FLAT)
    sft = write_jsonl(tmp_path / "sft.jsonl", [chat_row(row["prompt"], "other") for row in FLAT])
    data = pairs_file(path, sft_path=str(sft))
    assert data.chats("train")[0].responses[0].text == "other"
    assert not set(questions(data.chats("train"))) & set(questions(data.pairs("test")))
    test = write_jsonl(tmp_path / "test.jsonl", FLAT[:9])
    data = pairs_file(path, sft_path=str(sft), test_path=str(test))
    assert len(data.pairs("test")) == 9
    for split in ("train", "validation"):
        assert not set(questions([*data.chats(split), *data.pairs(split)])) & set(questions(data.pairs("test")))
    assert len(data.pairs("train")) + len(data.pairs("validation")) == 51


TURNS = [turn("user", "q"), turn("assistant", "y")], [turn("user", "q"), turn("assistant", "n")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "y", "rejected": "n"},
        {"prompt": [turn("user", "q")], "chosen": "y", "rejected": [turn("assistant", "n")]},
        {"prompt": "q", "chosen": TURNS[0], "rejected": "n"},
        {"prompt": None, "chosen": TURNS[0], "rejected": TURNS[1]},
    ],
    ids=["text", "messages", "mixed", "conversations"],
)
def test_text_and_messages_mean_the_same(row: Row, tmp_path: Path) -> None:
    data = pairs_file(
        write_jsonl(tmp_path / "pairs.jsonl", FLAT), test_path=str(write_jsonl(tmp_path / "t.jsonl", [row]))
    )
    (one,) = data.pairs("test")
    assert one.prompt.messages == (Message("user", "q"),)
    assert [response.text for response in one.responses] == ["y", "n"]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"instruction": "q", "better": "y", "worse": "n", "a": 9, "b": "1.5"}]
    path = write_jsonl(tmp_path / "test.jsonl", rows)
    columns = PairColumns("instruction", "better", "worse", "a", "b", None)
    (one,) = pairs_file(path, test_path=str(path), columns=columns).pairs("test")
    assert [response.score for response in one.responses] == [9.0, 1.5]
    with pytest.raises(UserError, match=r"test\.jsonl:1: has no column prompt, chosen, rejected; found instruction"):
        pairs_file(path, test_path=str(path)).pairs("test")


def test_an_empty_cell_is_a_null(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dppo.data")
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected,a,b\nq,y,n,7,\nq,,n,1,2\n")
    columns = PairColumns("prompt", "chosen", "rejected", "a", "b", None)
    (one,) = pairs_file(path, test_path=str(path), columns=columns).pairs("test")
    assert [response.score for response in one.responses] == [7.0, None]
    assert "chosen is null: 1" in caplog.text


def test_what_is_wrong_in_a_text_file_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    good = json.dumps(FLAT[0])
    path.write_text(f"{good}\n\n{good[:-5]}\n")
    with pytest.raises(UserError, match=r"pairs\.jsonl:3: is not JSON \(.* at column \d+\)"):
        pairs_file(path).pairs("train")
    path.write_text(f"{good}\n[1, 2]\n")
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: is not a JSON object"):
        pairs_file(path).pairs("train")
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(UserError, match=r"pairs\.jsonl: is not UTF-8 text \(byte 12\)"):
        pairs_file(path).pairs("train")
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\nq,y,n\nq,y\n")
    with pytest.raises(UserError, match=r"pairs\.csv:3: has 2 cells, the header has 3"):
        pairs_file(path).pairs("train")
    path.write_text('prompt,chosen,rejected\nq,"y\n')
    with pytest.raises(UserError, match=r"pairs\.csv:2: is not CSV"):
        pairs_file(path).pairs("train")


def test_missing_and_unknown_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl: cannot be read \(No such file"):
        pairs_file(tmp_path / "nowhere.jsonl").identity()
    with pytest.raises(UserError, match=r"nowhere\.jsonl: there is no such file"):
        pairs_file(tmp_path / "nowhere.jsonl").pairs("train")
    with pytest.raises(UserError, match=r"pairs\.xlsx: unknown format \.xlsx; use \.parquet, \.jsonl, \.csv"):
        pairs_file(write_jsonl(tmp_path / "pairs.xlsx", FLAT)).pairs("train")
    with pytest.raises(UserError, match=r"folder\.jsonl: is a folder; give a file \(\.parquet"):
        (tmp_path / "folder.jsonl").mkdir()
        next(read_rows([tmp_path / "folder.jsonl"], ["prompt"]))


def test_a_files_identity_follows_its_content(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", FLAT)
    before = pairs_file(path).identity()
    assert pairs_file(write_jsonl(tmp_path / "copy.jsonl", FLAT)).identity() == before
    assert pairs_file(path, test_share=0.1).identity() != before
    assert pairs_file(path, test_path=str(path)).identity() != pairs_file(path, sft_path=str(path)).identity() != before
    write_jsonl(path, FLAT[1:])
    assert pairs_file(path).identity() != before


# --- subsets -------------------------------------------------------------------------------------------------------


def test_subsets_are_nested_and_keep_their_order_when_rows_are_added(tmp_path: Path) -> None:
    data = pairs_file(write_jsonl(tmp_path / "pairs.jsonl", FLAT))
    pairs = data.pairs("train")
    whole = nested_subset(pairs, None, 0)
    assert sorted(questions(whole)) == sorted(questions(pairs))
    for n in (0, 1, 7, len(pairs), len(pairs) + 5):
        assert nested_subset(pairs, n, 0) == whole[:n]
    assert nested_subset(list(reversed(pairs)), None, 0) == whole
    assert nested_subset(pairs[5:], None, 0) == [one for one in whole if one in pairs[5:]]
    assert nested_subset(pairs, None, 1) != whole
    prompts = data.prompts("train")
    assert set(nested_subset(prompts, 3, 0)) < set(nested_subset(prompts, 9, 0))


# --- no prompt in training and evaluation ----------------------------------------------------------------------------


def shown(prompt: str) -> str:
    return " ".join(prompt.replace("\u200b", "").lower().split())


def test_demonstrations_leave_out_the_evaluation_prompts_of_the_preferences(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [f"Question {n}?" for n in range(80)]
    folder = preferences(tmp_path / "pairs", [pair_row(text) for text in asked], [pair_row("Test a?"), pair_row("b")])
    # The same prompts in another spelling, behind a system turn, and some that are nowhere else.
    others = [f" question\n{n}? " for n in range(80)] + ["TEST \u200ba?"] + [f"chat {n}" for n in range(40)]
    rows = [{"messages": [turn("system", "s"), turn("user", text), turn("assistant", "a")]} for text in others]
    data = ultrafeedback(folder, chats(tmp_path / "chats", rows, [chat_row("chat 3")]))
    with caplog.at_level(logging.INFO, "dppo.data"):
        trained = [*data.chats("train"), *data.pairs("train")]
    evaluated = {shown(text) for split in ("validation", "test") for text in questions(data.pairs(split))}
    assert len(evaluated) > 8
    assert not evaluated & {shown(text) for text in questions([*trained, *data.chats("validation")])}
    # Nothing else is left out: every other prompt is there, in training or the chats' own validation.
    left = {shown(text) for text in questions([*data.chats("train"), *data.chats("validation")])}
    assert left == {shown(text) for text in others} - evaluated - {"chat 3"}
    n_left_out = len({shown(text) for text in others} & evaluated)
    assert f"(prompt is an evaluation prompt of the preferences: {n_left_out}, prompt is in the test split: 1)" in (
        caplog.text
    )
    _, reading = data.readings("chats")
    assert reading.left_out["prompt is an evaluation prompt of the preferences"] == n_left_out


def test_a_prompt_in_two_spellings_is_in_one_split(tmp_path: Path) -> None:
    rows = [{**FLAT[n], "prompt": text} for n in range(60) for text in (f"Question {n}", f"question  {n}\n")]
    data = pairs_file(write_jsonl(tmp_path / "pairs.jsonl", rows))
    splits = [{shown(text) for text in questions(data.pairs(split))} for split in ("train", "validation", "test")]
    assert sum(map(len, splits)) == len(set().union(*splits)) == 60


def test_the_chats_decide_what_sft_models_are_shared(tmp_path: Path, folder: Path, chat_folder: Path) -> None:
    data = ultrafeedback(folder, chat_folder)
    before = chats_identity(data)
    json.dumps(before)
    # The same evaluation prompts: other answers and other columns leave the demonstrations as they were.
    train = [pair_row(f"question {n}", "another answer") for n in range(60)]
    same = preferences(tmp_path / "same", train, [pair_row("test a", "z"), pair_row("test b")])
    assert chats_identity(ultrafeedback(same, chat_folder)) == before
    assert ultrafeedback(same, chat_folder).identity() != data.identity()
    assert ultrafeedback(same, chat_folder).chats("train") == data.chats("train")
    # Others do not, even if no chat has them: what is left out is decided by them.
    other = preferences(tmp_path / "other", train, [pair_row("chat 7"), pair_row("test b")])
    assert chats_identity(ultrafeedback(other, chat_folder)) != before
    assert ultrafeedback(other, chat_folder).chats("train") != data.chats("train")
    for change in ({"sft_single_turn": False}, {"seed": 1}, {"validation_share": 0.3}, {"sft_path": None}):
        assert chats_identity(replace(data, **change)) != before
    assert chats_identity(replace(data, cache_dir="elsewhere")) == before
