"""What holds for every loss on any log-probs: signs of gradients, equalities, invariances, finiteness."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dppo.losses.penalties import Constant, Expectile, Linear, Penalty, Quadratic, Sqrt
from dppo.types import LossContext, LossTerms, Objective, ResponseLogps, Role, StatisticsObjective

from . import golden
from .golden import MOMENTS, classes
from .pairs import A_REFERENCE, B_REFERENCE, A, Answers, B, context, gradients, logps

pytestmark = pytest.mark.filterwarnings("ignore:loss=|penalty=:UserWarning")
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
quick = settings(patient, max_examples=15)

M = classes()
Build = Callable[..., Any]
BASES: dict[str, Build] = {
    "dpo": golden.dpo,
    "dpo_norm": golden.dpo_norm,
    "r_dpo": golden.rdpo,
    "dpo_positive": golden.dpo_positive,
    "dpo_positive outside": lambda m: golden.dpo_positive(m, placement="outside"),
    "ipo": golden.ipo,
    "slic": lambda m: m.SLiC(delta=0.75, lambda_=0.5),
    "cpo": golden.cpo,
    "orpo": lambda m: m.ORPO(lambda_=0.5),
    "simpo": golden.simpo,
    "alpha_dpo": golden.alpha_dpo,
}
ADDITIVE: dict[str, Build] = {
    "minll": golden.minll,
    "unll": golden.unll,
    "npo": golden.npo,
    "simnpo": golden.simnpo,
}
PENALISED: dict[str, Build] = {**ADDITIVE, "conll": golden.conll}
CONLL_BASES = ("dpo", "dpo_norm", "r_dpo", "dpo_positive", "simpo", "alpha_dpo")
LEGAL = [(loss, base) for loss, base in itertools.product(PENALISED, BASES) if loss != "conll" or base in CONLL_BASES]


def literal_expectile() -> Expectile:
    with pytest.warns(UserWarning, match="form=literal"):
        return Expectile(zeta=0.3, form="literal")


PENALTIES: list[Penalty] = [
    Linear(),
    Quadratic(),
    Sqrt(),
    Constant(),
    Expectile(zeta=0.3, form="absolute"),
    literal_expectile(),
]


def penalised(loss: str, base: str = "dpo", **changed: Any) -> Any:
    return dataclasses.replace(PENALISED[loss](M), base=BASES[base](M), **changed)


# Every class, and ConLL on every base whose logit it can enter.
LOSSES: dict[str, Any] = {
    "sft": M.SFT(),
    **{name: build(M) for name, build in BASES.items()},
    **{name: penalised(name) for name in ADDITIVE},
    **{f"conll on {base}": penalised("conll", base) for base in CONLL_BASES},
    "kto": golden.kto(M),
    "kto log_sigmoid": golden.kto(M, value="log_sigmoid"),
    "kto z0=zero": golden.kto(M, z0="zero"),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

tokens = st.lists(st.floats(-8, -1e-3), min_size=1, max_size=4)
pair: st.SearchStrategy[Answers] = st.builds(
    lambda chosen, rejected, generated: {"chosen": chosen, "rejected": rejected, "generated": generated},
    tokens,
    tokens,
    tokens,
)


def moved(example: Answers, offsets: Sequence[float]) -> Answers:
    """A reference for ``example``: answers of the same lengths, each one's tokens moved by its offset, at most to 0."""
    return {
        role: [min(0.0, value + offset) for value in values]
        for (role, values), offset in zip(example.items(), offsets, strict=True)
    }


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Answers], list[Answers]]:
    """Examples under the policy, and the same under a reference."""
    examples = draw(st.lists(pair, min_size=1, max_size=3))
    return examples, [moved(example, [draw(st.floats(-0.5, 0.5)) for _ in example]) for example in examples]


def context_for(loss: Any, n_examples: int, **changed: Any) -> LossContext:
    kept = {0: None, 1: (0.3,), 3: MOMENTS}[len(loss.initial_statistics()) if loss.uses_statistics else 0]
    statistics = None if kept is None else torch.tensor(kept, dtype=torch.float64)
    return context(n_examples, statistics=statistics, **changed)


