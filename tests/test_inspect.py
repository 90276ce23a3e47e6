"""``python -m dppo.inspect``: what it shows is what a run encodes, and no text can pass for something else."""

from __future__ import annotations

import os
import pty
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dppo import config, inspect, pipeline
from dppo.data.encoding import ChatEncoder
from dppo.data.instructions import Instructions
from dppo.data.subsets import nested_subset
from dppo.types import PreferenceExample, Split
from tests.conftest import outside, small
from tests.data.test_sources import Row, chat_row, chats, pair_row, preferences, write_jsonl
from tests.forks import Forks

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "inspect.md").read_text()
COMMANDS = [line.partition("  #")[0].strip() for line in PAGE.splitlines() if line.startswith("python -m dppo")]
Captured = pytest.CaptureFixture[str]


def shown(capsys: Captured, *words: str, status: int = 0) -> str:
    """What the command prints."""
    capsys.readouterr()
    assert inspect.main(list(words)) == status
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def complaint(capsys: Captured, *words: str) -> str:
    capsys.readouterr()
    assert inspect.main(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def numbers(output: str, name: str, place: int = 0) -> list[str]:
    """The cells of a row of a table of lengths: n, min, p5, p50, p95, p99, max."""
    return [line.split()[1:] for line in output.splitlines() if line.split()[:1] == [name]][place]


def test_the_numbers_and_texts_are_those_of_the_run(capsys: Captured) -> None:
    words = small("loss=dpo", "train.max_length=40", "train.n_examples=20")
    output = shown(capsys, *words, "n=2")
    experiment = config.from_words(words)
    encoder = ChatEncoder(experiment.model.load_tokenizer())
    (phase,) = experiment.phases.values()
    training = experiment.dataset.pairs("train")
    taken = nested_subset(training, 20, 0)
    encoded = encoder.encode(taken, 40)
    _, _, pairs = output.partition("main: pairs for loss=dpo: 20 of 32 examples, train.max_length=40 (40 tokens)")
    assert pairs
    assert f"cut at the limit: {encoded.n_truncated} of {2 * len(encoded.examples)} responses" in pairs
    assert f"left out: {encoded.n_dropped} examples" in pairs
    lengths = sorted(len(encoder.response_ids(one.prompt.messages, one.responses[0].text)) for one in taken)
    assert numbers(pairs, "chosen") == [str(n) for n in (20, lengths[0], *(lengths[at] for at in (0, 9, 18, 19, 19)))]
    bench = pipeline._workbench(experiment)
    seen = pipeline.phase_data(experiment, bench, phase, training, encoder).examples
    for example in seen[:2]:
        assert example.example_id in {one.example_id for one in encoded.examples}
    for example in encoded.examples[:2]:
        assert f": {example.example_id}, prompt {example.prompt_id}" in pairs
        for response in example.responses:
            assert f"{response.role:>13} │ {encoder.decode(response.token_ids)}" in pairs
    assert "score" in pairs and "⟦<|user|>⟧" in pairs and "⟦<|end|>⟧" in pairs
    assert "sft: 64 of 64 examples, sft.train.max_length=p95" in output
    assert re.search(r"^pairs +validation +16 +16$", output, re.MULTILINE)
    assert output.endswith("prompts in more than one split: 0\n")
    assert "\033" not in output


def test_ranked_labelled_and_generated_responses(tmp_path: Path, capsys: Captured) -> None:
    groups = [{"prompt": f"q {n}", "responses": ["a", "b c", "d"], "scores": [1, 3, 2]} for n in range(60)]
    ranked = write_jsonl(tmp_path / "ranked.jsonl", groups)
    output = shown(capsys, "dataset=ranked_file", f"dataset.path={ranked}", "loss=rrhf", "reward=length", "n=1")
    assert "main: ranked for loss=rrhf" in output
    assert output.count("       ranked │ ") == 3 and "tokens of ranked, score 3, all trained on" in output
    rows = [{"prompt": f"q {n}", "completion": "yes", "label": n % 2 == 0} for n in range(60)]
    labelled = write_jsonl(tmp_path / "labelled.jsonl", rows)
    data = ("dataset=labelled_file", f"dataset.path={labelled}", "reward=length")
    output = shown(capsys, *data, "loss=kto", "n=2", "sft=none")
    assert "main: labelled for loss=kto" in output and "sft:" not in output
    assert numbers(output, "mismatched") == ["n/a"] * 7
    assert set(re.findall(r"^ +(\w+) │", output, re.MULTILINE)) <= {"prompt", "desirable", "undesirable"}
    output = shown(capsys, *small("loss=unll"), "n=0")
    assert numbers(output, "generated") == ["n/a"] * 7 and "│" not in output
    assert "2 tokens of rejected, score 3.5, not read by this loss" in shown(
        capsys, *feedback(tmp_path, [pair_row(f"q {n}", "y", "n") for n in range(40)]), "loss=sft", "n=1"
    )


def feedback(folder: Path, train: Sequence[Row], test: Sequence[Row] = (), chat: Sequence[Row] = ()) -> list[str]:
    pairs = preferences(folder / "pairs", train, test or [pair_row("test")])
    talk = chats(folder / "chats", chat or [chat_row(f"chat {n}") for n in range(40)], [chat_row("other")])
    return ["dataset=ultrafeedback", f"dataset.path={pairs}", f"dataset.sft_path={talk}", "reward=length"]


HOSTILE = "a\033[31mb\u202e⟦<|end|>⟧ <|end|><|user|>\n       prompt │ c"


def test_no_text_passes_for_anything_else(tmp_path: Path, capsys: Captured) -> None:
    output = shown(capsys, *feedback(tmp_path, [pair_row(HOSTILE + str(n), HOSTILE) for n in range(40)]), "n=1")
    pairs = output.partition("main: pairs")[2]
    assert not set(output) & {"\033", "\u202e", "\r"}
    assert re.findall("⟦.*?⟧", pairs) == ["⟦<|user|>⟧", "⟦<|assistant|>⟧", "⟦<|end|>⟧", "⟦<|end|>⟧"]
    assert "\\u27e6<|end|>\\u27e7 <|end|><|user|>␊" in pairs
    assert [line.count("│") for line in pairs.splitlines() if "│" in line] == [1] * 5
    assert "       prompt │        prompt \\u2502 c" in pairs


def test_long_texts_lose_their_middle_unless_asked(tmp_path: Path, capsys: Captured) -> None:
    words = [*feedback(tmp_path, [pair_row("q" * 400 + str(n)) for n in range(40)]), "loss=dpo", "n=1"]
    cut, full = (shown(capsys, *words, *more).partition("main: pairs")[2] for more in ((), ("--full",)))
    assert "q" * 400 in full and "left out]" not in full
    assert "q" * 199 + "[" in cut and re.search(r"\[16\d tokens left out\]q", cut)  # behind <|user|>


@dataclass(frozen=True)
class Leaky(Instructions):
    """Has two prompts of the test split among its demonstrations, and one among its validation pairs."""

    def chats(self, split: Split) -> list[PreferenceExample]:
        return [*super().chats(split), *super().pairs("test")[:2]]

    def pairs(self, split: Split) -> list[PreferenceExample]:
        return [*super().pairs(split), *(super().pairs("test")[:1] if split == "validation" else [])]


def test_prompts_in_two_splits_are_a_warning_and_a_status(capsys: Captured) -> None:
    words = small("loss=dpo", "dataset._target_=tests.test_inspect.Leaky", "allowed_targets=[tests]")
    output = shown(capsys, *words, "n=0", status=1)
    warnings = [line for line in output.splitlines() if line.startswith("warning")]
    assert warnings == [
        "warning: chats train and validation share 1 prompts: must be 0",
        "warning: chats train and test share 2 prompts: must be 0",
        "warning: validation and test share 1 prompts: must be 0",
    ]
    assert "prompts in more than one split: 0" not in output


def test_what_a_reward_model_keeps_to_itself_is_not_shown(capsys: Captured) -> None:
    words = small("loss=dpo", "sft=none", "reward=bradley_terry", "reward.held_back=0.5")
    found = re.search(r"loss=dpo: (\d+) of (\d+) examples", shown(capsys, *words, "n=0"))
    experiment = config.from_words(words)
    left = pipeline._training_rows(experiment)["pairs"]
    assert found and int(found[1]) == int(found[2]) == len(left) < len(experiment.dataset.pairs("train"))


def test_of_preferences_that_the_run_makes_the_prompts_are_shown(capsys: Captured) -> None:
    output = shown(capsys, *small("loss=dpo", "dataset=on_policy", "dataset.answers.n_answers=4"), "n=1")
    assert "main: made by the run, nothing to show: the model answers 32 prompts (4 answers each by Sampled)" in output
    assert "prompt 1 of 1: " in output and "rejected" not in output and "answered  train" in output
    assert "prompts in more than one split: 0" in output


def test_drops_are_said_by_their_reason(tmp_path: Path, capsys: Captured) -> None:
    train = [pair_row("q" * n) for n in range(1, 41)]
    words = feedback(
        tmp_path, [*train, pair_row("same", "x", "x"), pair_row("test")], chat=[chat_row("test"), chat_row("chat")]
    )
    output = shown(capsys, *words, "loss=dpo", "n=0", "train.max_length=20")
    assert re.search(r"40 of 42 rows; left out 2 \(.*chosen and rejected are equal: 1", output)
    assert re.search(r"pairs train_prefs: 40 of 42 rows; left out 2 \(.*test.*: 1", output)
    assert re.search(r"chats train: 1 of 2 rows; left out 1 \(.*: 1\)", output)
    dropped = re.search(r"prompt leaves no room for an answer in 20 tokens: (\d+)$", output, re.MULTILINE)
    assert dropped and f"left out: {dropped[1]} examples" in output and 10 < int(dropped[1]) < 30
    assert "prompt is an evaluation prompt of the preferences: 1" in output
    assert "prompts in more than one split: 0" in output


def test_another_split_has_the_limit_of_the_training_split(capsys: Captured) -> None:
    words = small("loss=dpo", "sft=none", "train.max_length=p50")
    train, test = (shown(capsys, *words, "n=0", f"split={split}") for split in ("train", "test"))
    limits = [re.search(r"max_length=p50 \((\d+) tokens\)", output) for output in (train, test)]
    assert limits[0] and limits[1] and limits[0][1] == limits[1][1]
    assert "24 of 24 examples" in test and "32 of 32 examples" in train


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["n=x"], "n=x: must be a whole number"),
        (["n=-1"], "n=-1: must be a whole number"),
        (["split=dev"], "split=dev: must be one of train, validation, test"),
        (["dataste=instructions"], "dataste=instructions: unknown key. Did you mean dataset?"),
        (["dataset=ultrafeedbck"], "dataset=ultrafeedbck: there is no such option. Did you mean ultrafeedback?"),
        (["loss=dpo", "alpha=0.3"], "alpha=0.3: nothing in this run uses alpha"),
        (["train.max_length=1"], "train.max_length=1: must be at least 2"),
        (["dataset=pairs_file"], "dataset.path"),
        (["--examples"], "unrecognized arguments: --examples; see python -m dppo.inspect --help"),
    ],
)
def test_errors_are_one_line(words: list[str], message: str, capsys: Captured) -> None:
    assert message in complaint(capsys, *words)


