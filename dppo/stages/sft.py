"""SFT: the base model becomes the reference model, on completions only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dppo.artifacts import Build, Slot
from dppo.config import SftSettings, TrainSettings
from dppo.data import Dataset, chats_identity
from dppo.data.encoding import ChatEncoder, EncodedSet
from dppo.data.subsets import nested_subset
from dppo.errors import UserError
from dppo.losses.sft import SFT
from dppo.stages.preflight import ready_to_train
from dppo.stages.training import new_policy, run_training, save_policy
from dppo.types import Artifact, Json

if TYPE_CHECKING:
    from dppo.models import Model
    from dppo.stages.workbench import Workbench

VERSION = 3


def sft_slot(bench: Workbench, model: Model, dataset: Dataset, settings: SftSettings, encoder: ChatEncoder) -> Slot:
    """The place of the SFT model in the cache."""
    train = settings.train
    content: dict[str, Json] = {
        "version": VERSION,
        "model": model.identity(),
        "template": encoder.template_text,
        "seed": settings.seed,
        "settings": None,
    }
    if train is not None:
        content |= {
            "data": chats_identity(dataset),
            "settings": train.identity(),
            "numerics": bench.training_numerics(train),
        }
    return bench.cache.artifact("sft", content)


def sft_examples(dataset: Dataset, train: TrainSettings, seed: int, encoder: ChatEncoder) -> EncodedSet:
    """The chats that SFT trains on. Raises UserError if none fits into ``train.max_length``."""
    chats = nested_subset(dataset.chats("train"), train.n_examples, seed)
    return encoder.encode(chats, train.max_length, key="sft.train.max_length")


def sft(bench: Workbench, model: Model, dataset: Dataset, settings: SftSettings, encoder: ChatEncoder) -> Artifact:
    """Fine-tune ``model`` on the data set's chats, or take it as it is; the artifact is a model folder with tokenizer.

    Raises UserError if the loss is not finite at some step.
    """
    train = settings.train
    slot = sft_slot(bench, model, dataset, settings, encoder)

    def build(started: Build) -> None:
        from dppo.models import architecture

        if train is None:
            if bench.is_main:
                save_policy(
                    new_policy(bench, model, None, settings.seed), encoder, started.directory, base=None, bench=bench
                )
            return
        encoded = sft_examples(dataset, train, settings.seed, encoder)
        held_out = nested_subset(dataset.chats("validation"), train.n_evaluation_examples, 0)
        for note in encoded.notes:
            bench.say(f"  sft: {note}")
        ready = ready_to_train(
            bench,
            architecture(model),
            encoded.examples,
            train,
            SFT(),
            seed=settings.seed,
            evaluates=bool(held_out),
            title="sft",
            key="sft.train",
        )
        with ready.watched(bench, "sft", "sft.train"):
            policy = new_policy(bench, model, train.lora, settings.seed)
            outcome = run_training(
                bench,
                policy,
                SFT(),
                encoded.examples,
                ready.settings,
                seed=settings.seed,
                started=started,
                held_out=encoder.encode(held_out, encoded.max_length).examples if held_out else (),
                title="sft",
            )
        if outcome.status == "diverged":
            raise UserError(
                f"sft.train.learning_rate={train.learning_rate}: SFT diverged at step {outcome.steps + 1} "
                f"(examples {', '.join(outcome.example_ids[:3])}); lower the learning rate"
            )
        if bench.is_main:
            save_policy(policy, encoder, started.directory, base=None, bench=bench)
            started.extra["outcome"] = outcome.to_json()

    detail = f"{type(model).__name__}, seed {settings.seed}" + ("" if train is not None else ", not fine-tuned")
    return bench.artifact("sft", slot, detail, build)
