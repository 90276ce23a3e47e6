"""Pinning and downloading from the Hub, against a small server on this machine that speaks the Hub's protocol."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dppo.data.sources import Published
from dppo.data.tables import read_rows
from dppo.errors import UserError
from dppo.hub import local_folder, pinned_commit, snapshot
from dppo.models import PretrainedModel, TinyLlama, save

FIRST, SECOND = "1" * 40, "2" * 40


def parquet(text: str) -> bytes:
    buffer = io.BytesIO()
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), buffer)
    return buffer.getvalue()


Files = dict[str, bytes]


class Hub:
    """What the server knows: repositories with commits, each a set of files, and where ``main`` points."""

    def __init__(self) -> None:
        self.main = FIRST
        self.files: dict[str, dict[str, Files]] = {"datasets/we/chats": {}}
        for commit in (FIRST, SECOND):
            self.files["datasets/we/chats"][commit] = {
                "data/train-00000-of-00001.parquet": parquet(f"train {commit[0]}"),
                "data/test-00000-of-00001.parquet": parquet(f"test {commit[0]}"),
                "data/other-00000-of-00001.parquet": b"never asked for",
            }
        self.downloaded: list[str] = []
        self.drops: list[Literal["close", "reset"]] = []  # how the next downloads end, half of what is left of a file
        self.sent_from: list[int] = []  # the byte that each download began at


def serve(hub: Hub) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def drop_half_way(self, body: bytes) -> None:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            if hub.drops.pop(0) == "reset":  # without a farewell: the other side sees an error
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                os.close(self.connection.detach())

        def answer(self, status: int, body: bytes = b"{}", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET" and "ETag" in headers and hub.drops:
                self.drop_half_way(body)
            elif self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].removeprefix("/api").removeprefix("/").removeprefix("models/")
            repository = next((name for name in hub.files if path.startswith(f"{name}/")), None)
            if path.startswith("we/gated/"):
                return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
            if repository is None:
                return self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            action, revision, *below = path.removeprefix(f"{repository}/").split("/", 2)
            commit = hub.main if revision == "main" else revision
            files = hub.files[repository].get(commit)
            if files is None:
                return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            if action == "revision":
                listed = [{"rfilename": file} for file in files]
                return self.answer(200, json.dumps({"id": repository, "sha": commit, "siblings": listed}).encode())
            if action == "tree":
                tree: list[dict[str, Any]] = [
                    {"type": "file", "path": file, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for file, body in files.items()
                ]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            body = files[below[0]]
            if self.command == "GET":
                hub.downloaded.append(f"{commit[0]}:{below[0]}")
            told = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": commit}
            told["X_Linked_Size"] = str(len(body))
            begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if self.command == "GET":
                hub.sent_from.append(begin)
            if begin:
                told["Content_Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
            return self.answer(206 if begin else 200, body[begin:], **told)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    hub = Hub()
    server = serve(hub)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # it keeps whole chunks of a file
    yield hub
    server.shutdown()
    server.server_close()


def source(path: str = "we/chats", revision: str = "main", **changed: Any) -> Published:
    return replace(Published("dataset.path", path, revision, None, "train", None, "test", "cache"), **changed)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def first_words(file: Path) -> str:
    return str(pq.read_table(file).to_pylist()[0]["messages"][0]["content"])


def test_a_data_set_is_pinned_and_only_its_splits_are_downloaded_once(hub: Hub) -> None:
    assert source().identity()["commit"] == FIRST
    (test,) = source().files("test")
    assert first_words(test) == "test 1"
    source().files("test")
    assert hub.downloaded == ["1:data/test-00000-of-00001.parquet"]


def test_a_branch_that_moves_is_new_data_and_a_commit_stays(hub: Hub) -> None:
    before = source().identity()
    source().files("test")
    hub.main = SECOND
    assert source().identity() != before
    assert first_words(source().files("test")[0]) == "test 2"
    assert first_words(source(revision=FIRST).files("test")[0]) == "test 1"
    assert source(revision=FIRST).identity() == before


def test_without_a_connection_what_was_downloaded_is_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source().identity()
    source().files("test")
    go_offline(monkeypatch)
    assert source().identity() == before
    assert first_words(source().files("test")[0]) == "test 1"
    with pytest.raises(UserError, match=r"dataset\.path=we/chats: .*cannot be reached"):
        source().files("train")


def test_without_a_connection_and_a_copy_there_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline(monkeypatch)
    with pytest.raises(UserError, match=r"dataset\.path=we/chats: .*cannot be reached.*give a local folder"):
        source().identity()
    with pytest.raises(UserError, match=r"model\.name_or_path=we/model: .*cannot be reached"):
        PretrainedModel("we/model", "main", None).load_tokenizer()


def test_a_server_that_is_gone_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached") as caught:
        pinned_commit("we/chats", "dataset", "main", "dataset.path")
    assert "\n" not in str(caught.value)


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    """At once where the server hung up; where the connection broke, one line, and finished files stay."""
    body = parquet(" ".join(hashlib.sha256(bytes([number])).hexdigest() for number in range(250)))
    hub.files["datasets/we/long"] = {FIRST: {"data/test.parquet": body, "data/train.parquet": body[::-1]}}
    hub.drops = ["close"]
    assert [file.read_bytes() for file in source("we/long").files("test")] == [body]
    assert hub.sent_from[0] == 0 and hub.sent_from[1] > len(body) // 2 - 1024
    hub.drops = ["close", "reset"]
    with pytest.raises(UserError, match=r"^dataset\.path=we/long: .*cannot be reached") as caught:
        source("we/long").files("train")
    assert "\n" not in str(caught.value)
    assert hub.drops == [] and not list((tmp_path / "hub").rglob("*.incomplete"))
    hub.downloaded.clear()
    assert [file.read_bytes() for file in source("we/long").files("test")] == [body]
    assert [file.read_bytes() for file in source("we/long").files("train")] == [body[::-1]]
    assert hub.downloaded == ["1:data/train.parquet"]


def test_what_the_hub_refuses_is_one_line(hub: Hub) -> None:
    with pytest.raises(UserError, match=r"model\.name_or_path=nobody/none: the Hugging Face Hub has no such model"):
        pinned_commit("nobody/none", "model", "main", "model.name_or_path")
    with pytest.raises(UserError, match=r"dataset\.path=we/chats: has no revision old"):
        pinned_commit("we/chats", "dataset", "old", "dataset.path")
    with pytest.raises(UserError, match=r"accept its terms at https://huggingface\.co/we/gated"):
        pinned_commit("we/gated", "model", "main", "model.name_or_path")
    with pytest.raises(UserError, match="has no revision 3333"):
        snapshot("we/chats", "dataset", "3" * 40, ["*"], "dataset.path")


def test_a_model_comes_from_the_hub_as_safetensors_only(hub: Hub, tmp_path: Path) -> None:
    made = TinyLlama(16, 32, 1, 2, 1, 64, 10000.0, 0.02)
    save(made.load_model(3), made.load_tokenizer(), tmp_path / "model")
    files = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    others = {"pytorch_model.bin": b"", "consolidated.safetensors": b"", "original/params.json": b"", "run.py": b""}
    hub.files["we/model"] = {FIRST: {**files, **others}}
    model = PretrainedModel("we/model", "main", None)
    identity = model.identity()
    assert (identity["repository"], identity["commit"]) == ("we/model", FIRST)
    loaded, original = model.load_model(0), made.load_model(3)
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), original.parameters(), strict=True))
    assert model.load_tokenizer().chat_template == made.load_tokenizer().chat_template
    assert sorted(hub.downloaded) == sorted(f"1:{name}" for name in files)


def test_a_missing_split_of_a_repository_is_one_line(hub: Hub) -> None:
    with pytest.raises(UserError, match=r"dataset\.path=we/chats: has no split valid \(data/valid-\* or valid-\*"):
        source(train_split="valid").files("train")


def test_a_folder_wins_over_a_repository_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert local_folder("we/chats", "key") is None
    (tmp_path / "we" / "chats").mkdir(parents=True)
    assert local_folder("we/chats", "key") == Path("we/chats")
    for name in ("./gone", "/gone/away", "~/gone/away", "a/b/c", "with space"):
        with pytest.raises(UserError, match="there is no such folder"):
            local_folder(name, "key")


def test_a_repository_in_another_layout_is_kept_as_parquet_by_its_commit(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: test, path: rows/*}\n---\n"
    body = gzip.compress(b'{"messages": [{"role": "user", "content": "odd"}]}\n')
    hub.files["datasets/we/odd"] = {FIRST: {"README.md": readme, "rows/part-1.jsonl.gz": body}}
    odd = source("we/odd", cache_dir=str(tmp_path / "cache"))
    (made,) = odd.files("test")
    assert (first_words(made), made.is_relative_to(tmp_path / "cache")) == ("odd", True)
    hub.downloaded.clear()
    assert odd.files("test") == [made]
    assert hub.downloaded == []
    go_offline(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "gone"))
    assert replace(odd, revision=FIRST).files("test") == [made]


def test_packed_json_lines_of_a_configuration_are_read_where_they_are(hub: Hub, tmp_path: Path) -> None:
    packed = gzip.compress(b'{"chosen": "a", "rejected": "b"}\n')
    files = {f"{name}/train.jsonl.gz": packed for name in ("helpful-base", "harmless-base")}
    hub.files["datasets/we/hh"] = {FIRST: files}
    (train,) = source("we/hh", config="helpful-base", cache_dir=str(tmp_path / "cache")).files("train")
    assert list(read_rows([train], ["chosen"])) == [{"chosen": "a"}]
    assert hub.downloaded == ["1:helpful-base/train.jsonl.gz"]
    assert not (tmp_path / "cache").exists()
