"""Who may import whom: the rules that a newcomer can trust."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import dppo

PACKAGE = Path(dppo.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Absolute names of modules that a file imports; type-checking blocks do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    name, found = name_of(path), imports(path)
    roots = {module.partition(".")[0] for module in found}
    inside = {module.removeprefix("dppo.") for module in found if module.startswith("dppo.")}
    if not name.startswith("tracking."):
        assert not roots & {"wandb", "wandb_workspaces"}
    if name not in ("__main__", "config"):
        assert not roots & {"hydra", "omegaconf"}
    if name.startswith("losses"):
        outside = {root for root in roots if root not in ("torch", "dppo")}
        assert outside <= {"__future__", "collections", "dataclasses", "typing", "math", "warnings", "abc"}
        assert all(module.split(".")[0] in ("losses", "types", "errors") for module in inside)
    if name == "types":
        assert roots <= {"__future__", "torch", "dataclasses", "collections", "functools", "typing"}
    if name.startswith("stages."):
        others = {module for module in inside if module.startswith("stages.") and module.count(".") == 1}
        assert others <= {"stages.workbench", "stages.training", "stages.preflight"}, "stages never import each other"
    if name.startswith(
        ("losses", "data", "models", "rewards", "generation", "artifacts", "tracking", "loop", "logps", "attention")
    ):
        assert not {module.split(".")[0] for module in inside} & {"stages", "pipeline", "__main__"}
    assert "pickle" not in roots


# Modules that settings classes live in are imported to check a configuration: they must be cheap.
CHEAP = [
    "config",
    "command_line",
    "dotted",
    "errors",
    "terminal",
    "progress",
    "tracking",
    "tracking.weights_and_biases",
    "tracking.json_lines",
    "tracking.workspace",
    "tracking.uploads",
    "sync",
    "dashboard",
    "artifacts.cache",
    "cache",
    "methods",
    "inspect",
    "export",
    "model_card",
    "models",
    "search.plots",
    "search.plot_axes",
    "rewards.sentiment",
    "data.published",
    "data.preferences",
    "data.corrupted",
    "data.files",
    "data.on_policy",
]


@pytest.mark.parametrize("name", CHEAP)
def test_heavy_packages_are_imported_where_they_are_used(name: str) -> None:
    path = PACKAGE / (name.replace(".", "/") + ".py")
    if not path.exists():
        path = PACKAGE / name.replace(".", "/") / "__init__.py"
    roots = {module.partition(".")[0] for module in imports(path, top_level_only=True)}
    assert not roots & {
        "transformers",
        "datasets",
        "wandb",
        "wandb_workspaces",
        "optuna",
        "accelerate",
        "peft",
        "pyarrow",
        "matplotlib",
    }


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_is_trusted_that_runs_code(path: Path) -> None:
    text = path.read_text()
    for word in ("torch.load(", "torch.save(", "weights_only=False", "trust_remote_code=True", "eval(", "exec("):
        for line in text.splitlines():
            if word in line:
                before = line.partition(word)[0][-1:]
                assert before == "." or before.isalnum() or before == "_", f"{path.name}: {line.strip()}"