def terms(loss: Any, policy: ResponseLogps, reference: ResponseLogps, **changed: Any) -> LossTerms:
    found: LossTerms = loss(policy, reference, context_for(loss, policy.n_examples, **changed))
    return found


def margins(examples: Sequence[Answers]) -> torch.Tensor:
    return torch.tensor([sum(example["chosen"]) - sum(example["rejected"]) for example in examples])


# --- the contract ------------------------------------------------------------------------------------------------


@every_loss
def test_is_an_objective_that_needs_no_more_than_it_declares(loss: Any) -> None:
    assert isinstance(loss, Objective)
    assert isinstance(loss, StatisticsObjective) or not loss.uses_statistics
    roles = loss.uses_roles or ("chosen", "rejected")  # a pair serves losses of labelled answers
    policy, reference = (
        logps(*[{role: values for role, values in example.items() if role in roles} for example in examples])
        for examples in ((A, B), (A_REFERENCE, B_REFERENCE))
    )
    given_context = context_for(loss, 2)
    assert loss(policy, reference if loss.uses_reference else None, given_context).value.shape == (2,)
    if loss.uses_reference:
        with pytest.raises(ValueError, match="uses_reference"):
            loss(policy, None, given_context)
    for missing in loss.uses_roles:
        short = logps(*[{role: v for role, v in A.items() if role in loss.uses_roles and role != missing}])
        with pytest.raises(ValueError, match=missing):
            loss(short, short, context_for(loss, 1))


@pytest.mark.parametrize("build", [golden.alpha_dpo, golden.kto])
def test_statistics_are_refused_when_missing(build: Build) -> None:
    with pytest.raises(ValueError, match="uses_statistics"):
        build(M)(logps(A), logps(A_REFERENCE), context(1))


@every_loss
def test_only_the_value_has_a_gradient(loss: Any) -> None:
    found = terms(loss, logps(A, B, requires_grad=True), logps(A_REFERENCE, B_REFERENCE))
    assert found.value.requires_grad
    logged = [found.weight, *found.rewards.values(), *found.metrics.values(), *found.distributions.values()]
    assert not any(value.requires_grad for value in logged)
    assert all(value.shape == (2,) for value in logged)


@every_loss
@quick
@given(batches())
def test_a_pair_has_the_same_value_alone_and_in_any_order(
    loss: Any, batch: tuple[list[Answers], list[Answers]]
) -> None:
    examples, references = batch
    together = terms(loss, logps(*examples), logps(*references))
    turned = terms(loss, logps(*reversed(examples)), logps(*reversed(references)))
    torch.testing.assert_close(turned.value.flip(0), together.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turned.weight.flip(0), together.weight)
    alone = terms(loss, logps(examples[0]), logps(references[0]))
    torch.testing.assert_close(alone.value[0], together.value[0], rtol=1e-12, atol=1e-12)


def test_the_order_of_answers_in_the_flat_list_is_free() -> None:
    turned, references = (
        [{role: example[role] for role in reversed(list(example))} for example in examples]
        for examples in ((A, B), (A_REFERENCE, B_REFERENCE))
    )
    for loss in LOSSES.values():
        expected = terms(loss, logps(A, B), logps(A_REFERENCE, B_REFERENCE)).value
        torch.testing.assert_close(terms(loss, logps(*turned), logps(*references)).value, expected)


# --- token means over the optimiser batch --------------------------------------------------------------------------


def test_sft_is_one_token_mean_whatever_the_micro_batches() -> None:
    values, weights = zip(
        *[(found.value, found.weight) for found in (terms(M.SFT(), logps(x), logps(x)) for x in (A, B))], strict=True
    )
    value, weight = torch.cat(values), torch.cat(weights)
    torch.testing.assert_close((value * weight).sum() / weight.sum(), torch.tensor(1.6 / 3, dtype=torch.float64))


