"""The study: trials in a storage that outlives this process, each with its index, its owner and its command line."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dppo.artifacts.locks import hold
from dppo.data.ids import content_hash
from dppo.errors import UserError
from dppo.results import command_line
from dppo.search.samplers import Proposal, Sampler, number_of_trials
from dppo.search.settings import SearchSettings
from dppo.search.space import Space, Values
from dppo.search.storage import open_storage, shown, storage_errors

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

# Attributes of a study and of its trials.
_RECORD, _SIDE = "dppo", "side:"
INDEX, OWNER, COMMAND, ERROR, STATUS, ABANDONED = "index", "owner", "command", "error", "status", "abandoned"
SEEDS, INTERVALS, WHY, INSTANCES, DEATHS = "seeds", "intervals", "why", "instances", "deaths"
WORKER = "DPPO_WORKER"  # the variable that holds a worker process's number
_LONGEST_NAME = 200  # bytes of a directory's name
# A trial whose process was killed this often is not tried again.
_MOST_DEATHS = 3


@dataclass(frozen=True)
class Asked:
    """A trial to be run now."""

    number: int
    index: int
    values: Values
    words: list[str]


@dataclass(frozen=True)
class SideRun:
    """A run of the study that is not a trial: ``key`` is its place in the study's directory."""

    key: str
    words: list[str]
    place: int = 0

    @property
    def title(self) -> str:
        """Such as ``baseline loss=dpo, seed 0``."""
        part, name, seed = self.key.split("/")
        return f"{part.removesuffix('s')} {name.replace(',', ' ')}, {seed.replace('=', ' ')}"


