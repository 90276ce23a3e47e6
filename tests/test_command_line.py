"""What a user types and what comes back: one line for a mistake, a complete run directory for a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dppo.__main__ as entry
from tests.conftest import Run, small


def typed(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> int:
    """Run the command line inside this process, in ``folder``; returns the exit status."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["dppo", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    try:
        return entry.main()
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def is_one_line(status: int, err: str, out: str, named: list[str]) -> None:
    """A user's error: its exit status, one line that holds what is ``named``, and no traceback."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err + out
    for word in named:
        assert word in lines[0]


JSON_LINE = json.dumps({"prompt": "Say hello.", "chosen": "Hello!", "rejected": "No."})

PICKLING = "hydra.experimental.callbacks.PickleJobInfoCallback"

MISTAKES: list[tuple[str, list[str], list[str]]] = [
    ("near-miss", ["alhpa=0.1"], ["alhpa=0.1", "Did you mean alpha?"]),
    ("near-miss inside a group", ["train.learning_rat=1"], ["train.learning_rat=1", "train.learning_rate"]),
    ("key of another group", ["batch_size=4"], ["batch_size=4", "Did you mean sft.train.batch_size?"]),
    ("key of another option", ["dataset=on_policy", "dataset.n_pairs=4"], ["Did you mean dataset.source.n_pairs?"]),
    ("unknown key", ["wibble=1"], ["wibble=1", "unknown key"]),
    ("appended key", ["+wibble=1"], ["wibble=1", "unknown key"]),
    ("forced key", ["++train.stray=1"], ["train.stray=1", "unknown key", "learning_rate"]),
    ("unknown option", ["loss=unl"], ["loss=unl", "Did you mean unll?", "dpo"]),
    ("unknown option elsewhere", ["dataset=on_policy", "reward@dataset.ranker=nope"], ["reward@dataset.ranker=nope: "]),
    ("unknown base", ["loss/base=simpoo"], ["loss/base=simpoo", "Did you mean simpo?"]),
    ("unknown experiment", ["+experiment=nothing"], ["experiment=nothing", "no such option"]),
    ("wrong type", ["train.steps=many"], ["train.steps=many", "whole number"]),
    ("fraction for a count", ["train.steps=1.5"], ["train.steps=1.5", "whole number"]),
    ("text for a root value", ["alpha=abc"], ["alpha=abc", "must be a number"]),
    ("boolean for a number", ["train.learning_rate=true"], ["train.learning_rate=true", "must be a number"]),
    ("not one of the choices", ["train.schedule=cosin"], ["train.schedule=cosin", "Did you mean cosine?"]),
    ("negative alpha", ["alpha=-1"], ["alpha=-1", ">= 0"]),
    ("zeta out of range", ["penalty=expectile", "zeta=1.5"], ["zeta=1.5", "below 1"]),
    ("beta of zero", ["beta=0"], ["beta=0", "> 0"]),
    ("not a number", ["alpha=nan"], ["alpha"]),
    ("steps and epochs", ["train.epochs=1"], ["train.steps=", "either steps or epochs"]),
    ("best without evaluations", ["train.save=best", "train.evaluate_every=null"], ["train.save=best"]),
    ("percentile", ["train.max_length=p0"], ["train.max_length=p0", "p95"]),
    ("alpha without a penalty", ["loss=dpo", "alpha=0.3"], ["alpha=0.3", "nothing in this run uses alpha"]),
    ("zeta without expectile", ["zeta=0.3"], ["zeta=0.3", "expectile"]),
    ("penalty without a penalised loss", ["loss=dpo", "penalty=linear"], ["penalty=linear", "loss"]),
    ("base without a penalised loss", ["loss=dpo", "loss/base=ipo"], ["loss/base=ipo"]),
    ("loss beside phases", ["+experiment=unll_then_dpo", "loss=ipo"], ["loss=ipo", "phase"]),
    ("both spellings", ["penalty=linear", "penalty_fn=sqrt"], ["penalty_fn=sqrt", "penalty=linear"]),
    ("several values without -m", ["seed=1,2"], ["seed=1,2", "-m"]),
    ("not an override", ["alpha"], ["alpha", "key=value"]),
    ("foreign class", ["model._target_=os.system"], ["os.system", "allowed_targets"]),
    ("absent class", ["loss.base._target_=dppo.losses.pairwise.Nope"], ["Nope", "no such class"]),
    ("wrong kind of class", ["reward._target_=dppo.tracking.Nothing"], ["reward"]),
    ("removed key", ["~seed"], ["seed", "missing"]),
    ("absent device", ["device=cuda"], ["device=cuda", "device=cpu"]),
    ("unknown device", ["device=gpu"], ["device=gpu", "auto"]),
    ("unknown objective", ["objectives=[win_rate.valeu]"], ["win_rate.valeu", "Did you mean win_rate.value?"]),
    ("no objective", ["objectives=[]"], ["objectives=[]"]),
    ("4-bit on a CPU", ["train=lora_4bit"], ["base_4bit", "CUDA"]),
    ("LoRA on no module", ["train=lora", "train.lora.target_modules=[nope]"], ["target_modules", "nope"]),
    ("missing folder", ["dataset=ultrafeedback", "dataset.path=/nonexistent/folder"], ["/nonexistent/folder"]),
    ("missing file", ["dataset=pairs_file", "dataset.path=nowhere.jsonl"], ["nowhere.jsonl"]),
    ("no path", ["dataset=pairs_file"], ["dataset.path", "missing"]),
    ("empty file", ["dataset=pairs_file", "dataset.path=empty.jsonl"], ["empty.jsonl"]),
    ("malformed line", ["dataset=pairs_file", "dataset.path=torn.jsonl"], ["torn.jsonl:2"]),
    ("missing column", ["dataset=pairs_file", "dataset.path=columns.jsonl"], ["rejected", "refused"]),
    ("no assistant turn", ["dataset=pairs_file", "dataset.path=users.jsonl"], ["users.jsonl"]),
    (
        "too long rows",
        ["dataset=pairs_file", "dataset.path=pairs.jsonl", "reward=length", "sft.train.max_length=3"],
        ["sft.train.max_length=3", "20 examples"],
    ),
    ("a reward that can't score", ["dataset=pairs_file", "dataset.path=pairs.jsonl"], ["reward=verifiable"]),
    (
        "ranked answers without scores",
        ["dataset=ranked_file", "dataset.path=columns.jsonl", "loss=rrhf"],
        ["columns.jsonl", "responses, scores", "refused"],
    ),
    (
        "labels that are missing",
        ["dataset=labelled_file", "dataset.path=columns.jsonl", "loss=kto"],
        ["columns.jsonl", "completion, label", "refused"],
    ),
    (
        "single answers for a loss of groups",
        ["dataset=labelled_file", "dataset.path=labelled.jsonl", "dataset.sft_path=chats.jsonl", "loss=rrhf"],
        ["phase main", "loss=rrhf", "loss=kto"],
    ),
    (
        "groups of one",
        ["dataset=ranked_file", "dataset.path=ones.jsonl", "loss=rrhf"],
        ["ones.jsonl", "fewer than two different answers: 26"],
    ),
    ("init_from nothing", ["init_from=nowhere"], ["init_from=nowhere", "result.json"]),
    ("init_from with sft", ["init_from=nowhere", "sft.seed=1"], ["sft.seed=1", "init_from"]),
    ("nothing to train", ["sft=none", "loss=none"], ["sft.train=null"]),
    (
        "reward model that is not there",
        ["reward=classifier", "reward.name_or_path=/none"],
        ["reward.name_or_path=/none"],
    ),
    ("unknown flag", ["--nope"], ["unrecognized arguments: --nope", "--help"]),
    ("flag without its partner", ["--resolve"], ["--resolve", "--cfg"]),
    ("a pickle", ["--experimental-rerun=config.pickle"], ["--experimental-rerun", "pickle"]),
    ("a shortened flag", ["--experimental-r", "config.pickle"], ["--experimental-rerun", "pickle"]),
    ("a callback", ["+hydra.callbacks.x._target_=os.getcwd"], ["os.getcwd", "allowed_targets"]),
    ("a callback of Hydra's that pickles", [f"+hydra.callbacks.x._target_={PICKLING}"], ["nothing is pickled"]),
    ("a launcher", ["-m", "seed=0,1", "hydra.launcher._target_=os.getcwd"], ["os.getcwd", "allowed_targets"]),
    ("a logging handler", ["hydra.job_logging.handlers.file.class=os.getcwd"], ["file.class=os.getcwd"]),
    ("what logging imports", ["hydra.job_logging.handlers.file.filename=ext://os.environ"], ["ext://os.environ"]),
    ("logging that cannot be", ["hydra.job_logging.version=2"], ["hydra.job_logging.version=2", "Unsupported version"]),
    ("a group that is a number", ["model=0.5"], ["model=0.5", "cannot be composed"]),
    ("nothing removed", ["~=1"], ["~=1"]),
    ("a wrong key beside a wrong group", ["phases.x.loss=1", "model=-inf"], ["phases.x.loss=1"]),
    ("phases that are a number", ["phases=0.5"], ["phases=0.5", "must be a mapping"]),
    ("5000 digits", ["seed=" + "1" * 5000], ["seed=1111", "cannot be composed"]),
    ("more than 64 bits", ["seed=9223372036854775808"], ["seed=0x8000000000000000...", "64 bits"]),
    ("a very long value", ["train.precision=" + "x" * 5000], ["train.precision=xxx", " ... ", "fp32, bf16"]),
    ("NUL", ["cache.dir='a\0b'"], ["cache.dir=a␀b", "NUL"]),
    ("a circle", ["alpha=${beta}", "beta=${alpha}"], ["alpha"]),
    ("a range without end", ["-m", "seed=range(0,1000000000)"], ["seed=range(0,1000000000)", "10,000 values"]),
    ("a choice in a choice", ["-m", "seed=choice(1,2),3"], ["seed=choice(1,2),3", "no further choice"]),
    ("an interval among values", ["-m", "alpha=1,tag(log,interval(0,1))"], ["alpha=1,", "no further choice"]),
    ("a key swept twice", ["-m", "seed=1,2", "seed=3,4"], ["seed=1,2", "seed is swept twice"]),
    ("a number of 5000 digits", ["-m", "seed=1,2", f"alpha={'1' * 5000}"], ["cannot be read", "alpha=111"]),
    ("no penalty by name", ["~penalty._target_"], ["loss.penalty: has no _target_", "conf/penalty/"]),
    ("a backslash for an option", ["penalty=\\"], ["penalty=", "there is no such option"]),
    ("a range of no step", ["-m", "seed=range(0,3,0)"], ["a step of 0"]),
    ("a range of nothing", ["-m", "seed=range(3,0)"], ["seed=range(3,0)", "no value"]),
    ("too many jobs", ["-m", "seed=range(0,200)", "alpha=range(0,200)"], ["40,000 jobs"]),
    ("a pattern of options", ["-m", "loss=glob(d*)"], ["loss=glob(d*)", "one by one"]),
    ("a phase that is a path", ["++phases={../x:{loss:${loss},train:${train},reference:sft}}"], ["phases=../x"]),
    ("a project that is a path", ["tracking=wandb", "tracking.project=../../x"], ["tracking.project=../../x"]),
    ("run directory", ["hydra.run.dir=file/run"], ["file"]),
    ("cache directory", ["cache.dir=file/cache"], ["file"]),
]


@pytest.mark.parametrize(("words", "named"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(
    words: list[str],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text(JSON_LINE + "\n" + JSON_LINE[:20] + "\n")
    (tmp_path / "columns.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "refused": "c"}) + "\n")
    turns = [{"role": "user", "content": "a"}]
    (tmp_path / "users.jsonl").write_text(json.dumps({"prompt": "a", "chosen": turns, "rejected": turns}) + "\n")
    rows = [
        {"prompt": f"Say {word}.", "chosen": f"{word}!", "rejected": "No."} for word in "abcdefghijklmnopqrstuvwxyz"
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ones = [{"prompt": row["prompt"], "responses": ["a"], "scores": [1]} for row in rows]
    (tmp_path / "ones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ones))
    labelled = [{"prompt": row["prompt"], "completion": "a", "label": True} for row in rows]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    answer = {"role": "assistant", "content": "b"}
    talks = [{"messages": [{"role": "user", "content": row["prompt"]}, answer]} for row in rows]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    (tmp_path / "file").write_text("in the way")
    before = sorted(path.name for path in tmp_path.iterdir())
    status = typed(monkeypatch, tmp_path, *small(*words))
    output = capfd.readouterr()
    is_one_line(status, output.err, output.out, named)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    artifacts = [path for path in left if "manifest.json" in path]
    results = [path for path in left if path.endswith(("result.json", "samples.jsonl"))]
    assert results == [], "no result is written for a run that did not happen"
    if not any(word.startswith("train") and "lora" in word for word in words):
        assert artifacts == []
    assert set(before) <= {path.name for path in tmp_path.iterdir()}


def test_the_offending_job_of_a_multirun_is_named_before_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status = typed(monkeypatch, tmp_path, "loss=unll,dpo", "alpha=0.1", "-m")
    output = capfd.readouterr()
    assert status == 2
    assert "job 1 (loss=dpo alpha=0.1): alpha=0.1: nothing in this run uses alpha" in output.err
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_every_file_and_nothing_elsewhere(
    dppo: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    done = dppo(*small("loss=unll", "penalty_fn=quadratic", "alpha=0.1"), "hydra.run.dir=here", "cache.dir=there")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"here", "there"}
    files = {path.name for path in (tmp_path / "here").iterdir()}
    assert files == {
        ".hydra",
        "command.txt",
        "config.yaml",
        "metrics.jsonl",
        "parents.json",
        "result.json",
        "run.log",
        "pairs.jsonl",
        "samples.jsonl",
        "versions.json",
    }
    result = json.loads((tmp_path / "here" / "result.json").read_text())
    assert result["schema"] == 1
    assert result["status"] == "complete"
    for text in ("build sft", "build y_gen", "build preference", "win rate (ties 1/2)", "here"):
        assert text in done.stdout
    words = small("loss=unll", "penalty=quadratic", "alpha=0.1")
    assert typed(monkeypatch, tmp_path, *words, "hydra.run.dir=again", "cache.dir=there") == 0
    again = capfd.readouterr().out
    assert "build" not in again, "both spellings of the penalty are one configuration"
    assert sum(line.startswith("reuse ") for line in again.splitlines()) == 9
    twin = json.loads((tmp_path / "again" / "result.json").read_text())
    assert twin["win_rate"] == result["win_rate"]


def test_a_multirun_keeps_its_jobs_apart_and_goes_on_after_a_failed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*small("loss=dpo", "train.lora=null"), "train=default,lora_4bit", "seed=3"]
    assert typed(monkeypatch, tmp_path, *words, "-m", "hydra.sweep.dir=many") == 2
    assert typed(monkeypatch, tmp_path, *small("loss=dpo"), "seed=0,1", "hydra.sweep.dir=many", "-m") == 0
    results = [json.loads((tmp_path / "many" / name / "result.json").read_text()) for name in ("0", "1")]
    assert [item["status"] for item in results] == ["complete", "complete"]
    reused = [item["stage"] for item in results[1]["timings"]["stages"] if item["reused"]]
    assert {"sft", "reference", "baseline"} <= set(reused)


def test_ctrl_c_leaves_a_clean_cache_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Long enough that the signal lands within training, whatever the machine's speed.
    words = small("loss=dpo", "train.steps=500", "train.evaluate_every=null", "cache.dir=cache")
    process = subprocess.Popen(
        [sys.executable, "-m", "dppo", *words, "hydra.run.dir=first"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    journal = tmp_path / "cache" / ".work"
    deadline = time.monotonic() + 240
    while not any(path.stat().st_size > 20_000 for path in journal.glob("preference-*/metrics.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert json.loads((tmp_path / "first" / "result.json").read_text())["status"] == "interrupted"
    assert not list((tmp_path / "cache" / "preference").glob("*")) or not (tmp_path / "cache" / "preference").exists()
    assert list(journal.glob("preference-*/step-*.safetensors"))
    assert typed(monkeypatch, tmp_path, *words, "hydra.run.dir=second") == 0
    assert "continues after step" in capfd.readouterr().out
    steps = [json.loads(line)["step"] for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 501))


def test_help_names_every_group_and_option(dppo: Run) -> None:
    from dppo.config import CONF_DIR

    done = dppo("--help")
    assert done.returncode == 0
    for path in CONF_DIR.rglob("*.yaml"):
        if path.parent != CONF_DIR:
            group = path.parent.relative_to(CONF_DIR).as_posix()
            line = next(line for line in done.stdout.splitlines() if line.startswith(f"{group}:"))
            assert path.stem in line
    assert dppo("--help", "seed=0").stdout == done.stdout  # Hydra's own, which composes first


@pytest.mark.parametrize("flags", [["--help"], ["--cfg", "job"]])
def test_printing_imports_no_heavy_package(flags: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from dppo.__main__ import main\n"
        f"sys.argv = ['dppo', *{flags!r}]\n"
        "status = main()\n"
        "heavy = {'torch', 'transformers', 'datasets', 'wandb', 'optuna', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_secret_of_the_environment_is_written(dppo: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WANDB_API_KEY", "planted-0123456789abcdef0123456789abcdef012")
    monkeypatch.setitem(os.environ, "HF_TOKEN", "hf_plantedplantedplanted")
    done = dppo(*small("loss=dpo", "tracking=wandb"), "hydra.run.dir=run", "cache.dir=cache")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"planted" not in path.read_bytes(), path
