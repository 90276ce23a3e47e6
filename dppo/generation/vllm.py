"""vLLM's offline engine for GPUs, in a process of its own that ends with the stage and leaves the GPUs to training."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dppo.config import require
from dppo.data.draws import stream
from dppo.errors import UserError
from dppo.generation.decoding import Prompts, check_positions, generation_of
from dppo.generation.greedy import Greedy
from dppo.types import Generation, Json

if TYPE_CHECKING:
    import torch

VERSION = 1
_ENGINE = Path(__file__).with_name("vllm_engine.py")
# A process that is not asked any more gets so long to end by itself, and what was killed so long to be gone.
_SECONDS_TO_END = 20.0
# What a launcher tells the processes of this run about one another. vLLM would take it for its own.
_OF_THE_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_INSTALL = "python -m venv vllm-env && vllm-env/bin/pip install vllm"

_log = logging.getLogger("dppo")


@dataclass(frozen=True)
class VLLM:
    """The most likely token at every step, by ``vllm.LLM``: for y_gen and for the answers that are compared.

    ``max_new_tokens`` bounds an answer, its end-of-turn token included. ``precision`` is that of weights and
    activations in the engine. vLLM needs other versions of some packages: ``python`` is the interpreter of the
    environment that it is installed in, null this one. Prompts are handed over ``prompts_per_batch`` at once; that
    many answers are kept together, so that this is what an interruption costs. ``gpu_memory_utilization`` is the share
    of each of ``tensor_parallel_size`` GPUs that weights and cache may take; ``enforce_eager`` does without CUDA graphs
    and compilation, which start slowly and run fast. vLLM's version, precision, parallel size and eager mode decide
    rounding and with it texts: they are part of the cache key.

    Answers of a model in training come from our own decoding, with ``tokens_per_batch``: its weights are in this
    process.
    """

    group: ClassVar[str] = "generation"
    max_new_tokens: int
    tokens_per_batch: int
    precision: Literal["fp32", "bf16"]
    python: str | None
    prompts_per_batch: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    enforce_eager: bool

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "tokens_per_batch", "prompts_per_batch", "tensor_parallel_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        share = self.gpu_memory_utilization
        require(0 < share <= 1, "gpu_memory_utilization", share, "must be > 0 and <= 1, a share of the GPU's memory")

    @property
    def in_training(self) -> Greedy:
        """What answers while a model is in training."""
        return Greedy(self.max_new_tokens, self.tokens_per_batch, self.precision)

    def check(self, device: torch.device) -> None:
        """Raise UserError if vLLM is not installed, or not for this device, or there are too few GPUs."""
        version = self._version()
        for_cpu = "cpu" in version
        if device.type not in ("cpu", "cuda") or for_cpu != (device.type == "cpu"):
            built = "the CPU" if for_cpu else "GPUs"
            raise UserError(
                f"generation=vllm: this run is on {device.type} and vLLM {version} is built for {built}; choose "
                f"{'device=cpu' if for_cpu else 'a machine with a CUDA device'}, or generation=greedy"
            )
        if device.type == "cuda":
            _visible(device, self.tensor_parallel_size)

    def identity(self) -> dict[str, Json]:
        """Everything that decides the texts; raises UserError if vLLM is not installed."""
        return {
            "decoding": "greedy",
            "engine": "vllm",
            "version": VERSION,
            "vllm": self._version(),
            "max_new_tokens": self.max_new_tokens,
            "precision": self.precision,
            "tensor_parallel_size": self.tensor_parallel_size,
            "enforce_eager": self.enforce_eager,
        }

    @contextmanager
    def answering(
        self,
        folder: Path,
        device: torch.device,
        prompts: Prompts,
        end_ids: frozenset[int],
        decode: Callable[[Sequence[int]], str],
    ) -> Iterator[Iterator[list[Generation]]]:
        """Start the engine on the model in ``folder``, a transformers folder; it gives the answers batch by batch.

        Prompts (at least one) are taken in the order of their tokens, so that those that begin alike follow one
        another in the engine's cache. The engine is gone when the block is left, however that happens.
        Raises UserError, one line, for whatever vLLM refuses, and if an answer could grow beyond the model's positions.
        """
        from transformers import AutoConfig

        self.check(device)
        longest = max(len(token_ids) for _, token_ids in prompts)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        check_positions(self.group, self.max_new_tokens, longest, config)
        queue = sorted(prompts, key=lambda prompt: (list(prompt[1]), prompt[0]))
        if device.type == "cuda":
            import torch

            gc.collect()
            torch.cuda.empty_cache()  # what this process keeps for later is memory that the engine can't have
        arguments = {
            "model": str(folder),
            "skip_tokenizer_init": True,  # prompts were encoded with our template, and answers are decoded by us
            "trust_remote_code": False,
            "load_format": "safetensors",
            "generation_config": "vllm",  # not the folder's: what it sets would be added to the sampling below
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[self.precision],
            "max_model_len": longest + self.max_new_tokens,
            "tensor_parallel_size": self.tensor_parallel_size,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enforce_eager": self.enforce_eager,
            "enable_prefix_caching": True,
        }
        sampling = {
            **self._sampling(),
            "max_tokens": self.max_new_tokens,
            "stop_token_ids": sorted(end_ids),
            "ignore_eos": True,  # only those end an answer
            "detokenize": False,
        }
        _log.info("  vLLM %s starts on %s", self._version(), device)
        with _Process(_interpreter(self.python), self._environment(device)) as process:
            process.ask({"engine": arguments, "sampling": sampling})
            yield self._batches(process, queue, end_ids, decode)

    def _batches(
        self,
        process: _Process,
        queue: Prompts,
        end_ids: frozenset[int],
        decode: Callable[[Sequence[int]], str],
    ) -> Iterator[list[Generation]]:
        for start in range(0, len(queue), self.prompts_per_batch):
            batch = queue[start : start + self.prompts_per_batch]
            request = {"prompts": [list(token_ids) for _, token_ids in batch], "seeds": self._seeds(batch)}
            answers: list[list[int]] = process.ask(request)["answers"]
            yield [
                generation_of(prompt_id, answer, end_ids, decode)
                for (prompt_id, _), answer in zip(batch, answers, strict=True)
            ]

    def _sampling(self) -> dict[str, Json]:
        return {"temperature": 0.0}

    def _seeds(self, batch: Prompts) -> list[int] | None:
        """A seed for each prompt; None where nothing is drawn."""
        return None

    def _version(self) -> str:
        python = _interpreter(self.python)
        version = _installed(python)
        if version is None:
            where = "is not installed in this environment" if self.python is None else f"is not installed for {python}"
            raise UserError(
                f"generation=vllm: vLLM {where}; type {_INSTALL}, and add generation.python=vllm-env/bin/python, or "
                "choose generation=greedy"
            )
        return version

    def _environment(self, device: torch.device) -> dict[str, str]:
        found = {
            name: value
            for name, value in os.environ.items()
            if name not in _OF_THE_LAUNCHER and not name.startswith("TORCHELASTIC_")
        }
        if self.python is not None:  # what was put on the path for this interpreter is not for another one
            found.pop("PYTHONPATH", None)
            tools = os.path.dirname(_interpreter(self.python))  # such as ninja, with which kernels are compiled
            found["PATH"] = os.pathsep.join([tools, *filter(None, [found.get("PATH")])])
        if device.type == "cuda":
            found["CUDA_VISIBLE_DEVICES"] = ",".join(_visible(device, self.tensor_parallel_size))
        return {
            **found,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            # The scheduler in the engine's own process: then the same prompts make the same batches.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }


@dataclass(frozen=True)
class VLLMSampledOnce(VLLM):
    """One sampled answer a prompt, drawn by vLLM; a prompt's random numbers depend on ``seed`` and its id alone.

    Two models answer a prompt with the same random numbers: equal models agree, as greedy ones do.
    """

    temperature: float
    top_p: float
    seed: int

    def identity(self) -> dict[str, Json]:
        own: dict[str, Json] = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return {**super().identity(), "decoding": "sampled", **own}

    def _sampling(self) -> dict[str, Json]:
        return {"temperature": self.temperature, "top_p": self.top_p}

    def _seeds(self, batch: Prompts) -> list[int] | None:
        return [int(stream("sampled answer", self.seed, prompt_id, 0).random() * 2**53) for prompt_id, _ in batch]


def _interpreter(python: str | None) -> str:
    if python is None:
        return sys.executable
    found = shutil.which(os.path.expanduser(python))
    if found is None:
        raise UserError(f"generation.python={python}: there is no such program; type {_INSTALL}, and give its Python")
    return os.path.abspath(found)


@functools.lru_cache(maxsize=8)
def _installed(python: str) -> str | None:
    """The version of vLLM that this interpreter has; None if it has none."""
    try:
        done = subprocess.run([python, str(_ENGINE), "--version"], capture_output=True, text=True, check=True)
        found: dict[str, str | None] = json.loads(done.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise UserError(f"generation.python={python}: does not run as a Python interpreter ({error})") from None
    return found["version"]


def _visible(device: torch.device, n: int) -> list[str]:
    """The names of the ``n`` GPUs from ``device`` on, as CUDA_VISIBLE_DEVICES names them to this process."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(place) for place in range(torch.cuda.device_count())]
    first = device.index or 0
    if len(names) < first + n:
        raise UserError(
            f"generation.tensor_parallel_size={n}: this run has {len(names) - first} GPUs from {device} on; choose at "
            "most so many"
        )
    return names[first : first + n]