@dataclass(frozen=True)
class Study:
    """One study of Optuna's in ``directory``; ``fixed`` are the words that every trial shares."""

    study: optuna.Study
    settings: SearchSettings
    space: Space
    sampler: Sampler
    directory: Path
    fixed: Sequence[str]
    enqueued: Sequence[Values] = ()

    @property
    def total(self) -> int:
        """How many trials there will be."""
        return number_of_trials(self.sampler, self.space, self.settings.n_trials)

    def trials(self) -> list[FrozenTrial]:
        """The trials that count, by index; an abandoned one does not, another one has its index."""
        with storage_errors(self.settings.storage):
            return counting(self.study)

    def ask(self) -> Asked | None:
        """Store the next trial as running and return it; None if all there will be have been begun."""
        with hold(self.directory / ".study.lock", "the study"):
            counting = self.trials()
            indices = {int(trial.user_attrs[INDEX]) for trial in counting}
            index = next(place for place in range(len(counting) + 1) if place not in indices)
            if index >= self.total:
                return None
            before = [trial for trial in counting if int(trial.user_attrs[INDEX]) < index]
            proposal = self._enqueued(index) or self.sampler.propose(self.space, index, before, self.settings.direction)
            with storage_errors(self.settings.storage):
                return self._begin(index, proposal)

    def _enqueued(self, index: int) -> Proposal | None:
        return Proposal(self.enqueued[index], {}) if index < len(self.enqueued) else None

    def reclaim(self) -> tuple[FrozenTrial, Asked] | None:
        """Begin a running trial again whose process is gone; None if there is none."""
        from optuna.trial import TrialState

        while True:
            with hold(self.directory / ".study.lock", "the study"), storage_errors(self.settings.storage):
                lost = next(filter(_is_lost, self.study.get_trials(deepcopy=False)), None)
                if lost is None:
                    return None
                deaths = int(lost.user_attrs.get(DEATHS, 0))
                if deaths >= _MOST_DEATHS:
                    reason = f"its process was killed {deaths} times, perhaps for want of memory"
                    self._note(lost, {ERROR: reason})
                    self.study.tell(lost.number, state=TrialState.FAIL)
                    continue
                # First out of the count: whoever dies here leaves an index that is free, never one that is taken twice.
                known = ABANDONED in lost.user_attrs
                self._note(lost, {ABANDONED: True})
                self.study.tell(lost.number, state=TrialState.FAIL)
                if known:
                    continue
                attributes = {key: value for key, value in lost.system_attrs.items() if not _is_of_the_run(key)}
                proposal = Proposal(lost.params, attributes, lost.distributions)
                return lost, self._begin(int(lost.user_attrs[INDEX]), proposal, deaths)

    def count_death(self, pid: int) -> None:
        """Note with the running trial of a worker process that something killed it."""
        from optuna.trial import TrialState

        with hold(self.directory / ".study.lock", "the study"), storage_errors(self.settings.storage):
            for trial in self.study.get_trials(deepcopy=False):
                if trial.state == TrialState.RUNNING and trial.user_attrs[OWNER]["pid"] == pid:
                    self._note(trial, {DEATHS: int(trial.user_attrs.get(DEATHS, 0)) + 1})

    def _begin(self, index: int, proposal: Proposal, deaths: int = 0) -> Asked:
        from optuna.trial import TrialState, create_trial

        values = proposal.values
        words = [*self.fixed, *self.space.words(values)]
        words += [f"{name}={value}" for name, value in values.items() if name not in self.space.names()]
        owner = _owner()
        known = {one.name: one.distribution() for one in self.space.parameters}
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=dict(values),
                distributions={name: {**proposal.distributions, **known}[name] for name in values},
                user_attrs={INDEX: index, OWNER: owner, COMMAND: command_line(words), DEATHS: deaths},
                system_attrs=dict(proposal.attributes),
            )
        )
        (mine,) = [trial for trial in self.study.get_trials(deepcopy=False) if trial.user_attrs.get(OWNER) == owner]
        return Asked(mine.number, index, dict(values), words)

    def complete(
        self,
        asked: Asked,
        values: Sequence[float],
        status: str,
        *,
        intervals: Sequence[Sequence[float]] = (),
        excess: Mapping[str, float] | None = None,
    ) -> None:
        """Store the values of a trial; ``status`` is complete or diverged, ``excess`` above 0 violates a constraint."""
        import optuna
        from optuna.trial import TrialState

        with storage_errors(self.settings.storage):
            trial = self._frozen(asked)
            self._note(trial, {STATUS: status, INTERVALS: [list(bounds) for bounds in intervals]})
            live = optuna.Trial(self.study, trial._trial_id)
            # A diverged trial violates a constraint of its own, so that samplers that know constraints keep away.
            for name, amount in {"diverged": float(status == "diverged"), **(excess or {})}.items():
                live.set_constraint(name, min(amount, 1e9))
            self.study.tell(asked.number, list(values), state=TrialState.COMPLETE)

    def prune(self, asked: Asked, reason: str) -> None:
        """Store that a trial was ended early, and why."""
        from optuna.trial import TrialState

        with storage_errors(self.settings.storage):
            self._note(self._frozen(asked), {WHY: reason, STATUS: "pruned"})
            self.study.tell(asked.number, state=TrialState.PRUNED)

    def note(self, asked: Asked, attributes: Mapping[str, Any]) -> None:
        """Store attributes of a running trial."""
        with storage_errors(self.settings.storage):
            self._note(self._frozen(asked), attributes)

    def words(self, trial: FrozenTrial) -> list[str]:
        """The overrides of a trial."""
        return shlex.split(str(trial.user_attrs[COMMAND]))[3:]

    def places(self, number: int, seeds: Iterable[int]) -> dict[int, Path]:
        """Where the seeds of a trial run."""
        place = self.directory / str(number)
        return {seed: place if self.settings.replicates == 1 else place / f"seed={seed}" for seed in seeds}

    # --- runs that are not trials ------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether something can be begun now."""
        begun = [trial for trial in self.trials() if not _is_lost(trial)]
        return len(begun) < self.total or any(map(_is_waiting, self.side_runs().values()))

    def is_done(self) -> bool:
        """Whether all trials there will be have ended, whoever ran them."""
        trials = self.trials()
        return len(trials) >= self.total and all(trial.state.is_finished() for trial in trials)

    def plan(self, runs: Sequence[SideRun]) -> None:
        """Have these runs made, each once, by whoever asks for one; those that are known stay as they are."""
        with hold(self.directory / ".study.lock", "the study"), storage_errors(self.settings.storage):
            known = self.side_runs()
            for place, run in enumerate((one for one in runs if one.key not in known), start=len(known)):
                self._store_side(run.key, {"words": run.words, "state": "planned", "place": place})

    def side_runs(self) -> dict[str, dict[str, Any]]:
        """What is known of each planned run, by its key and in order: words, state, values or reason."""
        with storage_errors(self.settings.storage):
            found = [(key, value) for key, value in self.study.user_attrs.items() if key.startswith(_SIDE)]
        found.sort(key=lambda pair: int(pair[1]["place"]))
        return {key.removeprefix(_SIDE): value for key, value in found}

    def side_runs_of(self, part: str) -> dict[str, dict[int, dict[str, Any]]]:
        """The baselines or the results: by the folder of the configuration, then by seed."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for key, run in self.side_runs().items():
            kind, name, seed = key.split("/")
            if kind == part:
                found.setdefault(name, {})[int(seed.removeprefix("seed="))] = run
        return found

    def take_side_run(self) -> SideRun | None:
        """A planned run that nobody has begun, or whose process is gone."""
        with hold(self.directory / ".study.lock", "the study"):
            for key, known in self.side_runs().items():
                if _is_waiting(known):
                    self._store_side(key, {**known, "state": "running", "owner": _owner()})
                    return SideRun(key, known["words"], int(known["place"]))
        return None

    def end_side_run(self, run: SideRun, **outcome: Any) -> None:
        """Store how it ended: ``state`` complete, diverged or failed, with ``values`` or a ``reason``."""
        self._store_side(run.key, {"words": run.words, "place": run.place, **outcome})

    def _store_side(self, key: str, known: Mapping[str, Any]) -> None:
        with storage_errors(self.settings.storage):
            self.study.set_user_attr(f"{_SIDE}{key}", dict(known))

    def fail(self, asked: Asked, reason: str) -> None:
        """Store that a trial failed, and why."""
        from optuna.trial import TrialState

        with storage_errors(self.settings.storage):
            self._note(self._frozen(asked), {ERROR: reason})
            self.study.tell(asked.number, state=TrialState.FAIL)

    def refuse_too_many_failures(self, reason: str) -> None:
        """Raise UserError if more trials failed than ``max_failure_rate`` allows; ``reason`` is the last one's."""
        allowed = self.settings.max_failure_rate
        failed = sum(ERROR in trial.user_attrs for trial in self.trials())
        if failed > allowed * self.total:
            raise UserError(
                f"{failed} of {self.total} trials failed, more than hydra.sweeper.max_failure_rate={allowed:g} allows; "
                f"the last: {reason}"
            )

    def _frozen(self, asked: Asked) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[asked.number]

    def _note(self, trial: FrozenTrial, attributes: Mapping[str, Any]) -> None:
        import optuna

        live = optuna.Trial(self.study, trial._trial_id)
        for key, value in attributes.items():
            live.set_user_attr(key, value)


