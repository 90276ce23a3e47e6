from __future__ import annotations

import copy
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

# A whole run in a second or two: a model of a few thousand parameters, a handful of examples, few resamples.
SMALL = (
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.n_layers=1",
    "model.n_heads=2",
    "model.n_key_value_heads=2",
    "dataset.n_chats=64",
    "dataset.n_pairs=32",
    "dataset.n_validation=16",
    "dataset.n_test=24",
    "sft.train.steps=4",
    "sft.train.evaluate_every=2",
    "sft.train.n_evaluation_examples=4",
    "sft.train.log_every=1",
    "train.steps=8",
    "train.batch_size=4",
    "train.log_every=1",
    "train.evaluate_every=5",
    "train.n_evaluation_examples=4",
    "generation.max_new_tokens=8",
    "evaluation.n_prompts=8",
    "evaluation.n_pairs=8",
    "evaluation.n_kl_prompts=4",
    "evaluation.n_bootstrap=100",
    "report=false",
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def small(*overrides: str) -> list[str]:
    """``SMALL`` with these overrides in place of those with the same key, and without what other options lack."""
    given = {override.partition("=")[0] for override in overrides}
    given |= {name.replace("dataset.source.", "dataset.") for name in given}
    words = [word for word in SMALL if word.partition("=")[0] not in given]
    chosen = {override.partition("=")[0]: override.partition("=")[2] for override in overrides}
    if chosen.get("model", "tiny") != "tiny":
        words = [word for word in words if not word.startswith("model.")]
    on_policy = chosen.get("dataset") == "on_policy" or chosen.get("+experiment") == "iterated_dpo"
    if on_policy and "dataset@dataset.source" not in chosen:
        words = [re.sub(r"^dataset\.", "dataset.source.", word) for word in words]
    elif chosen.get("dataset", "instructions") not in ("instructions", "arithmetic"):
        words = [word for word in words if not word.startswith("dataset.")]
    if chosen.get("loss") == "none" or "+experiment" in chosen:
        words = [word for word in words if not word.startswith("train.")]
    if chosen.get("sft") == "none" or "init_from" in chosen:
        words = [word for word in words if not word.startswith("sft.")]
    return [*overrides, *words]


def outside() -> dict[str, str]:
    """The environment as a user's shell has it: tests of this process may have left W&B's service in its own."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}


def once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """A directory that ``build`` fills once for all processes of this test session; nobody may change it."""
    root = factory.getbasetemp()
    place = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / f"once-{name}"
    with FileLock(f"{place}.lock"):
        if not place.with_suffix(".done").exists():
            place.mkdir()
            build(place)
            place.with_suffix(".done").touch()
    return place


def remember_parsed(put: Callable[[Any, str, Any], None]) -> None:
    """Parse a YAML text once a process: tests compose thousands of configurations, of a few dozen files."""
    parsed: dict[tuple[str, str | bytes], Any] = {}
    load = yaml.load

    def remembered(stream: Any, Loader: Any) -> Any:
        text = stream
        if hasattr(stream, "seek"):
            text = stream.read()
            stream.seek(0)  # an error names the file
        key = (Loader.__name__, text)
        if key not in parsed:
            parsed[key] = load(stream, Loader)
        return copy.deepcopy(parsed[key])

    put(yaml, "load", remembered)


@pytest.fixture(scope="session", autouse=True)
def parsed_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        remember_parsed(patch.setattr)
        yield


@pytest.fixture(autouse=True)
def no_handler_stays() -> Iterator[None]:
    """A command line that ran inside a test has set up logging, to a stream that ends with the test."""
    loggers = [logging.getLogger(), logging.getLogger("dppo")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.setLevel(level)
        for handler in logger.handlers[:]:
            # Those of pytest come and go with the phases of a test.
            if handler not in handlers and type(handler) in (logging.StreamHandler, logging.FileHandler):
                logger.removeHandler(handler)


@pytest.fixture
def sigint_as_in_a_terminal() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def dppo(tmp_path: Path) -> Run:
    """Run ``python -m dppo`` in an empty folder as a user would; returns the finished process."""

    def run(*arguments: str, timeout: float = 300, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dppo", *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**outside(), "COLUMNS": "100"},
        )

    return run


@pytest.fixture
def two_processes(tmp_path: Path) -> Run:
    """The same under torchrun with two processes."""

    def run(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        return subprocess.run(
            [sys.executable, *launcher, "-m", "dppo", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**outside(), "OMP_NUM_THREADS": "1"},
        )

    return run
