"""A trial that is being run: its interim values go to the study, and its pruner may end it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from dppo.search.pruners import Pruner, pruner_from
from dppo.search.storage import file_in, open_storage, shown
from dppo.search.study import counting, peers

if TYPE_CHECKING:
    import optuna

_log = logging.getLogger("dppo")
TRIAL = "DPPO_TRIAL"  # the variable that holds the number of the trial to which a job belongs
CALIBRATION = "DPPO_CALIBRATION"  # set: the job only measures the strength of its penalty


@dataclass
class Watch:
    """Says of interim rows whether the trial is to end; a storage that fails leaves it running."""

    study: optuna.Study
    number: int
    pruner: Pruner
    url: str
    labels: Mapping[str, str] = field(default_factory=dict)
    lost: bool = False

    def __call__(self, row: Mapping[str, float | int]) -> str | None:
        if self.lost:
            return None
        try:
            return self._judge(round(row["interim/percent"]), float(row["interim/value"]))
        except Exception as error:  # of a database, its driver, the network or the disk
            self.lost = True
            _log.warning(
                "warning: hydra.sweeper.storage=%s: %s; this trial can't be pruned",
                shown(self.url),
                (str(error).splitlines() or [type(error).__name__])[0],
            )
            return None

    def _judge(self, percent: int, value: float) -> str | None:
        import optuna

        found = counting(self.study)
        trials = peers(found, next(trial for trial in found if trial.number == self.number), self.labels)
        place = next(at for at, trial in enumerate(trials) if trial.number == self.number)
        live = optuna.Trial(self.study, trials[place]._trial_id)
        live.report(value, percent)
        values = {at: trial.intermediate_values for at, trial in enumerate(trials)}
        values[place] = {**trials[place].intermediate_values, percent: value}
        ends, attributes = self.pruner.judge(trials, place, values)
        for key, found in attributes.items():
            self.study._storage.set_trial_system_attr(trials[place]._trial_id, key, found)
        if not ends:
            return None
        came = [own[percent] for at, own in values.items() if percent in own and at != place]
        beside = f"{len(came)} others came this far"
        if self.pruner.name == "median":
            done = [
                own[percent] for at, own in values.items() if percent in own and trials[at].state.name == "COMPLETE"
            ]
            beside = f"the median of {len(done)} completed trials is {median(done):.3f}"
        return f"{value:.3f} after {percent} % of training, {beside} ({self.pruner.name} pruner)"


def watch(
    settings: Mapping[str, Any], number: int, directory: str
) -> Callable[[Mapping[str, float | int]], str | None]:
    """The watch over trial ``number`` of the study that ``hydra.sweeper`` describes, in the sweep's directory."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url = settings["storage"] or file_in(directory)
    study = optuna.load_study(
        study_name=settings["study_name"],
        storage=open_storage(url),
        sampler=optuna.samplers.RandomSampler(),
    )
    pruner = pruner_from(settings["pruner"], int(settings["replicates"]))
    return Watch(study, number, pruner, url, settings["labels"])
