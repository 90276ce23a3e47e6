"""The sweeper ``hydra/sweeper=optuna``: Hydra's side of ``dppo.search``.

Every Hydra application in the environment imports this module when it looks for plugins: it must stay cheap, and
register nothing.
"""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from dppo.search.settings import SearchSettings
    from dppo.search.space import Parameter, Space, Value
    from dppo.search.study import Asked, Study

# More combinations than this are not all composed before the first trial; every end is still checked once.
_CHECKED = 64
# Words that place a run but don't change what comes out.
_PLACES = ("cache", "device", "tracking")


class OptunaSweeper(Sweeper):
    """Runs trials of a study one after the other until there are ``n_trials``; see conf/hydra/sweeper/optuna.yaml."""

    def __init__(self, **settings: Any) -> None:
        self.given = settings
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Search; ``arguments`` are the words of the command line, of which some are fixed and some searched."""
        from dppo import config
        from dppo.errors import Resumable, UserError
        from dppo.search import report
        from dppo.search.samplers import sampler_from
        from dppo.search.settings import SearchSettings
        from dppo.search.study import open_study

        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("hydra/sweeper=optuna: a search is one process, not several under torchrun")
        assert self.config is not None
        places = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)
        assert isinstance(places, dict)
        if places["subdir"] != "${hydra.job.num}":
            raise UserError("hydra.sweep.subdir: a trial's directory is its number; drop it")
        given = dict(self.given)
        direction = given.get("direction")
        given["direction"] = [direction] if isinstance(direction, str) else direction
        settings: SearchSettings = config.typed(SearchSettings, given, "hydra.sweeper")
        fixed, parameters = self._parse(arguments, settings)
        space = self._space(fixed, parameters, settings)
        sampler = sampler_from(settings.sampler, settings.direction)
        limit = sampler.limit(space)
        configuration, objectives = self._check(space, fixed, settings)

        directory = Path(str(self.config.hydra.sweep.dir))
        study = open_study(settings, space, sampler, directory, fixed, configuration)
        for name, line in space.description().items():
            say(f"search {name}: {line}")
        if limit is not None and limit > settings.n_trials:
            say(f"the grid holds {limit} combinations: the first hydra.sweeper.n_trials={settings.n_trials} are run")
        try:
            for lost, again in study.reclaim():
                say(f"trial {lost.number} was abandoned: again as trial {again.number}")
                self._run(study, again, objectives)
            while (asked := study.ask()) is not None:
                self._run(study, asked, objectives)
        except KeyboardInterrupt as stop:
            said = f"{stop}; " if str(stop) else ""
            raise Resumable(f"{said}the same command with hydra.sweeper.resume=true") from None
        finally:
            for line in report.write(study, objectives):
                say(line)

    # --- the search space --------------------------------------------------------------------------------------------

    def _parse(self, arguments: Sequence[str], settings: SearchSettings) -> tuple[list[str], list[Parameter]]:
        """Fixed words and parameters; a typed key takes the place of the preset's."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from dppo import config
        from dppo.errors import UserError

        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        preset = config.canonical(
            [f"{key}={'null' if value is None else value}" for key, value in settings.params.items()]
        )
        typed = parser.parse_overrides(list(arguments))
        keys = {override.key_or_group for override in typed}
        from_preset = [one for one in parser.parse_overrides(preset) if one.key_or_group not in keys]
        fixed = [word for word, one in zip(arguments, typed, strict=True) if not one.is_sweep_override()]
        fixed += [str(one.input_line) for one in from_preset if not one.is_sweep_override()]
        searched = [one for one in [*from_preset, *typed] if one.is_sweep_override()]
        if not searched:
            raise UserError(
                "hydra/sweeper=optuna: nothing is searched; give a range, for instance "
                "'alpha=tag(log, interval(1e-4,1))'"
            )
        return fixed, [_parameter(one) for one in searched]

    def _space(self, fixed: Sequence[str], parameters: Sequence[Parameter], settings: SearchSettings) -> Space:
        from dppo.errors import UserError
        from dppo.search.space import Space

        names = [parameter.name for parameter in parameters]
        composed = self._compose(fixed, with_hydra=True)
        chosen: dict[str, str] = {}
        when: dict[str, dict[str, tuple[str, ...]]] = {}
        typed = {word.lstrip("+~").partition("=")[0] for word in fixed}
        for name, conditions in settings.when.items():
            if name not in names:
                if name in typed or name in settings.params:
                    continue  # a fixed value has taken the parameter's place
                raise UserError(f"hydra.sweeper.when.{name}: is not searched; searched: {', '.join(names)}")
            when[name] = {key: tuple(str(value) for value in values) for key, values in conditions.items()}
            for key in conditions:
                if key in names:
                    continue
                value = composed.hydra.runtime.choices.get(key, OmegaConf.select(composed, key, default=None))
                if value is None:
                    raise UserError(f"hydra.sweeper.when.{name}.{key}: is neither a group nor a key with a value")
                chosen[key] = str(value)
        space = Space(tuple(parameters), when, chosen)
        space.active({})  # refuses conditions that go round in a circle
        never = [
            name
            for name, conditions in when.items()
            if any(key in chosen and chosen[key] not in allowed for key, allowed in conditions.items())
        ]
        kept = tuple(one for one in parameters if one.name not in never)
        if not kept:
            raise UserError(f"hydra.sweeper.when: nothing is searched, no condition of {', '.join(never)} is met")
        return Space(kept, {name: conditions for name, conditions in when.items() if name not in never}, chosen)

    def _compose(self, words: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
        assert self.hydra_context is not None and self.config is not None
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(words))
        if with_hydra:
            return composed
        return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])

    def _check(
        self, space: Space, fixed: Sequence[str], settings: SearchSettings
    ) -> tuple[dict[str, str], tuple[str, ...]]:
        """Pass every end of every parameter through the door; returns what is not searched, and the objectives."""
        from dppo import config
        from dppo.errors import UserError
        from dppo.results import check_objectives

        for values in space.corners(_CHECKED):
            words = [*fixed, *space.words(values)]
            try:
                experiment = config.load(self._compose(words), words)
                check_objectives(experiment.objectives)
            except UserError as error:
                hint = (
                    "; or say where it is searched: hydra.sweeper.when"
                    if "nothing in this run uses" in str(error)
                    else ""
                )
                raise UserError(f"search space ({' '.join(space.words(values))}): {error}{hint}") from None
        objectives = experiment.objectives
        if len(objectives) != len(settings.direction):
            raise UserError(
                f"hydra.sweeper.direction={','.join(settings.direction)}: give one for each of objectives="
                f"[{','.join(objectives)}], for instance hydra.sweeper.direction=[maximize,minimize]"
            )
        if experiment.evaluation.split == "test":
            say("the best is chosen on test prompts: evaluation.split=validation keeps them for the result")
        plain = OmegaConf.to_container(self._compose(fixed), resolve=False)
        assert isinstance(plain, dict)
        return {key: value for key, value in _flat(plain).items() if key.partition(".")[0] not in _PLACES}, objectives

    # --- one trial ---------------------------------------------------------------------------------------------------

    def _run(self, study: Study, asked: Asked, objectives: Sequence[str]) -> None:
        from dppo.artifacts.files import disk_errors
        from dppo.errors import UserError
        from dppo.results import command_line

        assert self.launcher is not None
        place = study.directory / str(asked.number)
        with disk_errors(place):
            place.mkdir()
            (place / "command.txt").write_text(command_line(asked.words) + "\n", encoding="utf-8")
        say(f"trial {asked.number} ({asked.index + 1} of {study.total}): {' '.join(study.space.words(asked.values))}")
        try:
            (job,) = self.launcher.launch([asked.words], initial_job_idx=asked.number)
            if job.status == JobStatus.FAILED:
                raise job._return_value
            returned = job.return_value
            values = tuple(returned) if isinstance(returned, (tuple, list)) else (float(returned),)
            if any(math.isnan(value) for value in values):
                raise UserError(f"an objective is not a number: {', '.join(objectives)} = {values}")
        except Exception as error:
            reason = " ".join(f"{'' if isinstance(error, UserError) else type(error).__name__ + ': '}{error}".split())
            (place / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            study.fail(asked, reason)
            say(f"trial {asked.number} failed: {reason}")
            study.refuse_too_many_failures(reason)
            return
        status = _status(place)
        study.complete(asked, values, status)
        shown = ", ".join(f"{path} {value:.6g}" for path, value in zip(objectives, values, strict=True))
        say(f"trial {asked.number} {status}: {shown}")


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _status(place: Path) -> str:
    import json

    return str(json.loads((place / "result.json").read_text("utf-8"))["status"])


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Every leaf by its dotted name, as text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _parameter(override: Override) -> Parameter:
    """What an override of the official plugin's syntax searches."""
    from hydra.core.override_parser.types import (
        ChoiceSweep,
        IntervalSweep,
        RangeSweep,
        Transformer,
    )

    from dppo.errors import UserError
    from dppo.search.space import Parameter

    key = override.get_key_element()
    name = key.lstrip("+~")
    prefix = key[: len(key) - len(name)]
    sweep = override.value()
    tags: set[str] = getattr(sweep, "tags", set())
    log = "log" in tags
    if tags - {"log"}:
        raise UserError(f"{override.input_line}: the only tag is log, for instance tag(log, interval(1e-4,1))")
    if getattr(sweep, "shuffle", False):
        raise UserError(f"{override.input_line}: a search has an order of its own; drop shuffle()")
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None and sweep.end is not None
        whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
        return Parameter(
            name,
            "int" if whole else "float",
            low=sweep.start if whole else float(sweep.start),
            high=sweep.end if whole else float(sweep.end),
            step=1 if whole else None,
            log=log,
            prefix=prefix,
        )
    if log:
        raise UserError(f"{override.input_line}: tag(log, ...) takes an interval")
    if isinstance(sweep, RangeSweep):
        assert sweep.start is not None and sweep.stop is not None
        # The stop is left out, as Hydra does; a little less than a step of it counts as reached.
        count = math.ceil((sweep.stop - sweep.start) / sweep.step - 1e-9) if sweep.step else 0
        if count < 1:
            raise UserError(f"{override.input_line}: holds no value; write range(start,stop,step)")
        last = sweep.start + (count - 1) * sweep.step
        whole = all(isinstance(value, int) for value in (sweep.start, sweep.stop, sweep.step))
        low, high = sorted((sweep.start, last))
        return Parameter(name, "int" if whole else "float", low=low, high=high, step=abs(sweep.step), prefix=prefix)
    assert isinstance(sweep, ChoiceSweep) or override.is_choice_sweep()
    choices: list[Value] = list(override.sweep_iterator(transformer=Transformer.encode))  # type: ignore[arg-type]
    texts = tuple(override.sweep_string_iterator())
    return Parameter(name, "choice", choices=tuple(choices), texts=texts, prefix=prefix)
