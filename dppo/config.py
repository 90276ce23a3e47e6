"""The typed door: a composed Hydra configuration goes in, frozen and checked settings come out.

Past ``load`` no ``DictConfig`` exists. Values live in ``conf/`` only; the dataclasses here have no defaults.
A mapping with ``_target_`` builds that class (inside ``dppo.`` unless ``allowed_targets`` names another prefix),
every key is checked against the class's fields and types, and every class checks its own ranges.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import re
import types
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from dppo import dotted
from dppo.command_line import explain_composition
from dppo.errors import UserError, first_line

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

    from dppo.data import Dataset
    from dppo.generation import VLLM, Greedy
    from dppo.models import Model
    from dppo.rates import Rates
    from dppo.rewards import PairwiseReward, Reward
    from dppo.tracking import Tracking
    from dppo.types import Json, Objective

# The checkout keeps conf/ and sweeps/ at the top level; a wheel carries them inside the package.
_PACKAGE = Path(__file__).resolve().parent
_HOME = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent
CONF_DIR = _HOME / "conf"
SWEEPS_DIR = _HOME / "sweeps"

# Root values that losses and penalties read by interpolation; unset (`???`) means the option's own default.
SEARCHED = ("alpha", "beta", "zeta")
# Environment variables with something to hide, such as WANDB_API_KEY, HF_TOKEN and PGPASSWORD.
_SECRET_NAME = re.compile(r"(?i)api_?key|_key$|token$|secret|passw(or)?d|credential")
_TOO_LARGE = 2**63  # no counter, seed or array of the libraries below holds such a number
# Groups that a run reads only through `phases`, so that a preset with phases of its own can leave them unread.
_THROUGH_PHASES = ("loss", "penalty", "train")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu 2021) on the policy; the base stays frozen.

    ``rank`` r and ``lora_alpha`` scale the update by lora_alpha / r; ``base_4bit`` loads the frozen base in
    4-bit NF4 (needs a CUDA device and bitsandbytes).
    """

    rank: int
    lora_alpha: float
    dropout: float
    target_modules: tuple[str, ...] | Literal["all-linear"]
    base_4bit: bool

    def __post_init__(self) -> None:
        require(self.rank >= 1, "rank", self.rank, "must be at least 1")
        require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "must be > 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1)")


@dataclass(frozen=True)
class TrainSettings:
    """One training run of the loop, SFT or a preference phase. Lengths are in tokens, rates per optimiser step."""

    n_examples: int | None
    max_length: int | str | None
    batch_size: int
    steps: int | None
    epochs: int | None
    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_ratio: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    tokens_per_micro_batch: int
    packing: Literal["packed", "padded"]
    attention: Literal["auto", "sdpa", "flex"]
    precision: Literal["fp32", "bf16"]
    dropout: float
    activation_checkpointing: bool
    compile: bool
    deterministic: bool
    sharding: Literal["none", "fsdp"]
    log_every: int
    evaluate_every: int | None
    n_evaluation_examples: int
    penalty_gradient_ratio: bool
    save: Literal["last", "best"]
    checkpoint_every: int | None
    lora: LoraSettings | None

    def __post_init__(self) -> None:
        for key in ("batch_size", "tokens_per_micro_batch", "log_every", "n_evaluation_examples"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        for key in ("n_examples", "steps", "epochs", "evaluate_every", "checkpoint_every"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "must be at least 1, or null")
        require(
            (self.steps is None) != (self.epochs is None),
            "steps",
            self.steps,
            f"give either steps or epochs and set the other to null (epochs is {shown(self.epochs)})",
        )
        check_max_length(self.max_length)
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "must be > 0")
        require(0 <= self.warmup_ratio <= 1, "warmup_ratio", self.warmup_ratio, "must be in [0, 1]")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must be >= 0")
        for key in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, key) < 1, key, getattr(self, key), "must be in [0, 1)")
        require(self.adam_epsilon > 0, "adam_epsilon", self.adam_epsilon, "must be > 0")
        require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "must be > 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1)")
        flex = self.attention == "flex"
        require(not flex or self.packing == "packed", "attention", self.attention, "needs packing=packed")
        require(not flex or self.dropout == 0, "attention", self.attention, "has no dropout: needs dropout=0")
        require(
            self.save == "last" or self.evaluate_every is not None,
            "save",
            self.save,
            "needs evaluations to choose from: set evaluate_every to a number of steps, or save=last",
        )

    def identity(self) -> dict[str, Json]:
        """What decides the trained model; how a batch is cut, logged and checkpointed does not."""
        kept = dataclasses.asdict(self)
        for key in (
            "tokens_per_micro_batch",
            "attention",  # the kernel that it comes to is among the numerics
            "activation_checkpointing",
            "compile",  # among the numerics as well
            "sharding",
            "log_every",
            "checkpoint_every",
            "penalty_gradient_ratio",
        ):
            del kept[key]
        return kept

    def kernel(self, device: str) -> Literal["sdpa", "flex"]:
        """What computes attention on a type of device, if the model can take it. Raises UserError if that has no flex.

        FlexAttention has no backward pass elsewhere than on CUDA, and no dropout.
        """
        if self.attention == "flex" and device != "cuda":
            raise UserError(
                f"train.attention=flex: needs a CUDA device, this run is on {device}; choose train.attention=auto"
            )
        able = device == "cuda" and self.packing == "packed" and self.dropout == 0
        return "flex" if able and self.attention != "sdpa" else "sdpa"


