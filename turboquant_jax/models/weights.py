"""The decoder from a file of tensors, of whatever format, one tensor in memory at a time."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.gguf import GGUFFile
from turboquant_jax.models.gguf_keys import architecture_of
from turboquant_jax.models.model import Llama
from turboquant_jax.models.sharding import repeat_heads, repeated_heads, shardings


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
    "layers.q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers.o": "model.layers.{}.self_attn.o_proj.weight",
    "layers.o_bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers.up": "model.layers.{}.mlp.up_proj.weight",
    "layers.down": "model.layers.{}.mlp.down_proj.weight",
    "layers.gate_bias": "model.layers.{}.mlp.gate_proj.bias",
    "layers.up_bias": "model.layers.{}.mlp.up_proj.bias",
    "layers.down_bias": "model.layers.{}.mlp.down_proj.bias",
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
    "layers.q_bias": "blk.{}.attn_q.bias",
    "layers.k_bias": "blk.{}.attn_k.bias",
    "layers.v_bias": "blk.{}.attn_v.bias",
    "layers.q_norm": "blk.{}.attn_q_norm.weight",
    "layers.k_norm": "blk.{}.attn_k_norm.weight",
    "layers.o": "blk.{}.attn_output.weight",
    "layers.o_bias": "blk.{}.attn_output.bias",
    "layers.ffn_norm": "blk.{}.ffn_norm.weight",
    "layers.gate": "blk.{}.ffn_gate.weight",
    "layers.up": "blk.{}.ffn_up.weight",
    "layers.down": "blk.{}.ffn_down.weight",
    "layers.gate_bias": "blk.{}.ffn_gate.bias",
    "layers.up_bias": "blk.{}.ffn_up.bias",
    "layers.down_bias": "blk.{}.ffn_down.bias",
}
"""Matrix of a decoder -> tensor of a GGUF file."""

_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

JOINED = {
    "qkv": ("q", "k", "v"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "qk_norm": ("q_norm", "k_norm"),
    "gate_up": ("gate", "up"),
    "gate_up_bias": ("gate_bias", "up_bias"),
}
"""Parameter of `Layer` -> the matrices that it consists of."""


def read_huggingface(
    config: LlamaConfig,
    source: TensorFile,
    dtype: DTypeLike,
    stacked: bool = True,
    mesh: Mesh | None = None,
) -> Llama:
    """The decoder with the weights of a Hugging Face checkpoint, in `dtype`; see `Llama`.

    On a mesh every device is given its part of a parameter (`sharding`).

    A checkpoint whose embedding is tied may store it once more as the head.
    Raises ValueError for a missing, unexpected or wrongly shaped tensor, and for NaN or infinity.
    """
    # Old checkpoints store RoPE's frequencies too; `rope` computes them.
    ignored = {n for n in source.shapes if _FREQUENCIES.fullmatch(n)}
    embedding, head = (HUGGINGFACE_NAMES[matrix] for matrix in ("embedding", "head"))
    stored_twice = config.tie_embeddings and {embedding, head} <= source.shapes.keys()
    if stored_twice and np.array_equal(source.read(embedding), source.read(head)):
        ignored.add(head)
    names, same = HUGGINGFACE_NAMES, lambda matrix, w: w
    return _read(config, source, names, ignored, same, dtype, stacked, mesh)


def read_gguf(
    config: LlamaConfig,
    source: GGUFFile,
    dtype: DTypeLike,
    stacked: bool = True,
    mesh: Mesh | None = None,
) -> Llama:
    """The decoder with the weights of a GGUF file, in `dtype`.

    Where the architecture interleaves the rows of Q and K per head, for a RoPE of adjacent pairs,
    they and their biases are put back into the order of the halves, so that keys have the channel
    order of the original model.
    Raises ValueError for a missing, unexpected or wrongly shaped tensor, and for NaN or infinity.
    """
    _, architecture = architecture_of(source.metadata)
    of_query, of_key = config.num_heads, config.num_kv_heads
    heads = {"layers.q": of_query, "layers.k": of_key}
    heads |= {"layers.q_bias": of_query, "layers.k_bias": of_key}
    ignored = {"rope_freqs.weight"} if architecture.rope_divisors else set()

    def transform(matrix: str, tensor: np.ndarray) -> np.ndarray:
        moved = architecture.interleaved and matrix in heads
        return unpermute(tensor, heads[matrix]) if moved else tensor

    return _read(config, source, GGUF_NAMES, ignored, transform, dtype, stacked, mesh)


def unpermute(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * H, in), or a bias (heads * H): 2i and 2i+1 of each head go to i and i + H/2."""
    half = matrix.shape[0] // heads // 2
    return matrix.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def _read(
    config: LlamaConfig,
    source: TensorFile,
    names: Mapping[str, str],
    ignored: set[str],
    transform: Callable[[str, np.ndarray], np.ndarray],
    dtype: DTypeLike,
    stacked: bool,
    mesh: Mesh | None,
) -> Llama:
    _require_shapes(source, names, _file_shapes(config), config.num_layers, ignored)
    leaves, structure = _abstract(config, np.dtype(dtype), stacked)
    layers = range(config.num_layers)

    def fill(path: Any, leaf: Any, where: Any) -> jax.Array:
        # the last key of a path is the value inside its `nnx.Param`
        place = jax.tree_util.keystr(path[:-1], simple=True, separator=".").split(".")
        filled = np.empty(leaf.shape, leaf.dtype)
        for layer, slot in _layers(place, filled, layers):
            for matrix, part in _matrices(place, slot):
                name = names[matrix].format(layer)
                with np.errstate(all="ignore"):  # what overflows is found below
                    tensor = transform(matrix, source.read(name))
                    # (out, in) to (in, out); the vocabulary matrices stay
                    part[...] = (tensor.T if len(place) > 1 else tensor).reshape(part.shape)
                _require_finite(source, name, part)
        return jax.device_put(repeat_heads(place[-1], filled, own), where)

    own, places = config, [None] * len(leaves)
    if mesh is not None:
        own = repeated_heads(config, mesh)
        placed, structure = _abstract(own, np.dtype(dtype), stacked)
        shapes = jax.tree.unflatten(structure, [leaf for _, leaf in placed])
        places = jax.tree.leaves(shardings(shapes, mesh))
    every = zip(leaves, places, strict=True)
    filled = [fill(path, leaf, where) for (path, leaf), where in every]
    return jax.tree.unflatten(structure, filled)


