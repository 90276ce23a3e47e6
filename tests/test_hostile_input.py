"""What nobody should give, and what is said: properties of the typed door and of files, and a test for each bug found.

``python -m tests.fuzz`` makes many more cases, through the commands themselves.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dppo import config
from dppo.artifacts import Cache
from dppo.artifacts.manifest import Damaged, Manifest
from dppo.data.encoding import ChatEncoder
from dppo.data.rows import LabelledColumns, PairColumns, RankedColumns, read_examples
from dppo.data.sources import Published
from dppo.data.tiny_tokenizer import build_tokenizer
from dppo.digests import content_digest
from dppo.errors import UserError
from dppo.evaluation.runs import read_runs
from dppo.hub import local_folder
from dppo.report.table import number_of
from dppo.search.study import folder
from tests.fuzz.__main__ import main as fuzz
from tests.fuzz.words import VALUES, keys_of, mutation
from tests.runs import write_run

COLUMNS = (
    PairColumns("prompt", "chosen", "rejected", "score_chosen", None, "system"),
    RankedColumns("prompt", "responses", "scores", None),
    LabelledColumns("prompt", "completion", "label"),
)
NAMES = ("prompt", "chosen", "rejected", "score_chosen", "system", "responses", "scores", "completion", "label")
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", None]), "content": st.text(max_size=5) | st.none()}
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | TURN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
WORDS = st.one_of(
    st.integers(0, 2**32).map(lambda seed: mutation(random.Random(seed), ())),
    st.builds(lambda key, value: f"{key}={value}", st.sampled_from(keys_of((), False)), st.sampled_from(VALUES)),
    st.builds(lambda key, value: f"{key}={value}", st.sampled_from(keys_of((), False)), st.text(max_size=12)),
    st.text(min_size=1, max_size=20),
)


def is_one_line_or_right(words: list[str]) -> None:
    words = [word for word in words if not word.startswith("-")]
    try:
        config.from_words(words)
    except UserError as error:
        assert str(error).strip()
        assert "\n" not in str(error)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(WORDS, min_size=1, max_size=2))
def test_any_words_make_an_experiment_or_one_line(words: list[str]) -> None:
    is_one_line_or_right(words)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=3))
def test_many_words_make_an_experiment_or_one_line(words: list[str]) -> None:
    is_one_line_or_right(words)


def is_read_or_one_line(directory: Path, rows: list[Any], place: int) -> None:
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        examples, reading = read_examples([file], COLUMNS[place], True, "rows")
    except UserError as error:
        assert "rows.jsonl" in str(error)
        assert "\n" not in str(error)
    else:
        assert reading.n_kept + sum(reading.left_out.values()) == len(rows)
        for example in examples:  # what is kept can be written and tokenised
            assert all(one.text.strip() and one.text.encode() for one in example.responses)


ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=5) | ANYTHING, min_size=1, max_size=4)
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(rows=ROWS, place=st.integers(0, 2))
def test_any_rows_are_read_counted_or_refused(tmp_path: Path, rows: list[Any], place: int) -> None:
    is_read_or_one_line(tmp_path, rows, place)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None, suppress_health_check=QUIET)
@given(rows=ROWS, place=st.integers(0, 2))
def test_very_many_rows_are_read_counted_or_refused(tmp_path: Path, rows: list[Any], place: int) -> None:
    is_read_or_one_line(tmp_path, rows, place)


# --- a test for each class of bug that the fuzzer found ---


def encoder(template: str) -> ChatEncoder:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "{{ [messages] | sum }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
        "{{ 'x' * 99999999999999 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for %}",
    ],
)
def test_a_template_that_fails_is_one_line(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="chat template"):
        encoder(template)
    assert not list(tmp_path.iterdir())


def test_a_template_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dppo.data.encoding._TEMPLATE_SECONDS", 0.3)
    many = "{% for a in range(99999) %}"
    with pytest.raises(UserError, match="does not end within"):
        encoder(many + many + many + "{% endfor %}{% endfor %}{% endfor %}")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="is no file"):
        content_digest([tmp_path / "rows.jsonl"])
    run = write_run(tmp_path / "run", "loss=dpo", seed=0, rewards=[1.0])
    (run / "result.json").unlink()
    os.mkfifo(run / "result.json")
    _, (broken,) = read_runs([run])
    assert "result.json is no file" in broken.why


@pytest.mark.parametrize("content", ["[" * 100_000, '{"schema": ' + "9" * 5000 + "}"])
def test_a_result_beyond_the_parser_is_damage(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path / "run", "loss=dpo", seed=0, rewards=[1.0])
    (run / "result.json").write_text(content)
    _, (broken,) = read_runs([run])
    assert "result.json" in broken.why


def test_a_reward_beyond_floats_is_damage(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "loss=dpo", seed=0, rewards=[1.0])
    text = (run / "samples.jsonl").read_text()
    (run / "samples.jsonl").write_text(text.replace('"policy_reward": 1.0', f'"policy_reward": {10**400}'))
    _, (broken,) = read_runs([run])
    assert "finite rewards" in broken.why


def test_a_cell_that_is_no_number_is_none() -> None:
    nothing: Any = {}
    assert number_of(nothing) is None
    assert number_of(2) == 2.0


def published(path: Path, cache: Path) -> Published:
    return Published("dataset.path", str(path), "main", None, "train", None, None, str(cache))


def test_a_readme_nested_too_deeply_declares_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\n" + "[" * 3000 + "\n---\n")
    with pytest.raises(UserError, match="has no split train"):
        published(tmp_path, tmp_path / "cache").files("train")


def test_the_home_of_nobody_is_a_folder_that_is_not_there() -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        local_folder("~nobodyhere/model", "model.name_or_path")


# --- names that become paths ---


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "a\0b"])
def test_a_manifest_names_only_files_of_its_own_artifact(tmp_path: Path, name: str) -> None:
    slot = Cache(tmp_path).artifact("sft", {"number": 1})
    with slot.building() as build:
        (build.directory / "weights").write_bytes(b"x")
    manifest = Manifest.read(slot.path)
    forged = dataclasses.replace(manifest, files={name: next(iter(manifest.files.values()))})
    with pytest.raises(Damaged, match="no file of this artifact"):
        forged.check_files(slot.path, deep=True)


def test_a_configuration_of_many_words_has_a_directory_of_its_own() -> None:
    long = " ".join(f"train.key{number}={'é' * 20}" for number in range(40))
    names = {folder(long), folder(long + " "), folder("loss=dpo")}
    assert len(names) == 3
    assert all(len(name.encode()) <= 255 and "/" not in name for name in names)


# --- code in files ---


def test_code_beside_data_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "set"
    place.mkdir()
    (place / "set.py").write_text("import pathlib\npathlib.Path('pwned').touch()\n")
    for head in (
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: rows.pkl",
        "configs: !!python/object/apply:os.system ['touch pwned']",
    ):
        (place / "README.md").write_text(f"---\n{head}\n---\n")
        (place / "rows.pkl").write_bytes(b"cposix\nsystem\n(S'touch pwned'\ntR.")
        with pytest.raises(UserError, match=r"dataset\.path="):
            published(place, tmp_path / "cache").files("train")
    assert not (tmp_path / "pwned").exists()


def test_code_of_a_model_folder_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dppo.models import PretrainedModel

    monkeypatch.chdir(tmp_path)
    place = tmp_path / "model"
    place.mkdir()
    named = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}
    (place / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": named}))
    (place / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Mine", None]}}))
    (place / "code.py").write_text("import pathlib\npathlib.Path('pwned').touch()\nclass Mine: pass\n")
    model = PretrainedModel(str(place), "main", None)
    with pytest.raises(UserError, match="cannot be loaded"):
        model.load_model(0)
    with pytest.raises(UserError, match="cannot be loaded"):
        model.load_tokenizer()
    assert not (tmp_path / "pwned").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["overrides", "data", "sweeps"])
def test_the_fuzzer_finds_nothing(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    status = fuzz(["--only", kind, "--most", "60", "--minutes", "8", "--limit", "120"])
    assert status == 0, capfd.readouterr().out[-3000:]
