"""The sweeper ``hydra/sweeper=optuna``: Hydra's side of ``dppo.search``.

Every Hydra application in the environment imports this module when it looks for plugins: it must stay cheap, and
register nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from dppo.config import Experiment
    from dppo.search.pruners import Pruner
    from dppo.search.samplers import Sampler
    from dppo.search.settings import SearchSettings
    from dppo.search.space import Parameter, Space, Value, Values
    from dppo.search.study import SideRun, Study

# More combinations than this are not all composed before the first trial; every end is still checked once.
_CHECKED = 64
# Words that place a run, and measurements on its way: neither changes what comes out.
_NO_INFLUENCE = ("cache.", "device", "tracking.", "dry_run", "rates", "report", "evaluation.interim.")
# How often a run is measured on its way if a pruner asks for it and nobody said how often.
_POINTS = 4
_PRUNABLE = ("objective", "win_rate.", "reward.policy", "reward.delta", "held_out.accuracy")
_CALIBRATED = "calibrated"
# What the strength of a penalty under the SFT model depends on.
_OF_STRENGTH = frozenset({"loss", "loss/base", "penalty", "model", "sft", "dataset"})
# A forecast plans so many different trials.
_FORECAST = 8
# What is safe to write to files: it stands for text that Hydra reads elsewhere.
_VARIABLE = re.compile(r"\$\{(oc\.env:\w+|hydra\.[\w.]+)\}")


class OptunaSweeper(Sweeper):
    """Runs trials of a study until there are ``n_trials``; see conf/hydra/sweeper/optuna.yaml."""

    def __init__(self, **settings: Any) -> None:
        self.given = settings
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.hydra_context = hydra_context
        self.config = config
        with open_dict(config):  # every trial is announced here; the launchers' own announcements are not needed
            config.hydra.hydra_logging.root.level = "WARNING"
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Search; ``arguments`` are the words of the command line, of which some are fixed and some searched."""
        from dppo.errors import UserError
        from dppo.processes import world_size
        from dppo.search import report, summary, workers
        from dppo.search.pruners import pruner_from
        from dppo.search.runner import Runner, say
        from dppo.search.study import WORKER, open_study, reach
        from dppo.stopping import Resumable

        if world_size() > 1:
            raise UserError("hydra/sweeper=optuna: a search is one process, not several under torchrun")
        is_worker = WORKER in os.environ
        settings = self._settings(is_worker)
        fixed, parameters = self._parse(arguments, settings)
        space = self._space(fixed, parameters, settings)
        pruner = pruner_from(settings.pruner, settings.replicates)
        fixed, pruner, note = self._pruned(fixed, pruner, settings)
        sampler = self._sampler(space, fixed, settings)
        sampler.limit(space)
        experiment, configuration = self._check(space, fixed, settings, is_worker)
        directory = Path(str(self._config.hydra.sweep.dir))
        # A worker takes what was planned.
        baselines = [] if is_worker else [self._baseline(text, fixed) for text in settings.baselines]
        if experiment.dry_run:
            for line in self._forecast(space, sampler, fixed, settings, baselines):
                say(line)
            return
        storage = reach(settings, directory)
        space, scale = self._calibrated(space, fixed, directory)
        enqueued = [self._enqueued(text, space) for text in settings.enqueue]

        study = open_study(storage, settings, space, sampler, directory, fixed, configuration, enqueued)
        runner = Runner(study, pruner, experiment.objectives, experiment.seed, self._launch)
        if is_worker:
            workers.end_with_parent()
            runner.work()
            return
        summary.write_record(study, experiment.objectives, _plain(self._compose(fixed).tracking))
        for line in [*note, *scale, *_header(study, sampler)]:
            say(line)
        try:
            study.plan(_baseline_runs(study, baselines, experiment.seed))
            self._work(runner)
            if study.is_done():
                study.plan(_result_runs(study, baselines, experiment.seed))
                self._work(runner)
            else:
                say("another process still runs a trial of this study: it makes the results")
        except KeyboardInterrupt as stop:
            said = f"{stop}; " if str(stop) else ""
            asked = getattr(stop, "signum", signal.SIGINT)
            raise Resumable(f"{said}the same command with hydra.sweeper.resume=true", asked) from None
        finally:
            written = report.write(study, experiment.objectives)
            for line in written.lines:
                say(line)
            experiment.tracking.study(summary.study_info(study, written))

    def _work(self, runner: Any) -> None:
        """Run what is left of the study, in this process or in workers."""
        from dppo.search import workers

        study = runner.study
        if study.settings.n_jobs == 1:
            runner.work()
            return

        if study.has_work():
            workers.run_workers(study.settings.n_jobs, study.directory, study.count_death, study.has_work, sys.argv[1:])

    @property
    def _config(self) -> DictConfig:
        assert self.config is not None
        return self.config

    def _settings(self, is_worker: bool) -> SearchSettings:
        from dppo import config
        from dppo.errors import UserError
        from dppo.search.settings import SearchSettings
        from dppo.search.storage import file_in, shown

        places = OmegaConf.to_container(self._config.hydra.sweep, resolve=False)
        raw = OmegaConf.to_container(self._config.hydra.sweeper, resolve=False)
        assert isinstance(places, dict) and isinstance(raw, dict)
        if places["subdir"] != "${hydra.job.num}":
            raise UserError("hydra.sweep.subdir: a trial's directory is its number; drop it")
        typed = str(raw.get("storage"))
        literal = _VARIABLE.sub("", typed)
        if shown(literal) != literal:
            raise UserError(
                f"hydra.sweeper.storage={shown(typed)}: a password would be written to files; put the URL into an "
                "environment variable and type 'hydra.sweeper.storage=${oc.env:DPPO_STORAGE}'"
            )
        given = dict(self.given)
        direction = given.get("direction")
        given["direction"] = [direction] if isinstance(direction, str) else direction
        if given.get("storage") is None:
            given["storage"] = file_in(str(self._config.hydra.sweep.dir))
        settings: SearchSettings = config.typed(SearchSettings, given, "hydra.sweeper")
        assert settings.bounds is not None  # refuses what is not a constraint
        return dataclasses.replace(settings, resume=True) if is_worker else settings

    def _launch(self, words: Sequence[str], subdir: str, reports: int | None, number: int) -> tuple[float, ...]:
        """One run, by whatever launcher was chosen."""
        from dppo.search.watch import TRIAL

        returned = self._job(words, subdir, {} if reports is None else {TRIAL: reports}, number)
        return tuple(returned) if isinstance(returned, (tuple, list)) else (float(returned),)

    def _job(self, words: Sequence[str], subdir: str, environment: Mapping[str, int], number: int) -> Any:
        """What one job returns; raises what made it fail."""
        from hydra.core.utils import configure_log

        from dppo.search.workers import stopped_together

        assert self.launcher is not None
        hydra = self._config.hydra
        configure_log(hydra.hydra_logging, hydra.verbose)  # not every launcher does it
        own = [
            f"hydra.sweep.subdir='{subdir}'",
            *(f"+hydra.job.env_set.{key}={environment[key]}" for key in environment),
        ]
        with stopped_together():
            (job,) = self.launcher.launch([[*words, *own]], initial_job_idx=number)
        if job.status == JobStatus.FAILED:
            raise job._return_value
        return job.return_value

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
        fixed = [word for word, one in zip(arguments, typed, strict=True) if not _is_searched(one)]
        fixed += [str(one.input_line) for one in from_preset if not _is_searched(one)]
        searched = [one for one in [*from_preset, *typed] if _is_searched(one)]
        if not searched:
            raise UserError(
                "hydra/sweeper=optuna: nothing is searched; give a range, for instance "
                "'alpha=tag(log, interval(1e-4,1))'"
            )
        return fixed, [_parameter(one) for one in searched]

    def _space(self, fixed: Sequence[str], parameters: Sequence[Parameter], settings: SearchSettings) -> Space:
        from dppo import config
        from dppo.errors import UserError
        from dppo.search.space import Space

        names = [parameter.name for parameter in parameters]
        composed = self._compose(fixed, with_hydra=True)
        chosen: dict[str, str] = {}
        when: dict[str, dict[str, tuple[str, ...]]] = {}
        typed = set(map(config.key_of, fixed))
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

    def _sampler(self, space: Space, fixed: Sequence[str], settings: SearchSettings) -> Sampler:
        """The sampler, with an equal share of the trials for every choice that is compared."""
        from dppo import config
        from dppo.errors import UserError
        from dppo.search.samplers import FromOptuna, Grid, Stratified, sampler_from

        given = {*map(config.key_of, fixed), *settings.params}
        for name in settings.labels:
            if name not in space.names() and name not in given:  # else a fixed value has taken its place
                raise UserError(f"hydra.sweeper.labels.{name}: is not searched; searched: {', '.join(space.names())}")
        sampler = sampler_from(settings.sampler, settings.direction)
        if settings.custom_search_space is not None:
            if not isinstance(sampler, FromOptuna):
                raise UserError("hydra.sweeper.custom_search_space: needs a sampler of Optuna's, for instance tpe")
            target, suggest = settings.custom_search_space, self._custom(settings.custom_search_space)

            def more(trial: Any) -> None:
                try:
                    suggest(self._compose(fixed), trial)
                except Exception as error:
                    raise UserError(
                        f"hydra.sweeper.custom_search_space={target}: {type(error).__name__}: {error}"
                    ) from error

            sampler = dataclasses.replace(sampler, more=more)
        compared = [
            one.name
            for one in space.parameters
            if one.kind == "choice" and settings.labels.get(one.name) == "scientific"
        ]
        if not compared or isinstance(sampler, Grid):
            return sampler
        for name in compared:
            for key in space.when.get(name, {}):
                if key in space.names() and key not in compared:
                    raise UserError(
                        f"hydra.sweeper.labels.{name}: is compared, but exists for some values of {key} only, which is "
                        f"not: label {key} scientific too, or leave {name} out of the labels"
                    )
        if len(compared) == len(space.parameters):
            return Grid()
        return Stratified(tuple(compared), sampler)

    def _custom(self, target: str) -> Any:
        """The function that suggests more parameters, from a module that the user allows."""
        import importlib

        from dppo.errors import UserError

        allowed = tuple(f"{prefix.rstrip('.')}." for prefix in self._config.get("allowed_targets", []))
        if not target.startswith(allowed) or not allowed:
            raise UserError(
                f"hydra.sweeper.custom_search_space={target}: is code of your own: add its module to allowed_targets"
            )
        module, _, name = target.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            raise UserError(f"hydra.sweeper.custom_search_space={target}: there is no such function") from None

    def _pruned(
        self, fixed: list[str], pruner: Pruner, settings: SearchSettings
    ) -> tuple[list[str], Pruner, list[str]]:
        """The fixed words with the interim measurements that the pruner needs, and the pruner that can be used."""
        from dppo import config
        from dppo.errors import UserError
        from dppo.search.pruners import pruner_from

        composed = self._compose(fixed)
        points = int(OmegaConf.select(composed, "evaluation.interim.n_points", default=0))
        if pruner.instances is not None and points:
            raise UserError(
                "hydra.sweeper.pruner=wilcoxon: decides between seeds and not during training: drop "
                "evaluation.interim.n_points, or choose hydra/sweeper/pruner=median"
            )
        if not pruner.on_steps:
            return fixed, pruner, []
        objectives = [str(path) for path in composed.objectives]
        if len(objectives) > 1 or settings.direction != ("maximize",) or not objectives[0].startswith(_PRUNABLE):
            told = ", ".join(f"{way} {path}" for way, path in zip(settings.direction, objectives, strict=False))
            line = f"no trial is pruned: interim values say little about: {told}"
            return fixed, pruner_from({"_target_": "optuna.pruners.NopPruner"}, settings.replicates), [line]
        if points:
            return fixed, pruner, []
        if "evaluation.interim.n_points" in map(config.key_of, fixed):
            raise UserError(
                "evaluation.interim.n_points=0: the pruner would see nothing: drop it, or choose "
                "hydra/sweeper/pruner=none"
            )
        return [*fixed, f"evaluation.interim.n_points={_POINTS}"], pruner, []

    def _check(
        self, space: Space, fixed: Sequence[str], settings: SearchSettings, is_worker: bool
    ) -> tuple[Experiment, dict[str, str]]:
        """Pass every end of every parameter through the door; returns one of them, and all that is not searched.

        A worker looks at one end alone: the process that started it has looked at all.
        """
        from dppo import config
        from dppo.dotted import leaves
        from dppo.errors import UserError
        from dppo.results import check_objectives
        from dppo.search.runner import say

        for values in itertools.islice(space.corners(_CHECKED), 1 if is_worker else None):
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
        check_objectives([bound.path for bound in settings.bounds])
        objectives = experiment.objectives
        if len(objectives) != len(settings.direction):
            raise UserError(
                f"hydra.sweeper.direction={','.join(settings.direction)}: give one for each of objectives="
                f"[{','.join(objectives)}], for instance hydra.sweeper.direction=[maximize,minimize]"
            )
        if "seed" in space.names() and (settings.replicates > 1 or settings.test_seeds or settings.baselines):
            raise UserError("seed: is searched, and replicates, baselines and test_seeds take seeds of their own")
        if experiment.evaluation.split == "test" and not is_worker:
            say("the best is chosen on test prompts: evaluation.split=validation keeps them for the result")
        plain = OmegaConf.to_container(self._compose(fixed), resolve=False)
        assert isinstance(plain, dict)
        kept = {key: str(value) for key, value in leaves(plain).items() if not key.startswith(_NO_INFLUENCE)}
        return experiment, kept

    def _calibrated(self, space: Space, fixed: Sequence[str], directory: Path) -> tuple[Space, list[str]]:
        """The space with alpha between .003/F and 10/F where it is calibrated, F the mean f(r) of the SFT model."""
        from dppo.errors import UserError
        from dppo.search.space import Space
        from dppo.search.watch import CALIBRATION

        at = next((place for place, one in enumerate(space.parameters) if one.calibrated), None)
        if at is None:
            return space, []
        others = {one.name.partition(".")[0] for one in space.parameters} & _OF_STRENGTH
        if others:
            raise UserError(
                f"alpha=calibrated: the scale of f(r) differs along {', '.join(sorted(others))}, searched as well; "
                "give alpha a range, for instance 'alpha=tag(log, interval(1e-4,1))'"
            )
        words = [*_without(fixed, "evaluation.interim"), "alpha=1.0"]
        words += ["zeta=0.5"] if "zeta" in space.names() else []
        stored = directory / "calibration" / "strength.json"
        if not stored.exists():
            self._job(words, "calibration", {CALIBRATION: 1}, 0)
        found = json.loads(stored.read_text("utf-8"))
        strength = float(found["mean"])
        if strength <= 0:
            raise UserError(
                "alpha=calibrated: the SFT model ranks every pair right, f(r) is 0; give alpha a range, for instance "
                "'alpha=tag(log, interval(1e-4,1))'"
            )
        low, high = (float(f"{bound / strength:.3g}") for bound in (0.003, 10.0))
        parameters = list(space.parameters)
        parameters[at] = dataclasses.replace(parameters[at], low=low, high=high)
        line = (
            f"alpha is searched from .003/F to 10/F: F = {strength:.4g} is the mean f(r) of the SFT model over "
            f"{found['n_pairs']} training pairs, {found['open']:.0%} of them ranked wrongly"
        )
        return Space(tuple(parameters), space.when, space.fixed), [line]

    def _forecast(
        self,
        space: Space,
        sampler: Sampler,
        fixed: Sequence[str],
        settings: SearchSettings,
        baselines: Sequence[tuple[str, list[str]]],
    ) -> list[str]:
        """What the search would cost: trials as they are at the ends of the space, in equal shares."""
        from dppo import config
        from dppo.search.forecast import Kind, forecast
        from dppo.search.samplers import number_of_trials

        def kind(title: str, n_runs: int, words: Sequence[str]) -> Kind:
            def experiment(seed: int) -> Experiment:
                own = [*_without(words, "seed"), f"seed={seed}"]
                return config.load(self._compose(own), own)

            return Kind(title, n_runs, experiment)

        n_trials = number_of_trials(sampler, space, settings.n_trials)
        ends = list(space.corners(_FORECAST))[:_FORECAST]
        kinds = [kind(f"baseline {name}", settings.replicates, words) for name, words in baselines]
        for at, values in enumerate(ends):
            own = space.words(values)
            share = len(range(at, n_trials, len(ends))) * settings.replicates
            kinds.append(kind(f"trials such as {' '.join(own)}", share, [*fixed, *own]))
        best = ("the best", [*fixed, *space.words(ends[0])])
        kinds += [
            kind(f"results of {name}", settings.test_seeds, _on_test(words)) for name, words in [best, *baselines]
        ]
        return forecast(kinds, settings.n_jobs)

    def _enqueued(self, text: str, space: Space) -> Values:
        """The values of a trial that the user gives."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from dppo.errors import UserError

        values: Values = {}
        for one in OverridesParser.create().parse_overrides(text.split()):
            known = {parameter.name: parameter for parameter in space.parameters}
            name = str(one.key_or_group)
            if name not in known:
                raise UserError(f"hydra.sweeper.enqueue={text}: {name} is not searched; searched: {', '.join(known)}")
            values[name] = known[name].read(one.value(), text)  # type: ignore[arg-type]
        kept = space.keep(values)
        lacking = [one.name for one in space.active(values) if one.name not in values]
        surplus = [name for name in values if name not in kept]
        if lacking or surplus:
            what = f"lacks {', '.join(lacking)}" if lacking else f"{', '.join(surplus)} does not exist there"
            raise UserError(f"hydra.sweeper.enqueue={text}: {what}")
        return kept

    def _baseline(self, text: str, fixed: Sequence[str]) -> tuple[str, list[str]]:
        """The name and the words of a baseline: what every trial shares, without what the baseline does not use."""
        from dppo import config
        from dppo.errors import UserError

        own = config.canonical(text.split())
        words = [*_without(fixed, *map(config.key_of, own), "evaluation.interim"), *own]
        while True:
            try:
                config.load(self._compose(words), words)
                return text, words
            except config.Unused as error:
                if error.word in own or error.word not in words:
                    raise UserError(f"hydra.sweeper.baselines={text}: {error}") from None
                words.remove(error.word)
            except UserError as error:
                raise UserError(f"hydra.sweeper.baselines={text}: {error}") from None


def _plain(node: DictConfig) -> dict[str, Any]:
    return {str(key): value for key, value in OmegaConf.to_container(node, resolve=True).items()}  # type: ignore[union-attr]


def _is_searched(override: Override) -> bool:
    return override.is_sweep_override() or (override.key_or_group == "alpha" and override.value() == _CALIBRATED)


def _header(study: Study, sampler: Sampler) -> list[str]:
    lines = [f"search {name}: {line}" for name, line in study.space.description().items()]
    limit = sampler.limit(study.space)
    if limit is not None and limit > study.settings.n_trials:
        lines.append(
            f"the grid holds {limit} combinations: the first hydra.sweeper.n_trials={study.settings.n_trials} are run"
        )
    return lines


def _baseline_runs(study: Study, baselines: Sequence[tuple[str, list[str]]], seed: int) -> list[SideRun]:
    from dppo.search.study import SideRun, folder

    seeds = range(seed, seed + study.settings.replicates)
    return [
        SideRun(f"baselines/{folder(name)}/seed={own}", [*words, f"seed={own}"])
        for name, words in baselines
        for own in seeds
    ]


def _result_runs(study: Study, baselines: Sequence[tuple[str, list[str]]], seed: int) -> list[SideRun]:
    """The best and the baselines on seeds that no trial had, scored on test prompts."""
    from dppo.search.study import SideRun, folder
    from dppo.search.winners import name_of, shown_winners

    first = seed + study.settings.replicates
    winners = [(name_of(study, trial), study.words(trial)) for trial in shown_winners(study)]
    return [
        SideRun(f"results/{folder(name)}/seed={fresh}", [*_on_test(words), f"seed={fresh}"])
        for name, words in ([*winners, *baselines] if winners else [])
        for fresh in range(first, first + study.settings.test_seeds)
    ]


def _without(words: Sequence[str], *keys: str) -> list[str]:
    """The words that set none of these keys or groups, nor anything below them."""
    from dppo import config

    return [
        word
        for word in words
        if not any(re.fullmatch(rf"{re.escape(key)}([./@].*)?", config.key_of(word)) for key in keys)
    ]


def _on_test(words: Sequence[str]) -> list[str]:
    """The words of a run that is scored on test prompts, with a seed that is still to be given."""
    return [*_without(words, "evaluation.split", "evaluation.interim", "seed"), "evaluation.split=test"]


def _parameter(override: Override) -> Parameter:
    """What an override of the official plugin's syntax searches."""
    from hydra.core.override_parser.types import (
        ChoiceSweep,
        IntervalSweep,
        RangeSweep,
        Transformer,
    )

    from dppo import config
    from dppo.errors import UserError
    from dppo.search.space import Parameter

    key = override.get_key_element()
    name = key.lstrip("+~")
    prefix = key[: len(key) - len(name)]
    if override.value() == _CALIBRATED:
        return Parameter(name, "float", low=1e-3, high=1.0, log=True, prefix=prefix, calibrated=True)
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
    config.refuse_nested(override)
    choices: list[Value] = list(override.sweep_iterator(transformer=Transformer.encode))  # type: ignore[arg-type]
    texts = tuple(override.sweep_string_iterator())
    return Parameter(name, "choice", choices=tuple(choices), texts=texts, prefix=prefix)