def counting(study: optuna.Study) -> list[FrozenTrial]:
    """The trials of a study that count, by index."""
    found = study.get_trials(deepcopy=False)
    kept = [trial for trial in found if INDEX in trial.user_attrs and ABANDONED not in trial.user_attrs]
    return sorted(kept, key=lambda trial: int(trial.user_attrs[INDEX]))


def peers(trials: Sequence[FrozenTrial], own: FrozenTrial, labels: Mapping[str, str]) -> list[FrozenTrial]:
    """The trials that a pruner compares with ``own``, itself included: those with the same choices of what is compared.

    Otherwise a method that starts slowly would be pruned as a whole before it is tuned.
    """
    from optuna.distributions import CategoricalDistribution

    def choices(trial: FrozenTrial) -> dict[str, Any]:
        return {
            name: trial.params[name]
            for name, kind in trial.distributions.items()
            if labels.get(name) == "scientific" and isinstance(kind, CategoricalDistribution)
        }

    return [trial for trial in trials if choices(trial) == choices(own)]


def folder(name: str) -> str:
    """A configuration's words as the name of a directory, of which no file system takes more than 255 bytes."""
    plain = name.replace("/", ".").replace(" ", ",")
    if len(plain.encode()) <= _LONGEST_NAME:
        return plain
    start = plain.encode()[: _LONGEST_NAME - 20].decode(errors="ignore")
    return f"{start}-{content_hash([name])[:16]}"


