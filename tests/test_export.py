"""``python -m dppo.export``: folders that transformers reads as the run's models, cards, and answers for judges."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import dppo.__main__ as entry
from dppo import export
from dppo.evaluation.runs import find_runs
from dppo.model_card import model_card
from dppo.types import Message
from tests.conftest import once, small

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "export.md").read_text()
COMMANDS = [line.partition("  #")[0].strip() for line in PAGE.splitlines() if line.startswith("python -m dppo")]
Captured = pytest.CaptureFixture[str]
Row = dict[str, Any]
RUNS = {"unll": ("loss=unll", "alpha=0.01"), "lora": ("loss=dpo", "train=lora", "train.learning_rate=0.01")}
TURNS = [["Describe star and tower.", "Write about a boat, end with good night."], ["Include teacher and winter."]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two complete runs, ``unll`` and ``lora``, of models that have learnt to write words; nobody may change them."""

    def build(folder: Path) -> None:
        patch = pytest.MonkeyPatch()
        learnt = ("model.hidden_size=32", "sft.train.steps=150", "generation.max_new_tokens=24", "train.steps=12")
        for name, words in RUNS.items():
            places = (f"hydra.run.dir={folder / name}", f"cache.dir={folder / 'cache'}", "device=cpu")
            patch.setattr(sys, "argv", ["dppo", *small(*words, *learnt, *places)])
            assert entry.main() == 0
        patch.undo()

    return once(tmp_path_factory, "exported-runs", build)


