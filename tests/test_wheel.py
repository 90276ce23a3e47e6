"""A wheel carries its configuration: it runs from an empty folder without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import small

ROOT = Path(__file__).resolve().parent.parent


def test_an_installed_wheel_runs_the_main_job_from_another_folder(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    made = subprocess.run(build, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, target in (("conf", "dppo/conf"), ("sweeps", "dppo/sweeps")):
        for path in (ROOT / folder).rglob("*.yaml"):
            assert f"{target}/{path.relative_to(ROOT / folder).as_posix()}" in names
    assert {"dppo/py.typed", "hydra_plugins/dppo_sweeper.py", "hydra_plugins/dppo_report.py"} <= names
    assert {f"dppo/report/templates/page.{kind}" for kind in ("html.j2", "css", "js")} <= names
    assert "hydra_plugins/__init__.py" not in names, "other packages have plugins in this namespace"
    assert not any(name.startswith(("tests/", "benchmarks/", "outputs/")) for name in names)
    # An environment of its own that sees the installed packages but not the checkout.
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # Behind the wheel's own folder, and without the .pth files there, one of which is the editable checkout.
    (site / "packages.pth").write_text(packages + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = str(environment / "bin" / "python")
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = subprocess.run(
        [program, "-c", "import dppo; print(dppo.__file__)"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        env=variables,
    )
    assert where.stdout.startswith(str(site)), where.stdout + where.stderr
    command = [program, "-m", "dppo", *small("loss=unll", "penalty=quadratic", "alpha=0.1")]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    assert "win rate (ties 1/2)" in done.stdout
    assert [path.name for path in elsewhere.iterdir()] == ["outputs"]
    entry = "from importlib.metadata import entry_points as e; print([x.value for x in e(name='dppo')])"
    script = subprocess.run([program, "-c", entry], cwd=elsewhere, capture_output=True, text=True, env=variables)
    assert "dppo.__main__:main" in script.stdout
    search = subprocess.run(
        [program, "-m", "dppo", "-m", "+sweep=alpha", "alpha=0.1"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        env=variables,
    )
    assert "error: hydra/sweeper=optuna: nothing is searched" in search.stderr, "the plugin is found"