@dataclass(frozen=True)
class SftSettings:
    """Supervised fine-tuning before any preference phase; ``seed`` is apart from the root seed on purpose.

    ``train`` null takes the model as it is.
    """

    seed: int
    train: TrainSettings | None


@dataclass(frozen=True)
class Phase:
    """One preference phase: what is minimised, how, and which model is the reference.

    ``reference: sft`` keeps the SFT model; ``previous`` takes the policy that the phase starts from, and makes its
    greedy answers and log-probs anew.
    """

    loss: Objective
    train: TrainSettings
    reference: Literal["sft", "previous"]


@dataclass(frozen=True)
class InterimSettings:
    """Measurements during the last phase, at ``n_points`` equal shares of its steps; they change no result.

    ``metric`` is what a search's pruner sees: the win rate on ``n_prompts`` fixed validation prompts, or the accuracy
    on held-out pairs. ``kl`` measures KL to the reference model on those answers as well, so that a report can draw
    reward against KL along training; the curve is then part of what is trained. ``max_kl`` ends a run whose KL to the
    reference model, nats per token of its own answers to those prompts, is above it.
    """

    n_points: int
    n_prompts: int
    metric: Literal["win_rate", "accuracy"]
    kl: bool
    max_kl: float | None

    def __post_init__(self) -> None:
        require(0 <= self.n_points <= 99, "n_points", self.n_points, "must be a number from 0 to 99")
        require(self.n_prompts >= 1, "n_prompts", self.n_prompts, "must be at least 1")
        require(not self.kl or self.n_points > 0, "kl", self.kl, "is measured during training: set n_points as well")
        if self.max_kl is not None:
            require(self.max_kl > 0, "max_kl", self.max_kl, "must be > 0 nats a token, or null")
            require(self.n_points > 0, "max_kl", self.max_kl, "is looked at during training: set n_points as well")

    @property
    def measures_kl(self) -> bool:
        return self.kl or self.max_kl is not None


@dataclass(frozen=True)
class SamplingSettings:
    """How the answers that are compared are sampled, one a prompt, in the meaning of ``generation.Sampled``."""

    temperature: float
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", self.temperature, "must be > 0; greedy answers: sampling=null")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be > 0 and <= 1 (1: all tokens)")
        require(self.seed >= 0, "seed", self.seed, "must be >= 0")

    @property
    def unchanged(self) -> bool:
        """Whether answers are drawn from the model's own distribution: only then does a log-ratio estimate KL."""
        return self.temperature == 1 and self.top_p == 1

    def __str__(self) -> str:
        return f"sampled (temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed})"


@dataclass(frozen=True)
class EvaluationSettings:
    """How the final policy is compared with the SFT model on ``split``'s prompts.

    ``sampling`` null decodes the answers of both models greedily, those of interim measurements too.
    """

    split: Literal["validation", "test"]
    n_prompts: int | None
    n_pairs: int | None
    n_kl_prompts: int | None
    n_bootstrap: int
    bootstrap_seed: int
    sampling: SamplingSettings | None
    interim: InterimSettings

    def __post_init__(self) -> None:
        for key in ("n_prompts", "n_pairs", "n_kl_prompts"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "must be at least 1, or null for all")
        require(self.n_bootstrap >= 100, "n_bootstrap", self.n_bootstrap, "must be at least 100")

    @property
    def decoding(self) -> str:
        """How answers are decoded, in words."""
        return "greedy" if self.sampling is None else str(self.sampling)