class _Process:
    """The engine's process and what is said to it; its end is the end of all that it started."""

    def __init__(self, python: str, environment: dict[str, str]) -> None:
        self._python, self._environment = python, environment
        self._failed = False

    def __enter__(self) -> _Process:
        log, self._log = tempfile.mkstemp(prefix="dppo-vllm-", suffix=".log")
        try:
            self._process = subprocess.Popen(
                [self._python, str(_ENGINE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                env=self._environment,
                start_new_session=True,  # a process group of its own: Ctrl-C is for us, and we end the whole group
            )
        finally:
            os.close(log)
        return self

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises UserError, one line that names the log, if there is none."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # it ended; what it said before, or how it ended, comes next
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line.endswith("\n") else {"error": self._how_it_ended()}
        if "error" in found:
            self._failed = True
            raise UserError(f"generation=vllm: {found['error']} (vLLM's log: {self._log})")
        return found

    def _how_it_ended(self) -> str:
        ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        if ended.si_code == os.CLD_EXITED:
            return f"its process ended with status {ended.si_status}"
        hint = ", perhaps for want of memory" if ended.si_status == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(ended.si_status).name}{hint}"

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        # Nobody waits for its status before its group is ended: so long no other group can have its number.
        until = time.monotonic() + _SECONDS_TO_END
        while time.monotonic() < until:
            if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
                break
            time.sleep(0.02)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        until = time.monotonic() + _SECONDS_TO_END
        while _holds_memory(self._process.pid) and time.monotonic() < until:
            time.sleep(0.02)  # killed is not yet gone, and training wants the memory
        self._process.stdout.close()
        if not self._failed:
            os.unlink(self._log)


def _holds_memory(group: int) -> bool:
    """Whether a process of this group is there, and not only its entry that nobody has collected."""
    import psutil

    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False
