"""What a search saves: ``python -m benchmarks.sweep [--trials 20] [--independent 4] [--json FILE]``.

The search over alpha of the default job, without and with the default pruner, each on an empty cache, against as many
independent runs with empty caches. Of those only some are made, spread over the trials; their mean counts for all.
Each must end with the very number that the trial had. Takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEARCH = ["-m", "+sweep=alpha", "hydra.sweeper.baselines=[]", "hydra.sweeper.test_seeds=0", "report=false"]


def timed(folder: Path, *words: str) -> float:
    """Seconds of one command in ``folder``, start-up included."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "dppo", *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - started


def search(folder: Path, n_trials: int, pruner: str) -> dict[str, Any]:
    """One search on an empty cache: its seconds and its trials."""
    import csv

    seconds = timed(folder, *SEARCH, f"hydra.sweeper.n_trials={n_trials}", f"hydra/sweeper/pruner={pruner}")
    with (folder / "outputs" / "sweeps" / "alpha" / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    done = [float(trial["win_rate.value"]) for trial in trials if trial["state"] == "complete"]
    return {
        "pruner": pruner,
        "seconds": seconds,
        "complete": len(done),
        "pruned": sum(trial["state"] == "pruned" for trial in trials),
        "best": max(trials, key=lambda trial: float(trial["win_rate.value"] or "-inf")),
        "trials": trials,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--independent", type=int, default=4)
    parser.add_argument("--json", type=Path, default=None)
    chosen = parser.parse_args(argv)
    print(f"cpus={os.cpu_count()}  load_average={os.getloadavg()[0]:.2f}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = []
        for pruner in ("none", "median"):
            (folder / pruner).mkdir()
            found.append(search(folder / pruner, chosen.trials, pruner))
            one = found[-1]
            print(
                f"search, pruner={pruner}: {one['seconds']:.1f} s, {one['complete']} complete, {one['pruned']} pruned; "
                f"best {one['best']['win_rate.value']} [{one['best']['win_rate.value low']}, "
                f"{one['best']['win_rate.value high']}] at alpha {one['best']['alpha']}",
                flush=True,
            )
        trials = found[0]["trials"]
        alone = []
        for place in range(chosen.independent):
            trial = trials[place * len(trials) // chosen.independent]
            where = folder / f"alone-{place}"
            where.mkdir()
            seconds = timed(where, "+sweep=alpha", f"alpha={trial['alpha']}", "hydra.run.dir=run")
            result = json.loads((where / "run" / "result.json").read_text())
            same = f"{result['win_rate']['value']:.6g}" == trial["win_rate.value"]
            print(f"alone, empty cache: {seconds:.1f} s, alpha {trial['alpha']}, same result: {same}", flush=True)
            if not same:
                raise SystemExit("an independent run has another result than the trial")
            alone.append(seconds)
        whole = chosen.trials * statistics.mean(alone)
        print(
            f"{chosen.trials} independent runs: {whole:.0f} s ({len(alone)} measured: "
            f"{min(alone):.1f} to {max(alone):.1f} s)"
        )
        for one in found:
            print(f"search, pruner={one['pruner']}: {one['seconds'] / whole:.2f} of that")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"independent": alone, "searches": found}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
