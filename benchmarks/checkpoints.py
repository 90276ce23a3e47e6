"""What a checkpoint costs: ``python -m benchmarks.checkpoints [--model smollm2_135m] [--rounds 5]``.

Its bytes, and the seconds to write it (hash and fsync included), to check it before it is continued, and to load it,
each the median of some rounds; model and optimiser are those of a run of this model with all weights trained.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.setting import Setting, experiment
from dppo import loop


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--model", default="tiny", help="an option of the group model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where they are written (a temporary place)")
    given = parser.parse_args()
    model = experiment(Setting(given.model, None, 256, "")).model.load_model(0)
    parameters = dict(model.named_parameters())
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-5)
    for value in parameters.values():
        value.grad = torch.ones_like(value)
    optimiser.step()
    optimiser.zero_grad()
    accelerator = Accelerator(cpu=True)
    wrote, checked, loaded, size = [], [], [], 0
    with tempfile.TemporaryDirectory(dir=given.dir) as folder:
        place = Path(folder)
        for step in range(given.rounds):
            started = time.perf_counter()
            loop._save(place, parameters, optimiser, loop._State(step=step), accelerator)
            saved = time.perf_counter()
            loop.drop_damaged_checkpoints(place)
            sound = time.perf_counter()
            loop._restore(place, parameters, optimiser, loop._State())
            wrote.append(saved - started)
            checked.append(sound - saved)
            loaded.append(time.perf_counter() - sound)
            (path,) = loop._saved(place)
            size = path.stat().st_size
    n = sum(value.numel() for value in parameters.values())
    seconds = ", ".join(
        f"{name} {statistics.median(values):.3f} s"
        for name, values in (("written in", wrote), ("checked in", checked), ("loaded in", loaded))
    )
    print(f"{given.model}: {n:,} parameters, {size:,} bytes a checkpoint ({size / n:.1f} a parameter), {seconds}")


if __name__ == "__main__":
    main()
