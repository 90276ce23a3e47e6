"""Which values come next: an index and the trials before it decide, nothing else.

A sampler is built anew for every trial with a seed made of the search's seed and the trial's index, and it sees a copy
of the trials that count. So a search that was killed and resumed proposes what an undisturbed one does.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from dppo.errors import UserError
from dppo.search.settings import Direction
from dppo.search.space import Space, Value, Values

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

# What Optuna imports only when the sampler is first used.
_NEEDS = {"CmaEsSampler": "cmaes", "GPSampler": "scipy"}


@dataclass(frozen=True)
class Proposal:
    """Values of the parameters that exist, and what the sampler wants to remember with the trial."""

    values: Values
    attributes: Mapping[str, Any]
    distributions: Mapping[str, Any] = field(default_factory=dict)  # of values that are not in the space


class Sampler(Protocol):
    """Proposes the trial of an index."""

    def limit(self, space: Space) -> int | None:
        """How many trials there can be; None for any number."""
        ...

    def propose(
        self, space: Space, index: int, before: Sequence[FrozenTrial], directions: Sequence[Direction]
    ) -> Proposal: ...


@dataclass(frozen=True)
class Grid:
    """Every combination of choices and ranges, in order."""

    def limit(self, space: Space) -> int | None:
        return len(space.grid())

    def propose(
        self, space: Space, index: int, before: Sequence[FrozenTrial], directions: Sequence[Direction]
    ) -> Proposal:
        return Proposal(space.grid()[index], {})


@dataclass(frozen=True)
class Sobol:
    """Points of a scrambled Sobol sequence."""

    seed: int

    def limit(self, space: Space) -> int | None:
        return None

    def propose(
        self, space: Space, index: int, before: Sequence[FrozenTrial], directions: Sequence[Direction]
    ) -> Proposal:
        import torch

        engine = torch.quasirandom.SobolEngine(len(space.parameters), scramble=True, seed=self.seed)
        point = engine.draw(index + 1, dtype=torch.float64)[-1].tolist()
        values = {one.name: one.tidy(one.at(share)) for one, share in zip(space.parameters, point, strict=True)}
        return Proposal(space.keep(values), {})


@dataclass(frozen=True)
class Stratified:
    """An equal share of the trials for every value of some choices; ``within`` searches the rest, for each alone."""

    names: tuple[str, ...]
    within: Sampler

    def limit(self, space: Space) -> int | None:
        return None

    def strata(self, space: Space) -> list[Values]:
        """The combinations of the choices that exist, in the order in which they take turns."""
        return Space(tuple(one for one in space.parameters if one.name in self.names), space.when, space.fixed).grid()

    def propose(
        self, space: Space, index: int, before: Sequence[FrozenTrial], directions: Sequence[Direction]
    ) -> Proposal:
        strata = self.strata(space)
        own = strata[index % len(strata)]
        texts = {one.name: one.word(own[one.name]).partition("=")[2] for one in space.parameters if one.name in own}
        rest = tuple(one for one in space.parameters if one.name not in self.names)
        inner = Space(rest, space.when, {**space.fixed, **texts})
        if not inner.active({}):
            return Proposal(own, {})
        alike = [trial for trial in before if self.stratum(trial) == [own.get(name) for name in self.names]]
        found = self.within.propose(inner, index // len(strata), alike, directions)
        return replace(found, values={**own, **found.values})

    def stratum(self, trial: FrozenTrial) -> list[Value]:
        """The choices of a trial."""
        return [trial.params.get(name) for name in self.names]


@dataclass(frozen=True)
class FromOptuna:
    """A sampler of Optuna's: its class, its arguments without the seed, and the search's seed.

    ``more`` may suggest further parameters of a trial, beside those of the space.
    """

    cls: type[optuna.samplers.BaseSampler]
    arguments: Mapping[str, Any]
    seed: int
    more: Callable[[optuna.Trial], None] | None = None

    def limit(self, space: Space) -> int | None:
        return None

    def propose(
        self, space: Space, index: int, before: Sequence[FrozenTrial], directions: Sequence[Direction]
    ) -> Proposal:
        import optuna

        study = optuna.create_study(directions=list(directions), sampler=self.build(index))
        study.add_trials(_finite(before, len(directions)))
        trial = study.ask()
        values: Values = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for one in space.ordered():
                if one in space.active(values):
                    values[one.name] = one.suggest(trial)
            if self.more is not None:
                self.more(trial)
        frozen = study.get_trials(deepcopy=False)[-1]
        more = {name: value for name, value in frozen.params.items() if name not in space.names()}
        distributions = {name: frozen.distributions[name] for name in more}
        # CMA-ES keeps its state with its trials.
        return Proposal({**space.keep(values), **more}, frozen.system_attrs, distributions)

    def build(self, index: int) -> optuna.samplers.BaseSampler:
        """The sampler for one trial."""
        digest = hashlib.sha256(f"{self.seed}:{index}".encode()).digest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental options are chosen knowingly, in conf/
            return self.cls(**{**self.arguments, "seed": int.from_bytes(digest[:4], "big")})


def number_of_trials(sampler: Sampler, space: Space, most: int) -> int:
    """How many trials a study has that asks for ``most``."""
    limit = sampler.limit(space)
    return most if limit is None else min(limit, most)


def _finite(trials: Sequence[FrozenTrial], n_objectives: int) -> list[FrozenTrial]:
    """The same trials with values a little beyond the finite ones in place of infinite ones, which break models."""
    import optuna

    complete = [trial.values for trial in trials if trial.values is not None]
    bounds = []
    for place in range(n_objectives):
        finite = [values[place] for values in complete if math.isfinite(values[place])] or [0.0]
        margin = (max(finite) - min(finite)) or 1.0
        bounds.append((min(finite) - margin, max(finite) + margin))
    return [
        optuna.trial.create_trial(
            state=trial.state,
            params=trial.params,
            distributions=trial.distributions,
            values=trial.values
            and [min(max(value, low), high) for value, (low, high) in zip(trial.values, bounds, strict=True)],
            intermediate_values=trial.intermediate_values if n_objectives == 1 else {},
            system_attrs=trial.system_attrs,
        )
        for trial in trials
    ]


def sampler_from(settings: Mapping[str, Any], directions: Sequence[Direction]) -> Sampler:
    """Build what ``hydra.sweeper.sampler`` describes; raises UserError for what can't be built."""
    arguments = dict(settings)
    target = str(arguments.pop("_target_", None))
    module, _, name = target.rpartition(".")
    if module not in ("optuna.samplers", "dppo.search.samplers"):
        raise UserError(f"hydra.sweeper.sampler._target_={target}: must be a class of optuna.samplers")
    seed = arguments.pop("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"hydra.sweeper.sampler.seed={seed}: must be a whole number from 0 on")
    if target == "dppo.search.samplers.Grid":
        return Grid()
    if target == "dppo.search.samplers.Sobol":
        return Sobol(seed)
    if (package := _NEEDS.get(name)) and find_spec(package) is None:
        raise UserError(
            f"hydra.sweeper.sampler={name}: needs {package}: type pip install 'dppo[samplers]', or choose another "
            "sampler, for instance hydra/sweeper/sampler=tpe"
        )
    if name == "CmaEsSampler" and len(directions) > 1:
        raise UserError(f"hydra.sweeper.sampler={name}: takes one objective; choose hydra/sweeper/sampler=tpe")
    cls = getattr(importlib.import_module(module), name, None)
    if cls is None:
        raise UserError(f"hydra.sweeper.sampler._target_={target}: there is no such sampler")
    sampler = FromOptuna(cls, arguments, seed)
    try:
        sampler.build(0)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"hydra.sweeper.sampler={name}: {error}") from None
    return sampler
