"""Runs what a study has to run, until nothing is left: baselines, abandoned trials, new trials."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dppo.artifacts.files import disk_errors
from dppo.command_line import duration
from dppo.errors import Pruned, UserError
from dppo.evaluation.win_rates import Interval
from dppo.results import command_line, number
from dppo.search.measured import by_prompt, measured
from dppo.search.pruners import Pruner
from dppo.search.study import INSTANCES, SEEDS, Asked, SideRun, Study, peers

Launch = Callable[[Sequence[str], str, int | None, int], tuple[float, ...]]
"""Run one job to its end: words, directory below the study's, the trial it reports to if any, the job's number.

Returns the values of the objectives; raises ``Pruned``, or what made the job fail.
"""


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


@dataclass
class Runner:
    """One process's share of a study; ``objectives`` are paths into result.json, ``seed`` is the first of a trial."""

    study: Study
    pruner: Pruner
    objectives: Sequence[str]
    seed: int
    launch: Launch
    seconds: list[float] = field(default_factory=list)

    def work(self) -> None:
        """Run until all that this study has to run has been begun by somebody."""
        while True:
            if (side := self.study.take_side_run()) is not None:
                self._beside(side)
            elif (reclaimed := self.study.reclaim()) is not None:
                lost, again = reclaimed
                say(f"trial {lost.number} was abandoned: again as trial {again.number}")
                self._trial(again)
            elif (asked := self.study.ask()) is not None:
                self._trial(asked)
            else:
                return

    # --- trials ------------------------------------------------------------------------------------------------------

    def _trial(self, asked: Asked) -> None:
        study = self.study
        place = study.directory / str(asked.number)
        with disk_errors(place):
            place.mkdir()
            (place / "command.txt").write_text(command_line(asked.words) + "\n", encoding="utf-8")
        say(f"trial {asked.number} ({asked.index + 1} of {study.total}): {' '.join(asked.words[len(study.fixed) :])}")
        started = time.monotonic()
        seeds = range(self.seed, self.seed + study.settings.replicates)
        places = study.places(asked.number, seeds)
        try:
            values, status, intervals = self._seeds(asked, places)
        except Pruned as stop:
            study.prune(asked, str(stop))
            said = f"pruned: {stop}"
        except Exception as error:
            reason = _reason(error)
            (place / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            study.fail(asked, reason)
            say(f"trial {asked.number} failed: {reason}")
            study.refuse_too_many_failures(reason)
            return
        else:
            excess = {} if status == "diverged" else self._excess(places.values())
            study.complete(asked, values, status, intervals=intervals, excess=excess)
            shown = zip(self.objectives, values, intervals, strict=True)
            said = f"{status}: {', '.join(_shown(path, value, bounds) for path, value, bounds in shown)}"
            broken = [name for name, amount in excess.items() if amount > 0]
            said += f"; violates {', '.join(broken)}" if broken else ""
        self.seconds.append(time.monotonic() - started)
        say(f"trial {asked.number} {said}{self._left(asked)}")

    def _left(self, asked: Asked) -> str:
        """How long the rest will take, from the last trials of this process."""
        left = self.study.total - asked.index - 1
        recent = self.seconds[-5:]
        seconds = left * sum(recent) / len(recent) / self.study.settings.n_jobs
        return f"; {left} to go, about {duration(seconds)}" if left else ""

    def _seeds(self, asked: Asked, everywhere: Mapping[int, Path]) -> tuple[list[float], str, list[list[float]]]:
        """Values of the objectives over all replicates, which run ``everywhere``, with mean and bounds of each."""
        settings = self.study.settings
        found: dict[int, tuple[float, ...]] = {}
        instances: dict[str, float] = {}
        for nth, (seed, own) in enumerate(everywhere.items()):
            words = [*asked.words, f"seed={seed}"] if settings.replicates > 1 else asked.words
            reports = asked.number if nth == 0 and self.pruner.on_steps else None
            values = self.launch(words, str(own.relative_to(self.study.directory)), reports, asked.number)
            if any(math.isnan(value) for value in values):
                raise UserError(f"an objective is not a number: {', '.join(self.objectives)} = {values}")
            status = str(_result(own)["status"])
            found[seed] = values
            self.study.note(asked, {SEEDS: {str(key): list(value) for key, value in found.items()}})
            if status == "diverged":
                return list(values), status, [[value, math.nan, math.nan] for value in values]
            places = list(everywhere.values())[: nth + 1]
            if self.pruner.instances is not None:
                seeds = {str(key): value[0] for key, value in found.items()}
                instances = seeds if self.pruner.instances == "seeds" else by_prompt(places)
                self.study.note(asked, {INSTANCES: instances})
                if nth + 1 < settings.replicates and self._worse(asked, instances):
                    raise Pruned(f"worse than the best trial after {nth + 1} of {settings.replicates} seeds (wilcoxon)")
        means = [
            measured(places, path, [values[at] for values in found.values()]) for at, path in enumerate(self.objectives)
        ]
        told = [self._told(one, direction) for one, direction in zip(means, settings.direction, strict=True)]
        return told, "complete", [[one.value, one.low, one.high] for one in means]

    def _told(self, one: Interval, direction: str) -> float:
        """What the sampler is told of an objective."""
        if self.study.settings.value == "mean":
            return one.value
        worse = one.low if direction == "maximize" else one.high
        if math.isnan(worse):
            raise UserError(
                "hydra.sweeper.value=lower_bound: this objective has no interval with one seed; choose mean"
            )
        return worse

    def _worse(self, asked: Asked, instances: dict[str, float]) -> bool:
        found = self.study.trials()
        own = next(trial for trial in found if trial.number == asked.number)
        trials = peers(found, own, self.study.settings.labels)
        place = trials.index(own)
        sign = 1.0 if self.study.settings.direction[0] == "maximize" or self.pruner.instances == "prompts" else -1.0
        order = {key: at for at, key in enumerate(sorted(instances))}
        values = {
            at: {order[key]: sign * value for key, value in trial.user_attrs.get(INSTANCES, {}).items() if key in order}
            for at, trial in enumerate(trials)
        }
        values[place] = {order[key]: sign * value for key, value in instances.items()}
        return self.pruner.judge(trials, place, values)[0]

    def _excess(self, places: Iterable[Path]) -> dict[str, float]:
        """By how much the mean over seeds violates each constraint."""
        found = {}
        for text, bound in zip(self.study.settings.constraints, self.study.settings.bounds, strict=True):
            values = [number(_result(place), bound.path, "hydra.sweeper.constraints") for place in places]
            found[text] = bound.excess(sum(values) / len(values))
        return found

    # --- runs that are not trials ------------------------------------------------------------------------------------

    def _beside(self, run: SideRun) -> None:
        try:
            values = self.launch(run.words, run.key, None, 0)
        except Exception as error:
            reason = _reason(error)
            self.study.end_side_run(run, state="failed", reason=reason)
            say(f"{run.title} failed: {reason}")
            return
        self.study.end_side_run(run, state=_result(self.study.directory / run.key)["status"], values=list(values))
        shown = ", ".join(f"{path} {value:.6g}" for path, value in zip(self.objectives, values, strict=True))
        say(f"{run.title}: {shown}")


def _reason(error: Exception) -> str:
    return " ".join(f"{'' if isinstance(error, UserError) else type(error).__name__ + ': '}{error}".split())


def _result(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "result.json").read_text("utf-8"))
    return found


def _shown(path: str, value: float, bounds: Sequence[float]) -> str:
    _, low, high = bounds
    return f"{path} {value:.6g}" + ("" if math.isnan(low) else f" [{low:.4g}, {high:.4g}]")