def test_token_mean_nll_averages_to_the_token_mean() -> None:
    plain, with_nll = golden.dpo(M), golden.dpo(M, sft_weight=1.0, nll="token_mean")
    policy, reference = logps(A, B), logps(A_REFERENCE, B_REFERENCE)
    added = terms(with_nll, policy, reference).value - terms(plain, policy, reference).value
    torch.testing.assert_close(added.mean(), torch.tensor(1.6 / 3, dtype=torch.float64))


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [loss for name, loss in LOSSES.items() if name != "minll"], ids=lambda x: x.name)
@quick
@given(batches())
def test_is_never_negative(loss: Any, batch: tuple[list[Answers], list[Answers]]) -> None:
    assert bool((terms(loss, logps(*batch[0]), logps(*batch[1])).value >= 0).all())


@quick
@given(st.lists(pair, min_size=1, max_size=3))
def test_values_at_policy_equal_to_reference(examples: list[Answers]) -> None:
    both = logps(*examples)
    ln2 = torch.full((len(examples),), math.log(2), dtype=torch.float64)
    for name in ("dpo", "dpo_norm", "dpo_positive", "dpo_positive outside"):
        torch.testing.assert_close(terms(BASES[name](M), both, both).value, ln2)
    torch.testing.assert_close(terms(penalised("conll"), both, both).value, ln2)
    torch.testing.assert_close(terms(golden.ipo(M, tau=0.5), both, both).value, torch.ones_like(ln2))
    # -(2 / beta_p) log sigmoid(0) above the base
    npo = penalised("npo", alpha=1.0, penalty=Constant(), beta_p=0.5)
    wrong = (margins(examples) < 0).double()
    torch.testing.assert_close(terms(npo, both, both).value, ln2 + 4 * math.log(2) * wrong)


@quick
@given(batches())
def test_kto_is_half_its_weight_at_the_reference_and_never_above_its_larger_weight(
    batch: tuple[list[Answers], list[Answers]],
) -> None:
    n_examples = len(batch[0])
    at_start = context(n_examples, statistics=torch.zeros(1, dtype=torch.float64))
    both = logps(*batch[0])
    for value, wanted in (("sigmoid", 0.575), ("log_sigmoid", 1.15 * math.log(2)), ("identity", 0.0)):
        found = golden.kto(M, value=value)(both, both, at_start).value  # mean weight 1.15
        torch.testing.assert_close(found, torch.full((n_examples,), wanted, dtype=torch.float64))
    assert bool((terms(golden.kto(M), both, logps(*batch[1])).value <= 1.5).all())


def test_r_dpo_is_ln_2_at_the_reference_for_equal_lengths_only() -> None:
    equal: Answers = {"chosen": [-0.5, -0.1], "rejected": [-0.2, -0.9]}
    both = logps(equal, A)
    value = terms(golden.rdpo(M), both, both).value
    assert value[0] == pytest.approx(math.log(2))
    assert value[1] > math.log(2)  # the chosen answer is the shorter one: it has still to gain


@quick
@given(batches())
def test_losses_meet_where_their_own_term_is_zero(batch: tuple[list[Answers], list[Answers]]) -> None:
    policy, reference = logps(*batch[0]), logps(*batch[1])
    dpo = terms(golden.dpo(M), policy, reference).value
    assert torch.equal(terms(golden.rdpo(M, alpha_len=0.0), policy, reference).value, dpo)
    for placement in ("inside", "outside"):
        loss = golden.dpo_positive(M, lambda_=0.0, placement=placement)
        assert torch.equal(terms(loss, policy, reference).value, dpo)
    follower = golden.alpha_dpo(M, alpha_ref=0.0, gamma_ratio=0.25)
    simpo = terms(golden.simpo(M), policy, reference).value
    torch.testing.assert_close(terms(follower, policy, reference).value, simpo)


# --- gradients -----------------------------------------------------------------------------------------------------


def slopes(loss: Any, examples: Sequence[Answers], references: Sequence[Answers], role: Role) -> list[torch.Tensor]:
    policy = logps(*examples, requires_grad=True)
    return gradients(terms(loss, policy, logps(*references)).value, policy, role)


@pytest.mark.parametrize("name", [name for name in BASES if name != "ipo"])
@quick
@given(batches())
def test_descent_raises_chosen_and_lowers_rejected_answers(
    name: str, batch: tuple[list[Answers], list[Answers]]
) -> None:
    for loss in [BASES[name](M)] + [penalised(added, name) for added in ADDITIVE]:
        for slope in slopes(loss, *batch, "chosen"):
            assert bool((slope < 0).all())
        for slope in slopes(loss, *batch, "rejected"):
            assert bool((slope >= 0).all()) if name == "slic" else bool((slope > 0).all())


