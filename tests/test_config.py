"""The typed door, and the promise that every value in conf/ is one that something reads."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from dppo import config
from dppo.config import CONF_DIR, SWEEPS_DIR, _Door, compose, load
from dppo.errors import UserError
from tests.conftest import small

SETTINGS = ("_target_", "_recursive_", "_convert_", "defaults")


@dataclass(frozen=True)
class Inner:
    count: int
    rate: float | None


@dataclass(frozen=True)
class Outer:
    name: str
    on: bool
    mode: Literal["a", "b"]
    inner: Inner
    sizes: tuple[int, ...]
    limit: int | str | None


GOOD: dict[str, Any] = {
    "name": "x",
    "on": True,
    "mode": "a",
    "inner": {"count": 3, "rate": 1},
    "sizes": [1, 2],
    "limit": "p95",
}


def test_the_door_builds_exact_types() -> None:
    built = _Door(()).build(Outer, GOOD, "outer")
    assert built == Outer("x", True, "a", Inner(3, 1.0), (1, 2), "p95")
    assert isinstance(built.inner.rate, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "outer.name=3: must be text"),
        ({"on": 1}, "outer.on=1: must be true or false"),
        ({"on": "yes"}, "outer.on=yes: must be true or false"),
        ({"mode": "c"}, "outer.mode=c: must be one of a, b"),
        ({"inner": {"count": True, "rate": None}}, "outer.inner.count=true: must be a whole number"),
        ({"inner": {"count": 2.0, "rate": None}}, "outer.inner.count=2.0: must be a whole number"),
        ({"inner": {"count": 2, "rate": "x"}}, "outer.inner.rate=x: must be a number"),
        ({"inner": {"count": 2, "rate": float("nan")}}, "outer.inner.rate=nan: must be a number"),
        ({"inner": {"count": 2}}, "outer.inner.rate: missing"),
        ({"inner": {"count": None, "rate": None}}, "outer.inner.count=null: must be a whole number"),
        ({"inner": 5}, "outer.inner=5: must be a mapping"),
        ({"inner": {"cuont": 2, "count": 1, "rate": None}}, "outer.inner.cuont=2: unknown key. Did you mean count?"),
        ({"sizes": 3}, "outer.sizes=3: must be a list"),
        ({"sizes": [1, "b"]}, r"outer.sizes\[1\]=b: must be a whole number"),
        ({"limit": 1.5}, "outer.limit=1.5: must be a whole number"),
        ({"limit": [1]}, r"outer.limit=\[1\]: must be a whole number"),
    ],
)
def test_the_door_refuses_with_key_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        _Door(()).build(Outer, {**GOOD, **change}, "outer")


def options() -> list[tuple[str, str]]:
    found = []
    for path in sorted(CONF_DIR.rglob("*.yaml")):
        if path.parent != CONF_DIR:
            found.append((path.parent.relative_to(CONF_DIR).as_posix(), path.stem))
    return found


# What an option needs before it can be composed on its own.
NEEDS = {
    ("dataset", "pairs_file"): ["dataset.path=pairs.jsonl"],
    ("dataset", "ranked_file"): ["dataset.path=ranked.jsonl"],
    ("dataset", "labelled_file"): ["dataset.path=labelled.jsonl"],
    ("experiment", "claim_e_low_edit_distance"): ["dataset.path=pairs.parquet"],
    ("model", "pretrained"): ["model.name_or_path=folder"],
    ("reward", "endpoint"): ["reward.server.base_url=http://localhost:8000/v1", "reward.model=m"],
    ("reward", "judge"): ["reward.model=m"],
}


@pytest.mark.parametrize(("group", "option"), options())
def test_every_option_composes_and_passes_the_door(group: str, option: str) -> None:
    words = [f"{'+' if group == 'experiment' else ''}{group}={option}", *NEEDS.get((group, option), [])]
    if group == "loss/base":
        words.append("loss=unll")
    if group == "dataset/chats":
        words.append("dataset=ultrafeedback")
    if group == "dataset/answers":
        words.append("dataset=on_policy")
    if group == "rates":
        words.append("dry_run=true")
    if group.startswith("hydra/sweeper/"):
        words.append("hydra/sweeper=optuna")
    experiment = load(compose(words), words)
    assert experiment.phases or words == ["loss=none"]


@pytest.mark.parametrize("name", [path.stem for path in sorted((SWEEPS_DIR / "sweep").glob("*.yaml"))])
def test_every_search_space_composes(name: str) -> None:
    composed = compose([f"+sweep={name}"], with_hydra=True)
    assert composed.hydra.sweeper.params


def test_every_sweep_is_named_in_the_help() -> None:
    text = (CONF_DIR / "config.yaml").read_text()
    for path in (SWEEPS_DIR / "sweep").glob("*.yaml"):
        assert path.stem in text


def _leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, (*path, str(key)))] or [path]
    return [path]


def test_every_leaf_of_every_option_is_an_attribute_that_the_code_reads() -> None:
    """A value that no code reads is a knob that does nothing."""
    package = Path(config.__file__).parent
    read: set[str] = set()
    for path in (*package.rglob("*.py"), *(package.parent / "hydra_plugins").glob("*.py")):
        tree = ast.parse(path.read_text())
        checks = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name == "__post_init__"
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in checks:
                read.add(node.attr)
    unread = set()
    for group, option in options():
        if group in ("experiment", "hydra/sweeper/sampler", "hydra/sweeper/pruner"):
            continue  # sets leaves of other groups, which the door knows, or arguments of Optuna's
        values = OmegaConf.to_container(OmegaConf.load(CONF_DIR / group / f"{option}.yaml"), resolve=False)
        for leaf in _leaves(values):
            if "parameters" in leaf and "parameters" in read:
                continue  # handed to a server as they are
            if leaf and leaf[0] not in SETTINGS and leaf[-1] not in SETTINGS and leaf[-1] not in read:
                unread.add((group, option, ".".join(leaf)))
    assert unread == set()


def test_settings_have_no_defaults_in_python() -> None:
    """conf/ is the one home of every default."""
    experiment = load(compose([]), [])

    def check(value: Any) -> None:
        if is_dataclass(value) and not isinstance(value, type):
            for field in fields(value):
                has_default = field.default is not field.default_factory
                assert not has_default, f"{type(value).__name__}.{field.name}"
                check(getattr(value, field.name))
        elif isinstance(value, dict):
            for item in value.values():
                check(item)

    check(experiment)


def test_both_spellings_of_the_penalty_are_one() -> None:
    assert config.canonical(["penalty_fn=linear", "seed=1"]) == ["penalty=linear", "seed=1"]
    assert config.canonical(["penalty=linear", "penalty_fn=linear"]) == ["penalty=linear"]
    assert config.canonical(["penalty_fn=linear,sqrt"]) == ["penalty=linear,sqrt"]
    with pytest.raises(UserError, match=r"^penalty=sqrt: penalty=linear is given too"):
        config.canonical(["penalty_fn=linear", "penalty=sqrt"])


def test_root_values_reach_every_loss_that_uses_them_and_only_when_set() -> None:
    default = load(compose(["loss=unll"]), []).phases["main"].loss
    changed = load(compose(["loss=unll", "beta=0.7", "alpha=0.3"]), []).phases["main"].loss
    assert default != changed
    assert (changed.alpha, changed.base.beta) == (0.3, 0.7)  # type: ignore[attr-defined]


def test_other_modules_are_built_only_when_they_are_allowed() -> None:
    words = [*small(), "reward._target_=tests.outside.Always", "~reward.met", "~reward.violated"]
    words += ["~reward.repetition", "~reward.surplus_word"]
    with pytest.raises(UserError, match=r"tests\.outside\.Always: only classes below dppo\."):
        load(compose(words), words)
    words.append("allowed_targets=[tests.outside]")
    assert type(load(compose(words), words).reward).__name__ == "Always"


def test_a_prefix_is_a_whole_module_name() -> None:
    words = ["allowed_targets=[tests.out]", "reward._target_=tests.outside.Always"]
    with pytest.raises(UserError, match="only classes below"):
        load(compose(words), words)
