"""The search space: parameters, their conditions, and the words of a command line that they become."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dppo.errors import UserError

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

Value = str | int | float | bool | None
Values = dict[str, Value]


@dataclass(frozen=True)
class Parameter:
    """One searched key.

    A number between ``low`` and ``high`` (``step``: the distance between its values; ``log``: uniform in the
    logarithm), or one of ``choices``, which ``texts`` spell for the command line. ``prefix`` is a + of the key.
    """

    name: str
    kind: Literal["float", "int", "choice"]
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    choices: tuple[Value, ...] = ()
    texts: tuple[str, ...] = ()
    prefix: str = ""
    calibrated: bool = False  # the bounds come from the penalty's strength under the SFT model

    def __post_init__(self) -> None:
        if self.kind == "choice":
            if len(set(self.texts)) < len(self.texts) or not self.texts:
                raise UserError(f"{self.name}={','.join(self.texts)}: choices must be given, each once")
            return
        shown = f"{self.name}={self.describe()}"
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise UserError(f"{shown}: the first bound must not be above the second")
        if self.log and self.low <= 0:
            raise UserError(f"{shown}: a logarithmic interval must begin above 0")

    def describe(self) -> str:
        """The range in the words of the command line."""
        if self.kind == "choice":
            return f"choice({','.join(self.texts)})"
        low, high = (f"{bound:g}" if self.kind == "float" else str(int(bound)) for bound in (self.low, self.high))
        if self.step is not None and not (self.kind == "int" and self.step == 1):
            return f"{low} to {high} in steps of {self.step:g}"
        found = f"interval({low},{high})"
        if self.kind == "int":
            found = f"int({found})"
        return f"tag(log, {found})" if self.log else found

    def distribution(self) -> BaseDistribution:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choice":
            return CategoricalDistribution(self.choices)
        if self.kind == "int":
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def suggest(self, trial: Trial) -> Value:
        """The value that a sampler of Optuna's gives to ``trial``."""
        found: Value
        if self.kind == "choice":
            found = trial.suggest_categorical(self.name, self.choices)
        elif self.kind == "int":
            step = int(self.step or 1)
            found = trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log, step=step)
        else:
            found = trial.suggest_float(self.name, self.low, self.high, log=self.log, step=self.step)
        return self.tidy(found)

    def word(self, value: Value) -> str:
        """``value`` as an override."""
        text = self.texts[self.choices.index(value)] if self.kind == "choice" else repr(value)
        return f"{self.prefix}{self.name}={text}"

    def read(self, value: Value, where: str) -> Value:
        """A value that a user gives; raises UserError if it is outside."""
        if self.kind == "choice":
            inside = value in self.choices
        else:
            value = float(value) if self.kind == "float" and isinstance(value, int) else value
            inside = type(value) is {"float": float, "int": int}[self.kind] and self.low <= value <= self.high  # type: ignore[operator]
        if not inside:
            raise UserError(
                f"hydra.sweeper.enqueue={where}: {self.name}={value} is outside {self.describe()}; widen the range, or "
                "give it as one of hydra.sweeper.baselines"
            )
        return value

    def tidy(self, value: Value) -> Value:
        """``value`` with six digits (twelve on a range), so that a command line can be read and pasted."""
        if self.kind != "float" or not isinstance(value, float):
            return value
        return min(max(float(f"{value:.{6 if self.step is None else 12}g}"), self.low), self.high)

    def all_values(self) -> list[Value]:
        """Every value; raises UserError for an interval."""
        if self.kind == "choice":
            return list(self.choices)
        if self.step is None or self.log:
            raise UserError(
                f"{self.name}={self.describe()}: hydra/sweeper/sampler=grid needs choice(...) or range(...), "
                "or choose another sampler"
            )
        count = round((self.high - self.low) / self.step) + 1
        steps = [self.low + self.step * place for place in range(count)]
        return [int(value) if self.kind == "int" else float(f"{value:.12g}") for value in steps]

    def at(self, share: float) -> Value:
        """The value at a share in [0, 1) of the range."""
        if self.kind == "choice":
            return self.choices[int(share * len(self.choices))]
        if self.step is not None and not self.log:
            values = self.all_values()
            return values[int(share * len(values))]
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + share * (high - low)
        value = min(max(math.exp(value) if self.log else value, self.low), self.high)
        return round(value) if self.kind == "int" else value

    def ends(self) -> tuple[Value, ...]:
        """The outermost values of a number, every value of a choice: what a check has to try."""
        if self.kind == "choice":
            return self.choices
        cast = int if self.kind == "int" else float
        return (cast(self.low), cast(self.high)) if self.low < self.high else (cast(self.low),)

    def end_near(self, value: Value) -> str | None:
        """``lower`` or ``upper`` if a number lies within 5 % of that end of its range (on its scale)."""
        if self.kind == "choice" or self.low == self.high or not isinstance(value, (int, float)):
            return None
        scale = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return "lower" if share <= 0.05 else "upper" if share >= 0.95 else None


