"""Which trials end early.

As with samplers, the trials that count and their indices decide, nothing else: a pruner of Optuna's is asked about a
copy of them in memory, so that a search that was killed and resumed prunes what an undisturbed one does.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from dppo.errors import UserError

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Pruner:
    """A pruner of Optuna's and its arguments; ``instances`` of one that looks at replicates and not at steps."""

    cls: type[optuna.pruners.BasePruner]
    arguments: Mapping[str, Any]
    instances: Literal["prompts", "seeds"] | None

    @property
    def name(self) -> str:
        return self.cls.__name__.removesuffix("Pruner").lower()

    @property
    def on_steps(self) -> bool:
        """Whether it looks at interim values during training."""
        return self.instances is None and self.name != "nop"

    def build(self) -> optuna.pruners.BasePruner:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental ones are chosen knowingly, in conf/
            return self.cls(**self.arguments)

    def judge(
        self, trials: Sequence[FrozenTrial], place: int, values: Mapping[int, Mapping[int, float]]
    ) -> tuple[bool, dict[str, Any]]:
        """Whether the trial at ``place`` is to end, and what the pruner wants to remember with it.

        ``values`` are what each trial is judged by, by its place; larger is better.
        """
        import optuna
        from optuna.trial import TrialState, create_trial

        study = optuna.create_study(
            direction="maximize",
            pruner=self.build(),
            study_name="judged",  # Hyperband draws brackets from the name and the place
            sampler=optuna.samplers.RandomSampler(),
        )
        for at, trial in enumerate(trials):
            done = trial.state == TrialState.COMPLETE and at != place
            own = dict(values.get(at, {}))
            study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE if done else TrialState.RUNNING if at == place else TrialState.PRUNED,
                    value=_mean(own) if done else None,
                    intermediate_values=own,
                    system_attrs={
                        key: value for key, value in trial.system_attrs.items() if key.startswith("completed")
                    },
                )
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ends = self.build().prune(study, study.get_trials(deepcopy=False)[place])
        return ends, dict(study.get_trials(deepcopy=False)[place].system_attrs)


def _mean(values: Mapping[int, float]) -> float:
    return sum(values.values()) / len(values) if values else -math.inf


def pruner_from(settings: Mapping[str, Any], replicates: int) -> Pruner:
    """Build what ``hydra.sweeper.pruner`` describes; raises UserError for what can't be built."""
    arguments = dict(settings)
    target = str(arguments.pop("_target_", None))
    instances = arguments.pop("instances", None)
    module, _, name = target.rpartition(".")
    cls = getattr(importlib.import_module("optuna.pruners"), name, None) if module == "optuna.pruners" else None
    if cls is None:
        raise UserError(f"hydra.sweeper.pruner._target_={target}: must be a class of optuna.pruners")
    if (name == "WilcoxonPruner") != (instances is not None):
        raise UserError(
            f"hydra.sweeper.pruner.instances={instances}: is for wilcoxon, which needs it: prompts or seeds"
        )
    if instances is not None:
        if instances not in ("prompts", "seeds"):
            raise UserError(f"hydra.sweeper.pruner.instances={instances}: must be prompts or seeds")
        least = 2 if instances == "prompts" else 4
        if replicates < least:
            raise UserError(
                f"hydra.sweeper.replicates={replicates}: pruner=wilcoxon on {instances} decides between the seeds of a "
                f"trial: set it to at least {least}, or choose hydra/sweeper/pruner=median"
            )
        if find_spec("scipy") is None:
            raise UserError(
                "hydra.sweeper.pruner=wilcoxon: needs scipy: type pip install 'dppo[samplers]', or choose "
                "hydra/sweeper/pruner=median"
            )
    pruner = Pruner(cls, arguments, instances)
    try:
        pruner.build()
    except (TypeError, ValueError) as error:
        raise UserError(f"hydra.sweeper.pruner={name}: {error}") from None
    return pruner
