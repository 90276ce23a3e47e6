"""``python -m dppo``: Hydra composes, the typed door checks, the pipeline runs, the objectives are returned."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dppo import config, startup
from dppo.command_line import EXIT_FAILED, complain, explain_composition
from dppo.errors import JobError, Pruned, UserError, first_line, lost_process
from dppo.processes import rank, world_size
from dppo.stopping import Resumable, Stopped, on_request, raise_again, status

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

    from dppo.tracking import Place

# A process whose error may be another one's as well waits so long, in seconds: the launcher ends it meanwhile if so.
_MOMENT = 5.0
# More jobs than this are not all composed before the first one; every swept value is still checked once.
_CHECKED_JOBS = 200
# More jobs than this nobody means: a range with a digit too many.
_MOST_JOBS = 10_000


# Under torchrun every process composes the same run; only the first one has a run directory and speaks.
_SILENT = (
    "hydra.run.dir=.",
    "hydra.sweep.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    f"hydra.job_logging.handlers.file.filename={os.devnull}",
    "hydra/hydra_logging=disabled",
)

# What the dry runs of this command would have made: the later jobs of a multirun find it in the cache.
_planned: set[str] = set()


def run_job(composed: DictConfig) -> float | tuple[float, ...]:
    """One job of Hydra's: the values of ``objectives``, one as a float, several as a tuple; NaN for a dry run."""
    # Within the job, because a launcher may run it in a process of its own. No decorator: launchers pickle the job.
    with on_request():
        return _run_job(composed)


def _run_job(composed: DictConfig) -> float | tuple[float, ...]:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    directory = Path(hydra.runtime.output_dir)
    experiment = config.load(composed, overrides)
    from dppo import allocator, pipeline, plan, threads
    from dppo.artifacts.files import disk_errors, write_atomic
    from dppo.loop import Interrupted
    from dppo.search.watch import CALIBRATION, TRIAL, watch

    resolved = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(resolved, dict)
    search = _is_search(hydra.sweeper) and hydra.mode == RunMode.MULTIRUN
    try:
        if experiment.dry_run:
            planned = plan.plan(experiment, also_built=_planned)
            _planned.update(planned.makes)
            if rank() == 0:
                _print(plan.lines(planned))
            return math.nan
        if search and CALIBRATION in os.environ:
            found = pipeline.penalty_strength(experiment)
            with disk_errors(directory):
                write_atomic(directory / "strength.json", json.dumps(found).encode() + b"\n")
            return found["mean"]
        reports = search and TRIAL in os.environ
        with threads.denormals_are_zero(), allocator.freed_memory_is_kept():
            values = pipeline.run(
                experiment,
                directory,
                resolved={str(key): value for key, value in resolved.items() if value != "???"},
                overrides=overrides,
                verdict=watch(_plain(hydra.sweeper), int(os.environ[TRIAL]), hydra.sweep.dir)
                if reports
                else lambda row: None,
                place=_place(hydra, overrides, directory, search=search),
            )
    except Pruned:
        if search:
            raise
        return math.nan  # ended by a limit of its own, which was said
    except Interrupted as stop:
        # Not an Exception: a multirun must stop as well.
        raise Stopped(str(stop), stop.signum) from None
    except UserError as error:
        if hydra.mode == RunMode.MULTIRUN and world_size() == 1:
            # The other jobs go on; which one failed is said at once, and again by the exit status.
            complain(f"job {hydra.job.num} ({' '.join(overrides)}): {error}")
            raise
        # Past Hydra, which would announce an exception in lines of its own. Several processes don't go on with the
        # next job: this one does not know whether the others have failed too.
        raise SystemExit(_complain_once(str(error))) from None
    except Exception as error:
        if lost_process(error) and world_size() > 1:
            time.sleep(_MOMENT)
            complain("another process of this run has ended, its own message says why; the same command continues")
            raise SystemExit(EXIT_FAILED) from None
        if not search or str(hydra.launcher._target_).endswith(".BasicLauncher"):
            raise
        sent = JobError(f"{type(error).__name__}: {error}")
        sent.add_note("".join(traceback.format_exception(error)))
        raise sent from None
    finally:
        startup.end()  # a run that finds everything in the cache loads no model
    return values[0] if len(values) == 1 else values


def _complain_once(message: str) -> int:
    """The one line of an error, from one process of those that have it."""
    if rank() > 0:
        time.sleep(_MOMENT)
    return complain(message)