@dataclass(frozen=True)
class Space:
    """All parameters; ``when`` says where one exists, ``fixed`` holds what its conditions ask of the rest."""

    parameters: tuple[Parameter, ...]
    when: Mapping[str, Mapping[str, tuple[str, ...]]]
    fixed: Mapping[str, str]

    def names(self) -> list[str]:
        return [parameter.name for parameter in self.parameters]

    def active(self, values: Mapping[str, Value]) -> tuple[Parameter, ...]:
        """The parameters that exist beside these values of the others."""
        chosen = dict(self.fixed)
        found: list[Parameter] = []
        waiting = list(self.parameters)
        # A parameter is decided after those that its conditions name.
        while waiting:
            names = {parameter.name for parameter in waiting}
            ready = [one for one in waiting if not names & set(self.when.get(one.name, {}))]
            if not ready:
                raise UserError(f"hydra.sweeper.when: {', '.join(sorted(names))} depend on each other")
            for parameter in ready:
                conditions = self.when.get(parameter.name, {})
                if all(chosen.get(key) in allowed for key, allowed in conditions.items()):
                    found.append(parameter)
                    if parameter.name in values:
                        chosen[parameter.name] = parameter.word(values[parameter.name]).partition("=")[2]
            waiting = [one for one in waiting if one not in ready]
        return tuple(one for one in self.parameters if one in found)

    def ordered(self) -> tuple[Parameter, ...]:
        """Parameters that others depend on first."""
        parents = {key for conditions in self.when.values() for key in conditions}
        return tuple(sorted(self.parameters, key=lambda one: (one.name not in parents, one.name in self.when)))

    def keep(self, values: Mapping[str, Value]) -> Values:
        """The values of the parameters that exist, in the order of the space."""
        return {one.name: values[one.name] for one in self.active(values) if one.name in values}

    def words(self, values: Mapping[str, Value]) -> list[str]:
        """The overrides that these values become."""
        return [one.word(values[one.name]) for one in self.parameters if one.name in values]

    def grid(self) -> list[Values]:
        """Every combination, each once, the last parameter changing fastest."""
        found: list[Values] = []
        for values in itertools.product(*(one.all_values() for one in self.parameters)):
            kept = self.keep(dict(zip(self.names(), values, strict=True)))
            if kept not in found:
                found.append(kept)
        return found

    def corners(self, most: int) -> Iterator[Values]:
        """Combinations that reach every end of every parameter: all of them, or, if above ``most``, one at a time."""
        ends = [one.ends() for one in self.parameters]
        combined: Sequence[Sequence[Value]]
        if math.prod(len(values) for values in ends) <= most:
            combined = list(itertools.product(*ends))
        else:
            first = [values[0] for values in ends]
            combined = [
                [*first[:place], value, *first[place + 1 :]] for place, values in enumerate(ends) for value in values
            ]
        seen: list[Values] = []
        for values in combined:
            kept = self.keep(dict(zip(self.names(), values, strict=True)))
            if kept not in seen:
                seen.append(kept)
                yield kept

    def description(self) -> dict[str, str]:
        """One line a parameter: what a resumed study must have in common with the stored one."""
        lines = {}
        for one in self.parameters:
            conditions = [f"{key} in {', '.join(words)}" for key, words in self.when.get(one.name, {}).items()]
            lines[one.name] = one.describe() + (f" when {' and '.join(conditions)}" if conditions else "")
        return lines
