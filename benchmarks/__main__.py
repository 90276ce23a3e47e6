"""How the claims about speed are measured: ``python -m benchmarks [--only NAME ...] [--json FILE]``.

Every row compares two things in one run, in turn, so that a machine whose speed drifts cannot decide: the ratio of
each round is taken, and best and median of the rounds are printed. ``benchmarks.artifacts`` measures the cache alone,
``benchmarks.parity`` compares losses and gradients with TRL's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """``first`` against ``second``: seconds (best, median) of both, and the rounds' median ratio first / second."""

    name: str
    first: str
    second: str
    first_best: float
    first_median: float
    second_best: float
    second_median: float
    ratio_median: float
    rounds: int


def alternate(
    name: str, first: tuple[str, Callable[[], object]], second: tuple[str, Callable[[], object]], rounds: int
) -> Row:
    """Time two actions in turn after one warm-up of each."""
    seconds: dict[str, list[float]] = {first[0]: [], second[0]: []}
    for number in range(rounds + 1):
        for label, action in (first, second):
            started = time.perf_counter()
            action()
            if number:
                seconds[label].append(time.perf_counter() - started)
    own, other = seconds[first[0]], seconds[second[0]]
    ratios = [a / b for a, b in zip(own, other, strict=True)]
    return Row(
        name,
        first[0],
        second[0],
        min(own),
        statistics.median(own),
        min(other),
        statistics.median(other),
        statistics.median(ratios),
        rounds,
    )


def python(*arguments: str, cwd: Path | None = None) -> Callable[[], object]:
    def run() -> object:
        return subprocess.run([sys.executable, *arguments], cwd=cwd, check=True, capture_output=True, text=True)

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


def step(rounds: int) -> list[Row]:
    """One forward and backward pass of the default model: packed against padded, two and three responses."""
    import torch

    from dppo.batches import collate
    from dppo.config import compose, load
    from dppo.data.encoding import ChatEncoder
    from dppo.logps import ResponseScorer
    from dppo.types import EncodedExample, EncodedResponse

    experiment = load(compose([]))
    encoder = ChatEncoder(experiment.model.load_tokenizer())
    pairs = encoder.encode(experiment.dataset.pairs("train")[:8], None).examples
    chats = encoder.encode(experiment.dataset.chats("train")[:16], None).examples
    three: list[EncodedExample] = []
    for pair in pairs:
        chosen = pair.responses[0]
        third = EncodedResponse(chosen.response_id[::-1], "generated", chosen.token_ids[::-1], None)
        three.append(EncodedExample(pair.example_id, pair.prompt_id, pair.prompt_ids, (*pair.responses, third)))
    rows = []
    for name, examples in (("16 chats", chats), ("8 pairs", pairs), ("8 pairs with y_gen", three)):
        batch = collate(list(examples))

        def action(scorer: ResponseScorer, batch: Any = batch) -> Callable[[], object]:
            def run() -> None:
                scorer.zero_grad()
                scorer(batch).sum.sum().backward()

            return run

        torch.manual_seed(0)
        packed = ResponseScorer(experiment.model.load_model(0), "packed")
        padded = ResponseScorer(experiment.model.load_model(0), "padded")
        rows.append(alternate(f"step, {name}", ("packed", action(packed)), ("padded", action(padded)), rounds * 4))
    return rows


def default_job(rounds: int) -> list[Row]:
    """The main job with another alpha on a warm cache, against a cold cache; one cold run each round."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        number = iter(range(1_000_000))

        def cold() -> None:
            where = Path(folder) / f"cold-{next(number)}"
            python("-m", "dppo", f"cache.dir={where}", f"hydra.run.dir={where}/run")()
            result = json.loads((where / "run" / "result.json").read_text())
            stages = ", ".join(f"{item['stage']} {item['seconds']:.1f}" for item in result["timings"]["stages"])
            print(f"  cold: {stages}; total {result['timings']['total_seconds']:.1f} s")

        shared = Path(folder) / "shared"
        python("-m", "dppo", f"cache.dir={shared}", f"hydra.run.dir={shared}/first")()

        def warm() -> None:
            alpha = 0.02 + next(number) / 1e5
            run = shared / f"run-{alpha}"
            python("-m", "dppo", f"alpha={alpha}", f"cache.dir={shared}", f"hydra.run.dir={run}")()

        rows.append(
            alternate("default job", ("another alpha, warm cache", warm), ("cold cache", cold), max(1, rounds // 2))
        )
    return rows


BENCHMARKS = {"startup": startup, "step": step, "default_job": default_job}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=sorted(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    chosen = parser.parse_args(argv)
    machine = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }
    print("  ".join(f"{key}={value}" for key, value in machine.items()))
    rows: list[Row] = []
    for name in chosen.only:
        rows += BENCHMARKS[name](chosen.rounds)
    print(f"{'what':<24}{'first':<28}{'second':<16}{'best s':>16}{'median s':>16}{'ratio':>8}{'n':>4}")
    for row in rows:
        best = f"{row.first_best:.3f}/{row.second_best:.3f}"
        median = f"{row.first_median:.3f}/{row.second_median:.3f}"
        print(
            f"{row.name:<24}{row.first:<28}{row.second:<16}{best:>16}{median:>16}{row.ratio_median:>8.2f}{row.rounds:>4}"
        )
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