@dataclass(frozen=True)
class CacheSettings:
    """Where finished stages are kept and shared by all runs; ``verify``: every byte is read before."""

    dir: str
    verify: bool


@dataclass(frozen=True)
class Experiment:
    """Everything one run needs, checked."""

    model: Model
    dataset: Dataset
    sft: SftSettings
    generation: Greedy | VLLM
    phases: Mapping[str, Phase]
    reward: Reward | PairwiseReward
    evaluation: EvaluationSettings
    tracking: Tracking
    rates: Rates  # looked at by dry runs alone
    seed: int
    device: str
    cache: CacheSettings
    objectives: tuple[str, ...]
    init_from: str | None
    report: bool  # read by the command line, at the end of a multirun
    dry_run: bool  # read by the command line; a plan, not the pipeline, answers it
    notices: tuple[str, ...]  # what the chosen settings warn of

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps|xpu(:\d+)?", self.device) is not None,
            "device",
            self.device,
            "must be auto, cpu, cuda, cuda:N, mps or xpu",
        )
        from dppo.rates import Measured

        if not self.dry_run and not isinstance(self.rates, Measured):
            raise UserError(
                "rates: only a dry run reckons with a machine that is elsewhere: add dry_run=true, or drop rates=..."
            )
        require(len(self.objectives) > 0, "objectives", "[]", "name at least one path into result.json")
        if not self.phases:
            require(self.sft.train is not None, "sft.train", None, "without a preference phase nothing is trained")
        for name in self.phases:
            plain = re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,59}", name) is not None
            require(plain, "phases", name, "a phase is named by a word of at most 60 letters, digits and . _ -")
        first = next(iter(self.phases.values()), None)
        rounds = getattr(self.dataset, "rounds", 1)  # of dataset=on_policy: later ones start from another policy
        require(
            first is None or first.reference == "sft" or self.init_from is not None or rounds > 1,
            "reference",
            "previous",
            "the first phase starts from the SFT model: write reference: sft",
        )


class Unused(UserError):
    """A word of the command line that nothing in the run reads."""

    def __init__(self, message: str, word: str) -> None:
        super().__init__(message)
        self.word = word

    def __reduce__(self) -> tuple[type[Unused], tuple[str, str]]:
        return type(self), (str(self), self.word)  # launchers send it from one process to another


def shown(value: object) -> str:
    """A value as a user would type it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(shown(item) for item in value) + "]"
    if isinstance(value, int) and abs(value) >= _TOO_LARGE:
        return f"{'-' if value < 0 else ''}{hex(abs(value))[:18]}..."  # of thousands of digits Python makes no text
    return str(value)


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Raise a one-line ``UserError`` that names key, value and rule unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{key}={shown(value)}: {rule}")


def check_max_length(value: int | str | None) -> None:
    """Accept a positive number of tokens, a percentile such as p95, or null."""
    if isinstance(value, str):
        percentile = re.fullmatch(r"p(\d{1,3})", value)
        require(
            percentile is not None and 1 <= int(percentile[1]) <= 100,
            "max_length",
            value,
            "must be a number of tokens, a percentile of the training split such as p95, or null",
        )
    elif value is not None:
        require(value >= 2, "max_length", value, "must be at least 2 tokens, a percentile such as p95, or null")


def key_of(word: str) -> str:
    """The key or group of an override, without the prefix that adds or removes it."""
    return word.lstrip("+~").partition("=")[0]


def canonical(overrides: Sequence[str]) -> list[str]:
    """Both spellings of the penalty group, ``penalty=`` and ``penalty_fn=``, as ``penalty=``.

    Raises ``UserError`` if both are given and differ.
    """
    given: dict[str, str] = {}
    renamed = []
    for override in overrides:
        match = re.match(r"(\+{0,2})(penalty|penalty_fn)=(.*)$", override, re.DOTALL)
        if match is None:
            renamed.append(override)
            continue
        if given and match[3] not in given:
            raise UserError(
                f"{match[2]}={match[3]}: penalty={next(iter(given))} is given too; "
                "both spellings mean the same group: give one"
            )
        if match[3] not in given:
            renamed.append(f"{match[1]}penalty={match[3]}")
        given[match[3]] = match[2]
    return renamed


def compose(overrides: Sequence[str] = (), *, with_hydra: bool = False) -> DictConfig:
    """The configuration that these command-line overrides compose, not yet checked.

    Raises Hydra's own exceptions for what does not compose, and UserError where Hydra fails without one of them.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    search_path = f"hydra.searchpath=[file://{SWEEPS_DIR}]"
    words = [search_path, *canonical(overrides)]
    try:
        with initialize_config_dir(version_base=None, config_dir=str(CONF_DIR), job_name="dppo"):
            return hydra_compose("config", overrides=words, return_hydra_config=with_hydra)
    except (HydraException, UserError):
        raise
    except OmegaConfBaseException as error:
        raise _unresolved(error) from None
    except (ValueError, TypeError, AttributeError, LookupError, AssertionError, RecursionError, YAMLError) as error:
        # Composing reads nothing but these words and configuration files: one of them is wrong.
        raise UserError(f"{' '.join(overrides)}: cannot be composed ({first_line(error)})") from None