def _is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial runs on whose process is gone."""
    return trial.state.name == "RUNNING" and is_gone(trial.user_attrs[OWNER])


def _is_waiting(side_run: Mapping[str, Any]) -> bool:
    """Whether nobody has begun a planned run, or whoever did is gone."""
    state = side_run["state"]
    return state == "planned" or (state == "running" and is_gone(side_run["owner"]))


def _is_of_the_run(key: str) -> bool:
    """Whether a system attribute came from running a trial and not from proposing it."""
    return key.startswith(("completed_rung", "constraints"))


def reach(settings: SearchSettings, directory: Path) -> optuna.storages.BaseStorage:
    """Open the storage.

    Raises UserError if it can't be used, if the study exists and is not to be resumed, or if trials of another study
    lie in ``directory``: before anything is computed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with storage_errors(settings.storage), hold(directory / ".study.lock", "the study"):
        storage = open_storage(settings.storage)
        if settings.study_name in optuna.get_all_study_names(storage):
            if not settings.resume:
                n_trials = len(storage.get_all_trials(storage.get_study_id_from_name(settings.study_name)))
                raise UserError(
                    f"study {settings.study_name} exists in {shown(settings.storage)} with "
                    f"{n_trials} trials: add hydra.sweeper.resume=true to go on with it, "
                    "or give another name, hydra.sweeper.study_name=..."
                )
        else:
            taken = sorted(path.name for path in directory.iterdir() if path.is_dir() and path.name.isdigit())
            if taken:
                raise UserError(
                    f"{directory / taken[0]}: belongs to a sweep whose study is not in {shown(settings.storage)}; "
                    "move it away, or give another name, hydra.sweeper.study_name=..."
                )
    return storage


def open_study(
    storage: optuna.storages.BaseStorage,
    settings: SearchSettings,
    space: Space,
    sampler: Sampler,
    directory: Path,
    fixed: Sequence[str],
    configuration: Mapping[str, str],
    enqueued: Sequence[Values] = (),
) -> Study:
    """Create the study in a storage that ``reach`` gave, or go on with it.

    ``configuration`` is everything that is not searched, flat. Raises UserError if the study was made for something
    else.
    """
    import optuna

    record = {
        "space": space.description(),
        "objectives": {
            "direction": ", ".join(settings.direction),
            "replicates": str(settings.replicates),
            "value": settings.value,
            "constraints": ", ".join(settings.constraints),
        },
        "configuration": dict(configuration),
    }
    with storage_errors(settings.storage), hold(directory / ".study.lock", "the study"):
        if settings.study_name in optuna.get_all_study_names(storage):
            # A study is a name and its trials: which sampler it has while it is told values makes no difference.
            study = optuna.load_study(
                study_name=settings.study_name, storage=storage, sampler=optuna.samplers.RandomSampler()
            )
            _refuse_changes(study, record)
        else:
            study = optuna.create_study(
                study_name=settings.study_name,
                storage=storage,
                directions=list(settings.direction),
                sampler=optuna.samplers.RandomSampler(),
            )
            study.set_user_attr(_RECORD, json.dumps(record))
    return Study(study, settings, space, sampler, directory, fixed, enqueued)


def _refuse_changes(study: optuna.Study, record: Mapping[str, Mapping[str, str]]) -> None:
    stored = json.loads(study.user_attrs.get(_RECORD, "null"))
    if stored is None:
        raise UserError(
            f"study {study.study_name}: was not made by dppo; give another name, hydra.sweeper.study_name=..."
        )
    changes = []
    for part, now in record.items():
        before = stored.get(part, {})
        for key in dict.fromkeys([*before, *now]):
            if before.get(key) != now.get(key):
                changes.append(f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}")
    if changes:
        listed = "; ".join(changes[:6]) + (f" and {len(changes) - 6} more" if len(changes) > 6 else "")
        raise UserError(
            f"study {study.study_name}: its trials were made with something else: {listed}; "
            "undo the change, or give another name, hydra.sweeper.study_name=..."
        )


# --- owners ----------------------------------------------------------------------------------------------------------


def _owner() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "boot": _boot(),
        "host": socket.gethostname(),
        "worker": os.environ.get(WORKER, ""),
        "token": secrets.token_hex(8),
    }


def _started(pid: int) -> float | None:
    """When a process began, in seconds; None if it has ended.

    On Linux since the machine was started: a clock that is set meanwhile makes no living process another one.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        with suppress(OSError):
            ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
            return int(ticks) / os.sysconf("SC_CLK_TCK")
        return float(process.create_time())
    except psutil.NoSuchProcess:
        return None


def _boot() -> str:
    """What tells one start of this machine from another; empty where nothing does."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether the process that ran a trial has ended; one of another machine never counts as ended."""
    if owner["host"] != socket.gethostname():
        return False
    started = _started(owner["pid"])
    # The same number with another start is another process; where the clock counts, it may have been set a little.
    return started is None or owner.get("boot", _boot()) != _boot() or abs(started - owner["started"]) > 2
