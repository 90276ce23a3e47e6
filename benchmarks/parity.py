"""Whether dppo computes what TRL computes: ``python -m benchmarks.parity [--only WORD ...] [--write FILE]``.

Both train the same small Llama with random weights on the same examples in the same order, in fp32 on the CPU, with
the same AdamW, learning rate and clipping: TRL with its own trainers, dppo with ``dppo.loop.train`` and losses composed
from ``conf``. Loss and gradient norm (before clipping) of every optimiser step are compared. ``--write`` replaces the
table of a Markdown file. Needs the extra ``trl``. Fails if a row does not turn out as expected.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import platform
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dppo.types import EncodedExample, EncodedResponse, Role

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from dppo.config import Phase
    from dppo.loop import ReferenceLogps

TOLERANCE = (
    1e-5  # relative; rounding alone reaches 1e-6, and more with a higher learning rate, because Adam amplifies it
)
BATCH_SIZE = 4
N_EXAMPLES = 30  # the last of 8 batches is half full
N_DISTINCT = 8  # they repeat, so that a step changes what a later one sees
VOCABULARY = ("<pad>", "<s>", "</s>", *(f"t{number}" for number in range(3, 64)))
PAD, END = 0, 2
SEED = 0
MARK = "<!-- What follows is written by python -m benchmarks.parity -->"

TRAIN = (
    f"train.batch_size={BATCH_SIZE}",
    "train.steps=null",
    "train.learning_rate=0.0005",
    "train.schedule=constant",
    "train.warmup_ratio=0",
    "train.weight_decay=0.01",
    "train.max_grad_norm=1.0",
    "train.max_length=null",
    "train.log_every=1",
    "train.evaluate_every=null",
    "train.checkpoint_every=null",
)


@dataclass(frozen=True)
class Steps:
    """Loss and gradient norm of every optimiser step."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """A loss of dppo, as words of its command line, and what should be the same in TRL.

    ``differs`` says why the two are not the same; empty where they must agree. An optimiser batch is cut into
    ``micro_batches`` in TRL; where these are several, dppo's token budget cuts it too.
    """

    words: str
    trainer: Literal["DPO", "KTO", "CPO", "ORPO", "SFT"]
    arguments: Mapping[str, Any]
    examples: Callable[[], list[EncodedExample]]
    differs: str = ""
    note: str = ""
    micro_batches: int = 1
    epochs: int = 1

    @property
    def trl(self) -> str:
        """The trainer and its arguments, in words."""
        words = [f"{key}={value}" for key, value in self.arguments.items()]
        if self.epochs > 1:
            words.append(f"num_train_epochs={self.epochs}")
        if self.micro_batches > 1:
            words.append(f"gradient_accumulation_steps={self.micro_batches}")
        return " ".join([f"{self.trainer}Trainer", *words])


@dataclass(frozen=True)
class Comparison:
    case: Case
    dppo: Steps
    trl: Steps

    @property
    def loss_difference(self) -> float:
        return largest_difference(self.dppo.losses, self.trl.losses)

    @property
    def grad_norm_difference(self) -> float:
        return largest_difference(self.dppo.grad_norms, self.trl.grad_norms)

    @property
    def agrees(self) -> bool:
        return max(self.loss_difference, self.grad_norm_difference) <= TOLERANCE

    @property
    def as_expected(self) -> bool:
        """Whether it agrees where it should, and differs where a reason is given."""
        return self.agrees != bool(self.case.differs)


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest |a - b| / max(|a|, |b|) over the steps; infinite if they are not equally many or not finite."""
    if len(ours) != len(theirs) or not all(map(math.isfinite, (*ours, *theirs))):
        return math.inf
    return max(abs(a - b) / (max(abs(a), abs(b)) or 1.0) for a, b in zip(ours, theirs, strict=True))


# --- examples ------------------------------------------------------------------------------------------------------


def examples(
    *answers: tuple[Role, ...], prompt: tuple[int, int] = (3, 12), chosen: tuple[int, int] = (3, 12)
) -> list[EncodedExample]:
    """Random examples with answers in the roles of ``answers``, of which each example takes the next in turn.

    ``prompt`` and ``chosen`` are the least and largest numbers of tokens, the end of the turn not counted.
    """

    def tokens(generator: random.Random, least: int, most: int) -> tuple[int, ...]:
        return tuple(generator.randrange(END + 1, len(VOCABULARY)) for _ in range(generator.randint(least, most)))

    found = []
    for number in range(N_EXAMPLES):
        content = number % N_DISTINCT
        generator, roles = random.Random(f"{SEED}:{content}"), answers[content % len(answers)]
        responses = []
        for place, role in enumerate(roles):
            ids = (*tokens(generator, *(chosen if role == "chosen" else (3, 12))), END)
            responses.append(EncodedResponse(f"{number}/{place}", role, ids))
        found.append(
            EncodedExample(f"example {number}", f"prompt {number}", tokens(generator, *prompt), tuple(responses))
        )
    return found