def parsed(overrides: Sequence[str]) -> list[Override]:
    """The words as Hydra reads them. Raises Hydra's own exceptions, and UserError for numbers beyond reading."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except ValueError as error:
        raise UserError(f"{' '.join(overrides)}: cannot be read ({first_line(error)})") from None


def refuse_nested(swept: Override) -> None:
    """Raise UserError for a choice among choices or ranges, which no sweeper can list."""
    from hydra.core.override_parser.types import Sweep

    if any(isinstance(one, Sweep) for one in getattr(swept.value(), "list", None) or ()):
        raise UserError(f"{swept.input_line}: a choice holds values, no further choice, range, interval or sort")


def compose_checked(overrides: Sequence[str]) -> DictConfig:
    """The same, after a look at Hydra's own settings, which are then left out."""
    from omegaconf import open_dict

    composed = compose(overrides, with_hydra=True)
    check_hydra(composed)
    with open_dict(composed):
        del composed["hydra"]
    return composed


def check_hydra(composed: DictConfig) -> None:
    """Raise UserError if Hydra's settings name a class or function that is not Hydra's, dppo's or allowed.

    Hydra builds callbacks, launchers, sweepers and, through ``logging.config``, handlers and formatters: whatever they
    name would be called before the typed door sees a value.
    """
    from omegaconf import OmegaConf

    plain = cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=False))
    given = plain.get("allowed_targets")
    named = [one for one in given if isinstance(one, str) and one] if isinstance(given, list) else []
    allowed = tuple(f"{prefix.rstrip('.')}." for prefix in ("hydra", "hydra_plugins", "dppo", *named))
    for path, target in _called(plain.get("hydra"), "hydra"):
        logs = path.startswith(("hydra.job_logging.", "hydra.hydra_logging."))
        ours = (*allowed, "optuna.") if path.startswith("hydra.sweeper.") else allowed  # samplers and pruners
        harmless = (*allowed, "logging.", "colorlog.") if logs else ours
        if not isinstance(target, str) or not target.startswith(harmless) or target.startswith("logging.config."):
            raise UserError(
                f"{path}={shown(target)}: only {', '.join(harmless)} are called; "
                "to use your own, add its module prefix to allowed_targets"
            )
        if "pickle" in target.lower():
            raise UserError(f"{path}={target}: nothing is pickled; config.yaml and command.txt hold a run's settings")


def _called(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What a part of Hydra's settings has called, each behind its key."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            where = f"{path}.{key}"
            if key in ("_target_", "()") or (key in ("class", "stream") and "_logging." in where):
                if not (key == "stream" and str(value).startswith("ext://sys.std")):
                    yield where, value
            elif isinstance(value, str) and value.startswith(("ext://", "cfg://")):
                yield where, value
            else:
                yield from _called(value, where)
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from _called(value, f"{path}[{place}]")


def _unresolved(error: Exception) -> UserError:
    """What OmegaConf has against a value, in one line."""
    return UserError(f"{getattr(error, 'full_key', None) or 'configuration'}: {first_line(error)}")


def from_words(words: Sequence[str]) -> Experiment:
    """The experiment that these words of a command line make; for commands that look at it without running it.

    Raises UserError with one line for what does not compose, as for what ``load`` refuses.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationResolutionError

    words = canonical(words)
    try:
        return load(compose(words), words)
    except InterpolationResolutionError as error:
        raise UserError(str(error).splitlines()[0]) from None
    except HydraException as error:
        raise UserError(explain_composition(error, words, known_keys(words))) from None


def known_keys(words: Sequence[str]) -> list[str]:
    """The keys that there are with the options that the words choose, or by default if those don't compose."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    try:
        composed = compose([word for word in words if "." not in key_of(word).partition("@")[0]])
    except (HydraException, UserError):
        composed = compose()
    base = cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=False))
    return dotted.names({str(key): value for key, value in base.items()})