@pytest.mark.parametrize("changed", [{}, {"value": "log_sigmoid"}, {"value": "identity"}, {"z0": "zero"}])
@quick
@given(batches())
def test_kto_raises_desirable_and_lowers_undesirable_answers_and_nothing_else(
    changed: dict[str, Any], batch: tuple[list[Answers], list[Answers]]
) -> None:
    loss = golden.kto(M, **changed)
    assert all(bool((slope < 0).all()) for slope in slopes(loss, *batch, "chosen"))
    assert all(bool((slope > 0).all()) for slope in slopes(loss, *batch, "rejected"))
    assert all(bool((slope == 0).all()) for slope in slopes(loss, *batch, "generated"))
    labels: dict[Role, Role] = {"chosen": "desirable", "rejected": "undesirable"}
    single, references = (
        logps(*[[(label, example[role])] for example in examples for role, label in labels.items()])
        for examples in batch
    )
    apart, together = terms(loss, single, references), terms(loss, logps(*batch[0]), logps(*batch[1]))
    torch.testing.assert_close(  # the mean over all rows is the same, each one its own example or not
        (apart.value * apart.weight).sum() / apart.weight.sum(),
        (together.value * together.weight).sum() / together.weight.sum(),
    )


def test_kto_refuses_an_example_without_an_answer_of_its_own() -> None:
    both = logps([("mismatched", [-0.5])], A)
    with pytest.raises(ValueError, match="every example needs"):
        terms(golden.kto(M), both, both)


@quick
@given(batches())
def test_ipo_turns_its_gradient_at_the_target(batch: tuple[list[Answers], list[Answers]]) -> None:
    for reduction in ("mean", "sum"):
        loss = golden.ipo(M, tau=1.0, reduction=reduction)
        policy, reference = logps(*batch[0]), logps(*batch[1])
        chosen, rejected = (
            (ours.mean - theirs.mean) if reduction == "mean" else (ours.sum - theirs.sum)
            for ours, theirs in ((policy.chosen, reference.chosen), (policy.rejected, reference.rejected))
        )
        side = torch.sign(chosen - rejected - 0.5)
        for index, slope in enumerate(slopes(loss, *batch, "chosen")):
            assert torch.equal(torch.sign(slope), side[index].expand_as(slope))
        for index, slope in enumerate(slopes(loss, *batch, "rejected")):
            assert torch.equal(torch.sign(slope), -side[index].expand_as(slope))


def test_label_smoothing_turns_the_gradient_where_the_logit_is_the_log_odds_of_the_labels() -> None:
    turn = math.log(0.9 / 0.1)
    for offset, sign in ((-0.1, -1.0), (0.1, 1.0)):
        example: Answers = {"chosen": [-0.5], "rejected": [-0.5 - turn - offset]}
        reference: Answers = {"chosen": [-1.0], "rejected": [-1.0]}
        loss = golden.dpo(M, beta=1.0, label_smoothing=0.1)
        assert torch.sign(slopes(loss, [example], [reference], "chosen")[0]).item() == sign


@pytest.mark.parametrize(("name", "base"), [(loss, "dpo") for loss in ADDITIVE] + [("conll", b) for b in CONLL_BASES])
@quick
@given(batches())
def test_descent_lowers_generated_answers_of_wrongly_ranked_pairs_only(
    name: str, base: str, batch: tuple[list[Answers], list[Answers]]
) -> None:
    changed = {"floor": None} if name == "minll" else {}
    loss = penalised(name, base, penalty=Constant(), **changed)
    for r, slope in zip(margins(batch[0]), slopes(loss, *batch, "generated"), strict=True):
        assert bool((slope > 0).all()) if r < 0 else bool((slope == 0).all())


def test_literal_expectile_raises_generated_answers_of_wrongly_ranked_pairs() -> None:
    loss = penalised("unll", penalty=literal_expectile())
    assert bool((slopes(loss, [A], [A_REFERENCE], "generated")[0] < 0).all())


