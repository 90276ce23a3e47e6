"""Policies and tokenizers: what to start from, and how a trained model is written and read.

Weights are safetensors, in fp32 and on the CPU when loaded. Code from a model's repository is never run. Pad ids are
used nowhere: several models pad with the token that ends a turn.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, runtime_checkable

from dppo.config import require
from dppo.digests import content_digest
from dppo.errors import UserError, first_line
from dppo.hub import local_folder, pinned_commit, snapshot, typed_path
from dppo.types import Json

if TYPE_CHECKING:
    from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1

logger = logging.getLogger("dppo.models")

# What a model folder is made of: configuration, tokenizer, chat template, weights.
_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")


@runtime_checkable
class Model(Protocol):
    """Where training starts: a frozen dataclass of settings with these methods."""

    def identity(self) -> dict[str, Json]:
        """Everything that determines tokenizer and weights, the seed apart; part of cache fingerprints."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with its chat template, if it has one."""

    def load_model(self, seed: int) -> PreTrainedModel:
        """A new copy of the model in fp32 on the CPU; ``seed`` draws the weights of models that begin untrained."""


@dataclass(frozen=True)
class TinyLlama:
    """A Llama of about a million parameters with random weights, and the embedded tokenizer. Needs no download."""

    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    max_positions: int
    rope_theta: float
    initializer_std: float

    def __post_init__(self) -> None:
        for key in ("hidden_size", "intermediate_size", "n_layers", "n_heads", "n_key_value_heads", "max_positions"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        require(
            self.hidden_size % (2 * self.n_heads) == 0,
            "hidden_size",
            self.hidden_size,
            f"must be a multiple of 2 * n_heads = {2 * self.n_heads}",
        )
        require(
            self.n_heads % self.n_key_value_heads == 0,
            "n_key_value_heads",
            self.n_key_value_heads,
            f"must divide n_heads={self.n_heads}",
        )
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "must be > 0")
        require(self.initializer_std > 0, "initializer_std", self.initializer_std, "must be > 0")

    def identity(self) -> dict[str, Json]:
        """The sizes, and a hash of the tokenizer."""
        import hashlib

        from dppo.data.tiny_tokenizer import build_tokenizer

        tokenizer = build_tokenizer().backend_tokenizer.to_str()
        digest = hashlib.sha256(tokenizer.encode()).hexdigest()[:32]
        return {"model": "tiny_llama", "version": VERSION, "tokenizer": digest, **asdict(self)}

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that is built from the embedded data sets."""
        from dppo.data.tiny_tokenizer import build_tokenizer

        tokenizer = build_tokenizer()
        tokenizer.model_max_length = self.max_positions
        return tokenizer

    def architecture(self) -> LlamaConfig:
        """The configuration of transformers."""
        from transformers import LlamaConfig

        tokenizer = self.load_tokenizer()
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_key_value_heads,
            max_position_embeddings=self.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            initializer_range=self.initializer_std,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    def load_model(self, seed: int) -> PreTrainedModel:
        """Random weights from ``seed``; the global random state is left as it was."""
        import torch
        from transformers import LlamaForCausalLM

        config = self.architecture()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
        return cast("PreTrainedModel", model.eval())


def folder_identity(name_or_path: str, revision: str, key: str) -> dict[str, Json]:
    """The commit of a repository, or a hash of a folder's files. Raises UserError, naming ``key``, if there is none."""
    folder = local_folder(name_or_path, key)
    if folder is None:
        return {"repository": name_or_path, "commit": pinned_commit(name_or_path, "model", revision, key)}
    files = sorted({file for pattern in _PATTERNS for file in folder.glob(pattern)})
    return {"files": [file.name for file in files], "content": content_digest(files)}


def model_folder(name_or_path: str, revision: str, key: str) -> Path:
    """The folder of a model, downloaded if it is a repository. Raises UserError, naming ``key``."""
    folder = local_folder(name_or_path, key)
    if folder is None:
        folder = snapshot(name_or_path, "model", pinned_commit(name_or_path, "model", revision, key), _PATTERNS, key)
    return folder


