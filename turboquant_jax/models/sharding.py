"""A decoder over several devices: heads, feed-forward channels and vocabulary over `tensor`.

Only where the parameters lie is said here; products and sums over devices are the compiler's. Of
each layer the matrices that read a hidden vector are split by columns, those that give one back by
rows, so that a layer adds up two vectors of hidden size a token. Logits stay where their rows of
the vocabulary are: the choice of a token compares the best of each device. `past` has the
attention, on the same mesh.

Of fewer kv heads than devices each is on several, with a part of its queries: the decoder is that
of a model with more kv heads, some of them equal, and so is its cache.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from turboquant_jax.cache import mesh as cache_mesh
from turboquant_jax.cache.mesh import TENSOR
from turboquant_jax.models import dense
from turboquant_jax.models import model as models
from turboquant_jax.models.config import LlamaConfig
from turboquant_jax.models.model import Layer, Llama

_SPLIT = {  # parameter -> its axis that is split, counted from the end
    "embedding": -2,
    "head": -2,
    "qkv": -3,
    "qkv_bias": -3,
    "o": -3,
    "gate_up": -1,
    "gate_up_bias": -1,
    "down": -2,
}


def check_mesh(config: LlamaConfig, mesh: Mesh | AbstractMesh) -> None:
    """ValueError unless the mesh divides heads, feed-forward channels and vocabulary."""
    tensor = mesh.shape[TENSOR]
    for name in ("num_kv_heads", "intermediate_size", "vocab_size"):
        if (size := getattr(config, name)) % tensor:
            raise ValueError(f"tensor: got {tensor} devices, expected a divisor of {name} {size}")


def shardings(model: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Where each parameter of a decoder or a layer, or of its shapes, lies: a pytree like it.

    Raises:
      ValueError: a mesh that does not divide the decoder.
    """
    check_mesh(model.config, mesh)

    def of_leaf(path: tuple, leaf: Any) -> NamedSharding:
        # the last key of a path is the value inside its `nnx.Param`
        name = jax.tree_util.keystr(path[-2:-1], simple=True)
        axes: list[str | None] = [None] * leaf.ndim
        if name in _SPLIT:
            axes[_SPLIT[name]] = TENSOR
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(of_leaf, model)


def repeated_heads(config: LlamaConfig, mesh: Mesh | AbstractMesh) -> LlamaConfig:
    """The sizes with every kv head as many times as devices share it; others stay as they are."""
    tensor = mesh.shape[TENSOR]
    if tensor <= config.num_kv_heads or tensor % config.num_kv_heads or config.num_heads % tensor:
        return config
    return replace(config, num_kv_heads=tensor)


def repeat_heads(name: str, parameter: Any, config: LlamaConfig) -> Any:
    """A layer's parameter for more kv heads: `qkv` [..., K, G+2, H] with keys and values repeated.

    Its bias alike; an array of numpy stays one. Other parameters are as they were.
    """
    if name not in ("qkv", "qkv_bias") or parameter.shape[-3] == config.num_kv_heads:
        return parameter
    *batch, heads, group, dim = parameter.shape
    times = config.num_kv_heads // heads
    queries = parameter[..., :-2, :].reshape(*batch, heads * times, (group - 2) // times, dim)
    both = parameter[..., -2:, :].repeat(times, axis=-3)
    join = np.concatenate if isinstance(parameter, np.ndarray) else jnp.concatenate
    return join([queries, both], axis=-2)


def shard(model: Llama, mesh: Mesh) -> Llama:
    """A decoder with its parameters on the devices of a mesh; its heads are `repeated_heads`."""
    own = repeated_heads(model.config, mesh)
    if own != model.config:
        model = jax.tree.map(lambda leaf: leaf, model)
        model.config = own
        for layer in [model.layers] if isinstance(model.layers, Layer) else model.layers:
            _repeat(layer, own)
    return jax.device_put(model, shardings(model, mesh))


def _repeat(layer: Layer, config: LlamaConfig) -> Layer:
    layer.config = config
    layer.qkv = nnx.Param(repeat_heads("qkv", layer.qkv[...], config))
    if layer.qkv_bias is not None:
        layer.qkv_bias = nnx.Param(repeat_heads("qkv_bias", layer.qkv_bias[...], config))
    return layer


def random_model(
    config: LlamaConfig, seed: int, mesh: Mesh, dtype: DTypeLike = jnp.bfloat16
) -> Llama:
    """`model.random_model` unstacked, the same weights: every device keeps its part of each layer.

    Raises:
      ValueError: a mesh that does not divide the decoder.
    """
    own = repeated_heads(config, mesh)
    rngs = nnx.Rngs(jax.random.key(seed))
    rngs.params()  # of the embedding, before the layers
    layers = jax.random.split(rngs.params(), config.num_layers)

    def outer(key: jax.Array) -> Llama:
        few = Llama(replace(config, num_layers=1), nnx.Rngs(key), dtype, stacked=False)
        few.config, few.layers = own, nnx.List([])
        return few

    def layer(key: jax.Array) -> Layer:
        return _repeat(Layer(config, nnx.Rngs(key), dtype), own)

    def compiled(make: Any) -> Any:
        return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, layers[0]), mesh))

    model, draw = compiled(outer)(jax.random.key(seed)), compiled(layer)
    model.layers = nnx.List(map(draw, layers))
    return model


def parameters_of_shard(config: LlamaConfig, mesh: Mesh | AbstractMesh) -> int:
    """How many parameters each device has.

    Raises:
      ValueError: a mesh that does not divide the decoder.
    """
    own = repeated_heads(config, mesh)
    shapes = jax.eval_shape(partial(models.random_model, own, 0, stacked=False))
    places = jax.tree.leaves(shardings(shapes, mesh))
    leaves = zip(jax.tree.leaves(shapes), places, strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) for leaf, place in leaves)


def past_shardings(state: Any, mesh: Mesh) -> Any:
    """Where each array of a past, compressed or dense, or of its shapes, lies."""
    specs = dense.specs if isinstance(state, dense.Dense) else cache_mesh.specs
    return jax.tree.map(lambda _, spec: NamedSharding(mesh, spec), state, specs(state))


def make_past(make: Callable[[], Any], mesh: Mesh | None) -> Any:
    """The past that `make()` gives; on a mesh, if there is one, no device ever has all of it."""
    if mesh is None:
        return make()
    return jax.jit(make, out_shardings=past_shardings(jax.eval_shape(make), mesh))()


def placed(shapes: Any, places: Any) -> Any:
    """Shapes with their places, to compile for."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )
