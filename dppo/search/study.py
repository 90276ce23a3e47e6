"""The study: trials in a storage that outlives this process, each with its index, its owner and its command line."""

from __future__ import annotations

import difflib
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dppo.artifacts.locks import hold
from dppo.errors import UserError
from dppo.results import command_line
from dppo.search.samplers import Sampler
from dppo.search.settings import SearchSettings
from dppo.search.space import Space, Values

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

# Attributes of a study and of its trials.
_RECORD = "dppo"
INDEX, OWNER, COMMAND, ERROR, STATUS, ABANDONED = "index", "owner", "command", "error", "status", "abandoned"


@dataclass(frozen=True)
class Asked:
    """A trial to be run now."""

    number: int
    index: int
    values: Values
    words: list[str]


@dataclass(frozen=True)
class Study:
    """One study of Optuna's in ``directory``; ``fixed`` are the words that every trial shares."""

    study: optuna.Study
    settings: SearchSettings
    space: Space
    sampler: Sampler
    directory: Path
    fixed: Sequence[str]

    @property
    def total(self) -> int:
        """How many trials there will be."""
        limit = self.sampler.limit(self.space)
        return self.settings.n_trials if limit is None else min(limit, self.settings.n_trials)

    def trials(self) -> list[FrozenTrial]:
        """The trials that count, by index; an abandoned one does not, another one has its index."""
        with storage_errors(self.settings.storage):
            found = self.study.get_trials(deepcopy=False)
        counting = [trial for trial in found if INDEX in trial.user_attrs and ABANDONED not in trial.user_attrs]
        return sorted(counting, key=lambda trial: int(trial.user_attrs[INDEX]))

    def ask(self) -> Asked | None:
        """Store the next trial as running and return it; None if all there will be have been begun."""
        with hold(self.directory / ".study.lock", "the study"):
            counting = self.trials()
            indices = {int(trial.user_attrs[INDEX]) for trial in counting}
            index = next(place for place in range(len(counting) + 1) if place not in indices)
            if index >= self.total:
                return None
            before = [trial for trial in counting if int(trial.user_attrs[INDEX]) < index]
            proposal = self.sampler.propose(self.space, index, before, self.settings.direction)
            with storage_errors(self.settings.storage):
                return self._begin(index, proposal.values, proposal.attributes)

    def reclaim(self) -> Iterator[tuple[FrozenTrial, Asked]]:
        """Begin again, one after the other, the running trials whose process is gone."""
        from optuna.trial import TrialState

        while True:
            with hold(self.directory / ".study.lock", "the study"), storage_errors(self.settings.storage):
                running = [
                    trial for trial in self.study.get_trials(deepcopy=False) if trial.state == TrialState.RUNNING
                ]
                lost = next((trial for trial in running if _is_gone(trial.user_attrs[OWNER])), None)
                if lost is None:
                    return
                # First out of the count: whoever dies here leaves an index that is free, never one that is taken twice.
                known = ABANDONED in lost.user_attrs
                self._note(lost, {ABANDONED: True})
                self.study.tell(lost.number, state=TrialState.FAIL)
                if known:
                    continue
                again = self._begin(int(lost.user_attrs[INDEX]), lost.params, lost.system_attrs)
            yield lost, again

    def _begin(self, index: int, values: Mapping[str, Any], attributes: Mapping[str, Any]) -> Asked:
        from optuna.trial import TrialState, create_trial

        words = [*self.fixed, *self.space.words(values)]
        owner = _owner()
        kept = {one.name: one.distribution() for one in self.space.parameters if one.name in values}
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=dict(values),
                distributions=kept,
                user_attrs={INDEX: index, OWNER: owner, COMMAND: command_line(words)},
                system_attrs=dict(attributes),
            )
        )
        (mine,) = [trial for trial in self.study.get_trials(deepcopy=False) if trial.user_attrs.get(OWNER) == owner]
        return Asked(mine.number, index, dict(values), words)

    def complete(self, asked: Asked, values: Sequence[float], status: str) -> None:
        """Store the values of a trial; ``status`` is complete or diverged."""
        from optuna.trial import TrialState

        with storage_errors(self.settings.storage):
            self._note(self._frozen(asked), {STATUS: status})
            self.study.tell(asked.number, list(values), state=TrialState.COMPLETE)

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


