"""Whole runs with tokenised data from the cache: the same to the last bit, and nothing is written that should not be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dppo import config, inspect
from dppo.artifacts import Manifest
from dppo.data import encoding, tokenised
from dppo.data.encoding import EncodedSet
from dppo.data.kept import Kept
from dppo.plan import plan
from tests.conftest import small
from tests.runs import Finished, run_small
from tests.test_plan import listing

# Pairs and chats enough to be kept; the limit cuts some of them.
WORDS = ("loss=unll", "penalty=quadratic", "alpha=0.1", "dataset.n_pairs=256", "dataset.n_chats=320")
WORDS += ("train.max_length=p95", "sft.train.max_length=60")


@pytest.fixture(autouse=True)
def _a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_encoded", Kept[EncodedSet](8))


def left(run: Finished) -> dict[str, object]:
    """What a run leaves that has no time in it: numbers, answers, and the hashes of all weights and log-probs."""
    cache = run.directory.parent / "cache"
    parents = json.loads((run.directory / "parents.json").read_text())
    entries = [cache / item["stage"] / item["fingerprint"] for item in parents]
    return {
        **{name: (run.directory / name).read_text() for name in ("samples.jsonl", "pairs.jsonl")},
        "metrics": [{key: row[key] for key in row if not key.startswith("perf/")} for row in run.metrics],
        "result": {key: value for key, value in run.result.items() if key != "timings"},
        "parents": parents,
        "files": {
            path.name: {name: file.sha256 for name, file in Manifest.read(path).files.items() if "safetensors" in name}
            for path in entries
        },
        "shards": sorted(shard.name for path in entries for shard in path.glob("shards/*")),
    }


def test_a_run_is_the_same_with_and_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = run_small(tmp_path / "kept", *WORDS)
    assert len(list((tmp_path / "kept" / "cache").glob("tokens/*/shards/*"))) == 2
    monkeypatch.setattr(encoding, "_encoded", Kept[EncodedSet](8))
    monkeypatch.setattr(tokenised, "_LEAST", 10**9)
    plain = run_small(tmp_path / "plain", *WORDS)
    assert not (tmp_path / "plain" / "cache" / "tokens").exists()
    assert left(kept) == left(plain)
    assert left(kept)["files"] and left(kept)["shards"]


def test_dry_runs_and_inspect_read_it_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    words = [word for word in small(*WORDS, f"cache.dir={cache}", "device=cpu") if "penalty" not in word]

    def look() -> tuple[object, str]:
        monkeypatch.setattr(encoding, "_encoded", Kept[EncodedSet](8))
        experiment = config.load(config.compose(words), words)
        steps = plan(experiment).steps
        monkeypatch.setattr(encoding, "_encoded", Kept[EncodedSet](8))
        capsys.readouterr()
        assert inspect.main([*words, "n=2"]) == 0
        return steps, capsys.readouterr().out

    before = look()
    assert not cache.exists()
    experiment = config.load(config.compose(words), words)
    kept = tokenised.Tokenised(encoding.Cache(cache), experiment.dataset.identity())  # type: ignore[attr-defined]
    del kept
