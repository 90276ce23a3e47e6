"""Whole runs with tokenised data from the cache: equal to the last bit, and nothing is written that should not be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.utils import SAFE_WEIGHTS_NAME as WEIGHTS

from dppo import config, inspect
from dppo.artifacts import Manifest
from dppo.data import encoding, tokenised
from dppo.data.encoding import EncodedSet
from dppo.data.kept import Kept
from dppo.plan import plan
from tests.conftest import small
from tests.test_command_line import typed
from tests.test_plan import listing

# Pairs and chats enough to be kept; the limit cuts some of them.
WORDS = (
    "loss=unll",
    "penalty=quadratic",
    "alpha=0.1",
    "dataset.n_pairs=256",
    "dataset.n_chats=320",
    "train.max_length=p95",
    "sft.train.max_length=60",
)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(encoding, "_encoded", Kept[EncodedSet](8))


def ran(monkeypatch: pytest.MonkeyPatch, root: Path) -> Path:
    """A run through the command line; returns its directory."""
    words = small(*WORDS, "cache.dir=cache", "hydra.run.dir=run", "device=cpu")
    assert typed(monkeypatch, root, *words) == 0
    return root / "run"


def left(run: Path) -> dict[str, object]:
    """What a run leaves that has no time in it: numbers, answers, and the hashes of all weights and log-probs."""
    parents = json.loads((run / "parents.json").read_text())
    entries = [run.parent / "cache" / item["stage"] / item["fingerprint"] for item in parents]
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {
        **{name: (run / name).read_text() for name in ("samples.jsonl", "pairs.jsonl")},
        "metrics": [{key: row[key] for key in row if "second" not in key} for row in rows],
        "result": {
            key: value for key, value in json.loads((run / "result.json").read_text()).items() if key != "timings"
        },
        "parents": parents,
        "weights": [Manifest.read(path).files[WEIGHTS].sha256 for path in entries if (path / WEIGHTS).exists()],
        "shards": sorted(shard.name for path in entries for shard in path.glob("shards/*")),
    }


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokens came from files of the cache."""
    with pytest.MonkeyPatch.context() as patch:
        forget(patch)
        run = ran(patch, tmp_path_factory.mktemp("kept"))
    assert len(list(run.parent.glob("cache/tokens/*/shards/*"))) == 2
    return run


def test_a_run_is_the_same_with_and_without_it(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)
    monkeypatch.setattr(tokenised, "_LEAST", 10**9)
    plain = ran(monkeypatch, tmp_path)
    assert not (tmp_path / "cache" / "tokens").exists()
    assert left(kept) == left(plain)
    assert len(left(kept)["weights"]) == 2 and left(kept)["shards"]  # type: ignore[arg-type]


def test_dry_runs_and_inspect_read_it_and_write_nothing(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def look(cache: Path) -> str:
        words = [*small(*WORDS), f"cache.dir={cache}", "device=cpu"]
        forget(monkeypatch)
        plan(config.load(config.compose(words), words))
        forget(monkeypatch)
        capsys.readouterr()
        assert inspect.main([*words, "n=2"]) == 0
        return capsys.readouterr().out

    cache = kept.parent / "cache"
    before = listing(cache)
    assert look(tmp_path / "cache") == look(cache)
    assert not (tmp_path / "cache").exists()
    assert listing(cache) == before
