"""Files: data, model folders, run directories and caches that were damaged or made to do harm."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import small
from tests.fuzz.cases import Case
from tests.fuzz.world import ENDINGS, N_ROWS, READERS, ROWS, copy_model, copy_run, encoded, put_inputs, rows

HARD: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, 1e308, -0.0, float("nan"), float("inf"), 10**30, 10**4400, "", " ", "\n\n", "a", "nan",
    "\0", "a\0b", "\ud800", "\udfff", "\ufeff", "\u202e", "\x1b[2J", "\u2028", "é" * 50, "💥", "x" * 100_000, "a b " * 20_000,
    "<|im_end|>", "</s>", "<eos>", "{{ 7 * 7 }}", "{% for x in range(9999999) %}{% endfor %}", "${seed}", "../../x",
    [], {}, [[]], [None], [1], ["a"], [{}], {"a": 1}, [{"role": "user"}], [{"role": "user", "content": None}],
    [{"role": None, "content": "x"}], [{"role": "user", "content": ["x"]}], [{"role": "tool", "content": "x"}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], [{"role": "assistant", "content": "b"}],
    [{"role": "system", "content": "s"}], [{"role": "x" * 1000, "content": "x"}], {"role": "user", "content": "x"},
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], {"text": [], "label": []},
    {"text": ["a"], "label": ["A", "B"]}, {"text": "abc", "label": "ABC"}, {"text": None, "label": None}, ["a"] * 5000,
    "\n\nHuman: x", "\n\nAssistant: x", "\n\nHuman: \n\nAssistant: ", "#### ", "#### 10" + "0" * 5000, "<<1+1=2>>2 #### x",
]  # fmt: skip


def data_case(world: Path, number: int, seed: int) -> Case:
    """One of the kinds of hostile files."""
    rng = random.Random(f"data {seed} {number}")
    kind = rng.choices(
        (_rows_case, _bytes_case, _place_case, _model_case, _run_case, _answers_case, _folder_case),
        weights=(30, 22, 8, 7, 14, 12, 6),
    )[0]
    return kind(world, number, rng)


def _words(rng: random.Random, schema: str, path: str) -> tuple[str, tuple[str, ...]]:
    """A command that reads a file: mostly a plan, sometimes ``inspect`` or a run."""
    chosen = [word.replace("{path}", path) for word in rng.choice(READERS[schema])]
    if "/" not in path and rng.random() < 0.1 and chosen[0].endswith("_file"):
        chosen = [*chosen, f"dataset.test_path={path}"]
    words = [*small(*chosen, "reward=length", "device=cpu"), "sft.train.max_length=null"]
    draw = rng.random()
    if draw < 0.15:
        return "dppo.inspect", tuple(word for word in words if word != "report=false")
    return "dppo", tuple(words if draw < 0.3 else [*words, "dry_run=true"])


def _case(number: int, rng: random.Random, schema: str, path: str, note: str, prepare: Callable[[Path], None]) -> Case:
    command, words = _words(rng, schema, path)

    def put(here: Path) -> None:
        put_inputs(here)
        prepare(here)

    return Case("data", number, command, words, put, note=note)


def _rows_case(world: Path, number: int, rng: random.Random) -> Case:
    """Rows whose values, names or types are not those of their schema."""
    schema, ending = rng.choice(list(ROWS)), rng.choice(ENDINGS)
    made: list[Any] = rows(schema, rng.choice((N_ROWS, N_ROWS, N_ROWS, 1, 2, 3)))
    notes = []
    everywhere = rng.random() < 0.3
    name, value = rng.choice(list(made[0])), rng.choice(HARD)
    for _ in range(rng.choice((1, 1, 2, 5))):
        places = range(len(made)) if everywhere else [rng.randrange(len(made))]
        how = rng.random()
        for place in places:
            row = made[place]
            if not isinstance(row, dict):
                continue
            if how < 0.6:
                row[name] = value
            elif how < 0.7:
                row.pop(name, None)
            elif how < 0.78:
                row[rng.choice(("", name.upper(), "\0", "é", "x" * 300, f"{name} "))] = row.pop(name, None)
            elif how < 0.9:
                row[name] = _inside(rng, row.get(name), value)
            else:
                made[place] = value
        notes.append(f"{'all' if everywhere else 'a'} {name} {how:.1f} {repr(value)[:60]}")
        name, value = rng.choice(list(ROWS[schema](0))), rng.choice(HARD)
    data = encoded(made, ending)
    path = f"data{ending}"
    note = f"{schema}{ending}: {'; '.join(notes)}"
    return _case(number, rng, schema, path, note, lambda here: _write(here / path, data))


def _inside(rng: random.Random, old: Any, value: Any) -> Any:
    if isinstance(old, list) and old:
        place = rng.randrange(len(old))
        if isinstance(old[place], dict):
            return [*old[:place], {**old[place], rng.choice(("role", "content")): value}, *old[place + 1 :]]
        return [*old[:place], value, *old[place + 1 :]]
    if isinstance(old, dict) and old:
        return {**old, rng.choice(list(old)): value}
    return [old, value]


def _bytes_case(world: Path, number: int, rng: random.Random) -> Case:
    """Files whose bytes were cut, altered, or never were what the name says."""
    schema, ending = rng.choice(list(ROWS)), rng.choice(ENDINGS)
    data, how = damaged(rng, encoded(rows(schema), ending), ending)
    path = f"data{rng.choice((ending, ending, ending, ending, *ENDINGS))}"
    return _case(
        number, rng, schema, path, f"{schema}{ending} as {path}: {how}", lambda here: _write(here / path, data)
    )


def damaged(rng: random.Random, data: bytes, ending: str = "") -> tuple[bytes, str]:
    """Bytes after one kind of damage, and its name."""
    place = rng.randrange(max(len(data), 1))
    packed = ending.endswith(".gz")
    text = gzip.decompress(data) if packed else data

    def again(new: bytes) -> bytes:
        return gzip.compress(new) if packed else new

    def flipped(times: int) -> bytes:
        found = bytearray(data)
        for _ in range(times):
            if found:
                found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
        return bytes(found)

    depth = rng.choice((100, 5_000, 200_000))
    ways: dict[str, Callable[[], bytes]] = {
        "cut": lambda: data[:place],
        "cut inside": lambda: again(text[: rng.randrange(max(len(text), 1))]),
        "first lost": lambda: data[place:],
        "a bit": lambda: flipped(1),
        "bits": lambda: flipped(rng.choice((3, 20, 200))),
        "late bits": lambda: data[:-20] + bytes(byte ^ rng.randrange(256) for byte in data[-20:]),
        "zeros": lambda: data[:place] + bytes(50) + data[place + 50 :],
        "inserted": lambda: data[:place] + rng.randbytes(7) + data[place:],
        "NUL": lambda: again(text[:place] + b"\0" + text[place:]),
        "empty": lambda: b"",
        "blank": lambda: again(b"\n \n\t\n"),
        "BOM": lambda: again(b"\xef\xbb\xbf" + text),
        "two BOMs": lambda: again(b"\xef\xbb\xbf" * 2 + text),
        "UTF-16": lambda: again(text.decode("utf-8", "replace").encode("utf-16")),
        "UTF-32": lambda: again(text.decode("utf-8", "replace").encode("utf-32")),
        "Latin-1": lambda: again(text.replace(b"yes", "j\xe4".encode("latin-1"))),
        "CR": lambda: again(text.replace(b"\n", b"\r")),
        "CRLF": lambda: again(text.replace(b"\n", b"\r\n")),
        "deep lists": lambda: again(b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}\n" + text),
        "deep objects": lambda: again(b'{"prompt": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}\n" + text),
        "unclosed": lambda: again(b"[" * depth + text),
        "digits": lambda: again(text.replace(b"0", b"9" * 5000, 1)),
        "huge exponent": lambda: again(text.replace(b"0", b"1e999999", 1)),
        "NaN": lambda: again(text.replace(b'"yes"', b"NaN")),
        "twice": lambda: again(text.replace(b'{"', b'{"prompt": 1, "chosen": 2, "', 1)),
        "quotes": lambda: again(text.replace(b'"', b"", 1)),
        "one line": lambda: again(text.replace(b"\n", b" ")),
        "no rows": lambda: again(text.split(b"\n")[0] + b"\n" if b"," in text[:40] else b"[]"),
        "escape": lambda: again(text.replace(b"yes", b"\\ud83d\\u0000\\uDEAD")),
        "gzip of gzip": lambda: gzip.compress(data),
        "bomb": lambda: gzip.compress(bytes(3_000_000)),
        "random": lambda: rng.randbytes(300),
        "pickle": lambda: b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "html": lambda: b"<!DOCTYPE html><html>Sign in</html>\n",
        "pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n",
        "trailing comma": lambda: again(text.replace(b"}", b",}", 1)),
        "long line": lambda: again(b'{"prompt": "' + b"x" * 2_000_000 + b'"}\n'),
    }
    how = rng.choice(list(ways))
    return ways[how](), how


def _place_case(world: Path, number: int, rng: random.Random) -> Case:
    """What is no readable file: folders, pipes, links in circles, devices, other users' files."""
    schema, ending = rng.choice(list(ROWS)), rng.choice(ENDINGS)
    valid = encoded(rows(schema), ending)
    forbidden = f"data.forbidden{ending}"
    ways: dict[str, tuple[str, Callable[[Path], None]]] = {
        "folder": (f"d{ending}", lambda here: (here / f"d{ending}").mkdir()),
        "pipe": (f"p{ending}", lambda here: os.mkfifo(here / f"p{ending}")),
        "link to itself": (f"l{ending}", lambda here: (here / f"l{ending}").symlink_to(f"l{ending}")),
        "link to nothing": (f"l{ending}", lambda here: (here / f"l{ending}").symlink_to("nowhere")),
        "link to a file": (f"l{ending}", lambda here: _linked(here, ending, valid)),
        "link to a device": (f"l{ending}", lambda here: (here / f"l{ending}").symlink_to("/dev/zero")),
        "link to memory": (f"l{ending}", lambda here: (here / f"l{ending}").symlink_to("/proc/self/mem")),
        "other user's": (forbidden, lambda here: _closed(here / forbidden, valid)),
        "other user's folder": (f"x.forbidden/d{ending}", lambda here: _closed(here / "x.forbidden", valid, f"d{ending}")),
        "below a file": (f"pairs.jsonl/d{ending}", lambda here: None),
        "long name": ("x" * 300 + ending, lambda here: None),
        "long path": ("x/" * 3000 + ending, lambda here: None),
        "NUL": (f"'a\0b{ending}'", lambda here: None),
        "unknown ending": ("data.xyz", lambda here: _write(here / "data.xyz", valid)),
        "no ending": ("data", lambda here: _write(here / "data", valid)),
        "ending alone": (ending, lambda here: _write(here / ending, valid)),
        "odd name": (f"'a b é\u2028💥{ending}'", lambda here: _write(here / f"a b é\u2028💥{ending}", valid)),
        "home": (f"'~nobodyhere/d{ending}'", lambda here: None),
        "URL": (f"'https://127.0.0.1:9/d{ending}'", lambda here: None),
        "glob": (f"'*{ending}'", lambda here: _write(here / f"d{ending}", valid)),
    }  # fmt: skip
    how = rng.choice(list(ways))
    path, prepare = ways[how]
    return _case(number, rng, schema, path, f"{schema}{ending}: {how}", prepare)


