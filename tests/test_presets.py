"""The presets of the published claims: every run that they stand for composes, and the twins run here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dppo.__main__ import _jobs, _search_space, _sweeper
from dppo.config import CONF_DIR, compose, load
from dppo.evaluation.comparison import compare_runs, configurations, sft_value
from dppo.evaluation.runs import find_runs
from tests.conftest import Run, small
from tests.test_command_line import typed
from tests.test_config import NEEDS

PRESETS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
CLAIMS = [name for name in PRESETS if name.startswith("claim_")]
TWINS = [name for name in CLAIMS if name.endswith("_tiny")]


def jobs(*words: str) -> list[list[str]]:
    sweeper = _sweeper(words)
    return _jobs(sweeper, [*_search_space(sweeper, words), *words])


def test_every_claim_has_a_preset_at_its_scale_and_a_twin() -> None:
    for letter in "abcdefg":
        kinds = {name.endswith("_tiny") for name in CLAIMS if name.startswith(f"claim_{letter}_")}
        assert kinds == {True, False}, letter


@pytest.mark.parametrize("name", CLAIMS)
def test_every_run_of_a_claim_composes(name: str) -> None:
    words = (f"experiment={name}", *NEEDS.get(("experiment", name), []))
    found = jobs(*words)
    swept = (yaml.safe_load((CONF_DIR / "experiment" / f"{name}.yaml").read_text()).get("hydra") or {}).get("sweeper")
    expected = 1
    for values in (swept or {"params": {}})["params"].values():
        expected *= len(str(values).split(","))
    assert len(found) == expected
    # Jobs that differ in their seed compose alike.
    apart = {tuple(word for word in job if not word.startswith("seed=")): job for job in found}
    for job in apart.values():
        experiment = load(compose(job), job)
        assert experiment.phases


def test_a_typed_key_takes_the_place_of_the_presets() -> None:
    assert len(jobs("experiment=claim_a_tiny")) == 25
    assert len(jobs("experiment=claim_a_tiny", "seed=3")) == 5
    (one,) = jobs("experiment=claim_a_tiny", "seed=3", "alpha=0.5")
    assert [word for word in one if word.startswith(("alpha", "seed"))] == ["seed=3", "alpha=0.5"]
    assert len(jobs("+sweep=alpha_grid", "alpha=0,1", "seed=7")) == 2
    assert jobs("loss=dpo,unll", "seed=1") == [["loss=dpo", "seed=1"], ["loss=unll", "seed=1"]]


@pytest.mark.slow
def test_dpo_lowers_what_follows_the_edit_and_dpo_positive_keeps_it(dppo: Run, tmp_path: Path) -> None:
    """The twin of claim (e) at its whole size, five seeds: the effect is beyond its interval. Some three minutes."""
    done = dppo("-m", "experiment=claim_e_tiny", "hydra.sweep.dir=sweep", timeout=3000)
    assert done.returncode == 0, done.stderr
    found = configurations(find_runs([tmp_path / "sweep"]))
    dpo, positive = compare_runs(found, metric="after_edit", baseline="loss=dpo", n_bootstrap=10_000, seed=0)
    reference = sft_value(found, "after_edit")
    assert len(dpo.seeds) == len(positive.seeds) == 5
    assert reference is not None
    assert dpo.value.high < reference
    assert positive.value.low < reference < positive.value.high
    assert positive.difference is not None
    assert positive.difference.low > 0


# Two of them in every run of the tests: an edit distance, and every method.
@pytest.mark.parametrize(
    "name",
    [name if name[6] in "eg" else pytest.param(name, marks=pytest.mark.slow) for name in TWINS],
)
def test_a_twin_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One job of every method of the twin, in one process, through the command line."""
    words = ["seed=0"]
    if name == "claim_a_tiny":
        words.append("alpha=0,0.01")
    if name == "claim_c_tiny":
        words.append("train.n_examples=8,null")
    if name == "claim_d_tiny":
        words += ["phases.unll.train.steps=3", "phases.dpo.train.n_examples=8", "phases.dpo.train.batch_size=4"]
    own = [word.partition("=")[0] for word in words]
    unread = {"claim_c_tiny": "train.steps", "claim_d_tiny": "train."}.get(name, "nothing")
    limits = [
        word
        for word in small(f"experiment={name}")[1:]
        if word.partition("=")[0] not in own and not word.startswith(unread)
    ]
    status = typed(monkeypatch, tmp_path, "-m", f"experiment={name}", *words, *limits, "hydra.sweep.dir=sweep")
    assert status == 0, capfd.readouterr().err
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/result.json"))]
    n_methods = {"a": 2, "b": 2, "c": 4, "d": 1, "e": 2, "f": 3, "g": 9}[name.split("_")[1]]
    assert len(results) == n_methods
    assert all(result["status"] == "complete" for result in results)
    if name == "claim_e_tiny":
        assert all(result["after_edit"]["n_pairs"] > 0 for result in results)