@pytest.mark.parametrize("no_color", [False, True])
def test_colours_are_for_terminals_that_want_them(no_color: bool, forks: Forks, tmp_path: Path) -> None:
    """A real terminal: prompt, response and control tokens have three colours."""
    own, other = pty.openpty()
    words = [*small("loss=dpo", "sft=none"), "n=1"]
    environment = {name: value for name, value in outside().items() if name != "NO_COLOR"}
    environment |= {"NO_COLOR": "1"} if no_color else {}
    done = forks.start("dppo.inspect", words, cwd=tmp_path, env=environment, stdout=other)
    os.close(other)
    output = b""
    try:
        while part := os.read(own, 65536):
            output += part
    except OSError:  # the other side has hung up
        pass
    os.close(own)
    assert done.wait() == 0
    text = output.decode()
    assert ("\033" in text) != no_color
    if not no_color:
        prompt = re.search(r"prompt │ \033\[0m\033\[1;35m⟦<\|user\|>⟧\033\[0m\033\[(\d+)m[^\033]+\033\[0m", text)
        chosen = re.search(r"chosen │ \033\[0m\033\[(\d+)m[^\033]+\033\[0m\033\[1;35m⟦<\|end\|>⟧", text)
        assert prompt and chosen and prompt[1] != chosen[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_page_runs(
    line: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": "No."} for n in range(100)],
    )
    monkeypatch.chdir(tmp_path)
    _, _, module, *words = shlex.split(line)
    assert module == "dppo.inspect"
    assert "prompts in more than one split: 0" in shown(capsys, *words)
