from __future__ import annotations

import copy
import dataclasses
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
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides, create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from dppo.config import CONF_DIR, SWEEPS_DIR
from tests.forks import Forks, forking

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


def remember_merged(put: Callable[[Any, str, Any], None]) -> None:
    """Merge the files of dppo and Hydra once a process for each choice of options: most words only set values.

    Words are parsed, and values are set, each time.
    """
    merge = ConfigLoaderImpl._compose_config_from_defaults_list
    ours = {str(CONF_DIR), str(SWEEPS_DIR), "hydra.conf", ""}
    created: dict[tuple[Any, ...], DefaultsList] = {}
    merged: dict[tuple[Any, ...], DictConfig] = {}

    def sources(repo: IConfigRepository) -> tuple[tuple[str, str], ...] | None:
        found = tuple((one.provider, one.path) for one in repo.get_sources())
        return found if {path for _, path in found} <= ours else None  # files of a test may change

    def create_once(
        repo: IConfigRepository,
        config_name: str | None,
        overrides_list: list[Override],
        prepend_hydra: bool,
        skip_missing: bool,
    ) -> DefaultsList:
        values = Overrides(repo=repo, overrides_list=overrides_list).config_overrides
        options = [one.input_line for one in overrides_list if one not in values and not one.is_sweep_override()]
        key = (sources(repo), config_name, tuple(options), prepend_hydra, skip_missing)
        found = created.get(key)
        if found is None:
            found = create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
            if key[0] is not None:
                created[key] = found
        return dataclasses.replace(found, config_overrides=values)

    def merge_once(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        key = (sources(repo), *map(dataclasses.astuple, defaults))
        if key[0] is None:
            return merge(self, defaults, repo)
        if key not in merged:
            merged[key] = merge(self, defaults, repo)
        return copy.deepcopy(merged[key])

    put(config_loader_impl, "create_defaults_list", create_once)
    put(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge_once)


@pytest.fixture(scope="session", autouse=True)
def composed_quickly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        remember_parsed(patch.setattr)
        remember_merged(patch.setattr)
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


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Starts commands that are not about their start, which is most of what a small run costs."""
    with forking(outside()) as found:
        yield found


@pytest.fixture
def dppo(tmp_path: Path, forks: Forks) -> Run:
    """Run ``python -m dppo`` in an empty folder as a user would; returns the finished process."""

    def run(*arguments: str, timeout: float = 300, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return forks.run("dppo", arguments, cwd=cwd, env={**outside(), "COLUMNS": "100"}, timeout=timeout)

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
