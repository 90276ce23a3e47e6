"""Every option of the groups loss, loss/base and penalty composes and builds; defaults and mounting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from dppo.config import CONF_DIR, _Door
from dppo.errors import UserError
from dppo.losses.pairwise import PairwiseLoss
from dppo.losses.penalties import Penalty
from dppo.types import Objective

pytestmark = pytest.mark.filterwarnings("ignore:loss=|penalty=:UserWarning")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


LOSSES = [name for name in options("loss") if name != "none"]
BASES = options("loss/base")
PENALTIES = options("penalty")


@pytest.fixture(scope="module", autouse=True)
def conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project's loss and penalty groups under a root of this test's own, with room for experiments."""
    folder = tmp_path_factory.mktemp("conf")
    for group in ("loss", "penalty"):
        (folder / group).symlink_to(CONF_DIR / group)
    (folder / "config.yaml").write_text(
        "defaults:\n- penalty: quadratic\n- loss: dpo\n- experiment: []\n- _self_\nalpha: ???\nbeta: ???\nzeta: ???\n",
        encoding="utf-8",
    )
    (folder / "experiment").mkdir()
    with initialize_config_dir(str(folder), version_base=None):
        yield folder


@cache
def composed(*overrides: str) -> dict[str, Any]:
    values = OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True, throw_on_missing=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def built(loss: Mapping[str, Any], path: str = "loss") -> Any:
    return _Door(("dppo.",)).build(Objective, loss, path)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_composes_builds_and_is_called_like_its_option(name: str) -> None:
    assert built(composed(f"loss={name}")["loss"]).name == name


@pytest.mark.parametrize("name", BASES)
def test_every_base_is_a_loss_of_its_own_with_the_same_values(name: str) -> None:
    base = built(composed("loss=unll", f"loss/base={name}")["loss"]).base
    assert isinstance(base, PairwiseLoss)
    assert base == built(composed(f"loss={name}")["loss"])


@pytest.mark.parametrize("name", PENALTIES)
def test_every_penalty_composes_with_the_root_override(name: str) -> None:
    penalty = built(composed("loss=unll", f"penalty={name}")["loss"]).penalty
    assert isinstance(penalty, Penalty)
    assert penalty.name == name


PENALISED = ["minll", "unll", "conll", "npo", "simnpo"]
WITHOUT_LOG_RATIO = ["ipo", "slic", "cpo", "orpo"]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PENALISED)
def test_penalised_losses_take_every_base_except_conll(name: str, base: str) -> None:
    values = composed(f"loss={name}")["loss"] | {"base": composed(f"loss={base}")["loss"]}
    if name == "conll" and base in WITHOUT_LOG_RATIO:
        with pytest.raises(UserError, match=rf"^loss\.base={base}: loss=conll .* choose loss/base=dpo"):
            built(values)
        return
    loss = built(values)
    alone = built(composed(f"loss={base}")["loss"])
    assert loss.base == alone
    assert loss.uses_reference == (alone.uses_reference or name in ("conll", "npo"))
    assert loss.uses_statistics == alone.uses_statistics
    assert built(values | {"margin": "implicit"}).uses_reference


def test_conll_refuses_dpo_positive_outside_the_sigmoid() -> None:
    with pytest.raises(UserError, match=r"^loss\.base=dpo_positive: .* placement=inside"):
        built(composed("loss=conll", "loss/base=dpo_positive", "loss.base.placement=outside")["loss"])


@pytest.mark.parametrize("base", ["unll", "sft"])
def test_only_pairwise_losses_are_bases(base: str) -> None:
    with pytest.raises(ConfigCompositionException):
        composed("loss=unll", f"loss/base={base}")
    values = composed("loss=unll")["loss"]
    with pytest.raises(UserError, match=r"^loss\.base\._target_=.* is not usable as PairwiseLoss"):
        built(values | {"base": composed(f"loss={base}")["loss"]})


def test_published_switches_are_the_defaults() -> None:
    minll, unll = (built(composed(f"loss={name}")["loss"]) for name in ("minll", "unll"))
    for loss in (minll, unll):
        assert (loss.margin, loss.detach, loss.mask_shared_prefix) == ("sum", True, False)
        assert (loss.penalty.name, loss.base.name) == ("quadratic", "dpo")
    assert (minll.reduction, minll.floor) == ("mean", -5.0)
    assert unll.level == "token_mean"
    expectile = built(composed("loss=unll", "penalty=expectile")["loss"]).penalty
    assert (expectile.zeta, expectile.form) == (0.5, "absolute")


def test_root_values_reach_the_parts_that_use_them() -> None:
    loss = built(composed("loss=conll", "penalty=expectile", "alpha=0.3", "beta=0.7", "zeta=0.2")["loss"])
    assert (loss.alpha, loss.base.beta, loss.penalty.zeta) == (0.3, 0.7, 0.2)


def test_an_experiment_mounts_a_loss_as_a_phase_with_its_base(conf: Path) -> None:
    (conf / "experiment" / "phases.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n"
        "- /loss@phases.one.loss: unll\n"
        "- /loss@phases.two.loss: simpo\n"
        "- override /loss: dpo\n"
        "- override /penalty: linear\n",
        encoding="utf-8",
    )
    phases = composed("experiment=phases")["phases"]
    first, second = (built(phases[name]["loss"], f"phases.{name}.loss") for name in ("one", "two"))
    assert (first.name, first.base.name, first.penalty.name, second.name) == ("unll", "dpo", "linear", "simpo")
    phases = composed("experiment=phases", "loss/base@phases.one.loss.base=cpo", "penalty=sqrt")["phases"]
    first = built(phases["one"]["loss"])
    assert (first.base.name, first.penalty.name) == ("cpo", "sqrt")


