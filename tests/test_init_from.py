"""A run that goes on from a finished one, and a model that is taken without fine-tuning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dppo.errors import UserError
from tests.runs import run_small


def test_a_run_goes_on_from_a_finished_one_as_a_second_phase_would(tmp_path: Path) -> None:
    chained = run_small(
        tmp_path,
        "+experiment=unll_then_dpo",
        "phases.unll.train.steps=3",
        "phases.dpo.train.steps=2",
        "alpha=0.1",
    )
    first = run_small(tmp_path, "+experiment=unll_then_dpo", "phases.unll.train.steps=3", "~phases.dpo", "alpha=0.1")
    words = [word for word in chained.result["command"].split() if word.startswith("phases.dpo.train")]
    assert words == ["phases.dpo.train.steps=2"]
    again = run_small(
        tmp_path,
        "+experiment=unll_then_dpo",
        "~phases.unll",
        "phases.dpo.train.steps=2",
        f"init_from={first.directory}",
    )
    assert "sft" in again.stages  # as the reference, and read only
    assert again.built == [], "the second phase of the chained run is this run"
    assert again.values == chained.values
    assert again.result["models"] == chained.result["models"]
    parents = {item["fingerprint"] for item in json.loads((again.directory / "parents.json").read_text())}
    assert first.result["models"]["policy"].partition("/")[2] in parents  # so that gc keeps it


def test_the_first_phase_may_take_the_finished_policy_as_its_reference(tmp_path: Path) -> None:
    first = run_small(tmp_path, "loss=dpo", "train.steps=2")
    words = ["+experiment=unll_then_dpo", "~phases.unll", "phases.dpo.reference=previous"]
    with pytest.raises(UserError, match="write reference: sft"):
        run_small(tmp_path, *words)
    again = run_small(tmp_path, *words, f"init_from={first.directory}", "phases.dpo.train.steps=2")
    ratios = [row["eval/log_ratio/chosen"] for row in again.metrics if "eval/log_ratio/chosen" in row]
    assert abs(ratios[0]) < 1e-5 < abs(ratios[-1])


def test_what_cannot_be_gone_on_from_is_one_line(tmp_path: Path) -> None:
    first = run_small(tmp_path, "loss=dpo", "train.steps=2")
    with pytest.raises(UserError, match=r"init_from=nowhere: has no result\.json"):
        run_small(tmp_path, "loss=dpo", "init_from=nowhere")
    with pytest.raises(UserError, match=r"sft\.seed=1: with init_from no SFT model is trained"):
        run_small(tmp_path, "loss=dpo", f"init_from={first.directory}", "sft.seed=1")
    model = tmp_path / "cache" / first.result["models"]["reference"]
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    other = ("model=pretrained", f"model.name_or_path={model}", f"model.chat_template={template}")
    with pytest.raises(UserError, match="another chat template than model="):
        run_small(tmp_path, "loss=dpo", f"init_from={first.directory}", *other)

    broken = tmp_path / "broken"
    shutil.copytree(first.directory, broken)
    result = json.loads((broken / "result.json").read_text())
    (broken / "result.json").write_text(json.dumps({**result, "status": "interrupted"}))
    with pytest.raises(UserError, match="that run is interrupted; finish it first: python -m dppo loss=dpo"):
        run_small(tmp_path, "loss=dpo", f"init_from={broken}")
    (broken / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"result\.json cannot be read"):
        run_small(tmp_path, "loss=dpo", f"init_from={broken}")
    stage, _, fingerprint = first.result["models"]["policy"].partition("/")
    shutil.rmtree(tmp_path / "cache" / stage / fingerprint)
    with pytest.raises(UserError, match=f"its policy preference {fingerprint[:4]} is not in"):
        run_small(tmp_path, "loss=dpo", f"init_from={first.directory}")


def test_a_model_is_taken_as_it_is(tmp_path: Path) -> None:
    found = run_small(tmp_path, "sft=none", "loss=dpo", "train.steps=2")
    assert found.result["status"] == "complete"
    assert not any(word.startswith("sft.train") for word in found.result["command"].split())
    again = run_small(tmp_path, "sft=none", "loss=dpo", "train.steps=2", "dataset.n_pairs=16")
    assert "sft" not in again.built  # no data entered it
    with pytest.raises(UserError, match=r"sft\.train=null: without a preference phase nothing is trained"):
        run_small(tmp_path, "sft=none", "loss=none")