def _folder_case(world: Path, number: int, rng: random.Random) -> Case:
    """A local copy of a published data set in which something is not as it should be."""
    schema, option, split, test = rng.choice((
        ("scored pairs", ["dataset=ultrafeedback", "dataset/chats=own"], "train_prefs", "test_prefs"),
        ("pairs", ["dataset=trl_preference"], "train", "test"),
        ("labelled", ["dataset=kto_labels", "loss=kto"], "train", "test"),
        ("chats", ["dataset=ultrachat", "loss=none"], "train_sft", "test_sft"),
        ("system pairs", ["dataset=orca_pairs"], "orca_rlhf", None),
    ))  # fmt: skip
    ending = rng.choice(ENDINGS)
    good = encoded(rows(schema), ending)
    bad, how = damaged(rng, good, ending)
    readme = rng.choice((
        None,
        None,
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: x/*{ending}\n---\n",
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: ../../*\n---\n",
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: /etc/passwd\n---\n",
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: {split}\n    path: http://127.0.0.1:9/x\n---\n",
        "---\nconfigs: !!python/object/apply:os.system ['touch pwned']\n---\n",
        "---\nconfigs: [\n---\n",
        "---\nconfigs: 1\n---\n",
        "---\nconfigs: {a: &a [*a]}\n---\n",
        "---\n" + "[" * 3000 + "\n---\n",
    ))  # fmt: skip
    script = rng.random() < 0.2

    def put(here: Path) -> None:
        put_inputs(here)
        folder = here / "set"
        inner = "x/" if readme else rng.choice(("data/", "", f"{split}/"))
        _write(folder / f"{inner}{split}-00000-of-00001{ending}", bad if rng.random() < 0.6 else good)
        if test is not None and rng.random() < 0.8:
            _write(folder / f"{inner}{test}-00000-of-00001{ending}", encoded(rows(schema), ending))
        if readme is not None:
            _write(folder / "README.md", readme.replace("{split}", split).replace("{ending}", ending).encode())
        if script:
            _write(folder / "set.py", b"import pathlib\npathlib.Path('pwned').touch()\n")

    words = small(*option, "dataset.path=set", "reward=length", "device=cpu")
    words = [*words, "dry_run=true"] if rng.random() < 0.7 else words
    return Case("data", number, "dppo", tuple(words), put, note=f"folder {schema}{ending}: {how}, {str(readme)[:90]!r}")


_TEMPLATES = [
    "", "{{", "{% for %}", "{% raise %}", "{{ raise_exception('no') }}", "{{ messages[99].content }}", "{{ 1 // 0 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "{{ self._TemplateReference__context }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os.system('x') }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{% for a in range(999999999) %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ 'x' * 999999999999 }}", "{{ 'x' * 300000000 }}", "{{ 9 ** 9 ** 9 }}",
    "{% set ns = namespace(x=1) %}{% for i in range(90) %}{% set ns.x = ns.x * ns.x + ns.x + 9 %}{% endfor %}{{ ns.x }}",
    "{{ '%999999999d' % 1 }}", "{{ '{:>999999999}'.format(1) }}", "{{ ('x' * 99999) | center(999999999) }}", "no messages at all",
    "{{ messages }}", "{{ messages[0].content }}", "\0", "{{ strftime_now('%' * 99999) }}", "{{ messages | tojson(indent=99999999) }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}" * 3000, "{% if true %}" * 3000 + "{% endif %}" * 3000, "{{ [messages] | sum }}",
    "{% generation %}x", "{{ lipsum.__globals__ }}", "{{ undefined.x }}", "{{ messages | map(attribute='__class__') | list }}",
]  # fmt: skip


def _model_case(world: Path, number: int, rng: random.Random) -> Case:
    """A model folder with a damaged or hostile file."""
    name = rng.choice(("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                       "model.safetensors", "template", "template", "template", "remote code", "pickle"))  # fmt: skip
    extra: list[str] = []
    if name == "template":
        template = rng.choice(_TEMPLATES)
        how = template[:80]
        extra = ["model.chat_template=t.jinja"] if rng.random() < 0.5 else []

        def change(folder: Path) -> None:
            _write(folder / "chat_template.jinja", template.encode())
            _write(folder.parent / "t.jinja", template.encode())

    elif name == "remote code":
        how = "auto_map"
        architecture = rng.choice(("Mine", "LlamaForCausalLM"))
        kind = rng.choice(("mine", "llama"))

        def change(folder: Path) -> None:
            _alter(folder / "config.json", {
                "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine", "AutoTokenizer": ["code.Mine", None]},
                "architectures": [architecture],
                "model_type": kind,
            })  # fmt: skip
            _alter(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Mine", None]}})
            _write(folder / "code.py", b"import pathlib\npathlib.Path('pwned').touch()\nclass Mine: pass\n")

    elif name == "pickle":
        how = "pytorch_model.bin"

        def change(folder: Path) -> None:
            (folder / "model.safetensors").unlink()
            _write(folder / "pytorch_model.bin", b"cposix\nsystem\n(S'touch pwned'\ntR.")

    elif name == "model.safetensors":
        header, how = _header(rng)

        def change(folder: Path) -> None:
            data = (folder / name).read_bytes()
            _write(folder / name, header(data))

    else:
        draw, value = rng.random(), rng.choice(HARD)
        how = f"{draw:.2f} {repr(value)[:60]}"
        state = rng.getrandbits(64)

        def change(folder: Path) -> None:
            inner = random.Random(state)
            file = folder / name
            if draw < 0.4 or not file.exists():
                data = file.read_bytes() if file.exists() else b"{}"
                _write(file, damaged(inner, data)[0])
                return
            content = json.loads(file.read_bytes())
            _replace(inner, content, value)
            _write(file, encoded([content], ".json")[1:-1])

    def put(here: Path) -> None:
        put_inputs(here)
        change(copy_model(world, here))

    words = ["model=pretrained", "model.name_or_path=model", *extra, "device=cpu"]
    chosen = rng.choice(
        (
            ["sft=none"],
            [],
            ["dataset=pairs_file", "dataset.path=pairs.jsonl", "reward=length"],
            ["reward=classifier", "reward.name_or_path=model"],
        )
    )
    words = small(*words, *chosen)
    if rng.random() < 0.5:
        words.append("dry_run=true")
    return Case("data", number, "dppo", tuple(words), put, note=f"model {name}: {how}")


def _replace(rng: random.Random, content: Any, value: Any) -> None:
    """Put a value somewhere into nested lists and mappings."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(content[key], (dict, list)) and content[key] and rng.random() < 0.7:
            content = content[key]
            continue
        content[key] = value
        return


def _alter(file: Path, changes: dict[str, Any]) -> None:
    _write(file, json.dumps({**json.loads(file.read_bytes()), **changes}).encode())


def _header(rng: random.Random) -> tuple[Callable[[bytes], bytes], str]:
    def of(text: bytes, size: int | None = None) -> Callable[[bytes], bytes]:
        return lambda data: struct.pack("<Q", len(text) if size is None else size) + text

    place = rng.random()
    ways: dict[str, Callable[[bytes], bytes]] = {
        "huge header": of(b"{}", 2**62),
        "no JSON": of(b"nope"),
        "empty": of(b"{}"),
        "overlap": of(json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 10**12]}}).encode()),
        "negative": of(json.dumps({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}).encode()),
        "overflow": of(json.dumps({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}).encode()),
        "other dtype": lambda data: data.replace(b'"F32"', b'"I64"'),
        "unknown dtype": lambda data: data.replace(b'"F32"', b'"Q99"'),
        "cut": lambda data: data[: int(len(data) * place)],
        "zero bytes": lambda data: b"",
        "other names": lambda data: data.replace(b"model.layers", b"model.lay3rs"),
        "NaN": lambda data: data[: len(data) // 2] + struct.pack("<f", float("nan")) * 4 + data[len(data) // 2 + 16 :],
        "all NaN": lambda data: data[: 8 + struct.unpack("<Q", data[:8])[0]] + b"\xff" * (len(data) - 8 - struct.unpack("<Q", data[:8])[0]),
    }  # fmt: skip
    how = rng.choice(list(ways))
    return ways[how], how


_COMMANDS = (
    ("dppo.report", ("outputs",), (0,)),
    ("dppo.compare", ("outputs", "--n-bootstrap", "100"), (0,)),
    ("dppo.compare", ("outputs/mine", "outputs/other", "--n-bootstrap", "100"), (0,)),
    ("dppo.compare", ("outputs", "--ranking", "--n-bootstrap", "100"), (0,)),
    ("dppo.evaluate", ("outputs/mine", "--n-bootstrap", "100"), (0,)),
    ("dppo.export", ("outputs/mine", "--model", "outputs/exported"), (0,)),
    ("dppo.export", ("outputs/mine", "--alpaca-eval", "outputs/p.json"), (0,)),
    ("dppo.cache", ("ls",), (0,)),
    ("dppo.cache", ("verify",), (0, 1)),
    ("dppo.cache", ("verify", "--remove"), (0, 1)),
    ("dppo.cache", ("gc", "--grace", "0"), (0,)),
    ("dppo.cache", ("gc", "--all", "--grace", "0", "--dry-run"), (0,)),
    ("dppo.sync", ("outputs", "--dry-run"), (0,)),
    ("dppo", ("init_from=outputs/mine", *small("loss=dpo", "device=cpu")), (0,)),
    ("dppo", ("init_from=outputs/mine", *small("loss=dpo", "device=cpu"), "dry_run=true"), (0,)),
    ("dppo", tuple(small("loss=dpo", "device=cpu", "hydra.run.dir=outputs/again")), (0,)),
)


def _run_case(world: Path, number: int, rng: random.Random) -> Case:
    """A finished run or its cache with a damaged file, and every command that reads it."""
    command, words, statuses = rng.choice(_COMMANDS)
    words = tuple(word for word in words if not word.startswith("sft.")) if words[0].startswith("init_from") else words
    in_cache = command == "dppo.cache" or (command == "dppo" and rng.random() < 0.7) or rng.random() < 0.2
    draw, value, state = rng.random(), rng.choice(HARD), rng.getrandbits(64)
    picked = rng.random()
    note = f"{command} {words[0]} {'cache' if in_cache else 'run'} {picked:.2f} {draw:.2f} {repr(value)[:50]}"

    def put(here: Path) -> None:
        inner = random.Random(state)
        run = copy_run(world, here)
        copied = copy_run(world, here / "x")
        copied.rename(here / "outputs" / "other")
        shutil.rmtree(here / "x")
        top = here / "outputs" / "cache" if in_cache else run
        files = sorted(path for path in top.rglob("*") if path.is_file() and path.suffix != ".lock")
        target = files[int(picked * len(files))]
        if draw < 0.5:
            _write(target, damaged(inner, target.read_bytes())[0])
        elif draw < 0.9 and target.suffix in (".json", ".jsonl", ".yaml"):
            _edit(inner, target, value)
        elif draw < 0.94:
            target.unlink()
        elif draw < 0.96:
            target.unlink()
            target.mkdir()
        elif draw < 0.98:
            target.unlink()
            target.symlink_to(target.name)
        else:
            target.unlink()
            os.mkfifo(target)

    return Case("data", number, command, words, put, statuses, note)


def _edit(rng: random.Random, target: Path, value: Any) -> None:
    """Replace one value of a JSON or YAML file."""
    import yaml

    text = target.read_text()
    if target.suffix == ".yaml":
        content = yaml.safe_load(text)
        _replace(
            rng, content, value if not isinstance(value, str) else value.replace("\ud800", "").replace("\udfff", "")
        )
        target.write_bytes(yaml.safe_dump(content).encode("utf-8", "surrogatepass"))
        return
    lines = text.splitlines() if target.suffix == ".jsonl" else [text]
    place = rng.randrange(max(len(lines), 1))
    try:
        content = json.loads(lines[place])
    except (ValueError, IndexError):
        return
    if isinstance(content, (dict, list)):
        _replace(rng, content, value)
    lines[place] = encoded([content], ".json")[1:-1].decode()
    target.write_text("\n".join(lines) + "\n")


def _answers_case(world: Path, number: int, rng: random.Random) -> Case:
    """Judged pairs and scored answers for ``python -m dppo.evaluate``, and questions for ``export``."""
    ending = rng.choice(ENDINGS)
    judged = [
        {"preference": 1 + n % 2, "output_1": "no", "output_2": f"yes {n}", "generator_1": "a", "generator_2": "b",
         "instruction": f"question {n}", "instruction_difficulty": 0.1 * n}
        for n in range(N_ROWS)
    ]  # fmt: skip
    scored = [
        {"prompt": f"question {n}", "policy_reward": n / 7, "reference_reward": 0.5, "policy_answer": "a", "reference_answer": "b"}
        for n in range(N_ROWS)
    ]  # fmt: skip
    single = [{"prompt": f"question {n}", "reward": n / 7, "answer": "a"} for n in range(N_ROWS)]
    path = f"f{ending}"
    kind, made, words = rng.choice((
        ("judged", judged, ["--preferences", path]),
        ("judged", judged, ["--preferences", path, "--weights", "w.csv", "--model", "b"]),
        ("scored", scored, ["--scores", path]),
        ("single", single, ["--scores", path, "--against", "other.jsonl"]),
    ))  # fmt: skip
    given: list[Any] = [dict(row) for row in made]
    if rng.random() < 0.5:
        for _ in range(rng.choice((1, 3))):
            name, value = rng.choice(list(made[0])), rng.choice(HARD)
            for place in range(len(given)) if rng.random() < 0.3 else [rng.randrange(len(given))]:
                given[place][name] = value
        data, how = encoded(given, ending), f"{name} {repr(value)[:60]}"
    else:
        data, how = damaged(rng, encoded(given, ending), ending)
    weights = [{"instruction_difficulty": 0.1 * n, "b": 0.3, "": "x"} for n in range(N_ROWS)]

    def put(here: Path) -> None:
        _write(here / path, data)
        _write(here / "other.jsonl", encoded(single, ".jsonl"))
        _write(here / "w.csv", encoded(weights, ".csv"))

    return Case(
        "data",
        number,
        "dppo.evaluate",
        (*words, "--n-bootstrap", "100", "--json", "outputs.json"),
        put,
        note=f"answers {kind}{ending}: {how}",
    )


def _linked(here: Path, ending: str, data: bytes) -> None:
    _write(here / f"v{ending}", data)
    (here / f"l{ending}").symlink_to(f"v{ending}")


def _closed(path: Path, data: bytes, inside: str = "") -> None:
    """A file, or with ``inside`` a folder, that only its owner may read."""
    _write(path / inside if inside else path, data)
    path.chmod(0o700 if inside else 0o600)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
