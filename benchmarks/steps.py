"""A training step: packed against padded, compiled against not, and its share of the machine's multiplication."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Row, alternate, compared, now, since
from benchmarks.setting import PRECISIONS, Setting, examples, experiment, with_third
from benchmarks.turns import all_started, as_dppo_has_it, as_scripts_have_it, take_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dppo.types import Batch, EncodedExample, ResponseLogps


_SCRIPT = "textbook"  # the contender that has nothing of dppo's


def step(setting: Setting, rounds: int) -> list[Row]:
    """Packed steps with stored reference log-probs against padded steps that run their reference along.

    A step is the loss, its gradient, clipping and AdamW; with three answers it is unlikelihood with a
    quadratic penalty, with two DPO. ``padded`` is dppo's own padded layout, whose head computes answer tokens only;
    ``textbook`` has the logits of every position, as papers' code computes them. The note has the share of the
    machine's matrix multiplication that is reached.
    """
    rows = []
    own = [f"packed {precision}" for precision in setting.precisions]
    for n_answers in (2, 3):
        peaks = []
        commands = [
            (
                name,
                ["benchmarks.steps", "--of", name, "--answers", str(n_answers), *setting.options],
                as_scripts_have_it() if name == _SCRIPT else as_dppo_has_it(),
            )
            for name in (*own, "padded", _SCRIPT)
        ]
        with all_started(commands) as contenders:
            for _ in range(rounds):
                peaks.append(peak(setting.precisions))  # in every round, because a machine's speed drifts
                for one in contenders:
                    one.step()
        needed = flops(setting, _drawn(setting, n_answers))
        *packed, padded, textbook = contenders
        for beside in (padded, textbook):
            against = (f"{beside.name}, with reference", beside.timings)
            for one, precision in zip(packed, setting.precisions, strict=True):
                row = compared(f"step, {n_answers} answers", (one.name, one.timings), against)
                reached = statistics.median(found[precision] for found in peaks)
                share = needed / row.first_median / reached
                rows.append(row.noted(f"{share:.0%} of {reached / 1e9:.0f} GFLOP/s in {precision}"))
    return rows


def _drawn(setting: Setting, n_answers: int) -> list[EncodedExample]:
    pairs = examples(setting, setting.batch_size)
    return with_third(pairs) if n_answers == 3 else pairs


def _contender(setting: Setting, name: str, n_answers: int) -> None:
    from dppo.allocator import freed_memory_is_kept
    from dppo.config import compose, load

    words = ["loss=dpo"] if n_answers == 2 else ["loss=unll", "penalty=quadratic", "alpha=0.1"]
    loss = load(compose(words), words).phases["main"].loss
    drawn = _drawn(setting, n_answers)
    packing, precision = name.split() if name.startswith("packed") else (name, "fp32")
    run = _step(setting, drawn, loss, packing, precision, stored=packing == "packed")
    with contextlib.nullcontext() if name == _SCRIPT else freed_memory_is_kept():
        take_turns(run)


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
    from dppo.types import LossContext

    model = experiment(setting).model.load_model(0).train()
    scorer: Any = ResponseScorer(model, packing) if packing != _SCRIPT else _Textbook(model)
    if compiles:
        scorer.compile_layers()
    batch = collate(list(drawn))
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    beside = None if stored else copy.deepcopy(scorer)
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


class _Textbook:
    """Log-probs from the logits of every position of every row, padding included."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(self, batch: Batch) -> ResponseLogps:
        import torch

        from dppo.types import ResponseLogps

        rows, predicted = [], []
        spans = zip(batch.example.tolist(), batch.response_start.tolist(), batch.lengths.tolist(), strict=True)
        for owner, start, n_tokens in spans:
            begin, n_prompt = int(batch.prompt_start[owner]), int(batch.prompt_length[owner])
            answer = batch.token_ids[start : start + n_tokens]
            rows.append(torch.cat([batch.token_ids[begin : begin + n_prompt], answer]))
            predicted.append(slice(n_prompt - 1, n_prompt - 1 + n_tokens))
        token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        logits = self._model(input_ids=token_ids, use_cache=False).logits[:, :-1].float()
        found = logits.log_softmax(-1).gather(-1, token_ids[:, 1:, None]).squeeze(-1)
        tokens = torch.cat([row[own] for row, own in zip(found, predicted, strict=True)])
        return ResponseLogps(tokens, batch.lengths, batch.example, batch.roles, batch.n_examples)


def flops(setting: Setting, drawn: Sequence[EncodedExample]) -> float:
    """What the packed step needs, forward once and backward twice.

    For each weight and token of the body 2; of the head for each answer token; and for each query and key that it sees
    4 for each number of a head, in every head and layer. Norms, losses and the optimiser are left out.
    """
    model = experiment(setting).model.load_model(0)
    config = model.config
    head = model.get_output_embeddings().weight.numel()
    body = sum(one.numel() for one in model.parameters()) - head  # the head is the embedding, which multiplies nothing
    n_answer = sum(len(answer.token_ids) for one in drawn for answer in one.responses)
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    seen = 0
    for one in drawn:
        n_prompt = len(one.prompt_ids)
        seen += n_prompt * (n_prompt + 1) // 2
        seen += sum(n * n_prompt + n * (n + 1) // 2 for n in (len(answer.token_ids) for answer in one.responses))
    multiplied = body * sum(one.n_tokens for one in drawn) + head * n_answer
    return 3.0 * float(2 * multiplied + 4 * seen * width * config.num_hidden_layers)


def peak(precisions: Sequence[str]) -> dict[str, float]:
    """Floating-point operations a second of a matrix product of 2048 x 2048 in each precision, the best of ten."""
    import torch

    found = {}
    for name in precisions:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
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


def main(argv: Sequence[str] | None = None) -> int:
    """One contender of ``step`` in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=main.__doc__)
    names = [*(f"packed {precision}" for precision in PRECISIONS), "padded", _SCRIPT]
    parser.add_argument("--of", required=True, choices=names, help="one step for each line of standard input")
    parser.add_argument("--answers", type=int, required=True, choices=(2, 3))
    Setting.add_options(parser)
    chosen = parser.parse_args(argv)
    _contender(Setting.of(chosen), chosen.of, chosen.answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