def load(composed: DictConfig, overrides: Sequence[str] = ()) -> Experiment:
    """Check a composed configuration and build the experiment.

    ``overrides`` are what the user typed; they tell a knob that was set from one that merely has a default.
    Raises ``UserError`` with one line that names key, value and what is allowed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    raw = cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=False))
    raw.pop("hydra", None)
    if raw.get("phases") and not isinstance(raw["phases"], Mapping):
        raise UserError(f"phases={shown(raw['phases'])}: must be a mapping (got {_kind(raw['phases'])})")
    _refuse_unread(raw, overrides)
    try:
        values = cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=True))
    except (OmegaConfBaseException, RecursionError, ValueError) as error:
        raise _unresolved(error) from None
    values.pop("hydra", None)
    _refuse_secrets(values, overrides)
    for key in SEARCHED:
        value = values.pop(key, None)
        if value is not None and value != "???" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{key}={shown(value)}: must be a number (got {_kind(value)})")
    allowed = ("dppo.", *_strings(values.pop("allowed_targets", []), "allowed_targets"))
    phases = values.pop("phases", None)
    loss, train = values.pop("loss", None), values.pop("train", None)
    values.pop("penalty", None)
    door = _Door(allowed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if phases:
            built = door.build(Mapping[str, Phase], phases, "phases")
        elif loss:
            main = {"loss": loss, "train": train, "reference": "sft"}
            built = {"main": door.dataclass(Phase, main, "", roots={"loss", "train", "reference"})}
        else:
            built = {}
    notices = tuple(str(warning.message) for warning in caught if warning.category is UserWarning)
    return cast("Experiment", door.dataclass(Experiment, values, "", given={"phases": built, "notices": notices}))


def typed(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """Build settings that are not part of an experiment from plain values, checked as everything is."""
    return _Door(()).dataclass(cls, values, path)


def recorded(settings: Mapping[str, Any], part: str) -> Any:
    """One part of an experiment, such as ``generation``, from the plain values of a run's config.yaml.

    Raises UserError as ``load`` does, and where the run has no such part.
    """
    if part not in settings:
        raise UserError(f"{part}: is not in this run's config.yaml; run it again with this version")
    allowed = ("dppo.", *_strings(settings.get("allowed_targets", []), "allowed_targets"))
    hints = typing.get_type_hints(Experiment, localns=_forward_names(Experiment))
    return _Door(allowed).build(hints[part], settings[part], part)


def _strings(value: object, path: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{path}={shown(value)}: must be a list of words")
    return tuple(value)


def _kind(value: object) -> str:
    names = {bool: "a boolean", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return names.get(type(value), "a list" if isinstance(value, (list, tuple)) else "a mapping")


def _suggest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


# --- what a run does not read ------------------------------------------------------------------------------------


def _refuse_unread(raw: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse a knob that was set although no composed part reads it."""
    read = set(_read_roots(raw))
    loss = _loss_words(raw)
    for key in SEARCHED:
        if raw.get(key, "???") != "???" and key not in read:
            hint = {
                "zeta": "it shapes penalty=expectile only: type penalty=expectile with a penalised loss, or drop zeta",
                "alpha": "it weighs the penalty of minll, unll, conll, npo and simnpo: choose one of them, "
                "or drop alpha",
                "beta": "drop it",
            }[key]
            typed = [word for word in overrides if re.match(rf"\+{{0,2}}{key}=", word)]
            raise Unused(
                f"{key}={shown(raw[key])}: nothing in this run uses {key} ({loss}); {hint}", typed[-1] if typed else ""
            )
    if raw.get("init_from") is not None:
        for override in overrides:
            if re.match(r"\+{0,2}sft[.=]", override):
                raise UserError(f"{override}: with init_from no SFT model is trained; drop it")
    for override in overrides:
        name, _, value = override.lstrip("+~").partition("=")
        group = re.split(r"[./@]", name)[0]
        if group in _THROUGH_PHASES and group not in read and group in raw:
            elsewhere = ", or put it into the phase that should use it" if value else ""
            raise Unused(f"{override}: nothing in this run uses {group} ({loss}); drop it{elsewhere}", override)