def open_study(
    settings: SearchSettings,
    space: Space,
    sampler: Sampler,
    directory: Path,
    fixed: Sequence[str],
    configuration: Mapping[str, str],
) -> Study:
    """Create the study, or go on with it if ``settings.resume``.

    ``configuration`` is everything that is not searched, flat. Raises UserError if the study exists and is not to be
    resumed, if it was made for something else, or if trials of another study lie in ``directory``.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    record = {
        "space": space.description(),
        "objectives": {"direction": ", ".join(settings.direction)},
        "configuration": dict(configuration),
    }
    with storage_errors(settings.storage), hold(directory / ".study.lock", "the study"):
        storage = _open_storage(settings.storage)
        names = optuna.get_all_study_names(storage)
        if settings.study_name in names:
            # A study is a name and its trials: which sampler it has while it is told values makes no difference.
            study = optuna.load_study(
                study_name=settings.study_name, storage=storage, sampler=optuna.samplers.RandomSampler()
            )
            if not settings.resume:
                raise UserError(
                    f"study {settings.study_name} exists in {shown(settings.storage)} with "
                    f"{len(study.get_trials(deepcopy=False))} trials: add hydra.sweeper.resume=true to go on with it, "
                    "or give another name, hydra.sweeper.study_name=..."
                )
            _refuse_changes(study, record)
        else:
            taken = sorted(path.name for path in directory.iterdir() if path.is_dir() and path.name.isdigit())
            if taken:
                raise UserError(
                    f"{directory / taken[0]}: belongs to a sweep whose study is not in {shown(settings.storage)}; "
                    "move it away, or give another name, hydra.sweeper.study_name=..."
                )
            study = optuna.create_study(
                study_name=settings.study_name,
                storage=storage,
                directions=list(settings.direction),
                sampler=optuna.samplers.RandomSampler(),
            )
            study.set_user_attr(_RECORD, json.dumps(record))
    return Study(study, settings, space, sampler, directory, fixed)


def _refuse_changes(study: optuna.Study, record: Mapping[str, Mapping[str, str]]) -> None:
    stored = json.loads(study.user_attrs.get(_RECORD, "null"))
    if stored is None:
        raise UserError(
            f"study {study.study_name}: was not made by dppo; give another name, hydra.sweeper.study_name=..."
        )
    changes = []
    for part, now in record.items():
        before = stored[part]
        for key in dict.fromkeys([*before, *now]):
            if before.get(key) != now.get(key):
                changes.append(f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}")
    if changes:
        listed = "; ".join(changes[:6]) + (f" and {len(changes) - 6} more" if len(changes) > 6 else "")
        raise UserError(
            f"study {study.study_name}: its trials were made with something else: {listed}; "
            "undo the change, or give another name, hydra.sweeper.study_name=..."
        )


# --- storage ---------------------------------------------------------------------------------------------------------


def _open_storage(url: str) -> optuna.storages.BaseStorage:
    import optuna

    scheme, separator, rest = url.partition("://")
    if not separator:
        raise UserError(f"hydra.sweeper.storage={url}: must be sqlite:///path, journal:///path or a database URL")
    if scheme == "journal":
        from optuna.storages.journal import JournalFileBackend

        return optuna.storages.JournalStorage(JournalFileBackend(rest.removeprefix("/")))
    known = ("sqlite", "postgresql", "mysql")
    if scheme.partition("+")[0] not in known:
        near = difflib.get_close_matches(scheme, [*known, "journal"], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"hydra.sweeper.storage={shown(url)}: must begin with sqlite:/// or journal:///.{hint}")
    return optuna.storages.RDBStorage(url)


def shown(url: str) -> str:
    """A storage's URL without a password."""
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Tell in one line what a storage has against being used."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        cause: BaseException = error
        while (deeper := getattr(cause, "orig", None) or cause.__cause__) is not None:
            cause = deeper
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        advice = (
            "another process is writing to it; end it, or try again"
            if "locked" in reason
            else "give another hydra.sweeper.storage, or mend or remove that one"
        )
        raise UserError(f"hydra.sweeper.storage={shown(url)}: {reason}; {advice}") from None
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"hydra.sweeper.storage={shown(url)}: {str(error).splitlines()[0]}") from None


# --- owners ----------------------------------------------------------------------------------------------------------


def _owner() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "host": socket.gethostname(),
        "token": secrets.token_hex(8),
    }


def _started(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None


def _is_gone(owner: Mapping[str, Any]) -> bool:
    """Whether the process that ran a trial has ended; one of another machine never counts as ended."""
    if owner["host"] != socket.gethostname():
        return False
    started = _started(owner["pid"])
    # The same number with another start is another process; the clock may have been set a little since.
    return started is None or abs(started - owner["started"]) > 2
