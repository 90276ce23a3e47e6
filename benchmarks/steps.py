"""A training step: packed against padded, compiled against not, and its share of the machine's multiplication."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row, alternate, alternate_all, now, since
from benchmarks.setting import Setting, examples, experiment, with_third

if TYPE_CHECKING:
    from dppo.types import EncodedExample


def step(setting: Setting, rounds: int) -> list[Row]:
    """Packed steps with stored reference log-probs against the padded step that runs its reference along.

    A step is the loss, its gradient, clipping and AdamW; with three answers it is unlikelihood with a
    quadratic penalty, with two DPO. The note has the share of the machine's matrix multiplication that is reached.
    """
    from dppo.config import compose, load

    rows = []
    peaks: list[dict[str, float]] = []

    def measure() -> None:
        peaks.append(peak())  # in every round, because a machine's speed drifts

    for n_answers, words in ((2, ["loss=dpo"]), (3, ["loss=unll", "penalty=quadratic", "alpha=0.1"])):
        loss = load(compose(words), words).phases["main"].loss
        pairs = examples(setting, setting.batch_size)
        drawn = with_third(pairs) if n_answers == 3 else pairs
        naive = ("padded, with reference", _step(setting, drawn, loss, "padded", "fp32", stored=False))
        packed = [
            (f"packed {precision}", _step(setting, drawn, loss, "packed", precision, stored=True))
            for precision in setting.precisions
        ]
        peaks.clear()
        for row in alternate_all(f"step, {n_answers} answers", [*packed, ("peak", measure)], naive, rounds)[:-1]:
            precision = row.first.split()[-1]
            reached = statistics.median(one[precision] for one in peaks)
            share = flops(setting, drawn) / row.first_median / reached
            rows.append(row.noted(f"{share:.0%} of {reached / 1e9:.0f} GFLOP/s in {precision}"))
    return rows


def compiled(setting: Setting, rounds: int) -> list[Row]:
    """A packed DPO step with compiled layers against the same without; the note has the seconds of the first step."""
    from dppo.config import compose, load

    loss = load(compose(["loss=dpo"]), ["loss=dpo"]).phases["main"].loss
    pairs = examples(setting, setting.batch_size)
    rows = []
    for precision in setting.precisions:
        plain = _step(setting, pairs, loss, "packed", precision, stored=True)
        fast = _step(setting, pairs, loss, "packed", precision, stored=True, compiles=True)
        before = now()
        fast()
        note = f"first step {since(before)[0]:.0f} s"
        rows.append(alternate("step", (f"compiled {precision}", fast), (precision, plain), rounds).noted(note))
    return rows


def gate(setting: Setting, rounds: int) -> list[Row]:
    """y_gen computed only where its penalty's gate is open, against always; log-probs and their gradient, fp32.

    Whether a gate is open is known when the other two answers have been scored: y_gen's pass is a second one, behind
    the prompt once more. The note has the share of tokens that is computed.
    """
    import torch

    from dppo.batches import collate
    from dppo.logps import ResponseScorer

    model = experiment(setting).model.load_model(0).train()
    scorer = ResponseScorer(model, "packed")
    whole = with_third(examples(setting, setting.batch_size))

    def only(roles: Sequence[str], some: Sequence[EncodedExample]) -> list[EncodedExample]:
        return [
            dataclasses.replace(one, responses=tuple(answer for answer in one.responses if answer.role in roles))
            for one in some
        ]

    def run(parts: Sequence[Sequence[EncodedExample]]) -> None:
        total = torch.zeros(())
        for part in parts:
            total = total + scorer(collate(list(part))).tokens.sum()
        total.backward()
        model.zero_grad()

    rows = []
    n_tokens = sum(one.n_tokens for one in whole)
    for n_open in (1, 2):
        parts = [only(("chosen", "rejected"), whole), only(("generated",), whole[:n_open])]
        share = sum(one.n_tokens for part in parts for one in part) / n_tokens
        where = (f"open, {n_open} of {len(whole)}", functools.partial(run, parts))
        row = alternate("y_gen", where, ("always", functools.partial(run, [whole])), rounds)
        rows.append(row.noted(f"{share:.0%} of the tokens"))
    return rows


def _step(
    setting: Setting,
    drawn: Sequence[EncodedExample],
    loss: Any,
    packing: Any,
    precision: str,
    *,
    stored: bool,
    compiles: bool = False,
) -> Callable[[], object]:
    import torch

    from dppo.batches import collate
    from dppo.logps import ResponseScorer
    from dppo.types import LossContext, ResponseLogps

    model = experiment(setting).model.load_model(0).train()
    scorer = ResponseScorer(model, packing)
    if compiles:
        scorer.compile_layers()
    batch = collate(list(drawn))
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    beside = None if stored else ResponseScorer(copy.deepcopy(model), packing)
    with torch.no_grad(), autocast():
        known = scorer(batch)
    context = LossContext(batch.scores, batch.shared_prefix, batch.equal_to_chosen, float(batch.lengths.float().mean()))

    def run() -> None:
        reference: ResponseLogps = known
        if beside is not None:
            with torch.no_grad(), autocast():
                reference = beside(batch)
        with autocast():
            policy = scorer(batch)
        terms = loss(policy, reference, context)
        ((terms.value * terms.weight).sum() / terms.weight.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return run


def flops(setting: Setting, drawn: Sequence[EncodedExample]) -> float:
    """What the packed step needs: 6 for each weight and token of the body and, of the head, each answer token.

    Attention is left out (a few per cent at these lengths), and so are norms, losses and the optimiser.
    """
    model = experiment(setting).model.load_model(0)
    head = model.get_output_embeddings().weight.numel()
    body = sum(one.numel() for one in model.parameters()) - head  # the head is the embedding, which multiplies nothing
    n_answer = sum(len(answer.token_ids) for one in drawn for answer in one.responses)
    return 6.0 * float(body * sum(one.n_tokens for one in drawn) + head * n_answer)


def peak() -> dict[str, float]:
    """Floating-point operations a second of a matrix product of 2048 x 2048 in fp32 and bf16, the best of ten."""
    import torch

    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        one = torch.randn(2048, 2048).to(dtype)
        other = torch.randn(2048, 2048).to(dtype)
        one @ other
        took = []
        for _ in range(10):
            before = now()
            one @ other
            took.append(since(before)[0])
        found[name] = 2 * 2048**3 / min(took)
    return found