def pairs() -> list[EncodedExample]:
    return examples(("chosen", "rejected"))


def one_batch_of_pairs() -> list[EncodedExample]:
    return pairs()[:BATCH_SIZE]


def after_one_token() -> list[EncodedExample]:
    return examples(("chosen", "rejected"), prompt=(1, 1))


def after_one_token_of_one_length() -> list[EncodedExample]:
    return examples(("chosen", "rejected"), prompt=(1, 1), chosen=(8, 8))


def labelled() -> list[EncodedExample]:
    """Rows of both kinds, unevenly spread: two desirable ones for each that is not."""
    return examples(("desirable",), ("undesirable",), ("desirable",))


def demonstrations() -> list[EncodedExample]:
    return examples(("chosen",))


# --- what is compared ----------------------------------------------------------------------------------------------

TOKEN_MEAN = "TRL's NLL is one token mean over the micro-batch, ours the mean over pairs of -m_w"

CASES = (
    Case("loss=sft", "SFT", {}, demonstrations),
    Case("loss=sft", "SFT", {}, demonstrations, micro_batches=2),
    Case("loss=dpo beta=0.1", "DPO", {"loss_type": "sigmoid", "beta": 0.1}, pairs),
    Case("loss=dpo beta=0.1", "DPO", {"loss_type": "sigmoid", "beta": 0.1}, pairs, micro_batches=2),
    Case(
        "loss=dpo beta=0.1 loss.sft_weight=0.5 loss.nll=token_mean",
        "DPO",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.1},
        pairs,
    ),
    Case(
        "loss=dpo beta=0.1 loss.sft_weight=0.5",
        "DPO",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.1},
        pairs,
        differs=TOKEN_MEAN,
    ),
    Case(
        "loss=dpo beta=0.1 loss.sft_weight=0.5 loss.nll=token_mean",
        "DPO",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.1},
        pairs,
        micro_batches=2,
        differs="TRL averages the token means of its micro-batches; ours is one token mean over the optimiser batch",
    ),
    Case(
        "loss=dpo beta=0.1 loss.label_smoothing=0.1",
        "DPO",
        {"loss_type": ["sigmoid", "robust"], "loss_weights": [1.8, -0.8], "beta": 0.1, "label_smoothing": 0.1},
        pairs,
        note="2(1 - e) sigmoid - (1 - 2e) robust is the smoothed loss",
    ),
    Case(
        "loss=dpo beta=0.1 loss.label_smoothing=0.1",
        "DPO",
        {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1},
        pairs,
        differs="TRL's sigmoid ignores label_smoothing",
    ),
    Case("loss=dpo_norm beta=5", "DPO", {"loss_type": "sigmoid_norm", "beta": 5.0}, pairs),
    Case("loss=ipo loss.tau=0.1", "DPO", {"loss_type": "ipo", "beta": 0.1}, pairs),
    Case(
        "loss=ipo loss.tau=0.1 loss.sft_weight=1 loss.nll=token_mean",
        "DPO",
        {"loss_type": ["ipo", "sft"], "beta": 0.1},
        pairs,
    ),
    Case("loss=kto beta=0.1 loss.z_scope=micro_batch", "KTO", {"beta": 0.1}, labelled),
    Case(
        "loss=kto beta=0.1 loss.z_scope=micro_batch loss.desirable_weight=0.7 loss.undesirable_weight=1.4",
        "KTO",
        {"beta": 0.1, "desirable_weight": 0.7, "undesirable_weight": 1.4},
        labelled,
    ),
    Case(
        "loss=kto beta=0.1 loss.z_scope=micro_batch",
        "KTO",
        {"beta": 0.1},
        one_batch_of_pairs,
        note="pairs, all in one batch: its rows are the chosen answers, then the rejected ones",
        epochs=8,
    ),
    Case("loss=kto beta=0.1 loss.z0=zero", "KTO", {"loss_type": "apo_zero_unpaired", "beta": 0.1}, labelled),
    Case(
        "loss=kto beta=0.1 loss.z0=zero loss.value=log_sigmoid",
        "DPO",
        {"loss_type": "bco_pair", "loss_weights": [0.5], "beta": 0.1},
        pairs,
        note="bco_pair adds the two rows of a pair, ours is their mean",
    ),
    Case(
        "loss=kto beta=0.1",
        "KTO",
        {"beta": 0.1},
        labelled,
        differs="y' is drawn once from the answers to all other prompts, in TRL it is the answer of the row before",
    ),
    Case(
        "loss=kto beta=0.1 loss.z_scope=micro_batch",
        "KTO",
        {"beta": 0.1},
        labelled,
        micro_batches=2,
        differs="TRL takes y' and z from its micro-batch; ours takes y' from the optimiser batch and cuts by length",
    ),
    Case("loss=cpo beta=0.1 loss.nll=token_mean", "CPO", {"loss_type": "sigmoid", "beta": 0.1}, pairs),
    Case(
        "loss=cpo beta=0.1 loss.nll=token_mean loss.label_smoothing=0.1",
        "CPO",
        {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1},
        pairs,
    ),
    Case("loss=cpo beta=0.1", "CPO", {"loss_type": "sigmoid", "beta": 0.1}, pairs, differs=TOKEN_MEAN),
    Case(
        "loss=simpo beta=2 loss.gamma=1",
        "CPO",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        pairs,
    ),
    Case(
        "loss=simpo beta=2 loss.gamma=1 loss.sft_weight=1 loss.nll=token_mean",
        "CPO",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 1.0},
        pairs,
    ),
    Case(
        "loss=slic loss.delta=1 loss.lambda_=0",
        "CPO",
        {"loss_type": "hinge", "beta": 1.0, "cpo_alpha": 0.0},
        pairs,
    ),
    Case(
        "loss=orpo loss.lambda_=0.5",
        "ORPO",
        {"beta": 0.5},
        after_one_token_of_one_length,
        note="prompts of one token and chosen answers of one length, so that both NLL are the same",
    ),
    Case(
        "loss=orpo loss.lambda_=0.5",
        "ORPO",
        {"beta": 0.5},
        after_one_token,
        differs=f"prompts of one token; {TOKEN_MEAN}",
    ),
    Case(
        "loss=orpo loss.lambda_=0.5",
        "ORPO",
        {"beta": 0.5},
        pairs,
        differs="TRL's NLL also counts the prompt's tokens, ours those of the answer only",
    ),
)


