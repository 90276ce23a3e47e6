"""What a run leaves behind and what the user sees of it.

A run directory holds

- ``config.yaml`` the resolved configuration, ``command.txt`` the line that made it, ``versions.json``
- ``parents.json`` the cached stages that the run used
- ``metrics.jsonl`` one row a logged step as it is made, replayed from the cache when a stage is reused
- ``samples.jsonl`` one row a prompt: both answers, both rewards, who won
- ``pairs.jsonl`` one row a held-out pair: log-probs under policy and reference (``evaluation.edits.PairRow``)
- ``result.json`` the outcome; its schema is documented at ``complete`` and versioned by ``SCHEMA``
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dppo.artifacts import manifest
from dppo.artifacts.files import disk_errors, remove, write_atomic
from dppo.dotted import leaves
from dppo.errors import UserError
from dppo.evaluation.histogram import shared_bins
from dppo.evaluation.win_rates import wilson
from dppo.loop import PERCENT, SETUP, Metrics
from dppo.processes import world_size
from dppo.types import Artifact, Generation, Json, Prompt

if TYPE_CHECKING:
    from dppo.config import Experiment
    from dppo.stages.preference import Trained
    from dppo.stages.workbench import Workbench

SCHEMA = 1
_WIDTH = 78


def command_line(overrides: Sequence[str]) -> str:
    """The line that runs the same experiment again."""
    return shlex.join(["python", "-m", "dppo", *overrides])


@dataclass(frozen=True)
class RunDirectory:
    """Writes the files of one run; every file is replaced at once, so that a reader never finds half of one."""

    path: Path
    resolved: Mapping[str, Json]
    overrides: Sequence[str]

    def open(self) -> None:
        """Write what is known before the first stage. Raises UserError if the directory is not writable."""
        import yaml

        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.glob(".*.tmp"):
                remove(leftover)  # of a run that was killed here
            text = yaml.safe_dump(json.loads(json.dumps(self.resolved)), sort_keys=False)
            self._write("config.yaml", text)
            self._write("command.txt", command_line(self.overrides) + "\n")
            self._write_json("versions.json", versions())
            (self.path / "metrics.jsonl").write_text("")

    def parents(self, bench: Workbench) -> None:
        """Note which cached stages the run refers to, so that they are kept."""
        used = dict.fromkeys((record.stage, record.fingerprint) for record in bench.records)
        bench.cache.record_run(self.path, list(used))

    def metrics(self, phase: str, rows: Sequence[Metrics]) -> None:
        with disk_errors(self.path), (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"phase": phase, **row}) + "\n" for row in rows)

    def rows(self, name: str, rows: Sequence[Mapping[str, Json]]) -> None:
        self._write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def result(self, result: Mapping[str, Any]) -> None:
        self._write_json("result.json", {"schema": SCHEMA, "command": command_line(self.overrides), **result})

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._write(name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        with disk_errors(self.path):
            write_atomic(self.path / name, text.encode())


def versions() -> dict[str, Json]:
    """Software and hardware of this run."""
    import torch

    return {
        **manifest.versions(),
        "git": manifest.git_revision(),
        "machine": platform.machine(),
        "platform": platform.platform(),
        "cpu": processor(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


# --- result.json -----------------------------------------------------------------------------------------------------


def complete(
    compared: Mapping[str, Any],
    moved: Mapping[str, Any],
    bench: Workbench,
    *,
    split: str,
    decoding: str,
    policy: Artifact,
    reference: Artifact,
) -> dict[str, Any]:
    """The content of ``result.json`` for a run that reached its end.

    ``status``; ``models`` {policy, reference}, each "stage/fingerprint" in the cache; ``split`` and ``n_prompts``;
    ``decoding`` of both models' answers, in words; ``processes`` that the run was;
    ``objective`` (= ``win_rate.value``); ``win_rate`` {value (ties = 1/2), ci_low, ci_high, strict (ties lose),
    strict_ci_low, strict_ci_high, n, wins, ties}; ``reward`` {policy, reference, delta, each {value, ci_low, ci_high},
    negative_share}; ``length`` {policy, reference, each {tokens, characters, end_of_turn_rate}}; ``kl``
    {nats_per_token, nats_per_answer, n_answers, n_tokens}, of answers sampled from the policy as it is also monte_carlo
    {value, ci_low, ci_high}, the mean log-ratio of an answer in nats; ``held_out`` likelihoods and accuracies on pairs
    of the split; ``judge``, where one compared the answers (``stages.scores.judging``);
    ``reward_model``, where the run trained one, {model, splits} (``stages.reward_model.reward_accuracy``);
    ``training`` by phase {n_examples, steps}; with dataset=on_policy ``on_policy`` by round
    (``on_policy.Preferences.counts``); ``after_edit`` mean token log-prob of chosen answers behind the
    first edit (``evaluation.edits``);
    ``timings`` {stages: [{stage, fingerprint, seconds, reused, rows (that a growing store got, else null), tokens and
    tokens_per_second (of answers that a model wrote, loading it apart; else null), memory (peak bytes of a stage that
    trains or scores: {estimated, measured, tokens_per_micro_batch}, else null)}], total_seconds}.
    Intervals are 95 %.
    """
    return {
        "status": "complete",
        "models": {
            name: f"{model.stage}/{model.fingerprint}" for name, model in (("policy", policy), ("reference", reference))
        },
        "split": split,
        "decoding": decoding,
        "processes": int(bench.accelerator.num_processes),
        "objective": compared["win_rate"]["value"],
        **compared,
        **moved,
        "timings": timings(bench),
    }


def diverged(trained: Trained, phase: str, bench: Workbench) -> dict[str, Any]:
    """The content of ``result.json`` for a run whose loss or gradient was not finite: the worst win rate."""
    outcome = trained.outcome
    return {
        "status": "diverged",
        "objective": 0.0,
        "win_rate": {"value": 0.0},
        "diverged": {"phase": phase, "step": int(outcome["steps"]) + 1, "example_ids": outcome["example_ids"]},
        "timings": timings(bench),
    }


def pruned(trained: Trained, phase: str, bench: Workbench) -> dict[str, Any]:
    """The content of ``result.json`` for a run that was ended early: how far it came, and its interim values."""
    outcome = trained.outcome
    measured = [
        {
            name.removeprefix("interim/"): value
            for name, value in row.items()
            if name.startswith(("step", "interim/")) and name != SETUP
        }
        for row in trained.metrics
        if PERCENT in row
    ]
    return {
        "status": "pruned",
        "pruned": {"phase": phase, "step": int(outcome["steps"]), "reason": outcome["reason"]},
        "interim": measured,
        "timings": timings(bench),
    }


def timings(bench: Workbench) -> dict[str, Any]:
    stages = [
        {
            "stage": record.title,
            "fingerprint": record.fingerprint,
            "seconds": record.seconds,
            "reused": record.reused,
            "rows": record.rows,
            "tokens": None if record.pace is None else record.pace.tokens,
            "tokens_per_second": None if record.pace is None else round(record.pace.tokens_per_second, 1),
            "memory": record.memory,
        }
        for record in bench.records
    ]
    return {"stages": stages}


_MEAN = ("value", "ci_low", "ci_high")
_PER = ("", "_per_token")
# Every number of a complete result that an objective may name.
NUMBERS = frozenset(
    [
        "objective",
        "n_prompts",
        *(f"win_rate.{key}" for key in (*_MEAN, "strict", "strict_ci_low", "strict_ci_high", "n", "wins", "ties")),
        *(f"reward.{what}.{key}" for what in ("policy", "reference", "delta") for key in _MEAN),
        *(f"reward.negative_share.{who}" for who in ("policy", "reference")),
        *(
            f"length.{who}.{key}"
            for who in ("policy", "reference")
            for key in ("tokens", "characters", "end_of_turn_rate")
        ),
        *(f"kl.{key}" for key in ("nats_per_token", "nats_per_answer", "n_answers", "n_tokens")),
        "held_out.n_pairs",
        *(
            f"held_out.{what}{compared}{per}"
            for what in ("accuracy", "margin")
            for compared in ("", "_to_reference")
            for per in _PER
        ),
        *(
            f"held_out.{kind}/{role}{per}"
            for role in ("chosen", "rejected")
            for kind in ("logps", "log_ratio")
            for per in _PER
        ),
        "after_edit.n_pairs",
        *(f"after_edit.{what}.{key}" for what in ("policy", "reference", "delta") for key in _MEAN),
        "timings.total_seconds",
    ]
)


def check_objectives(paths: Sequence[str]) -> None:
    """Raise UserError for an objective that no result has, before anything is trained."""
    for path in paths:
        if path not in NUMBERS:
            near = difflib.get_close_matches(path, NUMBERS, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                f"objectives=[{path}]: not a number of result.json.{hint} Known: {', '.join(sorted(NUMBERS))}"
            )


def objective_values(result: Mapping[str, Any], paths: Sequence[str]) -> tuple[float, ...]:
    """The values that a sweep receives; for a diverged run the worst: infinite costs, everything else at its least."""
    return tuple(_objective(result, path) for path in paths)


def _objective(result: Mapping[str, Any], path: str) -> float:
    if result["status"] == "diverged":
        if path.split(".")[0] in ("kl", "length", "timings"):
            return math.inf
        return -math.inf if path.startswith(("reward", "held_out.log", "held_out.margin", "after_edit")) else 0.0
    return number(result, path, "objectives")


def number(result: Mapping[str, Any], path: str, asked_by: str) -> float:
    """The number at a dotted path of a result. Raises UserError, which names who asks, if it is not there."""
    found: Any = result
    for key in path.split("."):
        if key not in found:
            raise UserError(f"{asked_by}=[{path}]: this run has no such number, its data set holds no pairs")
        found = found[key]
    return float(found)


def final_scalars(result: Mapping[str, Any]) -> dict[str, float | int]:
    """Every number of a result by its dotted name."""
    return {
        name: value
        for name, value in leaves(result).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def samples(
    prompts: Sequence[Prompt],
    policy: Mapping[str, Generation],
    reference: Mapping[str, Generation],
    policy_rewards: Sequence[float],
    reference_rewards: Sequence[float],
) -> list[dict[str, Json]]:
    """One row per evaluation prompt, in the order of the prompts."""
    rows: list[dict[str, Json]] = []
    for prompt, own, other in zip(prompts, policy_rewards, reference_rewards, strict=True):
        rows.append(
            {
                "prompt_id": prompt.prompt_id,
                "prompt": "\n".join(
                    message.content if message.role == "user" else f"[{message.role}] {message.content}"
                    for message in prompt.messages
                ),
                "reference_answer": reference[prompt.prompt_id].text,
                "policy_answer": policy[prompt.prompt_id].text,
                "reference_reward": other,
                "policy_reward": own,
                "outcome": "win" if own > other else "tie" if own == other else "loss",
            }
        )
    return rows


def reward_histograms(policy: Sequence[float], reference: Sequence[float]) -> tuple[list[float], dict[str, list[int]]]:
    """Edges of bins for the rewards of both models, and how many of each lie in them."""
    edges = shared_bins(policy, reference)
    counts = {"policy_reward": policy, "reference_reward": reference}
    return edges.tolist(), {name: np.histogram(rewards, edges)[0].tolist() for name, rewards in counts.items()}


# --- what is printed -------------------------------------------------------------------------------------------------


def header(experiment: Experiment, directory: Path, overrides: Sequence[str]) -> list[str]:
    """The composed experiment in a few lines."""
    lines = ["=" * _WIDTH, command_line(overrides)]
    lines.append(
        f"model {_brief(experiment.model)} | data {_brief(experiment.dataset)} | reward {_brief(experiment.reward)}"
        f" | seed {experiment.seed}"
    )
    if not experiment.phases:
        lines.append("no preference phase: SFT against itself")
    for name, phase in experiment.phases.items():
        train = phase.train
        length = f"{train.steps} steps" if train.steps is not None else f"{train.epochs} epochs"
        lines.append(
            f"{name}: {describe_loss(phase.loss)} | {length} of {train.batch_size}, lr {train.learning_rate:g}"
            f", {train.precision}, {train.packing}{', LoRA' if train.lora is not None else ''}"
        )
    lines += [f"run directory {directory}", "=" * _WIDTH]
    return lines


def _brief(settings: object) -> str:
    name = type(settings).__name__
    where = next((found for key in ("name_or_path", "path", "model") if (found := getattr(settings, key, None))), None)
    if (source := getattr(settings, "source", None)) is not None:
        where = _brief(source)
    return f"{name}({where})" if where else name


def describe_loss(loss: object) -> str:
    """A loss by its own name and the numbers it was built with, such as ``unll(alpha=0.1, quadratic)``."""
    assert dataclasses.is_dataclass(loss)
    parts = []
    for field in dataclasses.fields(loss):
        value = getattr(loss, field.name)
        if dataclasses.is_dataclass(value):
            parts.append(describe_loss(value))
        elif isinstance(value, float) and field.name in ("alpha", "beta", "zeta", "tau", "gamma"):
            parts.append(f"{field.name}={value:g}")
    name = getattr(loss, "name", type(loss).__name__.lower())
    return f"{name}({', '.join(parts)})" if parts else str(name)


def summary(result: Mapping[str, Any], directory: Path) -> list[str]:
    """The final table."""
    lines = ["-" * _WIDTH]
    if result["status"] == "diverged":
        found = result["diverged"]
        lines.append(
            f"diverged in phase {found['phase']} at step {found['step']}: loss or gradient is not finite "
            f"(examples {', '.join(found['example_ids'][:3])})"
        )
        lines.append("try a smaller alpha or learning rate; the objectives are reported at their worst")
    elif result["status"] == "pruned":
        found = result["pruned"]
        lines.append(f"pruned in phase {found['phase']} after step {found['step']}: {found['reason']}")
    else:
        rate, reward, length, kl = result["win_rate"], result["reward"], result["length"], result["kl"]
        rows = [
            ("win rate (ties 1/2)", _interval(rate["value"], rate["ci_low"], rate["ci_high"])),
            ("win rate (strict)", _interval(rate["strict"], rate["strict_ci_low"], rate["strict_ci_high"])),
            ("wins / ties / losses", f"{rate['wins']} / {rate['ties']} / {rate['n'] - rate['wins'] - rate['ties']}"),
            ("reward policy", _interval(*_bounds(reward["policy"]))),
            ("reward SFT", _interval(*_bounds(reward["reference"]))),
            ("reward gain", _interval(*_bounds(reward["delta"]), sign="+")),
            ("negative rewards", _both(reward["negative_share"], "{:.1%}")),
            ("answer tokens", _both({who: length[who]["tokens"] for who in length}, "{:.1f}")),
            ("ended by itself", _both({who: length[who]["end_of_turn_rate"] for who in length}, "{:.1%}")),
            ("KL to SFT", f"{kl['nats_per_token']:.4f} nats a token, {kl['nats_per_answer']:.3f} an answer"),
        ]
        if (judge := result.get("judge")) and judge["n_pairs"]:
            agree, unread = judge["position_consistency"], f"{judge['unparsable_share']:.1%} of replies unparsable"
            orders = ""
            if agree is not None:
                low, high = wilson(agree * judge["n_read"], judge["n_read"])
                orders = f"orders agree on {agree:.1%} [{low:.1%}, {high:.1%}] of {judge['n_read']} pairs, "
            rows.append(("judge", f"{orders}{unread}"))
        if (held_out := result["held_out"])["n_pairs"]:
            accuracies = f"{held_out['accuracy']:.3f} (to SFT {held_out['accuracy_to_reference']:.3f})"
            rows.append(("held-out accuracy", f"{accuracies}, n = {held_out['n_pairs']} pairs"))
        if behind := result["after_edit"]:
            own = _interval(*_bounds(behind["policy"]))
            rows.append(("log p behind edit", f"{own} (SFT {behind['reference']['value']:.3f}), nats a token"))
        if estimate := kl.get("monte_carlo"):
            rows.append(("KL by log-ratios", f"{_interval(*_bounds(estimate))}, nats an answer, n = {kl['n_answers']}"))
        answers = "" if result["decoding"] == "greedy" else f", answers {result['decoding']}"
        lines.append(f"policy against SFT on {rate['n']} {result['split']} prompts, 95 % intervals{answers}")
        lines += [f"  {name:<22}{value}" for name, value in rows]
    seconds = [f"{item['stage']} {item['seconds']:.1f}" for item in result["timings"]["stages"] if not item["reused"]]
    reused = [item["stage"] for item in result["timings"]["stages"] if item["reused"]]
    total = result["timings"]["total_seconds"]
    lines.append(f"  seconds               {', '.join(seconds) or 'nothing built'}; total {total:.1f}")
    written = [item for item in result["timings"]["stages"] if item["tokens_per_second"]]
    if written:
        paces = [f"{item['stage']} {item['tokens_per_second']:,.0f} ({item['tokens']:,})" for item in written]
        lines.append(f"  tokens/s (tokens)     {', '.join(paces)}")
    if reused:
        lines.append(f"  reused                {', '.join(reused)}")
    lines += [f"  files                 {directory}", "-" * _WIDTH]
    return lines


def _bounds(found: Mapping[str, float]) -> tuple[float, float, float]:
    return found["value"], found["ci_low"], found["ci_high"]


def _interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}  [{low:{sign}.3f}, {high:{sign}.3f}]"


def _both(found: Mapping[str, float], pattern: str) -> str:
    return f"{pattern.format(found['policy'])} (SFT {pattern.format(found['reference'])})"