def test_minll_holds_below_its_floor_without_a_gradient() -> None:
    loss = penalised("minll", floor=-0.5)
    assert slopes(loss, [A], [A_REFERENCE], "generated")[0].tolist() == [0.0, 0.0]  # m_g is the floor itself
    slope = slopes(penalised("minll", floor=-0.6), [A], [A_REFERENCE], "generated")[0]
    torch.testing.assert_close(slope, torch.full((2,), 0.2 * 0.25 / 2, dtype=torch.float64))


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: penalty.name)
@pytest.mark.parametrize("name", ADDITIVE)
def test_detached_penalties_add_nothing_to_the_gradients_of_the_pair(name: str, penalty: Penalty) -> None:
    batch = [A, B], [A_REFERENCE, B_REFERENCE]
    loss = penalised(name, penalty=penalty)
    roles: tuple[Role, ...] = ("chosen", "rejected")
    for role in roles:
        for found, expected in zip(slopes(loss, *batch, role), slopes(golden.dpo(M), *batch, role), strict=True):
            assert torch.equal(found, expected)


def test_detached_conll_has_only_the_gradient_of_its_sigmoid() -> None:
    """d/ds_w of -log sigmoid(beta Delta - c) is -beta sigmoid(c - beta Delta), here with logit -0.0265."""
    slope = slopes(penalised("conll"), [A], [A_REFERENCE], "chosen")[0]
    torch.testing.assert_close(slope, torch.full((2,), -0.1 / (1 + math.exp(-0.0265)), dtype=torch.float64))


def test_gradients_through_r_are_those_of_the_product() -> None:
    """Pair A, r = -0.5, f = r^2: d/dr of 0.2 r^2 u is 0.2 * 2 * -0.5 * u; minll's u is m_g = -0.5, negative."""
    for name, u in (("unll", golden.UNLL_A), ("minll", -0.5), ("npo", 4 * golden.nls(0.35))):
        loss = penalised(name, detach=False)
        own = slopes(golden.dpo(M), [A], [A_REFERENCE], "chosen")[0]
        added = slopes(loss, [A], [A_REFERENCE], "chosen")[0] - own
        torch.testing.assert_close(added, torch.full((2,), -0.2 * u, dtype=torch.float64))


def test_the_gate_is_never_differentiated() -> None:
    for name in PENALISED:
        through, held = (penalised(name, penalty=Constant(), detach=detach) for detach in (False, True))
        for role in ("chosen", "rejected", "generated"):
            for found, expected in zip(
                slopes(through, [A, B], [A_REFERENCE, B_REFERENCE], role),
                slopes(held, [A, B], [A_REFERENCE, B_REFERENCE], role),
                strict=True,
            ):
                assert torch.equal(found, expected)


def test_kinks_have_derivative_zero() -> None:
    """At policy = reference every pair sits on DPO-Positive's kink; r = 0 sits on the penalties'."""
    roles: tuple[Role, ...] = ("chosen", "rejected")
    for placement in ("inside", "outside"):
        for role in roles:
            found = slopes(golden.dpo_positive(M, placement=placement), [A], [A], role)[0]
            assert torch.equal(found, slopes(golden.dpo(M), [A], [A], role)[0])
    for penalty in PENALTIES:
        r = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        f = penalty(r, differentiable=True)
        assert f.item() == 0
        if f.requires_grad:
            assert torch.autograd.grad(f.sum(), r)[0].item() == 0


CERTAIN_FREE_B: Answers = {**B, "generated": [-0.05, -0.15, -0.1]}


@pytest.mark.parametrize("margin", ["sum", "mean", "implicit"])
@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: penalty.name)
@pytest.mark.parametrize("name", PENALISED)
def test_penalised_gradients_are_derivatives(name: str, penalty: Penalty, margin: str) -> None:
    loss = penalised(name, penalty=penalty, margin=margin, detach=False)
    check_gradients(loss)