def _refuse_secrets(values: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Refuse a configuration that holds a secret of the environment: both are written to the run's files."""
    secrets = {name: value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 8}
    texts = [*overrides, *_texts(values)] if secrets else []
    for name, secret in secrets.items():
        if any(secret in text for text in texts):  # which is not shown
            raise UserError(
                f"a value of the configuration holds the secret in the environment variable {name}, and would be "
                "written to the run's files; drop it (keys are read from the environment where they are needed)"
            )


def _texts(node: object) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield str(key)
            yield from _texts(value)
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value)
    elif isinstance(node, str):
        yield node


def _loss_words(raw: Mapping[str, Any]) -> str:
    phases = raw.get("phases") or {"": {"loss": raw.get("loss")}}
    words = []
    for name, phase in phases.items():
        loss = phase.get("loss") if isinstance(phase, Mapping) else None
        target = str(loss.get("_target_", "none")).rpartition(".")[2] if isinstance(loss, Mapping) else "none"
        words.append(f"{name}: {target}" if name else f"the loss is {target}")
    return ", ".join(words)


def _read_roots(raw: Mapping[str, Any]) -> Iterator[str]:
    """Names of root entries that the run reads, directly or through interpolations."""
    pending: list[Any] = [value for key, value in raw.items() if key not in (*_THROUGH_PHASES, *SEARCHED)]
    if not raw.get("phases"):
        yield from ("loss", "train")
        pending += [raw.get("loss"), raw.get("train")]
    seen: set[str] = set()
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
        elif isinstance(value, str):
            for name in re.findall(r"\$\{(?:oc\.select:)?\s*([A-Za-z_]\w*)", value):
                if name not in seen:
                    seen.add(name)
                    yield name
                    if name in _THROUGH_PHASES:
                        pending.append(raw.get(name))