@dataclass(frozen=True)
class PretrainedModel:
    """A causal LM that transformers knows, from a repository of the Hugging Face Hub or a folder in its layout.

    ``revision`` is a branch, tag or commit of a repository. ``chat_template`` is a file with a Jinja template that
    replaces the tokenizer's, or None.
    """

    name_or_path: str
    revision: str
    chat_template: str | None

    def identity(self) -> dict[str, Json]:
        """The commit of a repository, or a hash of a folder's files. Raises UserError if there is no such model."""
        content = folder_identity(self.name_or_path, self.revision, "model.name_or_path")
        return {"model": "pretrained", "version": VERSION, "template": self._template(), **content}

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises UserError if it cannot be found or loaded."""
        tokenizer = _load_tokenizer(self._folder(), f"model.name_or_path={self.name_or_path}")
        template = self._template()
        if template is not None:
            tokenizer.chat_template = template
        return tokenizer

    def load_model(self, seed: int) -> PreTrainedModel:
        """The pretrained weights; ``seed`` is not used. Raises UserError if they cannot be found or loaded."""
        return _load_model(self._folder(), f"model.name_or_path={self.name_or_path}")

    def _folder(self) -> Path:
        return model_folder(self.name_or_path, self.revision, "model.name_or_path")

    def _template(self) -> str | None:
        if self.chat_template is None:
            return None
        try:
            file = typed_path(self.chat_template)
            if file.exists() and not file.is_file():  # reading a pipe would wait for a writer
                raise UserError(f"model.chat_template={self.chat_template}: is no file")
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"model.chat_template={self.chat_template}: cannot be read ({error})") from None


@dataclass(frozen=True)
class GgufModel:
    """A causal LM from a GGUF file, dequantised to fp32 once and kept below ``cache_dir`` as a transformers folder.

    ``file`` is a path or, with ``package``, the name of a file that this Python package holds; ``install`` is
    the command that installs the package.
    """

    file: str
    package: str | None
    install: str | None
    cache_dir: str

    def identity(self) -> dict[str, Json]:
        """A hash of the file. Raises UserError if it is missing."""
        return {"model": "gguf", "version": VERSION, "content": content_digest([self._source()])}

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer from the file, without converting the weights. Raises UserError if the file is not readable."""
        source, name = self._source(), f"model.file={self.file}"
        if (folder := self._place(source)).is_dir():
            return _load_tokenizer(folder, name)
        with tempfile.TemporaryDirectory() as written:  # as the converted folder will hold it
            self._read_tokenizer(source).save_pretrained(written)
            return _load_tokenizer(Path(written), name)

    def load_model(self, seed: int) -> PreTrainedModel:
        """The dequantised weights; ``seed`` is not used. Raises UserError if the file is missing or not readable."""
        return _load_model(self._folder(), f"model.file={self.file}")

    def _source(self) -> Path:
        folder = Path()
        if self.package is not None:
            found = importlib.util.find_spec(self.package)  # not imported: such packages import their own runtime
            if found is None or found.origin is None:
                raise UserError(
                    f"model.package={self.package}: is not installed; {self.install or 'install it with pip'}"
                )
            folder = Path(found.origin).parent
        file = folder / typed_path(self.file)
        if not file.is_file():
            there = ", ".join(sorted(other.name for other in file.parent.glob("*.gguf"))) or "no GGUF file"
            raise UserError(f"model.file={self.file}: there is no such file in {file.parent} (found {there})")
        return file

    def _place(self, source: Path) -> Path:
        """Where the converted model is or will be."""
        return Path(self.cache_dir) / f"gguf-{VERSION}-{content_digest([source])}"

    def _read_tokenizer(self, source: Path) -> PreTrainedTokenizerBase:
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"model.file={self.file}: reading GGUF needs a package: pip install gguf")
        from transformers import AutoTokenizer

        with _one_line_errors(f"model.file={self.file}"), _no_progress_bars(), redirect_stderr(io.StringIO()):
            found = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
        return cast("PreTrainedTokenizerBase", found)

    def _folder(self) -> Path:
        """The converted model, made now if this is its first use."""
        source = self._source()
        folder = self._place(source)
        if folder.is_dir():  # it gets its name by a rename when it is complete
            return folder
        from filelock import FileLock

        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):  # others that start at the same time wait for one conversion
                if not folder.is_dir():
                    self._convert(source, folder)
        except PermissionError as error:
            raise UserError(f"{error.filename}: not writable; choose another cache.dir") from None
        return folder

    def _convert(self, source: Path, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        logger.info("dequantising %s once into %s; this takes about half a minute", source.name, folder)
        tokenizer = self._read_tokenizer(source)
        # Its progress bar cannot be turned off, only sent elsewhere.
        with _one_line_errors(f"model.file={self.file}"), _no_progress_bars(), redirect_stderr(io.StringIO()):
            quantised = AutoModelForCausalLM.from_pretrained(
                str(source.parent), gguf_file=source.name, dtype=torch.float32
            )
            # A model that was read from GGUF refuses to be saved; one made from its configuration does not.
            config = type(quantised.config).from_dict(
                {key: value for key, value in quantised.config.to_dict().items() if key != "quantization_config"}
            )
            plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            plain.load_state_dict(quantised.state_dict())
        building = folder.with_name(f".{folder.name}-building")
        shutil.rmtree(building, ignore_errors=True)  # what a killed conversion left
        save(plain, tokenizer, building)
        building.rename(folder)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write model and tokenizer as a folder that ``from_pretrained`` of transformers reads: safetensors and JSON."""
    with _no_progress_bars():
        model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def load_saved(path: Path) -> PreTrainedModel:
    """The model of a folder written by ``save``, in fp32 on the CPU. Raises UserError if it cannot be loaded."""
    return _load_model(path, str(path))


def saved_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder written by ``save``. Raises UserError if it cannot be loaded."""
    return _load_tokenizer(path, str(path))


def architecture(model: Model) -> PretrainedConfig | None:
    """A model's configuration, without loading a weight; None where that is not known."""
    if isinstance(model, TinyLlama):
        return model.architecture()
    if isinstance(model, PretrainedModel):
        folder = model._folder()
    elif isinstance(model, GgufModel):
        folder = model._place(model._source())
    else:
        return None
    return saved_architecture(folder) if folder.is_dir() else None  # GGUF that was not converted yet


def saved_architecture(folder: Path) -> PretrainedConfig:
    """The configuration of the model in a folder. Raises UserError if it cannot be read."""
    from transformers import AutoConfig

    with _one_line_errors(str(folder)):
        return cast("PretrainedConfig", AutoConfig.from_pretrained(folder, local_files_only=True))


def n_parameters(model: Model) -> int | None:
    """How many weights a model has, without loading or drawing one; None where that is not known."""
    import torch
    from transformers import AutoModelForCausalLM

    found = architecture(model)
    if found is None:
        return None
    with _one_line_errors(type(model).__name__), torch.device("meta"):
        return int(AutoModelForCausalLM.from_config(found).num_parameters())


def _load_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _one_line_errors(name):
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(folder, local_files_only=True))