@pytest.mark.parametrize(
    "build",
    [
        *[build for name, build in BASES.items() if name != "alpha_dpo"],
        lambda m: golden.alpha_dpo(m, alpha_ref=0.0),  # with it, z is held and no derivative
        lambda m: golden.ipo(m, reduction="sum"),
        lambda m: golden.simpo(m, normalise_by_length=False, label_smoothing=0.1, sft_weight=0.5),
        lambda m: golden.cpo(m, nll="token_mean"),
        lambda m: penalised("unll", detach=False, level="sequence"),
        lambda m: penalised("unll", detach=False, level="token_sum", mask_shared_prefix=True),
        lambda m: penalised("minll", detach=False, reduction="sum"),
        lambda m: m.SFT(),
        golden.kto,
        lambda m: golden.kto(m, value="log_sigmoid", z0="zero"),
        lambda m: golden.kto(m, value="identity"),
    ],
)
def test_gradients_are_derivatives(build: Build) -> None:
    check_gradients(build(M))


def check_gradients(loss: Any) -> None:
    policy = logps(A, CERTAIN_FREE_B, requires_grad=True)
    reference = logps(A_REFERENCE, B_REFERENCE)

    def value(given_tokens: torch.Tensor) -> torch.Tensor:
        changed = dataclasses.replace(policy, tokens=given_tokens)
        return terms(loss, changed, reference, shared_prefix=[1, 0]).value

    assert torch.autograd.gradcheck(value, policy.tokens)


# --- the penalty that is not there ---------------------------------------------------------------------------------