def compare(case: Case) -> Comparison:
    """Train with both and compare. Raises ImportError without TRL."""
    from dppo.batches import batches
    from dppo.config import compose, load

    overrides = [*case.words.split(), *TRAIN, f"train.epochs={case.epochs}"]
    phase = next(iter(load(compose(overrides), overrides).phases.values()))
    drawn = case.examples()
    steps = math.ceil(len(drawn) / BATCH_SIZE)
    ordered = [example for batch in batches(drawn, BATCH_SIZE, steps, SEED) for example in batch]
    model = llama()
    with tempfile.TemporaryDirectory() as folder:
        theirs = steps_of_trl(case, copy.deepcopy(model), ordered, phase, Path(folder))
        ours = steps_of_dppo(case, model, drawn, phase, Path(folder))
    return Comparison(case, ours, theirs)


def llama() -> PreTrainedModel:
    """A Llama of some 20,000 parameters, with weights large enough that tokens matter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return LlamaForCausalLM(config)


# --- dppo ----------------------------------------------------------------------------------------------------------


def steps_of_dppo(
    case: Case, model: PreTrainedModel, drawn: Sequence[EncodedExample], phase: Phase, folder: Path
) -> Steps:
    """Train ``model`` with the project's own loop."""
    from accelerate import Accelerator

    from dppo.loop import train

    settings = phase.train
    shaped = with_mismatched(drawn, phase)
    if case.micro_batches > 1:
        largest = max(example.n_tokens for example in shaped)
        settings = replace(settings, tokens_per_micro_batch=largest * BATCH_SIZE // case.micro_batches)
    rows: list[Mapping[str, float]] = []
    train(
        model,
        phase.loss,
        shaped,
        settings,
        seed=SEED,
        accelerator=Accelerator(cpu=True),
        log=rows.append,
        checkpoints=folder / "checkpoints",
        reference=reference_of(model, shaped) if phase.loss.uses_reference else None,
    )
    return Steps(tuple(row["train/loss"] for row in rows), tuple(row["train/grad_norm"] for row in rows))


def with_mismatched(drawn: Sequence[EncodedExample], phase: Phase) -> Sequence[EncodedExample]:
    """The examples with the answers to other prompts that KTO's z needs, as the pipeline makes them."""
    from dppo.batches import batches
    from dppo.data.shapes import with_answers_of_the_row_before, with_answers_to_other_prompts
    from dppo.losses.unpaired import KTO

    if not isinstance(phase.loss, KTO) or not phase.loss.uses_statistics:
        return drawn
    if phase.loss.z_scope == "micro_batch":
        steps = math.ceil(len(drawn) / BATCH_SIZE)
        return with_answers_of_the_row_before(drawn, batches(drawn, BATCH_SIZE, steps, SEED), None)
    return with_answers_to_other_prompts(drawn, None, SEED)


def reference_of(model: PreTrainedModel, shaped: Sequence[EncodedExample]) -> ReferenceLogps:
    """The log-probs of all answers under ``model`` as it is, by (prompt_id, response_id)."""
    import torch

    from dppo.batches import collate
    from dppo.logps import ResponseScorer

    batch = collate(shaped)
    with torch.no_grad():
        found = ResponseScorer(model, "packed")(batch)
    stored = dict(zip(batch.response_keys, found.tokens.split(found.lengths.tolist()), strict=True))
    return lambda keys: [stored[key] for key in keys]


# --- TRL -----------------------------------------------------------------------------------------------------------


def steps_of_trl(
    case: Case, model: PreTrainedModel, ordered: Sequence[EncodedExample], phase: Phase, folder: Path
) -> Steps:
    """Train ``model`` with TRL's trainer on the examples in the order given."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback

    disable_progress_bars()
    home = f"trl.experimental.{case.trainer.lower()}" if case.trainer in ("CPO", "ORPO") else "trl"
    module = importlib.import_module(home)
    settings = phase.train
    rows_of_each = len(ordered[0].responses) if case.trainer == "KTO" else 1
    arguments: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "num_train_epochs": case.epochs,
        "per_device_train_batch_size": BATCH_SIZE * rows_of_each // case.micro_batches,
        "gradient_accumulation_steps": case.micro_batches,
        "train_sampling_strategy": "sequential",
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_epsilon": settings.adam_epsilon,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        **case.arguments,
    }
    models: dict[str, Any] = {"model": model}
    if case.trainer in ("DPO", "KTO"):
        models["ref_model"] = copy.deepcopy(model)
    trainer = getattr(module, f"{case.trainer}Trainer")(
        **models,
        args=getattr(module, f"{case.trainer}Config")(**arguments),
        train_dataset=Dataset.from_list([row(case, example) for example in ordered]),
        processing_class=tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return Steps(tuple(entry["loss"] for entry in logged), tuple(entry["grad_norm"] for entry in logged))


def row(case: Case, example: EncodedExample) -> dict[str, Any]:
    """An example as text, in the columns that the trainer wants."""
    found: dict[str, Any] = {"prompt": text(example.prompt_ids)}
    if len(example.responses) > 1:
        return found | {answer.role: " " + text(answer.token_ids) for answer in example.responses}
    (answer,) = example.responses
    found["completion"] = " " + text(answer.token_ids)
    return found if case.trainer == "SFT" else found | {"label": answer.role == "desirable"}


def text(token_ids: Sequence[int]) -> str:
    """The words whose tokens these are."""
    return " ".join(VOCABULARY[token_id] for token_id in token_ids)


def tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token; nothing is added in front."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: token_id for token_id, word in enumerate(VOCABULARY)}, unk_token=VOCABULARY[1]))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=VOCABULARY[PAD], eos_token=VOCABULARY[END])


# --- the report ----------------------------------------------------------------------------------------------------


def table(found: Sequence[Comparison]) -> str:
    """All comparisons as a Markdown table."""
    lines = [
        "| dppo | TRL | steps | loss, first and last step | largest difference, loss | gradient norm | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        case, losses = one.case, one.dppo.losses
        why = case.differs or case.note
        verdict = ("agree" if one.agrees else "differ") + (f": {why}" if why else "")
        if not one.as_expected:
            verdict = f"NOT AS EXPECTED, {verdict}"
        lines.append(
            f"| `{case.words}` | `{case.trl}` | {len(losses)} | {losses[0]:.3f}, {losses[-1]:.3f} "
            f"| {one.loss_difference:.1e} | {one.grad_norm_difference:.1e} | {verdict} |"
        )
    return "\n".join(lines)


def versions() -> str:
    from importlib.metadata import version

    names = ("dppo", "trl", "torch", "transformers", "accelerate")
    return ", ".join([*(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="rows that have one of these words")
    parser.add_argument("--write", type=Path, default=None, metavar="FILE", help="replace the table in this file")
    chosen = parser.parse_args(argv)
    cases = [
        case for case in CASES if not chosen.only or {*case.words.split(), *case.trl.split()}.intersection(chosen.only)
    ]
    if not cases:
        parser.error(f"no row has any of the words {' '.join(chosen.only)}")
    found = [compare(case) for case in cases]
    report = f"Made with {versions()}.\n\n{table(found)}\n"
    print(report)
    if chosen.write is not None:
        prose, _, _ = chosen.write.read_text().partition(MARK)
        chosen.write.write_text(f"{prose}{MARK}\n\n{report}")
    return 0 if all(one.as_expected for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