def load_classifier(folder: Path, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier in fp32 on the CPU and its tokenizer. Raises UserError, naming ``name``."""
    from transformers import AutoModelForSequenceClassification

    return _load_model(folder, name, AutoModelForSequenceClassification), _load_tokenizer(folder, name)


def load_scorer(
    folder: Path,
    name: str,
    *,
    classifier: bool,
    precision: Literal["fp32", "bf16"],
    quantisation: Literal["int8", "nf4"] | None,
    device: str,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that only scores, read straight into its precision, and its tokenizer; raises UserError, naming ``name``.

    A sequence classifier or a causal LM. ``device`` auto spreads it over all GPUs, and what they cannot hold over the
    memory of the machine. Quantised weights (8-bit integers or 4-bit NF4) compute in ``precision``.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "device_map": "auto" if device == "auto" else {"": device}}
    if quantisation is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"reward.quantisation={quantisation}: needs a package: pip install bitsandbytes")
        options["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if quantisation == "int8"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        )
    model = _load_model(folder, name, AutoModelForSequenceClassification if classifier else None, options)
    return model.eval(), _load_tokenizer(folder, name)


def _load_model(folder: Path, name: str, kind: Any = None, options: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """``kind`` is an auto class of transformers, by default that of causal LMs; ``options`` are of its loading."""
    import torch
    from transformers import AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
        raise UserError(f"{name}: has no config.json, so it is no model folder (found {found})")
    with _one_line_errors(name), _no_progress_bars():
        loaded: Any = (kind or AutoModelForCausalLM).from_pretrained(
            folder,
            **{"dtype": torch.float32, **(options or {})},
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would draw them at random
        raise UserError(f"{name}: its weights lack {len(missing)} tensors of the model, for instance {missing[0]}")
    return cast("PreTrainedModel", model)


@contextlib.contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """Errors of transformers about what is in a model folder, as UserError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises Exception itself
        said = first_line(error)
        raise UserError(f"{name}: cannot be loaded: {said}") from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Loading and saving take seconds; transformers shows bars of its own for them."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
