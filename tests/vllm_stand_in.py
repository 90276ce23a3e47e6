"""What ``import vllm`` finds where the real one can't be: its names and arguments, with answers made by arithmetic.

``installed`` puts it, in a file of its own, behind an interpreter. ``VLLM_STAND_IN`` in the environment says what goes
wrong: ``refuse``, ``stall`` or ``die`` with a number, in the call of that number. It notes all it is told in the file
``VLLM_STAND_IN_NOTES``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def answer(prompt: Sequence[int], *, seed: int | None, vocabulary: int, ends: Sequence[int], longest: int) -> list[int]:
    """A fixed answer to each prompt and seed, with the token that ended it."""
    written: list[int] = []
    while len(written) < longest:
        digest = hashlib.sha256(json.dumps([list(prompt), written, seed]).encode()).digest()
        written.append(int.from_bytes(digest[:4], "big") % vocabulary)
        if written[-1] in ends:
            break
    return written


def note(what: Mapping[str, Any]) -> None:
    with open(os.environ["VLLM_STAND_IN_NOTES"], "a") as file:
        file.write(json.dumps(what) + "\n")


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool
    seed: int | None
    top_p: float = 1.0


@dataclass
class TokensPrompt:
    prompt_token_ids: list[int]


@dataclass
class CompletionOutput:
    token_ids: tuple[int, ...]


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]


class LLM:
    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool,
        trust_remote_code: bool,
        tensor_parallel_size: int,
        dtype: str,
        gpu_memory_utilization: float,
        enforce_eager: bool,
        load_format: str,
        generation_config: str,
        max_model_len: int,
        enable_prefix_caching: bool,
    ) -> None:
        told = {key: value for key, value in locals().items() if key != "self"}
        if os.environ.get("VLLM_STAND_IN") == "refuse":
            raise ValueError("No available memory for the cache blocks.\nTry increasing it.")
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note({"engine": told, "files": sorted(os.listdir(model)), "pids": [os.getpid(), worker.pid]})
        note({"environment": dict(os.environ)})
        print("vLLM says much on standard output", flush=True)
        self._vocabulary = int(json.loads((Path(model) / "config.json").read_text())["vocab_size"])
        self._n_calls = 0

    def generate(
        self, prompts: Sequence[TokensPrompt], sampling_params: Sequence[SamplingParams], *, use_tqdm: bool
    ) -> list[RequestOutput]:
        note({"prompts": [one.prompt_token_ids for one in prompts], "sampling": [vars(one) for one in sampling_params]})
        self._n_calls += 1
        trouble, _, call = os.environ.get("VLLM_STAND_IN", "").partition(" ")
        if call and self._n_calls == int(call):
            if trouble == "stall":
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        return [
            RequestOutput(
                [
                    CompletionOutput(
                        tuple(
                            answer(
                                one.prompt_token_ids,
                                seed=how.seed,
                                vocabulary=self._vocabulary,
                                ends=how.stop_token_ids,
                                longest=how.max_tokens,
                            )
                        )
                    )
                ]
            )
            for one, how in zip(prompts, sampling_params, strict=True)
        ]


def installed(folder: Path, version: str) -> str:
    """An interpreter in ``folder`` that finds this as vLLM of that version."""
    site = folder / f"site-{version}"
    (site / "vllm").mkdir(parents=True)
    (site / "vllm" / "__init__.py").write_text(Path(__file__).read_text())
    (site / f"vllm-{version}.dist-info").mkdir()
    (site / f"vllm-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    )
    python = folder / f"python-{version}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)
