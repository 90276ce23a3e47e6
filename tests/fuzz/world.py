"""What cases start from: a small model folder, valid data files, and a finished run with its cache."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.conftest import small

REPOSITORY = Path(__file__).resolve().parents[2]
N_ROWS = 30
Row = dict[str, Any]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _chat(number: int, answer: str) -> list[dict[str, str]]:
    return [_turn("user", f"question {number}"), _turn("assistant", answer)]


# A valid row of every schema that is read from local files, by its number.
ROWS: dict[str, Callable[[int], Row]] = {
    "pairs": lambda n: {"prompt": f"question {n}", "chosen": f"yes {n}", "rejected": "no"},
    "chat pairs": lambda n: {"prompt": f"question {n}", "chosen": _chat(n, "yes"), "rejected": _chat(n, "no")},
    "ranked": lambda n: {"prompt": f"question {n}", "responses": ["yes", "no", f"{n}"], "scores": [2.0, 0.5, n]},
    "labelled": lambda n: {"prompt": f"question {n}", "completion": f"yes {n}", "label": n % 2 == 0},
    "chats": lambda n: {"messages": _chat(n, "yes")},
    "scored pairs": lambda n: {
        "chosen": _chat(n, "yes"),
        "rejected": _chat(n, "no"),
        "score_chosen": 7.0,
        "score_rejected": 3.5,
    },
    "transcripts": lambda n: {
        "chosen": f"\n\nHuman: question {n}\n\nAssistant: yes",
        "rejected": f"\n\nHuman: question {n}\n\nAssistant: no",
    },
    "system pairs": lambda n: {
        "system": "Be kind." if n % 2 else "",
        "question": f"question {n}",
        "prompt": f"question {n}",
        "chosen": "yes",
        "rejected": "no",
    },
    "solutions": lambda n: {
        "question": f"question {n}",
        "answer": f"{n} + 500 = <<{n}+500={n + 500}>>{n + 500} in all.\nHalf is less.\n#### 7",
    },
    "options": lambda n: {
        "question": f"question {n}",
        "choices": {"text": ["red", "green", "blue"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    "endings": lambda n: {
        "ind": n,
        "ctx": f"It began so {n}",
        "endings": ["and went on", "and was over", "and rested", "and fell"],
        "label": "2",
        "activity_label": "x",
    },
}
# Words that read a schema from the path {path}; {folder} is a folder in the published layout of that option.
READERS: dict[str, list[list[str]]] = {
    "pairs": [
        ["dataset=pairs_file", "dataset.path={path}", "loss=dpo"],
        ["dataset=trl_preference", "dataset.path={path}"],
    ],
    "chat pairs": [
        ["dataset=pairs_file", "dataset.path={path}", "loss=unll"],
        ["dataset=trl_preference", "dataset.path={path}"],
    ],
    "ranked": [
        ["dataset=ranked_file", "dataset.path={path}", "loss=rrhf"],
        ["dataset=ranked_file", "dataset.path={path}", "loss=dpo"],
    ],
    "labelled": [
        ["dataset=labelled_file", "dataset.path={path}", "loss=kto"],
        ["dataset=kto_labels", "dataset.path={path}", "loss=kto"],
    ],
    "chats": [
        ["dataset=pairs_file", "dataset.path=pairs.jsonl", "dataset.sft_path={path}"],
        ["dataset=ultrachat", "dataset.path={path}", "loss=none"],
        ["dataset=smoltalk", "dataset.path={path}", "loss=none"],
    ],
    "scored pairs": [["dataset=ultrafeedback", "dataset.path={path}", "dataset/chats=own"]],
    "transcripts": [["dataset=hh", "dataset.path={path}"]],
    "system pairs": [["dataset=orca_pairs", "dataset.path={path}"], ["dataset=truthy_dpo", "dataset.path={path}"]],
    "solutions": [["dataset=dpop_gsm8k", "dataset.path={path}"]],
    "options": [["dataset=dpop_arc", "dataset.path={path}"]],
    "endings": [["dataset=dpop_hellaswag", "dataset.path={path}"]],
}
ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".csv.gz", ".json.gz")


def rows(schema: str, n: int = N_ROWS) -> list[Row]:
    return [ROWS[schema](number) for number in range(n)]


def encoded(given: Sequence[Any], ending: str) -> bytes:
    """Rows as a file with this ending; what the format cannot hold is written as its text."""
    packed = ending.endswith(".gz")
    kind = ending.removesuffix(".gz")
    if kind == ".parquet":
        return _parquet(given)
    if kind == ".csv":
        data = _csv(given)
    elif kind == ".json":
        data = json.dumps(list(given)).encode()
    else:
        data = "".join(json.dumps(row) + "\n" for row in given).encode()
    return gzip.compress(data) if packed else data


def _csv(given: Sequence[Any]) -> bytes:
    import csv
    import io

    text = io.StringIO()
    names = list(dict.fromkeys(name for row in given if isinstance(row, dict) for name in row))
    writer = csv.writer(text)
    writer.writerow([name.encode("utf-8", "replace").decode() for name in names])
    for row in given:
        cells = [row.get(name) for name in names] if isinstance(row, dict) else [row]
        writer.writerow([str(cell).encode("utf-8", "replace").decode() for cell in cells])
    return text.getvalue().encode()


def _parquet(given: Sequence[Any]) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    target = io.BytesIO()
    try:
        table = pa.Table.from_pylist([row if isinstance(row, dict) else {"row": str(row)} for row in given])
        pq.write_table(table, target)
    except Exception:  # of columns with several types; then as text
        target = io.BytesIO()
        texts = [
            {str(k): str(v).encode("utf-8", "replace").decode() for k, v in row.items()}
            for row in given
            if isinstance(row, dict)
        ]
        pq.write_table(pa.Table.from_pylist(texts), target)
    return target.getvalue()


def put_inputs(here: Path) -> None:
    """The valid files that command lines may name, each beside the others."""
    for name, schema in (("pairs", "pairs"), ("ranked", "ranked"), ("labelled", "labelled"), ("chats", "chats")):
        (here / f"{name}.jsonl").write_bytes(encoded(rows(schema), ".jsonl"))


def build(place: Path) -> None:
    """Write the model folder and the finished run, once a session."""
    from dppo.data.tiny_tokenizer import build_tokenizer
    from dppo.models import TinyLlama, save

    tiny = TinyLlama(16, 32, 1, 2, 2, 512, 10_000.0, 0.3)
    save(tiny.load_model(0), build_tokenizer(), place / "model")
    (place / "run").mkdir()
    with _inside(place / "run", small("hydra.run.dir=outputs/mine", "loss=dpo", "tracking=jsonl", "device=cpu")):
        import dppo.__main__ as entry

        status = entry.main()
    if status != 0:
        raise RuntimeError(f"the run that cases start from ended with {status}")


@contextlib.contextmanager
def _inside(folder: Path, words: Sequence[str]) -> Iterator[None]:
    before, arguments = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["dppo", *words]
    try:
        yield
    finally:
        os.chdir(before)
        sys.argv = arguments


def copy_model(world: Path, here: Path) -> Path:
    return Path(shutil.copytree(world / "model", here / "model"))


def copy_run(world: Path, here: Path) -> Path:
    """The finished run and its cache, as ``outputs/mine`` and ``outputs/cache``."""
    shutil.copytree(world / "run" / "outputs", here / "outputs", dirs_exist_ok=True)
    return here / "outputs" / "mine"


def copy_cache(world: Path, here: Path) -> None:
    """Only the cache, from which small runs take what they do not change."""
    shutil.copytree(world / "run" / "outputs" / "cache", here / "outputs" / "cache", dirs_exist_ok=True)