def _place(hydra: Any, overrides: Sequence[str], directory: Path, *, search: bool) -> Place:
    """Where this job belongs: a search's own folders tell what it is, a multirun's name it."""
    from hydra.types import RunMode

    from dppo.tracking import Place

    presets = [word.partition("=")[2].strip("[]").split(",") for word in overrides if _is_preset(word)]
    named = tuple(name.strip() for group in presets for name in group)
    groups = {str(group): str(option) for group, option in hydra.runtime.choices.items()}
    choices = {group: option for group, option in groups.items() if not group.startswith("hydra")}
    if hydra.mode != RunMode.MULTIRUN:
        return Place(", ".join(named) or None, presets=named, choices=choices)
    sweep = Path(str(hydra.sweep.dir)).absolute()
    if not search:
        # Of the default, outputs/multirun/<date>/<time>, the time alone would name many.
        day = f"{sweep.parent.name}/" if re.fullmatch(r"\d{4}-\d\d-\d\d", sweep.parent.name) else ""
        varied = tuple(word for word in overrides if word not in sys.argv)
        return Place(f"{day}{sweep.name}", presets=named, choices=choices, varied=varied)
    kind, *rest = directory.absolute().relative_to(sweep).parts
    study = str(hydra.sweeper.study_name)
    if kind in ("baselines", "results"):
        job_type: Any = kind.removesuffix("s")
        return Place(study, job_type, f"{job_type} {rest[0].replace(',', ' ')}", named, choices)
    return Place(study, "trial", f"trial {kind}", named, choices)


def _is_preset(word: str) -> bool:
    return config.key_of(word) == "experiment" and word.partition("=")[2] not in ("", "[]", "null")


def _print(lines: Sequence[str]) -> None:
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # The reader has seen enough. What is still buffered has none, and Hydra would announce an exception.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _plain(node: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(node, resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def main() -> int:
    """Run the command line of this process; returns the exit status."""
    startup.begin()
    try:
        with on_request():
            return _main()
    except Resumable as stop:
        print(f"interrupted: {stop} continues", file=sys.stderr)
        return status(stop)
    except KeyboardInterrupt as stop:
        said = str(stop)
        print(f"interrupted{': ' + said if said else ''}; the same command continues", file=sys.stderr)
        return status(stop)
    finally:
        startup.end()


def _main() -> int:
    if sys.argv[1:] in (["--help"], ["-h"]):
        return _help()
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationResolutionError

    # train.deterministic on CUDA: cuBLAS reads this before its first call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Memory for tensors on the CPU in pages of 2 MiB where Linux has them: a new tensor's pages cost a fault each.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Our own one-line messages replace Hydra's report of exceptions.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _prefer_own_sweeper()
    typed = sys.argv[1:]
    try:
        checking = _runs_something(typed)
        arguments = config.canonical(typed)
    except UserError as error:
        return _complain_once(str(error))
    overrides = [word for word in arguments if not word.startswith("-")]
    if not any(word.startswith("hydra.searchpath=") for word in overrides):
        # Beside the first override: argparse takes no flag between two of them.
        places = [at for at, word in enumerate(arguments) if "=" in word and not word.startswith("-")]
        arguments.insert(places[0] if places else len(arguments), f"hydra.searchpath=[file://{config.SWEEPS_DIR}]")
    sys.argv[1:] = [*arguments, *_SILENT] if rank() > 0 and checking else arguments
    nowhere = _nowhere(arguments) if checking else None
    if nowhere is not None:
        sys.argv[1:] = _placed(sys.argv[1:], nowhere.name)
    try:
        if checking == "multirun":
            sweeper = _sweeper(overrides)
            if space := _search_space(sweeper, overrides):
                overrides = [*space, *overrides]
                places = [at for at, word in enumerate(sys.argv) if at and not word.startswith("-")]
                sys.argv[places[0] : places[0]] = space
            _check(_jobs(sweeper, overrides))
        elif checking:
            config.load(config.compose_checked(overrides), overrides)
        import hydra

        from dppo.report import at_end

        try:
            hydra.main(version_base=None, config_path=str(config.CONF_DIR), config_name="config")(run_job)()
        except Exception:
            at_end.finish()  # of the jobs that did not fail
            raise
        at_end.finish()
    except UserError as error:
        return _complain_once(str(error))
    except InterpolationResolutionError as error:
        return _complain_once(str(error).splitlines()[0])
    except HydraException as error:
        raise_again()  # Hydra makes one of its own of whatever cuts a composition
        return _complain_once(explain_composition(error, overrides, config.known_keys(overrides)))
    except BrokenPipeError:  # the reader of --help or --cfg has seen enough
        sys.stderr.close()
        return 0
    except PermissionError as error:
        return complain(f"{error.filename}: not writable ({error.strerror}); choose another hydra.run.dir or cache.dir")
    except OSError as error:
        if error.filename is None:
            raise
        return complain(f"{error.filename}: {error.strerror}")
    except Exception as error:
        if _is_of_hydras_set_up(error):
            return complain(f"{' '.join(typed)}: Hydra refuses the hydra.* settings ({first_line(error)})")
        logging.getLogger("dppo").exception("this is a bug in dppo; please report it with the lines below")
        return EXIT_FAILED
    finally:
        _planned.clear()
        if nowhere is not None:
            nowhere.cleanup()
    return 0


