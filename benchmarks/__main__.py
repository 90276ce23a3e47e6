"""How the claims about speed are measured: ``python -m benchmarks [--only NAME ...] [--json FILE]``.

Every row compares two things in one run, in turn, so that a machine whose speed drifts cannot decide: the ratio of
each round is taken. A ratio is how many times the first one's time the second one takes: above 1 the first is faster.

Without further options everything is made with the embedded default model. The others take a real one:
``--model smollm2_135m``, and real pairs: ``--pairs FOLDER``, in UltraFeedback's layout. ``benchmarks.artifacts``
measures the cache alone, ``benchmarks.sweep`` a search against independent runs, ``benchmarks.parity`` compares losses
and gradients with TRL's.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from benchmarks.against_trl import memory, trl
from benchmarks.generation import generation
from benchmarks.growth import growth
from benchmarks.overhead import loop
from benchmarks.rows import Row, alternate
from benchmarks.setting import Setting
from benchmarks.steps import compiled, gate, step
from dppo.allocator import freed_memory_is_kept


def python(*arguments: str, environment: dict[str, str] | None = None) -> Callable[[], object]:
    def run() -> object:
        return subprocess.run(
            [sys.executable, *arguments],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    return run


def startup(rounds: int) -> list[Row]:
    """Flags that only print, against importing Hydra and against importing torch."""
    bare = ("import hydra", python("-c", "import hydra"))
    heavy = ("import torch", python("-c", "import torch"))
    return [
        alternate("startup", ("--help", python("-m", "dppo", "--help")), bare, rounds),
        alternate("startup", ("--cfg job", python("-m", "dppo", "--cfg", "job")), bare, rounds),
        alternate("startup", ("--help", python("-m", "dppo", "--help")), heavy, rounds),
    ]


def default_job(rounds: int) -> list[Row]:
    """The main job with another alpha on a warm cache, against a cold cache; one cold run each round."""
    with tempfile.TemporaryDirectory() as folder:
        number = iter(range(1_000_000))

        def cold(small_pages: bool = False) -> None:
            where = Path(folder) / f"cold-{next(number)}"
            pages = {"THP_MEM_ALLOC_ENABLE": "0"} if small_pages else {}
            python("-m", "dppo", f"cache.dir={where}", f"hydra.run.dir={where}/run", environment=pages)()
            result = json.loads((where / "run" / "result.json").read_text())
            stages = ", ".join(f"{item['stage']} {item['seconds']:.1f}" for item in result["timings"]["stages"])
            print(f"  cold: {stages}; total {result['timings']['total_seconds']:.1f} s", flush=True)

        shared = Path(folder) / "shared"
        python("-m", "dppo", f"cache.dir={shared}", f"hydra.run.dir={shared}/first")()

        def warm() -> None:
            alpha = 0.02 + next(number) / 1e5
            run = shared / f"run-{alpha}"
            python("-m", "dppo", f"alpha={alpha}", f"cache.dir={shared}", f"hydra.run.dir={run}")()

        few = max(1, rounds // 2)
        return [
            alternate("default job", ("another alpha, warm cache", warm), ("cold cache", cold), few),
            alternate("default job", ("huge pages", cold), ("small pages", functools.partial(cold, True)), few),
        ]


HERE: dict[str, Callable[[int], list[Row]]] = {"startup": startup, "default_job": default_job}
ON_A_MODEL: dict[str, Callable[[Setting, int], list[Row]]] = {
    "step": step,
    "compiled": compiled,
    "gate": gate,
    "generation": generation,
    "growth": growth,
    "loop": loop,
    "trl": trl,
    "memory": memory,
}
_PACKAGES = ("torch", "transformers", "trl", "llama-cpp-python")


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    from dppo.results import processor

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **versions,
    }


def main(argv: Sequence[str] | None = None) -> int:
    names = [*HERE, *ON_A_MODEL]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="where the rows are written")
    Setting.add_options(parser)
    chosen = parser.parse_args(argv)
    # As python -m dppo does; whoever is measured in this process has it too.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    found = machine()
    print("  ".join(f"{key}={value}" for key, value in found.items()), flush=True)
    setting = Setting.of(chosen)
    rows: list[Row] = []
    for name in chosen.only:
        with freed_memory_is_kept():  # as python -m dppo does, too
            made = HERE[name](chosen.rounds) if name in HERE else ON_A_MODEL[name](setting, chosen.rounds)
        print(f"\n{name}" + ("" if name in HERE else f": {setting.words}"), flush=True)
        print(_table(made), flush=True)
        rows += made
        if chosen.json is not None:  # after each part, so that an interruption loses one
            written = {"machine": found, "arguments": vars(chosen), "setting": setting.words}
            chosen.json.write_text(json.dumps(written | {"rows": [asdict(row) for row in rows]}, indent=2, default=str))
    return 0


def _table(rows: Sequence[Row]) -> str:
    lines = [("what", "first", "second", "best", "median", "unit", "ratio", "of best", "of CPU", "n", "")]
    for row in rows:
        digits = 0 if row.unit == "MiB" else 3
        lines.append(
            (
                row.name,
                row.first,
                row.second,
                f"{row.first_best:.{digits}f} {row.second_best:.{digits}f}",
                f"{row.first_median:.{digits}f} {row.second_median:.{digits}f}",
                row.unit,
                f"{row.ratio_median:.2f}",
                f"{row.ratio_best:.2f}",
                "" if row.ratio_cpu is None else f"{row.ratio_cpu:.2f}",
                str(row.rounds),
                row.note,
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
