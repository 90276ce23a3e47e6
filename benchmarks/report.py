"""A report of many runs: ``python -m benchmarks.report [--runs 200] [--prompts 1024] [--rounds 5] [--json FILE]``.

How long it takes to make, how large its page is, and how long Chromium takes to open it, until the scripts have ended,
beside an empty page of the same browser. Needs playwright and Chromium or Chrome (DPPO_BROWSER names another one).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]


def make_runs(folder: Path, n_runs: int, n_prompts: int) -> None:
    """Run directories of a grid over alpha with two seeds each, with answers of some 40 words."""
    import yaml

    generator = np.random.default_rng(0)
    words = [f"word{n}" for n in range(500)]
    reference = generator.normal(size=n_prompts)
    texts = [" ".join(generator.choice(words, 40)) for _ in range(n_prompts)]
    for n in range(n_runs):
        alpha, seed = round(1e-4 * 1.08 ** (n // 2), 9), n % 2
        place = folder / str(n)
        place.mkdir(parents=True)
        loss = {"_target_": "dppo.losses.penalised.UnLL", "alpha": alpha}
        reward = {"_target_": "dppo.rewards.verifiable.Verifiable"}
        config = {"seed": seed, "alpha": alpha, "phases": {}, "loss": loss, "reward": reward}
        (place / "config.yaml").write_text(yaml.safe_dump(config))
        (place / "command.txt").write_text(f"python -m dppo alpha={alpha} seed={seed}\n")
        policy = reference + generator.normal(0.5 - 0.004 * n, 1.0, n_prompts)
        rate = float((policy > reference).mean())
        result: dict[str, Any] = {"schema": 1, "status": "complete", "split": "test", "n_prompts": n_prompts}
        result |= {"win_rate": {"value": rate, "ci_low": rate - 0.03, "ci_high": rate + 0.03, "n": n_prompts}}
        result |= {"kl": {"nats_per_answer": 0.05 * n, "nats_per_token": 0.004 * n}, "timings": {"total_seconds": 9.0}}
        (place / "result.json").write_text(json.dumps(result))
        rows = [
            {
                "prompt_id": f"p{at}",
                "prompt": texts[at],
                "reference_answer": texts[at - 1],
                "policy_answer": texts[at - 2],
                "reference_reward": float(reference[at]),
                "policy_reward": float(policy[at]),
            }
            for at in range(n_prompts)
        ]
        (place / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (place / "pairs.jsonl").write_text("")


def opened(page: Path, rounds: int) -> tuple[list[float], list[float], int]:
    """Seconds to open ``page`` and an empty one, alternating, and the rows of its table of runs."""
    from playwright.sync_api import sync_playwright

    found = os.environ.get("DPPO_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        raise SystemExit("needs Chromium or Chrome, or its path in DPPO_BROWSER")
    empty = page.parent / "empty.html"
    empty.write_text("<!doctype html><title>empty</title>")
    times: dict[Path, list[float]] = {page: [], empty: []}
    rows = 0
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=ARGUMENTS)
        for nth in range(rounds + 1):
            for one, seconds in times.items():
                tab = browser.new_page()
                started = time.perf_counter()
                tab.goto(one.resolve().as_uri())
                # The next frame is on the screen.
                tab.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
                if nth:  # the first round warms up
                    seconds.append(time.perf_counter() - started)
                if one is page:
                    rows = tab.locator("#table-runs tbody tr").count()
                tab.close()
        browser.close()
    return times[page], times[empty], rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    chosen = parser.parse_args(argv)
    from dppo.report.making import report

    print(f"cpus={os.cpu_count()}  load_average={os.getloadavg()[0]:.2f}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_runs(folder / "runs", chosen.runs, chosen.prompts)
        started = time.perf_counter()
        page = report(
            [folder / "runs"], folder / "report", metric="win_rate", baseline=None, n_bootstrap=10_000, title=None
        )
        made = time.perf_counter() - started
        size = page.stat().st_size
        print(
            f"made from {chosen.runs} runs of {chosen.prompts} prompts in {made:.1f} s: {size / 1e6:.2f} MB", flush=True
        )
        own, empty, rows = opened(page, chosen.rounds)
        for title, seconds in ((f"the report ({rows} runs in its table)", own), ("an empty page", empty)):
            median = statistics.median(seconds)
            print(f"{title}: opened in {median:.3f} s (median of {len(seconds)}, best {min(seconds):.3f})")
    if chosen.json is not None:
        chosen.json.write_text(json.dumps({"made": made, "bytes": size, "opened": own, "empty": empty}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