def _is_of_hydras_set_up(error: BaseException) -> bool:
    """Whether Hydra raised this by itself, from its own settings, before it came to a job or to our sweeper."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][1:]
    return not any(name == __name__ or name.startswith(("dppo.", "hydra_plugins.dppo")) for name in names)


def _help() -> int:
    """The help that Hydra prints for ``--help`` alone, without composing a configuration, which takes a second."""
    import string

    import yaml

    options: dict[str, list[str]] = {}
    for path in config.CONF_DIR.glob("*/**/*.yaml"):
        if path.relative_to(config.CONF_DIR).parts[0] == "hydra":
            continue  # the template names them, as Hydra leaves them out
        options.setdefault(path.parent.relative_to(config.CONF_DIR).as_posix(), []).append(path.stem)
    groups = "".join(f"{group}: {', '.join(sorted(options[group]))}\n" for group in sorted(options))
    template = yaml.safe_load((config.CONF_DIR / "config.yaml").read_text("utf-8"))["hydra"]["help"]["template"]
    try:
        print(string.Template(template).substitute(APP_CONFIG_GROUPS=groups), flush=True)
    except BrokenPipeError:  # the reader has seen enough
        sys.stderr.close()
    return 0


def _runs_something(words: Sequence[str]) -> str | None:
    """``run``, ``multirun``, or None for the flags that only print. Raises UserError for wrong flags."""
    from hydra._internal.utils import get_args_parser

    parser: Any = get_args_parser()
    parser.error = _wrong_flag
    flags = parser.parse_args([word for word in words if word != "--version"])
    if (flags.resolve or flags.package) and not (flags.cfg or flags.help):
        raise UserError(f"{'--resolve' if flags.resolve else '--package'}: goes with --cfg; add --cfg job, or drop it")
    if flags.experimental_rerun is not None:
        raise UserError("--experimental-rerun: reads a pickle, which may hold any code; a run's command.txt repeats it")
    if "--version" in words or any((flags.help, flags.hydra_help, flags.cfg, flags.info, flags.shell_completion)):
        return None
    return "multirun" if flags.multirun else "run"


def _wrong_flag(message: str) -> None:
    raise UserError(f"{message}; see --help and --hydra-help")


def _nowhere(arguments: Sequence[str]) -> tempfile.TemporaryDirectory[str] | None:
    """A directory for what Hydra writes during a dry run, to be removed after it; None for any other command."""
    if any(word.lstrip("+").lower() == "dry_run=true" for word in arguments):
        return tempfile.TemporaryDirectory(prefix="dppo-")
    return None


def _placed(arguments: Sequence[str], folder: str) -> list[str]:
    """The same words with Hydra's directories in ``folder``, behind the last override: the last one counts."""
    last = max(at for at, word in enumerate(arguments) if "=" in word and not word.startswith("-"))
    places = [f"{key}='{folder}'" for key in ("hydra.run.dir", "hydra.sweep.dir")]
    return [*arguments[: last + 1], *places, *arguments[last + 1 :]]


def _check(jobs: Sequence[Sequence[str]]) -> None:
    """Compose and check every job before the first one starts, so that nothing is half-written."""
    for number, job in enumerate(jobs):
        try:
            config.load(config.compose(job), job)
        except UserError as error:
            raise UserError(f"job {number} ({' '.join(job)}): {error}") from None


