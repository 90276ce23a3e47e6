"""Greedy answers against transformers' batched ``generate`` and, where it is installed, llama.cpp.

``CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36`` compiles it
with AVX2 and nothing newer, which decodes on an AMD EPYC; builds that crash in decoding have been seen.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, alternate_all
from benchmarks.setting import Setting, encoder_of, examples, experiment


def generation(setting: Setting, rounds: int, n_prompts: int = 16, n_new: int = 64) -> list[Row]:
    """Greedy answers of dppo in fp32 and bf16 against transformers' ``generate`` on the same left-padded batch."""
    import torch

    from dppo.generation import Greedy

    encoder = encoder_of(setting)
    model = experiment(setting).model.load_model(0)
    queue = [(one.prompt_id, one.prompt_ids) for one in examples(setting, n_prompts)]
    ends = encoder.end_of_turn_ids
    width = max(len(ids) for _, ids in queue)
    token_ids = torch.zeros(len(queue), width, dtype=torch.int64)
    mask = torch.zeros_like(token_ids)
    for place, (_, ids) in enumerate(queue):
        token_ids[place, width - len(ids) :] = torch.tensor(ids)
        mask[place, width - len(ids) :] = 1
    told: dict[str, dict[str, tuple[int, ...]]] = {}

    def ours(precision: Any) -> Callable[[], object]:
        settings = Greedy(max_new_tokens=n_new, tokens_per_batch=1 << 20, precision=precision)

        def run() -> None:
            told[precision] = {
                answer.prompt_id: answer.token_ids
                for part in settings.generate(model, queue, ends, encoder.decode)
                for answer in part
            }

        return run

    def theirs(precision: str) -> Callable[[], object]:
        # A model in bf16 as a whole, as one would load it: autocast would cast its weights for every token.
        loaded = model if precision == "fp32" else copy.deepcopy(model).to(torch.bfloat16)

        def run() -> None:
            with torch.inference_mode():
                found = loaded.generate(
                    input_ids=token_ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=n_new,
                    eos_token_id=sorted(ends),
                    pad_token_id=0,
                )
            answers = {}
            for (prompt_id, _), row in zip(queue, found[:, width:].tolist(), strict=True):
                end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
                answers[prompt_id] = tuple(row[: end + 1])
            told[f"generate {precision}"] = answers

        return run

    def one_by_one(file: Path) -> Callable[[], object]:
        import llama_cpp

        engine = llama_cpp.Llama(str(file), n_ctx=width + n_new, n_threads=torch.get_num_threads(), verbose=False)

        def run() -> None:
            answers = {}
            for prompt_id, ids in queue:
                answer: list[int] = []
                for token in engine.generate(list(ids), temp=0.0, repeat_penalty=1.0):
                    answer.append(token)
                    if token in ends or len(answer) == n_new:
                        break
                answers[prompt_id] = tuple(answer)
            told["llama.cpp"] = answers

        return run

    others = [(f"generate {precision}", theirs(precision)) for precision in setting.precisions]
    source = getattr(experiment(setting).model, "_source", None)  # a model from a GGUF file
    if source is not None and importlib.util.find_spec("llama_cpp") is not None and _llama_cpp_runs(source()):
        others.append(("llama.cpp", one_by_one(source())))
    rows = []
    firsts = [(f"dppo {precision}", ours(precision)) for precision in setting.precisions]
    for other_way in others:
        for row in alternate_all(f"{n_prompts} answers of {n_new}", firsts, other_way, rounds):
            own, other = told[row.first.split()[-1]], told[row.second]
            n_tokens = sum(map(len, own.values()))
            same = sum(own[key] == other[key] for key in own)
            rows.append(row.noted(f"{n_tokens / row.first_median:.0f} tokens/s, {same} of {len(own)} texts equal"))
    return rows


def _llama_cpp_runs(file: Path) -> bool:
    """Whether it decodes a token on this machine; a build for another processor takes the whole process with it."""
    code = (
        "import sys, llama_cpp; engine = llama_cpp.Llama(sys.argv[1], n_ctx=16, verbose=False); "
        "next(iter(engine.generate([1, 2, 3], temp=0.0)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, check=False)
    if done.returncode:
        print(
            f"  llama.cpp is left out: decoding a token ended with status {done.returncode}; compile it as "
            "benchmarks/generation.py says",
            flush=True,
        )
    return done.returncode == 0