def test_a_base_is_refused_where_the_loss_has_none() -> None:
    with pytest.raises(ConfigCompositionException):
        composed("loss=dpo", "loss/base=dpo")


def test_several_phases_share_the_root_penalty_and_npo_brings_its_own(conf: Path) -> None:
    (conf / "experiment" / "two.yaml").write_text(
        "# @package _global_\ndefaults:\n- /loss@phases.one.loss: unll\n- /loss@phases.two.loss: minll\n",
        encoding="utf-8",
    )
    phases = composed("experiment=two", "penalty=sqrt")["phases"]
    assert [built(phases[name]["loss"]).penalty.name for name in ("one", "two")] == ["sqrt", "sqrt"]
    (conf / "experiment" / "then_npo.yaml").write_text(
        "# @package _global_\ndefaults:\n- /loss@phases.two.loss: npo\n", encoding="utf-8"
    )
    assert built(composed("experiment=then_npo")["phases"]["two"]["loss"]).penalty.name == "constant"
    assert built(composed("loss=npo")["loss"]).penalty.name == "constant"
    assert built(composed("loss=npo", "penalty=linear")["loss"]).penalty.name == "linear"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=dpo", "beta=0"], "loss.beta=0: must be > 0"),
        (["loss=dpo", "beta=inf"], "loss.beta=inf: must be > 0"),
        (["loss=dpo", "loss.label_smoothing=0.5"], "loss.label_smoothing=0.5: must be >= 0 and below 0.5"),
        (["loss=dpo", "loss.sft_weight=-1"], "loss.sft_weight=-1: must be >= 0"),
        (["loss=dpo", "loss.nll=sum"], "loss.nll=sum: must be one of mean, token_mean"),
        (["loss=unll", "alpha=-1"], "loss.alpha=-1: must be >= 0"),
        (["loss=unll", "beta=0"], "loss.base.beta=0: must be > 0"),
        (["loss=unll", "loss.level=word"], "loss.level=word: must be one of token_mean, token_sum, sequence"),
        (["loss=minll", "loss.floor=0"], "loss.floor=0: must be < 0 nats per token, or null"),
        (["loss=minll", "penalty=expectile", "zeta=1.5"], "loss.penalty.zeta=1.5: must be above 0 and below 1"),
        (["loss=unll", "penalty=linear", "++penalty.zeta=0.1"], "loss.penalty.zeta=0.1: unknown key"),
        (["loss=ipo", "loss.tau=0"], "loss.tau=0: must be > 0"),
        (["loss=slic", "loss.delta=-1"], "loss.delta=-1: must be >= 0"),
        (["loss=slic", "loss.lambda_=-1"], "loss.lambda_=-1: must be >= 0"),
        (["loss=cpo", "loss.lambda_=-1"], "loss.lambda_=-1: must be >= 0"),
        (["loss=orpo", "loss.lambda_=-1"], "loss.lambda_=-1: must be >= 0"),
        (["loss=r_dpo", "loss.alpha_len=-1"], "loss.alpha_len=-1: must be >= 0"),
        (["loss=alpha_dpo", "loss.decay=1"], "loss.decay=1: must be >= 0 and below 1"),
        (["loss=alpha_dpo", "loss.alpha_ref=-1"], "loss.alpha_ref=-1: must be >= 0"),
        (["loss=alpha_dpo", "loss.gamma_ratio=-1"], "loss.gamma_ratio=-1: must be >= 0"),
        (["loss=simpo", "loss.gamma=-1"], "loss.gamma=-1: must be >= 0"),
        (["loss=simpo", "loss.gamma_beta_ratio=0.5"], "loss.gamma_beta_ratio=0.5: gamma=1 is given too; keep one"),
        (["loss=simpo", "loss.gamma=null"], "loss.gamma=null: gamma_beta_ratio is null too; give one of them"),
        (["loss=dpo_positive", "loss.lambda_=-1"], "loss.lambda_=-1: must be >= 0"),
        (
            ["loss=dpo_positive", "loss.placement=outside", "loss.label_smoothing=0.1"],
            "loss.label_smoothing=0.1: placement=outside takes none",
        ),
        (["loss=npo", "loss.beta_p=0"], "loss.beta_p=0: must be > 0"),
        (["loss=simnpo", "loss.beta_p=0"], "loss.beta_p=0: must be > 0"),
        (["loss=simnpo", "loss.gamma_p=-1"], "loss.gamma_p=-1: must be >= 0"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_and_rule(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        built(composed(*overrides)["loss"])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["loss=unll", "loss.detach=false"], "detach=false"),
        (["loss=unll", "loss.level=sequence"], "level=sequence"),
        (["loss=unll", "penalty=expectile", "penalty.form=literal"], "form=literal"),
    ],
)
def test_a_switch_with_a_known_harm_warns(overrides: list[str], word: str) -> None:
    with pytest.warns(UserWarning, match=word):
        built(composed(*overrides)["loss"])
