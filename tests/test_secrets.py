"""Planted secrets: after real runs they are in no file, packed or not, and in nothing that was printed."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dppo.__main__ as entry
from dppo import compare, config, export, sync
from dppo.report.__main__ import main as report
from tests.conftest import small
from tests.endpoint_server import serve
from tests.searches import pruning

PLANTED = {
    "WANDB_API_KEY": "planted-wandb-0123456789abcdef0123456789abcdef",
    "HF_TOKEN": "hf_plantedHuggingFace",
    "SCORER_KEY": "sk-planted-endpoint",
    "PGPASSWORD": "planted-database",
    "DPPO_STORAGE": "postgresql://me:planted-in-storage@127.0.0.1:9/trials",
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in a world whose environment holds secrets."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dppo", *words])
    try:
        return entry.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def contents(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and what is packed in it."""
    data = path.read_bytes()
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            yield from (packed.read(name) for name in packed.namelist())
    for found in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", data):  # streams inside of other formats
        with contextlib.suppress(zlib.error):
            yield zlib.decompressobj().decompress(data[found.start() :], 10**6)


def is_clean(folder: Path, printed: str) -> None:
    """Nothing planted is in a file of ``folder``, its name, or what was printed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for name, secret in PLANTED.items():
        word = secret.partition("me:")[2].partition("@")[0] or secret  # of a URL its password
        assert word not in printed, name
        for path in files:
            assert word not in str(path)
            assert not any(word.encode() in data for data in contents(path)), (name, path)


def test_the_search_for_secrets_finds_them(tmp_path: Path) -> None:
    secret = PLANTED["HF_TOKEN"].encode()
    (tmp_path / "a.gz").write_bytes(gzip.compress(secret))
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("x", secret)
    (tmp_path / "c").write_bytes(b"before" + zlib.compress(secret) + b"behind")
    for path in tmp_path.iterdir():
        assert any(secret in data for data in contents(path)), path


def test_runs_reports_and_exports_hold_no_secret(
    planted: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def say(body: dict[str, Any]) -> Any:
        return {"score": float(len(str(body)))}

    with serve(say) as server:
        words = small(
            "loss=dpo", "tracking=jsonl", "reward=endpoint", "reward.format=json", "hydra.run.dir=outputs/mine",
            f"reward.server.base_url={server.url}/score", "reward.server.api_key_env=SCORER_KEY",
        )  # fmt: skip
        assert run(monkeypatch, *words) == 0
        assert f"Bearer {PLANTED['SCORER_KEY']}" in server.keys
    # It answers no more, but with a page that repeats the key.
    with serve(lambda body: f"no access for {PLANTED['SCORER_KEY']}") as server:
        failing = [word for word in words if not word.startswith(("reward.server.base_url", "hydra.run.dir"))]
        failing += ["reward.server.max_attempts=1", f"reward.server.base_url={server.url}/x"]
        assert run(monkeypatch, *failing, "hydra.run.dir=outputs/failed") == 2
    assert report(["outputs/mine", "--n-bootstrap", "100"]) == 0
    assert export.main(["outputs/mine", "--model", "outputs/exported"]) == 0
    assert compare.main(["outputs", "--n-bootstrap", "100", "--json", "outputs/compared.json"]) == 0
    sync.main(["outputs", "--dry-run"])
    said = capfd.readouterr()
    assert "***" in said.err
    is_clean(planted, said.out + said.err)


def test_a_search_holds_no_secret(
    planted: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *pruning(2)) == 0
    assert list(planted.rglob("study.db"))
    # The database of DPPO_STORAGE is not there: its address may be told, its password not.
    refused = pruning(2, "hydra.sweeper.study_name=other", "hydra.sweeper.storage=${oc.env:DPPO_STORAGE}")
    assert run(monkeypatch, *refused) == 2
    said = capfd.readouterr()
    assert "127.0.0.1:9" in said.err
    is_clean(planted, said.out + said.err)


@pytest.mark.parametrize(
    "word",
    [
        "init_from=${oc.env:HF_TOKEN}",
        "objectives=['${oc.env:SCORER_KEY}']",
        f"init_from=x{PLANTED['HF_TOKEN']}y",
        f"+hydra.job.env_set.HF_TOKEN={PLANTED['HF_TOKEN']}",
    ],
)
def test_a_secret_in_a_value_is_refused_before_anything_is_written(
    word: str, planted: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, word) == 2
    said = capfd.readouterr()
    assert "holds the secret in the environment variable" in said.err
    assert not any(secret in said.out + said.err for secret in PLANTED.values())
    assert list(planted.iterdir()) == []


def test_what_is_no_secret_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TOKENIZERS_PARALLELISM", "instructions")
    monkeypatch.setitem(os.environ, "MY_TOKEN", "tiny")  # too short to be one
    words = ["dry_run=true"]
    config.load(config.compose(words), words)