# --- from plain values to typed objects ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Door:
    """Builds typed objects from plain values; ``allowed`` are the module prefixes that ``_target_`` may name."""

    allowed: tuple[str, ...]

    def build(self, annotation: Any, value: Any, path: str) -> Any:
        origin = typing.get_origin(annotation)
        if annotation is Any:
            return value
        if origin is Literal:
            if value not in typing.get_args(annotation) or isinstance(value, bool):
                options = ", ".join(shown(option) for option in typing.get_args(annotation))
                near = _suggest(str(value), [str(option) for option in typing.get_args(annotation)])
                raise UserError(f"{path}={shown(value)}: must be one of {options}.{near}")
            return value
        if origin in (typing.Union, types.UnionType):
            return self._union(typing.get_args(annotation), value, path)
        if origin is tuple:
            return self._tuple(annotation, value, path)
        if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
            if not isinstance(value, Mapping):
                raise UserError(f"{path}={shown(value)}: must be a mapping (got {_kind(value)})")
            _, item = typing.get_args(annotation)
            return {str(key): self.build(item, entry, f"{path}.{key}") for key, entry in value.items()}
        if annotation in (int, float, bool, str):
            return _scalar(annotation, value, path)
        return self._object(annotation, value, path)

    def _union(self, options: tuple[Any, ...], value: Any, path: str) -> Any:
        if value is None:
            if type(None) in options:
                return None
            raise UserError(f"{path}=null: must be given")
        candidates = [option for option in options if option is not type(None)]
        if len(candidates) == 1:
            return self.build(candidates[0], value, path)
        errors = []
        for option in candidates:
            try:
                return self.build(option, value, path)
            except UserError as error:
                errors.append(str(error))
        errors = list(dict.fromkeys(errors))
        raise UserError("; or ".join([errors[0], *(error.partition(": ")[2] for error in errors[1:])]))

    def _tuple(self, annotation: Any, value: Any, path: str) -> Any:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{path}={shown(value)}: must be a list (got {_kind(value)})")
        items = typing.get_args(annotation)
        if len(items) == 2 and items[1] is Ellipsis:
            return tuple(self.build(items[0], item, f"{path}[{place}]") for place, item in enumerate(value))
        if len(items) != len(value):
            raise UserError(f"{path}={shown(value)}: must have {len(items)} entries")
        return tuple(
            self.build(kind, item, f"{path}[{place}]")
            for place, (kind, item) in enumerate(zip(items, value, strict=True))
        )

    def _object(self, annotation: type, value: Any, path: str) -> Any:
        if not isinstance(value, Mapping):
            raise UserError(f"{path}={shown(value)}: must be a mapping (got {_kind(value)})")
        fields = {str(key): entry for key, entry in value.items()}
        target = fields.pop("_target_", None)
        if target is None:
            if not dataclasses.is_dataclass(annotation) or inspect.isabstract(annotation):
                group = "penalty" if path == "loss.penalty" else path.replace(".", "/")
                raise UserError(f"{path}: has no _target_; choose an option of the group, those in conf/{group}/")
            return self.dataclass(annotation, fields, path)
        cls = self._locate(target, f"{path}._target_")
        built = self.dataclass(cls, fields, path)
        if not isinstance(built, annotation):
            raise UserError(f"{path}._target_={target}: is not usable as {annotation.__name__}")
        return built

    def _locate(self, target: object, path: str) -> type:
        prefixes = tuple(f"{prefix.rstrip('.')}." for prefix in self.allowed)
        if not isinstance(target, str) or not target.startswith(prefixes):
            raise UserError(
                f"{path}={shown(target)}: only classes below {', '.join(prefixes)} are built; "
                "to use your own, add its module prefix to allowed_targets"
            )
        module, _, name = target.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            raise UserError(f"{path}={target}: there is no such class") from None
        if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
            raise UserError(f"{path}={target}: is not a dataclass")
        return found

    def dataclass(
        self,
        cls: type,
        values: Mapping[str, Any],
        path: str,
        *,
        given: Mapping[str, Any] | None = None,
        roots: frozenset[str] | set[str] = frozenset(),
    ) -> Any:
        """Build ``cls``; ``given`` fields are built already, ``roots`` are fields that the user sees at top level."""
        hints = typing.get_type_hints(cls, localns=_forward_names(cls))
        names = [field.name for field in dataclasses.fields(cls) if field.init]
        prefix = f"{path}." if path else ""
        for key in values:
            if key not in names or key in (given or {}):
                known = names if path else _roots(names)
                raise UserError(
                    f"{prefix}{key}={shown(values[key])}: unknown key.{_suggest(key, known)} "
                    f"Known {f'in {path}' if path else 'at the top'}: {', '.join(sorted(known)) or 'none'}"
                )
        arguments: dict[str, Any] = dict(given or {})
        for name in names:
            if name in arguments:
                continue
            where = name if name in roots else f"{prefix}{name}"
            if name not in values or values[name] == "???":
                raise UserError(f"{where}: missing, give it a value ({where}=...)")
            arguments[name] = self.build(hints[name], values[name], where)
        try:
            return cls(**arguments)
        except UserError as error:
            raise UserError(f"{prefix}{error}") from None


def _roots(fields: Sequence[str]) -> list[str]:
    """What a user may set at the top: the experiment's fields and what they are made from."""
    return [name for name in fields if name != "notices"] + [*SEARCHED, *_THROUGH_PHASES, "allowed_targets"]


def _scalar(kind: type, value: Any, path: str) -> Any:
    if type(value) is int and abs(value) >= _TOO_LARGE:
        raise UserError(f"{path}={shown(value)}: must be a number of less than 64 bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
        raise UserError(f"{path}={shown(value)}: must be {wanted} (got {_kind(value)})")
    if kind is float and value != value:
        raise UserError(f"{path}=nan: must be a number")
    if kind is str and "\0" in str(value):
        raise UserError(f"{path}={value}: must not hold a NUL character")
    return value


def _forward_names(cls: type) -> dict[str, Any]:
    """The types that this module only names while type-checking, imported when a class here really needs them."""
    if cls not in (Experiment, Phase):
        return {}
    from dppo.data import Dataset
    from dppo.generation import VLLM, Greedy
    from dppo.models import Model
    from dppo.rates import Rates
    from dppo.rewards import PairwiseReward, Reward
    from dppo.tracking import Tracking
    from dppo.types import Objective

    return {
        "Dataset": Dataset,
        "Greedy": Greedy,
        "Model": Model,
        "Objective": Objective,
        "PairwiseReward": PairwiseReward,
        "Rates": Rates,
        "Reward": Reward,
        "Tracking": Tracking,
        "VLLM": VLLM,
    }