@functools.lru_cache(maxsize=4)
def _abstract(config: LlamaConfig, dtype: np.dtype, stacked: bool) -> tuple[list, Any]:
    """Paths and shapes of the parameters, and the tree; tracing takes longer than a small file."""
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0), dtype, stacked))
    return jax.tree_util.tree_flatten_with_path(model)


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
    if name in ("qkv", "qkv_bias"):
        parts = slot[..., :-2, :], slot[..., -2, :], slot[..., -1, :]
    elif name in JOINED:
        parts = slot[..., 0, :], slot[..., 1, :]
    for matrix, part in zip(JOINED.get(name, (name,)), parts, strict=True):
        yield matrix if len(place) == 1 else f"layers.{matrix}", part


# The bits of the exponent, all ones in NaN and infinity: numpy's own test of these is slow.
_EXPONENT = {
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7F80),
    np.dtype("float16"): np.uint16(0x7C00),
}


def _require_finite(source: TensorFile, name: str, weights: np.ndarray) -> None:
    """No NaN and no infinity, of the file or of the dtype; in stretches, for the memory."""
    exponent = _EXPONENT.get(weights.dtype)
    rows = max(1, 2**20 * len(weights) // weights.size)
    for start in range(0, len(weights), rows):
        some = weights[start : start + rows]
        if exponent is None:
            finite = np.isfinite(some).all()
        else:
            finite = (some.view(np.uint16) & exponent).max() < exponent
        if not finite:
            raise ValueError(
                f"{source.path}: tensor {name}: got NaN or infinity as {weights.dtype}, "
                "expected finite weights"
            )


def _file_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Matrix of the decoder -> its shape in a file, (out, in)."""
    dim, ffn = config.hidden_size, config.intermediate_size
    queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    shapes = {
        "embedding": (config.vocab_size, dim),
        "norm": (dim,),
        "layers.attention_norm": (dim,),
        "layers.q": (queries, dim),
        "layers.k": (keys, dim),
        "layers.v": (keys, dim),
        "layers.o": (dim, queries),
        "layers.ffn_norm": (dim,),
        "layers.gate": (ffn, dim),
        "layers.up": (ffn, dim),
        "layers.down": (dim, ffn),
    }
    norm = (config.head_dim,)
    optional = (
        (not config.tie_embeddings, {"head": (config.vocab_size, dim)}),
        (config.qkv_bias, {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}),
        (config.o_bias, {"o_bias": (dim,)}),
        (config.qk_norm, {"q_norm": norm, "k_norm": norm}),
        (config.mlp_bias, {"gate_bias": (ffn,), "up_bias": (ffn,), "down_bias": (dim,)}),
    )
    for there, found in optional:
        for name, shape in found.items() if there else ():
            shapes[name if name == "head" else f"layers.{name}"] = shape
    return shapes


def _require_shapes(
    source: TensorFile,
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    num_layers: int,
    ignored: set[str],
) -> None:
    """Exactly the tensors wanted, each in its shape; messages name the first that is not."""
    got, wanted = source.shapes, set()
    for matrix, shape in shapes.items():
        for layer in range(num_layers if "{}" in names[matrix] else 1):
            name = names[matrix].format(layer)
            if name not in got:
                raise ValueError(f"{source.path}: got no tensor {name}, expected shape {shape}")
            if got[name] != shape:
                raise ValueError(
                    f"{source.path}: tensor {name}: got shape {got[name]}, expected {shape}"
                )
            wanted.add(name)
    for name in sorted(got.keys() - wanted - ignored):
        raise ValueError(
            f"{source.path}: got an unexpected tensor {name} of shape {got[name]}, "
            f"expected only the {len(wanted)} tensors of the configuration"
        )
