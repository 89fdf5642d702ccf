"""A decoder over several devices: heads, feed-forward channels and vocabulary over `tensor`.

Only where the parameters lie is said here; products and sums over devices are the compiler's. Of
each layer the matrices that read a hidden vector are split by columns, those that give one back by
rows, so that a layer adds up two vectors of hidden size a token. Logits stay where their rows of
the vocabulary are: the choice of a token compares the best of each device. `past` has the
attention, on the same mesh.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from turboquant_jax.cache.mesh import TENSOR
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


def check_mesh(config: LlamaConfig, mesh: Mesh) -> None:
    """ValueError unless the mesh divides heads, feed-forward channels and vocabulary."""
    tensor = mesh.shape[TENSOR]
    for name in ("num_kv_heads", "intermediate_size", "vocab_size"):
        if (size := getattr(config, name)) % tensor:
            raise ValueError(f"tensor: got {tensor} devices, expected a divisor of {name} {size}")


def shardings(model: Any, mesh: Mesh) -> Any:
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


def shard(model: Llama, mesh: Mesh) -> Llama:
    """A decoder with its parameters on the devices of a mesh."""
    return jax.device_put(model, shardings(model, mesh))


def random_model(
    config: LlamaConfig, seed: int, mesh: Mesh, dtype: DTypeLike = jnp.bfloat16
) -> Llama:
    """`model.random_model` unstacked, the same weights: every device keeps its part of a layer.

    Raises:
      ValueError: a mesh that does not divide the decoder.
    """
    rngs = nnx.Rngs(jax.random.key(seed))
    rngs.params()  # of the embedding, before the layers
    layers = jax.random.split(rngs.params(), config.num_layers)

    def outer(key: jax.Array) -> Llama:
        few = Llama(replace(config, num_layers=1), nnx.Rngs(key), dtype, stacked=False)
        few.config, few.layers = config, nnx.List([])
        return few

    def layer(key: jax.Array) -> Layer:
        return Layer(config, nnx.Rngs(key), dtype)

    def placed(make: Any, key: jax.Array) -> Any:
        return jax.jit(make, out_shardings=shardings(jax.eval_shape(make, key), mesh))

    model = placed(outer, layers[0])(jax.random.key(seed))
    draw = placed(layer, layers[0])
    model.layers = nnx.List(map(draw, layers))
    return model