@pytest.fixture
def own(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run ``unll`` as outputs/mine of an empty folder, with a copy of the cache."""
    shutil.copytree(runs / "unll", tmp_path / "outputs" / "mine")
    shutil.copytree(runs / "cache", tmp_path / "cache")
    config = tmp_path / "outputs" / "mine" / "config.yaml"
    config.write_text(config.read_text().replace(str(runs / "cache"), str(tmp_path / "cache")))
    monkeypatch.chdir(tmp_path)
    return Path("outputs/mine")


def samples(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def answered(folder: Path, questions: Sequence[str]) -> list[str]:
    """What transformers alone says with this folder: its own template, generation settings and decoding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    found = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
        found.append(str(tokenizer.decode(written, skip_special_tokens=True)))
    return found


@pytest.mark.parametrize(
    ("name", "words", "column"),
    [("unll", [], "policy_answer"), ("lora", [], "policy_answer"), ("lora", ["--reference"], "reference_answer")],
)
def test_transformers_alone_gives_the_runs_answers(
    name: str, words: list[str], column: str, runs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    assert export.main([str(runs / name), "--model", str(folder), *words]) == 0
    rows = samples(runs / name)[:5]
    assert answered(folder, [row["prompt"] for row in rows]) == [row[column] for row in rows]
    if name == "lora":
        assert any(row["policy_answer"] != row["reference_answer"] for row in rows)  # the adapters do something
    names = {path.name for path in folder.iterdir()}
    assert {
        "README.md",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= names
    assert not names & {"manifest.json", "metrics.jsonl", "base.json", "adapter_config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_shares_no_file_with_the_cache(own: Path) -> None:
    assert export.main([str(own), "--model", "model"]) == 0
    result = json.loads((own / "result.json").read_text())
    for file in (Path("cache") / result["models"]["policy"]).iterdir():
        copy = Path("model") / file.name
        assert not copy.exists() or not file.samefile(copy)
        assert not copy.is_symlink()


def test_the_card_is_read_by_the_hubs_library(own: Path) -> None:
    from huggingface_hub import ModelCard

    assert export.main([str(own), "--model", "model", "--name", "a | `name`"]) == 0
    card: Any = ModelCard.load("model/README.md")
    result = json.loads((own / "result.json").read_text())
    rate = result["win_rate"]
    fields = card.data.to_dict()
    assert fields["library_name"] == "transformers" and fields["license"] == "unknown"
    assert card.data.tags == ["dppo", "sft", "preference-optimisation", "unll"]
    (measured,) = card.data.eval_results
    assert measured.metric_type == "win_rate" and measured.metric_value == pytest.approx(rate["value"], abs=1e-4)
    assert f"n = {rate['n']}" in measured.metric_name
    interval = f"{rate['value']:.3f} [{rate['ci_low']:.3f}, {rate['ci_high']:.3f}]"
    assert f"| win rate against the SFT model, ties 1/2 | {interval} | 0.5 by definition |" in card.text
    assert "base + alpha f(r) u" in card.text and "| `loss.alpha` | `0.01` |" in card.text
    assert f"| preferences, phase main | {result['training']['main']['n_examples']:,} | 12 |" in card.text
    assert result["command"] in card.text and "| `torch` | `" in card.text
    assert "# a \\| 'name'\n" in card.text
    columns = [line.count(" | ") for line in card.text.splitlines() if line.startswith("| `")]
    assert set(columns) == {1}


def test_hub_repositories_are_named_and_local_folders_are_not(own: Path) -> None:
    (run,) = find_runs([own])
    model = {"_target_": "dppo.models.PretrainedModel", "name_or_path": "someone/base", "revision": "main"}
    data = {"_target_": "dppo.data.ultrafeedback.UltraFeedback", "path": "someone/pairs", "sft_path": str(own)}
    card = model_card(
        dataclasses.replace(run, settings={**run.settings, "model": model, "dataset": data}), "policy", "x"
    )
    assert "\nbase_model: someone/base\n" in card and "\ndatasets:\n- someone/pairs\nlibrary_name" in card
    Path("someone/base").mkdir(parents=True)
    local = {**run.settings, "model": model, "dataset": {}}
    assert "base_model" not in model_card(dataclasses.replace(run, settings=local), "policy", "x").split("---")[1]


def write_questions() -> None:
    """Questions in the layouts of the benchmarks, in the current folder."""
    for folder in ("mt_bench", "arena_hard"):
        Path(folder).mkdir()
    jsonl: Callable[[list[Row]], str] = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)  # noqa: E731
    mt = [{"question_id": 81 + n, "category": "writing", "turns": turns} for n, turns in enumerate(TURNS)]
    Path("mt_bench/question.jsonl").write_text(jsonl(mt))
    new = [{"uid": f"u{n}", "category": "hard_prompt", "prompt": turns[0]} for n, turns in enumerate(TURNS)]
    Path("arena_hard/question.jsonl").write_text(jsonl(new))
    old = [
        {"question_id": f"q{n}", "cluster": "c", "turns": [{"content": turn} for turn in turns]}
        for n, turns in enumerate(TURNS)
    ]
    Path("arena_hard/old.jsonl").write_text(jsonl(old))
    alpaca = [{"instruction": turns[0], "dataset": "koala", "output": "x"} for turns in TURNS]
    Path("alpaca_eval.json").write_text(json.dumps(alpaca))


def test_answers_in_every_layout_are_the_models(own: Path) -> None:
    write_questions()
    assert export.main([str(own), "--model", "model"]) == 0
    firsts = answered(Path("model"), [turns[0] for turns in TURNS])
    assert all(firsts)
    mt, arena = "mt_bench/question.jsonl", "arena_hard/question.jsonl"
    assert export.main([str(own), "--mt-bench", "tiny.jsonl", "--questions", mt]) == 0
    rows = [json.loads(line) for line in Path("tiny.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [["question_id", "answer_id", "model_id", "choices", "tstamp"]] * 2
    assert [row["question_id"] for row in rows] == [81, 82] and {row["model_id"] for row in rows} == {"tiny"}
    assert [row["choices"][0]["index"] for row in rows] == [0, 0]
    turns = [row["choices"][0]["turns"] for row in rows]
    assert [len(one) for one in turns] == [2, 1] and [one[0] for one in turns] == firsts
    assert turns[0][1] == second_answer(TURNS[0], firsts[0])
    assert turns[0][1] != answered(Path("model"), TURNS[0][1:])[0]  # the first exchange is seen
    assert export.main([str(own), "--arena-hard", "new.jsonl", "--questions", arena]) == 0
    new = [json.loads(line) for line in Path("new.jsonl").read_text().splitlines()]
    assert [(row["uid"], row["model"]) for row in new] == [("u0", "new"), ("u1", "new")]
    assert [row["messages"][-1]["content"]["answer"] for row in new] == firsts
    assert new[0]["messages"][0] == {"role": "user", "content": TURNS[0][0]} and len(new[0]["messages"]) == 2
    assert export.main([str(own), "--arena-hard", "old.jsonl", "--questions", "arena_hard/old.jsonl"]) == 0
    old = [json.loads(line) for line in Path("old.jsonl").read_text().splitlines()]
    assert [row["choices"][0]["turns"] for row in old] == [[{"content": text} for text in own] for own in turns]
    assert export.main([str(own), "--alpaca-eval", "a.json", "--questions", "alpaca_eval.json", "--name", "mine"]) == 0
    assert json.loads(Path("a.json").read_text()) == [
        {"dataset": "koala", "instruction": turns[0], "output": first, "generator": "mine"}
        for turns, first in zip(TURNS, firsts, strict=True)
    ]
    ids = [row[key] for rows, key in ((rows, "answer_id"), (new, "ans_id"), (old, "answer_id")) for row in rows]
    assert len(set(ids)) == len(ids)


def second_answer(turns: Sequence[str], first: str) -> str:
    """The model's answer to the second turn, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained("model", local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained("model", local_files_only=True)
    messages = (Message("user", turns[0]), Message("assistant", first), Message("user", turns[1]))
    chat = [{"role": one.role, "content": one.content} for one in messages]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return str(tokenizer.decode(model.generate(**prompt)[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def test_the_same_model_writes_the_same_file_and_generates_once(own: Path) -> None:
    write_questions()
    words = [str(own), "--questions", "mt_bench/question.jsonl", "--name", "m", "--max-new-tokens", "6"]
    assert export.main([*words, "--mt-bench", "one.jsonl"]) == 0
    shards = sorted(Path("cache/generate").rglob("*"))
    assert export.main([*words, "--mt-bench", "two.jsonl"]) == 0
    assert Path("one.jsonl").read_bytes() == Path("two.jsonl").read_bytes()
    assert sorted(Path("cache/generate").rglob("*")) == shards
    first = json.loads(Path("one.jsonl").read_text().splitlines()[0])["choices"][0]["turns"][0]
    assert export.main([str(own), "--mt-bench", "all.jsonl", "--questions", "mt_bench/question.jsonl"]) == 0
    whole = json.loads(Path("all.jsonl").read_text().splitlines()[0])["choices"][0]["turns"][0]
    assert whole.startswith(first) and len(whole) > len(first)


@pytest.mark.parametrize(("words", "column"), [([], "policy_answer"), (["--reference"], "reference_answer")])
def test_a_runs_own_answers_for_alpaca_eval(words: list[str], column: str, own: Path) -> None:
    shutil.rmtree("cache")  # they lie in the run
    assert export.main([str(own), "--alpaca-eval", "it.json", *words]) == 0
    found = json.loads(Path("it.json").read_text())
    rows = samples(own)
    assert [row["output"] for row in found] == [row[column] for row in rows]
    assert [row["instruction"] for row in found] == [row["prompt"] for row in rows]
    assert {row["generator"] for row in found} == {"it"} and {row["dataset"] for row in found} == {"Instructions test"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one of --model, --alpaca-eval, --arena-hard, --mt-bench, not 0"),
        (["--model", "a", "--mt-bench", "b"], "not 2 of them"),
        (["--mt-bench", "b.jsonl"], "--mt-bench: needs --questions"),
        (["--model", "a", "--questions", "q.jsonl"], "--questions: goes with"),
        (["--model", "a", "--max-new-tokens", "3"], "--max-new-tokens: goes with --questions"),
        (["--model", "outputs"], "--model outputs: is there already"),
        (["--model", "no/where"], "--model no/where: its folder does not exist"),
        (["--mt-bench", "b", "--questions", "absent.jsonl"], "absent.jsonl: there is no such file"),
        (["--mt-bench", "b", "--questions", "bad.jsonl"], "bad.jsonl:2: turns is not a list"),
        (["--mt-bench", "b", "--questions", "twice.jsonl"], "twice.jsonl:2: a second question with the id 1"),
        (["--arena-hard", "b", "--questions", "empty.jsonl"], "empty.jsonl:1: prompt is not text"),
        (["--model", "a", "--cache", "elsewhere"], "is not in elsewhere (it is gone); add --cache"),
        (["--mt-bench", "b", "--questions", "long.jsonl", "--max-new-tokens", "600"], "choose at most"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(words: list[str], message: str, own: Path, capsys: Captured) -> None:
    Path("bad.jsonl").write_text('{"question_id": 1, "turns": ["a"]}\n{"question_id": 2, "turns": "a"}\n')
    Path("twice.jsonl").write_text('{"question_id": 1, "turns": ["a"]}\n{"question_id": 1, "turns": ["b"]}\n')
    Path("empty.jsonl").write_text('{"uid": "a", "prompt": " "}\n')
    Path("long.jsonl").write_text('{"question_id": 1, "turns": ["a"]}\n')
    before = sorted(path for path in Path().rglob("*") if "cache" not in path.parts)
    capsys.readouterr()
    assert export.main([str(own), *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert sorted(path for path in Path().rglob("*") if "cache" not in path.parts) == before


def test_only_complete_runs_are_exported(own: Path, capsys: Captured) -> None:
    assert export.main(["cache", "--model", "a"]) == 2
    assert "cache: is not the directory of a run" in capsys.readouterr().err
    (own / "result.json").unlink()
    assert export.main([str(own), "--model", "a"]) == 2
    assert "has no model to export, it is unfinished" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["</s>", None, [1]])
def test_a_result_that_was_changed_is_one_line_and_leaves_nothing(count: object, own: Path, capsys: Captured) -> None:
    result = json.loads((own / "result.json").read_text())
    result["training"]["main"]["n_examples"] = count
    (own / "result.json").write_text(json.dumps(result))
    before = sorted(Path().iterdir())
    assert export.main([str(own), "--model", "a"]) == 2
    said = capsys.readouterr().err
    assert "outputs/mine: its result.json or config.yaml is not as a run writes it" in said and said.count("\n") == 1
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_runs(line: str, own: Path, capsys: Captured) -> None:
    write_questions()
    _, _, module, *words = shlex.split(line)
    assert module == "dppo.export"
    assert export.main(words) == 0
    place = capsys.readouterr().out.splitlines()[-1]
    assert Path(place).exists()


def test_the_page_says_how_lm_eval_reads_the_folder() -> None:
    (command,) = [line for line in PAGE.splitlines() if line.startswith("lm_eval ")]
    folder = re.search(r"pretrained=(\S+)", command)
    assert folder and any(folder[1] in line.split() for line in COMMANDS)