def _prefer_own_sweeper() -> None:
    """Let ``hydra/sweeper=optuna`` mean conf/hydra/sweeper, also where Hydra's official Optuna plugin is installed."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # imports the plugins, which store their configurations
    sweepers = ConfigStore.instance().repo["hydra"]["sweeper"]
    sweepers.pop("optuna.yaml", None)
    sweepers.pop("sampler", None)


def _is_search(sweeper: Any) -> bool:
    return str(sweeper.get("_target_", "")) == "hydra_plugins.dppo_sweeper.OptunaSweeper"


def _sweeper(overrides: Sequence[str]) -> Any:
    """The composed ``hydra.sweeper``. Raises UserError if Hydra's settings name a class that may not be built."""
    composed = config.compose(_fixed(config.parsed(overrides)), with_hydra=True)
    config.check_hydra(composed)
    return composed.hydra.sweeper


def _search_space(sweeper: Any, overrides: Sequence[str]) -> list[str]:
    """A preset's search space as words of the command line, without the keys that the user typed.

    Hydra's basic sweeper would take a key that is both typed and in the preset twice, and run every job many times.
    A search with Optuna keeps the two apart itself, and gets its fixed directory here: the same command finds it again.
    """
    if _is_search(sweeper):
        placed = any(config.key_of(word) == "hydra.sweep.dir" for word in overrides)
        return [] if placed else ["hydra.sweep.dir=outputs/sweeps/${hydra.sweeper.study_name}"]
    if not str(sweeper.get("_target_", "")).endswith("BasicSweeper") or not sweeper.params:
        return []
    typed = set(map(config.key_of, overrides))
    preset = [f"{key}={value}" for key, value in sweeper.params.items() if key not in typed]
    return [*preset, "hydra.sweeper.params=null"]


def _fixed(parsed: Sequence[Override]) -> list[str]:
    """The words that are the same in every job."""
    return [str(one.input_line) for one in parsed if not one.is_sweep_override()]


def _jobs(sweeper: Any, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job that Hydra's basic sweeper would launch, in its order."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed = config.parsed(overrides)
    keys = [one.key_or_group for one in parsed if one.is_sweep_override()]
    if twice := next((key for place, key in enumerate(keys) if key in keys[:place]), None):
        raise UserError(f"{' '.join(overrides)}: {twice} is swept twice; keep one of the two")
    fixed = _fixed(parsed)
    if _is_search(sweeper):
        return []  # the sweeper checks its whole search space before its first trial
    if not str(sweeper.get("_target_", "")).endswith("BasicSweeper"):
        return [fixed]
    values = {place: _values(item) for place, item in enumerate(parsed) if item.is_discrete_sweep()}
    n_jobs = math.prod(map(len, values.values()))
    if n_jobs > _MOST_JOBS:
        raise UserError(f"{' '.join(overrides)}: makes {n_jobs:,} jobs; at most {_MOST_JOBS:,} are started at a time")
    if n_jobs <= _CHECKED_JOBS:
        batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        return [list(job) for batch in batches for job in batch]
    # Too many to compose one by one: each value of each swept key once, beside the first value of the others.
    swept = [[f"{parsed[place].key_or_group}={value}" for value in found] for place, found in values.items()]
    firsts = [values[0] for values in swept]
    return [
        [*fixed, *firsts[:place], value, *firsts[place + 1 :]]
        for place, value in itertools.chain.from_iterable(
            ((place, value) for value in values) for place, values in enumerate(swept)
        )
    ]


def _values(swept: Override) -> list[str]:
    """The values of a swept key, as words. Raises UserError for none, and for more than jobs are ever started."""
    from hydra.core.override_parser.types import Glob, RangeSweep

    word, value = swept.input_line, swept.value()
    config.refuse_nested(swept)
    if isinstance(value, Glob):
        raise UserError(f"{word}: name the options one by one, such as {swept.key_or_group}=a,b")
    if isinstance(value, RangeSweep):
        assert value.start is not None and value.stop is not None
        if not value.step:
            raise UserError(f"{word}: with a step of 0 there is no end")
        if not (value.stop - value.start) / value.step <= _MOST_JOBS:  # counted before a value is made
            raise UserError(f"{word}: has more than {_MOST_JOBS:,} values")
    found = list(swept.sweep_string_iterator())
    if not found:
        raise UserError(f"{word}: has no value")
    return found


if __name__ == "__main__":
    sys.exit(main())
