"""Answers of a small model to twelve prompts by the stage of a run; as a program, stuck after eight, to be killed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from dppo.artifacts import Cache
from dppo.data.encoding import ChatEncoder
from dppo.data.tiny_tokenizer import build_tokenizer
from dppo.generation import VLLM, Greedy
from dppo.models import TinyLlama, save
from dppo.stages import generate as stage
from dppo.stages.workbench import Workbench
from dppo.types import Artifact, Generation, Message, Prompt

PROMPTS = [Prompt(f"prompt-{number}", (Message("user", "a boat " * (number + 1)),)) for number in range(12)]
MODEL = TinyLlama(32, 48, 1, 2, 2, 128, 10_000.0, 0.3)


class Stuck(ChatEncoder):
    """Decodes eight answers and then goes on for ever."""

    n_decoded = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        if self.n_decoded == 8:
            print("stuck", flush=True)
            time.sleep(600)
        self.n_decoded += 1
        return super().decode(token_ids)


def write_model(folder: Path) -> None:
    save(MODEL.load_model(0), build_tokenizer(), folder)


def settings(python: str) -> Greedy | VLLM:
    """Two prompts, or by vLLM four, at a time."""
    if python == "none":
        return Greedy(8, 1, "fp32")
    return VLLM(8, 1, "fp32", python, 4, 1, 0.1, True)


def answered(
    root: Path, folder: Path, using: Greedy | VLLM, kind: type[ChatEncoder] = ChatEncoder
) -> tuple[Workbench, dict[str, Generation]]:
    bench = Workbench(Cache(root), Accelerator(cpu=True))
    model = Artifact("sft", "0" * 64, str(folder), (), reused=True)
    _, found = stage.generate(bench, "y_gen", model, PROMPTS, using, kind(build_tokenizer()))
    return bench, found


if __name__ == "__main__":
    stage._ROWS_PER_SHARD = 4  # by default more answers than a test has time for
    chosen = settings(sys.argv[3])
    answered(Path(sys.argv[1]), Path(sys.argv[2]), chosen, ChatEncoder if isinstance(chosen, VLLM) else Stuck)
