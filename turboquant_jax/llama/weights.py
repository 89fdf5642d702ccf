"""The decoder from a file of tensors, of whatever format, one tensor in memory at a time."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from turboquant_jax.llama.config import LlamaConfig
from turboquant_jax.llama.model import Llama


@runtime_checkable
class TensorFile(Protocol):
    """What the formats have in common: matrices are (out, in), as in torch."""

    @property
    def path(self) -> Path:
        """For messages."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""

    def read(self, name: str) -> np.ndarray:
        """One tensor, of any float dtype."""


HUGGINGFACE_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers.up": "model.layers.{}.mlp.up_proj.weight",
    "layers.down": "model.layers.{}.mlp.down_proj.weight",
}
"""Matrix of a decoder -> tensor of a Hugging Face checkpoint; {} is the index of the layer."""

GGUF_NAMES = {
    "embedding": "token_embd.weight",
    "norm": "output_norm.weight",
    "head": "output.weight",
    "layers.attention_norm": "blk.{}.attn_norm.weight",
    "layers.q": "blk.{}.attn_q.weight",
    "layers.k": "blk.{}.attn_k.weight",
    "layers.v": "blk.{}.attn_v.weight",
    "layers.o": "blk.{}.attn_output.weight",
    "layers.ffn_norm": "blk.{}.ffn_norm.weight",
    "layers.gate": "blk.{}.ffn_gate.weight",
    "layers.up": "blk.{}.ffn_up.weight",
    "layers.down": "blk.{}.ffn_down.weight",
}
"""Matrix of a decoder -> tensor of a GGUF file."""

JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
"""Parameter of `Layer` -> the matrices that it consists of."""


def read_huggingface(
    config: LlamaConfig, source: TensorFile, dtype: DTypeLike, stacked: bool = True
) -> Llama:
    """The decoder with the weights of a Hugging Face checkpoint, in `dtype`; see `Llama`.

    Raises ValueError for a missing, unexpected or wrongly shaped tensor.
    """
    # Old checkpoints store RoPE's frequencies too; `rope` computes them.
    ignored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_layers)}
    return _read(config, source, HUGGINGFACE_NAMES, ignored, lambda matrix, w: w, dtype, stacked)


def read_gguf(
    config: LlamaConfig, source: TensorFile, dtype: DTypeLike, stacked: bool = True
) -> Llama:
    """The decoder with the weights of a GGUF file of architecture `llama`, in `dtype`.

    The file interleaves the rows of Q and K per head, for a RoPE of adjacent pairs; they are put
    back into the order of the halves, so that keys have the channel order of the original model.
    Raises ValueError for a missing, unexpected or wrongly shaped tensor.
    """
    heads = {"layers.q": config.num_heads, "layers.k": config.num_kv_heads}

    def transform(matrix: str, tensor: np.ndarray) -> np.ndarray:
        return unpermute(tensor, heads[matrix]) if matrix in heads else tensor

    return _read(config, source, GGUF_NAMES, {"rope_freqs.weight"}, transform, dtype, stacked)


def unpermute(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * H, in): rows 2i and 2i+1 of each head go to rows i and i + H/2."""
    half = matrix.shape[0] // heads // 2
    return matrix.reshape(heads, half, 2, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


def _read(
    config: LlamaConfig,
    source: TensorFile,
    names: Mapping[str, str],
    ignored: set[str],
    transform: Callable[[str, np.ndarray], np.ndarray],
    dtype: DTypeLike,
    stacked: bool,
) -> Llama:
    abstract = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0), dtype, stacked))
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    # the last key of a path is the value inside its `nnx.Param`
    places = [
        jax.tree_util.keystr(path[:-1], simple=True, separator=".").split(".") for path, _ in leaves
    ]
    shapes = [leaf.shape for _, leaf in leaves]
    layers = range(config.num_layers)
    wanted = {
        names[matrix].format(layer): _file_shape(matrix, part)
        for place, shape in zip(places, shapes, strict=True)
        for layer, slot in _layers(place, np.broadcast_to(np.int8(0), shape), layers)
        for matrix, part in _matrices(place, slot)
    }
    _require_shapes(source, wanted, ignored)

    def fill(place: list[str], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        filled = np.empty(leaf.shape, leaf.dtype)
        for layer, slot in _layers(place, filled, layers):
            for matrix, part in _matrices(place, slot):
                tensor = transform(matrix, source.read(names[matrix].format(layer)))
                # (out, in) to (in, out); the vocabulary matrices stay
                part[...] = (tensor.T if len(place) > 1 else tensor).reshape(part.shape)
        return jax.device_put(filled)

    filled = [fill(place, leaf) for place, (_, leaf) in zip(places, leaves, strict=True)]
    return jax.tree.unflatten(structure, filled)


def _layers(
    place: list[str], parameter: np.ndarray, layers: range
) -> Iterator[tuple[int, np.ndarray]]:
    """Index of a layer and what it has of a parameter, a view."""
    if len(place) == 2:  # layers.qkv: stacked
        yield from zip(layers, parameter, strict=True)
    else:  # layers.3.qkv, or norm
        yield int(place[1]) if len(place) > 1 else 0, parameter


def _matrices(place: list[str], slot: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The matrices of a layer's parameter, by name, and their places in it, views."""
    name = place[-1]
    parts: tuple[np.ndarray, ...] = (slot,)
    if name == "qkv":
        parts = slot[:, :, :-2], slot[:, :, -2], slot[:, :, -1]
    elif name == "gate_up":
        parts = slot[:, 0], slot[:, 1]
    for matrix, part in zip(JOINED.get(name, (name,)), parts, strict=True):
        yield matrix if len(place) == 1 else f"layers.{matrix}", part


def _file_shape(matrix: str, part: np.ndarray) -> tuple[int, ...]:
    if part.ndim == 1 or not matrix.startswith("layers."):
        return part.shape
    inputs = 2 if matrix == "layers.o" else 1  # leading axes that are summed over
    return math.prod(part.shape[inputs:]), math.prod(part.shape[:inputs])


def _require_shapes(
    source: TensorFile, wanted: Mapping[str, tuple[int, ...]], ignored: set[str]
) -> None:
    """Exactly the tensors wanted, each in its shape; messages name the first that is not."""
    got = source.shapes
    for name, shape in wanted.items():
        if name not in got:
            raise ValueError(f"{source.path}: got no tensor {name}, expected one of shape {shape}")
        if got[name] != shape:
            raise ValueError(
                f"{source.path}: tensor {name}: got shape {got[name]}, expected {shape}"
            )
    for name in sorted(got.keys() - wanted.keys() - ignored):
        raise ValueError(
            f"{source.path}: got an unexpected tensor {name} of shape {got[name]}, "
            f"expected only the {len(wanted)} tensors of the configuration"
        )