def same_bits(loss: Any, base: Any, examples: Sequence[Answers], references: Sequence[Answers], **changed: Any) -> None:
    """Value and gradients of ``loss`` are exactly those of ``base``, in single precision."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for one in (loss, base):
        policy = logps(*examples, dtype=torch.float32, requires_grad=True)
        value = terms(one, policy, logps(*references, dtype=torch.float32), **changed).value
        found.append((value, torch.autograd.grad(value.sum(), policy.tokens)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@settings(patient, max_examples=50)
@given(st.sampled_from(LEGAL), batches())
def test_no_penalty_is_the_base_bit_for_bit(names: tuple[str, str], batch: tuple[list[Answers], list[Answers]]) -> None:
    name, base = names
    for penalty in (Quadratic(), Expectile(zeta=0.3, form="absolute")):
        same_bits(penalised(name, base, alpha=0.0, penalty=penalty), BASES[base](M), *batch)
        n_examples = len(batch[0])
        equal = penalised(name, base, penalty=penalty)
        same_bits(equal, BASES[base](M), *batch, equal_to_chosen=[True] * n_examples)
        shared = penalised(name, base, penalty=penalty, mask_shared_prefix=True)
        same_bits(shared, BASES[base](M), *batch, shared_prefix=[len(example["generated"]) for example in batch[0]])


@pytest.mark.parametrize(("name", "base"), LEGAL)
def test_a_closed_gate_is_the_base_bit_for_bit(name: str, base: str) -> None:
    tie: Answers = {**B, "chosen": B["rejected"]}
    for penalty in (Linear(), Quadratic(), Sqrt(), Constant()):
        for detach in (True, False):
            loss = penalised(name, base, penalty=penalty, detach=detach)
            same_bits(loss, BASES[base](M), [B, tie], [B_REFERENCE, {**B_REFERENCE, "chosen": B["rejected"]}])


@pytest.mark.parametrize("name", PENALISED)
def test_masking_the_shared_prefix_is_an_answer_without_it(name: str) -> None:
    behind: Answers = {**A, "generated": A["generated"][1:]}
    behind_reference: Answers = {**A_REFERENCE, "generated": A_REFERENCE["generated"][1:]}
    masked = terms(penalised(name, mask_shared_prefix=True), logps(A), logps(A_REFERENCE), shared_prefix=[1]).value
    plain = terms(penalised(name), logps(A), logps(A_REFERENCE), shared_prefix=[1]).value
    torch.testing.assert_close(masked, terms(penalised(name), logps(behind), logps(behind_reference)).value)
    assert not torch.equal(masked, plain)


# --- extremes --------------------------------------------------------------------------------------------------------


EXTREMES = [list(answers) for answers in itertools.product([[0.0] * 3, [-1e4] * 20, [0.0, -1e4, -0.3]], repeat=3)]


def finite_cases() -> Iterator[Any]:
    yield from LOSSES.values()
    yield golden.ipo(M, reduction="sum")
    yield golden.simpo(M, normalise_by_length=False, label_smoothing=0.1, sft_weight=0.5)
    for name, penalty, detach in itertools.product(PENALISED, PENALTIES, (True, False)):
        yield penalised(name, penalty=penalty, detach=detach)
    yield penalised("unll", level="sequence")
    yield penalised("unll", level="token_sum", mask_shared_prefix=True)
    yield penalised("minll", reduction="sum", floor=None, detach=False)
    yield penalised("unll", margin="mean", detach=False)
    yield penalised("unll", margin="implicit", detach=False)


def test_is_finite_for_certain_and_impossible_tokens() -> None:
    examples: list[Answers] = [
        {"chosen": chosen, "rejected": rejected, "generated": generated} for chosen, rejected, generated in EXTREMES
    ]
    flipped: list[Answers] = [{role: [-1e4 - value for value in v] for role, v in x.items()} for x in examples]
    for loss, references in itertools.product(finite_cases(), (examples, flipped)):
        policy = logps(*examples, dtype=torch.float32, requires_grad=True)
        found = terms(loss, policy, logps(*references, dtype=torch.float32))
        (gradient,) = torch.autograd.grad(found.value.sum(), policy.tokens)
        logged = [*found.rewards.values(), *found.metrics.values(), *found.distributions.values()]
        for tensor in (found.value, gradient, *logged):
            assert bool(torch.isfinite(tensor).all()), loss


# --- ranked answers --------------------------------------------------------------------------------------------------


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[list[float]], list[float]]:
    """K answers and their scores, ties among them."""
    answers = draw(st.lists(tokens, min_size=2, max_size=6))
    return answers, [float(draw(st.integers(-2, 2))) for _ in answers]


def ranked_terms(groups: Sequence[tuple[Sequence[Sequence[float]], Sequence[float]]]) -> LossTerms:
    policy = logps(*[[("ranked", answer) for answer in answers] for answers, _ in groups])
    scores = [score for _, given_scores in groups for score in given_scores]
    found: LossTerms = M.RRHF(lambda_=0.5)(policy, None, context(len(groups), scores=scores))
    return found


@quick
@given(st.lists(groups(), min_size=1, max_size=3), st.data())
def test_rrhf_knows_groups_alone_in_any_order_and_scores_by_their_order_only(
    batch: list[tuple[list[list[float]], list[float]]], data: st.DataObject
) -> None:
    together = ranked_terms(batch).value
    assert bool((together >= 0).all())
    torch.testing.assert_close(ranked_terms(batch[::-1]).value.flip(0), together, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ranked_terms(batch[:1]).value[0], together[0], rtol=1e-12, atol=1e-12)
    stretched = [(answers, [math.exp(3 * score) - 7 for score in scores]) for answers, scores in batch]
    assert torch.equal(ranked_terms(stretched).value, together)
    answers, scores = batch[0]
    if scores.count(max(scores)) == 1:
        order = data.draw(st.permutations(range(len(scores))))
        turned = [([answers[place] for place in order], [scores[place] for place in order])]
        torch.testing.assert_close(ranked_terms(turned).value[0], together[0], rtol=1e-12, atol=1e-12)


@quick
@given(groups())
def test_rrhf_raises_the_best_and_never_the_worst_answer(group: tuple[list[list[float]], list[float]]) -> None:
    answers, scores = group
    policy = logps([("ranked", answer) for answer in answers], requires_grad=True)
    value = M.RRHF(lambda_=0.5)(policy, None, context(1, scores=scores)).value
    slope = gradients(value, policy, "ranked")
    assert bool((slope[scores.index(max(scores))] <= -0.5).all())
    if min(scores) < max(scores):
        assert bool((slope[scores.index(min(scores))] >= 0).all())


def test_rrhf_of_two_is_its_formula_on_a_pair() -> None:
    """A group of two with the better score on the chosen answer, and the pair itself."""
    as_group = ranked_terms([((A["chosen"], A["rejected"]), (0.2, 0.1)), ((B["chosen"], B["rejected"]), (5.0, -5.0))])
    pairs = logps(*[[(role, example[role]) for role in ("chosen", "rejected")] for example in (A, B)])
    as_pair = M.RRHF(lambda_=0.5)(pairs, None, context(2, scores=[math.nan] * 4))
    assert torch.equal(as_group.value, as_pair.value)
    with pytest.raises(ValueError, match="must be ranked"):
        M.RRHF(lambda_=0.5)(logps(A), None, context(1))
    with pytest.raises(ValueError, match="must be ranked"):
        ranked_terms([(([-0.1], [-0.2]), (1.0, math.nan))])


def test_rrhf_is_finite_at_the_ends_and_differentiable_elsewhere() -> None:
    ends = list(itertools.product([[0.0] * 3, [-1e4] * 9], repeat=2))
    policy = logps(*[[("ranked", answer) for answer in answers] for answers in ends], requires_grad=True)
    found = M.RRHF(lambda_=0.5)(policy, None, context(len(ends), scores=[0.0, 1.0] * len(ends)))
    (gradient,) = torch.autograd.grad(found.value.sum(), policy.tokens)
    assert bool(torch.isfinite(found.value).all())
    assert bool(torch.isfinite(gradient).all())
    smooth = logps([("ranked", answer) for answer in ([-0.2, -0.4], [-0.5], [-0.05, -0.1])], requires_grad=True)

    def value(given_tokens: torch.Tensor) -> torch.Tensor:
        changed = dataclasses.replace(smooth, tokens=given_tokens)
        found: torch.Tensor = M.RRHF(lambda_=0.5)(changed, None, context(1, scores=[3.0, 1.0, 2.0])).value
        return found

    assert torch.autograd.gradcheck(value, smooth.tokens)


# --- the penalties alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: penalty.name)
@patient
@given(st.floats(-1e6, 1e6))
def test_strengths_are_closed_or_positive(penalty: Penalty, r: float) -> None:
    f = penalty(torch.tensor([r], dtype=torch.float64), differentiable=False).item()
    if isinstance(penalty, Expectile) and penalty.form == "literal":
        assert math.copysign(1, f) == math.copysign(1, r) or f == 0
    elif isinstance(penalty, Expectile):
        assert (f > 0) == (r * r > 0)
    else:
        assert (f > 0) == (r < 0) or r * r == 0
        assert f >= 0


# --- statistics ----------------------------------------------------------------------------------------------------


def test_a_penalised_loss_keeps_the_statistics_of_its_base() -> None:
    base, loss = BASES["alpha_dpo"](M), penalised("unll", "alpha_dpo")
    policy, reference = logps(A, B), logps(A_REFERENCE, B_REFERENCE)
    totals = loss.partial_statistics(policy, reference, context(2))
    assert torch.equal(totals, base.partial_statistics(policy, reference, context(2)))
    assert totals.dtype == torch.float64
    state = loss.initial_statistics()
    assert torch.equal(loss.update_statistics(state, totals), base.update_statistics(state, totals))
    assert penalised("unll", "dpo").initial_statistics().numel() == 0


def test_the_first_moments_are_those_of_the_first_batch() -> None:
    """With bias correction M and S after one update are the batch's own: z has mean 0 and n-1 deviation 1."""
    loss = golden.alpha_dpo(M)
    policy, reference = logps(A, B), logps(A_REFERENCE, B_REFERENCE)
    state = loss.update_statistics(loss.initial_statistics(), loss.partial_statistics(policy, reference, context(2)))
    target = loss.target(policy, reference, context(2, statistics=state))
    z = (target / loss.beta - loss.gamma_ratio) / loss.alpha_ref
    torch.testing.assert_close(z.mean(), torch.tensor(0.0, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.std(), torch.tensor(1.0, dtype=torch.float64))


def test_the_scope_of_the_statistics_is_declared() -> None:
    for scope in ("optimiser_batch", "micro_batch"):
        base = golden.alpha_dpo(M, stats_scope=scope)
        assert base.statistics_scope == scope
        assert golden.unll(M, base=base).statistics_scope == scope
