"""Every loss, every penalty and every base of every family, each kind in one multirun of the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dppo.config import CONF_DIR, compose, load
from dppo.errors import UserError
from tests.conftest import small
from tests.test_command_line import typed

FAMILIES = ("minll", "unll", "conll", "npo", "simnpo")
# Bases without a logit that a generated answer's log-ratio fits into.
NOT_FOR_CONLL = ("cpo", "ipo", "orpo", "slic")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def commas(values: list[str] | tuple[str, ...]) -> str:
    return ",".join(values)


LOSSES = [name for name in options("loss") if name != "none"]
BASES = options("loss/base")
MULTIRUNS = {
    "every loss": ([f"loss={commas(LOSSES)}"], len(LOSSES)),
    "every penalty in every family": (
        [f"loss={commas(FAMILIES)}", f"penalty={commas(options('penalty'))}", "alpha=0.01"],
        len(FAMILIES) * len(options("penalty")),
    ),
    "every base in every family": (
        [f"loss={commas([name for name in FAMILIES if name != 'conll'])}", f"loss/base={commas(BASES)}", "alpha=0.01"],
        (len(FAMILIES) - 1) * len(BASES),
    ),
    "every base of conll": (
        ["loss=conll", f"loss/base={commas([name for name in BASES if name not in NOT_FOR_CONLL])}", "alpha=0.01"],
        len(BASES) - len(NOT_FOR_CONLL),
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name != "every loss" else name for name in MULTIRUNS],
)
def test_it_trains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words, n_jobs = MULTIRUNS[name]
    limits = small("train.steps=5", "evaluation.n_prompts=4", "evaluation.n_pairs=4", "evaluation.n_kl_prompts=2")
    status = typed(monkeypatch, tmp_path, "-m", *words, *limits, "hydra.sweep.dir=sweep")
    assert status == 0, capfd.readouterr().err
    jobs = sorted((tmp_path / "sweep").glob("*/result.json"))
    assert len(jobs) == n_jobs
    for job in jobs:
        result = json.loads(job.read_text())
        rows = [json.loads(line) for line in (job.parent / "metrics.jsonl").read_text().splitlines()]
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        assert result["status"] == "complete", result["command"]
        assert len(losses) == 5
        assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
        assert {"eval/logps_change/chosen", "eval/logps_change/rejected"} <= rows[-1].keys() | rows[-2].keys()


@pytest.mark.parametrize("base", NOT_FOR_CONLL)
def test_conll_refuses_a_base_without_a_logit_for_its_term(base: str) -> None:
    words = ["loss=conll", f"loss/base={base}"]
    with pytest.raises(UserError, match=f"loss.base={base}: loss=conll moves a generated answer's log-ratio into"):
        load(compose(words), words)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["loss=simpo", "loss.gamma=0.5", "loss.gamma_beta_ratio=0.2"], "gamma_beta_ratio=0.2: gamma=0.5 is given too"),
        (["loss=simpo", "loss.gamma=null"], "give one of them a number"),
        (["loss=dpo_positive", "loss.placement=outside", "loss.label_smoothing=0.1"], "placement=outside takes none"),
        (["loss=conll", "loss/base=dpo_positive", "loss.base.placement=outside"], "placement=inside"),
        (["loss=kto", "beta=0"], "beta=0: must be > 0"),
        (["loss=kto", "loss.value=hinge"], "must be one of sigmoid, log_sigmoid, identity"),
        (["loss=rrhf", "loss.lambda_=-1"], "lambda_=-1: must be >= 0"),
        (["loss=rrhf", "beta=0.1"], "nothing in this run uses beta"),
        (["loss=kto", "alpha=0.1"], "nothing in this run uses alpha"),
        (["loss=dpo", "penalty=linear"], "nothing in this run uses penalty"),
    ],
)
def test_contradictory_settings_are_refused(words: list[str], reason: str) -> None:
    with pytest.raises(UserError) as refusal:
        load(compose(words), words)
    assert reason in str(refusal.value)
